"""Files: globs, compression and encodings.

Everything is read as a stream, so a file of any size needs little memory. Paths may be remote:
'gs://...', 's3://...' and 'az://...' as `epath` reads them, 'https://...' and 'hf:...' as `remote`.
"""

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator

from etils import epath

from bertjax import io as io_lib
from bertjax.data import remote

_PACKAGES = {'gs': 'gcsfs', 's3': 's3fs', 'az': 'adlfs'}  # of what `epath` reads
_REMOTE = (*_PACKAGES, 'http', 'https')  # and `remote`


def split_source(source: str) -> list[str]:
  """The sources joined by commas; an existing path with commas is one source."""
  if source.strip() and '://' not in source and epath.Path(source).exists():
    return [source]
  return [part.strip() for part in source.split(',') if part.strip()]


def list_files(pattern: str, suffix: str = '') -> list[epath.Path]:
  """The files of a path, folder (all levels, hidden ones skipped), glob or hub data set, sorted.

  Args:
    pattern: path, folder, glob or http(s) address; or a data set of the Hugging Face hub, see
      `remote.list_data_set`.
    suffix: of a folder, only files with this suffix, in any case.
  """
  if pattern.startswith('hf:'):
    return [*remote.list_data_set(pattern)]
  scheme, mark, _ = pattern.partition('://')
  if mark and scheme not in _REMOTE:
    raise ValueError(
      f'{pattern} cannot be read: addresses begin with hf: or one of '
      f'{", ".join(f"{name}://" for name in _REMOTE)}.'
    )
  path = epath.Path(pattern)
  try:
    is_folder = path.is_dir()
  except Exception as error:  # of TensorFlow or the storage's package; they have no class in common
    if not mark:
      raise
    raise ValueError(
      f'{pattern} cannot be read: {io_lib.first_line(error).rstrip(".")}. {scheme}:// needs the '
      f'package {_PACKAGES[scheme]} and access rights; TensorFlow, if it is installed, is used '
      'instead unless EPATH_USE_TF=false is set.'
    ) from error
  if is_folder:
    files = [p for p in _walk(path) if not suffix or p.suffix.lower() == suffix]
    if not files:
      raise ValueError(f'the folder {pattern} holds no {f"{suffix} ".lstrip()}files.')
    return files
  if path.is_file():
    return [path]
  files = [path for path in _glob(pattern) if path.is_file()]
  if not files:
    raise ValueError(
      f'{pattern} cannot be read: there is no such file or folder, and no match of the glob: '
      f'{pattern}'
    )
  return files


def _glob(pattern: str) -> list[epath.Path]:
  """The matches of a glob, sorted; ** crosses folders, of a disk only."""
  if '://' not in pattern:
    return [*map(epath.Path, sorted(glob.glob(pattern, recursive=True)))]  # noqa: PTH207
  if '**' in pattern:
    raise ValueError(
      f'{pattern} cannot be read: ** is for files of a disk; name the folder, which is read with '
      'all its levels, or write one * for each level.'
    )
  folder, *rest = re.split(r'/(?=[^/]*[*?[])', pattern, maxsplit=1)
  return sorted(epath.Path(folder).glob(*rest), key=str) if rest else []


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


_HEAD = 8192  # bytes by which a file is judged
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
def open_text(path: epath.Path, encoding: str = 'utf-8') -> Iterator[io.TextIOWrapper]:
  """Opens a text file, decompressed; a byte order mark is dropped.

  Lines end in LF (a CR before it stays), or in CR if the first 8 KB have no LF. Bytes that are
  invalid in UTF-8 become lone surrogates ('surrogateescape'), in other encodings U+FFFD.
  """
  utf8 = codecs.lookup(encoding).name == 'utf-8'
  with open_bytes(path) as stream:
    start = _decode_head(stream.peek()[:_HEAD], encoding)
    newline = '\r' if '\r' in start and '\n' not in start else '\n'
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


def not_text(stream: io.TextIOWrapper, encoding: str) -> str:
  """What an open file is, and what to do, if it does not begin with text in the encoding; else ''.

  Text is what has few control characters and few invalid bytes: one NUL byte is no harm, and
  Latin-1 prose, mostly ASCII, is read with its invalid bytes counted.
  """
  head = stream.buffer.peek()[:_HEAD]
  text = _decode_head(head, encoding)
  odd = sum(c == '\ufffd' or (c < ' ' and c not in '\t\n\r\f\v\b\x1b') for c in text)
  if odd <= 0.3 * len(head):
    return ''
  if head.startswith(b'PAR1'):
    return 'a Parquet file; pass --config.data.format=parquet (vocab: --format=parquet).'
  if guess := guess_encoding(head):
    return f'not {encoding.upper()} text; it looks like {guess}: {how_to_name(guess)}'
  return 'a binary file, not text; remove it, or pass --config.data.binary=skip.'


def how_to_name(encoding: str) -> str:
  return f'pass --config.data.encoding={encoding} (vocab: --encoding={encoding}).'


_FREQUENT = {  # encodings, and letters that are frequent in text of their languages
  'gb18030': '，。的一是不了在人有我他这', 'big5': '，。的一是不了在人有我他這',
  'shift_jis': 'のにはをたがでてと、。し', 'euc_jp': 'のにはをたがでてと、。し',
  'euc_kr': '이다는에의을가고하지은로', 'cp1251': 'оеаинтсрвлкмд', 'koi8_r': 'оеаинтсрвлкмд',
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
