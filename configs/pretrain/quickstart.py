"""The run behind `bertjax quickstart`: a 2-layer BERT on embedded text, minutes on two cores.

2 layers rather than 4: within these few steps deeper models stay on the unigram plateau.
"""

from bertjax import pretrain


def get_config(arg=''):
  config = pretrain.default_config('tiny')
  config.data.input, config.data.length, config.masking.max_predictions = 'embedded', 64, 10
  config.model.max_positions = 128
  config.model.hidden_dropout = config.model.attention_dropout = 0.0
  config.model.initializer_range = 0.05  # 0.02 suits 768 wide; 128 wide leaves the plateau sooner
  config.batch_size, config.steps, config.warmup_steps = 32, 3_600, 300
  config.learning_rate = 1e-3
  config.log_every, config.eval_every, config.save_every = 100, 1_200, 600
  return pretrain.vary(config, arg, pretrain.SMOKE)
