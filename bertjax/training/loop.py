"""The train step and the loop around it, for any loss that is a sum over terms of sum_k / W_k.

`make_train_step` and `make_eval_step` compile pure functions over global batches; `fit` calls
them and knows steps, intervals and stopping, but no task.
"""

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from bertjax.training.mesh import batch_sharding, shard_batch
from bertjax.training.stopping import StopSignal

_log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
  """The loss or the gradient is not finite, or the loss has jumped; `step` counts from 1."""

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step


@flax.struct.dataclass
class TrainState:
  """All that a step reads and writes; arrays only.

  Attributes:
    step: int32 [], steps done.
    params: nested dict of float32 arrays.
    opt_state: optax state.
    rng: typed key []; the key of step s is `fold_in(rng, s)`.

  Example:
    >>> import bertjax, jax, jax.numpy as jnp, optax
    >>> state = bertjax.TrainState.create({'w': jnp.zeros(3)}, optax.adamw(0.1), jax.random.key(0))
    >>> int(state.step)
    0
  """

  step: jax.Array
  params: dict
  opt_state: optax.OptState
  rng: jax.Array

  @classmethod
  def create(cls, params: dict, optimizer: optax.GradientTransformation, rng) -> 'TrainState':
    """The state at step 0."""
    return cls(jnp.zeros([], jnp.int32), params, optimizer.init(params), rng)


def step_of(state: TrainState) -> int:
  """The number of steps done; the runs of a sweep do their steps together."""
  return int(np.ravel(state.step)[0])


def init_state(make_state: Callable[..., TrainState], shard: Callable, *args):
  """Runs `make_state(*args)` compiled, every array born in its sharding; returns the state and its
  shardings.

  Args:
    make_state: makes a state.
    shard: tree of shapes -> tree of shardings, as `mesh.sharder` returns.
    *args: weights to start from; as constants they would bloat the program.

  Example:
    >>> import bertjax, jax, jax.numpy as jnp, optax
    >>> mesh = bertjax.make_mesh()
    >>> def make_state():
    ...   return bertjax.TrainState.create({'w': jnp.zeros(3)}, optax.sgd(0.1), jax.random.key(0))
    >>> def replicate(shapes):
    ...   return jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), shapes)
    >>> state, shardings = bertjax.init_state(make_state, replicate)
    >>> shardings.params['w'].is_fully_replicated
    True
  """
  shardings = shard(jax.eval_shape(make_state, *args))
  return jax.jit(make_state, out_shardings=shardings)(*args), shardings


