"""BERT-large as the paper trained it (Devlin et al. 2018): 24 layers, 1024 wide, 336 M parameters.

  bertjax pretrain --config=bert_large --workdir=DIR --config.data.prepared=ROWS

As `bert_base`, whose words after the colon it shares. The paper took 4 days on 64 TPU chips. On
less memory, `--config.model.remat=dots` and `--config.gradient_accumulation_steps=8` keep the batch
as it is.
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('large')
  config.model.dtype = 'bfloat16'
  config.data.dupe_factor = 10
  return vary(config, arg)
