"""Documents from files, folders, globs, JSONL, TensorFlow Datasets, or the running Python itself.

A source is a string: a path (file, folder or glob; .gz, .bz2, .xz and .zst are decompressed),
`embedded`, or `tfds:NAME[:VERSION][:SPLIT]` (`tfds:c4/en:train`); several are joined by commas. The
format says how a file falls into documents and sentences and is named, never guessed:

  prose      one file a document, blank lines between paragraphs; sentences are split by rule
  google     a sentence a line, a blank line between documents (create_pretraining_data.py)
  wikitext   an article starts at a line ' = Title = ', a paragraph a line, tokens by spaces
  jsonl      an object a line, its `text_key` is a document of prose
  parquet    a row a document of prose, in the column `text_key`; of a folder, all *.parquet
  tfds       an example a document, its `text_key` is prose

Files of any size are read in the memory that their longest document needs.
"""

import ast
import bz2
import codecs
import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import json
import logging
import lzma
import pathlib
import platform
import re
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from bertjax import io as io_lib
from bertjax.data import sentences

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
    if lowercase and self.stripped:
      _log.warning(
        'an uncased tokenizer also drops marks that are part of letters, as in %s of this text; '
        'keep them with --config.data.lowercase=False (vocab: --lowercase=false).', self.stripped,
      )  # fmt: skip
    if self.unmarked:
      _log.info(
        'Thai and Lao mark no ends of sentences: a blank between two letters ends one of 40 '
        'characters or more.'
      )
    if self.invalid_utf8:
      _log.warning(
        '%d invalid byte sequences were replaced by U+FFFD%s', self.invalid_utf8,
        self.hint or '; if the text is not in UTF-8, name its encoding (data.encoding).',
      )  # fmt: skip
    if self.binary_skipped:
      _log.warning('%d binary files were skipped%s', self.binary_skipped, self.hint or '.')
    if self.bad_rows:
      _log.warning('%d rows without a text were skipped.', self.bad_rows)


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
  if format not in FORMATS:
    raise ValueError(f'data.format must be one of {FORMATS}, got {format!r}.')
  if binary not in ('refuse', 'skip'):
    raise ValueError(f"data.binary must be 'refuse' or 'skip', got {binary!r}.")
  if on_bad_row not in ('stop', 'skip'):
    raise ValueError(f"data.on_bad_row must be 'stop' or 'skip', got {on_bad_row!r}.")
  check_encoding(encoding)
  parts = split_source(source)
  if not parts:
    raise ValueError(
      'data.input is empty: name a file, a folder, a glob, tfds:NAME or embedded '
      '(--config.data.input=PATH).'
    )
  for part in parts:
    own = part == 'embedded' or part.startswith('tfds:')
    if own and format in ('google', 'wikitext'):
      raise ValueError(f'{part} holds prose, but data.format={format}; leave it prose.')
    if part == 'embedded':
      texts = embedded_documents()
    elif part.startswith('tfds:'):
      texts = _tfds(part.removeprefix('tfds:'), text_key, report)
    else:
      texts = _files(part, format, text_key, binary, encoding, on_bad_row, report)
    for text in texts:
      if text.strip():
        report.documents += 1
        if format not in ('google', 'wikitext'):
          report.unmarked = report.unmarked or sentences.is_unmarked(text[:1000])
        report.stripped = report.stripped or _stripped(text[:1000])
        yield text


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


def split_source(source: str) -> list[str]:
  """The sources joined by commas; an existing path with commas is one source."""
  if source.strip() and epath.Path(source).exists():
    return [source]
  return [part.strip() for part in source.split(',') if part.strip()]


def split_document(text: str, format: str) -> list[str]:
  """Splits a document of `read_documents` into sentences, none of them blank."""
  if format == 'google':
    pieces = text.split('\n')
  elif format == 'wikitext':  # punctuation marks are separate tokens: ' . ' ends a sentence
    pieces = re.split(r'(?<=\s[.?!。？！])\s|\n', text)
  else:
    pieces = sentences.split_prose(text)
  return [piece for piece in map(str.strip, pieces) if piece]