def make_train_step(
  loss_fn: Callable,
  loss_weights: Callable,
  optimizer: optax.GradientTransformation,
  *,
  mesh: Mesh | None = None,
  state_shardings: TrainState | None = None,
  accumulation: int = 1,
  scale: Mapping[str, float] | None = None,
  wrap: Callable[[Callable], Callable] = lambda step: step,
  coupled: tuple[Callable, Callable] | None = None,
  frozen: dict | None = None,
  group: int = 1,
) -> Callable:
  """Compiles `step(state, batch) -> (state, metrics)`; the old state's buffers are donated.

  Args:
    loss_fn: (params, batch, rng) -> ({term: weighted sum}, {metric: weighted sum, or a pair of
      sums}).
    loss_weights: batch -> {term: total weight}.
    optimizer: any optax optimizer; its updates, which include the learning rate, are added to the
      parameters (`optax.apply_updates`).
    mesh: device mesh; None compiles for wherever the arguments are.
    state_shardings: as returned by `init_state`; required with a mesh.
    accumulation: number of microbatches that each batch is split into. Their gradients add up
      exactly, since each is divided by the weights of the global batch.
    scale: {term: its weight in the total loss}, 1.0 if missing.
    wrap: transforms the step before it is compiled; `jax.vmap` makes it that of a sweep.
    coupled: (encode, couple) of a loss that couples the rows of a batch, see
      `objectives.Objective`. Microbatches are encoded twice: for the gradient of the batch
      with respect to their outputs, and to continue it to the parameters (Gao et al. 2021).
    frozen: device arrays that `loss_fn` finds among the parameters and that are not trained.
    group: consecutive rows of a batch that no microbatch separates: those of an example.

  Returns:
    The compiled step. Its metrics are scalars: those of `means`, 'grad_norm' before clipping, and
    the step's 'learning_rate' if the optimizer's state has it (`make_optimizer`,
    `optax.inject_hyperparams`).

  Example:
    >>> import bertjax, jax, jax.numpy as jnp, optax
    >>> def loss_fn(params, batch, rng):
    ...   return {'fit': jnp.square(batch['x'] * params['w'] - batch['y']).sum()}, {}
    >>> optimizer = optax.adamw(0.1)
    >>> step = bertjax.make_train_step(loss_fn, lambda b: {'fit': b['x'].size}, optimizer)
    >>> params = {'w': jnp.zeros(())}
    >>> state = bertjax.TrainState.create(params, optimizer, jax.random.key(0))
    >>> for _ in range(100):
    ...   state, metrics = step(state, {'x': jnp.ones(4), 'y': jnp.full(4, 2.0)})
    >>> bool(metrics['loss'] < 0.01)
    True
  """

  def step(state: TrainState, batch: dict, frozen: dict | None = None):
    weights = loss_weights(batch)
    rng = jax.random.fold_in(state.rng, state.step)

    def total(losses, sums):
      return means(losses, {}, weights, scale)['loss'], (losses, sums)

    def objective(params, part, key):
      return total(*loss_fn(_join_params(params, frozen), part, key))

    def gradients(part, key):
      with _compiling_for(mesh):
        (_, aux), grads = jax.value_and_grad(objective, has_aux=True)(state.params, part, key)
      return grads, aux

    if accumulation == 1:
      grads, (losses, sums) = gradients(batch, rng)
    else:
      rows = 1 if coupled else group  # coupled rows do not depend on each other there
      parts, keys = _split(batch, accumulation, rows), jax.random.split(rng, accumulation)
      if coupled:
        with _compiling_for(mesh):
          encode, couple = coupled
          grads, (losses, sums) = _cached_gradients(
            lambda params, *rest: encode(_join_params(params, frozen), *rest), couple,
            state.params, parts, keys, batch, total,
          )  # fmt: skip
      else:
        grads, (losses, sums) = _add_up(gradients, parts, keys)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = means(losses, sums, weights, scale)
    metrics |= {'grad_norm': optax.tree.norm(grads)} | learning_rate_of(opt_state)
    new = TrainState(state.step + 1, params, opt_state, state.rng)
    return new, metrics

  rows = batch_sharding(mesh) if mesh else None  # None: wherever the arguments are
  more = () if frozen is None else (frozen,)
  compiled = jax.jit(
    wrap(step), donate_argnums=0, in_shardings=(state_shardings, rows, *(None for _ in more)),
    out_shardings=(state_shardings, None),
  )  # fmt: skip
  return (lambda state, batch: compiled(state, batch, *more)) if more else compiled


def _join_params(params, frozen: dict | None):
  return params | frozen if frozen else params  # params may be any tree


def _split(batch, accumulation: int, group: int = 1):
  """Arrays [rows, ...] as microbatches [A, rows / A, ...].

  Groups of rows a, a + A, a + 2A, ... form microbatch a: each device splits the rows that it has.
  """

  def split(x):
    parts = x.reshape(-1, accumulation, group, *x.shape[1:]).swapaxes(0, 1)
    return parts.reshape(accumulation, -1, *x.shape[1:])

  return jax.tree.map(split, batch)


