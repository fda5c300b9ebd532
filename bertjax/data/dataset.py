"""Prepared rows on disk: raw arrays by column and shard, read by memory map, and a manifest.

  DIR/manifest.json            settings, tokenizer hash, columns, shards with row counts and CRCs
  DIR/vocab.txt, tokenizer_config.json
  DIR/train/00000.input_ids.bin  ...  DIR/heldout/00000.input_ids.bin  ...

A column is a fixed-shape array for each row; this module does not know its meaning. A folder grows
as DIR.incomplete, shard by shard, by one process or many, and is renamed when it is complete.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import pathlib
import resource
import shutil
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from bertjax import io

_log = logging.getLogger(__name__)

VERSION = 2
SPLITS = ('train', 'heldout')


class DatasetError(ValueError):
  """A prepared folder is missing, incomplete or corrupt, or not the one that the run needs."""


class Writer:
  """A folder in the making, DIR.incomplete, that a killed program finds again.

  Args:
    directory: the final folder.
    plan: all that decides the content (settings, source, tokenizer), for JSON; work that was begun
      with another plan is refused.
    columns: {name: (dtype, shape of one row)}.

  Raises:
    DatasetError: if the directory is not empty, or DIR.incomplete was begun with another plan.
  """

  def __init__(self, directory, plan: dict, columns: dict[str, tuple[str, tuple[int, ...]]]):
    refuse_remote(directory)
    self.directory = pathlib.Path(directory)
    if self.directory.exists() and any(self.directory.iterdir()):
      raise DatasetError(f'{directory} exists and is not empty; choose another folder.')
    self.folder = self.directory.with_name(self.directory.name + '.incomplete')
    self._columns = {name: (np.dtype(d), tuple(shape)) for name, (d, shape) in columns.items()}
    self.work = self.folder / 'work'  # gone when the folder is complete
    for name in (*SPLITS, 'work'):
      (self.folder / name).mkdir(parents=True, exist_ok=True)
    path, self._plan = self.work / 'plan.json', json.loads(json.dumps(plan))
    if not path.exists():
      io.write_text(path, json.dumps(plan))
    before = json.loads(path.read_text())
    names = sorted(before.keys() | self._plan.keys())
    other = ', '.join(name for name in names if before.get(name) != self._plan.get(name))
    if other:
      raise DatasetError(f'{self.folder} was begun with other {other}; remove it or give the same.')

  def shard(self, split: str, number: int) -> dict | None:
    """What the manifest will say of a shard, or None if it is not written yet."""
    path = self.work / f'{split}-{number:05d}.json'
    return json.loads(path.read_text()) if path.exists() else None

  def add_shard(
    self, split: str, number: int, batches: Iterable[dict], tally: dict | None = None
  ) -> dict:
    """Writes one shard from an iterable of {column: array [n, ...]}; returns its entry.

    Args:
      split: 'train' or 'heldout'.
      number: of the shard.
      batches: its rows.
      tally: numbers for the manifest, which also has their sums; complete once the batches have
        been read.
    """
    name = f'{number:05d}'
    crc, rows = dict.fromkeys(self._columns, 0), 0
    with contextlib.ExitStack() as stack:
      paths = {c: self.folder / split / f'{name}.{c}.bin' for c in self._columns}
      files = {c: stack.enter_context(path.open('wb')) for c, path in paths.items()}
      for batch in batches:
        for column, (dtype, shape) in self._columns.items():
          array = np.ascontiguousarray(batch[column], dtype)
          assert array.shape[1:] == shape, f'{column}: {array.shape[1:]} is not {shape}'
          crc[column] = zlib.crc32(array, crc[column])
          files[column].write(array)
        rows += len(array)
    entry = {'name': name, 'rows': rows, 'crc32': crc, **(tally or {})}
    io.write_text(self.work / f'{split}-{name}.json', json.dumps(entry))
    return entry

  def finish(self, shards: dict[str, int], **facts) -> bool:
    """Writes the manifest, with the plan, and renames the folder.

    Args:
      shards: how many shards each split has.
      **facts: more for the manifest; `counts` are joined by the sums of the shards.

    Returns:
      False, with nothing done, while shards of other processes are still missing.
    """
    entries = {s: [self.shard(s, number) for number in range(n)] for s, n in shards.items()}
    if any(entry is None for split in entries.values() for entry in split):
      return False
    columns = {name: [dtype.str, list(shape)] for name, (dtype, shape) in self._columns.items()}
    counts = dict(facts.pop('counts', {}))
    for split, split_entries in entries.items():
      names = [name for entry in split_entries for name in entry if name not in ('name', 'crc32')]
      for name in dict.fromkeys(('documents', 'tokens', 'rows', *names)):
        counts[f'{split}_{name}'] = sum(entry.get(name, 0) for entry in split_entries)
    manifest = {'version': VERSION, 'columns': columns, 'shards': entries, 'counts': counts}
    manifest |= self._plan | facts
    if 'heldout_unknown' in counts:  # the rows are of text
      manifest['report'] = report(manifest)
    try:
      io.write_text(self.folder / 'manifest.json', json.dumps(manifest, indent=1))
      if self.directory.exists():
        self.directory.rmdir()  # empty
      self.folder.rename(self.directory)
    except OSError:
      if not (self.directory / 'manifest.json').exists():
        raise
      return True  # the process of another part was faster by a moment
    shutil.rmtree(self.directory / 'work')
    return True


@contextlib.contextmanager
def writing(
  directory, plan: dict, columns: dict, part: tuple[int, int] = (0, 1)
) -> Iterator[Writer | None]:
  """Gives a part's `Writer` to one process at a time; None if another one has finished the dataset.

  A ValueError leaves nothing, but for what was begun with another plan and the work of other parts.
  """
  refuse_remote(directory)
  directory = pathlib.Path(directory)
  incomplete = directory.with_name(directory.name + '.incomplete')
  with lock(incomplete / 'work' / f'lock-{part[0]}-of-{part[1]}'):
    try:
      if (directory / 'manifest.json').exists():
        manifest = read_manifest(directory)
        if all(manifest[name] == plan[name] for name in ('settings', 'tokenizer')):
          shutil.rmtree(incomplete, ignore_errors=True)
          yield None
          return
      yield Writer(directory, plan, columns)
    except ValueError as error:
      foreign = isinstance(error, DatasetError) and (incomplete / 'work' / 'plan.json').exists()
      if part[1] == 1 and not foreign:
        shutil.rmtree(incomplete, ignore_errors=True)
      raise


@contextlib.contextmanager
def lock(path: pathlib.Path):
  """Holds an exclusive lock on a file; it falls when the process ends, however it ends."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _log.info('another process is preparing the same (%s); waiting for it.', path)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def refuse_remote(directory) -> None:
  if '://' in os.fspath(directory):
    raise DatasetError(f'prepared rows are memory-mapped from a local disk, got {directory}; copy.')


