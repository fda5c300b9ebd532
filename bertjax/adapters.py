"""LoRA in a run: which matrices get adapters, what is frozen, and how the model is saved."""

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.traverse_util
import jax
import numpy as np
from etils import epath

from bertjax.fields import SHARED
from bertjax.interop import hub, loading, mapping, peft
from bertjax.model import encoder, heads, lora
from bertjax.objectives import Objective
from bertjax.objectives import lora as objective_lora
from bertjax.training import mesh as mesh_lib

_log = logging.getLogger(__name__)

_QKV = ('query', 'key', 'value')  # of which some models have one matrix, 'qkv'
# Frozen arrays that the model casts to its dtype before it uses them.
_CAST = r'(kernel|embeddings/token_type/embedding)$'


class Lora(NamedTuple):
  """The adapters of a run.

  Attributes:
    adapters: of which matrices.
    settings: rank, alpha and base model.
    trained: parts of the model that are trained completely.
    base: the frozen parts, float32 on the host.
    digest: of `base`.
  """

  adapters: lora.Adapters
  settings: peft.Settings
  trained: tuple[str, ...]
  base: dict
  digest: str

  def place(self, mesh, dtype) -> dict:
    """The frozen parts on a mesh, in `dtype` where the model would cast them to it anyway."""
    whole = {f'{matrix.kernel}/kernel' for matrix in self.adapters.matrices.values()}
    flat = flax.traverse_util.flatten_dict(self.base, sep='/')
    flat = {
      path: x.astype(dtype) if re.search(_CAST, path) and path not in whole else x
      for path, x in flat.items()
    }
    base = flax.traverse_util.unflatten_dict(flat, sep='/')
    return jax.device_put(base, mesh_lib.tree_shardings(mesh, encoder.PARAM_AXES, base))

  def adapt(self, objective: Objective, base: dict) -> Objective:
    """The objective of the adapters and trained parts; `base` is what `place` returns."""
    return objective_lora.adapt(objective, self.adapters, self.trained, base)

  def start(self, params: Mapping, fresh: Mapping) -> dict:
    """What is trained: new adapters of `fresh`, and the parts of a loaded model."""
    return {name: fresh[name] if name == 'lora' else params[name] for name in fresh}

  def facts(self) -> dict:
    """What a checkpoint says of its base model, for `loading.load_checkpoint`."""
    return {
      'base': self.settings.base, 'rank': self.settings.rank, 'scale': self.adapters.scale,
      'matrices': sorted(self.adapters.matrices), 'frozen': sorted(self.base),
      'digest': self.digest,
    }  # fmt: skip


def complete(adapting: Lora | None, how: str, params: dict) -> tuple[dict, Callable]:
  """The complete model of a run's trained host arrays, and what writes it: `loading.save_model`, or
  with adapters and `how` 'peft' a function with the same arguments that writes PEFT's folder."""
  if adapting is None:
    return params, loading.save_model
  merged = jax.device_get(adapting.adapters.complete(params | {'base': adapting.base}))

  def write(directory, model, _, tokenizer, **about):
    rest = {name: part for name, part in params.items() if name != 'lora'}
    peft.save(
      directory, adapting.settings, model.config, params['lora'], rest, tokenizer,
      pooler=model.pooler, **about,
    )  # fmt: skip

  return merged, write if how == 'peft' else loading.save_model


def check(config) -> bool:
  """Whether a config has adapters; raises ValueError for settings that do not fit."""
  settings, on = config.lora, config.lora.rank > 0
  if not on:
    for name, value in settings.items():
      if value != SHARED[f'lora.{name}'][0]:
        raise ValueError(f'lora.{name}={value!r} is for adapters; set lora.rank, such as 8, too.')
    return False
  if not 0 < settings.alpha < float('inf'):
    raise ValueError(f'lora.alpha must be above 0, got {settings.alpha}.')
  if settings.save not in ('merged', 'peft'):
    raise ValueError(f"lora.save must be 'merged' or 'peft', got {settings.save!r}.")
  if not config.init_from:
    raise ValueError(f'lora.rank={settings.rank} adapts a model; name one by --config.init_from.')
  for name, reason in (
    ('reinit_top_layers', 'layers that are new would stay frozen'),
    ('init_layers', 'the layers that remain must be trained'),
    ('init_resize', 'rows that are new would stay frozen'),
  ):
    if value := config.get(name):
      raise ValueError(f'{name}={value} and lora.rank={settings.rank} do not fit: {reason}; leave '
                       'one of them out.')  # fmt: skip
  if config.get('num_trainable_layers') == 0:
    raise ValueError(
      f'num_trainable_layers=0 freezes the adapters of lora.rank={settings.rank} too; leave one of '
      'them out.'
    )
  return True


