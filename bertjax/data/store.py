"""Prepared rows on disk: raw arrays by column and shard, read by memory map, and a manifest.

  DIR/manifest.json            settings, tokenizer hash, columns, shards with row counts and CRCs
  DIR/vocab.txt, tokenizer_config.json
  DIR/train/00000.input_ids.bin  ...  DIR/heldout/00000.input_ids.bin  ...

A column is a fixed-shape array for each row; the store does not know what it means. A folder is
written under a temporary name and renamed when it is whole.
"""

import hashlib
import json
import os
import platform
import shutil
import zlib

import numpy as np
from etils import epath

VERSION = 1
SPLITS = ('train', 'heldout')


class StoreError(ValueError):
  """A prepared folder is missing, incomplete, damaged, or not the one the run needs."""


class Writer:
  """Writes a prepared folder; use as a context manager.

  Args:
    directory: the final folder; must not exist yet, or hold a whole preparation.
    columns: {name: (dtype, shape of one row)}.

  Raises:
    StoreError: if the folder holds something else, which `finish` would delete.
  """

  def __init__(self, directory, columns: dict[str, tuple[str, tuple[int, ...]]]):
    self.directory = epath.Path(directory)
    manifest = self.directory / 'manifest.json'
    if self.directory.exists() and any(self.directory.iterdir()) and not manifest.exists():
      raise StoreError(f'{directory} exists and is no prepared folder; choose another.')
    # A name of this process's own, so that two that prepare the same folder do not mix.
    _refuse_remote(directory)
    name = f'{self.directory.name}.incomplete-{platform.node()}-{os.getpid()}'
    self._temporary = self.directory.parent / name
    self._columns = {name: (np.dtype(d), tuple(shape)) for name, (d, shape) in columns.items()}
    self._shards = {split: [] for split in SPLITS}

  def __enter__(self):
    for left in self.directory.parent.glob(f'{self.directory.name}.incomplete-*'):
      host, _, pid = left.name.rpartition('.incomplete-')[2].rpartition('-')
      if host == platform.node() and not _is_running(int(pid)):  # of a killed process
        left.rmtree()
    for split in SPLITS:
      (self._temporary / split).mkdir(parents=True)
    return self

  @property
  def folder(self) -> epath.Path:
    """Where files that belong beside the manifest (the vocabulary) are to be written."""
    return self._temporary

  def add_shard(self, split: str, batches) -> int:
    """Writes one shard from an iterable of {column: array [n, ...]}; returns its rows."""
    name = f'{len(self._shards[split]):05d}'
    files = {c: (self._temporary / split / f'{name}.{c}.bin').open('wb') for c in self._columns}
    crc, rows = dict.fromkeys(self._columns, 0), 0
    try:
      for batch in batches:
        for column, (dtype, shape) in self._columns.items():
          array = np.ascontiguousarray(batch[column], dtype)
          assert array.shape[1:] == shape, f'{column}: {array.shape[1:]} is not {shape}'
          data = array.tobytes()
          crc[column] = zlib.crc32(data, crc[column])
          files[column].write(data)
        rows += len(array)
    finally:
      for file in files.values():
        file.close()
    self._shards[split].append({'name': name, 'rows': rows, 'crc32': crc})
    return rows

  def finish(self, facts: dict) -> None:
    """Writes the manifest (with `facts`: settings, counts, tokenizer) and renames the folder."""
    columns = {name: [dtype.str, list(shape)] for name, (dtype, shape) in self._columns.items()}
    manifest = {'version': VERSION, 'columns': columns, 'shards': self._shards, **facts}
    (self._temporary / 'manifest.json').write_text(json.dumps(manifest, indent=1))
    if self.directory.exists():
      self.directory.rmtree()
    shutil.move(self._temporary, self.directory)

  def __exit__(self, kind, *_):
    if kind is not None and self._temporary.exists():
      self._temporary.rmtree()


def _refuse_remote(directory) -> None:
  if '://' in os.fspath(directory):
    raise StoreError(f'prepared rows are memory-mapped from a local disk, got {directory}; copy.')


def _is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return pid != os.getpid()


def read_manifest(directory) -> dict:
  """Reads the manifest of a prepared folder.

  Raises:
    StoreError: if there is none, or it is of another version.
  """
  path = epath.Path(directory) / 'manifest.json'
  if not path.exists():
    raise StoreError(f'{directory} is not a prepared folder: it has no manifest.json.')
  try:
    manifest = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise StoreError(f'{path} is damaged: {error}.') from error
  if manifest.get('version') != VERSION:
    raise StoreError(
      f'{path} has version {manifest.get("version")}, this program reads {VERSION}; prepare again.'
    )
  return manifest


def manifest_hash(manifest: dict) -> str:
  """A hash of the rows themselves (and of what they mean), whatever folder they lie in."""
  content = {key: manifest[key] for key in ('version', 'columns', 'shards', 'tokenizer')}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Rows:
  """The rows of one split; `rows[indices]` gives {column: array [n, ...]}.

  Args:
    directory: a prepared folder.
    split: 'train' or 'heldout'.
    verify: check every file's checksum first (about 1 GB/s).

  Raises:
    StoreError: for a missing, truncated or damaged file, named.
  """

  def __init__(self, directory, split: str, *, verify: bool = True):
    _refuse_remote(directory)
    self.directory = epath.Path(directory)
    self.manifest = read_manifest(directory)
    shards = self.manifest['shards'][split]
    self._starts = np.cumsum([0] + [shard['rows'] for shard in shards])
    self._arrays = []
    for shard in shards:
      arrays = {}
      for column, (dtype, shape) in self.manifest['columns'].items():
        path = self.directory / split / f'{shard["name"]}.{column}.bin'
        arrays[column] = _open(path, dtype, (shard['rows'], *shape))
        if verify and zlib.crc32(np.ascontiguousarray(arrays[column])) != shard['crc32'][column]:
          raise StoreError(f'{path} is damaged: its checksum differs from the manifest.')
      self._arrays.append(arrays)

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Gathers rows in any order; indices are int64 [n] in [0, len)."""
    if len(self._arrays) == 1:
      return {column: array[indices] for column, array in self._arrays[0].items()}
    shard = np.searchsorted(self._starts, indices, side='right') - 1
    result = {
      column: np.empty((len(indices), *shape), dtype)
      for column, (dtype, shape) in self.manifest['columns'].items()
    }
    for number in np.unique(shard):
      where = shard == number
      for column, array in self._arrays[number].items():
        result[column][where] = array[indices[where] - self._starts[number]]
    return result


def _open(path, dtype, shape):
  expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
  if not path.exists():
    raise StoreError(f'{path} is missing.')
  if path.stat().length != expected:
    raise StoreError(f'{path} is damaged: {path.stat().length} bytes instead of {expected}.')
  if not expected:
    return np.empty(shape, dtype)
  return np.memmap(path, dtype, 'r', shape=tuple(shape))
