"""ModernBERT-base (Warner et al. 2024, arXiv 2412.13663): the first of its three phases.

  bertjax prepare  --config=modernbert_base --out=ROWS \\
      --config.data.input=TEXTS --config.data.vocab=VOCAB
  bertjax pretrain --config=modernbert_base --workdir=DIR --config.data.prepared=ROWS

Packed rows of 1,024 tokens, no next-sentence prediction, 30% masks, no dropout, rotary theta 10,000
in all layers, StableAdamW with a peak learning rate of 8e-4 after 3 B tokens of warm-up. The paper
took 4,608 rows a step for 1.72 T tokens on 8 H100 (GLUE 88.4); these are 50 B tokens of 512 rows a
step. Of 16 GB a chip, 4 rows take 9.7 (docs/benchmarks.md): `gradient_accumulation_steps` is 16 on
v5e:2x4, 2 on v5e:8x8.

Words after a colon: `three_stages` adds rows of 8,192 tokens with theta 160,000, then a decay by
1 - sqrt with half the masks; `smoke` (seconds) and the other words of `bert_base`.
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('modernbert_base')
  config.model.dtype = 'bfloat16'
  config.model.rope_theta = 10_000.0  # 160,000 from the phase of 8,192 tokens on
  config.nsp = False
  config.data.lowercase = False
  config.data.length, config.data.max_sequences_per_row = 1024, 16
  config.masking.rate, config.masking.max_predictions = 0.3, -1
  config.batch_size, config.num_train_steps, config.warmup_steps = 512, 95_000, 5_700
  config.learning_rate, config.schedule = 8e-4, 'linear'
  config.optimizer.name, config.optimizer.weight_decay = 'stable_adamw', 1e-5
  config.optimizer.b2, config.optimizer.clip_norm = 0.98, 0.0
  return vary(config, arg)
