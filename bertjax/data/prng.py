"""Deterministic randomness: one 64-bit mixer, and the order of training examples.

Everything random about the data is a function of (seed, epoch, example id), never of how many
hosts, workers or batches there are. Examples form one endless sequence, whose item t is row
`permutation(epoch)[t % n]` of epoch `1 + t // n`, and the batch of step s has the items
s*B .. (s+1)*B-1. A batch may straddle epochs, nothing is dropped, and the state of the input is one
integer, the step.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6

# Separate streams of random numbers.
ORDER, MASK, ACTION, REPLACEMENT, EXAMPLES, SPAN, SHARD, MIXTURE, SAMPLE = range(1, 10)


def hash_u64(*keys) -> np.ndarray:
  """Hashes integers (arrays broadcast) into well-mixed uint64.

  Each key is added in after a multiple of 2**64 / golden ratio and passed through the finaliser of
  SplitMix64 (Steele, Lea and Flood 2014). Stable: prepared data and recipes depend on it.
  """
  state = np.uint64(0)
  with np.errstate(over='ignore'):
    for key in keys:
      x = state + np.asarray(key).astype(np.uint64) + _GOLDEN
      x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      state = x ^ (x >> np.uint64(31))
  return state


def permute(index: np.ndarray, size: int, key) -> np.ndarray:
  """Where a keyed pseudo-random permutation of range(size) sends each index.

  A Feistel network on the smallest even number of bits that holds `size`; values that leave the
  range are sent through again until they return (cycle walking). Needs no memory.

  Args:
    index: integers in [0, size), any shape.
    size: length of the permutation.
    key: integers, broadcast against index; one permutation per key.

  Returns:
    int64, of index's shape.
  """
  half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
  low = (np.uint64(1) << half) - np.uint64(1)
  value, key = np.broadcast_arrays(np.asarray(index).astype(np.uint64), key)
  value = value.copy()
  todo = np.ones(value.shape, bool)
  while todo.any():
    x, k = value[todo], key[todo]
    left, right = x >> half, x & low
    for i in range(_ROUNDS):
      left, right = right, left ^ (hash_u64(k, i, right) & low)
    value[todo] = (left << half) | right
    todo = value >= np.uint64(size)
  return value.astype(np.int64)


def training_slots(
  step: int, batch_size: int, num_rows: int, seed: int, rows=None, first: int = 0
):  # fmt: skip
  """Epochs and row numbers of the batch of a step.

  Args:
    step: 0-based training step.
    batch_size: B, of the global batch.
    num_rows: rows of the data set.
    seed: the run's seed.
    rows: which of the batch's B rows are wanted (this process's); default all.
    first: examples before step 0.

  Returns:
    (epoch, row), int64 arrays of one entry per wanted row; epochs start at 1.
  """
  rows = np.arange(batch_size) if rows is None else rows
  slot = first + np.int64(step) * batch_size + np.asarray(rows, np.int64)
  epoch = 1 + slot // num_rows
  return epoch, permute(slot % num_rows, num_rows, hash_u64(seed, ORDER, epoch))


def choose_heldout(contents: Iterable, fraction: float) -> tuple[np.ndarray, list[bool]]:
  """Chooses which of N contents are held out, by a hash of each content.

  Args:
    contents: N of bytes or an array.
    fraction: how many of them to hold out, about.

  Returns:
    A key per content, uint64 [N], and whether it is held out.
  """
  digests = (hashlib.blake2b(content, digest_size=8).digest() for content in contents)
  keys = np.array([int.from_bytes(digest, 'little') for digest in digests], np.uint64)
  return keys, [key < fraction * 2**64 for key in hash_u64(keys).tolist()]
