"""How the state of a run is made, laid out on devices and restored.

`Layout` is one run on a mesh; `sweep.Sweep` has the same methods for several runs side by side.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from bertjax.training import loop
from bertjax.training.checkpoint import Checkpoints
from bertjax.training.loop import TrainState, init_state
from bertjax.training.mesh import AxisTable, tree_shardings

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the state of one run is made and laid out on devices; `sweep.Sweep` does several runs.

  Attributes:
    mesh: device mesh.
    axes: path -> axes table of the parameters, see `training.mesh`.
    seed: seed of the initial weights and of dropout.
    prng_impl: generator of dropout: 'threefry2x32', or 'rbg' (faster on TPU, but its bits depend on
      the mesh).
    accumulation: microbatches that each batch is split into.
  """

  mesh: Mesh
  axes: AxisTable
  seed: int = 0
  prng_impl: str = 'threefry2x32'
  accumulation: int = 1

  def make_state(self, objective, optimizer, params=None) -> TrainState:
    """The state at step 0 with `params`, or freshly initialised ones."""
    return self._make_one(self.seed, objective, optimizer, params)

  def _make_one(self, seed, objective, optimizer, params) -> TrainState:
    if params is None:  # initial weights do not depend on the generator of dropout
      params = objective.init(jax.random.fold_in(jax.random.key(seed), 0))
    rng = jax.random.fold_in(jax.random.key(seed, impl=self.prng_impl), 1)
    return TrainState.create(params, optimizer, rng)

  def shardings(self, tree):
    """The shardings of a tree of arrays or shapes."""
    return tree_shardings(self.mesh, self.axes, tree)

  def train_step(self, objective, optimizer, state_shardings, wrap=lambda step: step) -> Callable:
    """Compiles the train step."""
    return loop.make_train_step(
      objective.loss, objective.weights, optimizer, scale=objective.scale, mesh=self.mesh,
      state_shardings=state_shardings, accumulation=self.accumulation, wrap=wrap,
      coupled=objective.coupled, frozen=objective.frozen, group=objective.group,
    )  # fmt: skip

  def summary(self, scores: Sequence[dict], values: Sequence[float], options) -> dict[str, float]:
    """The scores that are logged and saved with the checkpoint.

    Args:
      scores: of each run.
      values: by which each run is ranked, the highest is best; -inf for one that does not count.
      options: `run.Options`.
    """
    return scores[0]


def abstract_of(state):
  """Shapes and shardings of an existing state."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def abstract_state(objective, optimizer, layout: Layout):
  """Shapes and shardings of a run's state, to restore a checkpoint into; and the shardings only."""
  make = functools.partial(layout.make_state, objective, optimizer)
  shardings = layout.shardings(jax.eval_shape(make))
  return jax.jit(make, out_shardings=shardings).eval_shape(), shardings


def restore_or_init(
  objective, optimizer, layout: Layout, checkpoints: Checkpoints | None = None,
  load: Callable | None = None, *, num_train_steps: int = 2**31,
) -> tuple[TrainState, TrainState, dict]:  # fmt: skip
  """The state to start from: the newest checkpoint's, else one at step 0 with the params of `load`
  or freshly initialised ones; see `train`.

  Returns:
    The state, its shardings, and the checkpoint's meta ({} without one).

  Raises:
    ValueError: if the newest checkpoint is of a step beyond `num_train_steps`.
  """
  if checkpoints and (kept := checkpoints.steps()):
    if kept[-1] > num_train_steps:
      raise ValueError(
        f'num_train_steps={num_train_steps}, but {checkpoints.directory} holds a checkpoint of '
        f'step {kept[-1]}; set num_train_steps to at least that, or use another --workdir.'
      )
    abstract, shardings = abstract_state(objective, optimizer, layout)
    state, meta = checkpoints.restore_newest(abstract)
    _log.info('resuming from step %d of %s', loop.step_of(state), checkpoints.directory)
    return state, shardings, meta
  make = functools.partial(layout.make_state, objective, optimizer)
  arguments = [load(lambda: jax.device_get(jax.jit(make)().params))] if load else []
  state, shardings = init_state(make, layout.shardings, *arguments)
  return state, shardings, {}
