"""`Task`: what fine-tuning needs to know about a task, and the encoding that all tasks share.

A task reads examples, encodes them, decodes the model's logits, scores and writes predictions:

  examples = task.read('dev')
  encoded = task.encode(examples, tokenizer, 128)       # columns [N, ...]
  logits = ...                                          # of the task's head, [N, ...]
  predictions = task.decode(examples, encoded, logits)  # one for each example
  task.score(examples, predictions)                     # {'accuracy': 0.91, ...}
  task.write(folder, 'dev', examples, predictions)      # files in the official format
"""

import dataclasses
import hashlib
import logging
import operator
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bertjax import io
from bertjax.data import instances
from bertjax.data.tokenizer import Tokenizer
from bertjax.objectives.labels import Label

_log = logging.getLogger(__name__)


class Example(NamedTuple):
  """An example as it was read.

  Attributes:
    id: identifier in the official files, or the index of the example.
    texts: a text or a pair of texts; question and context for `Span`; words for `Tags`; the pairs
      of all endings, concatenated, for `Choice`.
    label: as described by its class in `objectives.labels`; None if the split has no labels.
    document: index of the document that contains the sentence.
  """

  id: str
  texts: tuple[str, ...]
  label: Any = None
  document: int = 0


class Encoded(NamedTuple):
  """N encoded sequences.

  Attributes:
    columns: 'input_ids' [N, L] and 'ends' [N, 1, 2] as in `data.instances`; 'example_ids' int32
      [N], indices into the list of examples; 'labels' [N, ...] as in `objectives.labels`.
    counts: how many examples were truncated, split or dropped.
    alignment: what `decode` needs to map tokens back to the text.
  """

  columns: dict[str, np.ndarray]
  counts: dict[str, int]
  alignment: Any = None


@dataclasses.dataclass(frozen=True)
class Task:
  """A task with its data. Its metrics are fractions in [-1, 1], the higher the better.

  Attributes:
    name: as in `TASKS`.
    label: kind of its labels, with their loss.
    read: split -> examples.
    encode: (examples, tokenizer, L) -> `Encoded`.
    decode: (examples, encoded, logits [N, ...], threshold=0.0) -> predictions, one for each
      example. Several labels are predicted where their logits are above the threshold; a question
      has no answer where its null odds are (`best_f1_threshold` in its scores).
    score: (examples, predictions) -> {metric: value}.
    write: (folder, split, examples, predictions) -> the paths of the files written.
    splits: names that `read` accepts.
    trainable: examples -> those that can be trained on; the others are logged.
    judged_by: this task -> that by which its models are evaluated, if it is another one: pairs to
      train on, and queries with documents.
    key: example -> texts that are in one split only where a fraction is held out.
  """

  name: str
  label: Label
  read: Callable[[str], list[Example]]
  encode: Callable[[Sequence[Example], Tokenizer, int], Encoded]
  decode: Callable[..., Sequence]
  score: Callable[[Sequence[Example], Sequence], dict[str, float]]
  write: Callable[..., list[pathlib.Path]]
  splits: tuple[str, ...]
  trainable: Callable[[list[Example]], list[Example]] = list
  judged_by: Callable[['Task'], 'Task'] | None = None
  key: Callable[[Example], Sequence[str]] = operator.attrgetter('texts')

  @property
  def judge(self) -> 'Task':
    """The task by which models of this one are evaluated."""
    return self.judged_by(self) if self.judged_by else self

  @property
  def metric(self) -> str:
    """The main metric, by which models are chosen."""
    return self.label.metrics[0]

  @property
  def labels(self) -> tuple[str, ...]:
    """Names of the classes, by number."""
    return self.label.names

  @property
  def head(self) -> str:
    """The head of `bertjax.Bert` that predicts it."""
    return self.label.head

  @property
  def heads(self) -> tuple[str, ...]:
    """The heads of `bertjax.Bert`: that of the task, or none."""
    return (self.head,) if self.head else ()

  @property
  def num_labels(self) -> int:
    """C, logits of the head."""
    return self.label.num_outputs

  @property
  def choices(self) -> int:
    """Rows of an example."""
    return self.label.rows


