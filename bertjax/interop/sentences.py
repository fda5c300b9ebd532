"""sentence-transformers' folders: how a model's token states become one vector for a text.

`modules.json` lists what comes after the encoder: pooling, dense layers, scaling to length 1. A
`CrossEncoder` is a classifier with one output, and its files name the activation of the score.
"""

import dataclasses
import json
import re
from collections.abc import Mapping

import numpy as np
from etils import epath

from bertjax.interop import files

_POOLINGS = {
  'mean': 'mean', 'mean_tokens': 'mean', 'cls': 'cls', 'cls_token': 'cls',
  'lasttoken': 'last', 'last_token': 'last',
}  # fmt: skip
_ACTIVATIONS = {'Tanh': np.tanh, 'Identity': lambda x: x}
_OF_SCORES = {'sigmoid': 'torch.nn.modules.activation.Sigmoid',
              'identity': 'torch.nn.modules.linear.Identity'}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SentenceLayers:
  """What follows the encoder.

  Attributes:
    pooling: 'mean', 'cls' or 'last'.
    steps: functions of vectors [N, D], in order.
    max_length: tokens of a text with [CLS] and [SEP]; 0 = the model's positions.
    prompts: name, such as 'query' or 'document' -> text in front of a text.
    default_prompt: name of the prompt where none is given; '' = none.
  """

  pooling: str = 'mean'
  steps: tuple = ()
  max_length: int = 0
  prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  default_prompt: str = ''


def normalise(vectors: np.ndarray) -> np.ndarray:
  """Vectors [N, D] of length 1."""
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def write_layers(
  folder: epath.Path, width: int, *, pooling: str, prompts: Mapping[str, str], max_length: int
) -> None:
  """Writes sentence-transformers' files beside a model: pooling, and scaling to length 1.

  Args:
    folder: of the model.
    width: D, of the vectors.
    pooling: see `SentenceLayers`.
    prompts: likewise.
    max_length: likewise.
  """
  mode = {'mean': 'mean_tokens', 'cls': 'cls_token', 'last': 'lasttoken'}[pooling]
  kinds = (('Transformer', ''), ('Pooling', '1_Pooling'), ('Normalize', '2_Normalize'))
  modules = [
    {'idx': i, 'name': str(i), 'path': path, 'type': f'sentence_transformers.models.{kind}'}
    for i, (kind, path) in enumerate(kinds)
  ]
  modes = {f'pooling_mode_{name}': name == mode
           for name in ('cls_token', 'mean_tokens', 'max_tokens', 'lasttoken')}  # fmt: skip
  contents = {
    'modules.json': modules,
    '1_Pooling/config.json': {'word_embedding_dimension': width, **modes},
    'sentence_bert_config.json': {'max_seq_length': max_length, 'do_lower_case': False},
    'config_sentence_transformers.json': {
      'prompts': dict(prompts), 'default_prompt_name': None, 'similarity_fn_name': 'cosine'
    },
  }  # fmt: skip
  for name in ('1_Pooling', '2_Normalize'):
    (folder / name).mkdir()
  for name, content in contents.items():
    (folder / name).write_text(json.dumps(content, indent=2) + '\n')


def config_fields(sentence: Mapping | None) -> dict:
  """The fields of `config.json` that name the 'activation' of a reranker's scores; {} without."""
  if not sentence or 'activation' not in sentence:
    return {}
  return {'sentence_transformers': {'activation_fn': _OF_SCORES[sentence['activation']]}}


def is_cross_encoder(root: epath.Path) -> bool:
  """Whether the folder names itself a CrossEncoder, which has no layers that make vectors."""
  settings = files.read_json(root / 'config_sentence_transformers.json', optional=True)
  return settings.get('model_type') == 'CrossEncoder'


