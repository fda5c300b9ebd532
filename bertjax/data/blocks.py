"""Raw text in blocks, and the training records of each: what `data.streaming` reads.

A source is a list of shards, its files (or the shards of TFDS). A block is about 1 MB of documents,
one from each of some open shards in turn. The functions of preparation make records of it.
Documents are held out by the hash of preparation and never trained on.
"""

import collections
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from bertjax.data import instances, packing, prng
from bertjax.data import text as text_lib
from bertjax.data import workers as worker_lib
from bertjax.data.dataset import Arrays
from bertjax.data.preprocess import Settings, split_huge
from bertjax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_BLOCK_CHARS = 2**20  # of text: enough to shuffle, and to draw random second sentences from
_OPEN_SHARDS = 4  # that a block mixes

# Where a block begins: its epoch, the shards that are not opened yet (from `next` on), those that
# are open as [index, last record read], and the documents before the block in this epoch.
FRONT = {'epoch': 1, 'next': 0, 'open': [], 'documents': 0}


class Shard(NamedTuple):
  """A part of the source that is read from its front."""

  name: Any  # the path of a file, or a string
  format: str
  size: int  # bytes; -1 for what is no file


class Text:
  """The text of a run, split into shards.

  Args:
    source: see `data.text`.
    tokenizer: of the rows.
    settings: of the rows, those of preparation.

  Raises:
    ValueError: for a source that cannot be read, or settings that only preparation has.
  """

  def __init__(self, source: str, tokenizer: Tokenizer, settings: Settings):
    for name, plain in (('dupe_factor', 1), ('num_shards', 0)):
      if (value := getattr(settings, name)) != plain:
        raise ValueError(
          f'data.{name}={value} is for prepared rows; with data.streaming=True set '
          f'--config.data.{name}={plain}.'
        )
    if settings.format == 'tfrecord':
      raise ValueError('data.streaming=True reads text; prepare TFRecords (data.streaming=False).')
    self.source, self.tokenizer, self.settings = source, tokenizer, settings
    self.shards = [
      shard for part in text_lib.list_shards(source, settings.format) for shard in _shards(*part)
    ]
    self.least = 2 if settings.kind == 'nsp' else 1  # documents of a block
    self.columns = instances.columns(
      settings.kind, settings.length, tokenizer.vocab_size, settings.max_sequences_per_row
    )
    self._report = text_lib.Report()
    self._bytes, self._documents = 0, 0  # that this process has read; documents to train on

  @property
  def size(self) -> int:
    """Bytes of the shards as stored; 0 if one of them is no file."""
    sizes = [shard.size for shard in self.shards]
    return sum(sizes) if min(sizes, default=-1) >= 0 else 0

  def epochs(self, epoch: int, documents: int, groups: int) -> float:
    """About how many times a group has read its part before a block, by the bytes of documents and
    of files; complete epochs only where there are no files."""
    read = documents * self._bytes / max(self._documents, 1)
    part = min(read * groups / self.size, 1.0) if self.size else 0
    return epoch - 1 + part

  @property
  def identity(self) -> dict:
    """Flat {field: value} of what decides the records, with a hash of the shards' names and
    sizes."""
    names = [(getattr(s.name, 'name', s.name), s.size) for s in self.shards]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    settings = {f'data.{name}': value for name, value in vars(self.settings).items()}
    del settings['data.seed']  # the run's
    commits = {getattr(s.name, 'commit', '') for s in self.shards}
    commits = ''.join(f', commit {commit}' for commit in sorted(commits - {''}))
    return settings | {'data.input': f'{len(names)} shards {digest}{commits}'}

  def documents(self, shard: Shard, skip: int = 0) -> Iterator[tuple[int, str, bool]]:
    """Yields (number, text, whether it is held out) of a shard's documents after record `skip`.

    Raises:
      ValueError: if the shard is not as it was when the run was started, or cannot be read.
    """
    settings = self.settings
    try:
      size = shard.name.stat().length if shard.size >= 0 else -1
      if size != shard.size:
        raise ValueError(
          f'{shard.name} has {size:,} bytes and had {shard.size:,} when the run started; it '
          'needs the same text to its end.'
        )
      for number, text in text_lib.read_shard(
        shard.name, shard.format, text_key=settings.text_key, binary=settings.binary,
        encoding=settings.encoding, on_bad_row=settings.on_bad_row, report=self._report, skip=skip,
      ):  # fmt: skip
        content = text.encode('utf-8', 'surrogatepass')
        heldout = prng.choose_heldout([content], settings.heldout_fraction)[1][0]
        self._bytes, self._documents = self._bytes + len(content), self._documents + (not heldout)
        yield number, text, heldout
    except OSError as error:
      raise ValueError(f'{shard.name} can no longer be read: {error.strerror or error}.') from error

  def blocks(self, front: dict, shards: Callable) -> Iterator[tuple[dict, list[str]]]:
    """Yields (position, documents) of the blocks of a group from a position on, endlessly.

    Args:
      front: the position.
      shards: epoch -> (shard, index, count) of the group's shards; it reads the documents whose
        number is `index` modulo `count`.
    """
    following, read, opened = (front[key] for key in ('next', 'documents', 'open'))
    documents, size, begin = [], 0, front
    for epoch in itertools.count(front['epoch']):
      order = shards(epoch)

      def training(index, skip, order=order):
        shard, own, count = order[index]
        for number, text, heldout in self.documents(shard, skip):
          if number % count == own:
            yield number, text, heldout

      readers = collections.deque([i, number, training(i, number)] for i, number in opened)
      while readers or following < len(order):
        while len(readers) < _OPEN_SHARDS and following < len(order):
          readers.append([following, 0, training(following, 0)])
          following += 1
        if not documents:
          begin = {'epoch': epoch, 'next': following, 'documents': read,
                   'open': [reader[:2] for reader in readers]}  # fmt: skip
        index, _, reader = readers.popleft()
        if (record := next(reader, None)) is None:
          continue
        number, text, heldout = record
        readers.append([index, number, reader])
        if not heldout:
          documents.append(text)
          size, read = size + len(text), read + 1
        if size >= _BLOCK_CHARS and len(documents) >= self.least:
          yield begin, documents
          documents, size = [], 0
      if read < self.least:
        names = ', '.join(str(shard.name) for shard, *_ in order[:3])
        raise ValueError(
          f'data.input={self.source} has {read} documents to train on for one of the processes '
          f'(of {names}), and data.kind={self.settings.kind} needs {self.least}; add text, or set '
          'another data.format or data.heldout_fraction.'
        )
      self._report.warn(self.tokenizer.lowercase and self.tokenizer.standard)
      self._report = text_lib.Report()
      if len(documents) >= self.least:  # otherwise the next epoch's first documents join them
        yield begin, documents
        documents, size = [], 0
      following, read, opened = 0, 0, ()

  def split(self, documents: list[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts for the tokenizer, their number in each sentence and that of sentences in each
    document."""
    documents = (text_lib.split_document(text, self.settings.format) for text in documents)
    sentences = [self.tokenizer.as_running_text(document) for document in documents]
    texts = [split_huge(sentence) for document in sentences for sentence in document]
    counts = np.array(list(map(len, texts)), np.int64)
    texts = self.tokenizer.replace_surrogates(list(itertools.chain.from_iterable(texts)))
    return texts, counts, np.array(list(map(len, sentences)), np.int64)

  def records(self, ids, lengths, texts, sentences, *key: int) -> dict[str, np.ndarray]:
    """Shuffled records of a block.

    Args:
      ids: tokens of all texts end to end.
      lengths: tokens of each text of `split`.
      texts: number of texts of each sentence.
      sentences: number of sentences of each document.
      *key: integers that decide pairs, lengths and order.

    Returns:
      The columns of `data.instances`, and 'key', a number for the mask of each record, int64 [N].
    """
    settings, template = self.settings, self.tokenizer.template
    ends = _ends(lengths)[_ends(texts)]  # of sentences
    full = np.diff(ends) > 0
    corpus = instances.Corpus(
      ids.astype(self.columns['input_ids'][0]),
      np.concatenate([[0], ends[1:][full]]),
      np.unique(_ends(full)[_ends(sentences)]),  # documents without tokens are dropped
    )
    key, made = prng.hash_u64(settings.seed, *key), ()
    if len(corpus) >= self.least:
      made = instances.build(
        corpus, settings.kind, length=settings.length, short_seq_prob=settings.short_seq_prob,
        seed=int(key), separators=len(template.between),
      )  # fmt: skip
    elif len(corpus):
      _log.warning('a block of text has only one document with tokens, so no pairs are made of it.')
    rows = packing.first_fit(made, settings.length, settings.max_sequences_per_row, template.size)
    parts = list(instances.to_columns(
      rows, corpus.tokens, settings.length, settings.max_sequences_per_row,
      template=template, pad_id=self.tokenizer.pad_id,
    ))  # fmt: skip
    count = sum(len(part['ends']) for part in parts)
    order = prng.permute(np.arange(count), count, prng.hash_u64(key, prng.ORDER))
    records = {
      name: np.concatenate([np.empty((0, *shape), dtype), *(part[name] for part in parts)])[order]
      for name, (dtype, shape) in self.columns.items()
    }
    return records | {'key': prng.hash_u64(key, order).astype(np.int64)}

  def encode(self, documents: list[str], *key: int) -> dict[str, np.ndarray]:
    """Records of documents; see `records`."""
    texts, *counts = self.split(documents)
    return self.records(*self.tokenizer.encode_flat(texts), *counts, *key)

  def sample(self) -> Arrays:
    """Training records of the first block of the first shards."""
    shards = [(shard, 0, 1) for shard in self.shards]
    _, documents = next(self.blocks(FRONT, lambda _: shards))
    return Arrays(self.encode(documents, 0, 0))

  @functools.cache  # noqa: B019 (a text lives as long as its run)
  def heldout(self, most: int) -> Arrays:
    """The first `most` records of held-out documents, or all, read from the front of the shards.

    Raises:
      ValueError: if there are none.
    """
    found = (text for shard in self.shards for _, text, heldout in self.documents(shard) if heldout)
    parts, count = [], 0
    for number, documents in enumerate(worker_lib.batches(found, _BLOCK_CHARS)):
      parts.append(self.encode(documents, 0, number))
      count += len(parts[-1]['key'])
      if count >= most:
        break
    self._report.warn(self.tokenizer.lowercase and self.tokenizer.standard)
    if not count:
      raise ValueError(
        f'no record can be made of the held-out documents of data.input={self.source}; raise '
        f'data.heldout_fraction (now {self.settings.heldout_fraction}) or add documents.'
      )
    return Arrays(
      {name: np.concatenate([part[name] for part in parts])[:most] for name in self.columns}
    )


def _shards(part, format: str) -> Iterator[Shard]:
  """A part of the source as shards: itself, or those of a complete TFDS split."""
  if isinstance(part, str):
    names = [part] if part == 'embedded' else text_lib.tfds_shards(part)
    yield from (Shard(name, format, -1) for name in names)
  else:
    yield Shard(part, format, part.stat().length)


def _ends(counts: np.ndarray) -> np.ndarray:
  return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
