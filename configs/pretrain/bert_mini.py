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
  return vary(vary(pretraining('mini'), 'mini'), arg)
