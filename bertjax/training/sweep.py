"""Sweeps: several runs in one compiled program, their states stacked along a first axis.

Small data sets leave a chip idle and their results vary with the seed, so runs of several seeds and
learning rates train together: `jax.vmap` over the train step, the runs spread over the devices.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bertjax.training import run
from bertjax.training.layout import Layout
from bertjax.training.mesh import AXES
from bertjax.training.optimizer import check_rate, with_peak


@dataclasses.dataclass(frozen=True)
class Sweep(Layout):
  """K runs side by side: every array of the state is [K, ...], each device has complete runs.

  Attributes:
    runs: (seed, peak learning rate) of each run; the optimizer must be `make_optimizer`'s.
  """

  runs: tuple[tuple[int, float], ...] = ()

  def make_state(self, objective, optimizer, params=None):
    def one(seed, rate, params):
      state = self._make_one(seed, objective, optimizer, params)
      return dataclasses.replace(state, opt_state=with_peak(state.opt_state, rate))

    seeds, rates = (np.array(column) for column in zip(*self.runs, strict=True))
    return jax.vmap(one)(seeds, rates.astype(np.float32), params)

  def shardings(self, tree):
    sharding = NamedSharding(self.mesh, PartitionSpec(AXES))
    return jax.tree.map(lambda _: sharding, tree)

  def train_step(self, objective, optimizer, state_shardings, wrap=None):
    def side_by_side(step):  # the runs share what is frozen
      return lambda state, batch, *frozen: jax.vmap(lambda s, b: step(s, b, *frozen))(state, batch)

    return super().train_step(objective, optimizer, state_shardings, wrap or side_by_side)

  def summary(self, scores, values, options):
    """Means over the runs; the main metric is that of the best run."""
    means = {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}
    best = max(values) if options.highest else -max(values)
    return means | {f'mean_{options.metric}': means[options.metric], options.metric: best}


def list_runs(
  seed: int, num_seeds: int, learning_rate: float, learning_rates: str = ''
) -> tuple[tuple[int, float], ...]:
  """(seed, learning rate) of each run; `learning_rates` are written '2e-5,3e-5'."""
  try:
    rates = [float(rate) for rate in learning_rates.split(',') if rate] or [learning_rate]
  except ValueError:
    raise ValueError(f"learning_rates are written '2e-5,3e-5', got {learning_rates!r}.") from None
  for rate in rates:
    check_rate('learning_rate', rate)
  if num_seeds < 1:
    raise ValueError(f'num_seeds must be at least 1, got {num_seeds}.')
  if seed + num_seeds > 2**63:
    raise ValueError(
      f'seed + num_seeds must be at most 2**63, got seed={seed}, num_seeds={num_seeds}.'
    )
  return tuple((s, rate) for rate in rates for s in range(seed, seed + num_seeds))


def take(tree, index: int):
  """The arrays of one run, on the host."""
  return jax.tree.map(lambda x: np.asarray(x[index]), tree)


def best_run(evaluations: Sequence[dict], step: int, options: run.Options) -> int:
  """The index of the best run at the evaluation of a step, among those still running then."""
  values = np.array([run.ranking(e['scores'], options) for e in evaluations])
  place = [e['step'] for e in evaluations].index(step)
  alive = run.still_running(values[:place], options.patience)
  return int(np.argmax(np.where(alive, values[place], -np.inf)))


def summarise(
  runs: Sequence[tuple[int, float]], history: np.ndarray, patience: int, failed: Callable
) -> dict:
  """Each run's best and last value before it stopped, and for each learning rate their mean,
  deviation, best and how many failed.

  Args:
    runs: (seed, learning rate) of each.
    history: metric [evaluations, K].
    patience: as for `run.still_running`.
    failed: (run, its last evaluation) -> whether it did not learn.
  """
  each = []
  for index, (seed, rate) in enumerate(runs):
    values = history[:, index]
    on = [i for i in range(len(values)) if run.still_running(values[:i, None], patience)[0]]
    each.append({
      'seed': seed, 'learning_rate': rate, 'best': float(np.nanmax(values[on])),
      'last': float(values[on[-1]]), 'failed': bool(failed(index, on[-1])),
      'values': values.tolist(),
    })  # fmt: skip
  rates = {}
  for rate in dict.fromkeys(rate for _, rate in runs):
    mine = [entry for entry in each if entry['learning_rate'] == rate]
    best = np.array([entry['best'] for entry in mine])
    rates[f'{rate:g}'] = {
      'mean': float(best.mean()), 'deviation': float(best.std(ddof=1)) if len(mine) > 1 else 0.0,
      'best': float(best.max()), 'failed': sum(entry['failed'] for entry in mine),
    }  # fmt: skip
  return {'learning_rates': rates, 'trials': each}
