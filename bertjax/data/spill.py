"""Tokenised documents on disk between the two halves of a preparation.

Each output (a shard to be) has three append-only files: its tokens, the length of each sentence,
the number of sentences of each document. The journal says how far they are good, so that a killed
program goes on from there.
"""

import json
import pathlib

import numpy as np

from bertjax import io
from bertjax.data import dataset
from bertjax.data.instances import Corpus

_KINDS = ('tokens', 'sentences', 'documents')

Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, sentence lengths, sentences a document


def output_name(output: tuple[str, int]) -> str:
  """Of (split, number of the shard)."""
  return f'{output[0]}-{output[1]:05d}'


class Spill:
  """The files of one process's outputs.

  Args:
    folder: where they lie; opened files are cut back to what the journal vouches for.
    outputs: their names.
    dtype: of the tokens.
  """

  def __init__(self, folder, outputs: list[str], dtype):
    self._folder, self._dtype = pathlib.Path(folder), np.dtype(dtype)
    self._journal = self._folder / 'journal.json'
    self._folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(self._journal.read_text()) if self._journal.exists() else {}
    self.texts: int = state.get('texts', 0)  # how many of the source's documents are dealt with
    self.facts: dict | None = state.get('facts')  # once all are
    self._files = {}
    dataset.allow_files()
    for name in outputs if self.facts is None else ():
      for kind in _KINDS:
        path = self._folder / f'{name}.{kind}'
        path.touch()
        file = path.open('r+b')
        file.truncate(state.get('sizes', {}).get(path.name, 0))
        file.seek(0, 2)
        self._files[name, kind] = file

  def append(self, name: str, part: Part) -> None:
    """Adds documents to an output."""
    for kind, array in zip(_KINDS, part, strict=True):
      dtype = self._dtype if kind == 'tokens' else np.uint32
      self._files[name, kind].write(np.ascontiguousarray(array, dtype))

  def commit(self, texts: int, facts: dict | None = None) -> None:
    """Vouches for what was appended; `facts` say that it is all."""
    self.texts, self.facts = texts, facts
    for file in self._files.values():
      file.flush()
    sizes = {pathlib.Path(file.name).name: file.tell() for file in self._files.values()}
    state = {'texts': texts, 'facts': facts, 'sizes': sizes}
    io.write_text(self._journal, json.dumps(state))

  def close(self) -> None:
    for file in self._files.values():
      file.close()

  def clear(self) -> None:
    """Deletes the tokens; the journal stays and says that all was done."""
    for kind in _KINDS:
      for path in self._folder.glob(f'*.{kind}'):
        path.unlink()


def read_corpus(folder, name: str, dtype) -> Corpus:
  """The documents of an output, tokens memory-mapped."""
  arrays = []
  for kind, kind_dtype in zip(_KINDS, (dtype, np.uint32, np.uint32), strict=True):
    path = pathlib.Path(folder) / f'{name}.{kind}'
    empty = not path.stat().st_size
    arrays.append(np.empty(0, kind_dtype) if empty else np.memmap(path, kind_dtype, 'r'))
  tokens, *lengths = arrays
  return Corpus(tokens, *(np.concatenate([[0], np.cumsum(a, dtype=np.int64)]) for a in lengths))
