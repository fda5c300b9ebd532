"""Documents from files, folders, globs, JSONL, TensorFlow Datasets, or the running Python itself.

A source is a string: a path (file, folder or glob; .gz, .bz2, .xz and .zst are decompressed), the
http(s) address of a file, `embedded`, `tfds:NAME[:VERSION][:SPLIT]` (`tfds:c4/en:train`), or
`hf:NAME[/CONFIG][:SPLIT][@REVISION]`, a data set of the Hugging Face hub; several are joined by
commas. The format says how a file is split into documents and sentences; it is stated, never
guessed:

  prose      one document per file, blank lines between paragraphs; sentences are split by rule
  google     one sentence per line, a blank line between documents (create_pretraining_data.py)
  wikitext   an article starts at a line ' = Title = '; one paragraph per line, tokens by spaces
  jsonl      one object per line, whose `text_key` is a document of prose
  parquet    one document of prose per row, in the column `text_key`; all *.parquet of a folder;
             `hf:` sources are Parquet, JSONL or prose, by the files' endings
  tfds       one document per example, whose `text_key` is prose

Files of any size are read with the memory of their longest document.
"""

import ast
import dataclasses
import io
import itertools
import json
import logging
import pathlib
import platform
import re
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from bertjax.data import files, sentences, tables

FORMATS = ('prose', 'google', 'wikitext', 'jsonl', 'parquet', 'tfds')

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Report:
  """Counts of what was read and what was wrong with it, for the manifest and the log."""

  files: int = 0
  documents: int = 0
  invalid_utf8: int = 0  # byte sequences that are invalid in the encoding of the text
  binary_skipped: int = 0
  bad_rows: int = 0
  finished = 0  # bytes of files that have been read
  file = None  # the one being read
  hint = ''  # the encoding that the first of them would have
  unmarked = False  # whether there is Thai or Lao prose, which has no sentence marks
  stripped = ''  # letters beyond Latin and Greek of which an uncased tokenizer drops a part

  def bytes_read(self) -> int:
    """Bytes read so far, of compressed files as stored."""
    reading = self.file and not self.file.closed
    return self.finished + (self.file.tell() if reading else 0)

  def warn(self, lowercase: bool = False) -> None:
    """Logs what was wrong with the text, or is with an uncased tokenizer."""
    for wrong, warning in (
      (lowercase and self.stripped,
       f'an uncased tokenizer also drops marks that are part of letters, as in {self.stripped} of '
       'this text; keep them with --config.data.lowercase=False (vocab: --lowercase=false).'),
      (self.invalid_utf8, f'{self.invalid_utf8} invalid byte sequences were replaced by U+FFFD' + (
        self.hint or '; if the text is not in UTF-8, name its encoding (data.encoding).')),
      (self.binary_skipped, f'{self.binary_skipped} binary files were skipped{self.hint or "."}'),
      (self.bad_rows, f'{self.bad_rows} rows without a text were skipped.'),
    ):  # fmt: skip
      if wrong:
        _log.warning(warning)
    if self.unmarked:
      _log.info('Thai and Lao mark no ends of sentences: a blank after 40 characters ends one.')


def read_documents(
  source: str, format: str = 'prose', *, text_key: str = 'text', binary: str = 'refuse',
  encoding: str = 'utf-8', on_bad_row: str = 'stop', report: Report | None = None,
) -> Iterator[str]:  # fmt: skip
  """Yields the text of each document that is not blank, in a fixed order.

  Args:
    source: see the module's text.
    format: one of `FORMATS`; `tfds:` sources and `embedded` are prose.
    text_key: field of the text in JSONL objects and TFDS examples, column in Parquet.
    binary: 'refuse' raises at a binary file, 'skip' counts it.
    encoding: of text files, by Python's name.
    on_bad_row: 'stop' raises at a row of JSONL or Parquet that has no text, 'skip' counts it.
    report: counts are added here.

  Raises:
    ValueError: for an unknown format or encoding, a missing path, a folder without files, a binary
      file, a broken JSON line or a missing text, with the file and the line.
  """
  report = Report() if report is None else report
  for name, value, choices in (
    ('binary', binary, ('refuse', 'skip')),
    ('on_bad_row', on_bad_row, ('stop', 'skip')),
  ):
    if value not in choices:
      raise ValueError(f'data.{name} must be one of {choices}, got {value!r}.')
  files.check_encoding(encoding)
  for shard, kind in list_shards(source, format):
    for _, text in read_shard(
      shard, kind, text_key=text_key, binary=binary, encoding=encoding, on_bad_row=on_bad_row,
      report=report,
    ):  # fmt: skip
      yield text


