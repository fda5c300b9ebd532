"""Documents from files, folders, globs, JSONL, TensorFlow Datasets, or the running Python itself.

A source is a string: a path (file, folder or glob; `.gz` is decompressed), `embedded`, or
`tfds:NAME[:VERSION][:SPLIT]` (`tfds:c4/en:train`); several are joined by commas. The format says
how a file falls into documents and sentences and is named, never guessed:

  prose      one file a document, blank lines between paragraphs; sentences are split by rule
  google     a sentence a line, a blank line between documents (create_pretraining_data.py)
  wikitext   an article starts at a line ' = Title = ', a paragraph a line, tokens by spaces
  jsonl      an object a line, its `text_key` is a document of prose
  tfds       an example a document, its `text_key` is prose

Files of any size are read in the memory that their longest document needs.
"""

import ast
import codecs
import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import json
import logging
import pathlib
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator

from etils import epath

from bertjax.data import sentences

FORMATS = ('prose', 'google', 'wikitext', 'jsonl', 'tfds')

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Report:
  """What reading met: counts, for the manifest and for one line at the end."""

  files: int = 0
  documents: int = 0
  invalid_utf8: int = 0
  binary_skipped: int = 0

  def tell(self) -> None:
    if self.invalid_utf8:
      _log.warning('%d invalid UTF-8 sequences were replaced by U+FFFD.', self.invalid_utf8)
    if self.binary_skipped:
      _log.warning('%d binary files were skipped.', self.binary_skipped)


def read_documents(
  source: str, format: str = 'prose', *, text_key: str = 'text', binary: str = 'refuse',
  report: Report | None = None,
) -> Iterator[str]:  # fmt: skip
  """Yields the text of each document that is not blank, in a fixed order.

  Args:
    source: see the module's text.
    format: one of `FORMATS`; `tfds:` sources and `embedded` are prose.
    text_key: field of the text in JSONL objects and TFDS examples.
    binary: 'refuse' raises at a binary file, 'skip' counts it.
    report: counts are added here.

  Raises:
    ValueError: for an unknown format, a missing path, a folder without files, a binary file, a
      broken JSON line or a missing key, with the file and the line.
  """
  report = Report() if report is None else report
  if format not in FORMATS:
    raise ValueError(f'data.format must be one of {FORMATS}, got {format!r}.')
  if binary not in ('refuse', 'skip'):
    raise ValueError(f"data.binary must be 'refuse' or 'skip', got {binary!r}.")
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
      texts = _files(part, format, text_key, binary, report)
    for text in texts:
      if text.strip():
        report.documents += 1
        yield text


def split_source(source: str) -> list[str]:
  """The sources joined by commas; a path that exists as it stands is one source."""
  if source.strip() and epath.Path(source).exists():
    return [source]
  return [part.strip() for part in source.split(',') if part.strip()]


def split_document(text: str, format: str) -> list[str]:
  """Splits a document of `read_documents` into sentences, none of them blank."""
  if format == 'google':
    pieces = text.split('\n')
  elif format == 'wikitext':  # punctuation stands by itself: ' . ' ends a sentence
    pieces = re.split(r'(?<=\s[.?!。？！])\s|\n', text)
  else:
    pieces = sentences.split_prose(text)
  return [piece for piece in map(str.strip, pieces) if piece]


def _files(pattern: str, format: str, text_key: str, binary: str, report: Report):
  for path in list_files(pattern):
    with _open(path) as stream:
      head = stream.read(8192)
      if _is_binary(head):
        if binary == 'refuse':
          raise ValueError(
            f'{path} is a binary file, not text; remove it, or pass --config.data.binary=skip.'
          )
        report.binary_skipped += 1
        continue
      report.files += 1
      stream.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
      yield from _documents(stream, format, text_key, path, report)


def list_files(pattern: str) -> list[epath.Path]:
  """The files of a path, folder (all levels, hidden ones left out) or glob, sorted by name."""
  path = epath.Path(pattern)
  if path.is_dir():
    files = list(_walk(path))
    if not files:
      raise ValueError(f'data.input: the folder {pattern} holds no files.')
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


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[io.BufferedIOBase]:
  """Opens a file for reading, decompressed if it ends in `.gz`; names it where it is damaged."""
  with path.open('rb') as file:
    try:
      yield io.BufferedReader(gzip.GzipFile(fileobj=file)) if path.suffix == '.gz' else file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
      raise ValueError(f'{path} is not a whole gzip file: {error}.') from error


def _is_binary(head: bytes) -> bool:
  """A NUL byte, or mostly bytes that are neither text nor UTF-8 (Latin-1 prose stays text)."""
  return b'\0' in head or head.decode('utf-8', 'replace').count('\ufffd') > 0.3 * max(len(head), 1)


def _documents(stream, format: str, text_key: str, path, report: Report) -> Iterable[str]:
  """Cuts a file into documents as it is read: no more than one of them is held in memory."""
  if format == 'prose':
    return [_decode(stream.read(), report)]
  lines = (_decode(line, report) for line in stream)
  if format == 'google':
    groups = itertools.groupby(lines, key=str.isspace)
    return (''.join(group).removesuffix('\n') for blank, group in groups if not blank)
  if format == 'wikitext':
    return _articles(lines)
  if format == 'jsonl':
    return _jsonl(lines, text_key, path, report)
  raise ValueError("data.format=tfds goes with data.input=tfds:NAME, got a path: use 'prose'.")


def _decode(data: bytes, report: Report) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError:
    text = data.decode(errors='replace')
    report.invalid_utf8 += text.count('\ufffd') - data.count(b'\xef\xbf\xbd')
    return text


def _articles(lines: Iterable[str]) -> Iterator[str]:
  article = []
  for line in lines:
    if re.match(r' = [^=\n].* = \s*$', line):
      yield ''.join(article)
      article = []
    article.append(line)
  yield ''.join(article)


def _jsonl(lines: Iterable[str], text_key: str, path, report: Report) -> Iterator[str]:
  for number, line in enumerate(lines, 1):
    if line.isspace():
      continue
    try:
      value = json.loads(line)
    except (ValueError, RecursionError) as error:  # of the syntax, a huge number, or the depth
      raise ValueError(f'{path}:{number}: not a JSON object ({error}).') from error
    if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
      keys = sorted(value) if isinstance(value, dict) else type(value).__name__
      raise ValueError(
        f'{path}:{number}: no text under data.text_key={text_key!r}; the line has {keys}.'
      )
    # JSON can spell half a surrogate pair ('\ud800'), which no UTF-8 can hold.
    valid, replaced = re.subn('[\ud800-\udfff]', '\ufffd', value[text_key])
    report.invalid_utf8 += replaced
    yield valid


def _tfds(name: str, text_key: str, report: Report) -> Iterator[str]:
  """Documents of `NAME[:VERSION][:SPLIT]`, or of a folder that TFDS wrote, `/path[:SPLIT]`."""
  import tensorflow as tf

  name, split = re.fullmatch(r'((?:\w+://)?[^:]*(?::\d[\d.]*)?)(?::(.*))?', name).groups()
  _, examples = open_tfds(name, split or 'train')
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
  import tensorflow as tf
  import tensorflow_datasets as tfds

  for kind in ('GPU', 'TPU'):  # TensorFlow only reads; it must not take the accelerators' memory
    tf.config.set_visible_devices([], kind)
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
