"""Dropout with half the random bits: one 32-bit word decides over two elements.

Sixteen bits give a rate to 1 / 65536; kept elements are scaled by the exact keep probability, so
the mean stays. The key carries its generator (`jax.random.key(seed, impl=...)`): the bits of
'threefry2x32' do not depend on the mesh, those of 'rbg' do.
"""

import jax
import jax.numpy as jnp


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
  words = jax.random.bits(rng, (*rows, -(-m // 2), n), jnp.uint32)
  halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-2)[..., :m, :]
  return jnp.where(halves >= dropped, x * (65536 / (65536 - dropped)), 0)
