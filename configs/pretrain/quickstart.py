"""The run behind `bertjax quickstart`: a 2-layer BERT on embedded text, minutes on two cores.

  bertjax pretrain --config=quickstart --workdir=DIR --config.data.vocab=vocab.txt

What lets so small a model leave the unigram plateau so soon: rows of one document (without
next-sentence pairs, whose halves have little context), 2 layers rather than 4, initial weights
of 0.05 rather than 0.02 (which suits 768 wide), no dropout.
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('tiny')
  config.nsp = False
  config.data.input, config.data.length, config.masking.max_predictions = 'embedded', 64, 10
  config.data.short_seq_prob = 0.0
  config.model.max_positions = 128
  config.model.initializer_range = 0.05
  config.model.hidden_dropout = config.model.attention_dropout = 0.0
  config.model.unroll = 2
  config.batch_size, config.num_train_steps, config.warmup_steps = 32, 3_200, 200
  config.learning_rate = 1e-3
  config.data.heldout_fraction = 0.1  # of some 380 documents
  config.log_every, config.eval_every, config.save_every = 100, 800, 400
  return vary(config, arg)
