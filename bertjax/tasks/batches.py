"""Batches of a task's encoded rows: contract 5's order, cut to one of a few lengths or packed."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from bertjax.data import packing
from bertjax.data.prng import training_slots
from bertjax.objectives.labels import Label
from bertjax.tasks.task import make_batch


@dataclasses.dataclass(frozen=True)
class TaskBatches:
  """Batches of encoded rows.

  Attributes:
    rows: columns of `Encoded`, L long.
    batch_size: B, examples of the global batch.
    label: what the labels are; an example has `label.rows` rows, one after another.
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
  label: Label
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
  def lengths(self) -> np.ndarray:
    """Tokens of the longest row of each example."""
    return self.sizes.max(1)

  @functools.cached_property
  def by_length(self) -> np.ndarray:
    """Examples from the shortest to the longest, so that evaluation wastes little."""
    return np.argsort(self.lengths, kind='stable')

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
    """The length that a batch of these examples is cut to; its number of rows where packed."""
    if self.pack:
      unit = -(-self.batch_size // (16 * self.replicas)) * self.replicas
      return -(-len(self.plan(examples)) // unit) * unit
    longest, full = self.lengths[examples].max(), self.rows['input_ids'].shape[1]
    return min((n for n in self.buckets if longest <= n < full), default=full)

  def training(self, step: int) -> dict[str, np.ndarray]:
    """The batch of a training step, this process's rows of it."""
    examples = self.slots(step)
    return self.make_training(examples, self.bucket(examples))

  def make_training(self, examples: np.ndarray, bucket: int) -> dict[str, np.ndarray]:
    """The examples [B] as a training batch of the size that `bucket` gives."""
    return self.packed(examples, bucket) if self.pack else self.make(examples, bucket)

  def in_order(self, step: int) -> dict[str, np.ndarray]:
    """The step-th batch of `by_length`; examples past the end have weight 0."""
    index = step * self.batch_size + np.arange(self.batch_size)
    examples = self.by_length[np.minimum(index, self.examples - 1)]
    batch = self.make(examples, self.bucket(examples))
    real = index if self.local is None else index[self.local]
    batch['example_weights'] *= np.repeat(real < self.examples, self.group)
    return batch

  def make(self, examples: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """The rows of examples [B] cut to a length."""
    return self._read(examples if self.local is None else examples[self.local], length)

  def packed(self, examples: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Examples [B] in `count` rows, this process's of them. The loss is that of single rows."""
    rows = [
      [item * self.group + i for item in row for i in range(self.group)]
      for row in self.plan(examples)
    ]
    batch, places = packing.pack(
      self._read(examples, self.pack), rows, count=count, length=self.pack,
      slots=self.per_row * self.group, per_token=('labels',) if self.label.per_token else (),
    )  # fmt: skip
    self.label.shift(batch['labels'], places)
    if self.local is None:
      return batch
    replica = np.arange(count) * self.replicas // count
    mine = np.isin(replica, self.local * self.replicas // self.batch_size)
    return {name: array[mine] for name, array in batch.items()}

  def _read(self, examples, length) -> dict[str, np.ndarray]:
    row = (examples[:, None] * self.group + np.arange(self.group)).ravel()
    columns = {name: column[row] for name, column in self.rows.items()}
    columns['input_ids'] = columns['input_ids'][:, :length]
    if self.label.per_token:
      columns['labels'] = columns['labels'][:, :length]
    return make_batch(columns)


@dataclasses.dataclass(frozen=True)
class TrialBatches:
  """Training batches of K trials side by side, [K, ...], of one length each step."""

  trials: Sequence[TaskBatches]

  def training(self, step: int) -> dict[str, np.ndarray]:
    """Each trial's batch of a step; all share the largest of their buckets."""
    slots = [batches.slots(step) for batches in self.trials]
    bucket = max(b.bucket(s) for b, s in zip(self.trials, slots, strict=True))
    parts = [b.make_training(s, bucket) for b, s in zip(self.trials, slots, strict=True)]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def make_batches(
  label: Label, columns, batch_size: int, buckets: str = '', seed: int = 0, local=None,
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


def gather(batches: TaskBatches, parts: list[np.ndarray]) -> np.ndarray:
  """Logits [K, B, ...] of batches by length, put in the order of rows: [K, N, ...]."""
  count, full = batches.rows['input_ids'].shape
  per_token = parts[0].ndim == 4
  shape = (full, parts[0].shape[-1]) if per_token else parts[0].shape[2:]
  logits = np.full((len(parts[0]), count, *shape), batches.label.fill, np.float32)
  order = (batches.by_length[:, None] * batches.group + np.arange(batches.group)).ravel()
  for number, part in enumerate(parts):
    row = order[number * part.shape[1] :][: part.shape[1]]
    if per_token:
      logits[:, row, : part.shape[2]] = part[:, : len(row)]
    else:
      logits[:, row] = part[:, : len(row)]
  return logits
