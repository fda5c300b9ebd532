"""Tables: rows of CSV, TSV, JSON Lines, Parquet and text files, and of TensorFlow Datasets.

Fine-tuning and prediction stream through this one reader. A row that cannot be used keeps its place
and says why (`Row.error`): fine-tuning refuses or skips it, prediction writes an error line.
"""

import bisect
import csv
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from etils import epath

from bertjax import io
from bertjax.data import files, remote

KINDS = ('.csv', '.tsv', '.txt', '.jsonl', '.parquet')
DELIMITERS = {'tab': '\t', 'comma': ',', 'semicolon': ';', 'pipe': '|', 'space': ' '}
_COMPRESSED = ('.gz', '.bz2', '.xz', '.zst')

_ESCAPED = re.compile('[\udc80-\udcff]')  # bytes that are not UTF-8, by 'surrogateescape'

_log = logging.getLogger(__name__)

csv.field_size_limit(2**31 - 1)  # contexts may be longer than csv's 128 KiB


class Row(NamedTuple):
  """A row of a table.

  Attributes:
    where: 'FILE:LINE', for messages about it.
    values: {column: value} of the columns asked for; {} if there is an error.
    error: why the row cannot be used, a sentence without its end; '' if it can.
  """

  where: str
  values: dict
  error: str = ''


def read_table(
  path, columns: Sequence, *, optional: Sequence = (), delimiter: str = '',
  encoding: str = 'utf-8',
) -> Iterator[Row]:  # fmt: skip
  """Yields the rows of a file, a folder of files, all matches of a glob, or an `hf:` data set.

  Args:
    path: .csv, .tsv (as in GLUE, a quote is a character like any other), .jsonl, .parquet or .txt
      (a text a line, or with a delimiter); text files may be compressed (.gz, .bz2, .xz, .zst).
    columns: needed columns; by number, from 0, in a file without a header.
    optional: columns that are read if they are there.
    delimiter: between columns; a character, or one of `DELIMITERS`; '' = that of the file's ending,
      or another one whose header has all `columns` (logged).
    encoding: of text files, by Python's name.

  Raises:
    ValueError: for another ending, a missing or doubled column, or what is not in the file's
      format, with the file and the line.
  """
  delimiter = DELIMITERS.get(delimiter, delimiter)
  if len(delimiter) > 1:
    raise ValueError(
      f'the delimiter must be a character or one of {tuple(DELIMITERS)}, got {delimiter!r}.'
    )
  for file in files.list_files(str(path)):
    kind = _kind(file)
    if kind == '.parquet':
      yield from _parquet(file, columns, optional)
    elif kind == '.jsonl':
      yield from _jsonl(file, columns, optional, encoding)
    elif kind == '.txt' and not delimiter:
      if len(columns) > 1:
        raise ValueError(
          f'{file}: a .txt file has one text a line; for {list(columns)} name the delimiter '
          'between columns (delimiter=tab).'
        )
      lines = enumerate(read_lines(file, encoding), 1)
      yield from (Row(f'{file}:{n}', {columns[0]: line.rstrip('\r\n')}) for n, line in lines)
    else:
      yield from _delimited(file, kind, columns, optional, delimiter, encoding)


def text_problem(
  values: dict, columns: Sequence, blank: bool = False, word_lists: bool = False
) -> str:  # fmt: skip
  """Why columns of a row are no texts, as in `Row.error`; '' if they are, or may be `blank`; with
  `word_lists` a text may also be the list of its words."""
  for column in columns:
    value = values[column]
    if word_lists and isinstance(value, list) and all(isinstance(word, str) for word in value):
      continue
    if not isinstance(value, str):
      return f'column {column!r} holds no text but {json.dumps(value, default=str)[:40]}'
    if not (blank or value.strip()):
      return f'column {column!r} holds no text'
  return ''


def _kind(path: epath.Path) -> str:
  """The file's ending in lower case, without that of a compression."""
  endings = [suffix.lower() for suffix in path.suffixes]
  kind = next((e for e in reversed(endings) if e not in _COMPRESSED), '')
  if kind not in KINDS:
    raise ValueError(f'{path}: tables end in {", ".join(KINDS)}, got {kind!r}.')
  return kind


def read_lines(path, encoding: str) -> Iterator[str]:
  """The lines of a text file, with their ends and without a byte order mark."""
  path = epath.Path(path)
  files.check_encoding(encoding)
  try:
    with files.open_text(path, encoding) as stream:
      invalid = re.compile('\ufffd') if stream.errors == 'replace' else _ESCAPED
      for number, line in enumerate(stream, 1):
        if not line.isascii() and invalid.search(line):
          raise ValueError(_no_text(path, number, encoding, line))
        yield line
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror or error}.') from error


