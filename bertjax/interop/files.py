"""Files of weights: read in each format Hugging Face has had, written atomically."""

import contextlib
import pickle
from collections.abc import Iterable

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from bertjax import io

_SAFETENSORS_DTYPES = {
  'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
  'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U64': np.uint64,
  'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_,
}  # fmt: skip


@contextlib.contextmanager
def new_directory(directory, marker: str):
  """Yields a temporary folder that takes the place of `directory` when the block ends well.

  Args:
    directory: the folder to make. An older one of the same kind is replaced.
    marker: the file by which such a folder is known.

  Raises:
    ValueError: if the folder holds something else, which would be lost; names it.
  """
  target = epath.Path(directory)
  if target.exists() and not target.is_dir():
    raise ValueError(f'{target} is a file, not a folder; choose another.')
  if target.exists() and any(target.iterdir()) and not (target / marker).exists():
    raise ValueError(
      f'{target} exists and is no model directory (it has no {marker}); choose another.'
    )
  old = target.parent / f'{target.name}.replaced'
  if old.exists() and not target.exists():  # killed between the two renames below
    old.rename(target)
  io.remove(old)
  with io.replacing(target) as temporary:
    temporary.mkdir()
    yield temporary
    if target.exists():
      lost = {p.name for p in target.iterdir()} - {p.name for p in temporary.iterdir()}
      if lost:
        raise ValueError(f'{target} also holds {sorted(lost)}, which a new one would lose.')
      target.rename(old)
  io.remove(old)


def read_json(path, kind: type = dict, *, optional: bool = False):
  """Reads a JSON object, or with `kind=list` an array; empty for a missing `optional` file.

  Raises:
    ValueError: if there is no such file, or its content is something else.
  """
  path = epath.Path(path)
  if not path.is_file():
    if optional:
      return kind()
    there = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
    found = f' It has {", ".join(there[:9])}{" ..." if there[9:] else ""}.' if there else ''
    raise ValueError(f'{path.parent} is not a model directory: it has no {path.name}.{found}')
  return io.read_json(path, kind)


def find_weights(directory, names: Iterable[str] = ()) -> epath.Path:
  """The file of weights in a folder, the newest format first; `names` are other files' names.

  Raises:
    ValueError: if there is none.
  """
  names = tuple(names) or MODELS
  found = [epath.Path(directory) / name for name in names]
  path = next((path for path in found if path.is_file()), None)
  if path is None:
    raise ValueError(f'{directory} has no weights: none of {", ".join(names)}.')
  return path


def read_tensors(path) -> dict[str, np.ndarray]:
  """Reads all tensors of a file that `find_weights` found, by name.

  Raises:
    ValueError: if the file is corrupt, or a pickle that holds more than tensors.
  """
  return _READERS[epath.Path(path).name](epath.Path(path))


def _read_safetensors(path) -> dict[str, np.ndarray]:
  try:
    items = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise ValueError(f'{path} is corrupt: {error}.') from error
  tensors = {}
  for name, item in items:
    if item['dtype'] not in _SAFETENSORS_DTYPES:
      raise ValueError(f'{path}: {name} has dtype {item["dtype"]}; floats of 16 bits or more only.')
    dtype = _SAFETENSORS_DTYPES[item['dtype']]
    tensors[name] = np.frombuffer(item['data'], dtype).reshape(item['shape'])
  return tensors


def _read_shards(path) -> dict[str, np.ndarray]:
  read = _read_torch if path.name.startswith('pytorch') else _read_safetensors
  index = read_json(path).get('weight_map')
  if not isinstance(index, dict):
    raise ValueError(f'{path} is corrupt: it has no weight_map.')
  tensors = {}
  for shard in sorted(set(index.values())):
    if not (path.parent / shard).is_file():
      raise ValueError(f'{path} lists {shard}, which is missing.')
    tensors |= read(path.parent / shard)
  missing = sorted(set(index) - set(tensors))
  if missing:
    raise ValueError(f'{path} lists {missing[0]} in {index[missing[0]]}, which does not have it.')
  return tensors


def _read_torch(path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f'{path} is a pickle of torch, which is not installed; install torch, or let transformers '
      'save the model as model.safetensors.'
    ) from error
  try:  # weights_only: a pickle may run any code, and this one comes from strangers
    with path.open('rb') as file:
      tensors = torch.load(file, weights_only=True, map_location='cpu')
  except pickle.UnpicklingError as error:
    raise ValueError(
      f'{path} is corrupt, or a pickle that holds more than tensors, which could run any code; '
      'it was not loaded.'
    ) from error
  except (RuntimeError, EOFError, OSError, KeyError) as error:
    raise ValueError(f'{path} is corrupt: {str(error).splitlines()[0]}.') from error
  wrong = [] if isinstance(tensors, dict) else [type(tensors).__name__]
  wrong = wrong or [name for name, t in tensors.items() if not isinstance(t, torch.Tensor)]
  if wrong:
    raise ValueError(f'{path} is no state dict: {wrong[0]} is not a tensor.')
  return {
    name: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if t.dtype == torch.bfloat16 else t.numpy()
    for name, t in tensors.items()
  }  # fmt: skip


def _read_flax(path) -> dict[str, np.ndarray]:
  try:
    tree = flax.serialization.msgpack_restore(path.read_bytes())
  except Exception as error:  # msgpack raises a dozen kinds
    raise ValueError(f'{path} is corrupt: {error or type(error).__name__}.') from error
  flat = flax.traverse_util.flatten_dict(tree, sep='/') if isinstance(tree, dict) else {'': tree}
  wrong = [name for name, value in flat.items() if not isinstance(value, np.ndarray)]
  if wrong:
    raise ValueError(f'{path} is no parameter tree: {wrong[0]!r} is no array.')
  return flat


_READERS = {
  'model.safetensors': _read_safetensors,
  'model.safetensors.index.json': _read_shards,
  'pytorch_model.bin': _read_torch,
  'pytorch_model.bin.index.json': _read_shards,
  'flax_model.msgpack': _read_flax,
}
MODELS = tuple(_READERS)
ADAPTERS = ('adapter_model.safetensors', 'adapter_model.bin')  # PEFT's
_READERS |= dict(zip(ADAPTERS, (_read_safetensors, _read_torch), strict=True))
