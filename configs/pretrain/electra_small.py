"""ELECTRA-small (Clark et al. 2020): a discriminator that finds the tokens a generator replaced.

  bertjax prepare  --config=electra_small --out=ROWS \\
      --config.data.input=TEXTS --config.data.vocab=vocab.txt
  bertjax pretrain --config=electra_small --workdir=DIR --config.data.prepared=ROWS

128 rows of 128 tokens for 1,000,000 steps, learning rate 5e-4 after 10,000 steps of warm-up: GLUE
79.9 after 4 days on one V100 GPU (table 1). The generator is a quarter as wide and shares its
embeddings with the discriminator; of the selected tokens 85% become [MASK], as in Google's code.
DIR/model is the discriminator, which is fine-tuned, and DIR/generator the generator.

--config.objective=mlm trains the encoder as a masked LM, the paper's BERT-small (GLUE 75.1).

After a colon: `smoke` (seconds) and the words of `bert_base`.
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('electra_small')
  config.model.dtype = 'bfloat16'
  config.nsp, config.objective = False, 'electra'
  config.masking.mask_prob, config.masking.random_prob = 0.85, 0.0
  config.batch_size, config.learning_rate = 128, 5e-4
  return vary(config, arg)
