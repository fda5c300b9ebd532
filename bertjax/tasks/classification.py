"""Classification and regression of texts and sentence pairs, from tables or from plain text.

GLUE is built on it, and so are your own tables: any that `data.tables` reads.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from bertjax.data import instances, tables
from bertjax.data import text as text_lib
from bertjax.data.prng import EXAMPLES, hash_u64
from bertjax.objectives.labels import Class, FieldLabel, Label, Multilabel, Regression
from bertjax.tasks import metrics
from bertjax.tasks.task import (
  Encoded,
  Example,
  Task,
  gold_labels,
  known_split,
  truncate,
  write_predictions,
)

_log = logging.getLogger(__name__)

_NULLS = ('nan', 'none', 'null', 'nil', 'n/a', 'na', '<na>', '#n/a', '-', '?')
_KINDS = {  # of labels in tables, and how they are scored
  'class': (Class, metrics.of_classes),
  'regression': (Regression, metrics.correlations),
  'multilabel': (Multilabel, metrics.multilabel),
}


class Layout(NamedTuple):
  """File and columns of a split, and how they are read; see `data.tables.read_table`."""

  file: str  # name of the file; with `tfds:`, of the split
  texts: tuple  # one or two columns; numbers in a file without a header
  label: str | int | tuple = ''  # column or columns of the label; '' = the split has no labels
  optional: bool = False  # whether the column of the label may be missing
  named: bool = True  # whether classes of TFDS are given by name, not by number
  on_bad_row: str = 'stop'  # records without text or label: raise, or 'skip' them
  delimiter: str = ''
  encoding: str = 'utf-8'


def make_layouts(
  files: Mapping[str, str], texts: tuple, label: str | int | tuple, unlabelled=('test',), *,
  on_bad_row: str, **reading,
) -> dict[str, Layout]:  # fmt: skip
  """Layouts of files with the same columns; those of `unlabelled` splits may lack the label."""
  if on_bad_row not in ('stop', 'skip'):
    raise ValueError(f"on_bad_row must be 'stop' or 'skip', got {on_bad_row!r}.")
  return {
    split: Layout(file, texts, label, split in unlabelled, on_bad_row=on_bad_row, **reading)
    for split, file in files.items()
  }


def table(
  source: str = '', *, files: Mapping[str, str], text: str, pair: str = '', label: str = 'label',
  kind: str = 'class', labels: Sequence[str] = (), separator: str = '|', delimiter: str = '',
  encoding: str = 'utf-8', on_bad_row: str = 'stop',
) -> Task:  # fmt: skip
  """Your own texts or pairs, `files={'train': 'a.csv', 'dev': 'b.jsonl'}` by column names.

  Args:
    source: folder of the files, or 'tfds:NAME' and the files are its splits.
    files: split -> a table that `data.tables.read_table` reads; 'test' may lack the label, or have
      one that is none of `labels`.
    text: column of the text; a number, from 0, in a file without a header.
    pair: column of the second text.
    label: column of the label; 'multilabel': a list in JSONL, elsewhere joined by `separator`.
    kind: of labels, 'class', 'regression' or 'multilabel'.
    labels: names of the classes; default: those of the training split, sorted.
    separator: between several labels.
    delimiter: between columns: a character, or tab, comma, semicolon, pipe or space.
    encoding: of the files.
    on_bad_row: a record without text or label (null, a number, a missing key, another number of
      fields) raises ('stop'), or is skipped and counted ('skip').

  Raises:
    ValueError: for an unknown kind, or without `labels` and a training split.
  """
  if kind not in _KINDS:
    raise ValueError(f'kind must be one of {tuple(_KINDS)}, got {kind!r}.')
  layouts = make_layouts(
    files, (text, pair) if pair else (text,), label, on_bad_row=on_bad_row, delimiter=delimiter,
    encoding=encoding,
  )  # fmt: skip
  make, measure = _KINDS[kind]
  made = make(separator=separator)
  if made.least:
    names = tuple(name.strip() for name in labels)
    if not names and 'train' not in layouts:
      raise ValueError("labels are found in the 'train' split; name its file, or give `labels`.")
    names = names or _find_labels(source, layouts['train'], made)
    made = dataclasses.replace(made, names=names)
  read = functools.partial(read_texts, source=source, layouts=layouts, label=made)
  return text_task('table', made, measure, read, layouts)


def _find_labels(source, layout: Layout, label: FieldLabel) -> tuple[str, ...]:
  """Sorted labels of a split; warns about names that are unlikely to be classes."""
  found = set()
  for row in read_rows(source, layout):
    names = [None] if row.error else label.split(row.values[layout.label])
    if None not in names:
      found.update(names)
    elif layout.on_bad_row == 'stop':
      raise ValueError(f'{row.where}: {row.error or "the label is missing"}.')
  if len(found) < label.least:
    raise ValueError(f'{layout.file}: classes must be two or more, found {sorted(found)}.')
  for name in sorted(found):
    alike = [other for other in found if other < name and other.casefold() == name.casefold()]
    if name.casefold() in _NULLS:
      _log.warning('%s: %r is taken for a label; is it a missing value?', layout.file, name)
    for other in alike:
      note = '%s: %r and %r differ by case only and are two labels.'
      _log.warning(note, layout.file, other, name)
  return tuple(sorted(found))


def text_task(
  name: str, label: FieldLabel, measure: Callable, read: Callable, splits,
  write: Callable | None = None,
) -> Task:  # fmt: skip
  """A task of texts or pairs; `measure(predicted, gold)` has the metrics of its label."""
  return Task(
    name, label, read,
    encode=functools.partial(encode, label=label),
    decode=label.decode,
    score=functools.partial(score, label=label, measure=measure),
    write=write or functools.partial(write_texts, label=label),
    splits=tuple(splits),
  )  # fmt: skip


def read_rows(source: str, layout: Layout) -> Iterator[tables.Row]:
  """Yields the records of a split from a directory, '' or 'tfds:NAME'."""
  needed, optional = list(layout.texts), []
  if layout.label != '':
    labels = layout.label if isinstance(layout.label, tuple) else (layout.label,)
    (optional if layout.optional else needed).extend(labels)
  if source.startswith('tfds:'):
    named = str(layout.label) if layout.named else ''
    return tables.read_tfds(source.removeprefix('tfds:'), layout.file, needed, label=named)
  return tables.read_table(
    epath.Path(source) / layout.file, needed, optional=optional, delimiter=layout.delimiter,
    encoding=layout.encoding,
  )  # fmt: skip


def read_texts(
  split: str, *, source: str, layouts: Mapping[str, Layout], label: FieldLabel,
  every_class: bool = True,
) -> list[Example]:  # fmt: skip
  """The examples of a split; ids are record numbers.

  With `on_bad_row='skip'`, blank texts are skipped in 'train' only, and nothing is skipped in a
  split without labels, which needs a prediction per record.

  Args:
    split: name of the split.
    source: see `read_rows`.
    layouts: split -> `Layout`.
    label: kind of the labels.
    every_class: whether the training split must have examples of every class.
  """
  layout = known_split(split, layouts)
  lenient, labelled = layout.on_bad_row == 'skip', layout.label != ''
  found, skipped, placeholders, number = [], [], [], -1
  for number, row in enumerate(read_rows(source, layout)):
    blank = lenient and split != 'train'
    error, parsed = row.error or tables.text_problem(row.values, layout.texts, blank), None
    if labelled and not error:
      value = row.values.get(layout.label)
      parsed, error = label.parse(value)
      if error and layout.optional:  # predicted, not scored
        placeholders.append(value)
        error = ''
    if not error:
      found.append(Example(str(number), tuple(row.values[c] for c in layout.texts), parsed))
    elif lenient and labelled and not error.startswith('unknown'):
      skipped.append(f'{row.where}: {error}')
    else:
      raise ValueError(f'{row.where}: {error}.')
  if skipped:
    _log.warning('%s: %d of %d rows skipped: %s.', split, len(skipped), number + 1,
                 '; '.join(skipped[:10] + ['...'] * (len(skipped) > 10)))  # fmt: skip
  if not found:
    raise ValueError(f'{layout.file} holds no examples.')
  if layout.optional:
    found = _drop_placeholders(split, found, placeholders, label)
  if split == 'train' and every_class:
    seen = label.classes(found)
    absent = [name for number, name in enumerate(label.names) if number not in seen]
    if absent:
      raise ValueError(f'{layout.file} has no training example of the class {absent[0]!r}.')
  return found


def _drop_placeholders(
  split: str, items: list[Example], placeholders: list, label
) -> list[Example]:
  """The examples of a split whose labels may be placeholders, set to None and logged."""
  values = [value for value in placeholders if value is not None]
  if label.are_placeholders([item.label for item in items]):
    values, items = [items[0].label], [item._replace(label=None) for item in items]
  if values:
    count = sum(item.label is None for item in items)
    _log.warning('%s: %d of %d examples have no label of the task (the first has %r); they are '
                 'predicted and not scored.', split, count, len(items), values[0])  # fmt: skip
  return items


def encode(items: Sequence[Example], tokenizer, length: int, *, label: Label) -> Encoded:
  """Encodes texts or pairs, truncated by Google's rule; `counts` says how many were."""
  parts = [tokenizer.encode(texts) for texts in zip(*(item.texts for item in items), strict=True)]
  rows = list(zip(*parts, strict=True))
  truncated = sum(truncate(row, length, tokenizer.template) for row in rows)
  columns = instances.lay_out(rows, tokenizer, length)
  columns['labels'] = label.column([item.label for item in items])
  columns['example_ids'] = np.arange(len(items), dtype=np.int32)
  return Encoded(columns, {'features': len(rows), 'truncated': truncated})