def make(config, model: heads.Bert, params: dict, new: tuple[str, ...]) -> Lora | None:
  """The adapters of a config; None without them.

  Args:
    config: of the run.
    model: of the run.
    params: of `init_from`, NumPy.
    new: heads that are trained.

  Raises:
    ValueError: if a target matches no matrix, or the rank is larger than one.
  """
  if not check(config):
    return None
  parts = ['encoder', *(['pooler'] if model.pooler else []), *model.heads]
  also = tuple(filter(None, config.lora.modules_to_save.split(',')))
  if wrong := [name for name in also if name not in parts[1:]]:
    raise ValueError(
      f'lora.modules_to_save={wrong[0]!r} is no head of the model; choose from '
      f'{", ".join(parts[1:]) or "none"}.'
    )
  trained = tuple(name for name in parts if name in (*new, *also) or name not in params)
  settings = peft.Settings(config.lora.rank, config.lora.alpha, config.lora.rslora, _base(config))
  frozen = {name: params[name] for name in parts if name not in trained}
  matrices = select(model.config, 'pooler' in frozen, config.lora.targets, settings.rank)
  adapters = lora.Adapters(matrices, settings.rank, settings.scale)
  digest = loading.digest_of(frozen)
  sizes = [math.prod(m.shape[:-2]) * settings.rank * sum(m.shape[-2:]) for m in matrices.values()]
  _log.info(
    'LoRA: %s parameters of rank %d and scale %g for %s; %s others are frozen', f'{sum(sizes):,}',
    settings.rank, settings.scale, ', '.join(matrices),
    f'{sum(np.size(x) for x in jax.tree.leaves(frozen)):,}',
  )  # fmt: skip
  return Lora(adapters, settings, trained, frozen, digest)


def of_text(config, model: heads.Bert) -> Lora | None:
  """The adapters of a pre-training config; None without them. Its heads are frozen too.

  Raises:
    ValueError: for ELECTRA, and as `make`.
  """
  if not check(config):
    return None
  if config.objective == 'electra':
    raise ValueError(
      f"objective='electra' trains two models, and lora.rank={config.lora.rank} adapts one; use "
      "objective='mlm'."
    )
  return make(config, model, loading.load_weights(config.init_from)[1], ())


def _base(config) -> str:
  """The base model by a name that is valid in other folders.

  Raises:
    ValueError: if transformers could not load it and it is to be named in PEFT's folder.
  """
  source = loading.find_model(config.init_from)
  if config.lora.save == 'peft' and not loading.is_huggingface(source):
    raise ValueError(
      f"lora.save='peft' names {config.init_from} as the base model, which transformers cannot "
      f'load; convert it first: bertjax convert --from={config.init_from} --out=DIR.'
    )
  if not epath.Path(source).exists():
    return str(source)
  path = hub.find_directory(source) if config.lora.save == 'peft' else epath.Path(source)
  return str(path.resolve())


def select(config, pooler: bool, targets: str, rank: int) -> dict[str, lora.Matrix]:
  """The matrices that targets name: ours ('query', 'mlp/in'), transformers' ('q_proj') or patterns
  of our names. 'query', 'key' and 'value' also mean the matrix that holds all three.

  Raises:
    ValueError: for a target without a match, or a rank above a side of a matrix.
  """
  known, chosen = mapping.matrices(config, pooler), {}
  for target in [target.strip() for target in targets.split(',')]:
    found = [name for name, (_, module) in known.items() if _matches(target, name, module)]
    if not found:
      raise ValueError(
        f'lora.targets={target!r} matches no matrix of the model; it has {", ".join(known)}.'
      )
    chosen |= dict.fromkeys(found)
  for name in chosen:
    chosen[name] = known[name][0]
    if rank > (least := min(chosen[name].shape[-2:])):
      raise ValueError(
        f'lora.rank={rank} is larger than the shorter side of {name}, {least}; use a smaller rank.'
      )
  return chosen


def _matches(target: str, name: str, module: str) -> bool:
  try:
    pattern = re.fullmatch(target, name)
  except re.error as error:
    raise ValueError(f'lora.targets={target!r} is neither a name nor a pattern: {error}.') from None
  last = name.rpartition('/')[2]
  same = f'/{name}'.endswith(f'/{target}') or f'.{module}'.endswith(f'.{target}')
  return bool(pattern) or same or (last == 'qkv' and target in _QKV)


def identity(config, adapting: Lora | None) -> dict:
  """The fields of adapters that a resumed run must share with its start."""
  if adapting is None:
    return {}
  fields = {f'lora.{name}': value for name, value in config.lora.items() if name != 'save'}
  return fields | {'lora.base': adapting.digest}
