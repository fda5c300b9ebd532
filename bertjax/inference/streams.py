"""Files of texts: read as a stream, answered in order, written so that a killed run resumes.

Memory does not grow with the file: `CHUNK` rows are read, answered and written at a time, with a
digest of the rows, so that a run also resumes after rows of its input were corrected: only their
chunks are answered again.
"""

import hashlib
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence

import tqdm
from etils import epath

from bertjax.data import tables

CHUNK = 1024  # rows; the more, the better they fall into batches of a length

_log = logging.getLogger(__name__)


def read_items(
  path, columns: Sequence[str], word_lists: bool = False, **reading
) -> Iterator[tuple[tuple, str]]:
  """Yields (texts, '') of each row of a table, or ((), why there are none); with `word_lists` a
  text may also be the list of its words, in .jsonl and .parquet.

  Raises:
    ValueError: see `data.tables.read_table`, which also has the options of `reading`.
  """
  for row in tables.read_table(path, columns, **reading):
    error = row.error or tables.text_problem(row.values, columns, blank=True, word_lists=word_lists)
    if error:
      yield (), f'{row.where}: {error}.'
    else:
      yield tuple(row.values[column] for column in columns), ''


def answer_file(
  answer: Callable[[list], list], path, output, columns: Sequence[str], settings: dict, **reading
) -> int:
  """Writes a JSON line for each row of a file; returns how many.

  A row without its texts gets the line {"error": ...}. Lines are kept in `OUTPUT.part` until the
  end, and as long as there are errors; a run that is started again with the same settings resumes.

  Args:
    answer: tuples of texts -> a JSON value for each.
    path: see `read_items`.
    output: a .jsonl file that does not exist, or has an `OUTPUT.part`.
    columns: of the texts.
    settings: whatever decides the answers, as JSON values.
    **reading: options of `read_items`.
  """
  check(path, output)
  output, path = pathlib.Path(output), epath.Path(path)
  part, fresh = _parts(output)
  output.parent.mkdir(parents=True, exist_ok=True)
  settings = settings | reading | {'input': str(path)}
  earlier, items = _earlier(part, settings), read_items(path, columns, **reading)
  done = errors = 0
  with fresh.open('wb') as file, tqdm.tqdm(unit=' texts', disable=None) as bar:
    file.write(json.dumps(settings).encode() + b'\n')
    while chunk := list(itertools.islice(items, CHUNK)):
      digest = hashlib.sha256(json.dumps(chunk).encode()).hexdigest()
      before, lines = next(earlier, ('', []))
      if not before and fresh.exists():  # it has all that the earlier part had
        fresh.replace(part)
      if before != digest:
        lines = _answer(answer, chunk)
      file.write(b''.join([*lines, b'#', digest.encode(), b'\n']))  # no JSON begins with #
      file.flush()
      bar.update(len(chunk))
      done, errors = done + len(chunk), errors + sum(x.startswith(b'{"error":') for x in lines)
  if fresh.exists():
    fresh.replace(part)
  with part.open('rb') as file, fresh.open('wb') as out:
    out.writelines(line for line in itertools.islice(file, 1, None) if not line.startswith(b'#'))
  fresh.replace(output)
  if errors:
    _log.warning(
      '%s: %d of %d lines are errors; correct these rows of %s and run the same command again: it '
      'keeps the other lines, which are in %s', output, errors, done, path, part,
    )  # fmt: skip
  else:
    part.unlink()
  return done


def check(path, output) -> None:
  """Raises ValueError if `answer_file` cannot read `path`, or would overwrite `output`."""
  if pathlib.Path(output).suffix != '.jsonl' or '://' in str(output):
    raise ValueError(f'the output must be a local file that ends in .jsonl, got {output}.')
  output = pathlib.Path(output)
  if output.exists() and not _parts(output)[0].exists():
    raise ValueError(f'{output} exists already; delete it or choose another --out.')
  if not epath.Path(path).is_file():
    raise ValueError(f'no file {path}.')


def _parts(output: pathlib.Path) -> list[pathlib.Path]:
  return [output.with_name(output.name + end) for end in ('.part', '.part.new')]


def _earlier(part: pathlib.Path, settings: dict) -> Iterator[tuple[str, list[bytes]]]:
  """The (digest, lines) of each complete chunk of an earlier run.

  Raises:
    ValueError: if it had other settings.
  """
  if not part.exists():
    return
  with part.open('rb') as file:
    before = json.loads(file.readline())
    names = sorted(settings.keys() | before.keys())
    differ = [name for name in names if settings.get(name) != before.get(name)]
    if differ:
      raise ValueError(
        f'{part} was begun with other settings ({", ".join(differ)}); delete it to start over.'
      )
    lines = []
    for line in file:
      if line.startswith(b'#'):
        yield line[1:-1].decode(), lines
        lines = []
      else:
        lines.append(line)


def _answer(answer: Callable[[list], list], chunk: list) -> list[bytes]:
  """The lines of a chunk."""
  found = iter(answer([texts for texts, error in chunk if not error]))
  values = [{'error': error} if error else next(found) for _, error in chunk]
  # 'replace', since lone surrogates have no UTF-8.
  return [(json.dumps(v, ensure_ascii=False) + '\n').encode('utf-8', 'replace') for v in values]


def version(path) -> list:
  """[path, bytes, time of change] of a file, or of all of a local folder; [] of a hub's name."""
  path = epath.Path(path)
  files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
  stats = [(str(file), file.stat()) for file in files if file.is_file()]
  return [[name, stat.length, stat.mtime] for name, stat in stats]
