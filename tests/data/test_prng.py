"""The order of rows: a permutation for each epoch, the same for any number of processes."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bertjax.data.prng import ORDER, hash_u64, permute, training_slots


def slots(steps, batch_size, num_rows, seed=0):
  """Epochs and rows of many steps, joined."""
  parts = [training_slots(step, batch_size, num_rows, seed) for step in range(steps)]
  return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


@pytest.mark.parametrize('size', [1, 2, 3, *(2**k + d for k in (2, 3, 9, 14) for d in (-1, 0, 1))])
def test_permute_is_a_bijection_at_sizes_around_powers_of_two(size):
  for key in range(5):
    np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=100)
def test_permute_is_a_bijection_at_any_size_and_key(size, key):
  places = permute(np.arange(size), size, np.uint64(key))
  np.testing.assert_array_equal(np.sort(places), np.arange(size))


@given(st.integers(2**31, 2**62), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=50)
def test_permute_stays_in_range_and_apart_at_huge_sizes(size, key):
  index = np.concatenate([np.arange(50), size - 1 - np.arange(50)])
  places = permute(index, size, np.uint64(key))
  assert (places >= 0).all() and (places < size).all() and len(set(places.tolist())) == 100


@pytest.mark.parametrize('seed', range(3))
def test_the_order_looks_random(seed):
  size = 10_000
  places = permute(np.arange(size), size, hash_u64(seed, ORDER, 1))
  bound = 5 / np.sqrt(size)  # 5 standard deviations of a rank correlation
  assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < bound
  assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < bound
  first_half = (places[: size // 2] < size // 2).sum()  # hypergeometric, deviation 25
  assert abs(first_half - size // 4) < 125


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**32))
@example(7, 20, 0)  # a batch of several epochs
@settings(deadline=None, max_examples=40)
def test_every_epoch_has_every_example_once_and_drops_none(num_rows, batch_size, seed):
  epochs, rows = slots(-(-3 * num_rows // batch_size), batch_size, num_rows, seed)
  np.testing.assert_array_equal(epochs, 1 + np.arange(len(rows)) // num_rows)
  for epoch in range(1, 4):
    np.testing.assert_array_equal(np.sort(rows[epochs == epoch]), np.arange(num_rows))


def test_a_batch_straddles_epochs():
  assert training_slots(2, 4, 10, 0)[0].tolist() == [1, 1, 2, 2]


def test_the_order_of_examples_does_not_depend_on_the_batch_size():
  for small, large in zip(slots(12, 4, 37), slots(3, 16, 37), strict=True):
    np.testing.assert_array_equal(small, large)


@pytest.mark.parametrize('processes', [1, 2, 8])
@pytest.mark.parametrize('step', [0, 5, 10**12])
def test_the_rows_of_all_processes_make_the_global_batch(processes, step):
  whole = training_slots(step, 16, 100, 3)
  for local in np.arange(16).reshape(processes, -1), np.arange(16).reshape(-1, processes).T:
    for rows in local:
      for part, found in zip(whole, training_slots(step, 16, 100, 3, rows), strict=True):
        np.testing.assert_array_equal(found, part[rows])


def test_epochs_and_seeds_have_different_orders():
  first, second, third = slots(30, 10, 100)[1].reshape(3, 100)
  for other in (second, third, slots(10, 10, 100, seed=1)[1]):
    assert (first == other).sum() < 10  # one is expected


def test_mix_flips_half_of_the_bits_for_every_bit_of_a_key():
  keys = np.arange(2000, dtype=np.uint64)
  for bit in range(64):
    flipped = hash_u64(5, keys) ^ hash_u64(5, keys ^ (np.uint64(1) << np.uint64(bit)))
    share = np.bitwise_count(flipped).mean() / 64
    assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(2000 * 64), bit


def test_the_numbers_are_those_of_version_0_1():
  # Golden: a resumed run has the same order. hash_u64(0) is SplitMix64's first for seed 0.
  assert int(hash_u64(0)) == 0xE220A8397B1DCDAF
  assert int(hash_u64(1, 2, 3)) == 7702586659592502839
  assert int(hash_u64(7, 2, 1, 2**40)) == 54306114427282507
  assert permute(np.arange(10), 10, hash_u64(0, ORDER, 1)).tolist() == [
    7,
    1,
    8,
    9,
    6,
    0,
    4,
    5,
    3,
    2,
  ]
  assert permute(np.arange(5), 1000, 3).tolist() == [739, 412, 972, 988, 338]
  assert training_slots(0, 4, 10, 0)[1].tolist() == [7, 1, 8, 9]