def _no_text(path, number: int, encoding: str, line: str) -> str:
  guess = ''
  if _ESCAPED.search(line):  # else the bytes are lost
    guess = files.guess_encoding(line.encode('utf-8', 'surrogateescape'))
  like = f'; it looks like {guess}' if guess else ''
  return (
    f'{path}:{number}: not {encoding.upper()} text{like}. Name the encoding of the file '
    f'(encoding={guess or "NAME"}).'
  )


def _delimited(path, kind, columns, optional, delimiter, encoding) -> Iterator[Row]:
  delimiter = delimiter or _detect_delimiter(path, kind, columns, encoding)
  if kind == '.csv' or delimiter != '\t':
    rows = _csv(path, delimiter, encoding)
  else:
    lines = enumerate(read_lines(path, encoding), 1)
    rows = ((n, line.rstrip('\r\n').split(delimiter) if line.strip('\r\n') else [])
            for n, line in lines)  # fmt: skip
  number, first = next(((n, fields) for n, fields in rows if fields), (0, []))
  if not number:
    raise ValueError(f'{path} is empty.')
  names, asked = [name.strip() for name in first], (*columns, *optional)
  positions = [str(n) for n in range(len(first))]
  by_number = all(str(column).isdecimal() for column in columns)
  named = names == positions  # as pandas writes columns without names
  named |= set(columns) <= set(names) and any(str(c) not in positions for c in columns)
  if by_number and not named:  # no header
    rows = itertools.chain([(number, first)], rows)
    names = positions
    wanted = {str(column): column for column in asked}
    hint = ' (counted from 0)'
  else:
    wanted = {column: column for column in asked}
    hint = '; columns of a file without a header are given by number, from 0, and another delimiter'
    hint += ' by its name (delimiter=semicolon)'
  columns, optional = ([str(column) for column in some] for some in (columns, optional))
  places = find_columns(names, columns, optional, str(path), hint)
  for number, fields in rows:
    if not fields and len(names) > 1:
      continue
    fields = fields or ['']  # where there is but one column, a blank line is an empty cell
    if len(fields) == len(names):
      values = {wanted[name]: fields[place] for name, place in places.items()}
      yield Row(f'{path}:{number}', values)
    else:
      yield Row(f'{path}:{number}', {}, f'{len(fields)} fields, the first row has {len(names)}')


def _detect_delimiter(path, kind: str, columns, encoding: str) -> str:
  """That of the file's ending, or one that finds all needed columns in the header where it finds
  none; logged."""
  usual = {'.csv': ',', '.tsv': '\t'}[kind]
  header = next((line for line in read_lines(path, encoding) if line.strip()), '')
  for name, delimiter in {'': usual, **DELIMITERS}.items():
    names = {cell.strip().strip('"') for cell in header.split(delimiter)}
    if set(map(str, columns)) <= names:
      if name:
        _log.info('%s: columns are separated by %s (detected in the header)', path, name)
      return delimiter
  return usual


def _csv(path, delimiter: str, encoding: str) -> Iterator[tuple[int, list[str]]]:
  reader = csv.reader(read_lines(path, encoding), strict=True, delimiter=delimiter)
  number = 1
  try:
    for fields in reader:
      yield number, fields
      number = reader.line_num + 1
  except csv.Error as error:
    raise ValueError(f'{path}:{number}: no CSV ({error}).') from error


def _jsonl(path, columns, optional, encoding) -> Iterator[Row]:
  for number, row in json_rows(read_lines(path, encoding)):
    where = f'{path}:{number}'
    if isinstance(row, Exception):
      yield Row(where, {}, f'not JSON ({row})')
    elif not isinstance(row, dict):
      yield Row(where, {}, f'a line must hold a JSON object, got {json.dumps(row)[:40]!r}')
    elif missing := [column for column in columns if column not in row]:
      yield Row(where, {}, f'no column {missing[0]!r}; it has {sorted(row)}')
    else:
      values = {column: to_python(row[column]) for column in (*columns, *optional) if column in row}
      yield Row(where, values)


def _parquet(path, columns, optional) -> Iterator[Row]:
  for number, values in parquet_rows(path, columns, optional):
    invalid = [c for c, v in values.items() if isinstance(v, str) and _ESCAPED.search(v)]
    error = f'column {invalid[0]!r} is not UTF-8 text' if invalid else ''
    yield Row(f'{path}:{number}', {} if invalid else to_python(values), error)


def json_rows(lines: Iterable[str], skip: int = 0) -> Iterator[tuple]:
  """(number, value) of each line after `skip` that is not blank; an exception for a line that is
  not JSON."""
  for number, line in itertools.islice(enumerate(lines, 1), skip, None):
    if not line.isspace():
      try:
        yield number, json.loads(line)
      except (ValueError, RecursionError) as error:  # of the syntax, a huge number, or the depth
        yield number, error


