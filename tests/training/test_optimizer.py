"""Optimizers against Google's rules written out in NumPy; schedules; decay exclusions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bertjax.model.encoder import PARAM_AXES, layer_factors
from bertjax.model.heads import Bert, init_params
from bertjax.training import optimizer
from bertjax.training.mesh import path_name
from bertjax.training.optimizer import decay_mask, make_optimizer, make_schedule
from tests.model.test_encoder import PRE_NORM, TINY


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(
    np.asarray, jax.jit(init_params, static_argnums=0)(Bert(TINY), jax.random.key(0))
  )


def gradients(params, step):
  rng = np.random.default_rng(step)
  return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32) * 0.1, params)


def google_adam(params, steps, rate, decay=0.01, b1=0.9, b2=0.999, eps=1e-6, clip=1.0):
  """AdamWeightDecayOptimizer and clip_by_global_norm as in Google's optimization.py, float64."""
  flat = {path_name(k): np.float64(v) for k, v in jax.tree_util.tree_leaves_with_path(params)}
  m = {k: np.zeros_like(v) for k, v in flat.items()}
  v = {k: np.zeros_like(p) for k, p in flat.items()}
  for step in range(steps):
    grads = {
      path_name(k): np.float64(g)
      for k, g in jax.tree_util.tree_leaves_with_path(gradients(params, step))
    }
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for k, g in grads.items():
      g = g * clip / max(norm, clip)
      m[k] = b1 * m[k] + (1 - b1) * g
      v[k] = b2 * v[k] + (1 - b2) * g**2
      update = m[k] / (np.sqrt(v[k]) + eps)
      if not any(word in k for word in ('layer_norm', 'bias')):
        update = update + decay * flat[k]
      flat[k] = flat[k] - rate * update
  return flat


def ours(params, steps, rate, **options):
  transform = make_optimizer(**options, learning_rate=rate, param_axes=PARAM_AXES)
  state = transform.init(params)
  now = params
  for step in range(steps):
    updates, state = transform.update(gradients(params, step), state, now)
    now = optax.apply_updates(now, updates)
  return {path_name(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(now)}


@pytest.mark.e2e
def test_berts_adam_equals_googles_over_ten_steps(params):
  expected = google_adam(params, 10, rate=1e-3)
  for name, value in ours(params, 10, rate=1e-3, name='bert').items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=2e-6, err_msg=name)


def test_berts_adam_has_no_bias_correction(params):
  grads = gradients(params, 0)
  bert, adamw = (
    make_optimizer(name, weight_decay=0.0, clip_norm=0.0, eps=1e-12) for name in ('bert', 'adamw')
  )
  first, corrected = (
    jax.jit(t.update)(grads, t.init(params), params)[0]['nsp']['kernel'] for t in (bert, adamw)
  )
  # After one step m / sqrt(v) is 0.1 g / sqrt(0.001 g^2) without, and the sign of g with it.
  np.testing.assert_allclose(first, corrected * 0.1 / 0.001**0.5, rtol=1e-3)


def test_only_biases_and_layer_norms_are_not_decayed(params):
  for path, decayed in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
    name = path_name(path)
    assert decayed == (not name.endswith(('bias', 'scale'))), name


def test_lamb_takes_a_norm_for_each_layer_and_projection(params):
  grads = gradients(params, 0)
  options = {'weight_decay': 0.0, 'clip_norm': 0.0}
  lamb = make_optimizer('lamb', 1.0, **options, param_axes=PARAM_AXES)
  adam = make_optimizer('adamw', 1.0, **options)
  scaled, plain = (jax.jit(t.update)(grads, t.init(params), params)[0] for t in (lamb, adam))

  def kernel(tree):
    return np.asarray(tree['encoder']['layers']['attention']['qkv']['kernel'])

  for layer in range(3):
    for part in range(3):
      p, u = kernel(params)[layer, :, part], kernel(plain)[layer, :, part]
      expected = u * np.linalg.norm(p.ravel()) / np.linalg.norm(u.ravel())
      np.testing.assert_allclose(kernel(scaled)[layer, :, part], expected, rtol=1e-4)
  np.testing.assert_array_equal(scaled['nsp']['bias'], plain['nsp']['bias'])