def hold_out(task: Task, fraction: float) -> Task:
  """The task with a 'dev' split held out of 'train', unless it has one.

  A hash of an example's texts (`Task.key`) decides, so equal ones are never in both splits.

  Raises:
    ValueError: from `read`, if a split or a class of the training split would be empty.
  """
  if 'dev' in task.splits or 'train' not in task.splits:
    return task
  if not 0 < fraction < 1:
    raise ValueError(f'dev_fraction must be above 0 and below 1, got {fraction}.')

  def read(split):
    if split not in ('train', 'dev'):
      return task.read(split)
    items, parts = task.read('train'), {'train': [], 'dev': []}
    for item in items:
      text = '\0'.join(task.key(item)).encode('utf-8', 'replace')
      number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'big')
      parts['dev' if number < fraction * 2**64 else 'train'].append(item)
    hint = 'name --config.data.dev_file=FILE, or change --config.data.dev_fraction'
    if not all(parts.values()):
      raise ValueError(
        f'data.dev_fraction={fraction:g} of {len(items)} examples leaves a split empty; {hint}.'
      )
    lost = set(task.label.classes(items)) - set(task.label.classes(parts['train']))
    if lost:
      name = task.label.names[min(lost)]
      raise ValueError(f'all examples of the class {name!r} are held out; {hint}.')
    if split == 'dev':
      _log.info(
        'no dev file: %s of %s training examples (%.1f%%) are held out, by a hash of their texts',
        f'{len(parts["dev"]):,}', f'{len(items):,}', 100 * len(parts['dev']) / len(items),
      )  # fmt: skip
    return parts[split]

  return dataclasses.replace(task, read=read, splits=(*task.splits, 'dev'))


def sample(examples: list, most: int, seed: int) -> list:
  """A random subset of at most `most` examples; all, in their order, for 0."""
  if not most or most >= len(examples):
    return examples
  return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:most]]


def training_examples(task: Task, split: str, most: int = 0, seed: int = 0) -> list[Example]:
  """The labelled examples of a split that can be learnt; a `sample` of them."""
  items = task.read(split)
  gold_labels(items)
  return sample(task.trainable(items), most, seed)


def encode_split(task: Task, items, tokenizer, length: int, split: str) -> Encoded:
  """Encodes examples; logs their labels and how many were truncated."""
  _log.info('%s: labels  %s', split, describe_labels(task, items))
  encoded = task.encode(items, tokenizer, length)
  counts = '  '.join(
    f'{name.replace("_", " ")} {count:,}' for name, count in encoded.counts.items()
  )
  _log.info('%s: examples %s  %s', split, f'{len(items):,}', counts)
  return encoded


def describe_labels(task: Task, items) -> str:
  """The labels of examples with their counts, most frequent first; numbers by their range."""
  labels = [item.label for item in items if item.label is not None]
  none = len(items) - len(labels)
  return '  '.join([*task.label.describe(labels), *([f'(none) {none:,}'] if none else [])])


def columns(task: Task, length: int, vocab_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
  """The columns of a task for `data.dataset.Writer`: {name: (dtype, shape of a row)}."""
  return instances.columns('doc_sentences', length, vocab_size) | {
    'labels': (task.label.dtype, task.label.shape(length)),
    'example_ids': ('int32', ()),
  }


def text_room(length: int, special: int) -> int:
  """Number of text tokens in a row of `length` tokens, `special` of which are special tokens."""
  if length < special + 2:
    raise ValueError(
      f'data.length must be at least {special + 2}, of which {special} are special tokens, got '
      f'{length}; BERT uses 128.'
    )
  return length - special


def truncate(row: Sequence[list[int]], length: int, template: instances.Template) -> bool:
  """Drops last tokens of the longer text until a row fits (run_classifier.py); True if any."""
  excess = sum(map(len, row)) - text_room(length, template.count(len(row)))
  for _ in range(excess):
    longest = row[0] if len(row[0]) > len(row[-1]) else row[-1]
    longest.pop()
  return excess > 0


def known_split(split: str, splits: Mapping):
  """The entry of a split; raises ValueError for an unknown one."""
  if split not in splits:
    raise ValueError(f'there is no split {split!r}; there are {tuple(splits)}.')
  return splits[split]


def gold_labels(items: Sequence[Example]) -> list:
  """The reference labels of examples.

  Raises:
    ValueError: if an example has none.
  """
  if not items:
    raise ValueError('there are no examples.')
  missing = next((item.id for item in items if item.label is None), None)
  if missing is not None:
    raise ValueError(
      f'training and scoring need labels, example {missing} has none; choose another split.'
    )
  return [item.label for item in items]


def write_predictions(
  folder, name: str, items: Sequence[Example], predictions: Sequence[str]
) -> list[pathlib.Path]:
  """Writes FOLDER/NAME.tsv in the format of the GLUE leaderboard, index and prediction."""
  lines = [f'{item.id}\t{text}' for item, text in zip(items, predictions, strict=True)]
  path = pathlib.Path(folder) / f'{name}.tsv'
  io.write_text(path, '\n'.join(['index\tprediction', *lines]) + '\n')
  return [path]