def local(directory, cache) -> epath.Path:
  """A prepared folder as it is, or, of a remote one ('gs://...'), a checked copy in `cache`.

  Raises:
    DatasetError: if the disk has no room for the copy.
  """
  source = epath.Path(directory)
  if '://' not in os.fspath(directory):
    return source
  manifest = read_manifest(source)
  target = pathlib.Path(cache) / f'copy-{manifest_hash(manifest)}'
  with lock(target.with_name(f'{target.name}.lock')):
    if not (target / 'manifest.json').exists():
      size = sum(path.stat().length for path in _listing(source))
      free = shutil.disk_usage(target.parent).free
      if size > free:
        raise DatasetError(
          f'{directory} has {size / 1e9:.2f} GB, {target.parent} has only '
          f'{free / 1e9:.2f} GB left; name another data.cache_dir.'
        )
      with io.replacing(target) as partial:
        copy(source, partial)
        for split in SPLITS:
          Dataset(partial, split)  # checks every file
  return target


def copy(source, target) -> None:
  """Copies a prepared folder to or from remote storage, the manifest last."""
  source, target = epath.Path(source), epath.Path(target)
  files = _listing(source)
  size = sum(path.stat().length for path in files)
  _log.info('copying %.2f GB of prepared rows from %s to %s', size / 1e9, source, target)
  for path in sorted(files, key=lambda path: path.name == 'manifest.json'):
    goal = target / path.relative_to(source)
    goal.parent.mkdir(parents=True, exist_ok=True)
    path.copy(goal, overwrite=True)


def _listing(folder) -> list[epath.Path]:
  """Files of a prepared folder and of its splits."""
  folders = [folder, *(folder / split for split in SPLITS if (folder / split).exists())]
  return [path for folder in folders for path in folder.iterdir() if path.is_file()]


def read_manifest(directory) -> dict:
  """Reads the manifest of a prepared folder.

  Raises:
    DatasetError: if there is none, or it is of another version.
  """
  path = epath.Path(directory) / 'manifest.json'
  if not path.exists():
    raise DatasetError(f'{directory} is not a prepared folder: it has no manifest.json.')
  try:
    manifest = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise DatasetError(f'{path} is corrupt: {error}.') from error
  if (found := manifest.get('version')) != VERSION:
    raise DatasetError(f'{path} has version {found}, this program reads {VERSION}; prepare again.')
  return manifest


