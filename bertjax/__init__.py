"""bertjax: BERT pre-training in JAX and Flax.

Names load on first use, so `import bertjax` is quick and imports neither TensorFlow nor torch.
"""

import importlib

_PUBLIC = {
  'EncoderConfig': 'bertjax.model.config',
  'Bert': 'bertjax.model.heads',
  'Tokenizer': 'bertjax.data.tokenizer',
  'Predictor': 'bertjax.inference.predictor',
  'load_model': 'bertjax.interop.loading',
  'save_model': 'bertjax.interop.loading',
  'make_mesh': 'bertjax.training.mesh',
  'make_optimizer': 'bertjax.training.optimizer',
  'TrainState': 'bertjax.training.loop',
  'make_train_step': 'bertjax.training.loop',
  'fit': 'bertjax.training.loop',
  'TASKS': 'bertjax.tasks',
}

__all__ = list(_PUBLIC)
__version__ = '0.1.0'


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f'bertjax has no {name!r}; public names are {", ".join(__all__)}.')
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
  return __all__