def _join(parts):
  """The rows of microbatches, as `_split` has found them one by one."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def _add_up(function: Callable, *inputs):
  """The sum over microbatches of what `function` returns, a tree of arrays."""
  shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], inputs))

  def add(total, part):
    return jax.tree.map(jnp.add, total, function(*part)), None

  return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), inputs)[0]


def _cached_gradients(encode, couple, params, parts, keys, batch, total):
  """The gradient and sums of a loss that couples all rows of a batch, from its microbatches."""

  def pull_back(part, key, cotangents):
    return jax.vjp(lambda p: encode(p, part, key), params)[1](cotangents)[0]

  outputs = _join(jax.lax.map(lambda inputs: encode(params, *inputs), (parts, keys)))
  cotangents, aux = jax.grad(lambda x: total(*couple(x, batch)), has_aux=True)(outputs)
  return _add_up(pull_back, parts, keys, _split(cotangents, len(keys))), aux


def _compiling_for(mesh: Mesh | None):
  """Sets where kernels will run, which they read when they choose an implementation in tracing."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext()


def learning_rate_of(opt_state: optax.OptState) -> dict[str, jax.Array]:
  """{'learning_rate': that of the last step}; {} if the optimizer's state has none or several."""
  found = optax.tree.get_all_with_path(opt_state, 'learning_rate')
  rates = [rate for _, rate in found if hasattr(rate, 'dtype')]  # not a schedule's state
  return {'learning_rate': rates[0]} if len(rates) == 1 else {}


def make_eval_step(
  loss_fn: Callable, loss_weights: Callable, *, mesh, frozen: dict | None = None
) -> Callable:
  """Compiles `eval_step(params, batch) -> (loss sums, metric sums, weights)`, without dropout.

  Args:
    loss_fn: as for `make_train_step`; its rng is None.
    loss_weights: as for `make_train_step`.
    mesh: device mesh; batches are split by row over it.
    frozen: as for `make_train_step`.

  Example:
    >>> import bertjax, jax, jax.numpy as jnp
    >>> def loss_fn(params, batch, rng):
    ...   return {'fit': jnp.square(params['w'] - batch['y']).sum()}, {}
    >>> mesh = bertjax.make_mesh()
    >>> eval_step = bertjax.make_eval_step(loss_fn, lambda b: {'fit': b['y'].size}, mesh=mesh)
    >>> batch = {'y': jnp.ones(jax.device_count())}
    >>> losses, metrics, weights = eval_step({'w': jnp.zeros(())}, batch)
    >>> float(losses['fit'] / weights['fit'])
    1.0
  """

  def step(params, batch, frozen: dict | None):
    with _compiling_for(mesh):
      return *loss_fn(_join_params(params, frozen), batch, None), loss_weights(batch)

  compiled = jax.jit(step, in_shardings=(None, batch_sharding(mesh), None))
  return lambda params, batch: compiled(params, batch, frozen)


def means(
  losses: dict, sums: dict, weights: dict, scale: Mapping[str, float] | None = None
) -> dict:  # fmt: skip
  """Divides sums by weights, for arrays and numbers.

  Returns:
    'loss', the sum over terms of scale * '{term}_loss'; each '{term}_loss'; and each metric
    '{term}_x', divided by the weight of its term, or a pair the first by the second. A term without
    weight in this batch counts 0.
  """

  def nonzero(weight):
    return weight + (weight == 0)

  safe = {term: nonzero(weight) for term, weight in weights.items()}
  terms = {term: loss / safe[term] for term, loss in losses.items()}
  total = sum((scale or {}).get(term, 1.0) * loss for term, loss in terms.items())
  metrics = {
    name: value[0] / nonzero(value[1])
    if isinstance(value, tuple) else value / safe[name.split('_')[0]]
    for name, value in sums.items()
  }  # fmt: skip
  return {'loss': total} | {f'{term}_loss': loss for term, loss in terms.items()} | metrics


def evaluate(
  eval_step: Callable, params, batches: Iterable[dict], scale: Mapping[str, float] | None = None
) -> dict[str, float]:
  """Adds the sums of all batches in float64 on the host and divides once: exact for any split."""
  return scores(evaluation_sums(eval_step, params, batches), scale)