@pytest.mark.e2e
@pytest.mark.parametrize('config', [TINY, PRE_NORM['modernbert']], ids=['bert', 'modernbert'])
def test_muon_orthogonalizes_each_kernel_of_a_layer_and_adam_trains_the_rest(config):
  params = jax.jit(init_params, static_argnums=0)(Bert(config), jax.random.key(0))
  options = {'weight_decay': 0.0, 'clip_norm': 0.0, 'learning_rate': 1.0}
  muon = make_optimizer('muon', **options, param_axes=PARAM_AXES)
  alone = optax.contrib.scale_by_muon()  # of a matrix; its first step has the plain direction
  adam = make_optimizer('adamw', **options)
  state, adam_state, momentum = muon.init(params), adam.init(params), {}
  update, adam_update, alone_update = map(jax.jit, (muon.update, adam.update, alone.update))
  for step in range(2):
    grads = gradients(params, step)
    updates, state = update(grads, state, params)
    plain, adam_state = adam_update(grads, adam_state, params)
    steps = dict(zip(paths(params), jax.tree.leaves(updates), strict=True))
    alone_steps = {}
    for name, grad in zip(paths(params), jax.tree.leaves(grads), strict=True):
      for key, matrix in matrices(name, grad):
        momentum[key] = matrix + 0.95 * momentum.get(key, 0)
        nesterov = matrix + 0.95 * momentum[key]
        alone_steps[key], _ = alone_update(nesterov, alone.init(nesterov))
  assert len(alone_steps) >= 6 * 3
  for name, value in zip(paths(params), jax.tree.leaves(plain), strict=True):
    if not (found := matrices(name, steps[name])):
      np.testing.assert_array_equal(steps[name], value, err_msg=name)
    for key, matrix in found:
      expected = -0.2 * max(matrix.shape) ** 0.5 * alone_steps[key]
      np.testing.assert_allclose(matrix, expected, rtol=1e-3, atol=1e-3, err_msg=str(key))
      singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
      assert 0.3 < np.median(singular) < 1.3


def paths(params):
  return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def matrices(name, value):
  """The matrices [inputs, outputs] of a kernel of stacked or single layers; [] for the rest."""
  value, stacked, found = np.asarray(value), 'layers/' in name, []
  kind = '/'.join(name.split('/')[-3:-1])
  if not name.endswith('kernel') or kind.split('/')[0] not in ('attention', 'mlp'):
    return []
  for layer, kernel in enumerate(value if stacked else value[None]):
    if kind == 'attention/qkv':
      parts = [kernel[:, i].reshape(len(kernel), -1) for i in range(3)]
    elif kind == 'mlp/gated_in':
      parts = [kernel[:, i] for i in range(2)]
    else:
      parts = [kernel.reshape(-1, kernel.shape[-1])]
    found += [((name, layer, i), part) for i, part in enumerate(parts)]
  return found


def test_the_average_follows_the_parameters(params):
  transform = make_optimizer('sgd', 0.1, average=0.9, weight_decay=0.0)
  state, now = transform.init(params), params
  expected = params['nsp']['kernel']
  for step in range(30):
    updates, state = transform.update(gradients(params, step), state, now)
    now = optax.apply_updates(now, updates)
    rate = min(0.9, (1 + step) / (10 + step))
    expected = rate * expected + (1 - rate) * now['nsp']['kernel']
  average = optax.tree.get(state, 'average')
  np.testing.assert_allclose(average['nsp']['kernel'], expected, rtol=1e-5)
  assert jax.tree.structure(average) == jax.tree.structure(params)
  with pytest.raises(ValueError, match=r'optimizer.average must be in \[0, 1\), got 1.0'):
    make_optimizer(average=1.0)


def test_stable_adamw_divides_each_layer_s_step_by_its_surprise():
  """Two layers by hand: the second one's gradient is ten times as large from the third step on."""
  b1, b2, eps, rate, decay = 0.9, 0.98, 1e-6, 0.1, 0.01
  rng = np.random.default_rng(0)
  kernel, grads = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 2, 3, 4))
  grads[2:, 1] *= 10
  grads[1:, 0] *= 0.1
  transform = make_optimizer('stable_adamw', rate, b1=b1, b2=b2, eps=eps, weight_decay=decay,
                             clip_norm=0.0, param_axes=PARAM_AXES)  # fmt: skip
  params = {'layers': {'mlp': {'in': {'kernel': jnp.asarray(kernel, jnp.float32)}}}}
  state, m, v, surprises = transform.init(params), 0.0, 0.0, []
  for t, g in enumerate(grads, start=1):
    tree = jax.tree.map(lambda _, g=g: jnp.asarray(g, jnp.float32), params)
    updates, state = transform.update(tree, state, params)
    params = optax.apply_updates(params, updates)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    mean, square = m / (1 - b1**t), v / (1 - b2**t)
    surprise = np.sqrt((g**2 / np.maximum(square, eps**2)).mean((1, 2), keepdims=True))
    step = mean / (np.sqrt(square) + eps) + decay * kernel
    kernel = kernel - rate / np.maximum(1, surprise) * step
    surprises.append(surprise.ravel())
    np.testing.assert_allclose(
      params['layers']['mlp']['in']['kernel'], kernel, rtol=1e-5, atol=1e-6
    )
  assert surprises[2][1] > 1.5 and surprises[3][0] < 1


