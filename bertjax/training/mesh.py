"""Device meshes and shardings by rule.

A mesh has three axes: 'data' (replicas), 'fsdp' (replicas that split parameters and moments
between them) and 'tensor' (splits within a layer). A parameter's path gives its logical axes (a
table such as `model.encoder.PARAM_AXES`), `RULES` gives the mesh axes of each logical axis, and
the compiler does the rest (GSPMD). An unknown name raises; an axis that its size cannot share
evenly stays replicated, and this is logged.
"""

import functools
import logging
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

_log = logging.getLogger(__name__)

AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axes, tried together first, then without the last ones where the size does
# not divide. The word table is split by vocabulary only: splitting its hidden axis over 'fsdp',
# on which the batch lies too, makes XLA rematerialise the gathered embeddings.
RULES = {
  'batch': ('data', 'fsdp'),
  'vocab': ('fsdp', 'tensor'),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'mlp': ('tensor',),
  'head_size': (),
  'qkv': (),
  'layers': (),
  None: (),
}

AxisTable = tuple[tuple[str, tuple[str | None, ...]], ...]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """Makes a mesh of `data * fsdp * tensor` devices; -1 takes all that are left over. Several TPU
  slices split the data axis between them.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices, or slices cannot share
      them.

  Example:
    >>> import bertjax
    >>> bertjax.make_mesh().axis_names
    ('data', 'fsdp', 'tensor')
  """
  devices = jax.devices() if devices is None else devices
  sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor}
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f'mesh sizes must be positive, with at most one -1, got {sizes}.')
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(devices) % fixed or (not free and fixed != len(devices)):
    raise ValueError(
      f'the mesh {sizes} does not fit {len(devices)} devices: data * fsdp * tensor must be '
      f'{len(devices)}; leave mesh.data=-1 to take what is left over.'
    )
  if free:
    sizes[free[0]] = len(devices) // fixed
  auto = (AxisType.Auto,) * 3  # Linen modules do not run on the newer Explicit axes
  # TPU slices that a data centre's network joins: only gradients may cross it.
  slices = len({getattr(d, 'slice_index', 0) for d in devices if d.platform == 'tpu'})
  if slices <= 1:
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices)
  if sizes['data'] % slices:
    raise ValueError(
      f'{slices} slices split the data axis: mesh.data must be a multiple of {slices}, got {sizes}.'
    )
  within = (sizes['data'] // slices, sizes['fsdp'], sizes['tensor'])
  grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
  return Mesh(grid, AXES, axis_types=auto)


def path_name(path) -> str:
  """The name of a leaf: 'params/encoder/layers/mlp/in/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def logical_axes(table: AxisTable, path, ndim: int) -> tuple[str | None, ...]:
  """Looks up a leaf's logical axes by its path; scalars have none.

  Raises:
    ValueError: if no row of the table matches, or the row has another number of axes.
  """
  if ndim == 0:
    return ()
  name = path_name(path)
  for pattern, axes in table:
    if re.search(pattern, name):
      if len(axes) == ndim - 1:
        return ('layers', *axes)
      if len(axes) == ndim:
        return axes
      raise ValueError(f'{name} has {ndim} axes, but the rule {pattern!r} names {axes}.')
  raise ValueError(f'no sharding rule matches the parameter {name}; add one to PARAM_AXES.')


def _spec(mesh: Mesh, axes, shape, name: str) -> PartitionSpec:
  """Mesh axes of one array; an axis whose size is not divisible stays replicated (logged)."""
  spec, used = [], set()
  for axis, size in zip(axes, shape, strict=True):
    if axis not in RULES:
      raise ValueError(f'unknown logical axis {axis!r} of {name}; known are {tuple(RULES)}.')
    wanted = tuple(a for a in RULES[axis] if a not in used and mesh.shape[a] > 1)
    taken = wanted
    while taken and size % math.prod(mesh.shape[a] for a in taken):
      taken = taken[:-1]
    if taken != wanted:
      _log.info(
        '%s: axis %r of size %d is not split over %s, which do not divide it',
        name, axis, size, wanted[len(taken) :],
      )  # fmt: skip
    used.update(taken)
    spec.append(taken if len(taken) > 1 else (taken[0] if taken else None))
  return PartitionSpec(*spec)


def tree_shardings(mesh: Mesh, table: AxisTable, tree):
  """Shardings of every leaf of `tree` (arrays or shapes): parameters, moments, a TrainState."""

  def one(path, leaf):
    axes = logical_axes(table, path, leaf.ndim)
    return NamedSharding(mesh, _spec(mesh, axes, leaf.shape, path_name(path)))

  return jax.tree.map_with_path(one, tree)


def sharder(mesh: Mesh, table: AxisTable):
  """`tree_shardings` of a mesh and a table, for the caller that makes the tree."""
  return functools.partial(tree_shardings, mesh, table)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Batches are split by row over 'data' and 'fsdp'."""
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def replicate(tree, mesh: Mesh):
  """The same host arrays, replicated on every device of every process."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def replicas(mesh: Mesh | AbstractMesh) -> int:
  """Devices, or groups of them, that split the rows of a batch."""
  return math.prod(mesh.shape[axis] for axis in RULES['batch'])


def check_batch_size(mesh: Mesh, batch_size: int, accumulation: int = 1) -> None:
  """Raises ValueError unless every device gets the same number of rows of every microbatch."""
  count = replicas(mesh)
  parts = count * max(accumulation, 1)
  if batch_size < 1 or accumulation < 1 or batch_size % parts:
    raise ValueError(
      f'batch_size must be a multiple of replicas * accumulation, got batch_size={batch_size}, '
      f'{count} replicas (data={mesh.shape["data"]} x fsdp={mesh.shape["fsdp"]}), '
      f'accumulation={accumulation}; try {max(1, batch_size // parts) * parts}.'
    )


def make_dividing_mesh(count: int, what: str) -> Mesh:
  """A data-parallel mesh of all devices, or of the most that divide `count` (logged).

  Evaluations keep the batches of their run so, and score the same rows on any number of devices.

  Args:
    count: what the devices share evenly: rows of a batch, runs of a sweep.
    what: its name in messages, 'rows of a batch'.

  Raises:
    ValueError: if several processes have a number of devices that does not divide it.
  """
  devices = jax.devices()
  used = max(n for n in range(1, len(devices) + 1) if count % n == 0)
  if used < len(devices):
    if jax.process_count() > 1:
      raise ValueError(
        f'{count} {what} cannot be divided among {len(devices)} devices of {jax.process_count()} '
        'processes; use one process, which takes as many of its devices as divide them.'
      )
    _log.info('using %d of %d devices, which divide %d %s', used, len(devices), count, what)
  return make_mesh(devices=devices[:used])


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """Which rows of a global batch this process must bring: sorted indices, int64."""
  rows: set[int] = set()
  for index in sharding.addressable_devices_indices_map((batch_size,)).values():
    assert index is not None, 'every device here has rows of the batch'
    rows.update(range(*index[0].indices(batch_size)))
  return np.array(sorted(rows), np.int64)


def shard_batch(batch: dict, sharding: NamedSharding) -> dict:
  """Puts the rows of this process (`local_rows`, in that order) into one global batch."""
  return jax.make_array_from_process_local_data(sharding, jax.tree.map(np.asarray, batch))
