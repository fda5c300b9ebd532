"""The model of any step of a run: its parameters, read from a checkpoint without the moments.

A checkpoint is WORKDIR/checkpoints/STEP, written by `training.checkpoint`. Its `meta` carries the
model's config and labels; the tokenizer is WORKDIR/tokenizer.
"""

import json
import logging

import flax.traverse_util
import numpy as np
from etils import epath

from bertjax.interop.huggingface import check_heads
from bertjax.model.config import EncoderConfig

_log = logging.getLogger(__name__)


def is_checkpoint(source) -> bool:
  folder = epath.Path(source)
  return (folder / 'state').is_dir() and (folder / 'meta' / 'metadata').is_file()


def find_checkpoint(workdir, step: int | None = None) -> epath.Path:
  """The checkpoint of a step of a run; None takes the newest.

  Raises:
    ValueError: if there is none; lists the steps there are.
  """
  folder = epath.Path(workdir) / 'checkpoints'
  found = folder.iterdir() if folder.is_dir() else ()
  steps = sorted(int(p.name) for p in found if p.name.isdigit() and is_checkpoint(p))
  if not steps:
    raise ValueError(
      f'{workdir} has no complete checkpoint; once the run has saved one, `bertjax convert '
      f'--from={workdir} --checkpoint=N --out=DIR` makes a model of it.'
    )
  if step not in (None, *steps):
    raise ValueError(f'{workdir} has no checkpoint of step {step}; those kept are {steps}.')
  return folder / str(steps[-1] if step is None else step)


def read_model(folder) -> dict:
  """What a checkpoint says of its model: 'config', 'labels', 'problem_type', 'trials'."""
  meta = _read_meta(folder)
  if 'model' not in meta:
    raise ValueError(f'{folder} does not name its model; it is of an earlier version.')
  return meta['model']


def load_checkpoint(folder, heads=None) -> tuple[EncoderConfig, dict]:
  """The config and parameters (NumPy) of a checkpoint, each array compared with its checksum.

  Args:
    folder: WORKDIR/checkpoints/STEP.
    heads: heads to keep; None keeps all there are.

  Raises:
    ValueError: if an array is corrupt, a head is missing, or the checkpoint is of several trials.
  """
  model, folder = read_model(folder), epath.Path(folder).resolve()
  if model['trials'] > 1:
    raise ValueError(
      f'{folder} holds {model["trials"]} trials; only the best one is a model, in the model/ that '
      'the run writes.'
    )
  import orbax.checkpoint as ocp  # here: most readers of models need none

  _log.info('reading %s', folder)
  reader = ocp.PyTreeCheckpointHandler()
  try:
    tree = reader.metadata(folder / 'state').tree
    paths = flax.traverse_util.flatten_dict({'params': tree['params']})
    item, arrays = (
      flax.traverse_util.unflatten_dict(dict.fromkeys(paths, value))
      for value in (0, ocp.RestoreArgs(restore_type=np.ndarray))
    )
    args = ocp.args.PyTreeRestore(item=item, restore_args=arrays, partial_restore=True)
    params = reader.restore(folder / 'state', args=args)['params']
  except Exception as error:  # orbax, tensorstore and json each raise their own
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    raise ValueError(f'{folder} cannot be read ({reason[:200]}).') from error
  sums = _read_meta(folder)['checksums']
  for path, array in flax.traverse_util.flatten_dict({'params': params}, sep='/').items():
    if sums.get(path) != _checksum(array):
      raise ValueError(f'{folder} is corrupt: {path} differs from its checksum.')
  check_heads(heads or (), params, folder)
  kept = params.keys() if heads is None else {'encoder', 'pooler', *heads}
  return EncoderConfig(**model['config']), {k: v for k, v in params.items() if k in kept}


def _read_meta(folder) -> dict:
  return json.loads((epath.Path(folder) / 'meta' / 'metadata').read_text())


def _checksum(array: np.ndarray) -> int:
  """As `training.checkpoint.checksums` of an array."""
  bits = array.view(f'uint{8 * array.dtype.itemsize}').astype(np.uint32).reshape(-1)
  odd = 2 * np.arange(bits.size, dtype=np.uint32) + 1
  return int((bits * odd).sum(dtype=np.uint32))
