"""What a GPU computes, against the same on the CPU.

  JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_gpu.py

Skipped where JAX has no GPU. Needs neither TensorFlow nor files.
"""

import dataclasses
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bertjax.model import config as config_lib
from bertjax.model.attention import attention
from bertjax.model.dropout import dropout
from bertjax.model.heads import Bert, init_params
from bertjax.objectives import mlm
from bertjax.training import optimizer
from tests.models import steps_of

pytestmark = pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
SIZES = {'vocab_size': 512, 'hidden_size': 128, 'num_layers': 4, 'num_heads': 2, 'mlp_size': 256,
         'max_positions': 512}  # fmt: skip
LENGTH = 512


def packed(rows=4, length=LENGTH, seed=0):
  """A batch of packed rows with padding at their ends, 64 masked positions a row."""
  rng = np.random.default_rng(seed)
  segments, positions = np.zeros((2, rows, length), np.int32)
  for row in range(rows):
    cuts = [0, *np.sort(rng.choice(np.arange(60, length - 60), 2, replace=False)), length - 30]
    for number, (start, end) in enumerate(itertools.pairwise(cuts), 1):
      segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
  places = np.argsort(rng.random((rows, length - 30)), 1)[:, :64]
  return {
    'input_ids': rng.integers(5, 512, (rows, length), np.int32),
    'segment_ids': segments, 'position_ids': positions,
    'masked_lm_positions': np.sort(places, 1).astype(np.int32),
    'masked_lm_ids': rng.integers(5, 512, (rows, 64), np.int32),
    'masked_lm_weights': np.ones((rows, 64), np.float32),
  }  # fmt: skip


def configs(**changes):
  bert = config_lib.EncoderConfig(**SIZES | changes)
  modern = config_lib.modernbert_base(**SIZES | {'local_window': 64} | changes)
  return {'bert': bert, 'modernbert': modern}


def loss_and_gradients(config, device):
  """The loss of a batch and its gradients, computed on a device from the same parameters."""
  model = Bert(config, heads=('mlm',), pooler=False)
  with jax.default_device(jax.devices('cpu')[0]):
    params = jax.device_get(init_params(model, jax.random.key(0)))
  objective = mlm.pretraining(model)

  def total(params, batch):
    return objective.loss(params, batch, None)[0]['mlm'] / 256

  args = jax.device_put((params, packed()), device)
  return jax.device_get(jax.jit(jax.value_and_grad(total))(*args))


def distance(got, want):
  """||a - b|| / ||b|| over all arrays of two trees."""
  flat = [np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)])
          for tree in (got, want)]  # fmt: skip
  return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


@pytest.mark.parametrize('name', ['bert', 'modernbert'])
@pytest.mark.parametrize(
  ('dtype', 'near'), [('float32', 1e-4), ('bfloat16', 5e-2)], ids=['float32', 'bfloat16']
)
def test_loss_and_gradients_are_those_of_the_cpu(name, dtype, near):
  """bfloat16 with cuDNN's attention, against float32 on the CPU."""
  rates = {'hidden_dropout': 0.0, 'attention_dropout': 0.0}
  exact = configs(**rates)[name]
  gpu, cpu = jax.devices('gpu')[0], jax.devices('cpu')[0]
  with jax.default_matmul_precision('float32'):
    want = loss_and_gradients(exact, cpu)
    got = loss_and_gradients(dataclasses.replace(exact, dtype=dtype), gpu)
  assert got[0] == pytest.approx(want[0], rel=near / 10)
  assert distance(got[1], want[1]) < near


def test_dropout_keeps_the_same_elements_as_on_the_cpu():
  x, key = np.ones((4, 33, 128), np.float32), jax.random.key(3)
  results = [jax.jit(functools.partial(dropout, rate=0.1))(jax.device_put(x, device),
                                                           rng=jax.device_put(key, device))
             for device in (jax.devices('gpu')[0], jax.devices('cpu')[0])]  # fmt: skip
  np.testing.assert_array_equal(*map(np.asarray, results))


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('window', [0, 64])
@pytest.mark.parametrize('groups', [4, 2])
def test_cudnn_equals_xla_on_packed_and_padded_rows(causal, window, groups):
  rng = np.random.default_rng(1)
  segments = packed()['segment_ids']
  q, k, v = (jnp.asarray(rng.normal(size=(4, LENGTH, n, 64)), jnp.bfloat16)
             for n in (4, groups, groups))  # fmt: skip

  def gradients(impl):
    def total(q, k, v):  # padding is undefined, and no loss reads it
      out = attention(q, k, v, segments, causal=causal, window=window, impl=impl)[0]
      return jnp.where(segments[..., None, None] > 0, out.astype(jnp.float32) ** 2, 0).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

  want, got = (jax.tree.map(np.float32, gradients(impl)) for impl in ('xla', 'cudnn'))
  assert got[0] == pytest.approx(want[0], rel=1e-2)
  assert [distance(a, b) < 2e-2 for a, b in zip(got[1], want[1], strict=True)] == [True] * 3


@pytest.mark.parametrize('name', ['bert', 'modernbert'])
def test_the_same_steps_have_the_same_bits(name):
  """With the flag that makes sums of a scatter deterministic:
  XLA_FLAGS=--xla_gpu_deterministic_ops=true."""
  if 'deterministic' not in os.environ.get('XLA_FLAGS', ''):
    pytest.skip('needs --xla_gpu_deterministic_ops=true in XLA_FLAGS')
  config = configs(dtype='bfloat16')[name]
  objective = mlm.pretraining(Bert(config, heads=('mlm',), pooler=False))
  transform = optimizer.make_optimizer('adamw', 1e-3)
  runs = [steps_of(objective, transform, [packed(seed=s) for s in range(5)]) for _ in range(2)]
  assert runs[0][0] == runs[1][0]
  jax.tree.map(np.testing.assert_array_equal, runs[0][1], runs[1][1])


def test_accumulated_gradients_are_those_of_one_batch():
  config = configs()['bert']
  config = dataclasses.replace(config, hidden_dropout=0.0, attention_dropout=0.0)
  objective = mlm.pretraining(Bert(config, heads=('mlm',), pooler=False))
  transform = optax.sgd(0.1)
  batches = [packed(seed=s) for s in range(3)]
  with jax.default_matmul_precision('float32'):
    one, four = (steps_of(objective, transform, batches, accumulation=n) for n in (1, 4))
  np.testing.assert_allclose(one[0], four[0], rtol=1e-5)
  assert distance(four[1], one[1]) < 1e-5