def read_activation(root: epath.Path) -> str:
  """The activation of a CrossEncoder's scores, 'sigmoid' or 'identity'; '' if none is named.

  Raises:
    ValueError: for another one, or a prompt in front of the texts.
  """
  settings = files.read_json(root / 'config_sentence_transformers.json', optional=True)
  config = files.read_json(encoder_folder(root) / 'config.json')
  own = config.get('sentence_transformers') or {}
  name = str(settings.get('activation_fn') or own.get('activation_fn')
             or config.get('sbert_ce_default_activation_function') or '')  # fmt: skip
  found = {theirs.rpartition('.')[2]: ours for ours, theirs in _OF_SCORES.items()} | {'': ''}
  if (kind := name.rpartition('.')[2]) not in found:
    raise ValueError(
      f'{root}: the activation {name} of its scores is not supported; supported are Sigmoid and '
      'Identity.'
    )
  if is_cross_encoder(root) and settings.get('default_prompt_name'):
    raise ValueError(f'{root}: prompts of a CrossEncoder are not supported.')
  return found[kind]


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
  max_length = _read_transformer(root / first.get('path', ''))
  pooling, steps = '', []
  for module in others:
    kind, folder = _kind(module), root / module.get('path', '')
    if kind == 'Pooling' and not pooling:
      pooling, with_prompt = _read_pooling(folder / 'config.json')
    elif kind == 'Dense' and pooling:
      steps.append(_read_dense(folder))
    elif kind == 'Normalize' and pooling:
      steps.append(normalise)
    elif kind != 'Dropout':
      raise _unsupported(root / 'modules.json', f'the module {kind}')
  if not pooling:
    raise _unsupported(root / 'modules.json', 'no Pooling module')
  prompts, default = _read_prompts(root)
  if any(prompts.values()) and not with_prompt:
    raise _unsupported(root / 'modules.json', 'include_prompt=false, pooling without the prompt,')
  return SentenceLayers(pooling, tuple(steps), max_length, prompts, default)


def _modules(root) -> list[dict]:
  modules = files.read_json(root / 'modules.json', list)
  if not modules or not all(isinstance(module, dict) for module in modules):
    raise ValueError(f'{root / "modules.json"} is corrupt: it lists no modules.')
  return modules


def _kind(module: dict) -> str:
  return str(module.get('type', '')).rsplit('.', 1)[-1]


def _unsupported(path, what: str) -> ValueError:
  return ValueError(
    f'{path}: {what} is not supported; supported are a Transformer, Pooling by mean, cls or last '
    'token, Dense and Normalize. Name a pooling (--pooling=mean) for the encoder without them.'
  )


def _read_transformer(folder) -> int:
  """The most tokens of a text; 0 if nothing is said."""
  path = folder / 'sentence_bert_config.json'
  settings = files.read_json(path, optional=True)
  tokenizer = files.read_json(folder / 'tokenizer_config.json', optional=True)
  if settings.get('do_lower_case') and not tokenizer.get('do_lower_case', True):
    raise _unsupported(path, 'do_lower_case=true with a cased tokenizer')
  return settings.get('max_seq_length') or 0


def _read_prompts(root) -> tuple[dict[str, str], str]:
  """The prompts by name, and the name of the default one."""
  path = root / 'config_sentence_transformers.json'
  settings = files.read_json(path, optional=True)
  prompts, default = settings.get('prompts') or {}, settings.get('default_prompt_name') or ''
  if default and default not in prompts:
    raise ValueError(f'{path} has no prompt {default!r}, its default; it has {sorted(prompts)}.')
  return prompts, default


def _read_pooling(path) -> tuple[str, bool]:
  """The pooling, and whether it includes the tokens of a prompt."""
  settings = files.read_json(path)
  modes = settings.get('pooling_mode')
  if modes is None:  # until version 5, a field for each
    named = {re.sub('^pooling_mode_', '', name): on for name, on in settings.items()}
    modes = [name for name, on in named.items() if on is True and name != 'include_prompt']
  modes = [modes] if isinstance(modes, str) else modes or ['mean']
  if len(modes) > 1 or modes[0] not in _POOLINGS:
    raise _unsupported(path, f'the pooling {" and ".join(modes)}')
  return _POOLINGS[modes[0]], settings.get('include_prompt', True)


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