def test_sgd_has_momentum():
  params = {'nsp': {'kernel': jnp.ones((2, 2))}}
  transform = make_optimizer('sgd', 1.0, b1=0.5, weight_decay=0.0, clip_norm=0.0)
  state = transform.init(params)
  for expected in (1.0, 1.5, 1.75):
    updates, state = transform.update(params, state, params)
    np.testing.assert_allclose(updates['nsp']['kernel'], -expected)


def test_googles_schedule_starts_at_zero_and_drops_when_the_warm_up_ends():
  rate = make_schedule('google', 1000, 100)
  steps = [0, 50, 99, 100, 500, 1000, 2000]
  expected = [0.0, 0.5, 0.99, 0.9, 0.5, 0.0, 0.0]
  np.testing.assert_allclose([rate(s) for s in steps], expected, atol=1e-6)


def test_the_linear_schedule_decays_from_the_full_peak():
  rate = make_schedule('linear', 1000, 100)
  expected = [0.0, 0.5, 1.0, 0.5, 0.0]
  np.testing.assert_allclose([rate(s) for s in (0, 50, 100, 550, 1000)], expected, atol=1e-6)


def test_the_constant_schedule_stays():
  rate = make_schedule('constant', 1000, 10)
  np.testing.assert_allclose([rate(s) for s in (5, 10, 999)], [0.5, 1.0, 1.0], atol=1e-6)


def test_without_warm_up_every_schedule_starts_at_the_peak():
  for name in optimizer.SCHEDULES:
    assert float(make_schedule(name, 10, 0)(0)) == 1.0


def test_a_schedule_for_each_stage_is_exact_at_every_border():
  segments = [('constant', 40, 0.0, 0.0), ('linear', 20, 0.0, 0.5), ('wsd', 20, 0.0, 0.25),
              ('constant', 10, 0.8, 0.0), ('cosine', 10, 0.0, 0.2),
              ('one_minus_sqrt', 30, 0.0, 0.0)]  # fmt: skip
  rate = optimizer.join_schedules([optimizer.Segment(*s) for s in segments], 10)

  def expected(step):  # in float64, from the definitions
    if step < 10:
      return step / 10
    if step < 40:
      return 1.0
    if step < 60:
      return 1 - 0.5 * (step - 40) / 20
    if step < 80:
      return 0.5 - 0.25 * np.sqrt(max(step - 78, 0) / 2)
    if step < 90:
      return 0.8
    if step < 100:
      return 0.2 + 0.6 * (1 + np.cos(np.pi * (step - 90) / 10)) / 2
    return 0.2 * (1 - np.sqrt(min(step - 100, 30) / 30))

  steps = np.arange(140)
  np.testing.assert_allclose(jax.vmap(rate)(steps), [expected(s) for s in steps], atol=2e-7)


def test_a_stage_that_would_train_at_a_rate_of_zero_is_refused():
  segments = [optimizer.Segment('linear', 900), optimizer.Segment('linear', 100)]
  with pytest.raises(ValueError, match=r'stages\[1\] begins .* at a learning rate of 0'):
    optimizer.join_schedules(segments, 10)
  segments[1] = optimizer.Segment('linear', 100, start=0.5)
  assert float(optimizer.join_schedules(segments, 10)(950)) == pytest.approx(0.25)


def test_a_run_without_schedules_of_stages_has_googles_curve_bit_for_bit():
  ours = jax.jit(jax.vmap(make_schedule('google', 1000, 100)))(np.arange(1100))
  google = jax.jit(jax.vmap(lambda s: jnp.where(s < 100, s / 100, jnp.maximum(1 - s / 1000, 0.0))))
  np.testing.assert_array_equal(ours, google(np.arange(1100)))
  line = optax.schedules.linear_schedule
  linear = optax.schedules.join_schedules([line(0.0, 1.0, 100), line(1.0, 0.0, 900)], [100])
  ours = jax.jit(jax.vmap(make_schedule('linear', 1000, 100)))(np.arange(1100))
  np.testing.assert_array_equal(ours, jax.jit(jax.vmap(linear))(np.arange(1100)))


