"""Single texts and pairs: classes, numbers, several labels at once; from tables or plain documents.

GLUE is built on this, and so is your own data: a TSV, CSV or JSONL file with named columns.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from bertjax.data import sources
from bertjax.data.order import EXAMPLES, mix
from bertjax.tasks import files as files_lib
from bertjax.tasks import metrics
from bertjax.tasks.task import Encoded, Example, Task, golds, known_split, lay_out, truncate
from bertjax.tasks.task import write_predictions as write_lines

_log = logging.getLogger(__name__)

_CLASS_METRICS = {
  'accuracy': metrics.accuracy, 'f1': metrics.binary_f1, 'macro_f1': metrics.macro_f1,
  'matthews': metrics.matthews,
}  # fmt: skip
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


def table(
  source: str = '', *, files: Mapping[str, str], text: str, pair: str = '', label: str = 'label',
  kind: str = 'class', labels: Sequence[str] = (), separator: str = '|',
) -> Task:  # fmt: skip
  """Your own texts or pairs, `files={'train': 'a.csv', 'dev': 'b.jsonl'}` by column names.

  Args:
    source: folder of the files, or 'tfds:NAME' and the files are its splits.
    files: split -> .tsv, .csv or .jsonl; 'test' may lack the label.
    text: column of the text.
    pair: column of the second text.
    label: column of the label; 'multilabel': a list in JSONL, elsewhere joined by `separator`.
    kind: 'class', 'regression' or 'multilabel'.
    labels: their names; default: those of the training split, sorted.
    separator: between several labels.

  Raises:
    ValueError: for an unknown kind, or labels to be found and no training split.
  """
  if kind not in METRICS:
    raise ValueError(f'kind must be one of {tuple(METRICS)}, got {kind!r}.')
  texts = (text, pair) if pair else (text,)
  layouts = {name: Layout(file, texts, label, name == 'test') for name, file in files.items()}
  if not labels and kind != 'regression':
    if 'train' not in layouts:
      raise ValueError("labels are found in the 'train' split; name its file, or give `labels`.")
    rows = read_rows(source, layouts['train'])
    found = {n for where, row in rows for n in _names(row[label], kind, separator, where)}
    labels = sorted(found)
    if kind == 'class' and len(labels) < 2:
      raise ValueError(f'{files["train"]}: classes must be two or more, found {labels}.')
  read = functools.partial(
    read_texts, source=source, layouts=layouts, kind=kind, labels=tuple(labels),
    separator=separator,
  )  # fmt: skip
  return text_task('table', kind, METRICS[kind], labels, read, layouts, separator=separator)


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


def read_rows(source: str, layout: Layout, skip_broken: bool = False) -> Iterator[files_lib.Row]:
  """The rows of a split of a source: a folder, '' or 'tfds:NAME'."""
  unlabelled = layout.label == '' or layout.optional
  needed = [*layout.texts, *([] if unlabelled else [layout.label])]
  if source.startswith('tfds:'):
    named = str(layout.label) if layout.named else ''
    return files_lib.read_tfds(source.removeprefix('tfds:'), layout.file, needed, label=named)
  return files_lib.read_table(
    epath.Path(source) / layout.file, needed, header=isinstance(needed[0], str),
    skip_broken=skip_broken,
  )  # fmt: skip


def read_texts(
  split: str, *, source: str, layouts: Mapping[str, Layout], kind: str, labels: Sequence[str],
  separator: str = '|', skip_broken: bool = False, every_class: bool = True,
) -> list[Example]:  # fmt: skip
  """The examples of a split.

  Args:
    split: its name.
    source: see `read_rows`.
    layouts: of the splits there are.
    kind: of label.
    labels: their names.
    separator: between several labels.
    skip_broken: leave rows without text out of 'train' and broken ones out of every split with
      labels, and tell each. A split without labels keeps all, for its predictions are counted.
    every_class: the training split must have examples of every class; others cannot be learnt.
  """
  layout, found = known_split(split, layouts), []
  learnt = split == 'train'
  for where, row in read_rows(source, layout, skip_broken and layout.label != ''):
    empty = [c for c in layout.texts if not (isinstance(row[c], str) and row[c].strip())]
    if empty and not skip_broken:
      raise ValueError(f'{where}: column {empty[0]!r} holds no text.')
    if empty and learnt:
      _log.warning('%s: no text, left out.', where)
      continue
    label = row.get(layout.label)
    if layout.label != '' and not (layout.optional and label is None):
      label = _label(label, where, kind, labels, separator)
    found.append(Example(str(len(found)), tuple(row[c] for c in layout.texts), label))
  if not found:
    raise ValueError(f'{layout.file} holds no examples.')
  if learnt and every_class and kind != 'regression':
    seen = {n for item in found for n in (item.label if kind == 'multilabel' else [item.label])}
    absent = [name for number, name in enumerate(labels) if number not in seen]
    if absent:
      raise ValueError(f'{layout.file} has no training example of the class {absent[0]!r}.')
  return found


def _names(value, kind: str, separator: str, where: str) -> list[str]:
  """The names of labels in a field."""
  names = value if isinstance(value, list) and kind == 'multilabel' else [value]
  if kind == 'multilabel' and isinstance(value, str):
    names = [part.strip() for part in value.split(separator) if part.strip()]
  if any(name is None or name == '' or name != name for name in names):  # NaN is not itself
    raise ValueError(f'{where}: the label is missing.')
  return [str(name) for name in names]


def _label(value, where: str, kind: str, labels: Sequence[str], separator: str):
  """A field as a label, checked."""
  if kind == 'regression':
    try:
      number = float(value)
    except (TypeError, ValueError):
      number = math.nan
    if not math.isfinite(number):
      raise ValueError(f'{where}: the label must be a finite number, got {value!r}.')
    return number
  names = _names(value, kind, separator, where)
  unknown = next((name for name in names if name not in labels), None)
  if unknown is not None:
    raise ValueError(f'{where}: unknown label {unknown!r}; the labels are {list(labels)}.')
  numbers = tuple(labels.index(name) for name in names)
  return numbers if kind == 'multilabel' else numbers[0]


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
    format: of the text, as in `data.sources`.
    seed: decides which pairs are wrong.
  """
  name, labels = (
    ('sentence_order', ('in_order', 'swapped')) if order else ('next_sentence', ('next', 'random'))
  )

  def read(split):
    path = epath.Path(source) / known_split(split, files)
    pairs = [
      pair
      for text in sources.read_documents(str(path), format)
      for sentences in [sources.split_document(text, format)]
      for pair in zip(sentences[::2], sentences[1::2], strict=False)
    ]
    if len(pairs) < 2:
      raise ValueError(f'{path} has {len(pairs)} pairs of sentences; two are needed.')
    keys = mix(seed, EXAMPLES, np.arange(len(pairs))).tolist()
    return [_spoil(pairs, number, key, order) for number, key in enumerate(keys)]

  return text_task(name, 'class', METRICS['class'], labels, read, files)


def _spoil(pairs, number: int, key: int, order: bool) -> Example:
  (a, b), wrong = pairs[number], key & 1
  if wrong and order:
    a, b = b, a
  elif wrong:
    b = pairs[(number + 1 + (key >> 1) % (len(pairs) - 1)) % len(pairs)][1]
  return Example(str(number), (a, b), wrong)
