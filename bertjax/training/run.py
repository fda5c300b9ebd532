"""Starting a run and going on with it: its identity, its first state, its saves, its end."""

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from bertjax.training.checkpoint import Checkpoints
from bertjax.training.loop import STOPPED_EXIT_CODE, DivergedError, TrainState, init_state

_log = logging.getLogger(__name__)


def make_state(init: Callable, optimizer, seed: int, learning_rate: float, params=None):
  """A `TrainState` at step 0: `params`, or those that `init(rng)` draws."""
  rng = jax.random.key(seed)
  params = init(jax.random.fold_in(rng, 0)) if params is None else params
  return TrainState.create(params, optimizer, jax.random.fold_in(rng, 1), learning_rate)


def abstract_state(make: Callable[[], TrainState], shard: Callable):
  """Shapes and shardings of the state, to restore a checkpoint into; also the shardings alone."""
  shapes = jax.eval_shape(make)
  shardings = shard(shapes)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  return abstract, shardings


def start(
  make: Callable[..., TrainState],
  shard: Callable,
  checkpoints: Checkpoints,
  load: Callable[[], dict] | None = None,
) -> tuple[TrainState, TrainState, dict]:
  """The state to start from: the newest checkpoint, else `make(load())`, else `make()`.

  `shard` is as for `loop.init_state`.

  Returns:
    The state, its shardings, and the checkpoint's meta ({} without one).
  """
  if checkpoints.steps():
    abstract, shardings = abstract_state(make, shard)
    state, meta = checkpoints.restore_newest(abstract)
    _log.info('resuming from step %d of %s', np.ravel(state.step)[0], checkpoints.directory)
    return state, shardings, meta
  state, shardings = init_state(make, shard, *([load()] if load else []))
  return state, shardings, {}


MOST_SKIPS = 10  # a start that diverges more often needs a smaller rate, not fewer batches


def recovering(fit: Callable, state, checkpoints: Checkpoints, skipped, log, first_step: int):
  """Runs `fit(state)`; after a divergence, again from the newest checkpoint without the batches
  since then.

  Args:
    fit: state -> what `loop.fit` returns; reads `skipped` to find its next batch.
    state: where to start.
    checkpoints: of the run.
    skipped: list of {'step', 'batches'} that grows by one at each divergence: so many batches are
      left out at that step. None lets the divergence end the run.
    log: gets a line for each.
    first_step: checkpoints before it belong to other batches.

  Raises:
    DivergedError: without `skipped`, without a checkpoint, or at the `MOST_SKIPS`th time.
  """
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  for times in itertools.count(1):
    try:
      return fit(state)
    except DivergedError as error:
      checkpoints.wait()
      kept = checkpoints.steps()
      if skipped is None or not kept or kept[-1] < first_step or times == MOST_SKIPS:
        raise
      state, meta = checkpoints.restore_newest(abstract)
      step, before = int(state.step), meta['skipped']
      read = error.step + sum(s['batches'] for s in skipped)
      count = read - step - sum(s['batches'] for s in before)
      skipped[:] = [*before, {'step': step, 'batches': count}]
      log.skip(step, count)
      _log.warning('%s Going on from step %d without the %d batches since.', error, step, count)


def flatten(config, names: Iterable[str]) -> dict:
  """Flat {field: value} of the named fields and groups of a config, for a run's identity."""
  return flatten_dict({name: config.to_dict()[name] for name in names}, sep='.')


def check_least(config, least: float, names: Iterable[str]) -> None:
  """Raises ValueError for a field below `least`, or one that is not finite."""
  for name in names:
    if not least <= config[name] < math.inf:
      raise ValueError(f'{name} must be at least {least}, got {config[name]}.')


def check_same(workdir, identity: dict) -> None:
  """Refuses a workdir that holds a run of another config, listing what differs."""
  path = epath.Path(workdir) / 'run.json'
  saved = epath.Path(workdir) / 'checkpoints'
  if not path.exists() or not saved.exists() or not any(saved.iterdir()):
    return  # nothing to go on with, nothing to lose
  before = json.loads(path.read_text())['identity']
  differ = sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k))
  if differ:
    fields = ', '.join(f'{k}: {before.get(k)} there, {identity.get(k)} here' for k in differ)
    raise ValueError(
      f'{workdir} holds a run of another config ({fields}); give another --workdir, or the same '
      'settings to resume it.'
    )


def exit_if_stopped(step: int | None) -> None:
  """Ends a process that SIGTERM stopped at a step with the code on which launchers restart it."""
  if step is not None:
    _log.warning('stopped by SIGTERM at step %d, saved; the same command goes on.', step)
    raise SystemExit(STOPPED_EXIT_CODE)