def _files(pattern, format, text_key, binary, encoding, on_bad_row, report: Report):
  for path in list_files(pattern, '.parquet' if format == 'parquet' else ''):
    if format == 'parquet':
      report.files += 1
      rows = parquet_rows(path, [text_key], hint=' (data.text_key)')
      yield from _row_texts(rows, text_key, path, on_bad_row, report)
      report.finished += path.stat().length
      continue
    with open_bytes(path) as stream:
      head = stream.read(8192)
    if problem := _not_text(head, encoding):
      if binary == 'refuse':
        raise ValueError(f'{path} is {problem}')
      report.binary_skipped += 1
      report.hint = report.hint or f', {path} among them: it is {problem}'
      continue
    report.files += 1
    with open_text(path, encoding, head) as stream:
      replaced, report.file = stream.errors == 'replace', stream.buffer.raw.file
      if format == 'jsonl':
        rows = json_rows(stream)
        yield from _row_texts(rows, text_key, path, on_bad_row, report, replaced)
      else:
        yield from (_valid(text, report, replaced) for text in _documents(stream, format))
    report.finished += path.stat().length


def list_files(pattern: str, suffix: str = '') -> list[epath.Path]:
  """The files of a path, folder (all levels, hidden ones left out) or glob, sorted by name.

  Args:
    pattern: path, folder or glob.
    suffix: of a folder, only files with this suffix, in any case.
  """
  path = epath.Path(pattern)
  if path.is_dir():
    files = [p for p in _walk(path) if not suffix or p.suffix.lower() == suffix]
    if not files:
      raise ValueError(f'data.input: the folder {pattern} holds no {f"{suffix} ".lstrip()}files.')
    return files
  if path.is_file():
    return [path]
  matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob wants a folder)
  files = [p for p in map(epath.Path, matches) if p.is_file()]
  if not files:
    raise ValueError(f'data.input: no such file or folder, and no match of the glob: {pattern}')
  return files


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir(), key=str):
    if path.name.startswith('.'):
      continue
    if path.is_dir():
      yield from _walk(path)
    else:
      yield path


def _zstd(file):
  import pyarrow as pa

  return pa.CompressedInputStream(pa.PythonFile(file, 'r'), 'zstd')


_DECOMPRESS = {'.gz': gzip.open, '.bz2': bz2.BZ2File, '.xz': lzma.LZMAFile, '.zst': _zstd}


class _Raw(io.RawIOBase):
  """Anything with `read` as a raw stream of Python."""

  def __init__(self, stream, file):
    self._read, self.file = stream.read, file

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    data = self._read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


@contextlib.contextmanager
def open_bytes(path: epath.Path) -> Iterator[io.BufferedReader]:
  """Opens a file for reading, decompressed if it ends in .gz, .bz2, .xz or .zst (in any case).

  Raises:
    ValueError: within the context, where the compressed data are corrupt or truncated.
  """
  suffix = path.suffix.lower()
  with path.open('rb') as file:
    try:
      stream = _DECOMPRESS[suffix](file) if suffix in _DECOMPRESS else file
      yield io.BufferedReader(_Raw(stream, file), 2**16)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
      if suffix not in _DECOMPRESS or getattr(error, 'errno', None):
        raise
      raise ValueError(f'{path} is not a complete {suffix} file: {error}.') from error


@contextlib.contextmanager
def open_text(
  path: epath.Path, encoding: str = 'utf-8', head: bytes = b''
) -> Iterator[io.TextIOWrapper]:
  """Opens a text file, decompressed; a byte order mark is dropped.

  Lines end in LF (a CR before it stays), or in CR if `head` has no LF. Bytes that are invalid in
  UTF-8 become lone surrogates ('surrogateescape'), in other encodings U+FFFD.
  """
  utf8 = codecs.lookup(encoding).name == 'utf-8'
  start = _decode_head(head, encoding)
  newline = '\r' if '\r' in start and '\n' not in start else '\n'
  with open_bytes(path) as stream:
    yield io.TextIOWrapper(
      stream, 'utf-8-sig' if utf8 else encoding, 'surrogateescape' if utf8 else 'replace', newline
    )


def check_encoding(encoding: str) -> None:
  try:
    ''.encode(encoding)
  except LookupError:
    raise ValueError(
      f'data.encoding={encoding!r} is no text encoding of Python; utf-8, utf-16, gb18030, big5, '
      'shift_jis, euc-kr, cp1251 and latin-1 are some.'
    ) from None


def _decode_head(head: bytes, encoding: str, errors: str = 'replace') -> str:
  """Decodes the beginning of a file, which may end within a character."""
  return codecs.getincrementaldecoder(encoding)(errors).decode(head)


