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


@pytest.mark.parametrize('causal', [False, True])
def test_splash_equals_xla_on_packed_and_padded_rows(causal):
  segments = np.ones((2, 256), np.int32)
  segments[0] = [1] * 100 + [2] * 90 + [0] * 66
  mesh = jax.sharding.get_abstract_mesh()

  def gradients(attend):
    def total(q, k, v):  # padding is undefined, and no loss reads it
      return jnp.where(segments[..., None, None] > 0, attend(q, k, v) ** 2, 0).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*heads())

  want = gradients(lambda q, k, v: attention(q, k, v, segments, causal=causal, impl='xla')[0])
  got = gradients(
    lambda q, k, v: attention_lib._splash(q, k, v, segments, causal, mesh, interpret=True)
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
      return attention_lib._splash(q, k, v, ONES[:, :128], False, abstract, interpret=True)

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
    ('gpu', 'bfloat16', 512, {}, 'cudnn', ''),
    ('gpu', 'float32', 512, {}, 'xla', "dtype='bfloat16', got float32"),
    ('gpu', 'bfloat16', 511, {}, 'xla', 'an even length, got 64 and 511'),
    ('cpu', 'bfloat16', 512, {}, 'xla', ''),
  ],
)
def test_auto_chooses_by_backend_length_and_dropout_and_logs_why(
  monkeypatch, caplog, backend, dtype, length, options, chosen, why
):
  attention_lib._log_choice.cache_clear()
  monkeypatch.setattr(attention_lib, '_backend', lambda: backend)
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
  monkeypatch.setattr(attention_lib, '_backend', lambda: 'gpu')
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
