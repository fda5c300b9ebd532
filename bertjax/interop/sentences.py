"""sentence-transformers' folders: how a model's token states become one vector for a text.

`modules.json` lists what comes after the encoder: pooling, dense layers, scaling to length 1.
"""

import dataclasses
import re

import numpy as np
from etils import epath

from bertjax.interop import files

_POOLINGS = {'mean': 'mean', 'cls': 'cls', 'mean_tokens': 'mean', 'cls_token': 'cls'}
_ACTIVATIONS = {'Tanh': np.tanh, 'Identity': lambda x: x}


@dataclasses.dataclass(frozen=True)
class SentenceLayers:
  """What follows the encoder.

  Attributes:
    pooling: 'mean' or 'cls'.
    steps: functions of vectors [N, D], in order.
    max_length: tokens of a text with [CLS] and [SEP]; 0 = the model's positions.
  """

  pooling: str = 'mean'
  steps: tuple = ()
  max_length: int = 0


def normalise(vectors: np.ndarray) -> np.ndarray:
  """Vectors [N, D] of length 1."""
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def encoder_folder(root: epath.Path) -> epath.Path:
  """The folder of the encoder: early versions kept it in a separate folder, '0_Transformer'."""
  if (root / 'modules.json').is_file() and not (root / 'config.json').is_file():
    return root / _modules(root)[0].get('path', '')
  return root


def read_layers(root: epath.Path) -> SentenceLayers:
  """The layers that `modules.json` lists.

  Raises:
    ValueError: if a file is missing or corrupt, or a layer is not supported; names it.
  """
  first, *others = _modules(root)
  if _kind(first) != 'Transformer':
    raise _unsupported(root / 'modules.json', f'the first module is {_kind(first)}')
  max_length = _read_transformer(root, root / first.get('path', ''))
  pooling, steps = '', []
  for module in others:
    kind, folder = _kind(module), root / module.get('path', '')
    if kind == 'Pooling' and not pooling:
      pooling = _read_pooling(folder / 'config.json')
    elif kind == 'Dense' and pooling:
      steps.append(_read_dense(folder))
    elif kind == 'Normalize' and pooling:
      steps.append(normalise)
    elif kind != 'Dropout':
      raise _unsupported(root / 'modules.json', f'the module {kind}')
  if not pooling:
    raise _unsupported(root / 'modules.json', 'no Pooling module')
  return SentenceLayers(pooling, tuple(steps), max_length)


def _modules(root) -> list[dict]:
  modules = files.read_json(root / 'modules.json', list)
  if not modules or not all(isinstance(module, dict) for module in modules):
    raise ValueError(f'{root / "modules.json"} is corrupt: it lists no modules.')
  return modules


def _kind(module: dict) -> str:
  return str(module.get('type', '')).rsplit('.', 1)[-1]


def _unsupported(path, what: str) -> ValueError:
  return ValueError(
    f'{path}: {what} is not supported; supported are a Transformer, Pooling by mean or cls, Dense '
    'and Normalize. Name a pooling (--pooling=mean) for the encoder without them.'
  )


def _read_transformer(root, folder) -> int:
  """The most tokens of a text; 0 if nothing is said."""
  path = folder / 'sentence_bert_config.json'
  settings = files.read_json(path, optional=True)
  tokenizer = files.read_json(folder / 'tokenizer_config.json', optional=True)
  if settings.get('do_lower_case') and not tokenizer.get('do_lower_case', True):
    raise _unsupported(path, 'do_lower_case=true with a cased tokenizer')
  path = root / 'config_sentence_transformers.json'
  prompts = files.read_json(path, optional=True)
  prompt = (prompts.get('prompts') or {}).get(prompts.get('default_prompt_name'))
  if prompt:
    raise _unsupported(path, f'the default prompt {prompt!r}, which is put before every text,')
  return settings.get('max_seq_length') or 0


def _read_pooling(path) -> str:
  settings = files.read_json(path)
  modes = settings.get('pooling_mode')
  if modes is None:  # until version 5, a field for each
    named = {re.sub('^pooling_mode_', '', name): on for name, on in settings.items()}
    modes = [name for name, on in named.items() if on is True and name != 'include_prompt']
  modes = [modes] if isinstance(modes, str) else modes or ['mean']
  if len(modes) > 1 or modes[0] not in _POOLINGS:
    raise _unsupported(path, f'the pooling {" and ".join(modes)}')
  return _POOLINGS[modes[0]]


def _read_dense(folder):
  """The function of a Dense module."""
  path = folder / 'config.json'
  settings = files.read_json(path)
  name = str(settings.get('activation_function', 'Tanh')).rsplit('.', 1)[-1]
  between = {
    settings.get(f'module_{end}_name') or 'sentence_embedding' for end in ('input', 'output')
  }
  if name not in _ACTIVATIONS or settings.get('use_residual') or between != {'sentence_embedding'}:
    raise _unsupported(path, f'Dense with activation_function={name}, residual or other names')
  tensors = files.read_tensors(files.find_weights(folder))
  kernel, activation = tensors['linear.weight'].astype(np.float32), _ACTIVATIONS[name]
  bias = tensors['linear.bias'].astype(np.float32) if settings.get('bias', True) else np.float32(0)
  return lambda vectors: activation(vectors @ kernel.T + bias)
