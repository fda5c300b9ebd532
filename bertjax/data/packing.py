"""Sequence packing: several sequences in one row, with no attention between them.

Batches of short texts are mostly padding. Packed rows hold up to S sequences one after another,
separated by `segment_ids`, each with its own positions and [CLS] (Krell et al. 2021): the model
gives every sequence the output of an unpacked row.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

SHORTEST = 8  # tokens per sequence on average at least; bounds the sequences of a row
_OPEN_ROWS = 64  # rows that `first_fit` keeps open; more would hardly fill better


class Places(NamedTuple):
  """Where sequences went, [N] each: sequence, row, index in the row, first token."""

  item: np.ndarray
  row: np.ndarray
  slot: np.ndarray
  start: np.ndarray


def first_fit(
  items: Iterable, length: int, max_items: int, size: Callable[[Any], int]
) -> Iterator[list]:
  """Puts up to `max_items` items into a row of `length` tokens, each into the oldest row with room.

  Args:
    items: anything.
    length: tokens of a row.
    max_items: of a row.
    size: tokens of an item (`instances.Template.size`), at most `length`.
  """
  rows: list[tuple[int, list]] = []  # (tokens left, items), oldest first
  for item in items:
    tokens = size(item)
    place = next((i for i, (left, _) in enumerate(rows) if left >= tokens), None)
    left, row = (length, []) if place is None else rows.pop(place)
    row.append(item)
    if len(row) == max_items or left - tokens < 5:  # [CLS] a [SEP] b [SEP] is the least
      yield row
    else:
      rows.insert(len(rows) if place is None else place, (left - tokens, row))
    if len(rows) > _OPEN_ROWS:
      yield rows.pop(0)[1]
  yield from (row for _, row in rows)


def plan(sizes: np.ndarray, length: int, max_sequences: int) -> list[list[int]]:
  """Which of N sequences share a row, the longest first, so that few rows are needed."""
  order = np.argsort(-np.asarray(sizes), kind='stable').tolist()
  return list(first_fit(order, length, max_sequences, size=lambda item: int(sizes[item])))


def pack(
  batch: dict[str, np.ndarray], rows: list[list[int]], *, count: int, length: int,
  max_sequences: int,
  per_token: tuple[str, ...] = (),
) -> tuple[dict[str, np.ndarray], Places]:  # fmt: skip
  """Packs sequences of a batch that has one in each row.

  Args:
    batch: 'input_ids', 'token_type_ids' and 'segment_ids' [N, L]; others are [N, ...].
    rows: `plan`'s, or some of them.
    count: R, rows of the packed batch; those past the plan's are empty.
    length: P, tokens of a row.
    max_sequences: S, of a row.
    per_token: names of others that are [N, L]; they are -1 where there is no token.

  Returns:
    The batch with tokens [R, P], 'position_ids' and 'cls_positions' [R, S] besides, and everything
    else [R, S, ...], 0 where unused; and where each sequence went.
  """
  order = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
  counts = np.array([len(row) for row in rows])
  row = np.repeat(np.arange(len(rows)), counts)
  slot = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
  size = (batch['segment_ids'] > 0).sum(1)[order]
  before = size.cumsum() - size
  start = before - before[np.repeat(counts.cumsum() - counts, counts)]
  position = np.arange(size.sum()) - np.repeat(before, size)
  source = np.repeat(order, size), position
  target = np.repeat(row, size), np.repeat(start, size) + position
  packed = {}
  for name, array in batch.items():
    if name in ('input_ids', 'token_type_ids', 'segment_ids', *per_token):
      packed[name] = np.full((count, length), -(name in per_token), array.dtype)
      packed[name][target] = array[source]
    else:
      packed[name] = np.zeros((count, max_sequences, *array.shape[1:]), array.dtype)
      packed[name][row, slot] = array[order]
  packed['segment_ids'][target] = np.repeat(slot, size) + 1
  packed['position_ids'] = np.zeros((count, length), np.int32)
  packed['position_ids'][target] = position
  packed['cls_positions'] = np.zeros((count, max_sequences), np.int32)
  packed['cls_positions'][row, slot] = start
  return packed, Places(order, row, slot, start)
