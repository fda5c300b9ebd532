"""DistilBERT (Sanh et al. 2019): a student of half the layers learns from BERT-base.

  bertjax prepare  --config=distil_base --out=ROWS --input=TEXTS --vocab=TEACHER
  bertjax pretrain --config=distil_base --workdir=DIR --config.data.prepared=ROWS \\
      --config.distill.teacher=TEACHER --model=TEACHER --config.init_layers=0,2,4,7,9,11

TEACHER is a model directory or hub name, such as bert-base-uncased; the student starts from six of
its layers, those that the authors' code takes. 4,096 rows of 128 tokens for 50,000 steps, learning
rate 5e-4 after 2,500 steps of warm-up. The loss is 5 * soft targets at temperature 2 + 2 * masked
LM + cosine of the last states. The paper used 8 V100 GPUs for about 90 hours; its student has GLUE
77.0, BERT-base 79.5 (development sets). Unlike DistilBERT the student keeps the token types.

After a colon: `smoke` (seconds; the teacher then has width 32) and the words of `bert_base`.
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('base')
  config.model.num_layers, config.model.dtype = 6, 'bfloat16'
  config.nsp, config.objective = False, 'distill'
  config.batch_size, config.num_train_steps, config.warmup_steps = 4096, 50_000, 2_500
  config.learning_rate, config.schedule = 5e-4, 'linear'
  return vary(config, arg)
