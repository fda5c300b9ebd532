"""MiniLM (Wang et al. 2020): a narrow student learns the attention of the teacher's last layer.

  bertjax prepare  --config=minilm --out=ROWS --input=TEXTS --vocab=TEACHER
  bertjax pretrain --config=minilm --workdir=DIR --config.data.prepared=ROWS \\
      --config.distill.teacher=TEACHER

TEACHER is a model directory or hub name, such as bert-base-uncased. The student has 6 layers of
width 384 with as many heads as the teacher (12), starts from random weights, and learns the
relations of queries and keys and of values of one layer (`distill.layer`, the last). Texts are not
masked. 256 rows of 512 tokens for 400,000 steps, learning rate 3e-4 after 4,000 steps of warm-up.

The model is an encoder without heads: it is fine-tuned. After a colon: `smoke` (seconds; the
teacher then has 2 heads) and the words of `bert_base`.
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('base')
  config.model.update({'num_layers': 6, 'hidden_size': 384, 'mlp_size': 1536, 'dtype': 'bfloat16'})
  config.nsp, config.objective = False, 'distill'
  config.distill.update({'mlm_weight': 0.0, 'soft_weight': 0.0, 'cosine_weight': 0.0,
                         'attention_weight': 1.0, 'value_weight': 1.0})  # fmt: skip
  config.masking.mask_prob, config.masking.random_prob = 0.0, 0.0
  config.data.length = 512
  config.batch_size, config.num_train_steps, config.warmup_steps = 256, 400_000, 4_000
  config.learning_rate, config.schedule = 3e-4, 'linear'
  return vary(config, arg)
