"""Batches of a step: order, targets, packing, padding, and loaders that make them ahead.

A batch is a pure function of its step, so any number of workers, tf.data or a plain thread may make
it, and a run resumes at any step. `Batches` serves pre-training, `TaskBatches` fine-tuning.
"""

import dataclasses
import functools
import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bertjax import io
from bertjax.data import packing, workers
from bertjax.data.dataset import Arrays, Dataset
from bertjax.data.masking import Masking, mask_tokens, next_token_targets
from bertjax.data.mixture import Mixed
from bertjax.data.prng import ORDER, SAMPLE, hash_u64, permute, training_slots

_log = logging.getLogger(__name__)

OBJECTIVES = ('mlm', 'electra', 'distill', 'next_token')
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
    objective: 'mlm' or 'distill', 'electra' (adds 'sample_seeds' [B]), or 'next_token'
      (left-to-right).
    local: which rows of the global batch this process makes (`mesh.local_rows`); None = all.
    first: number of the first training example, in the infinite shuffled stream of the rows;
      0 for a mixture, whose sources each have their own.
  """

  rows: Dataset | Arrays | Mixed
  batch_size: int
  seed: int
  masking: Masking
  vocab_size: int
  special: dict[str, int]
  word_flags: np.ndarray | None = None
  objective: str = 'mlm'
  local: np.ndarray | None = None
  first: int = 0

  def __post_init__(self):
    if self.objective not in OBJECTIVES:
      raise ValueError(f'objective must be one of {OBJECTIVES}, got {self.objective!r}.')
    if 'masked_lm_ids' in self.rows.columns and self.objective == 'next_token':
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
    if isinstance(self.rows, Mixed):
      local = np.arange(self.batch_size) if self.local is None else self.local
      index = self.first + step * self.batch_size + local
      return self._make(*self.rows.training_slots(index, self.seed))
    epoch, row = training_slots(
      step, self.batch_size, len(self.rows), self.seed, self.local, self.first
    )
    return self._make(epoch, row)

  def progress(self, step: int) -> dict[str, float]:
    """{'epoch/NAME': epochs of each source of a mixture before a step}; {} without a mixture."""
    rows = self.rows
    return rows.epochs(self.first + step * self.batch_size) if isinstance(rows, Mixed) else {}

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
    return self.targets(self.rows[row], epoch, row)

  def targets(self, records: dict, epoch: np.ndarray, row: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of records [B]; masks are a function of epochs and numbers of rows, int64 [B]."""
    batch = expand(records)
    if self.objective == 'electra':
      seeds = hash_u64(self.seed, SAMPLE, epoch, row) >> np.uint64(33)
      batch['sample_seeds'] = seeds.astype(np.int32)
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