def parquet_rows(
  path: epath.Path, columns: Sequence[str], optional: Sequence[str] = (), hint: str = '',
  skip: int = 0,
) -> Iterator[tuple[int, dict]]:  # fmt: skip
  """(number, {column: value}) of each row after `skip`, read in batches; invalid bytes of a text
  become lone surrogates. For the other arguments see `find_columns`."""
  import pyarrow as pa
  from pyarrow import parquet

  exact = {'buffering': 0} if isinstance(path, remote.Url) else {}
  with path.open('rb', **exact) as file:
    try:
      table = parquet.ParquetFile(file, pre_buffer=False)
      names = [*find_columns(table.schema_arrow.names, columns, optional, str(path), hint)]
      sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
      ends = list(itertools.accumulate(sizes))
      first = bisect.bisect_right(ends, skip)  # row groups before it are not read
      numbers = itertools.count(sum(sizes[:first]) + 1)
      batches = (
        batch
        for group in range(first, len(ends))  # fetched one after the other
        for batch in table.iter_batches(1024, row_groups=[group], columns=names)
      )
      for batch in batches:
        values = [_values(batch.column(name)) for name in names]
        for row in zip(*values, strict=True):
          if (number := next(numbers)) > skip:
            yield number, dict(zip(names, row, strict=True))
    except (pa.ArrowInvalid, OSError) as error:
      if getattr(error, 'errno', None):
        raise
      raise ValueError(f'{path} is not a complete Parquet file: {error}.') from error


def _values(array) -> list:
  import pyarrow as pa

  if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
    array = array.cast(pa.large_binary())  # to_pylist raises for invalid UTF-8
  return [
    value.decode('utf-8', 'surrogateescape') if isinstance(value, bytes) else value
    for value in array.to_pylist()
  ]


def find_columns(
  names: list[str], columns: Sequence, optional: Sequence, where: str, hint: str = ''
) -> dict:
  """{column: its position} for the columns of a table that has these names.

  Raises:
    ValueError: if one of `columns` is missing, or any occurs twice; `where` names the table.
  """
  twice = [column for column in (*columns, *optional) if names.count(column) > 1]
  if twice:
    raise ValueError(f'{where} has the column {twice[0]!r} twice.')
  missing = [column for column in columns if column not in names]
  if missing:
    raise ValueError(f'{where} has no column {missing[0]!r}; it has {sorted(names)}{hint}.')
  return {column: names.index(column) for column in (*columns, *optional) if column in names}


def read_json(path):
  """The content of a JSON file."""
  try:
    return to_python(json.loads(''.join(read_lines(path, 'utf-8'))))
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f'{path} holds no JSON: {error}.') from error


def read_tfds(name: str, split: str, columns: Sequence, *, label: str = '') -> Iterator[Row]:
  """Yields the examples of a TensorFlow Datasets split, or of a folder that TFDS wrote.

  Args:
    name: 'glue/sst2', with ':VERSION' if need be, or a folder.
    split: one of the data set's.
    columns: features that must be there.
    label: a feature whose classes are given by name, not by number; -1 becomes None.
  """
  builder, data = open_tfds(name, split)
  find_columns([*builder.info.features], columns, (), f'tfds:{name}')
  feature = dict(builder.info.features).get(label)
  names = getattr(getattr(feature, 'feature', feature), 'names', None)
  for number, example in enumerate(data.as_numpy_iterator()):
    values = to_python(example)
    if names:
      values[label] = _named(values[label], names)
    yield Row(f'tfds:{name}, {split} example {number}', values)


def open_tfds(name: str, split: str):
  """The builder and the examples, in order, of a TFDS data set or of a folder that TFDS wrote.

  Raises:
    ValueError: if there is no such data set, version or split.
  """
  instead = 'write the data as .jsonl or .parquet files'
  tfds = io.import_tensorflow(f'tfds:{name}', instead, 'tensorflow_datasets')
  try:
    if epath.Path(name).is_dir():
      builder = tfds.builder_from_directory(name)
    else:
      builder = tfds.builder(name)
      builder.download_and_prepare()
    config = tfds.ReadConfig(interleave_cycle_length=1)
    return builder, builder.as_dataset(split=split, read_config=config)
  except Exception as error:  # TFDS has separate exceptions for names, versions and splits
    raise ValueError(f'tfds:{name}: {str(error).strip().splitlines()[0]}') from error


def to_python(value):
  """Strings, numbers, lists and dicts instead of bytes and arrays; U+FFFD for lone surrogates."""
  if isinstance(value, dict):
    return {key: to_python(item) for key, item in value.items()}
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, list):
    return [to_python(item) for item in value]
  if isinstance(value, str) and not value.isascii():
    return re.sub('[\ud800-\udfff]', '\ufffd', value)
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else value


def _named(value, names):
  if isinstance(value, list):
    return [_named(item, names) for item in value]
  return None if value < 0 else names[value]
