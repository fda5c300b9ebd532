"""Attention kernels, dropout, matmuls and cross-entropy against plain implementations."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertjax.model import attention as attention_lib
from bertjax.model.attention import attention, float32_einsum

ONES = jnp.ones((2, 384), jnp.int32)


def heads(length=256, count=2, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(2, length, count, 64)), dtype) for _ in range(3))


def brute_force(q, k, v, segments, causal, window):
  """Attention of each query apart, in NumPy."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros_like(q)
  for row, i, head in np.ndindex(q.shape[:3]):
    keys = [
      j for j in range(q.shape[1])
      if segments[row, j] == segments[row, i] > 0 and not (causal and j > i)
      and not (window and abs(i - j) > window // 2)
    ]  # fmt: skip
    if keys:
      group = head * k.shape[2] // q.shape[2]
      scores = k[row, keys, group] @ q[row, i, head] / q.shape[3] ** 0.5
      shares = np.exp(scores - scores.max())
      out[row, i, head] = shares @ v[row, keys, group] / shares.sum()
  return out


@pytest.mark.parametrize('length', [5, 16, 37, 64])  # below the window, and in one to eight blocks
@pytest.mark.parametrize('causal', [False, True])
def test_a_local_window_equals_brute_force_on_packed_and_padded_rows(length, causal):
  q, k, v = (x[..., :8] for x in heads(length, count=4))
  k, v = k[:, :, :2], v[:, :, :2]  # grouped heads
  segments = np.ones((2, length), np.int32)
  segments[0, length // 3 :] = 2
  segments[0, length - 2 :] = 0
  got, probs = (
    attention(q, k, v, segments, causal=causal, window=16, return_probs=p)[i]
    for i, p in enumerate((False, True))
  )
  want, real = brute_force(q, k, v, segments, causal, 16), segments > 0
  np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=1e-5)
  whole = np.einsum('bhqs,bshk->bqhk', probs, np.repeat(v, 2, axis=2))
  np.testing.assert_allclose(whole[real], want[real], atol=1e-5)


@pytest.mark.e2e
@pytest.mark.parametrize('length', [37, 64])
def test_blocks_of_a_window_have_the_gradient_of_the_complete_matrix(length):
  segments = np.ones((2, length), np.int32)
  segments[0, 20:], segments[1, 30:] = 2, 0

  def gradient(probs):  # the probabilities need the complete matrix
    def total(q, k, v):
      out = attention(q, k, v, segments, window=16, return_probs=probs)[0]
      return jnp.where(segments[..., None, None] > 0, out**2, 0).sum()

    return jax.grad(total, argnums=(0, 1, 2))(*heads(length))

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(0), gradient(1))


def test_long_local_layers_need_no_matrix_of_the_complete_row():
  x = jax.ShapeDtypeStruct((1, 8192, 1, 64), jnp.float32)
  segments = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
  step = jax.grad(lambda q, s: attention(q, q, q, s, window=128)[0].sum())
  memory = jax.jit(step).lower(x, segments).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 8192 * 8192  # four bytes each in a complete matrix


def test_dropout_in_blocks_keeps_the_mean():
  ones = jnp.ones((2, 64, 2, 1))
  context, _ = attention(
    ones, ones, ones, ONES[:, :64], window=32, dropout_rate=0.25, dropout_rng=jax.random.key(0)
  )
  assert abs(context.mean() - 1) < 0.02 and context.std() > 0.05


def test_rotary_scores_depend_on_distances_only():
  q, k, _ = (x[:1, :6, :1, :8] for x in heads(8))
  for theta in (10_000.0, 160_000.0):
    near, far = (
      [attention_lib.rotate(x, attention_lib.rotary_angles(at + jnp.arange(6), 8, theta))
       for x in (q, k)] for at in (0, 300)
    )  # fmt: skip
    a, b = (jnp.einsum('bqhk,bshk->qs', *pair) for pair in (near, far))
    np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(near[0][:, 0], q[:, 0])  # position 0 does not rotate
  assert attention_lib.rotate(q.astype(jnp.bfloat16), (1.0, 0.0)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('causal', 'window'),
  [
    (False, 0),
    (False, 32),
    *(
      pytest.param(*pair, marks=pytest.mark.e2e) for pair in ((True, 0), (False, 128), (True, 128))
    ),
  ],
)
def test_splash_equals_xla_on_packed_and_padded_rows(causal, window):
  segments = np.ones((2, 256), np.int32)
  segments[0] = [1] * 100 + [2] * 90 + [0] * 66
  mesh = jax.sharding.get_abstract_mesh()

  def gradients(attend):
    def total(q, k, v):  # padding is undefined, and no loss reads it
      return jnp.where(segments[..., None, None] > 0, attend(q, k, v) ** 2, 0).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*heads())

  want = gradients(
    lambda q, k, v: attention(q, k, v, segments, causal=causal, window=window, impl='xla')[0]
  )
  got = gradients(
    lambda q, k, v: attention_lib._splash(q, k, v, segments, causal, window, mesh, interpret=True)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, want)


