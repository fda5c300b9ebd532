"""Rows of TSV, CSV and JSONL files and of TensorFlow Datasets, each with the place it stands at.

A row is (where, {column: value}); `where` is 'FILE:LINE', for the message if something is wrong
with it. TSV is GLUE's: a quote is a character like any other.
"""

import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence

from etils import epath

from bertjax.data import sources

Row = tuple[str, dict]

_log = logging.getLogger(__name__)


def read_text(path) -> str:
  """The text of a file, without a byte-order mark.

  Raises:
    ValueError: if it cannot be read or is no UTF-8, with the line.
  """
  try:
    data = epath.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror or error}.') from error
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise ValueError(f'{path}:{line}: not UTF-8 text ({error.reason}).') from error


def read_table(
  path, needed: Sequence = (), *, header: bool = True, skip_broken: bool = False
) -> Iterator[Row]:
  """Yields the rows of a file that ends in .tsv, .csv or .jsonl.

  Args:
    path: the file.
    needed: columns that must be there.
    header: whether the first line names the columns; otherwise they are called 0, 1, ...
    skip_broken: leave out rows with another number of fields, and tell each.

  Raises:
    ValueError: for another ending, an empty file, a missing column or a broken row.
  """
  kind = epath.Path(path).suffix
  if kind not in ('.tsv', '.csv', '.jsonl'):
    raise ValueError(f'{path}: data files end in .tsv, .csv or .jsonl, got {kind!r}.')
  text = read_text(path)
  if kind == '.jsonl':
    yield from _jsonl(text, path, needed)
    return
  records = _tsv(text) if kind == '.tsv' else _csv(text, path)
  number, names = next(records, (0, []))
  if not number:
    raise ValueError(f'{path} is empty.')
  if not header:
    records, names = _tsv(text) if kind == '.tsv' else _csv(text, path), [*range(len(names))]
  _check(names, needed, path)
  for number, fields in records:
    if len(fields) == len(names):
      yield f'{path}:{number}', dict(zip(names, fields, strict=True))
    elif skip_broken:
      _log.warning('%s:%d: %d fields, left out.', path, number, len(fields))
    else:
      raise ValueError(f'{path}:{number}: {len(fields)} fields, the first row has {len(names)}.')


def _check(names, needed, where) -> None:
  missing = [name for name in needed if name not in names]
  if missing:
    raise ValueError(f'{where} has no column {missing[0]!r}; it has {sorted(names, key=str)}.')


def _tsv(text: str) -> Iterator[tuple[int, list[str]]]:
  for number, line in enumerate(text.split('\n'), 1):
    if line.rstrip('\r'):
      yield number, line.rstrip('\r').split('\t')


def _csv(text: str, path) -> Iterator[tuple[int, list[str]]]:
  reader = csv.reader(io.StringIO(text, newline=''), strict=True)
  number = 1
  try:
    for fields in reader:
      if fields:
        yield number, fields
      number = reader.line_num + 1
  except csv.Error as error:
    raise ValueError(f'{path}:{number}: no CSV ({error}).') from error


def _jsonl(text: str, path, needed) -> Iterator[Row]:
  for number, line in enumerate(text.split('\n'), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{path}:{number}: no JSON ({error}).') from error
    if not isinstance(row, dict):
      raise ValueError(f'{path}:{number}: a line must hold a JSON object, got {line[:40]!r}.')
    _check(row, needed, f'{path}:{number}')
    yield f'{path}:{number}', _plain(row)


def read_json(path):
  """The content of a JSON file."""
  try:
    return _plain(json.loads(read_text(path)))
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f'{path} holds no JSON: {error}.') from error


def read_tfds(name: str, split: str, needed: Sequence = (), *, label: str = '') -> Iterator[Row]:
  """Yields the examples of a TensorFlow Datasets split, or of a folder that TFDS wrote.

  Args:
    name: 'glue/sst2', with ':VERSION' if need be, or a folder.
    split: one of the data set's.
    needed: features that must be there.
    label: a feature whose classes are given by name, not by number; -1 becomes None.
  """
  import tensorflow_datasets as tfds

  builder, data = sources.open_tfds(name, split)
  _check([*builder.info.features], needed, f'tfds:{name}')
  feature = dict(builder.info.features).get(label)
  names = getattr(getattr(feature, 'feature', feature), 'names', None)
  for number, example in enumerate(tfds.as_numpy(data)):
    row = _plain(example)
    if names:
      row[label] = _named(row[label], names)
    yield f'tfds:{name}, {split} example {number}', row


def _plain(value):
  """Strings, numbers, lists and dicts instead of bytes and arrays; U+FFFD for lone surrogates."""
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, list):
    return [_plain(item) for item in value]
  if isinstance(value, str) and not value.isascii():
    return re.sub('[\ud800-\udfff]', '\ufffd', value)
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else value


def _named(value, names):
  if isinstance(value, list):
    return [_named(item, names) for item in value]
  return None if value < 0 else names[value]