def model_inputs(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """What a model reads of columns that have one sequence a row, int32 [B, L] each."""
  batch = expand({name: columns[name] for name in ('input_ids', 'ends')})
  return {name: batch[name] for name in ('input_ids', 'token_type_ids', 'segment_ids')}


def make_batch(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Encoded examples of a task, from memory or a dataset, as a batch for `bertjax.Bert`."""
  names = ('labels', 'example_ids')
  return expand(features) | {name: np.asarray(features[name]) for name in names}


@dataclasses.dataclass(frozen=True)
class TaskBatches:
  """Batches of encoded rows.

  Attributes:
    rows: columns of `tasks.task.Encoded`, L long.
    batch_size: B, examples of the global batch.
    label: an `objectives.labels.Label`; an example has `label.rows` rows, one after another.
    seed: of the order.
    buckets: lengths a batch may have besides L: the shortest that holds all its tokens is taken, so
      that at most `len(buckets) + 1` programs are compiled.
    local: which examples of a global batch this process brings; None = all.
    pack: tokens of a packed training row; 0 = a row holds one sequence. The number of rows is one
      of sixteen, so that at most as many programs are compiled.
    replicas: devices that split the rows of a batch.
  """

  rows: dict[str, np.ndarray]
  batch_size: int
  label: Any
  seed: int = 0
  buckets: tuple[int, ...] = ()
  local: np.ndarray | None = None
  pack: int = 0
  replicas: int = 1

  @property
  def group(self) -> int:
    """Rows of an example."""
    return self.label.rows

  @property
  def examples(self) -> int:
    return len(self.rows['input_ids']) // self.group

  @functools.cached_property
  def sizes(self) -> np.ndarray:
    """Tokens of each row of each example [N, group]."""
    return self.rows['ends'][:, -1, 1].astype(np.int32).reshape(-1, self.group)

  @functools.cached_property
  def by_length(self) -> np.ndarray:
    """Examples from the shortest to the longest, so that evaluation wastes little."""
    return np.argsort(self.sizes.max(1), kind='stable')

  @property
  def steps(self) -> int:
    """Batches that hold every example once."""
    return -(-self.examples // self.batch_size)

  def slots(self, step: int) -> np.ndarray:
    """The examples [B] of a training step."""
    return training_slots(step, self.batch_size, self.examples, self.seed)[1]

  @property
  def per_row(self) -> int:
    """Examples of a packed row at most."""
    return max(1, self.pack // (packing.SHORTEST * self.group))

  def plan(self, examples: np.ndarray) -> list[list[int]]:
    """Which of these examples share a packed row."""
    return packing.plan(self.sizes[examples].sum(1), self.pack, self.per_row)

  def bucket(self, examples: np.ndarray) -> int:
    """The length that a batch of these examples is truncated to; its rows where packed."""
    if self.pack:
      unit = -(-self.batch_size // (16 * self.replicas)) * self.replicas
      return -(-len(self.plan(examples)) // unit) * unit
    longest, full = self.sizes[examples].max(), self.rows['input_ids'].shape[1]
    return min((n for n in self.buckets if longest <= n < full), default=full)

  def training(self, step: int) -> dict[str, np.ndarray]:
    """The batch of a training step, this process's rows of it."""
    examples = self.slots(step)
    return self.make(examples, self.bucket(examples))

  def in_order(self, step: int) -> dict[str, np.ndarray]:
    """The step-th batch of `by_length`; examples past the end have weight 0."""
    index = step * self.batch_size + np.arange(self.batch_size)
    examples = self.by_length[np.minimum(index, self.examples - 1)]
    batch = self.make(examples, self.bucket(examples))
    real = index if self.local is None else index[self.local]
    batch['example_weights'] *= np.repeat(real < self.examples, self.group)
    return batch

  def make(self, examples: np.ndarray, bucket: int) -> dict[str, np.ndarray]:
    """This process's rows of a batch of examples [B]: `bucket` tokens long or, where packed, of
    `bucket` rows. The loss of packed rows is that of single ones."""
    if not self.pack:
      return self._read(examples if self.local is None else examples[self.local], bucket)
    plan, group = self.plan(examples), range(self.group)
    rows = [[item * self.group + i for item in row for i in group] for row in plan]
    batch, places = packing.pack(
      self._read(examples, self.pack), rows, count=bucket, length=self.pack,
      max_sequences=self.per_row * self.group,
      per_token=('labels',) if self.label.per_token else (),
    )  # fmt: skip
    self.label.shift(batch['labels'], places)
    if self.local is None:
      return batch
    replica = np.arange(bucket) * self.replicas // bucket
    mine = np.isin(replica, self.local * self.replicas // self.batch_size)
    return {name: array[mine] for name, array in batch.items()}

  def _read(self, examples, length) -> dict[str, np.ndarray]:
    row = (examples[:, None] * self.group + np.arange(self.group)).ravel()
    columns = {name: column[row] for name, column in self.rows.items()}
    for name in ('input_ids', *['labels'] * self.label.per_token):
      columns[name] = columns[name][:, :length]
    return make_batch(columns)


@dataclasses.dataclass(frozen=True)
class TrialBatches:
  """Training batches of K trials side by side, [K, ...], of one length each step."""

  trials: Sequence[TaskBatches]

  def training(self, step: int) -> dict[str, np.ndarray]:
    """Each trial's batch of a step; all share the largest of their buckets."""
    slots = [batches.slots(step) for batches in self.trials]
    bucket = max(b.bucket(s) for b, s in zip(self.trials, slots, strict=True))
    parts = [b.make(s, bucket) for b, s in zip(self.trials, slots, strict=True)]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def task_batches(
  label: Any, columns, batch_size: int, buckets: str = '', seed: int = 0, local=None,
  pack: int = 0, replicas: int = 1,
) -> TaskBatches:  # fmt: skip
  """Batches of encoded rows; `buckets` are lengths as '32,64'."""
  try:
    lengths = tuple(sorted(int(n) for n in buckets.split(',') if n))
  except ValueError:
    raise ValueError(f"data.buckets are written '32,64', got {buckets!r}.") from None
  return TaskBatches(
    columns, batch_size, label, seed, () if label.includes_padding else lengths, local=local,
    pack=pack, replicas=replicas,
  )  # fmt: skip


def gather_logits(batches: TaskBatches, parts: list[np.ndarray]) -> np.ndarray:
  """Logits [K, B, ...] of batches by length, put in the order of rows: [K, N, ...]."""
  count, full = batches.rows['input_ids'].shape
  per_token = parts[0].ndim == 4
  shape = (full, parts[0].shape[-1]) if per_token else parts[0].shape[2:]
  logits = np.full((len(parts[0]), count, *shape), batches.label.fill, np.float32)
  order = (batches.by_length[:, None] * batches.group + np.arange(batches.group)).ravel()
  for number, part in enumerate(parts):
    row = order[number * part.shape[1] :][: part.shape[1]]
    target = logits[:, :, : part.shape[2]] if per_token else logits
    target[:, row] = part[:, : len(row)]
  return logits


def choose_loader(name: str) -> str:
  """'tfdata' where TensorFlow is installed, else 'threads'; the batches are the same."""
  if name not in ('auto', 'tfdata', 'threads'):
    raise ValueError(f"data.loader must be 'auto', 'tfdata' or 'threads', got {name!r}.")
  tensorflow = importlib.util.find_spec('tensorflow')
  if name == 'tfdata' and not tensorflow:
    raise ValueError("data.loader='tfdata' needs tensorflow; 'threads' makes the same batches.")
  if name == 'auto':
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
  steps = itertools.count(start) if stop is None else range(start, stop)
  with workers.threads_in_order(2) as in_order:
    yield from in_order(make, steps)


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