def test_splash_runs_on_the_rows_and_heads_of_each_device(monkeypatch):
  mesh = jax.make_mesh(
    (1, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:4],
  )  # fmt: skip
  q, k, v = heads(128)

  def sharded(q, k, v):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      abstract = jax.sharding.get_abstract_mesh()
      return attention_lib._splash(q, k, v, ONES[:, :128], False, 0, abstract, interpret=True)

  rows = jax.NamedSharding(mesh, jax.P(('data', 'fsdp'), None, 'tensor'))
  got = jax.jit(sharded, in_shardings=(rows,) * 3)(q, k, v)
  assert got.sharding.is_equivalent_to(rows, 4)
  np.testing.assert_allclose(got, attention(q, k, v, ONES[:, :128])[0], atol=1e-5)


@pytest.mark.parametrize(
  ('backend', 'dtype', 'length', 'options', 'chosen', 'why'),
  [
    ('tpu', 'bfloat16', 384, {}, 'splash', ''),
    ('tpu', 'bfloat16', 256, {}, 'xla', ''),
    ('tpu', 'bfloat16', 400, {}, 'xla', 'multiples of 128, got 400'),
    ('tpu', 'bfloat16', 512, {'dropout_rate': 0.1}, 'xla', 'attention_dropout=0.0, got 0.1'),
    ('tpu', 'bfloat16', 512, {'return_probs': True}, 'xla', 'capture'),
    ('tpu', 'bfloat16', 512, {'window': 128}, 'splash', ''),
    ('gpu', 'bfloat16', 512, {}, 'cudnn', ''),
    ('gpu', 'bfloat16', 512, {'window': 128}, 'xla', 'got a window of 128'),
    ('gpu', 'float32', 512, {}, 'xla', "dtype='bfloat16', got float32"),
    ('gpu', 'bfloat16', 511, {}, 'xla', 'an even length, got 64 and 511'),
    ('cpu', 'bfloat16', 512, {}, 'xla', ''),
  ],
)
def test_auto_chooses_by_backend_length_and_dropout_and_logs_why(
  monkeypatch, caplog, backend, dtype, length, options, chosen, why
):
  attention_lib._log_choice.cache_clear()
  monkeypatch.setattr(attention_lib, 'backend_of_step', lambda: backend)
  x = jax.ShapeDtypeStruct((2, length, 2, 64), dtype)
  segments = jax.ShapeDtypeStruct((2, length), jnp.int32)
  options = options | {'dropout_rng': jax.random.key(0)}
  with caplog.at_level(logging.INFO, logger='bertjax.model.attention'):
    # On a CPU cuDNN's call is refused when it is traced, after the choice was logged.
    try:
      jax.eval_shape(lambda q, s: attention(q, q, q, s, **options)[0], x, segments)
    except RuntimeError as error:
      assert chosen == 'cudnn', error
  assert f'chose {chosen!r} on backend {backend!r}' in caplog.text and why in caplog.text


@pytest.mark.parametrize(('capability', 'flash'), [('7.5', False), ('8.0', True), ('12.0', True)])
def test_a_gpu_older_than_compute_capability_8_has_no_flash_attention(
  monkeypatch, caplog, capability, flash
):
  attention_lib._log_choice.cache_clear()
  gpu = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(attention_lib, 'backend_of_step', lambda: 'gpu')
  monkeypatch.setattr(jax, 'local_devices', lambda: [gpu])
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda q, *_, **__: q)
  x = jnp.ones((1, 512, 1, 8), jnp.bfloat16)
  segments = jnp.ones((1, 512), jnp.int32)
  with caplog.at_level(logging.INFO, logger='bertjax.model.attention'):
    attention(x, x, x, segments)
  assert f'chose {"cudnn" if flash else "xla"!r}' in caplog.text
  if flash:
    attention(x, x, x, segments, impl='cudnn')
    return
  words = 'needs a GPU of compute capability 8.0 or more, got 7.5'
  assert words in caplog.text
  with pytest.raises(ValueError, match=words):
    attention(x, x, x, segments, impl='cudnn')


def test_a_product_has_a_float32_result_and_gradients_in_its_own_dtype():
  a, b = (jnp.asarray(x[0, :, 0], jnp.bfloat16) for x in heads(8)[:2])
  text = jax.jit(jax.grad(lambda a: float32_einsum('ld,md->lm', a, b).sum())).lower(a).as_text()
  products = [line for line in text.split('\n') if 'dot_general' in line]
  assert products and not [line for line in products if 'xf32>, tensor' in line.split(':')[-1]]
  assert float32_einsum('ld,md->lm', a, b).dtype == jnp.float32
