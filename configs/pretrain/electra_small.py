"""ELECTRA-small's encoder (Clark et al. 2020), trained as a masked LM: the paper's BERT-small.

  bertjax prepare  --config=electra_small --out=ROWS \\
      --config.data.input=TEXTS --config.data.vocab=vocab.txt
  bertjax pretrain --config=electra_small --workdir=DIR --config.data.prepared=ROWS

128 rows of 128 tokens for 1,000,000 steps, learning rate 5e-4 after 10,000 steps of warm-up. This
is the masked LM only, without a discriminator: the baseline of the paper's table 1, GLUE 75.1 after
4 days on one V100 GPU (replaced-token detection: 79.9).

After a colon: `smoke` (seconds) and the words of `bert_base`.
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('electra_small')
  config.model.dtype = 'bfloat16'
  config.nsp = False
  config.batch_size, config.learning_rate = 128, 5e-4
  return vary(config, arg)