def manifest_hash(manifest: dict) -> str:
  """A hash of the records and of what they mean, independent of their folder."""
  content = {key: manifest[key] for key in ('version', 'columns', 'shards', 'tokenizer')}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def allow_files() -> None:
  """Lets this process open as many files as the system allows: a shard has some, often all open."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 20)), hard))


class Arrays:
  """Records in memory, with the interface of `Dataset`.

  Args:
    arrays: {column: array [N, ...]}.
  """

  def __init__(self, arrays: dict[str, np.ndarray]):
    self._arrays, self.columns = arrays, tuple(arrays)

  def __len__(self) -> int:
    return len(self._arrays[self.columns[0]])

  def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[indices] for name, array in self._arrays.items()}


class Dataset:
  """The rows of one split; `rows[indices]` gives {column: array [n, ...]}.

  Args:
    directory: a prepared folder.
    split: 'train' or 'heldout'.
    verify: check every file's checksum first (about 1 GB/s).

  Raises:
    DatasetError: for a missing, truncated or corrupt file; names it.
  """

  def __init__(self, directory, split: str, *, verify: bool = True):
    refuse_remote(directory)
    allow_files()
    self.directory = epath.Path(directory)
    self.manifest = read_manifest(directory)
    self.columns = tuple(self.manifest['columns'])
    shards = self.manifest['shards'][split]
    self._starts = np.cumsum([0] + [shard['rows'] for shard in shards])
    self._arrays = []
    for shard in shards:
      arrays = {}
      for column, (dtype, shape) in self.manifest['columns'].items():
        path = self.directory / split / f'{shard["name"]}.{column}.bin'
        arrays[column] = _open(path, dtype, (shard['rows'], *shape))
        if verify and zlib.crc32(np.ascontiguousarray(arrays[column])) != shard['crc32'][column]:
          raise DatasetError(f'{path} is corrupt: its checksum differs from the manifest.')
      self._arrays.append(arrays)

  def __str__(self) -> str:
    return str(self.directory)

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Gathers rows in any order; indices are int64 [n] in [0, len)."""
    if len(self._arrays) == 1:
      return {column: array[indices] for column, array in self._arrays[0].items()}
    shard = np.searchsorted(self._starts, indices, side='right') - 1
    columns, count = self.manifest['columns'].items(), len(indices)
    result = {name: np.empty((count, *shape), dtype) for name, (dtype, shape) in columns}
    for number in np.unique(shard):
      where = shard == number
      for column, array in self._arrays[number].items():
        result[column][where] = array[indices[where] - self._starts[number]]
    return result


def _open(path, dtype, shape):
  expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
  if not path.exists():
    raise DatasetError(f'{path} is missing.')
  if path.stat().length != expected:
    raise DatasetError(f'{path} is corrupt: {path.stat().length} bytes instead of {expected}.')
  if not expected:
    return np.empty(shape, dtype)
  return np.memmap(path, dtype, 'r', shape=tuple(shape))


# The NSP rule gives random labels to half of the chunks and to every chunk of one sentence: 51% to
# 56% on WikiText-2 at lengths 64 to 512, where 79% to 98% of the tokens are used. At two thirds, a
# third of the chunks are one sentence: as long as a row, or with boundaries that were not found.
MOST_RANDOM = 2 / 3
LEAST_USED = 0.6
MOST_UNKNOWN = 0.01


def report(manifest: dict) -> dict:
  """Sums up the training rows of a prepared folder, or its held-out rows where there are no others.

  Returns:
    'rows', 'tokens', 'unknown' (the fraction of tokens that are [UNK]); of sentence pairs
    'random_labels', the fraction of next-sentence labels that are random; and of rows made from
    text 'documents', 'sentences_per_document' and 'tokens_used', the fraction of tokens in any row.
  """
  split = 'train' if manifest['counts']['train_rows'] else 'heldout'
  counts = {name.removeprefix(f'{split}_'): n for name, n in manifest['counts'].items()}
  tokens = max(counts['tokens'], 1)
  result = {'rows': counts['rows'], 'tokens': counts['tokens']}
  result['unknown'] = counts['unknown'] / tokens
  if manifest['settings']['kind'] == 'nsp':
    result['random_labels'] = counts['label_1'] / max(counts['pairs'], 1)
  if 'tokens_used' in counts:
    result['documents'] = counts['documents']
    result['sentences_per_document'] = counts['sentences'] / max(counts['documents'], 1)
    result['tokens_used'] = counts['tokens_used'] / tokens
  return result


def log_report(facts: dict, length: int) -> None:
  """Logs what `report` returned; warns of values far from those of the NSP rule.

  Args:
    facts: of `report`.
    length: tokens of a row.
  """
  random, used = facts.get('random_labels', 0), facts.get('tokens_used', 1)
  log = f'prepared: {facts["rows"]:,} rows, {facts["unknown"]:.2%} [UNK]'
  if 'documents' in facts:
    log += f', {facts["documents"]:,} documents of {facts["sentences_per_document"]:.1f} sentences'
    log += f', {used:.1%} of {facts["tokens"]:,} tokens used'
  if 'random_labels' in facts:
    log += f', {random:.1%} of next-sentence labels random'
  _log.info(log)
  for far, warning in (
    (random > MOST_RANDOM,
     f'{random:.0%} of the next-sentence labels are random; the rule gives a little over 50%. '
     f'Sentences are about as long as the rows (data.length={length}) or are not found in this '
     'text (see data.format). Raise data.length, or train without these labels (nsp=False).'),
    (used < LEAST_USED,
     f'only {used:.0%} of the tokens are in the rows: sentences longer than a row '
     f'(data.length={length}) are truncated. Raise data.length, or use data.kind=doc_sentences '
     '(nsp=False), which truncates nothing.'),
    (facts['unknown'] > MOST_UNKNOWN,
     f'{facts["unknown"]:.1%} of the tokens are [UNK]: the vocabulary (or data.lowercase) does '
     'not fit the text; `bertjax vocab` trains one.'),
  ):  # fmt: skip
    if far:
      _log.warning(warning)