def _not_text(head: bytes, encoding: str) -> str:
  """What a file is, and what to do, if its first bytes are not text in the encoding; else ''.

  Text is what has few control characters and few invalid bytes: one NUL byte is no harm, and
  Latin-1 prose, mostly ASCII, is read with its invalid bytes counted.
  """
  text = _decode_head(head, encoding)
  odd = sum(c == '\ufffd' or (c < ' ' and c not in '\t\n\r\f\v\b\x1b') for c in text)
  if odd <= 0.3 * len(head):
    return ''
  if head.startswith(b'PAR1'):
    return 'a Parquet file; pass --config.data.format=parquet (vocab: --format=parquet).'
  if guess := guess_encoding(head):
    return f'not {encoding.upper()} text; it looks like {guess}: {_name_it(guess)}'
  return 'a binary file, not text; remove it, or pass --config.data.binary=skip.'


def _name_it(encoding: str) -> str:
  return f'pass --config.data.encoding={encoding} (vocab: --encoding={encoding}).'


_CHINESE, _JAPANESE, _RUSSIAN = (
  '，。的一是不了在人有我他',
  'のにはをたがでてと、。し',
  'оеаинтсрвлкмд',
)
_FREQUENT = {  # encodings, and letters that are frequent in text of their languages
  'gb18030': _CHINESE + '这', 'big5': _CHINESE + '這', 'shift_jis': _JAPANESE, 'euc_jp': _JAPANESE,
  'euc_kr': '이다는에의을가고하지은로', 'cp1251': _RUSSIAN, 'koi8_r': _RUSSIAN,
  'cp1252': 'éèàäöüßñçóíáâêôåøæ’“”', 'cp1253': 'αοιετσνρηυκπ', 'cp1256': 'اليمونتربده',
  'cp1255': 'יוהלאתרבמש', 'cp874': 'าอนกรเงมยลวด',
}  # fmt: skip


def guess_encoding(data: bytes) -> str:
  """The likely encoding of bytes that are not UTF-8, by Python's name, or ''."""
  for mark, name in ((codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF16_LE, 'utf-16'),
                     (codecs.BOM_UTF16_BE, 'utf-16')):  # fmt: skip
    if data.startswith(mark):
      return name
  for first, name in ((0, 'utf-16-be'), (1, 'utf-16-le')):
    if data[first::2].count(0) > 0.4 * len(data) / 2 and data[1 - first :: 2].count(0) < 9:
      text = _decode_head(data, name)
      return '' if any(c < ' ' and not c.isspace() for c in text) else name
  scores = {}
  for name, frequent in _FREQUENT.items():
    with contextlib.suppress(UnicodeDecodeError):
      text = _decode_head(data, name, 'strict')
      other = [c for c in text if not c.isascii()]
      score = sum(c in frequent for c in other) / max(len(other), 1)
      if name[:3] in ('cp1', 'cp8', 'koi'):  # any bytes decode; Latin text has few such letters
        share = sum(map(str.isalpha, other)) / max(sum(map(str.isalpha, text)), 1)
        score *= 1 - share if name == 'cp1252' else share
      scores[name] = score
  best = max(scores, key=scores.get, default='')
  return best if best and scores[best] > 0.12 else ''


def _documents(stream: io.TextIOWrapper, format: str) -> Iterable[str]:
  """Cuts a file into documents as it is read: no more than one of them is held in memory."""
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
      guess = guess_encoding(sample.encode('utf-8', 'surrogateescape'))
      report.hint = guess and f'; the text looks like {guess}: {_name_it(guess)}'
    report.invalid_utf8 -= 0 if replaced else text.count('\ufffd')
    text = re.sub('[\udc80-\udcff]+', _replace_bytes, text)
    text = re.sub('[\ud800-\udfff]', '\ufffd', text)
  if bad or replaced:
    report.invalid_utf8 += text.count('\ufffd')
  return text


def _replace_bytes(match: re.Match) -> str:
  return match[0].encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')


def _articles(lines: Iterable[str]) -> Iterator[str]:
  article = []
  for line in lines:
    if re.match(r' = [^=\n].* = \s*$', line):
      yield ''.join(article)
      article = []
    article.append(line)
  yield ''.join(article)


def json_rows(lines: Iterable[str]) -> Iterator[tuple]:
  """(number, value) of each line that is not blank; an exception for a line that is not JSON."""
  for number, line in enumerate(lines, 1):
    if not line.isspace():
      try:
        yield number, json.loads(line)
      except (ValueError, RecursionError) as error:  # of the syntax, a huge number, or the depth
        yield number, error