def test_cosine_equals_optax():
  theirs = optax.schedules.warmup_cosine_decay_schedule(0.0, 1.0, 100, 1000, 0.1)
  ours = make_schedule('cosine', 1000, 100, end=0.1)
  steps = np.arange(1100)
  np.testing.assert_allclose(jax.vmap(ours)(steps), jax.vmap(theirs)(steps), atol=1e-6)


@pytest.mark.parametrize(
  ('name', 'shape'), [('wsd', '1-sqrt'), ('wsd_linear', 'linear'), ('wsd_cosine', 'cosine')]
)
def test_wsd_equals_transformers(name, shape):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
  scheduler = transformers.get_wsd_schedule(
    theirs, num_warmup_steps=10, num_decay_steps=20, num_training_steps=100, decay_type=shape
  )
  expected = []
  for _ in range(101):
    expected.append(theirs.param_groups[0]['lr'])
    theirs.step()
    scheduler.step()
  ours = make_schedule(name, 100, 10, decay_ratio=0.2)
  np.testing.assert_allclose(jax.vmap(ours)(np.arange(101)), expected, atol=1e-6)


@pytest.mark.parametrize(
  ('call', 'words'),
  [
    (lambda: make_optimizer('adam'), "'adamw', 'stable_adamw', 'lamb'"),
    (lambda: make_optimizer(b1=1.0), 'b1'),
    (lambda: make_optimizer(clip_norm=-1.0), 'clip_norm'),
    (lambda: make_schedule('cosin', 10, 1), "'google'"),
    (lambda: make_schedule('google', 10, 11), 'warmup_steps=11'),
    (lambda: make_schedule('wsd', 10, 5, 0.6), 'warmup_steps=5 and decay_ratio=0.6 .* overlap'),
    (lambda: make_schedule('wsd', 10, 0, 1.5), 'decay_ratio must be above 0'),
  ],
)
def test_wrong_settings_name_the_rule_and_the_value(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def test_a_parameter_that_the_first_layer_lacks_takes_the_factors_of_the_others():
  factors = layer_factors(3, trained=2, decay=0.5)
  layers = {'norm': np.ones((2, 4), np.float32), 'kernel': np.ones((3, 4), np.float32)}
  params = {'encoder': {'layers': layers, 'final_layer_norm': {'scale': np.ones(4, np.float32)}}}
  transform = optimizer.make_optimizer('sgd', 1.0, b1=0.0, weight_decay=0.0, factors=factors)
  updates = transform.update(params, transform.init(params), params)[0]['encoder']
  np.testing.assert_allclose(updates['layers']['kernel'][:, 0] / updates['layers']['kernel'][2, 0],
                             [0, 0.5, 1])  # fmt: skip
  np.testing.assert_array_equal(updates['layers']['norm'], updates['layers']['kernel'][1:])
  np.testing.assert_array_equal(updates['final_layer_norm']['scale'], updates['layers']['norm'][1])


def test_layers_learn_by_their_factors():
  factors = layer_factors(3, trained=-1, decay=0.5)
  np.testing.assert_allclose(factors('params/encoder/layers/mlp/in/kernel'), [0.125, 0.25, 0.5])
  assert factors('params/encoder/embeddings/word/embedding') == 0.0625
  assert factors('classification/kernel') == 1.0
  assert layer_factors(3) is None
  assert layer_factors(3, head=5.0)('tagging/output/kernel') == 5.0
  params = {
    'encoder': {'layers': {'mlp': {'in': {'bias': np.ones((3, 4), np.float32)}}},
                'embeddings': {'word': {'embedding': np.ones((5, 4), np.float32)}}},
    'classification': {'bias': np.ones(2, np.float32)},
  }  # fmt: skip
  top = layer_factors(3, trained=1)
  transform = optimizer.make_optimizer('bert', weight_decay=0.1, factors=top)
  state = transform.init(params)
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
  assert not any('embeddings' in name for name in names)  # no moments

  def loss(params):
    cut = optimizer.stop_gradients(params, top)
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(cut))

  grads = jax.grad(loss)(params)
  assert not grads['encoder']['embeddings']['word']['embedding'].any()
  layers = grads['encoder']['layers']['mlp']['in']['bias']
  assert not layers[:2].any() and layers[2].all()
  updates, _ = transform.update(grads, state, params)
  steps = updates['encoder']['layers']['mlp']['in']['bias']
  assert not np.any(steps[:2]) and np.all(steps[2] != 0)
  assert not np.any(updates['encoder']['embeddings']['word']['embedding'])
  assert optimizer.make_optimizer('lamb', param_axes=PARAM_AXES)
