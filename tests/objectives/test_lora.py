"""LoRA: adapters as a function of parameters, what is trained, and many of them in one program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bertjax
from bertjax.interop import mapping
from bertjax.model import encoder
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.model.lora import Adapters, Matrix
from bertjax.objectives import Objective, lora, mlm
from bertjax.training import layout, loop, sweep
from bertjax.training import mesh as mesh_lib

CONFIG = EncoderConfig(
  vocab_size=600, hidden_size=32, num_layers=2, num_heads=4, mlp_size=64, max_positions=64,
  initializer_range=0.2, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
MODEL = Bert(CONFIG, ('mlm',), False)
NAMES = ('encoder/layers/attention/query', 'encoder/layers/attention/out', 'encoder/layers/mlp/out')
ADAPTERS = Adapters({n: mapping.matrices(CONFIG, False)[n][0] for n in NAMES}, rank=4, scale=2.0)


@pytest.fixture(scope='module')
def base():
  return jax.device_get(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0)))


def some_adapters(seed=0):
  """Adapters that change something."""
  keys = iter(jax.random.split(jax.random.key(seed), 9))
  fresh = ADAPTERS.init(jax.random.key(0))
  return jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), fresh)


def test_new_adapters_change_nothing_and_others_add_a_b(base):
  fresh = ADAPTERS.init(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, ADAPTERS.merge(base, fresh), base)
  a = fresh['encoder']['layers']['mlp']['out']['a']
  assert a.shape == (2, 64, 4) and 0.11 < float(jnp.abs(a).max()) <= 64**-0.5
  own = some_adapters()
  merged, layers = ADAPTERS.merge(base, own), own['encoder']['layers']
  old, new = (tree['encoder']['layers'] for tree in (base, merged))
  for layer in range(2):
    a, b = (layers['attention']['query'][name][layer] for name in 'ab')
    change = np.reshape(2.0 * a @ b, (32, 4, 8))
    kernels = [np.asarray(tree['attention']['qkv']['kernel'][layer]) for tree in (old, new)]
    np.testing.assert_allclose(kernels[1][:, 0], kernels[0][:, 0] + change, atol=1e-6)
    np.testing.assert_array_equal(kernels[1][:, 1:], kernels[0][:, 1:])
  np.testing.assert_array_equal(new['mlp']['in']['kernel'], old['mlp']['in']['kernel'])


def test_gradients_are_those_of_the_matrices_by_the_chain_rule(base, batch):
  objective, own = mlm.pretraining(MODEL), some_adapters()
  adapted = lora.adapt(objective, ADAPTERS, (), base)
  total = lambda loss: lambda params: sum(loss(params, batch, None)[0].values())  # noqa: E731
  grads = jax.jit(jax.grad(lambda p: total(adapted.loss)(p | adapted.frozen)))({'lora': own})
  full = jax.jit(jax.grad(total(objective.loss)))(ADAPTERS.merge(base, own))
  pair = own['encoder']['layers']['attention']['out']
  found = grads['lora']['encoder']['layers']['attention']['out']
  matrix = full['encoder']['layers']['attention']['out']['kernel'].reshape(2, 32, 32)
  for name, wanted in (('a', 2 * matrix @ pair['b'].mT), ('b', 2 * pair['a'].mT @ matrix)):
    np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-4)


def run(mesh, lay, base, params, batches):
  """(metrics, parameters) after steps of SGD from `params`, {'lora': adapters}."""
  placed = jax.device_put(base, mesh_lib.tree_shardings(mesh, encoder.PARAM_AXES, base))
  objective = lora.adapt(mlm.pretraining(MODEL), ADAPTERS, (), placed)
  optimizer = bertjax.make_optimizer('sgd', 0.1)
  state, shardings, _ = layout.restore_or_init(objective, optimizer, lay, load=lambda make: params)
  assert state.params.keys() == {'lora'}
  train = lay.train_step(objective, optimizer, shardings)
  for rows in loop.to_device(batches, mesh):
    state, metrics = train(state, rows)
  return jax.device_get((metrics, state.params))


@pytest.mark.parametrize(
  ('sizes', 'accumulation'), [((2, 2, 2), 1), pytest.param((1, 1, 1), 4, marks=pytest.mark.full)]
)
def test_any_mesh_and_microbatches_train_the_same_adapters(sizes, accumulation, base, batch):
  results, params = [], {'lora': jax.device_get(some_adapters())}
  for dims, parts in (((1, 1, 1), 1), (sizes, accumulation)):
    mesh = mesh_lib.make_mesh(*dims, devices=jax.devices()[: np.prod(dims)])
    lay = layout.Layout(mesh, encoder.PARAM_AXES, accumulation=parts)
    results.append(run(mesh, lay, base, params, [batch] * 2))
  (one, last), (other, others) = results
  for name in one:
    np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), last, others)


def test_runs_of_a_sweep_equal_single_runs_and_share_the_base_model(base, batch):
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  each = [{'lora': jax.device_get(some_adapters(seed))} for seed in range(2)]
  single = [
    run(mesh, layout.Layout(mesh, encoder.PARAM_AXES, seed), base, params, [batch])
    for seed, params in enumerate(each)
  ]
  lay = sweep.Sweep(mesh, encoder.PARAM_AXES, runs=((0, 0.1), (1, 0.1)))
  params = jax.tree.map(lambda *x: np.stack(x), *each)
  side_by_side = jax.tree.map(lambda x: np.stack([x, x]), batch)
  metrics, last = run(mesh, lay, base, params, [side_by_side])
  for k, (alone, found) in enumerate(single):
    np.testing.assert_allclose(metrics['loss'][k], alone['loss'], rtol=1e-5)
    taken = sweep.take(last, k)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), taken, found)
  # The program's arguments are K adapters with their moments, and one base model.
  objective = lora.adapt(mlm.pretraining(MODEL), ADAPTERS, (), jax.tree.map(jnp.asarray, base))
  optimizer = bertjax.make_optimizer('adamw', 0.1)
  state = jax.eval_shape(functools.partial(lay.make_state, objective, optimizer))
  count = sum(x.size for x in jax.tree.leaves(each[0]))
  arrays = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim > 1]
  assert sum(x.size for x in arrays) == 2 * 3 * count
  shapes = jax.tree.map(jnp.shape, objective.frozen['base'])
  assert shapes == jax.tree.map(jnp.shape, base)


def test_losses_that_couple_rows_find_the_base_model_in_microbatches():
  matrix = Matrix('encoder', (), (3, 4))
  adapters = Adapters({'encoder': matrix}, rank=2, scale=0.5)

  def encode(params, batch, rng):
    return batch['x'] @ params['encoder']['kernel']

  def couple(outputs, batch):
    return {'all': -jnp.log(jnp.square(outputs.sum(0)).sum())}, {}

  def loss(params, batch, rng):
    return couple(encode(params, batch, rng), batch)

  rng = np.random.default_rng(0)
  base = {'encoder': {'kernel': jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}}
  plain = Objective(lambda rng: base, loss, lambda b: {'all': 1.0}, coupled=(encode, couple))
  objective = lora.adapt(plain, adapters, (), base)
  batch, steps = {'x': rng.normal(size=(8, 3)).astype(np.float32)}, []
  for parts in (1, 4):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    lay = layout.Layout(mesh, encoder.PARAM_AXES, accumulation=parts)
    state, shardings, _ = layout.restore_or_init(objective, optax.sgd(1.0), lay)
    (rows,) = loop.to_device([batch], mesh)
    steps.append(lay.train_step(objective, optax.sgd(1.0), shardings)(state, rows)[0].params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *steps)
  assert float(jnp.abs(steps[0]['lora']['encoder']['b']).max()) > 0


@pytest.mark.parametrize('shared', [False, True])
def test_layers_that_share_their_weights_share_their_adapter(shared):
  config = dataclasses.replace(CONFIG, shared_layers=shared, embedding_size=16 * shared)
  matrix, _ = mapping.matrices(config, False)['encoder/layers/attention/value']
  assert matrix.shape == ((32, 32) if shared else (2, 32, 32))
  assert matrix.part[-1] == 2 and matrix.kernel == 'encoder/layers/attention/qkv'
