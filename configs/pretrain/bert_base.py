"""BERT-base as the paper trained it (Devlin et al. 2018, section 3.1 and appendix A.2).

  bertjax prepare  --config=bert_base --out=ROWS \\
      --config.data.input=TEXTS --config.data.vocab=vocab.txt
  bertjax pretrain --config=bert_base --workdir=DIR --config.data.prepared=ROWS

256 rows of 128 tokens for 1,000,000 steps, learning rate 1e-4 after 10,000 steps of warm-up,
decay 0.01, dropout 0.1; the paper gives the last 100,000 steps rows of 512 tokens, for position
embeddings beyond 128: `bert_base:length_512` is that second part, started with
`--config.init_from=DIR/model`. The paper took 4 days on 16 TPU chips.

After a colon: `no_nsp`, `ltr` (Table 5), `mask_80_20` etc. (Table 8), `size_6_768_12` etc.
(Table 6), `smoke` (seconds, embedded text).
"""

from bertjax import pretrain


def get_config(arg=''):
  config = pretrain.default_config('base')
  config.model.dtype = 'bfloat16'
  config.data.passes = 10
  words = arg.split(',')
  if 'length_512' in words:
    words.remove('length_512')
    config.data.length, config.masking.max_predictions = 512, 76
    config.steps, config.warmup_steps = 100_000, 1_000
    config.learning_rate = 1e-5  # where the first part's decay ends, at step 900,000
  return pretrain.vary(config, ','.join(words), pretrain.SMOKE)
