"""Dropout with half the random bits: one 32-bit word decides over two elements.

Sixteen bits give a rate to 1 / 65536; kept elements are scaled by the exact keep probability, so
the mean stays. The key carries its generator (`jax.random.key(seed, impl=...)`): the bits of
'threefry2x32' do not depend on the mesh, those of 'rbg' do.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
  """Zeroes each element of x [..., M, N] with probability `rate`, and scales up the others.

  Args:
    x: what to drop from.
    rate: in [0, 1); 0 returns x and needs no key.
    rng: key of the bits.
  """
  if rate == 0:
    return x
  assert rng is not None, f'dropout of {rate} needs a key'
  dropped = round(rate * 65536)
  *rows, m, n = x.shape
  words = _bits(rng, (*rows, -(-m // 2), n))
  halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-2)[..., :m, :]
  return jnp.where(halves >= dropped, x * (65536 / (65536 - dropped)), 0)


def _bits(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """`jax.random.bits`. On CPUs jax hashes in a loop over arrays, which costs several times as much
  as the same rounds unrolled and fused."""
  plain = functools.partial(jax.random.bits, shape=shape, dtype=jnp.uint32)
  partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
  threefry = partitionable and jax.random.key_impl(rng) == 'threefry2x32'
  if not threefry or not all(isinstance(n, int) for n in shape) or math.prod(shape) >= 2**32:
    return plain(rng)
  return jax.lax.platform_dependent(rng, cpu=functools.partial(_threefry, shape), default=plain)


def _threefry(shape: tuple[int, ...], rng: jax.Array) -> jax.Array:
  """Threefry-2x32 (Salmon et al. 2011) of each element's index."""
  a, b = jax.random.key_data(rng)
  keys = (a, b, a ^ b ^ np.uint32(0x1BD11BDA))
  strides = np.cumprod([1, *shape[:0:-1]], dtype=np.uint32)[::-1]
  first, *others = [
    jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    for axis, stride in enumerate(strides)
  ]
  x, y = jnp.broadcast_to(a, shape), sum(others, first) + b
  for i in range(5):
    for left in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
      x = x + y
      y = x ^ ((y << np.uint32(left)) | (y >> np.uint32(32 - left)))
    x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + np.uint32(i + 1)
  return x ^ y
