"""ALBERT-base (Lan et al. 2020): shared layers, sentence order, spans of up to three words.

  bertjax prepare  --config=albert_base --out=ROWS \\
      --config.data.input=TEXTS --config.data.vocab=spiece.model
  bertjax pretrain --config=albert_base --workdir=DIR --config.data.prepared=ROWS

4,096 rows of 512 tokens for 125,000 steps with LAMB, learning rate 0.00176 after 3,125 steps of
warm-up, no dropout (as version 2). Pairs are two segments of one document, swapped in half of the
examples, and masks are n-grams of words. The paper used 64 to 512 TPU v3 chips; the published
version 2 has 84.6 on MNLI, 92.9 on SST-2 and F1 90.2 on SQuAD 1.1 (development sets).

After a colon: `smoke` (seconds) and the words of `bert_base`.
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('albert_base')
  config.model.dtype = 'bfloat16'
  config.data.kind, config.data.length = 'sop', 512
  config.masking.unit, config.masking.max_predictions = 'span', 77
  config.batch_size, config.num_train_steps, config.warmup_steps = 4096, 125_000, 3_125
  config.learning_rate, config.optimizer.name = 0.00176, 'lamb'
  return vary(config, arg)
