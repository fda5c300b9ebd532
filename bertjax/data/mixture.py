"""Mixtures of sources: which one an example comes from is a function of its number.

Examples are counted from 0. Of each thousand that follow one another, every source has the same
number, its share; a keyed permutation puts them in order. So the source of an example and its
number within the source follow from its number, and the state of the input stays one integer.
"""

import difflib
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from etils import epath

from bertjax.data import dataset, prng
from bertjax.data.dataset import Arrays, Dataset

WINDOW = 1000  # examples, of which each source has the same number every time


class Mixture:
  """Sources and their shares.

  >>> from bertjax.data.mixture import Mixture
  >>> mixture = Mixture({'wiki': 0.7, 'books': 0.3}, seed=0)
  >>> source, rank = mixture.locate([0, 1, 2, 999])
  >>> [mixture.names[i] for i in source], rank.tolist()
  (['books', 'wiki', 'wiki', 'books'], [0, 0, 1, 299])

  Args:
    shares: of each source, with the sum 1.
    seed: of the order.

  Attributes:
    names: of the sources.
    counts: examples of each source in a thousand, int64 [S].

  Raises:
    ValueError: for shares that have another sum, or one that is too small for any example.
  """

  def __init__(self, shares: Mapping[str, float], seed: int):
    self.names, self.seed = tuple(shares), seed
    weights = np.array(list(shares.values()), np.float64)
    if not (weights >= 0).all() or abs(weights.sum() - 1) > 1e-6:
      raise ValueError(
        f'the shares of a mixture must be positive and their sum 1, got {_written(shares)}.'
      )
    self.counts = _apportion(weights)
    if none := [n for n, count in zip(self.names, self.counts, strict=True) if not count]:
      raise ValueError(
        f'a share must be at least {1 / WINDOW}, an example in {WINDOW}, got '
        f'{none[0]}={shares[none[0]]:.3g}; raise it, or leave the source out.'
      )
    self._ends = np.cumsum(self.counts)

  def __str__(self) -> str:
    shares = dict(zip(self.names, self.counts / WINDOW, strict=True))
    return _written(shares)

  def locate(self, index) -> tuple[np.ndarray, np.ndarray]:
    """Sources and the numbers of examples within them, int64 of the shape of `index`."""
    window, place = np.divmod(np.asarray(index, np.int64), WINDOW)
    windows, which = np.unique(window, return_inverse=True)
    which = which.reshape(window.shape)
    keys = prng.hash_u64(self.seed, prng.MIXTURE, windows)[:, None]
    places = prng.permute(np.tile(np.arange(WINDOW), (len(windows), 1)), WINDOW, keys)
    sources = np.searchsorted(self._ends, places, side='right')
    sorted_places = np.argsort(np.argsort(sources, axis=1, kind='stable'), axis=1)
    source = sources[which, place]
    start = self._ends - self.counts
    return source, window * self.counts[source] + sorted_places[which, place] - start[source]

  def used(self, examples: int) -> dict[str, int]:
    """How many of the first examples come from each source."""
    windows, rest = divmod(examples, WINDOW)
    source, _ = self.locate(windows * WINDOW + np.arange(rest))
    counts = windows * self.counts + np.bincount(source, minlength=len(self.names))
    return dict(zip(self.names, counts.tolist(), strict=True))


class Mixed:
  """The records of several datasets end to end, with the interface of `Dataset`.

  Args:
    parts: a dataset for each source of the mixture.
    mixture: which source a training example comes from.
    used: examples of each source that earlier stages of the run have trained on.
  """

  def __init__(
    self, parts: Mapping[str, Dataset | Arrays], mixture: Mixture,
    used: Mapping[str, int] = MappingProxyType({}),
  ):  # fmt: skip
    self._parts, self.mixture = [parts[name] for name in mixture.names], mixture
    self.columns = self._parts[0].columns
    self._sizes = np.array(list(map(len, self._parts)))
    self._starts = np.cumsum(self._sizes) - self._sizes
    self._used = np.array([used.get(name, 0) for name in mixture.names])
    if empty := [name for name in mixture.names if not len(parts[name])]:
      raise ValueError(f'the source {empty[0]} of the mixture has no records to train on.')

  def __len__(self) -> int:
    return int(self._sizes.sum())

  def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Gathers rows in any order; indices are int64 [n] in [0, len)."""
    source = np.searchsorted(self._starts, indices, side='right') - 1
    found = {number: self._parts[number][indices[source == number] - self._starts[number]]
             for number in np.unique(source)}  # fmt: skip
    order = np.argsort(np.argsort(source, kind='stable'))
    return {name: np.concatenate([part[name] for part in found.values()])[order]
            for name in self.columns}  # fmt: skip

  def training_slots(self, index: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs of the sources and row numbers of training examples, as `prng.training_slots`."""
    source, rank = self.mixture.locate(index)
    rank, size = rank + self._used[source], self._sizes[source]
    epoch, row = 1 + rank // size, rank % size
    for number in np.unique(source):
      of = source == number
      key = prng.hash_u64(seed, prng.ORDER, epoch[of])  # that of the source outside a mixture
      row[of] = prng.permute(row[of], int(self._sizes[number]), key) + self._starts[number]
    return epoch, row

  def epochs(self, examples: int) -> dict[str, float]:
    """{'epoch/NAME': epochs of each source in the earlier stages and the first examples}."""
    used = np.array(list(self.mixture.used(examples).values())) + self._used
    epochs = (used / self._sizes).tolist()
    return {f'epoch/{name}': e for name, e in zip(self.mixture.names, epochs, strict=True)}

  def sample(self, count: int = 65_536) -> Arrays:
    """The records of the first training examples, in the proportions of the mixture."""
    return Arrays(self[self.training_slots(np.arange(count), self.mixture.seed)[1]])


