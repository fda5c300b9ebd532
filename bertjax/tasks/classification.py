"""Single texts and pairs: classes, numbers, several labels at once; from tables or plain documents.

GLUE is built on this, and so is your own data: any table that `data.tables` reads.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from bertjax.data import tables
from bertjax.data import text as text_lib
from bertjax.data.prng import EXAMPLES, hash_u64
from bertjax.tasks import metrics
from bertjax.tasks.task import Encoded, Example, Task, golds, known_split, lay_out, truncate
from bertjax.tasks.task import write_predictions as write_lines

_log = logging.getLogger(__name__)

_CLASS_METRICS = {
  'accuracy': metrics.accuracy, 'f1': metrics.binary_f1, 'macro_f1': metrics.macro_f1,
  'matthews': metrics.matthews,
}  # fmt: skip
_NULLS = ('nan', 'none', 'null', 'nil', 'n/a', 'na', '<na>', '#n/a', '-', '?')
METRICS = {  # of own data, the main one first
  'class': ('accuracy', 'macro_f1', 'matthews'),
  'regression': ('spearman', 'pearson'),
  'multilabel': ('micro_f1', 'macro_f1', 'exact'),
}


class Layout(NamedTuple):
  """Where a split lies and how it is laid out."""

  file: str  # its name; with `tfds:`, the split's
  texts: tuple  # one or two columns; numbers in a file without header
  label: str | int = ''  # column; '' = the split has no labels
  optional: bool = False  # whether the label's column may be missing
  named: bool = True  # whether classes of TFDS are known by name; otherwise by number


class Reading(NamedTuple):
  """How files are read; see `data.tables.read_table`."""

  delimiter: str = ''
  encoding: str = 'utf-8'
  on_bad_row: str = 'stop'  # at rows without the texts or the label; 'skip' leaves them out

  def check(self) -> 'Reading':
    if self.on_bad_row not in ('stop', 'skip'):
      raise ValueError(f"on_bad_row must be 'stop' or 'skip', got {self.on_bad_row!r}.")
    return self


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
    kind: 'class', 'regression' or 'multilabel'.
    labels: their names; default: those of the training split, sorted.
    separator: between several labels.
    delimiter: between columns: a character, or tab, comma, semicolon, pipe or space.
    encoding: of the files.
    on_bad_row: 'stop' at a row without the text or the label (null, a number, a missing key,
      another number of fields), or 'skip' and count such rows.

  Raises:
    ValueError: for an unknown kind, or labels to be found and no training split.
  """
  if kind not in METRICS:
    raise ValueError(f'kind must be one of {tuple(METRICS)}, got {kind!r}.')
  reading = Reading(delimiter, encoding, on_bad_row).check()
  texts = (text, pair) if pair else (text,)
  layouts = {name: Layout(file, texts, label, name == 'test') for name, file in files.items()}
  labels = [name.strip() for name in labels]
  if not labels and kind != 'regression':
    if 'train' not in layouts:
      raise ValueError("labels are found in the 'train' split; name its file, or give `labels`.")
    labels = _find_labels(source, layouts['train'], reading, kind, separator)
  read = functools.partial(
    read_texts, source=source, layouts=layouts, kind=kind, labels=tuple(labels),
    separator=separator, reading=reading,
  )  # fmt: skip
  return text_task('table', kind, METRICS[kind], labels, read, layouts, separator=separator)


def _find_labels(source, layout: Layout, reading: Reading, kind: str, separator: str) -> list[str]:
  """The labels of a split, sorted; warns about names that hardly are classes of their own."""
  found = set()
  for row in read_rows(source, layout, reading):
    names = [None] if row.error else _names(row.values[layout.label], kind, separator)
    if None not in names:
      found.update(names)
    elif reading.on_bad_row == 'stop':
      raise ValueError(f'{row.where}: {row.error or "the label is missing"}.')
  if kind == 'class' and len(found) < 2:
    raise ValueError(f'{layout.file}: classes must be two or more, found {sorted(found)}.')
  for name in sorted(found):
    alike = [other for other in found if other < name and other.casefold() == name.casefold()]
    if name.casefold() in _NULLS:
      _log.warning('%s: %r is taken for a label; is it a missing value?', layout.file, name)
    for other in alike:
      note = '%s: %r and %r differ by case only and are two labels.'
      _log.warning(note, layout.file, other, name)
  return sorted(found)


