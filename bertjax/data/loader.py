"""Prepared rows to model batches: order, expansion, targets, padding of a ragged last batch.

A batch is a pure function of its step, so any number of workers, tf.data or a plain thread may
call it. Needs no TensorFlow.
"""

import concurrent.futures
import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Iterator

import numpy as np

from bertjax import io
from bertjax.data.dataset import Arrays, Dataset
from bertjax.data.masking import Masking, mask_tokens, next_token_targets
from bertjax.data.prng import ORDER, hash_u64, permute, training_slots

_log = logging.getLogger(__name__)

OBJECTIVES = ('mlm', 'next_token')
PREDICTIONS = ('masked_lm_positions', 'masked_lm_ids', 'masked_lm_weights')


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches of one split.

  Attributes:
    rows: prepared records with the columns of `instances`.
    batch_size: B, of the global batch.
    seed: of order and masks.
    masking: rates; unused by the next-token objective.
    vocab_size: V, range of random replacements.
    special: {'pad': id, 'cls': id, 'sep': id, 'mask': id}.
    word_flags: `Tokenizer.word_flags`, uint8 [V]; for masks of whole words and spans.
    objective: 'mlm' or 'next_token' (left-to-right).
    local: which rows of the global batch this process makes (`mesh.local_rows`); None = all.
  """

  rows: Dataset | Arrays
  batch_size: int
  seed: int
  masking: Masking
  vocab_size: int
  special: dict[str, int]
  word_flags: np.ndarray | None = None
  objective: str = 'mlm'
  local: np.ndarray | None = None

  def __post_init__(self):
    if self.objective not in OBJECTIVES:
      raise ValueError(f'objective must be one of {OBJECTIVES}, got {self.objective!r}.')
    if 'masked_lm_ids' in self.rows.columns and self.objective != 'mlm':
      raise ValueError(
        f'objective={self.objective!r} needs unmasked records, and {self.rows} has static masks.'
      )
    if not len(self.rows):
      raise ValueError(f'{self.rows} has no records to make batches of.')

  @property
  def evaluation_steps(self) -> int:
    """Batches that hold every row once."""
    return self.steps_for(len(self.rows))

  def steps_for(self, rows: int) -> int:
    """Evaluation batches that hold the first `rows` rows, or all there are; at least one."""
    return -(-min(max(rows, 1), len(self.rows)) // self.batch_size)

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
    for name in ('example_weights', 'masked_lm_weights'):
      batch[name] *= real.reshape(-1, *[1] * (batch[name].ndim - 1))
    return batch

  def shuffled(self, step: int) -> dict[str, np.ndarray]:
    """The step-th batch of all rows once, in another order, with the masks of epoch 1."""
    row = step * self.batch_size + np.arange(self.batch_size)
    row = permute(row[row < len(self.rows)], len(self.rows), hash_u64(self.seed, ORDER, 0))
    return self._make(np.ones_like(row), row)

  def _make(self, epoch, row):
    batch = expand(self.rows[row])
    if 'masked_lm_ids' in batch:  # Google's TFRecords bring their masks
      return batch
    if self.objective == 'next_token':
      return next_token_targets(batch)
    special = self.special
    return mask_tokens(
      batch, epoch, row, self.seed, self.masking, vocab_size=self.vocab_size,
      mask_id=special['mask'], never=(special['pad'], special['cls'], special['sep']),
      word_flags=self.word_flags,
    )  # fmt: skip


def expand(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Columns of `examples` (S sequences a row) to batch arrays.

  Returns:
    'input_ids', 'token_type_ids', 'segment_ids' int32 [B, L], 'example_weights' float32 [B]; packed
    rows (S > 1) also 'position_ids' [B, L] that restart and 'cls_positions' [B, S], and [B, S]
    for labels and weights (0 for absent sequences).
  """
  ids = columns['input_ids'].astype(np.int32)
  position = np.arange(ids.shape[1], dtype=np.int32)
  ends = columns['ends'].astype(np.int32)  # [B, S, 2]
  used = ends[:, :, 1] > 0
  if ends.shape[1] == 1:
    first_end, end = ends[:, 0, :1], ends[:, 0, 1:]
    inside, which, weights = position < end, np.zeros_like(ids), used[:, 0]
  else:
    end = ends[:, :, 1].max(1, keepdims=True)
    inside = position < end
    which = np.where(inside, (used[..., None] & (position >= ends[:, :, 1:])).sum(1), 0)
    first_end, weights = np.take_along_axis(ends[:, :, 0], which, 1), used
  batch = {
    'input_ids': ids,
    'token_type_ids': (inside & (position >= first_end)).astype(np.int32),
    'segment_ids': np.where(inside, which + 1, 0).astype(np.int32),
    'example_weights': weights.astype(np.float32),
  }
  if ends.shape[1] > 1:
    starts = np.where(used, np.pad(ends[:, :-1, 1], ((0, 0), (1, 0))), 0)
    batch['position_ids'] = np.where(inside, position - np.take_along_axis(starts, which, 1), 0)
    batch['cls_positions'] = starts
  if 'next_sentence_labels' in columns:
    labels = columns['next_sentence_labels'].astype(np.int32)
    batch['next_sentence_labels'] = labels if ends.shape[1] > 1 else labels[:, 0]
  if 'masked_lm_ids' in columns:  # static masks
    batch |= {name: columns[name].astype(np.int32) for name in PREDICTIONS[:2]}
    batch['masked_lm_weights'] = columns['masked_lm_weights'].astype(np.float32)
  return batch


def choose_loader(name: str) -> str:
  """'tfdata' where TensorFlow is installed, else 'threads'; the batches are the same."""
  tensorflow = importlib.util.find_spec('tensorflow')
  if name == 'tfdata' and not tensorflow:
    raise ValueError("data.loader='tfdata' needs tensorflow; 'threads' makes the same batches.")
  if name in ('tfdata', 'threads'):
    return name
  if name != 'auto':
    raise ValueError(f"data.loader must be 'auto', 'tfdata' or 'threads', got {name!r}.")
  name = 'tfdata' if tensorflow else 'threads'
  _log.info('data.loader: auto chose %r', name)
  return name


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
    yield from _tfdata(make, start, stop)
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


def _tfdata(make, start: int, stop: int | None) -> Iterator[dict[str, np.ndarray]]:
  """Maps `make` over the steps with tf.data: in parallel, in order, with prefetching.

  `make` runs in NumPy through `tf.numpy_function`, so there is one implementation with and without
  TensorFlow, whose numbers no TensorFlow version can change.
  """
  tf = io.import_tensorflow("data.loader='tfdata'", "use 'threads'")
  example = make(start)  # names and dtypes; the shapes of batches may change from step to step
  names = list(example)

  def arrays(step):
    batch = make(int(step))
    return [batch[name] for name in names]

  def one(step):
    outputs = tf.numpy_function(arrays, [step], [example[name].dtype for name in names])
    return dict(zip(names, outputs, strict=True))

  steps = tf.data.Dataset.range(start, np.iinfo(np.int64).max if stop is None else stop)
  batches = steps.map(one, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  yield from batches.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