class Prepared:
  """The prepared records of a run.

  Args:
    folders: {name: prepared folder}; {'': folder} without a mixture.
    tokenizer: the `Tokenizer` of each of them.
    mixture: of these names, or None.
  """

  def __init__(
    self, folders: Mapping[str, os.PathLike], tokenizer: Any, mixture: Mixture | None = None
  ):
    self.folders, self.tokenizer, self.mixture = folders, tokenizer, mixture

  @property
  def identity(self) -> dict:
    """{'rows': hash of the records}, or {'rows.NAME': hash} of each source and the mixture."""
    found = {name: dataset.manifest_hash(dataset.read_manifest(folder))
             for name, folder in self.folders.items()}  # fmt: skip
    facts = {f'rows.{name}'.rstrip('.'): digest for name, digest in found.items()}
    return facts | ({'shares': str(self.mixture)} if self.mixture else {})

  def used(self, examples: int) -> dict[str, int]:
    """How many of the first examples come from each source."""
    return self.mixture.used(examples) if self.mixture else {'': examples}

  def training(self, used: Mapping[str, int] = MappingProxyType({})) -> Dataset | Mixed:
    """The training records; a mixture begins behind those `used` of each source."""
    parts = {name: Dataset(folder, 'train') for name, folder in self.folders.items()}
    return Mixed(parts, self.mixture, used) if self.mixture else parts['']

  def sample(self) -> Dataset | Arrays:
    """Training records in the proportions of the mixture; all of them without one."""
    rows = self.training()
    return rows.sample() if isinstance(rows, Mixed) else rows

  def heldout(self, most: int) -> dict[str, Dataset]:
    """{name: held-out records}: all of them, of which an evaluation reads at most `most`."""
    del most
    return {name: Dataset(folder, 'heldout') for name, folder in self.folders.items()}


def heldout_each(most: int, names: Mapping) -> int:
  """Held-out records of each source in an evaluation of at most `most`: equally many, so that the
  losses of stages with other mixtures can be compared."""
  return max(most // len(names), 1)


def _apportion(weights: np.ndarray) -> np.ndarray:
  """Integers with the sum WINDOW, by largest remainders."""
  exact = weights * WINDOW
  counts = np.floor(exact + 1e-9).astype(np.int64)
  most = np.argsort(counts - exact, kind='stable')[: WINDOW - counts.sum()]
  counts[most] += 1
  return counts


def _written(shares: Mapping[str, float]) -> str:
  return ','.join(f'{name}={share:.4g}' for name, share in shares.items())


def read_sources(value: str) -> dict[str, str]:
  """'wiki=/texts/wiki,books=/texts/books' by name; {'': value} where no source has a name.

  Raises:
    ValueError: if only some have a name, or two have the same.
  """
  if value.strip() and epath.Path(value).exists():
    return {'': value}
  parts = [part.strip() for part in value.split(',') if part.strip()]
  pairs = [re.fullmatch(r'([A-Za-z][\w-]*)=(.+)', part) for part in parts]
  if not any(pairs):
    return {'': value}
  result = {pair[1]: pair[2] for pair in pairs if pair}
  if len(result) < len(parts):
    raise ValueError(
      f'the sources of a mixture are written wiki=PATH,books=PATH, each with its own name; got '
      f'{value!r}.'
    )
  return result


def read_shares(value: str, sizes: Mapping[str, float], exponent: float = 1.0) -> dict[str, float]:
  """The fraction of the training examples that each source gives.

  Args:
    value: 'wiki=0.7,books=0.3'; '' = proportional to the sizes, each raised to `exponent`.
    sizes: of the sources by name, in any unit; 0 = unknown.
    exponent: below 1.0 small sources get more than their size; 0.7 in multilingual BERT.

  Raises:
    ValueError: if names and sources differ, a number cannot be read or a size is unknown.
  """
  if not value:
    if unknown := [name for name, size in sizes.items() if not size]:
      raise ValueError(
        f'the source {unknown[0]} is empty or of unknown size, so shares cannot follow from sizes; '
        'give them by data.mixture, or leave it out.'
      )
    weights = {name: float(size) ** exponent for name, size in sizes.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
  try:
    pairs = [part.split('=') for part in value.split(',')]
    shares = {name.strip(): float(share) for name, share in pairs}
  except ValueError:
    raise ValueError(f'data.mixture is written wiki=0.7,books=0.3, got {value!r}.') from None
  if unknown := [name for name in shares if name not in sizes]:
    near = difflib.get_close_matches(unknown[0], list(sizes), n=1)
    raise ValueError(
      f'data.mixture={value} has a share for {unknown[0]!r}, which is no source'
      f'{f", did you mean {near[0]!r}" if near else ""}; the sources are {", ".join(sizes)}.'
    )
  if len(shares) != len(sizes) or len(shares) != len(pairs):
    raise ValueError(
      f'data.mixture must give each source a share once, got {value!r} for the sources '
      f'{", ".join(sizes)}.'
    )
  return {name: shares[name] for name in sizes}
