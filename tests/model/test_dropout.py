"""Dropout from few random bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