def list_shards(source: str, format: str) -> Iterator[tuple[Any, str]]:
  """Yields (part, format) of each part of a source that `read_shard` reads: the path of a file, or
  the name of a TFDS split or of `embedded`."""
  if format not in FORMATS:
    raise ValueError(f'data.format must be one of {FORMATS}, got {format!r}.')
  parts = files.split_source(source)
  if not parts:
    raise ValueError(
      'data.input is empty: name a file, a folder, a glob, tfds:NAME, hf:NAME or embedded '
      '(--config.data.input=PATH).'
    )
  for part in parts:
    own = part == 'embedded' or part.startswith(('tfds:', 'hf:'))
    if own and format in ('google', 'wikitext'):
      raise ValueError(f'{part} holds prose, but data.format={format}; leave it prose.')
    if part == 'embedded' or part.startswith('tfds:'):
      yield part, format
    else:
      paths = files.list_files(part, '.parquet' if format == 'parquet' else '')
      yield from ((path, _hub_format(path) if own else format) for path in paths)


def _hub_format(path) -> str:
  """The format of a file of the hub, by its ending."""
  kinds = {'.parquet': 'parquet', '.jsonl': 'jsonl', '.json': 'jsonl', '.txt': 'prose'}
  kind = next((kinds[ending] for ending in path.suffixes if ending in kinds), '')
  if not kind:
    raise ValueError(
      f'{path}: text of the hub is read from Parquet, JSONL or .txt files; name the copy that the '
      'hub made, hf:NAME[/CONFIG]:SPLIT@refs/convert/parquet.'
    )
  return kind


def read_shard(
  part, format: str, *, text_key: str, binary: str, encoding: str, on_bad_row: str,
  report: Report, skip: int = 0,
) -> Iterator[tuple[int, str]]:  # fmt: skip
  """Yields (number, text) of each document of a shard that is not blank.

  Args:
    part: of `list_shards`, with its format.
    skip: number of the record (a line of JSONL, a row of Parquet, else a document) to start after;
      records before it are not parsed.

  The other arguments are those of `read_documents`.
  """
  if part == 'embedded':
    texts = itertools.islice(enumerate(embedded_documents(), 1), skip, None)
  elif (name := str(part)).startswith('tfds:'):
    examples = _tfds(name.removeprefix('tfds:'), text_key, report)
    texts = itertools.islice(enumerate(examples, 1), skip, None)
  else:
    texts = _file(epath.Path(part), format, text_key, binary, encoding, on_bad_row, report, skip)
  for number, text in texts:
    if text.strip():
      report.documents += 1
      if format not in ('google', 'wikitext'):
        report.unmarked = report.unmarked or sentences.is_unmarked(text[:1000])
      report.stripped = report.stripped or _stripped(text[:1000])
      yield number, text


def _stripped(text: str) -> str:
  """Some letters beyond Latin and Greek that lose a mark with the accents (Thai and Indic vowels,
  Cyrillic, kana), or '' if they are under 1% of the text."""
  if text.isascii():
    return ''
  split = unicodedata.normalize('NFD', text)
  marked = [
    unicodedata.normalize('NFC', letter + mark)
    for letter, mark in itertools.pairwise(split)
    if letter >= '\u0400' and unicodedata.category(mark) == 'Mn'
  ]
  return ', '.join(dict.fromkeys(marked[:3])) if len(marked) > 0.01 * len(split) else ''


