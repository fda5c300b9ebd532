"""Trials: K runs in one compiled program, their states stacked along a first axis.

Small data sets leave a chip idle and their results differ with the seed, so runs of several seeds
and learning rates train side by side: `jax.vmap` over the step, the trials spread over the devices.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax.training.mesh import AXES, make_mesh
from bertjax.training.optimizer import check_rate


def list_trials(config) -> list[tuple[int, float]]:
  """(seed, learning rate) of each trial."""
  try:
    rates = [float(rate) for rate in config.learning_rates.split(',') if rate]
  except ValueError:
    raise ValueError(
      f"learning_rates are written '2e-5,3e-5', got {config.learning_rates!r}."
    ) from None
  for rate in rates or [config.learning_rate]:
    check_rate('learning_rate', rate)
  if config.num_seeds < 1:
    raise ValueError(f'num_seeds must be at least 1, got {config.num_seeds}.')
  if config.seed + config.num_seeds > 2**63:
    raise ValueError(
      f'seed + num_seeds must be at most 2**63, got seed={config.seed}, num_seeds={config.num_seeds}.'
    )
  seeds = range(config.seed, config.seed + config.num_seeds)
  return [(seed, rate) for rate in rates or [config.learning_rate] for seed in seeds]


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


def running(history: Sequence[Sequence[float]], patience: int, trials: int) -> list[bool]:
  """Which trials go on after these evaluations.

  Args:
    history: the metric of each trial [K] at each evaluation so far; the higher the better.
    patience: evaluations without a better one after which a trial stops; 0 = never.
    trials: K.
  """
  values = np.array(history, float).reshape(-1, trials)  # [evaluations, K]
  if not patience:
    return [True] * trials
  waited, best = np.zeros(trials, int), np.full(trials, -np.inf)
  stopped = np.zeros(trials, bool)
  for row in values:
    better = np.nan_to_num(row, nan=-np.inf) > best
    best = np.where(better & ~stopped, row, best)
    waited = np.where(better, 0, waited + 1)
    stopped |= waited >= patience
  return (~stopped).tolist()


def summarise(
  trials: Sequence[tuple[int, float]], history: np.ndarray, patience: int, failed: Callable
) -> dict:
  """Each trial's best and last value before it stopped, and for each learning rate their mean,
  deviation, best and how many failed.

  Args:
    trials: (seed, learning rate) of each.
    history: metric [evaluations, K].
    patience: as for `running`.
    failed: (trial, its last evaluation) -> whether it came to nothing.
  """
  each = []
  for trial, (seed, rate) in enumerate(trials):
    values = history[:, trial]
    on = [i for i in range(len(values)) if running(values[:i], patience, 1)[0]]
    each.append({
      'seed': seed, 'learning_rate': rate, 'best': float(np.nanmax(values[on])),
      'last': float(values[on[-1]]), 'failed': bool(failed(trial, on[-1])),
      'values': values.tolist(),
    })  # fmt: skip
  rates = {}
  for rate in dict.fromkeys(rate for _, rate in trials):
    mine = [trial for trial in each if trial['learning_rate'] == rate]
    found = np.array([trial['best'] for trial in mine])
    rates[f'{rate:g}'] = {
      'mean': float(found.mean()), 'deviation': float(found.std(ddof=1)) if len(mine) > 1 else 0.0,
      'best': float(found.max()), 'failed': sum(trial['failed'] for trial in mine),
    }  # fmt: skip
  return {'learning_rates': rates, 'trials': each}
