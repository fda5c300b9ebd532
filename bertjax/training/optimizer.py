"""Optimizers and schedules: BERT's own AdamW (google-research/bert, optimization.py) and others.

All are optax transformations that include their learning rate. The peak rate is part of their
state, so that runs with different peaks share one compiled program (`training.sweep`).
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bertjax.training.mesh import AxisTable, logical_axes, path_name

OPTIMIZERS = ('bert', 'adamw', 'stable_adamw', 'lamb', 'muon', 'sgd')

# Decays from 1 to 0 over progress t in [0, 1]; 'one_minus_sqrt' is Haegele et al. (2024).
_DECAYS = {
  'linear': lambda t: 1 - t,
  'cosine': lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t)),
  'one_minus_sqrt': lambda t: 1 - jnp.sqrt(t),
  'constant': jnp.ones_like,
}
# Schedule -> its decay; those named wsd (warm-up, stable, decay) decay at their end only.
SCHEDULES = {'google': 'linear', **{name: name for name in _DECAYS}, 'wsd': 'one_minus_sqrt',
             'wsd_linear': 'linear', 'wsd_cosine': 'cosine'}  # fmt: skip

# Biases and LayerNorm parameters are not decayed; embeddings and output kernels are. Google's
# pattern is ('LayerNorm', 'layer_norm', 'bias') on its own variable names.
NO_DECAY = r'(layer_norm|bias)'

# One tensor of ours holds several of Google's along these axes: LAMB takes the norm of each, and
# Muon orthogonalises each.
_SEPARATE_AXES = ('layers', 'qkv')

_MUON_KERNELS = r'(attention|mlp)/\w+/kernel$'  # of the encoder's layers; AdamW trains the rest
_MUON_POLYNOMIAL = (3.4445, -4.7750, 2.0315)


def scale_by_bert_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """Adam without bias correction and with eps outside the root, as Google's AdamWeightDecay.

  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  direction = m / (sqrt(v) + eps).
  """

  def init(params):
    return optax.ScaleByAdamState(
      count=jnp.zeros([], jnp.int32),
      mu=jax.tree.map(jnp.zeros_like, params),
      nu=jax.tree.map(jnp.zeros_like, params),
    )

  def update(grads, state, params=None):
    del params
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
    direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
    return direction, optax.ScaleByAdamState(state.count + 1, mu, nu)

  return optax.GradientTransformation(init, update)


def scale_by_layer_trust_ratio(table: AxisTable) -> optax.GradientTransformation:
  """LAMB's |param| / |update| (You et al. 2019), for each layer of a stacked parameter separately.

  `optax.scale_by_trust_ratio` takes one norm over an entire array, which for stacked layers would
  be one norm over the depth of the model.
  """

  def update(updates, state, params):
    def scale(path, u, p):
      axes = logical_axes(table, path, p.ndim)
      reduced = tuple(i for i, axis in enumerate(axes) if axis not in _SEPARATE_AXES)
      p_norm = jnp.sqrt(jnp.sum(jnp.square(p), reduced, keepdims=True))
      u_norm = jnp.sqrt(jnp.sum(jnp.square(u), reduced, keepdims=True))
      ratio = jnp.where((p_norm > 0) & (u_norm > 0), p_norm / jnp.maximum(u_norm, 1e-30), 1.0)
      return u * ratio

    return jax.tree.map_with_path(scale, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_by_surprise(
  transform: optax.GradientTransformation, b2: float, eps: float, table: AxisTable
) -> optax.GradientTransformation:
  """StableAdamW (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2), which needs no clipping of
  the gradient: a step of Adam, decay included, divided by max(1, RMS).

  RMS is the root of the mean of g^2 / max(v, eps^2) over a parameter, of each layer separately,
  with the second moment v corrected for its start at 0.

  Args:
    transform: Adam and weight decay, from gradient to direction.
    b2: decay rate of the second moment.
    eps: as Adam's.
    table: path -> axes, which names the axis of layers.
  """

  def update(grads, state, params):
    steps, state = transform.update(grads, state, params)
    corrected = 1 - b2 ** optax.tree.get(state, 'count')

    def clip(path, step, g, v):
      axes = logical_axes(table, path, g.ndim)
      over = tuple(i for i, axis in enumerate(axes) if axis != 'layers')
      ratio = jnp.square(g) / jnp.maximum(v / corrected, eps**2)
      return step / jnp.maximum(1.0, jnp.sqrt(jnp.mean(ratio, over, keepdims=True)))

    return jax.tree.map_with_path(clip, steps, grads, optax.tree.get(state, 'nu')), state

  return optax.GradientTransformation(transform.init, update)


def scale_by_muon(
  table: AxisTable, b1: float, b2: float, eps: float, momentum: float = 0.95
) -> optax.GradientTransformation:
  """Muon (Jordan et al. 2024) for the kernels of the encoder's layers, Adam for the rest.

  The Nesterov momentum of each matrix is brought near to an orthogonal one by 5 Newton-Schulz
  steps, and multiplied by 0.2 sqrt(longer side), which gives it about the size of Adam's updates
  (Liu et al. 2025). Layers, and queries, keys and values, are separate matrices.
  """

  def orthogonalize(path, x):
    axes = logical_axes(table, path, x.ndim)
    separate = [i for i, axis in enumerate(axes) if axis in (*_SEPARATE_AXES, None)]
    row = axes.index('embed')
    columns = [i for i in range(x.ndim) if i not in (*separate, row)]
    order = (*separate, row, *columns)
    x = x.transpose(order)
    matrix = x.reshape(*x.shape[: len(separate) + 1], -1)
    size = 0.2 * max(matrix.shape[-2:]) ** 0.5
    matrix /= jnp.linalg.norm(matrix, axis=(-2, -1), keepdims=True) + 1e-8
    a, b, c = _MUON_POLYNOMIAL
    for _ in range(5):
      square = matrix @ matrix.mT
      matrix = a * matrix + (b * square + c * square @ square) @ matrix
    return (size * matrix).reshape(x.shape).transpose(np.argsort(order))

  def kinds(params):
    return jax.tree.map_with_path(
      lambda path, _: 'muon' if re.search(_MUON_KERNELS, path_name(path)) else 'adam', params
    )

  orthogonal = optax.stateless(lambda u, _: jax.tree.map_with_path(orthogonalize, u))
  muon = optax.chain(optax.trace(momentum, nesterov=True), orthogonal)
  return optax.partition({'muon': muon, 'adam': optax.scale_by_adam(b1, b2, eps)}, kinds)


class AverageState(NamedTuple):
  """State of `average_params`."""

  count: jax.Array  # type: ignore[assignment]  # int32 [], steps done; tuples have a count()
  average: optax.Params


def average_params(decay: float) -> optax.GradientTransformation:
  """Keeps the exponential moving average of the parameters; the last part of an optimizer.

  average = d average + (1 - d) params, where d is min(decay, (1 + step) / (10 + step)), so that the
  first steps do not keep the initial weights.
  """

  def init(params):
    return AverageState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params))

  def update(updates, state, params):
    rate = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
    new = optax.apply_updates(params, updates)
    average = optax.incremental_update(new, state.average, 1 - rate)
    return updates, AverageState(state.count + 1, average)

  return optax.GradientTransformation(init, update)


Factors = Callable[[str], float | np.ndarray]


def scale_by_part(
  transform: optax.GradientTransformation, factors: Factors
) -> optax.GradientTransformation:
  """Multiplies each part's steps, decay included; a part with factor 0 keeps no moments.

  Args:
    transform: as `make_optimizer` gives.
    factors: path of a parameter -> its factor, or one for each layer of a stacked parameter.
  """

  def kinds(params):
    return jax.tree.map_with_path(
      lambda path, _: 'trained' if np.any(factors(path_name(path))) else 'frozen', params
    )

  scaled = optax.stateless(
    lambda updates, _: jax.tree.map_with_path(lambda p, u: u * _factor(factors, p, u), updates)
  )
  chained = optax.chain(transform, scaled)
  return optax.partition({'trained': chained, 'frozen': optax.set_to_zero()}, kinds)


def _factor(factors: Factors, path, x) -> np.ndarray:
  """The factor of a leaf, float32, in a shape that multiplies it."""
  factor = np.asarray(factors(path_name(path)), np.float32)
  if factor.ndim:
    factor = factor[-len(x) :]  # the first layer may lack a parameter that the others have
  return factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))


def stop_gradients(params, factors: Factors):
  """The parameters, with gradients stopped where the factor is 0."""

  def cut(path, p):
    trained = _factor(factors, path, p) > 0
    return p if trained.all() else jnp.where(trained, p, jax.lax.stop_gradient(p))

  return jax.tree.map_with_path(cut, params)


def decay_mask(params):
  """True for every leaf that weight decay applies to, by its path."""
  return jax.tree.map_with_path(lambda path, _: not re.search(NO_DECAY, path_name(path)), params)


class PeakRateState(NamedTuple):
  """State of `scale_by_peak_rate`."""

  count: jax.Array  # type: ignore[assignment]  # int32 [], steps done; tuples have a count()
  peak_learning_rate: jax.Array  # float32 []
  learning_rate: jax.Array  # float32 [], that of the last step; a metric of the train step


def scale_by_peak_rate(
  peak: float, schedule: Callable | None = None
) -> optax.GradientTransformation:
  """Multiplies updates by -peak * schedule(count); the peak is read from the state.

  Args:
    peak: peak learning rate.
    schedule: step -> fraction of the peak; None is constant.
  """

  def init(params):
    del params
    peak_rate = jnp.asarray(peak, jnp.float32)
    return PeakRateState(jnp.zeros([], jnp.int32), peak_rate, jnp.zeros([], jnp.float32))

  def update(updates, state, params=None):
    del params
    count, peak_rate, _ = state
    rate = peak_rate * schedule(count) if schedule else peak_rate
    updates = jax.tree.map(lambda u: -rate * u, updates)
    return updates, PeakRateState(count + 1, peak_rate, rate)

  return optax.GradientTransformation(init, update)


def with_peak(opt_state: optax.OptState, peak: float) -> optax.OptState:
  """The state of a `make_optimizer` optimizer with another peak learning rate."""
  return optax.tree.set(opt_state, peak_learning_rate=peak)


def make_optimizer(
  name: str = 'bert',
  learning_rate: float = 1e-4,
  *,
  schedule: Callable | None = None,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.01,
  clip_norm: float = 1.0,
  average: float = 0.0,
  param_axes: AxisTable = (),
  factors: Factors | None = None,
) -> optax.GradientTransformation:
  """Makes an optimizer with its learning rate, for `make_train_step` or any optax training loop.

  Args:
    name: 'bert' (AdamW without bias correction, the paper's), 'adamw' (optax's, with it),
      'stable_adamw' (`clip_by_surprise`, ModernBERT's, with clip_norm 0), 'lamb' (You et al. 2019;
      decay and trust ratio skip biases and LayerNorm), 'muon' (see `scale_by_muon`) or 'sgd'
      (momentum b1).
    learning_rate: peak learning rate.
    schedule: step -> fraction of the peak, as returned by `make_schedule`; None is constant.
    b1: first-moment decay, or the momentum of 'sgd'.
    b2: second-moment decay.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay, scaled by the learning rate, on all but `NO_DECAY`.
    clip_norm: global norm the gradient of the global batch is clipped to; 0.0 switches it off.
      Google's TPU code clips each core's gradient before it sums them; we clip the sum.
    average: decay rate of the moving average of the parameters, see `average_params`; 0.0 = none.
    param_axes: path -> axes table; 'stable_adamw', 'lamb' and 'muon' separate stacked layers by it.
    factors: path of a parameter -> factor of its learning rate, or one factor per stacked layer;
      parameters with factor 0 have no moments.

  Raises:
    ValueError: for an unknown name or settings out of range.

  Example:
    >>> import bertjax, jax.numpy as jnp
    >>> params = {'kernel': jnp.ones(3)}
    >>> optimizer = bertjax.make_optimizer('adamw', 1e-3)
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)  # gradients = params
    >>> bool((updates['kernel'] < 0).all())
    True
  """
  if name not in OPTIMIZERS:
    raise ValueError(f'optimizer.name must be one of {OPTIMIZERS}, got {name!r}.')
  for field, value in (('b1', b1), ('b2', b2), ('average', average)):
    if not 0 <= value < 1:
      raise ValueError(f'optimizer.{field} must be in [0, 1), got {value}.')
  for field, value in (('weight_decay', weight_decay), ('clip_norm', clip_norm)):
    if not 0 <= value < math.inf:
      raise ValueError(f'optimizer.{field} must not be negative, got {value}.')
  check_rate('optimizer.eps', eps)
  scale = {
    'bert': scale_by_bert_adam(b1, b2, eps),
    'adamw': optax.scale_by_adam(b1, b2, eps),
    'stable_adamw': optax.scale_by_adam(b1, b2, eps),
    'lamb': optax.scale_by_adam(b1, b2, eps),
    'muon': scale_by_muon(param_axes, b1, b2, eps),
    'sgd': optax.trace(decay=b1),
  }[name]
  steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  adam = [scale, optax.add_decayed_weights(weight_decay, mask=decay_mask)]
  if name == 'stable_adamw':
    adam = [clip_by_surprise(optax.chain(*adam), b2, eps, param_axes)]
  steps += adam
  if name == 'lamb':
    steps.append(optax.masked(scale_by_layer_trust_ratio(param_axes), decay_mask))
  direction = optax.chain(*steps)
  if factors:
    direction = scale_by_part(direction, factors)
  steps = [direction, scale_by_peak_rate(learning_rate, schedule)]
  return optax.chain(*steps, *([average_params(average)] if average else []))


def check_rate(name: str, value: float) -> None:
  """Raises ValueError unless a number is finite and above 0."""
  if not 0 < value < math.inf:
    raise ValueError(f'{name} must be above 0, got {value}.')


class Segment(NamedTuple):
  """Consecutive steps of a run with one schedule.

  Attributes:
    name: as for `make_schedule`.
    steps: number of steps.
    start: fraction of the peak at the first step; 0.0 = where the segment before ended, and the
      peak in the first segment.
    end: fraction of the peak at the end of a decay.
  """

  name: str
  steps: int
  start: float = 0.0
  end: float = 0.0


def join_schedules(
  segments: Sequence[Segment], warmup_steps: int, decay_ratio: float = 0.1
) -> Callable:
  """Returns step -> fraction of the peak learning rate in segments, each from its first step on.

  The warm-up is part of the first segment; a later one that rises warms up again.

  >>> from bertjax.training import optimizer
  >>> decay = optimizer.Segment('one_minus_sqrt', 100, end=0.1)
  >>> rate = optimizer.join_schedules([optimizer.Segment('constant', 900), decay], 10)
  >>> [round(float(rate(step)), 3) for step in (5, 10, 900, 925, 1000)]
  [0.5, 1.0, 1.0, 0.55, 0.1]

  Raises:
    ValueError: for an unknown name, a factor out of range, or a warm-up longer than the first
      segment.
  """
  schedules, bounds, end = [], [], 1.0
  for name, steps, start, last in segments:
    if not (0 <= start < math.inf and 0 <= last < math.inf):
      raise ValueError(f'start_factor and end_factor must be at least 0, got {start} and {last}.')
    if last and name == 'constant':
      raise ValueError(f'end_factor={last} is for a decay; a constant schedule has start_factor.')
    start, warmup = start or end, 0 if schedules else warmup_steps
    if not (start or last):
      raise ValueError(
        f'stages[{len(schedules)}] begins where the stage before ended, at a learning rate of 0, '
        'and would train nothing; set its start_factor, or end_factor of the stage before.'
      )
    schedules.append(make_schedule(name, steps, warmup, decay_ratio, start=start, end=last))
    bounds.append(steps + (bounds[-1] if bounds else 0))
    end = start if name == 'constant' else last
  return optax.schedules.join_schedules(schedules, bounds[:-1])


def make_schedule(
  name: str, total_steps: int, warmup_steps: int, decay_ratio: float = 0.1, *, start: float = 1.0,
  end: float = 0.0,
) -> Callable:  # fmt: skip
  """Returns step -> fraction of the peak learning rate: warm-up from 0 to `start`, then a decay.

  'google': linear decay with step counted from the start, 1 - step / total_steps, so the rate jumps
  down by warmup_steps / total_steps when the warm-up ends (optimization.py). 'linear', 'cosine',
  'one_minus_sqrt': the decay starts when the warm-up ends (optax's join_schedules, Hugging Face).
  'constant': no decay. 'wsd', 'wsd_linear', 'wsd_cosine': constant, then a decay (1 - sqrt, linear,
  cosine) over the last `decay_ratio` of total_steps.

  Args:
    name: of the schedule.
    total_steps: steps of the schedule, warm-up included.
    warmup_steps: steps of the warm-up.
    decay_ratio: fraction of total_steps in the decay of 'wsd'.
    start: fraction of the peak at the end of the warm-up.
    end: fraction of the peak after total_steps.

  Raises:
    ValueError: for an unknown name, or a warm-up longer than the schedule.
  """
  if name not in SCHEDULES:
    raise ValueError(f'schedule must be one of {tuple(SCHEDULES)}, got {name!r}.')
  if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
    raise ValueError(
      f'warmup_steps={warmup_steps} is not in 0..{total_steps}, the steps of the run or of its '
      'first stage; set warmup_steps or num_train_steps.'
    )
  first = 0 if name == 'google' else warmup_steps
  if name.startswith('wsd'):
    if not 0 < decay_ratio <= 1:
      raise ValueError(f'decay_ratio must be above 0 and at most 1, got {decay_ratio}.')
    first = total_steps - max(round(decay_ratio * total_steps), 1)
    if first < warmup_steps:
      raise ValueError(
        f'warmup_steps={warmup_steps} and decay_ratio={decay_ratio} of {total_steps} steps overlap;'
        ' lower one of them.'
      )
  decay, length = _DECAYS[SCHEDULES[name]], max(total_steps - first, 1)

  def after(step):
    return end + (start - end) * decay(jnp.clip(step - first, 0, length) / length)

  ramp = optax.schedules.linear_schedule(0.0, start, max(warmup_steps, 1))

  def rate(step):
    warm = start * (step / warmup_steps) if name == 'google' else ramp(step)
    return jnp.where(step < warmup_steps, warm, after(step))

  return rate if warmup_steps else after
