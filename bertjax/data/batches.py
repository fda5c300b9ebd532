"""Prepared rows to model batches: order, expansion, targets, padding of a ragged last batch.

`batch_at` is a pure function of the step, so any number of workers, tf.data or a plain thread may
call it. Needs no TensorFlow.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from bertjax.data.masking import Masking, mask_tokens, next_token_targets
from bertjax.data.order import training_slots
from bertjax.data.store import Rows

OBJECTIVES = ('mlm', 'next_token')


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches of one split.

  Attributes:
    rows: prepared rows with the columns of `examples`.
    batch_size: B, of the global batch.
    seed: of order and masks.
    masking: rates; unused by the next-token objective.
    vocab_size: V, range of random replacements.
    special: {'pad': id, 'cls': id, 'sep': id, 'mask': id}.
    objective: 'mlm' or 'next_token' (left-to-right).
    local: which rows of the global batch this process makes (`mesh.local_rows`); None = all.
  """

  rows: Rows
  batch_size: int
  seed: int
  masking: Masking
  vocab_size: int
  special: dict[str, int]
  objective: str = 'mlm'
  local: np.ndarray | None = None

  def __post_init__(self):
    if self.objective not in OBJECTIVES:
      raise ValueError(f'objective must be one of {OBJECTIVES}, got {self.objective!r}.')
    if not len(self.rows):
      raise ValueError(f'{self.rows.directory} has no rows to make batches of.')

  @property
  def evaluation_steps(self) -> int:
    """Batches that hold every row once."""
    return -(-len(self.rows) // self.batch_size)

  def training(self, step: int) -> dict[str, np.ndarray]:
    """The batch of a training step, this process's rows of it."""
    epoch, row = training_slots(step, self.batch_size, len(self.rows), self.seed, self.local)
    return self._make(epoch, row)

  def evaluation(self, step: int) -> dict[str, np.ndarray]:
    """The step-th batch in row order with frozen masks; rows past the end have weight 0."""
    local = np.arange(self.batch_size) if self.local is None else self.local
    row = step * self.batch_size + local
    real = row < len(self.rows)
    batch = self._make(np.zeros_like(row), np.where(real, row, 0))
    batch['example_weights'] = real.astype(np.float32)
    batch['masked_lm_weights'] *= batch['example_weights'][:, None]
    return batch

  def _make(self, epoch, row):
    batch = expand(self.rows[row])
    batch['example_weights'] = np.ones(len(row), np.float32)
    if self.objective == 'next_token':
      return next_token_targets(batch)
    special = self.special
    return mask_tokens(
      batch, epoch, row, self.seed, self.masking, vocab_size=self.vocab_size,
      mask_id=special['mask'], never=(special['pad'], special['cls'], special['sep']),
    )  # fmt: skip


def expand(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Columns of `examples` to batch arrays: ids, token types and segments, int32 [B, L] each."""
  ids = columns['input_ids'].astype(np.int32)
  position = np.arange(ids.shape[1])
  first_end, end = columns['ends'][:, 0, None], columns['ends'][:, 1, None]
  batch = {
    'input_ids': ids,
    'token_type_ids': ((position >= first_end) & (position < end)).astype(np.int32),
    'segment_ids': (position < end).astype(np.int32),
  }
  if 'next_sentence_labels' in columns:
    batch['next_sentence_labels'] = columns['next_sentence_labels'].astype(np.int32)
  return batch


def iterate(
  make: Callable[[int], dict], start: int, stop: int | None = None, *, loader: str = 'threads'
) -> Iterator[dict]:
  """Yields make(start), make(start + 1), ...; made ahead in the background, always in order.

  Args:
    make: `Batches.training` or `Batches.evaluation`.
    start: first step.
    stop: one past the last step; None = endless.
    loader: 'tfdata' (needs TensorFlow) or 'threads'; the batches are the same.
  """
  if loader == 'tfdata':
    from bertjax.data.pipeline import tfdata_batches

    yield from tfdata_batches(make, start, stop)
    return
  if loader != 'threads':
    raise ValueError(f"loader must be 'tfdata' or 'threads', got {loader!r}.")
  ahead, queue, step = 4, [], start
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    try:
      while stop is None or step < stop or queue:
        while len(queue) < ahead and (stop is None or step < stop):
          queue.append(pool.submit(make, step))
          step += 1
        yield queue.pop(0).result()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