def score(items, predictions, *, label: Label, measure: Callable) -> dict[str, float]:
  """The metrics that the label names."""
  scores = measure(np.asarray(predictions), label.references(gold_labels(items)))
  return {name: scores[name] for name in label.metrics}


def write_texts(folder, split, items, predictions, *, label: Label) -> list:
  """Writes FOLDER/SPLIT.tsv."""
  return write_predictions(folder, split, items, [label.text(p) for p in predictions])


def sentence_pairs(
  source: str = '', *, files: Mapping[str, str], order: bool, format: str = 'prose', seed: int = 0
) -> Task:
  """Pairs of neighbouring sentences of documents, half of them corrupted.

  Args:
    source: directory of the files.
    files: split -> file, directory or glob of text.
    order: corrupted pairs are swapped (ALBERT); otherwise their second sentence comes from another
      pair (BERT).
    format: of the text, as in `data.text`.
    seed: decides which pairs are corrupted.
  """
  name, labels = (
    ('sentence_order', ('in_order', 'swapped')) if order else ('next_sentence', ('next', 'random'))
  )

  def read(split):
    path = epath.Path(source) / known_split(split, files)
    pairs = [
      pair
      for text in text_lib.read_documents(str(path), format)
      for sentences in [text_lib.split_document(text, format)]
      for pair in zip(sentences[::2], sentences[1::2], strict=False)
    ]
    if len(pairs) < 2:
      raise ValueError(f'{path} has {len(pairs)} pairs of sentences; two are needed.')
    keys = hash_u64(seed, EXAMPLES, np.arange(len(pairs))).tolist()
    return [_spoil(pairs, number, key, order) for number, key in enumerate(keys)]

  return text_task(name, Class(labels), metrics.of_classes, read, files)


def _spoil(pairs, number: int, key: int, order: bool) -> Example:
  (a, b), wrong = pairs[number], key & 1
  if wrong and order:
    a, b = b, a
  elif wrong:
    b = pairs[(number + 1 + (key >> 1) % (len(pairs) - 1)) % len(pairs)][1]
  return Example(str(number), (a, b), wrong)
