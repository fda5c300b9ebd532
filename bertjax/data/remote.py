"""Files of another machine: data sets of the Hugging Face hub, and http(s) addresses.

A file is read in ranges: of a Parquet file its footer and the columns of the row groups that are
needed; of other files 4 MB at a time. Nothing is stored on the disk. The hub's token, endpoint
(`HF_TOKEN`, `HF_ENDPOINT`) and offline mode are those of huggingface_hub.
"""

import collections
import functools
import io
import logging
import pathlib
import re
import time
import types
import urllib.parse
from collections.abc import Mapping

from etils import epath

from bertjax import io as files_io

_BUFFER = 2**22  # bytes of a request, where a file is read from the front
_WAITS = (1, 2, 4)  # seconds between tries
_TIMEOUT = 60  # seconds without an answer

_PARQUET_BRANCH = 'refs/convert/parquet'  # the hub's own copies of data sets in other formats
# CONFIG/SPLIT-00000-of-00010.parquet, CONFIG/SPLIT/0000.parquet, SPLIT.jsonl.gz
_FILE = re.compile(
  r'(?:(?P<folder>.*)/)?(?P<stem>[^/]+?)(?:[-._]?\d+(?:-of-\d+)?(?:-\w+)?)?'
  r'(?P<ending>\.(?:parquet|jsonl|json|txt|csv|tsv))(?:\.(?:gz|bz2|xz|zst))?'
)
_DATA_SET = re.compile(  # hf:NAME[/CONFIG][:SPLIT][@REVISION], also hf:NAME:CONFIG/SPLIT
  r'hf:(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?:/(?P<config>[^:@]+))?(?::(?P<split>[^@]*))?'
  r'(?:@(?P<revision>.+))?'
)

_log = logging.getLogger(__name__)


class UnreachableError(ValueError):
  """A server that fails time and again."""

  exit_code = 75  # a later start may succeed


@epath.register_path_cls(['http://', 'https://'])
class Url:
  """An http(s) address as a path: the methods of `epath.Path` that reading a file needs."""

  def __init__(self, address: str, size: int | None = None):
    self._address = address
    if size is not None:
      self._size = size
    path = pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(address).path))
    self.name, self.suffix, self.suffixes = path.name, path.suffix, path.suffixes

  def __str__(self) -> str:
    return self._address

  @property
  def commit(self) -> str:
    """That of a file of the hub, which never changes; '' of other files."""
    match = re.search('/resolve/([0-9a-f]{40})/', self._address)
    return match[1] if match else ''

  def joinpath(self, *parts) -> 'Url':
    return Url('/'.join([self._address, *map(str, parts)])) if parts else self

  def exists(self) -> bool:
    return True  # opening it says more

  is_file = exists

  def is_dir(self) -> bool:
    return False

  @functools.cached_property
  def _size(self) -> int:
    return int(_get(self._address, 0, 1).headers['Content-Range'].rpartition('/')[2])

  def stat(self):
    return types.SimpleNamespace(length=self._size, mtime=0)

  def open(self, mode: str = 'rb', *, buffering: int = _BUFFER):
    """Opens the file; with `buffering=0` only what is asked for is read."""
    if mode != 'rb':
      raise ValueError(f'{self}: nothing can be written to an http address; name a folder.')
    file = _Ranges(self._address, self._size)
    return io.BufferedReader(file, buffering) if buffering else file


class _Ranges(io.RawIOBase):
  """A file that asks its server for the bytes that are read."""

  def __init__(self, address: str, size: int):
    self._address, self._size, self._at = address, size, 0

  def readable(self) -> bool:
    return True

  seekable = readable

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    self._at = offset + (0, self._at, self._size)[whence]
    return self._at

  def readinto(self, buffer) -> int:
    stop = min(self._at + len(buffer), self._size)
    if (count := stop - self._at) <= 0:
      return 0
    buffer[:count] = _get(self._address, self._at, stop).content
    self._at = stop
    return count


def _get(address: str, start: int, stop: int):
  """The answer with bytes `start` to `stop` of an address.

  Raises:
    ValueError: if the server refuses.
    UnreachableError: if it fails or breaks off, time and again.
  """
  from huggingface_hub import constants, utils

  headers = utils.build_hf_headers() if address.startswith(f'{constants.ENDPOINT}/') else {}
  headers |= {'Range': f'bytes={start}-{stop - 1}', 'Accept-Encoding': 'identity'}
  for wait in (*_WAITS, 0):
    try:
      response = utils.get_session().get(address, headers=headers, timeout=_TIMEOUT)
      utils.hf_raise_for_status(response)
      if response.status_code != 206:
        raise ValueError(
          f'{address} cannot be read in parts: its server ignores ranges; download the file.'
        )
      if len(response.content) == stop - start:
        return response
      problem = f'{len(response.content)} of {stop - start} bytes came'
    except Exception as error:  # the transport's errors are of no common class
      if isinstance(error, ValueError) or _is_final(error):
        raise _refusal(address, error) from error
      problem = files_io.first_line(error)
    if wait:
      _log.warning('%s: %s; trying again in %d s', address, problem, wait)
      time.sleep(wait)
  raise UnreachableError(
    f'{address} cannot be read after {len(_WAITS) + 1} tries: {problem}. Check the connection and '
    'start the command again; a run resumes from its checkpoint.'
  )


def _is_final(error: Exception) -> bool:
  """Whether trying again cannot help."""
  from huggingface_hub import errors

  status = getattr(getattr(error, 'response', None), 'status_code', 500)
  refused = status < 500 and status not in (408, 429)  # a timeout, too many requests
  return refused or isinstance(error, errors.OfflineModeIsEnabled)


