"""Trials: K runs in one compiled program, their states stacked along a first axis.

Small data sets leave a chip idle and their results differ with the seed, so runs of several seeds
and learning rates train side by side: `jax.vmap` over the step, the trials spread over the devices.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax.training.mesh import AXES, make_mesh


def make_trials_mesh(trials: int) -> Mesh:
  """A mesh whose devices hold the same number of trials each: the most that divide `trials`."""
  devices = jax.devices()
  most = max(n for n in range(1, len(devices) + 1) if trials % n == 0)
  return make_mesh(devices=devices[:most])


def sharder(mesh: Mesh):
  """Trees of shapes [K, ...] to shardings: whole trials on each device."""
  sharding = NamedSharding(mesh, PartitionSpec(AXES))
  return lambda tree: jax.tree.map(lambda _: sharding, tree)


def take(tree, trial: int):
  """The arrays of one trial, on the host."""
  return jax.tree.map(lambda x: np.asarray(x[trial]), tree)


def running(history: list[list[float]], patience: int) -> list[bool]:
  """Which trials go on after these evaluations.

  Args:
    history: the metric of each trial [K] at each evaluation so far; the higher the better.
    patience: evaluations without a better one after which a trial stops; 0 = never.
  """
  if not history:
    return []
  values = np.array(history, float)  # [evaluations, K]
  if not patience:
    return [True] * values.shape[1]
  waited, best = np.zeros(values.shape[1], int), np.full(values.shape[1], -np.inf)
  stopped = np.zeros(values.shape[1], bool)
  for row in values:
    better = np.nan_to_num(row, nan=-np.inf) > best
    best = np.where(better & ~stopped, row, best)
    waited = np.where(better, 0, waited + 1)
    stopped |= waited >= patience
  return (~stopped).tolist()


def choose(history: list[list[float]], patience: int) -> tuple[int, int]:
  """(evaluation, trial) of the best value before its trial stopped."""
  best = (-np.inf, 0, 0)
  for i, row in enumerate(history):
    alive = running(history[:i], patience) or [True] * len(row)
    for trial, (value, on) in enumerate(zip(row, alive, strict=True)):
      if on and value > best[0]:
        best = (value, i, trial)
  return best[1:]