def text_task(
  name: str, kind: str, names: Sequence[str], labels: Sequence[str], read: Callable, splits,
  write: Callable | None = None, separator: str = '|',
) -> Task:  # fmt: skip
  """A task of texts or pairs; `names` are its metrics, the main one first."""
  labels, classes = tuple(labels), len(labels)
  return Task(
    name, kind, names[0], read,
    encode=functools.partial(encode, kind=kind, classes=classes),
    decode=functools.partial(decode, kind=kind),
    score=functools.partial(score, kind=kind, names=tuple(names), classes=classes),
    write=write or functools.partial(_write, kind=kind, labels=labels, separator=separator),
    splits=tuple(splits), labels=labels,
  )  # fmt: skip


def read_rows(source: str, layout: Layout, reading: Reading) -> Iterator[tables.Row]:
  """The rows of a split of a source: a folder, '' or 'tfds:NAME'."""
  needed, optional = list(layout.texts), []
  if layout.label != '':
    (optional if layout.optional else needed).append(layout.label)
  if source.startswith('tfds:'):
    named = str(layout.label) if layout.named else ''
    return tables.read_tfds(source.removeprefix('tfds:'), layout.file, needed, label=named)
  return tables.read_table(
    epath.Path(source) / layout.file, needed, optional=optional, delimiter=reading.delimiter,
    encoding=reading.encoding,
  )  # fmt: skip


def read_texts(
  split: str, *, source: str, layouts: Mapping[str, Layout], kind: str, labels: Sequence[str],
  separator: str = '|', reading: Reading | None = None, every_class: bool = True,
) -> list[Example]:  # fmt: skip
  """The examples of a split; their ids count its rows.

  Args:
    split: its name.
    source: see `read_rows`.
    layouts: of the splits there are.
    kind: of label.
    labels: their names.
    separator: between several labels.
    reading: how the files are read. With `on_bad_row='skip'`, blank texts are skipped in 'train'
      only, and nothing is skipped in a split without labels, whose predictions are counted.
    every_class: the training split must have examples of every class; others cannot be learnt.
  """
  layout, found, reading = known_split(split, layouts), [], reading or Reading()
  learnt, skip = split == 'train', reading.on_bad_row == 'skip' and layout.label != ''
  blank = reading.on_bad_row == 'skip' and not learnt
  skipped, others, number = [], [], -1
  for number, row in enumerate(read_rows(source, layout, reading)):
    error = row.error or tables.text_problem(row.values, layout.texts, blank)
    label = None
    if not error and layout.label != '':
      label, error = _label(row.values.get(layout.label), kind, labels, separator)
      if error and layout.optional:  # a placeholder: predicted, not scored
        others.append(row.values.get(layout.label))
        error = ''
    if error and not (skip and not error.startswith('unknown')):
      raise ValueError(f'{row.where}: {error}.')
    if error:
      skipped.append(f'{row.where}: {error}')
    else:
      found.append(Example(str(number), tuple(row.values[c] for c in layout.texts), label))
  if skipped:
    _log.warning('%s: %d of %d rows skipped: %s.', split, len(skipped), number + 1,
                 '; '.join(skipped[:10] + ['...'] * (len(skipped) > 10)))  # fmt: skip
  if not found:
    raise ValueError(f'{layout.file} holds no examples.')
  if layout.optional:
    found = _drop_placeholders(split, found, others, kind)
  if learnt and every_class and kind != 'regression':
    seen = {n for item in found for n in (item.label if kind == 'multilabel' else [item.label])}
    absent = [name for number, name in enumerate(labels) if number not in seen]
    if absent:
      raise ValueError(f'{layout.file} has no training example of the class {absent[0]!r}.')
  return found


def _drop_placeholders(split: str, items: list[Example], others: list, kind: str) -> list[Example]:
  """The examples of a split that may lack labels; logs what stood in their place."""
  values = [value for value in others if value is not None]
  numbers = {item.label for item in items}
  if kind == 'regression' and len(numbers) == 1 and len(items) > 1 and numbers != {None}:
    values, items = [*numbers], [item._replace(label=None) for item in items]
  if values:
    count = sum(item.label is None for item in items)
    _log.warning('%s: %d of %d examples have no label of the task (the first has %r); they are '
                 'predicted and not scored.', split, count, len(items), values[0])  # fmt: skip
  return items


