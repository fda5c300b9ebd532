"""BERT-base as the paper trained it (Devlin et al. 2018, section 3.1 and appendix A.2).

  bertjax prepare  --config=bert_base --out=ROWS \\
      --config.data.input=TEXTS --config.data.vocab=vocab.txt
  bertjax pretrain --config=bert_base --workdir=DIR --config.data.prepared=ROWS

256 rows of 128 tokens for 1,000,000 steps, learning rate 1e-4 after 10,000 steps of warm-up,
decay 0.01, dropout 0.1. The paper took 4 days on 16 TPU chips and gave the last 100,000 of these
steps rows of 512 tokens, for position embeddings beyond 128: `bert_base:two_lengths`, with two
prepared folders (the second by `bertjax prepare --config=bert_base:length_512`), named by
`--config.data.prepared` and `--config.stages[1].prepared`. As a separate run with fresh moments it
is `bert_base:length_512`, started with `--config.init_from=DIR/model`.

After a colon: `no_nsp`, `ltr` (Table 5), `mask_80_20` etc. (Table 8), `size_6_768_12` etc.
(Table 6), `smoke` (seconds).
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('base')
  config.model.dtype = 'bfloat16'
  config.data.dupe_factor = 10
  return vary(config, arg)
