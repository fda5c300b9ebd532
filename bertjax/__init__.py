"""bertjax: BERT-style encoders in JAX and Flax. Pre-train, fine-tune, use, export.

Names load on first use, so `import bertjax` is fast and imports neither JAX nor TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; `_NAMES` is the same list at run time
  from bertjax import objectives as objectives
  from bertjax.data.tokenizer import Tokenizer as Tokenizer
  from bertjax.inference.predictor import Predictor as Predictor
  from bertjax.interop.loading import load_model as load_model
  from bertjax.interop.loading import save_model as save_model
  from bertjax.model.config import EncoderConfig as EncoderConfig
  from bertjax.model.config import albert_base as albert_base
  from bertjax.model.config import bert_base as bert_base
  from bertjax.model.config import bert_large as bert_large
  from bertjax.model.config import bert_medium as bert_medium
  from bertjax.model.config import bert_mini as bert_mini
  from bertjax.model.config import bert_small as bert_small
  from bertjax.model.config import bert_tiny as bert_tiny
  from bertjax.model.config import electra_small as electra_small
  from bertjax.model.config import modernbert_base as modernbert_base
  from bertjax.model.config import modernbert_large as modernbert_large
  from bertjax.model.config import roberta_base as roberta_base
  from bertjax.model.heads import Bert as Bert
  from bertjax.tasks import TASKS as TASKS
  from bertjax.training.loop import TrainState as TrainState
  from bertjax.training.loop import fit as fit
  from bertjax.training.loop import init_state as init_state
  from bertjax.training.loop import make_eval_step as make_eval_step
  from bertjax.training.loop import make_train_step as make_train_step
  from bertjax.training.mesh import make_mesh as make_mesh
  from bertjax.training.optimizer import make_optimizer as make_optimizer

_NAMES = {
  'bertjax': ['objectives'],
  'bertjax.data.tokenizer': ['Tokenizer'],
  'bertjax.inference.predictor': ['Predictor'],
  'bertjax.interop.loading': ['load_model', 'save_model'],
  'bertjax.model.config': ['EncoderConfig', 'bert_tiny', 'bert_mini', 'bert_small', 'bert_medium',
                           'bert_base', 'bert_large', 'modernbert_base', 'modernbert_large',
                           'roberta_base', 'albert_base', 'electra_small'],
  'bertjax.model.heads': ['Bert'],
  'bertjax.tasks': ['TASKS'],
  'bertjax.training.loop': ['TrainState', 'init_state', 'make_train_step', 'make_eval_step', 'fit'],
  'bertjax.training.mesh': ['make_mesh'],
  'bertjax.training.optimizer': ['make_optimizer'],
}  # fmt: skip
_PUBLIC = {name: module for module, names in _NAMES.items() for name in names}

__all__ = list(_PUBLIC)
__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
  if name not in _PUBLIC:
    raise AttributeError(f'bertjax has no {name!r}; public names are {", ".join(__all__)}.')
  if _PUBLIC[name] == 'bertjax':
    return importlib.import_module(f'bertjax.{name}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return __all__