def _names(value, kind: str, separator: str) -> list[str | None]:
  """The names of labels in a field, None for a missing one; blanks around them do not count."""
  names = value if isinstance(value, list) and kind == 'multilabel' else [value]
  if kind == 'multilabel' and isinstance(value, str):
    names = [part for part in value.split(separator) if part.strip()]
  names = [None if name is None or name != name else str(name).strip() for name in names]  # NaN
  return [name or None for name in names]


def _label(value, kind: str, labels: Sequence[str], separator: str) -> tuple:
  """(a field as a label, '') or (None, why it is none)."""
  if kind == 'regression':
    try:
      number = float(value)
    except (TypeError, ValueError):
      number = math.nan
    if not math.isfinite(number):
      return None, f'the label must be a finite number, got {value!r}'
    return number, ''
  names = _names(value, kind, separator)
  if None in names:
    return None, 'the label is missing'
  unknown = next((name for name in names if name not in labels), None)
  if unknown is not None:
    return None, f'unknown label {unknown!r}; the labels are {list(labels)}'
  numbers = tuple(labels.index(name) for name in names)
  return (numbers if kind == 'multilabel' else numbers[0]), ''


def encode(items: Sequence[Example], tokenizer, length: int, *, kind: str, classes: int) -> Encoded:
  """Rows of texts or pairs, cut by Google's rule; `counts['cut']` tells how many."""
  parts = [tokenizer.encode(texts) for texts in zip(*(item.texts for item in items), strict=True)]
  rows = list(zip(*parts, strict=True))
  cut = sum(truncate(row, length) for row in rows)
  columns = lay_out(rows, tokenizer, length)
  columns['labels'] = _label_column([item.label for item in items], kind, classes)
  columns['example_ids'] = np.arange(len(items), dtype=np.int32)
  return Encoded(columns, {'rows': len(rows), 'cut': cut})


def _label_column(labels: Sequence, kind: str, classes: int) -> np.ndarray:
  if kind == 'class':
    return np.array([-1 if label is None else label for label in labels], np.int32)
  if kind == 'regression':
    return np.array([math.nan if label is None else label for label in labels], np.float32)
  column = np.zeros((len(labels), classes), np.float32)
  for row, label in zip(column, labels, strict=True):
    row[slice(None) if label is None else list(label)] = math.nan if label is None else 1
  return column


def decode(items, encoded: Encoded, logits, threshold: float = 0.0, *, kind: str) -> np.ndarray:
  """Class numbers [N], numbers [N], or bool [N, C]."""
  logits = np.asarray(logits)
  if kind == 'class':
    return logits.argmax(-1)
  return logits.reshape(len(items)) if kind == 'regression' else logits > threshold


def score(items, predictions, *, kind: str, names: Sequence[str], classes: int) -> dict:
  """The metrics called `names`."""
  labels = golds(items)
  if kind == 'class':
    counts = metrics.confusion(predictions, labels, classes)
    return {name: _CLASS_METRICS[name](counts) for name in names}
  if kind == 'regression':
    scores = metrics.correlations(predictions, labels)
  else:
    scores = metrics.multilabel(np.asarray(predictions), _label_column(labels, kind, classes) > 0)
  return {name: scores[name] for name in names}


def _write(folder, split, items, predictions, *, kind, labels, separator):
  if kind == 'class':
    texts = [labels[number] for number in predictions]
  elif kind == 'regression':
    texts = [f'{number:.9g}' for number in predictions]  # float32 to the last bit
  else:
    texts = [separator.join(labels[n] for n in np.flatnonzero(row)) for row in predictions]
  return write_lines(folder, split, items, texts)


def sentence_pairs(
  source: str = '', *, files: Mapping[str, str], order: bool, format: str = 'prose', seed: int = 0
) -> Task:
  """Neighbouring sentences of documents, half of them put wrong, by a seed.

  Args:
    source: folder of the files.
    files: split -> file, folder or glob of text.
    order: wrong means that the two are swapped (ALBERT); otherwise that the second comes from
      another place of the text (BERT).
    format: of the text, as in `data.text`.
    seed: decides which pairs are wrong.
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

  return text_task(name, 'class', METRICS['class'], labels, read, files)


def _spoil(pairs, number: int, key: int, order: bool) -> Example:
  (a, b), wrong = pairs[number], key & 1
  if wrong and order:
    a, b = b, a
  elif wrong:
    b = pairs[(number + 1 + (key >> 1) % (len(pairs) - 1)) % len(pairs)][1]
  return Example(str(number), (a, b), wrong)