def evaluation_sums(eval_step: Callable, params, batches: Iterable[dict]) -> tuple:
  """(loss sums, metric sums, weights) of all batches in float64, which may be added to others."""
  parts = jax.device_get([eval_step(params, batch) for batch in batches])
  if not parts:
    raise ValueError('evaluation got no batches.')
  return jax.tree.map(lambda *x: np.sum(x, dtype=np.float64), *parts)


def scores(total: tuple, scale: Mapping[str, float] | None = None) -> dict[str, float]:
  """The losses, metrics and weights of `evaluation_sums`."""
  losses, sums, weights = total
  result = {name: float(v) for name, v in means(losses, sums, weights, scale).items()}
  return result | {f'{term}_weight': float(weight) for term, weight in weights.items()}


def to_device(batches: Iterable[dict], mesh, ahead: int = 2) -> Iterator[dict]:
  """Puts host batches (this process's rows) on the devices, `ahead` batches early."""
  sharding = batch_sharding(mesh)
  queue = collections.deque()
  for batch in batches:
    queue.append(shard_batch(batch, sharding))
    if len(queue) > ahead:
      yield queue.popleft()
  yield from queue


def fit(
  state: TrainState,
  train_step: Callable,
  batches: Iterator[dict],
  *,
  steps: int,
  log,
  log_every: int,
  evaluate_fn: Callable[[dict], dict] | None = None,
  eval_every: int = 0,
  save: Callable[[TrainState, int, dict | None], None] | None = None,
  save_every: int = 0,
  finished: Callable[[], bool] = lambda: False,
  watch: Callable[[int, str], None] = lambda step, doing: None,
  spike: float = 0.0,
) -> tuple[TrainState, dict, int]:
  """Trains from `state.step` to `steps`.

  Args:
    state: where to start; its buffers are donated.
    train_step: as `make_train_step` gives.
    batches: device batches, the first one that of step `state.step`.
    steps: where to stop, counted from the start of training.
    log: has `train(step, {name: mean since the last call}, seconds, steps)` and `evaluation(step,
      metrics)`, see `training.metrics`. 'input_stall' is the fraction of the seconds in which no
      step ran and the next one waited for its batch.
    log_every: steps between log lines; the loop waits for the device only there.
    evaluate_fn: params -> metrics, called every `eval_every` steps and at the end.
    eval_every: 0 evaluates at the end only.
    save: called with (state, step, metrics of an evaluation at this very step or None) every
      `save_every` steps, after every evaluation, at the end, and on SIGTERM or Ctrl-C.
    save_every: 0 saves at evaluations and at the end only.
    finished: whether the run has ended (early stopping); called at the start, and after each
      evaluation and its save.
    watch: receives what begins at which step (`distributed.Watch.at`).
    spike: nats by which a loss above the median of the 100 before it counts as divergence; 0.0 =
      none does.

  Returns:
    The last state, the metrics of the last evaluation ({} if there was none), and the signal that
      came before the run ended (0 = none); perhaps during its last step, so compare `state.step`.

  Raises:
    DivergedError: when a loss or gradient norm is not finite, or the loss jumps by `spike`; names
      the step, and saves nothing later.
    KeyboardInterrupt: at the second Ctrl-C.

  Example:
    >>> import bertjax, itertools, jax, jax.numpy as jnp, optax
    >>> class Log:
    ...   def train(self, step, metrics, seconds, steps):
    ...     print(f'step {step}: loss {metrics["loss"]:.1f}')
    >>> def loss_fn(params, batch, rng):
    ...   return {'fit': jnp.square(params['w'] - batch['y']).sum()}, {}
    >>> step = bertjax.make_train_step(loss_fn, lambda b: {'fit': b['y'].size}, optax.sgd(0.5))
    >>> state = bertjax.TrainState.create({'w': jnp.zeros(())}, optax.sgd(0.5), jax.random.key(0))
    >>> batches = itertools.repeat({'y': jnp.ones(4)})
    >>> state, _, _ = bertjax.fit(state, step, batches, steps=4, log=Log(), log_every=2)
    step 2: loss 0.5
    step 4: loss 0.0
  """
  step = first = step_of(state)
  pending, last_log, before = [], time.perf_counter(), collections.deque(maxlen=100)
  stalled = 0.0

  def flush():
    nonlocal pending, last_log, stalled
    if pending:
      watch(step, 'waiting for the devices')
      values = jax.device_get(pending)
      for i, value in enumerate(values):
        _check(value, step - len(values) + i + 1, before, spike)
      now = time.perf_counter()
      mean = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
      mean['input_stall'] = stalled / max(now - last_log, 1e-9)
      log.train(step, mean, now - last_log, len(values))
      pending, last_log, stalled = [], now, 0.0

  saved = step

  def save_now(scores=None):
    nonlocal saved, last_log
    assert save is not None
    flush()  # a step that is not finite raises here, before anything is written
    watch(step, 'saving')
    save(state, step, scores)
    saved, last_log = step, time.perf_counter()  # tokens/s counts training only

  last_scores, ended = {}, finished()
  with StopSignal() as stop:
    while step < steps and not ended and not stop.asked(step):
      watch(step, 'reading a batch')
      asked = time.perf_counter()
      batch = next(batches)
      if not _runs(pending):
        stalled += time.perf_counter() - asked
      watch(step, 'running')
      if step == first:
        _log.info('compiling the train step')
        last_log, stalled = time.perf_counter(), 0.0
      state, metrics = train_step(state, batch)
      if step == first:
        _log.info('compiled in %.1f s', time.perf_counter() - last_log)
        last_log = time.perf_counter()  # the first log line has the speed of the steps only
      step += 1
      pending.append(metrics)
      if len(pending) > 2:  # two steps stay queued; further ahead the host would measure no times
        watch(step, 'waiting for the devices')
        jax.block_until_ready(pending[-3])
      if step % log_every == 0:
        flush()
      scores = None
      if evaluate_fn and (step == steps or (eval_every and step % eval_every == 0)):
        flush()
        watch(step, 'evaluating')
        scores = last_scores = evaluate_fn(trained_params(state))
        log.evaluation(step, scores)
        last_log = time.perf_counter()
      if save and (scores or step == steps or (save_every and step % save_every == 0)):
        save_now(scores)
      ended = bool(scores) and finished()
    flush()
    if save and saved != step:
      save_now()
  return state, last_scores, 0 if ended else stop.received


