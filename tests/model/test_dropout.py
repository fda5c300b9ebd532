"""Dropout from few random bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertjax.model import dropout as dropout_lib
from bertjax.model.dropout import dropout


def test_dropout_drops_its_share_and_keeps_the_mean():
  x = jnp.ones((40, 65, 128))  # an odd axis: half of the last words is not used
  for impl in ('threefry2x32', 'rbg'):
    y = np.asarray(dropout(x, 0.1, jax.random.key(0, impl=impl)))
    assert (y == 0).mean() == pytest.approx(0.1, abs=0.002), impl
    assert y.mean() == pytest.approx(1, abs=0.003), impl
    rows = (y[:, :32] == 0) == (y[:, 33:] == 0)  # two halves of a word are independent
    assert rows.mean() == pytest.approx(0.9**2 + 0.1**2, abs=0.003), impl
  assert dropout(x, 0.0, None) is x


def test_rbg_draws_other_bits_than_threefry():
  x = jnp.ones((4, 8, 16))
  one, other = (dropout(x, 0.5, jax.random.key(0, impl=impl)) for impl in ('threefry2x32', 'rbg'))
  assert not (one == other).all()


def test_bits_are_those_of_jax_random():
  """Compiled and not, of any rank, and for many keys at once."""
  bits = dropout_lib._bits
  for shape in ((7,), (5, 6), (3, 4, 5), (2, 1, 8, 3)):
    key = jax.random.key(len(shape))
    expected = jax.random.bits(key, shape, jnp.uint32)
    assert (bits(key, shape) == expected).all(), shape
    assert (jax.jit(bits, static_argnums=1)(key, shape) == expected).all(), shape
  keys = jax.random.split(jax.random.key(1), 3)
  expected = jax.vmap(lambda key: jax.random.bits(key, (4, 5), jnp.uint32))(keys)
  assert (jax.vmap(lambda key: bits(key, (4, 5)))(keys) == expected).all()
  with jax.threefry_partitionable(False):
    expected = jax.random.bits(key, shape, jnp.uint32)
    assert (bits(key, shape) == expected).all()