def parquet_rows(
  path: epath.Path, columns: Sequence[str], optional: Sequence[str] = (), hint: str = ''
) -> Iterator[tuple[int, dict]]:
  """(number, {column: value}) of each row, read in batches; invalid bytes of a text become lone
  surrogates. For the arguments see `find_columns`."""
  import pyarrow as pa
  from pyarrow import parquet

  with path.open('rb') as file:
    try:
      table = parquet.ParquetFile(file)
      names = [*find_columns(table.schema_arrow.names, columns, optional, str(path), hint)]
      number = itertools.count(1)
      for batch in table.iter_batches(1024, columns=names):
        values = [_values(batch.column(name)) for name in names]
        for row in zip(*values, strict=True):
          yield next(number), dict(zip(names, row, strict=True))
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


def _row_texts(rows, text_key: str, path, on_bad_row, report, replaced=False) -> Iterator[str]:
  """The texts of numbered rows; a row without one is counted in the report, or raises."""
  for number, row in rows:
    text = row.get(text_key) if isinstance(row, dict) else None
    if isinstance(text, str):
      yield _valid(text, report, replaced)
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


def _tfds(name: str, text_key: str, report: Report) -> Iterator[str]:
  """Documents of `NAME[:VERSION][:SPLIT]`, or of a folder that TFDS wrote, `/path[:SPLIT]`."""
  name, split = re.fullmatch(r'((?:\w+://)?[^:]*(?::\d[\d.]*)?)(?::(.*))?', name).groups()
  _, examples = open_tfds(name, split or 'train')
  import tensorflow as tf

  fields = examples.element_spec if isinstance(examples.element_spec, dict) else {}
  texts = sorted(key for key, spec in fields.items() if spec == tf.TensorSpec([], tf.string))
  if text_key not in texts:
    raise ValueError(f'tfds:{name} has no text under data.text_key={text_key!r}; it has {texts}.')
  for example in examples.as_numpy_iterator():
    text = example[text_key].decode('utf-8', errors='replace')
    report.invalid_utf8 += text.count('\ufffd') - example[text_key].count(b'\xef\xbf\xbd')
    yield text


def open_tfds(name: str, split: str):
  """The builder and the examples, in order, of a TFDS data set or of a folder that TFDS wrote.

  Raises:
    ValueError: if there is no such data set, version or split.
  """
  instead = 'write the data as .jsonl or .parquet files'
  tfds = io_lib.import_tensorflow(f'tfds:{name}', instead, 'tensorflow_datasets')
  try:
    if epath.Path(name).is_dir():
      builder = tfds.builder_from_directory(name)
    else:
      builder = tfds.builder(name)
      builder.download_and_prepare()
    config = tfds.ReadConfig(interleave_cycle_length=1)
    return builder, builder.as_dataset(split=split, read_config=config)
  except Exception as error:  # TFDS has a family of its own for names, versions and splits
    raise ValueError(f'tfds:{name}: {str(error).strip().splitlines()[0]}') from error


def embedded_documents() -> Iterator[str]:
  """English that every Python carries: the language reference and the library's docstrings.

  One document for each topic of `pydoc_data.topics` and for each module of the standard library
  with at least 1,000 characters of docstrings. Sources are parsed, never imported.
  """
  library = pathlib.Path(sysconfig.get_paths()['stdlib'])
  topics = ast.parse((library / 'pydoc_data' / 'topics.py').read_text('utf-8'))
  for node in ast.walk(topics):
    if isinstance(node, ast.Dict):
      yield from (_plain(ast.literal_eval(value)) for value in node.values)
      break
  for path in sorted(library.rglob('*.py'), key=str):
    if {'test', 'tests', 'site-packages', 'pydoc_data', 'idle_test'} & set(
      path.relative_to(library).parts
    ):
      continue
    try:
      tree = ast.parse(path.read_text('utf-8'))
    except (SyntaxError, ValueError):  # files of another encoding or Python
      continue
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    text = '\n\n'.join(doc for doc in docs if doc)
    if len(text) >= 1000:
      yield _plain(text)


def _plain(text: str) -> str:
  """Drops rulers under headings, which would be learnt as words."""
  return re.sub(r'(?m)^\s*([*=~^"+#-])\1{2,}\s*$', '', text)


def list_source(source: str) -> list[tuple[str, int, float]]:
  """(name, bytes, time of change) of all that a source reads; bytes are 0 for what is no file."""
  files = []
  for part in split_source(source):
    if part == 'embedded':
      files.append((f'Python {platform.python_version()}', 0, 0))
      continue
    path = part.removeprefix('tfds:').partition(':')[0] if part.startswith('tfds:') else part
    if path != part:
      files.append((part, 0, 0))  # with its version and split
    if path == part or epath.Path(path).is_dir():
      stats = [(str(p), p.stat()) for p in list_files(path)]
      files += [(name, stat.length, stat.mtime) for name, stat in stats]
  return files
