"""`Task`: all that fine-tuning must know of a task, and the rows that every task is laid out in.

A task reads examples, encodes them to rows, decodes the model's logits and scores what comes out:

  examples = task.read('dev')
  encoded = task.encode(examples, tokenizer, 128)       # columns [N, ...] for store or batches
  logits = ...                                          # of the task's head, in the order of rows
  predictions = task.decode(examples, encoded, logits)  # one for each example
  task.score(examples, predictions)                     # {'accuracy': 0.91, ...}
  task.write(folder, 'dev', examples, predictions)      # files in the official format
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bertjax import io
from bertjax.data import instances, loader
from bertjax.data.tokenizer import Tokenizer

HEADS = {  # what a kind of label is predicted by
  'class': 'classification', 'regression': 'classification', 'multilabel': 'classification',
  'tags': 'tagging', 'span': 'span', 'choice': 'choice',
}  # fmt: skip


class Example(NamedTuple):
  """One example as it was read.

  Attributes:
    id: its name in the official files; a running number where they have none.
    texts: a text or a pair; 'span': question and context; 'tags': the words; 'choice': for each
      choice the pair of texts, end to end.
    label: None where the split has none. 'class' and 'choice': int; 'regression': float;
      'multilabel': the numbers of the labels; 'tags': a BIO tag for each word; 'span': answers
      (text, first character), none if the question has no answer.
    document: number of the document that the words stand in.
  """

  id: str
  texts: tuple[str, ...]
  label: Any = None
  document: int = 0


class Encoded(NamedTuple):
  """Rows of N sequences.

  Attributes:
    columns: 'input_ids' [N, L] and 'ends' [N, 1, 2] as in `data.instances`; 'example_ids' int32
      [N], positions in the list of examples; 'labels': int32 [N] ('class', 'choice'), float32 [N]
      ('regression') or [N, C] ('multilabel'), int32 [N, L] ('tags', -1 = no loss here), int32
      [N, 2] ('span', first and last token; 0 = [CLS] = no answer). Missing ones are -1 or NaN.
      The rows of the choices of an example follow one another and have the same label.
    counts: what was cut, split or left out.
    alignment: what `decode` needs to find the way back to the text.
  """

  columns: dict[str, np.ndarray]
  counts: dict[str, int]
  alignment: Any = None


@dataclasses.dataclass(frozen=True)
class Task:
  """A task, bound to its data. Its metrics are shares in [-1, 1], the higher the better.

  Attributes:
    name: as in `TASKS`.
    kind: of label: 'class', 'regression', 'multilabel', 'tags', 'span' or 'choice'.
    metric: the main one, by which models are chosen.
    read: split -> examples.
    encode: (examples, tokenizer, L) -> `Encoded`.
    decode: (examples, encoded, logits, threshold=0.0) -> predictions, one for each example, with
      logits [N, C], [N, L, C] ('tags'; or tag numbers [N, L], where a CRF has chosen), [N, L, 2]
      ('span') or [N] ('choice'). A 'multilabel' label is chosen where its logit is above the
      threshold; a 'span' is refused where its null odds are (`best_f1_threshold` in its scores).
    score: (examples, predictions) -> {metric: value}.
    write: (folder, split, examples, predictions) -> the paths of the files written.
    splits: what `read` knows, besides files named by hand.
    labels: their names, by number.
    choices: rows of an example, 'choice' only.
  """

  name: str
  kind: str
  metric: str
  read: Callable[[str], list[Example]]
  encode: Callable[[Sequence[Example], Tokenizer, int], Encoded]
  decode: Callable[..., Sequence]
  score: Callable[[Sequence[Example], Sequence], dict[str, float]]
  write: Callable[..., list[pathlib.Path]]
  splits: tuple[str, ...]
  labels: tuple[str, ...] = ()
  choices: int = 1

  @property
  def head(self) -> str:
    """The head of `bertjax.Bert` that predicts it."""
    return HEADS[self.kind]

  @property
  def num_labels(self) -> int:
    """C of the head."""
    return max(len(self.labels), 1)


def columns(task: Task, length: int, vocab_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
  """The columns of a task's rows for `data.dataset.Writer`: {name: (dtype, shape of a row)}."""
  shapes = {'multilabel': (task.num_labels,), 'tags': (length,), 'span': (2,)}
  dtype = 'float32' if task.kind in ('regression', 'multilabel') else 'int32'
  return instances.columns('doc_sentences', length, vocab_size) | {
    'labels': (dtype, shapes.get(task.kind, ())),
    'example_ids': ('int32', ()),
  }


def make_batch(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Rows of a task, from `encode` or from a store, to a batch for `bertjax.Bert`."""
  return loader.expand(rows) | {name: np.asarray(rows[name]) for name in ('labels', 'example_ids')}


def lay_out(
  rows: Sequence[Sequence[list[int]]], tokenizer: Tokenizer, length: int
) -> dict[str, np.ndarray]:
  """Lays out [CLS] A [SEP] or [CLS] A [SEP] B [SEP]: rows of one or two lists of ids."""
  ends = itertools.accumulate((len(part) for row in rows for part in row), initial=0)
  spans = itertools.pairwise(ends)
  items = [[instances.Example(tuple(next(spans) for _ in r), pair=len(r) == 2)] for r in rows]
  spec = instances.columns('doc_sentences', length, tokenizer.vocab_size)
  flat = itertools.chain.from_iterable(part for row in rows for part in row)
  laid = list(
    instances.to_columns(
      items, np.fromiter(flat, spec['input_ids'][0]), length, cls_id=tokenizer.cls_id,
      sep_id=tokenizer.sep_id, pad_id=tokenizer.pad_id,
    )
  )  # fmt: skip
  empty = {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in spec.items()}
  return {name: np.concatenate([empty[name], *(b[name] for b in laid)]) for name in spec}


def text_room(length: int, special: int) -> int:
  """Tokens of text in a row of `length`, beside its special tokens."""
  if length < special + 2:
    raise ValueError(
      f'data.length must be at least {special + 2}, of which {special} are special tokens, got '
      f'{length}; BERT uses 128.'
    )
  return length - special


def truncate(row: Sequence[list[int]], length: int) -> bool:
  """Drops last tokens of the longer part until a row fits (run_classifier.py); True if any."""
  excess = sum(map(len, row)) - text_room(length, 1 + len(row))
  for _ in range(excess):
    longest = row[0] if len(row[0]) > len(row[-1]) else row[-1]
    longest.pop()
  return excess > 0


def known_split(split: str, splits: Mapping):
  """What a split's name stands for."""
  if split not in splits:
    raise ValueError(f'there is no split {split!r}; there are {tuple(splits)}.')
  return splits[split]


def golds(items: Sequence[Example]) -> list:
  """The labels of examples.

  Raises:
    ValueError: if one has none.
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
  """Writes FOLDER/NAME.tsv in the format of the GLUE leaderboard: index and prediction."""
  lines = [f'{item.id}\t{text}' for item, text in zip(items, predictions, strict=True)]
  path = pathlib.Path(folder) / f'{name}.tsv'
  path.parent.mkdir(parents=True, exist_ok=True)
  io.write_text(path, '\n'.join(['index\tprediction', *lines]) + '\n')
  return [path]