def split_document(text: str, format: str) -> list[str]:
  """Splits a document of `read_documents` into sentences, none of them blank."""
  if format == 'google':
    pieces = text.split('\n')
  elif format == 'wikitext':  # punctuation marks are separate tokens: ' . ' ends a sentence
    pieces = re.split(r'(?<=\s[.?!。？！])\s|\n', text)
  else:
    pieces = sentences.split_prose(text)
  return [piece for piece in map(str.strip, pieces) if piece]


def _file(path, format, text_key, binary, encoding, on_bad_row, report: Report, skip: int):
  """The numbered texts of a file; see `read_shard`."""
  if format == 'parquet':
    report.files += 1
    rows = tables.parquet_rows(path, [text_key], hint=' (data.text_key)', skip=skip)
    yield from _row_texts(rows, text_key, path, on_bad_row, report)
    report.finished += path.stat().length
    return
  with files.open_text(path, encoding) as stream:
    if problem := files.not_text(stream, encoding):
      if binary == 'refuse':
        raise ValueError(f'{path} is {problem}')
      report.binary_skipped += 1
      report.hint = report.hint or f', {path} among them: it is {problem}'
      return
    report.files += 1
    replaced, report.file = stream.errors == 'replace', stream.buffer.raw.file
    if format == 'jsonl':
      rows = tables.json_rows(stream, skip)
      yield from _row_texts(rows, text_key, path, on_bad_row, report, replaced)
    else:
      documents = itertools.islice(enumerate(_documents(stream, format), 1), skip, None)
      yield from ((number, _valid(text, report, replaced)) for number, text in documents)
  report.finished += path.stat().length


def _documents(stream: io.TextIOWrapper, format: str) -> Iterable[str]:
  """Splits a file into documents as it is read, with one of them in memory at a time."""
  if format == 'prose':
    text = stream.read()
    return [text if '\n' in text else text.replace('\r', '\n')]
  lines = (line[:-1] + '\n' if line.endswith('\r') else line for line in stream)
  if format == 'google':
    groups = itertools.groupby(lines, key=str.isspace)
    return (''.join(group).removesuffix('\n') for blank, group in groups if not blank)
  if format == 'wikitext':
    return _articles(lines)
  raise ValueError("data.format=tfds goes with data.input=tfds:NAME, got a path: use 'prose'.")


def _valid(text: str, report: Report, replaced: bool = False) -> str:
  """Puts U+FFFD for bytes that were invalid and for halves of surrogate pairs, which JSON can spell
  ('\\ud800'); counts them, and those that the decoder `replaced`."""
  if text.isascii():
    return text
  bad = re.search('[\ud800-\udfff]', text)
  if bad:
    if not report.hint:
      sample = re.sub('[\ud800-\udc7f\udd00-\udfff]', '', text[bad.start() : bad.start() + 4000])
      guess = files.guess_encoding(sample.encode('utf-8', 'surrogateescape'))
      report.hint = guess and f'; the text looks like {guess}: {files.how_to_name(guess)}'
    report.invalid_utf8 -= 0 if replaced else text.count('\ufffd')
    text = re.sub(
      '[\udc80-\udcff]+',
      lambda match: match[0].encode('utf-8', 'surrogateescape').decode('utf-8', 'replace'), text,
    )  # fmt: skip
    text = re.sub('[\ud800-\udfff]', '\ufffd', text)
  if bad or replaced:
    report.invalid_utf8 += text.count('\ufffd')
  return text


def _articles(lines: Iterable[str]) -> Iterator[str]:
  article = []
  for line in lines:
    if re.match(r' = [^=\n].* = \s*$', line):
      yield ''.join(article)
      article = []
    article.append(line)
  yield ''.join(article)