def trained_params(state: TrainState) -> dict:
  """What is evaluated and saved: the average of the parameters if the optimizer keeps it."""
  return optax.tree.get(state.opt_state, 'average', state.params)


def _runs(pending: list[dict]) -> bool:
  """Whether the devices still have a step to run, by its outputs."""
  outputs = jax.tree.leaves(pending[-1:])
  ready = [output.is_ready() for output in outputs if isinstance(output, jax.Array)]  # type: ignore[attr-defined]
  return not all(ready)


def _check(metrics: dict, step: int, before: collections.deque, spike: float) -> None:
  """Raises DivergedError for a step that is not finite or whose loss jumps above those `before`.

  In a sweep, a run that diverges does not end the others.
  """
  for name in ('loss', 'grad_norm'):
    if not np.any(np.isfinite(metrics[name])):
      raise DivergedError(
        f'{name} is {metrics[name]} at step {step}; nothing after the last checkpoint was saved. '
        'Lower learning_rate, lengthen warmup_steps, or look at the data of that step.', step,
      )  # fmt: skip
  loss = float(np.mean(metrics['loss']))
  if spike and len(before) >= 20 and loss > np.median(before) + spike:
    raise DivergedError(
      f'the loss jumped from {np.median(before):.3f} to {loss:.3f} at step {step}, by more than '
      f'spike={spike}; nothing after the last checkpoint was saved.', step,
    )  # fmt: skip
  before.append(loss)
