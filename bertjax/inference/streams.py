"""Files of texts: read as a stream, answered in order, written so that a killed run goes on.

Memory does not grow with the file: `CHUNK` items are read, answered and written at a time.
"""

import csv
import io
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import tqdm
from etils import epath

CHUNK = 1024  # items; the more, the better they fall into batches of a length

KINDS = ('.txt', '.csv', '.tsv', '.jsonl', '.parquet')


def read_items(path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
  """Yields the texts of each row; a line of a .txt file is its only column.

  Raises:
    ValueError: for another ending, a missing column or what is no such file, with its line.
  """
  path = epath.Path(path)
  if path.suffix not in KINDS:
    raise ValueError(f'{path}: files of texts end in {", ".join(KINDS)}, got {path.suffix!r}.')
  if path.suffix == '.txt' and len(columns) > 1:
    raise ValueError(f'{path}: a .txt file has one text a line; {list(columns)} need columns.')
  number = 0
  try:
    for number, row in enumerate(_rows(path, columns), 1):
      if None in row:
        raise ValueError(f'{path}, row {number} has more cells than the header.')
      found = [row.get(column) for column in columns]
      for column, text in zip(columns, found, strict=True):
        if column not in row:
          raise ValueError(f'{path}, row {number}: no column {column!r}; it has {sorted(row)}.')
        if not isinstance(text, str):
          raise ValueError(f'{path}, row {number}: column {column!r} holds no text: {text!r}.')
      yield tuple(found)
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, csv.Error) as error:
    raise ValueError(f'{path}, behind row {number}: {error}.') from error


def _rows(path, columns) -> Iterator[dict]:
  if path.suffix == '.parquet':
    yield from _parquet(path, columns)
    return
  with path.open('rb') as stream:
    file = io.TextIOWrapper(stream, 'utf-8-sig', newline='')
    if path.suffix == '.txt':
      yield from ({columns[0]: line.rstrip('\r\n')} for line in file)
    elif path.suffix == '.jsonl':
      yield from map(_object, filter(str.strip, file))
    else:
      csv.field_size_limit(2**30)  # contexts may be longer than csv's 128 KiB
      quoting = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE} if path.suffix == '.tsv' else {}
      cells = csv.reader(file, strict=True, **quoting)
      names = next(cells, [])
      for row in cells:
        if row or len(names) == 1:  # where there is but one column, a blank line is an empty text
          yield dict(itertools.zip_longest(names, row or ['']))


def _object(line: str) -> dict:
  row = json.loads(line)
  if not isinstance(row, dict):
    raise ValueError(f'a line must hold a JSON object, got {line[:40]!r}.')
  return row


def _parquet(path, columns) -> Iterator[dict]:
  from pyarrow import ArrowInvalid, parquet

  with path.open('rb') as file:
    try:
      table = parquet.ParquetFile(file)
    except ArrowInvalid as error:
      raise ValueError(f'{path} is no Parquet file: {error}.') from error
    names = [name for name in columns if name in table.schema_arrow.names]
    for batch in table.iter_batches(CHUNK, columns=names):
      yield from batch.to_pylist()


def answer_file(
  answer: Callable[[list], list], path, output, columns: Sequence[str], settings: dict
) -> int:
  """Writes a JSON line for each row of a file; returns how many.

  Lines go to `OUTPUT.part`, renamed at the end; begun again with the same settings it goes on.

  Args:
    answer: items -> a JSON value for each.
    path: see `read_items`.
    output: a .jsonl file that is not there yet.
    columns: of the texts.
    settings: whatever decides the answers, as JSON values.
  """
  if pathlib.Path(output).suffix != '.jsonl' or '://' in str(output):
    raise ValueError(f'the output must be a local file that ends in .jsonl, got {output}.')
  output, path = pathlib.Path(output), epath.Path(path)
  if output.exists():
    raise ValueError(f'{output} is there already; delete it or name another.')
  if not path.is_file():
    raise ValueError(f'no file {path}.')
  settings |= {'input': str(path), 'files': settings.get('files', []) + version(path)}
  part = output.with_name(output.name + '.part')
  done = _resume(part, settings)
  items = itertools.islice(read_items(path, columns), done, None)
  with part.open('ab') as file, tqdm.tqdm(initial=done, unit=' texts', disable=None) as bar:
    while chunk := list(itertools.islice(items, CHUNK)):
      lines = [json.dumps(value, ensure_ascii=False) + '\n' for value in answer(chunk)]
      file.write(''.join(lines).encode('utf-8', 'replace'))  # of lone surrogates
      file.flush()
      bar.update(len(chunk))
      done += len(chunk)
  part.replace(output)
  _plan(part).unlink()
  return done


def version(path) -> list:
  """[path, bytes, time of change] of a file, or of all of a local folder; [] of a hub's name."""
  path = epath.Path(path)
  files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
  stats = [(str(file), file.stat()) for file in files if file.is_file()]
  return [[name, stat.length, stat.mtime] for name, stat in stats]


def _plan(part: pathlib.Path) -> pathlib.Path:
  return part.with_name(part.name + '.json')


def _resume(part: pathlib.Path, settings: dict) -> int:
  """Checks what an earlier run began and cuts it to whole chunks; returns how many lines it has.

  Whole chunks, since only then do the same texts share batches and the lines are the same.
  """
  if not part.exists():
    part.parent.mkdir(parents=True, exist_ok=True)
    _plan(part).write_text(json.dumps(settings))
    return 0
  before = json.loads(_plan(part).read_text())
  names = sorted(settings.keys() | before.keys())
  differ = [name for name in names if settings.get(name) != before.get(name)]
  if differ:
    raise ValueError(
      f'{part} was begun with other settings ({", ".join(differ)}); delete it to start afresh.'
    )
  size = lines = whole = count = 0
  with part.open('rb+') as file:
    for line in file:
      size, lines = size + len(line), lines + line.endswith(b'\n')
      if line.endswith(b'\n') and lines % CHUNK == 0:
        whole, count = size, lines
    file.truncate(whole)
  return count
