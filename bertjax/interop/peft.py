"""PEFT's folders: adapters (LoRA) and trained heads, beside the base model that they are for.

`adapter_config.json` names the base model, and `adapter_model.safetensors` has two matrices for
each adapted module, A (r, in) and B (out, r), and the complete modules of `modules_to_save`.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

import flax.traverse_util
import numpy as np
from etils import epath
from safetensors.numpy import save as tensors_to_bytes

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import families, files, huggingface, mapping
from bertjax.model.config import HEADS, EncoderConfig

CONFIG = 'adapter_config.json'
_PREFIX = 'base_model.model.'
# The class of PEFT for a model with this head; without one it takes any model.
_TASK_TYPES = {'classification': 'SEQ_CLS', 'tagging': 'TOKEN_CLS', 'span': 'QUESTION_ANS'}
# Fields of LoraConfig that change what adapters compute -> the values with which they do not.
_PLAIN = {
  'bias': ('none',), 'init_lora_weights': (True, False, 'gaussian', 'eva', 'orthogonal'),
  **dict.fromkeys((
    'use_dora', 'fan_in_fan_out', 'rank_pattern', 'alpha_pattern', 'lora_bias', 'use_qalora',
    'layer_replication', 'trainable_token_indices', 'target_parameters', 'alora_invocation_tokens',
    'use_bdlora', 'arrow_config', 'kasa_config', 'monteclora_config', 'megatron_config',
  ), (None, False, {}, [])),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
  """What PEFT's folder says of its adapters.

  Attributes:
    rank: r.
    alpha: scale times r, or times sqrt(r) with `rslora`.
    rslora: see `alpha`.
    base: the base model: a folder or a hub name.
  """

  rank: int
  alpha: float
  rslora: bool = False
  base: str = ''

  @property
  def scale(self) -> float:
    """Factor of A B."""
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def read_settings(folder) -> tuple[Settings, dict]:
  """The settings of PEFT's folder, and all of its `adapter_config.json`.

  Raises:
    ValueError: for adapters of another kind, or a field that we do not have; names it.
  """
  path = epath.Path(folder) / CONFIG
  content = files.read_json(path)
  if (kind := content.get('peft_type')) != 'LORA':
    raise ValueError(f'{path}: peft_type={kind!r} is not supported; adapters are read from LORA.')
  for name, plain in _PLAIN.items():
    if (value := content.get(name, plain[0])) not in plain:
      raise ValueError(f'{path}: {name}={value!r} is not supported; merge the model with peft.')
  rank, alpha = content.get('r'), content.get('lora_alpha', 8)
  if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
    raise ValueError(f'{path}: r={rank!r} must be a rank and lora_alpha={alpha!r} a number.')
  base, revision = content.get('base_model_name_or_path') or '', content.get('revision')
  if revision and base and not epath.Path(base).exists():
    base = f'{base}@{revision}'
  return Settings(rank, alpha, bool(content.get('use_rslora')), base), content


def merge(
  folder, config: EncoderConfig, params: dict, heads: Sequence[str] | None = None
) -> tuple[EncoderConfig, dict]:
  """The model of a folder of adapters: its base model with the adapters added to the matrices.

  Args:
    folder: PEFT's.
    config: of the base model.
    params: of the base model, NumPy.
    heads: as for `huggingface.load_hf`.

  Raises:
    ValueError: for an adapter of a module that the base model lacks or that has another shape.
  """
  settings, content = read_settings(folder)
  path = files.find_weights(folder, files.ADAPTERS)
  adapters, saved = _split(files.read_tensors(path), families.family_of(config), path)
  tensors = huggingface.to_tensors(config, params)
  for module, sides in adapters.items():
    name = f'{module}.weight'
    if name not in tensors or tensors[name].ndim != 2 or name.endswith('embeddings.weight'):
      raise ValueError(
        f'{path} has an adapter of {module}, and the base model has no such linear layer; name the '
        'model that the adapters were trained on (bertjax convert --base=MODEL).'
      )
    outputs, inputs = tensors[name].shape
    found, wanted = (
      tuple(x.shape for x in sides),
      ((settings.rank, inputs), (outputs, settings.rank)),
    )
    if found != wanted:
      raise ValueError(
        f'{path}: the adapter of {module} has the shapes {found}, and rank {settings.rank} of the '
        f'base model needs {wanted}; name the model that the adapters were trained on.'
      )
    a, b = (x.astype(np.float32) for x in sides)
    tensors[name] = tensors[name] + np.float32(settings.scale) * (b @ a)
  about = files.read_json(epath.Path(folder) / 'config.json', optional=True)
  about = about or _architecture(config, content.get('task_type'))
  tensors, untied = huggingface.canonical(tensors | saved, 'huggingface', config)
  if untied:
    raise ValueError(f'{path}: {untied} differs from the tensor that it is tied to.')
  found = huggingface.find_heads(config, saved, 'huggingface', about, path)
  if not found:  # those of the base model; a new head may have changed a layer that they share
    found = huggingface.find_heads(config, tensors, 'huggingface', about, path, heads)
  huggingface.check_heads(heads or (), found, path)
  found = found if heads is None else tuple(heads)
  return config, huggingface.from_tensors(config, tensors, found, path, 'huggingface')


def _split(tensors: Mapping, family, path) -> tuple[dict, dict]:
  """{module: (A, B)}, and the tensors of complete modules, by their names in a model with heads."""
  adapters, saved = {}, {}
  for given, tensor in tensors.items():
    name = family.full_name(given.removeprefix(_PREFIX))
    if match := re.fullmatch(r'(.+)\.(lora_[AB])\.weight', name):
      adapters.setdefault(match[1], {})[match[2]] = tensor
    elif 'lora_' in name or not given.startswith(_PREFIX):
      raise ValueError(
        f'{path}: {given} is not supported; adapters are read of linear layers only.'
      )
    else:
      saved[name] = tensor
  if wrong := [module for module, sides in adapters.items() if len(sides) != 2]:
    raise ValueError(f'{path} has only one of the two matrices of {wrong[0]}.')
  return {m: (sides['lora_A'], sides['lora_B']) for m, sides in adapters.items()}, saved


def _architecture(config: EncoderConfig, task_type: str | None) -> dict:
  """`config.json` as far as a task type says it."""
  family = families.family_of(config)
  head = next((head for head, kind in _TASK_TYPES.items() if kind == task_type), '')
  ending = family.classes.get((head,), family.classes[()])
  return {'model_type': family.model_type, 'architectures': [family.name + ending]}


def save(
  directory, settings: Settings, config: EncoderConfig, adapters: dict, trained: dict,
  tokenizer: Tokenizer, *, pooler: bool, labels: Sequence[str] = (), problem_type: str = '',
  sentence: dict | None = None, card: str = '',
) -> None:  # fmt: skip
  """Writes PEFT's folder, with the tokenizer and the `config.json` of the complete model beside.

  Args:
    directory: where to; an older folder of this kind is replaced.
    settings: of the adapters.
    config: of the encoder.
    adapters: {name: {'a', 'b'}} of `model.lora`, nested.
    trained: the heads, and the pooler if it is trained, by name.
    tokenizer: saved beside.
    pooler: whether the complete model has a pooler.
    labels, problem_type, sentence, card: as for `huggingface.save_hf`.

  Raises:
    ValueError: for a head that only bertjax has.
  """
  if own := huggingface.own_heads(config, trained):
    raise ValueError(
      f'peft cannot load the {own[0]} head with {huggingface.head_settings(config)}; save the '
      "merged model, lora.save='merged'."
    )
  family, heads = families.family_of(config), [head for head in HEADS if head in trained]
  bare = lambda name: name if heads else name.removeprefix(f'{family.prefix}.')  # noqa: E731
  sides = _sides(config, adapters, pooler)
  tensors = {
    f'{bare(module)}.lora_{side}.weight': np.ascontiguousarray(matrix.T)
    for module, pair in sides.items() for side, matrix in zip('AB', pair, strict=True)
  }  # fmt: skip
  flat = flax.traverse_util.flatten_dict(trained, sep='/')
  modules = set()
  for part in trained:
    for entry in mapping.head_entries(part, config):
      tensors[bare(entry.name('huggingface'))] = entry.write(
        np.asarray(flat[entry.path]), 'huggingface'
      )
      modules.add('pooler' if part == 'pooler' else entry.module.partition('.')[0])
  name, _, revision = settings.base.partition('@')
  base = {'base_model_name_or_path': settings.base}
  if revision and not epath.Path(settings.base).exists():
    base = {'base_model_name_or_path': name, 'revision': revision}
  complete = trained | ({'pooler': {}} if pooler else {})
  content = {
    'peft_type': 'LORA', 'task_type': _TASK_TYPES.get(heads[0]) if len(heads) == 1 else None,
    **base, 'r': settings.rank, 'lora_alpha': settings.alpha,
    'use_rslora': settings.rslora, 'lora_dropout': 0.0, 'bias': 'none', 'fan_in_fan_out': False,
    'target_modules': _targets(set(sides), config), 'modules_to_save': sorted(modules) or None,
    'inference_mode': True,
  }  # fmt: skip
  about = huggingface.model_json(config, complete, tokenizer, labels, problem_type, sentence)
  with files.new_directory(directory, CONFIG) as target:
    (target / CONFIG).write_text(json.dumps(content, indent=2) + '\n')
    named = {_PREFIX + name: tensor for name, tensor in tensors.items()}
    (target / 'adapter_model.safetensors').write_bytes(tensors_to_bytes(named, {'format': 'pt'}))
    huggingface.write_rest(target, about, config, tokenizer, sentence, card)


def _sides(config: EncoderConfig, adapters: dict, pooler: bool) -> dict:
  """{module of theirs: (A [in, r], B [r, out])}, the outputs in their order."""
  flat, result = flax.traverse_util.flatten_dict(adapters, sep='/'), {}
  for entry in mapping.entries(config, (), pooler):
    if entry.kind != 'kernel' or f'{entry.matrix}/a' not in flat:
      continue
    a, b = (np.asarray(flat[f'{entry.matrix}/{side}']) for side in 'ab')
    a, b = (a, b) if entry.layer is None else (a[entry.layer], b[entry.layer])
    if entry.interleaved:
      b = b.reshape(len(b), 3, config.num_heads, -1)
      b = dataclasses.replace(entry, index=()).write(b, 'google')
    result[entry.module] = a, b
  return result


def _targets(adapted: set[str], config: EncoderConfig) -> list[str] | str:
  """`target_modules`: names such as 'query', or a pattern where others share the names."""
  every = {entry.module for entry in mapping.entries(config, (), True) if entry.kind == 'kernel'}
  last = {module.rpartition('.')[2] for module in adapted}
  if {module for module in every if module.rpartition('.')[2] in last} == adapted:
    return sorted(last)
  prefix = f'{families.family_of(config).prefix}.'
  templates = {re.sub(r'\d+', 'N', module.removeprefix(prefix)) for module in adapted}
  patterns = [re.escape(template).replace('N', r'\d+') for template in sorted(templates)]
  return rf'(.*\.)?({"|".join(patterns)})'