def _refusal(what: str, error: Exception) -> ValueError:
  """What the server says, and what to do."""
  from huggingface_hub import errors

  if type(error) is ValueError:
    return error
  advice = {
    errors.GatedRepoError: 'Ask for access on its page and log in with `hf auth login`.',
    errors.RevisionNotFoundError: 'Check the revision after the @; a run whose commit is gone '
    'cannot be resumed, so start it again in another --workdir.',
    errors.OfflineModeIsEnabled: 'Unset HF_HUB_OFFLINE, or name downloaded files.',
    Exception: 'Check the name and the connection; a private data set needs `hf auth login`.',
  }
  advice = next(text for kind, text in advice.items() if isinstance(error, kind))
  return ValueError(f'{what} cannot be read: {files_io.first_line(error).rstrip(".")}. {advice}')


@functools.lru_cache(64)
def list_data_set(source: str) -> tuple[Url, ...]:
  """The files of `hf:NAME[/CONFIG][:SPLIT][@REVISION]`, a split of a data set of the hub.

  They are those that the data set's card declares (`configs`), else those whose names say config
  and split; for a data set without any, the Parquet files that the hub made of it. A revision
  that moves, such as main, is resolved to its commit once in a process.

  Raises:
    ValueError: if there is no such data set, revision, config or split, or no access to it.
  """
  import huggingface_hub

  if not (match := _DATA_SET.fullmatch(source)):
    raise ValueError(f'{source} is no data set of the hub; name one as hf:NAME[/CONFIG]:SPLIT.')
  name, config, split, revision = match.group('name', 'config', 'split', 'revision')
  if split and '/' in split:
    config, _, split = split.rpartition('/')
  split = split or 'train'
  choices = {}
  for branch in (revision or 'main', *([] if revision else [_PARQUET_BRANCH])):
    try:
      info = huggingface_hub.HfApi().dataset_info(name, revision=branch, files_metadata=True)
    except Exception as error:  # the transport's errors have no class in common
      if branch == _PARQUET_BRANCH and getattr(error, 'response', None) is not None:
        break  # the hub made none
      raise _refusal(source, error) from error
    sizes = {file.rfilename: file.size for file in info.siblings}
    choices |= (parts := _split_files(sorted(sizes), info.card_data))
    chosen = [part for part in parts if part[1] == split and config in (None, part[0])]
    if len(chosen) == 1 or ('default', split) in chosen:
      files = parts[('default', split) if len(chosen) > 1 else chosen[0]]
      address = functools.partial(
        huggingface_hub.hf_hub_url, info.id, repo_type='dataset', revision=info.sha
      )  # fmt: skip
      _log.info('%s: %d files at commit %s', source, len(files), info.sha)
      return tuple(Url(address(path), sizes[path]) for path in files)
    if chosen:
      break
  if not choices:
    raise ValueError(f'{source} has no file of Parquet, JSONL, CSV or text.')
  names = ', '.join(f'hf:{name}/{config}:{split}' for config, split in sorted(choices)[:20])
  several = 'several splits' if chosen else 'no split'
  raise ValueError(f'{source} names {several} of that data set; choose one of {names}.')


def pin(sources: str, commits: Mapping[str, str]) -> tuple[str, dict[str, str]]:
  """Adds `@COMMIT` to each data set of the hub, so that all later reading is of these files.

  Args:
    sources: joined by commas, with or without names.
    commits: {source: commit} of those that must be of a certain one; others get the commit that
      their revision has now.

  Returns:
    The sources, and {source: commit} of those of the hub.

  Raises:
    ValueError: as `list_data_set`.
  """
  found = {}

  def add_commit(match: re.Match) -> str:
    source = match[0]
    found[source] = commits.get(source) or list_data_set(source)[0].commit
    return f'{source.partition("@")[0]}@{found[source]}'

  return re.sub(r'(?:(?<=^)|(?<=[,=\s]))hf:[^,\s]+', add_commit, sources), found


def _pattern(glob: str) -> str:
  """A glob of a card as a regular expression: of these, only ** crosses folders."""
  known = {'**/': '(?:.*/)?', '**': '.*', '*': '[^/]*', '?': '[^/]'}
  parts = re.split(r'(\*\*/|\*\*|\*|\?|\[[^]]*\])', glob)
  return ''.join(known.get(p) or (p if p.startswith('[') else re.escape(p)) for p in parts)


def _split_files(paths: list[str], card) -> dict[tuple[str, str], list[str]]:
  """{(config, split): files} of a repository, by its card or else by the files' names."""
  parts = collections.defaultdict(list)
  for config in (card or {}).get('configs') or ():
    files = config.get('data_files') or ()
    if isinstance(files, str) or (files and isinstance(files[0], str)):
      files = [{'split': 'train', 'path': files}]
    for part in files:
      patterns = [part['path']] if isinstance(part['path'], str) else part['path']
      patterns = list(map(_pattern, patterns))
      found = [path for path in paths if any(re.fullmatch(p, path) for p in patterns)]
      parts[config['config_name'], part['split']] += found
  if not any(parts.values()):
    parts.clear()
    for path in paths:
      if match := _FILE.fullmatch(path):
        folder, stem = (match['folder'] or '').split('/'), match['stem']
        if re.fullmatch(r'\d+|part|shard|data', stem) and folder[-1]:  # CONFIG/SPLIT/0000.parquet
          stem = folder.pop()
        config = '/'.join(part for part in folder if part not in ('', 'data'))
        parts[config or 'default', stem].append(path)
  return {
    key: [path for path in found if path.endswith('.parquet')] or found
    for key, found in parts.items()
    if found
  }