def _row_texts(rows, text_key: str, path, on_bad_row, report, replaced=False):
  """(number, text) of numbered rows; a row without a text is counted in the report, or raises."""
  for number, row in rows:
    text = row.get(text_key) if isinstance(row, dict) else None
    if isinstance(text, str):
      yield number, _valid(text, report, replaced)
    elif on_bad_row == 'skip':
      report.bad_rows += 1
    elif isinstance(row, Exception):
      raise ValueError(f'{path}:{number}: not a JSON object ({row}).') from row
    else:
      if isinstance(row, dict) and text_key in row:
        what = f' but {json.dumps(text, default=str)[:60]}'
      else:
        what = f'; the line has {sorted(row) if isinstance(row, dict) else type(row).__name__}'
      raise ValueError(
        f'{path}:{number}: no text under data.text_key={text_key!r}{what}. Mend the line, or skip '
        'and count such lines (--config.data.on_bad_row=skip; vocab: --on_bad_row=skip).'
      )


def tfds_shards(source: str) -> list[str]:
  """The parts of a `tfds:` source, one for each of its files unless it names a part of a split."""
  name, split = _split_name(source.removeprefix('tfds:'))
  infos = tables.open_tfds(name, split)[0].info.splits
  if split not in list(infos):
    return [source]
  return [f'tfds:{name}:{split}[{i}shard]' for i in range(infos[split].num_shards)]


def _split_name(name: str) -> tuple[str, str]:
  """Name and split of `NAME[:VERSION][:SPLIT]`, or of a folder that TFDS wrote, `/path[:SPLIT]`."""
  name, split = re.fullmatch(r'((?:\w+://)?[^:]*(?::\d[\d.]*)?)(?::(.*))?', name).groups()
  return name, split or 'train'


def _tfds(name: str, text_key: str, report: Report) -> Iterator[str]:
  """Documents of a TFDS source without its prefix."""
  name, split = _split_name(name)
  _, examples = tables.open_tfds(name, split)
  import tensorflow as tf

  fields = examples.element_spec if isinstance(examples.element_spec, dict) else {}
  texts = sorted(key for key, spec in fields.items() if spec == tf.TensorSpec([], tf.string))
  if text_key not in texts:
    raise ValueError(f'tfds:{name} has no text under data.text_key={text_key!r}; it has {texts}.')
  for example in examples.as_numpy_iterator():
    text = example[text_key].decode('utf-8', errors='replace')
    report.invalid_utf8 += text.count('\ufffd') - example[text_key].count(b'\xef\xbf\xbd')
    yield text


def embedded_documents() -> Iterator[str]:
  """English that every Python carries: the language reference and the library's docstrings.

  One document for each topic of `pydoc_data.topics` and for each module of the standard library
  with at least 1,000 characters of docstrings. Sources are parsed, never imported.
  """
  library = pathlib.Path(sysconfig.get_paths()['stdlib'])
  skipped = {'test', 'tests', 'site-packages', 'pydoc_data', 'idle_test'}
  tree = ast.parse((library / 'pydoc_data' / 'topics.py').read_text('utf-8'))
  topics = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict))
  yield from (_drop_rulers(ast.literal_eval(value)) for value in topics.values)
  for path in sorted(library.rglob('*.py'), key=str):
    if not skipped.isdisjoint(path.relative_to(library).parts):
      continue
    try:
      tree = ast.parse(path.read_text('utf-8'))
    except (SyntaxError, ValueError):  # files of another encoding or Python
      continue
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    text = '\n\n'.join(doc for doc in docs if doc)
    if len(text) >= 1000:
      yield _drop_rulers(text)


def _drop_rulers(text: str) -> str:
  """Drops rulers under headings, which would be learnt as words."""
  return re.sub(r'(?m)^\s*([*=~^"+#-])\1{2,}\s*$', '', text)


def list_source(source: str) -> list[tuple[str, int, float]]:
  """(name, bytes, time of change) of all that a source reads; bytes are 0 for what is no file."""
  listing = []
  for part in files.split_source(source):
    path = part
    if part == 'embedded':
      listing.append((f'Python {platform.python_version()}', 0, 0))
      continue
    if part.startswith('tfds:'):
      listing.append((part, 0, 0))  # with its version and split
      path = part.removeprefix('tfds:').partition(':')[0]
    if path == part or epath.Path(path).is_dir():
      stats = [(str(p), p.stat()) for p in files.list_files(path)]
      listing += [(name, stat.length, stat.mtime) for name, stat in stats]
  return listing
