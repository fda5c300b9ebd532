"""Starting a run and going on with it: its identity, its first state, its saves, its end."""

import dataclasses
import itertools
import json
import logging
import math
import signal
from collections.abc import Callable, Iterable

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from bertjax.training.checkpoint import Checkpoints
from bertjax.training.loop import STOPPED_EXIT_CODE, DivergedError, TrainState, init_state

_log = logging.getLogger(__name__)


def make_state(init: Callable, optimizer, seed: int, params=None) -> TrainState:
  """A `TrainState` at step 0: `params`, or those that `init(rng)` draws."""
  rng = jax.random.key(seed)
  params = init(jax.random.fold_in(rng, 0)) if params is None else params
  return TrainState.create(params, optimizer, jax.random.fold_in(rng, 1))


def model_facts(config, *, labels=(), problem_type: str = '', trials: int = 1) -> dict:
  """The model's entry in a checkpoint's meta, which `interop.checkpoints` reads: an `EncoderConfig`
  without the fields that only say how to run it, the labels and the number of trials."""
  free = ('frozen', 'dtype', 'attention', 'dropout_bits', 'remat', 'unroll')
  fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
  return {
    'config': fields, 'labels': list(labels), 'problem_type': problem_type, 'trials': trials
  }  # fmt: skip


def abstract_of(state):
  """Shapes and shardings of a state that exists."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


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
  *,
  steps: int | None = None,
) -> tuple[TrainState, TrainState, dict]:
  """The state to start from: the newest checkpoint, else `make(load())`, else `make()`.

  `shard` is as for `loop.init_state`; `steps` is the run's last step.

  Returns:
    The state, its shardings, and the checkpoint's meta ({} without one).

  Raises:
    ValueError: if the newest checkpoint is of a step beyond `steps`.
  """
  if kept := checkpoints.steps():
    if steps is not None and kept[-1] > steps:
      raise ValueError(
        f'steps={steps}, but {checkpoints.directory} holds a checkpoint of step {kept[-1]}: set '
        'steps to at least that, or give another --workdir.'
      )
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
  abstract = abstract_of(state)
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


def check_save_model(config) -> None:
  """Raises ValueError unless `save_model` is one of its choices."""
  if config.save_model not in ('last', 'best'):
    raise ValueError(f"save_model must be 'last' or 'best', got {config.save_model!r}.")


def check_least(config, least: float, names: Iterable[str]) -> None:
  """Raises ValueError for a field ('data.length') below `least`, or one that is not finite."""
  fields = flatten_dict(config.to_dict(), sep='.')
  for name in names:
    if not least <= fields[name] < math.inf:
      raise ValueError(f'{name} must be at least {least}, got {fields[name]}.')


def check_integers(config) -> None:
  """Raises ValueError for an integer field beyond 32 bits, or a seed beyond 0..2**63 - 1."""
  for name, value in flatten_dict(config.to_dict(), sep='.').items():
    if name == 'seed' and not 0 <= value < 2**63:
      raise ValueError(f'seed must be at least 0 and below 2**63, got {value}.')
    if name == 'seed' and value >= 2**32:
      _log.warning(
        "seed=%d: jax's keys, for weights and dropout, hold its lower 32 bits, %d.",
        value, value % 2**32,
      )  # fmt: skip
    elif name != 'seed' and type(value) is int and abs(value) >= 2**31:
      raise ValueError(f'{name} must be below 2**31, got {value}.')


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


def exit_if_stopped(stopped: int, step: int) -> None:
  """Ends a run that the signal `stopped` (0 = none) stopped at a step.

  Raises:
    KeyboardInterrupt: after Ctrl-C.
    SystemExit: after SIGTERM, with the code on which launchers restart the process.
  """
  if stopped == signal.SIGINT:
    raise KeyboardInterrupt(f'stopped at step {step}, saved; the same command resumes the run.')
  if stopped:
    _log.warning('stopped by SIGTERM at step %d, saved; the same command resumes the run.', step)
    raise SystemExit(STOPPED_EXIT_CODE)
