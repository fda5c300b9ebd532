"""BERT-mini (4 layers, 256 wide) for two cores or one small GPU: hours on some ten million words.

  bertjax vocab    --input=TEXTS --size=8192 --out=vocab.txt
  bertjax pretrain --config=bert_mini --workdir=DIR \\
      --config.data.input=TEXTS --config.data.vocab=vocab.txt

On 131 books, with `--config.num_train_steps=5500` of a decay, next-sentence accuracy rose from step
3,500 on (README). Takes the words of `bert_base` after a colon: `no_nsp`, `ltr`, `mask_80_20`,
`size_2_128_2`, `smoke`.
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('mini')
  config.batch_size = 16  # more steps for the same tokens; not compared with 32
  config.num_train_steps, config.warmup_steps, config.learning_rate = 40_000, 1_000, 1e-3
  config.model.initializer_range = 0.05  # as the quickstart; 0.02 suits 768 wide
  config.model.unroll = 4  # a 2-layer model ran at 21.8k instead of 18.1k tokens/s on two cores
  config.model.hidden_dropout = config.model.attention_dropout = 0.0  # far from one epoch too many
  config.log_every, config.eval_every, config.max_eval_examples, config.save_every = (
    50,
    1_000,
    1_024,
    500,
  )
  return vary(config, arg)
