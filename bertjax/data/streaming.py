"""Training rows from raw text as it is read, without a prepared dataset: `data.streaming`.

A batch is a function of its number, given the run's seed, settings and text:

  shards    the files of the source (or shards of TFDS), in another order each epoch
  groups    as many as the run had processes when it started. A group reads every G-th shard of
            that order, or with fewer shards than groups its part of the documents of one. It makes
            the same rows of every global batch, whichever processes these rows belong to.
  blocks    about 1 MB of the documents of a group, one from each of some open shards in turn. The
            functions of preparation make rows of a block, which are then shuffled.
  position  where in its open shards the block of a group begins, and how many of its rows are used;
            it is saved with a checkpoint. Resuming reads that block again.

A run on another number of hosts makes the same batches: a group whose rows belong to two processes
is read by both. Documents are held out by the hash of preparation and never trained on.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from bertjax import io
from bertjax.data import instances, packing, prng
from bertjax.data import text as text_lib
from bertjax.data import workers as worker_lib
from bertjax.data.dataset import Arrays
from bertjax.data.preprocess import Settings, split_huge
from bertjax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_BLOCK_CHARS = 2**20  # of text: enough to shuffle, and to draw random second sentences from
_OPEN_SHARDS = 4  # that a block mixes
_KEPT_POSITIONS = 64  # of the newest batches: more than are on their way to the devices

# Where a group is: its epoch and block, the shards that are not opened yet (from `next` on), those
# that are open as [index, last record read], and the documents before the block in this epoch.
_FRONT = {'epoch': 1, 'block': 0, 'next': 0, 'open': [], 'documents': 0, 'taken': 0}


class Shard(NamedTuple):
  """A part of the source that is read from its front."""

  name: str
  format: str
  size: int  # bytes; 0 for what is no file


class Block(NamedTuple):
  """Consecutive documents of a group."""

  epoch: int
  number: int  # of the group's blocks in the run
  documents: list[str]


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

  @property
  def identity(self) -> dict:
    """Flat {field: value} of what decides the records, with a hash of the shards' names and
    sizes."""
    names = [(epath.Path(s.name).name if s.size else s.name, s.size) for s in self.shards]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    settings = {f'data.{name}': value for name, value in vars(self.settings).items()}
    del settings['data.seed']  # the run's
    return settings | {'data.input': f'{len(names)} shards {digest}'}

  def documents(self, shard: Shard, skip: int = 0) -> Iterator[tuple[int, str, bool]]:
    """Yields (number, text, whether it is held out) of a shard's documents after record `skip`.

    Raises:
      ValueError: if the shard is not as it was when the run was started, or cannot be read.
    """
    settings = self.settings
    try:
      size = epath.Path(shard.name).stat().length if shard.size else 0
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
        yield number, text, prng.choose_heldout([content], settings.heldout_fraction)[1][0]
    except OSError as error:
      raise ValueError(f'{shard.name} can no longer be read: {error.strerror or error}.') from error

  def blocks(self, front: dict, shards: Callable, begins: Callable) -> Iterator[Block]:
    """Yields the blocks of a group from a position on, endlessly.

    Args:
      front: the position.
      shards: epoch -> (shard, index, count) of the group's shards; it reads the documents whose
        number is `index` modulo `count`.
      begins: called with the number and position of each block before it is yielded.
    """
    following, read, opened, block = (front[key] for key in ('next', 'documents', 'open', 'block'))
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
          begin = {'epoch': epoch, 'block': block, 'next': following,
                   'open': [reader[:2] for reader in readers], 'documents': read}  # fmt: skip
        index, _, reader = readers.popleft()
        if (record := next(reader, None)) is None:
          continue
        number, text, heldout = record
        readers.append([index, number, reader])
        if not heldout:
          documents.append(text)
          size, read = size + len(text), read + 1
        if size >= _BLOCK_CHARS and len(documents) >= self.least:
          begins(block, begin)
          yield Block(begin['epoch'], block, documents)
          documents, size, block = [], 0, block + 1
      if read < self.least:
        names = ', '.join(shard.name for shard, *_ in order[:3])
        raise ValueError(
          f'data.input={self.source} has {read} documents to train on for one of the processes '
          f'(of {names}), and data.kind={self.settings.kind} needs {self.least}; add text, or set '
          'another data.format or data.heldout_fraction.'
        )
      self._report.warn(self.tokenizer.lowercase and self.tokenizer.standard)
      self._report = text_lib.Report()
      if len(documents) >= self.least:  # otherwise the next epoch's first documents join them
        begins(block, begin)
        yield Block(begin['epoch'], block, documents)
        documents, size, block = [], 0, block + 1
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
    block = next(self.blocks(_FRONT, lambda _: shards, lambda *_: None))
    return Arrays(self.encode(block.documents, 0, 0))

  @functools.lru_cache(1)  # noqa: B019 (a text lives as long as its run)
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


def _shards(name: str, format: str) -> Iterator[Shard]:
  """A part of the source as shards: itself, or those of a complete TFDS split."""
  if name == 'embedded' or name.startswith('tfds:'):
    names = [name] if name == 'embedded' else text_lib.tfds_shards(name)
    yield from (Shard(name, format, 0) for name in names)
  else:
    yield Shard(name, format, epath.Path(name).stat().length)


def _ends(counts: np.ndarray) -> np.ndarray:
  return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


class Stream:
  """The training batches of a text from any position.

  Args:
    text: what to read.
    batch_size: B, of the global batch.
    targets: `loader.Batches.targets`, which masks records.
    groups: G of a new run.
    stage: a number; stages of a run read the shards in other orders.
    local: rows of the global batch that this process makes; None = all.
    loader: 'tfdata' or 'threads'; the batches are the same.
    workers: threads; 0 = one per core, at most 8.
  """

  def __init__(
    self, text: Text, batch_size: int, targets: Callable, *, groups: int = 1, stage: int = 0,
    local: np.ndarray | None = None, loader: str = 'threads', workers: int = 0,
  ):  # fmt: skip
    self._text, self._size, self._targets, self._stage = text, batch_size, targets, stage
    self._local = np.arange(batch_size) if local is None else local
    self._new_groups, self._loader = groups, loader
    self._workers = workers or min(worker_lib.cores(), 8)
    self._begins: dict[int, dict] = {}  # positions of blocks by group and number
    self._positions: dict[int, dict] = {}  # of batches, the newest ones
    self._error: Exception | None = None

  def position(self, number: int) -> dict:
    """The position before batch `number`, one of the newest, of the groups of this process."""
    return self._positions[number]

  def batches(self, number: int = 0, position: dict | None = None) -> Iterator[dict]:
    """Yields the batches from `number` on, this process's rows of them.

    Args:
      number: of the first batch in this stage.
      position: a saved one of all groups, at or before that batch; None = the front of the text.

    Raises:
      ValueError: if the text cannot be read, has changed, or gives fewer records than a batch.
    """
    groups = len(position['groups']) if position else self._new_groups
    if not position or position['stage'] != self._stage:
      position = {'batch': 0, 'groups': {str(group): _FRONT for group in range(groups)}}
    owner = np.arange(self._size) * groups // self._size
    wanted = sorted(set(owner[self._local].tolist()))
    fronts = {group: position['groups'][str(group)] for group in wanted}
    local = np.isin(np.flatnonzero(np.isin(owner, wanted)), self._local)
    sizes = {group: int((owner == group).sum()) for group in wanted}
    first = position['batch']
    self._begins, self._full = {group: {} for group in wanted}, {}
    self._keep(first, fronts)
    make = self._tfdata if self._loader == 'tfdata' else self._threads
    with contextlib.closing(make(groups, fronts, sizes, local)) as stream:
      for following, (batch, ends) in enumerate(stream, first + 1):
        marks = dict(zip(wanted, ends.tolist(), strict=True))
        self._keep(following, {
          group: self._begins[group][block] | {'taken': taken}
          for group, (block, taken) in marks.items()
        })  # fmt: skip
        for group, (block, _) in marks.items():
          for old in [n for n in self._begins[group] if n < block]:
            del self._begins[group][old]
        if following > number:
          yield batch

  def _keep(self, number: int, groups: dict) -> None:
    groups = {str(group): position for group, position in groups.items()}
    self._positions[number] = {'stage': self._stage, 'batch': number, 'groups': groups}
    self._positions.pop(number - _KEPT_POSITIONS, None)

  def _shards(self, group: int, groups: int, epoch: int) -> list[tuple[Shard, int, int]]:
    """(shard, index, count): what a group reads in an epoch, see `Text.blocks`."""
    shards, seed = self._text.shards, self._text.settings.seed
    key = prng.hash_u64(seed, prng.ORDER, self._stage, epoch)
    order = prng.permute(np.arange(len(shards)), len(shards), key).tolist()
    if len(shards) >= groups:
      return [(shards[i], 0, 1) for i in order[group::groups]]
    place = group % len(shards)
    sharing = len(range(place, groups, len(shards)))
    return [(shards[order[place]], group // len(shards), sharing)]

  def _read(self, group: int, groups: int, front: dict) -> Iterator[Block]:
    shards = functools.partial(self._shards, group, groups)
    return self._text.blocks(front, shards, self._begins[group].__setitem__)

  def _records(self, group: int, front: dict, epoch, block, *tokens) -> dict:
    """The records of a block that are not used yet, with their epoch, block and index."""
    epoch, block = int(epoch), int(block)
    records = self._text.records(*tokens, self._stage, group, block)
    count = len(records['key'])
    self._full[group] = max(self._full.get(group, front['epoch']), epoch if count else 0)
    if epoch > self._full[group] + 1:
      raise ValueError(self._too_few())
    records |= {'epoch': np.full(count, epoch), 'block': np.full(count, block),
                'index': np.arange(count)}  # fmt: skip
    skip = front['taken'] if block == front['block'] else 0
    return {name: column[skip:] for name, column in records.items()}

  def _finish(self, local: np.ndarray, parts: list[dict]) -> tuple[dict, np.ndarray]:
    """A batch of the records of each group, and (block, records of it used) of each."""
    if any(np.ptp(part['epoch']) > 1 for part in parts):
      raise ValueError(self._too_few())
    ends = np.array([(part['block'][-1], part['index'][-1] + 1) for part in parts])
    records = {name: np.concatenate([p[name] for p in parts])[local] for name in parts[0]}
    epoch, key = records['epoch'], records['key']
    return self._targets({n: records[n] for n in self._text.columns}, epoch, key), ends

  def _too_few(self) -> str:
    return (
      f'data.input={self._text.source} gives fewer training records than a batch has '
      f'(batch_size={self._size}); add text or lower batch_size.'
    )

  def _threads(self, groups, fronts, sizes, local) -> Iterator[tuple[dict, np.ndarray]]:
    def encode(group, block: Block):
      texts, *counts = self._text.split(block.documents)
      tokens = self._text.tokenizer.encode_flat(texts)
      return self._records(group, fronts[group], *block[:2], *tokens, *counts)

    with (
      worker_lib.threads_in_order(self._workers) as in_order,
      worker_lib.threads_in_order(1) as ahead,  # reads the text
    ):
      streams = [
        _rebatch(in_order(functools.partial(encode, group), self._read(group, groups, front)),
                 sizes[group])
        for group, front in fronts.items()
      ]  # fmt: skip
      batches = in_order(functools.partial(self._finish, local), zip(*streams, strict=True))
      yield from ahead(next, itertools.repeat(batches))

  def _tfdata(self, groups, fronts, sizes, local) -> Iterator[tuple[dict, np.ndarray]]:
    tf = io.import_tensorflow("data.loader='tfdata'", "use 'threads'")
    from bertjax.data import tokenizer_tf

    parallel = {'num_parallel_calls': self._workers, 'deterministic': True}
    long, text = tf.int64, self._text
    if reason := tokenizer_tf.unsupported(text.tokenizer):
      _log.info('the tokenizer has %s: tf.data calls it as a function', reason)

      def encode(texts):
        strings = [t.decode() for t in texts]
        ids, lengths = text.tokenizer.encode_flat(strings)
        return ids.astype(np.int32), lengths.astype(np.int64)

      def tokenize(epoch, block, texts, *counts):
        return epoch, block, *self._numpy(tf, encode, (tf.int32, long), texts), *counts
    else:
      graph = tokenizer_tf.GraphTokenizer(text.tokenizer)

      def tokenize(epoch, block, texts, *counts):
        ragged = graph(texts)
        return epoch, block, ragged.values, tf.cast(ragged.row_lengths(), long), *counts

    def split(epoch, block, documents):
      def run(documents):
        texts, *counts = text.split([d.decode() for d in documents])
        return np.array([t.encode() for t in texts], object), *counts

      texts, *counts = self._numpy(tf, run, (tf.string, long, long), documents)
      return epoch, block, tf.ensure_shape(texts, [None]), *counts

    dtypes = {name: dtype for name, (dtype, _) in text.columns.items()}
    dtypes |= dict.fromkeys(('key', 'epoch', 'block', 'index'), 'int64')
    shapes = {name: shape for name, (_, shape) in text.columns.items()}

    def stream(group, front):
      def blocks():
        with self._noting_errors():
          for block in self._read(group, groups, front):
            yield *block[:2], [document.encode() for document in block.documents]

      def build(*arrays):
        def run(*arrays):
          records = self._records(group, front, *arrays)
          return [records[name] for name in dtypes]

        columns = dict(zip(dtypes, self._numpy(tf, run, [*dtypes.values()], *arrays), strict=True))
        return {n: tf.ensure_shape(c, [None, *shapes.get(n, ())]) for n, c in columns.items()}

      spec = tf.TensorSpec([], long), tf.TensorSpec([], long), tf.TensorSpec([None], tf.string)
      documents = tf.data.Dataset.from_generator(blocks, output_signature=spec)
      records = documents.map(split, **parallel).map(tokenize, **parallel).map(build, **parallel)
      return records.rebatch(sizes[group])

    example = {n: np.zeros((1, *shape), dtype) for n, (dtype, shape) in text.columns.items()}
    batch = self._targets(example, np.ones(1, np.int64), np.zeros(1, np.int64))
    names = list(batch)

    def finish(*parts):
      def run(*arrays):
        size = len(dtypes)
        parts = [dict(zip(dtypes, arrays[i : i + size], strict=True))
                 for i in range(0, len(arrays), size)]  # fmt: skip
        made, ends = self._finish(local, parts)
        return [*(made[name] for name in names), ends]

      arrays = [part[name] for part in parts for name in dtypes]
      outputs = self._numpy(tf, run, [*(batch[name].dtype for name in names), long], *arrays)
      return dict(zip(names, outputs, strict=False)), outputs[-1]

    streams = [stream(group, front) for group, front in fronts.items()]
    batches = tf.data.Dataset.zip(*streams).map(finish, **parallel).prefetch(2)
    try:
      yield from batches.as_numpy_iterator()
    except tf.errors.OpError as error:
      raise (self._error or error) from None

  def _numpy(self, tf, function: Callable, dtypes, *arrays) -> list:
    return tf.numpy_function(self._noting_errors()(function), arrays, dtypes)

  @contextlib.contextmanager
  def _noting_errors(self):
    """Keeps an exception, which tf.data replaces by one whose text is a traceback."""
    try:
      yield
    except Exception as error:
      self._error = self._error or error
      raise


def _rebatch(parts: Iterator[dict], size: int) -> Iterator[dict]:
  """Batches of `size` records from parts of any size."""
  left, count = [], 0
  for part in parts:
    left.append(part)
    count += len(part['key'])
    if count >= size:
      records = {name: np.concatenate([p[name] for p in left]) for name in part}
      for start in range(0, count - size + 1, size):
        yield {name: column[start : start + size] for name, column in records.items()}
      used = count - count % size
      left, count = [{name: column[used:] for name, column in records.items()}], count - used


def merge(positions: list[dict]) -> dict:
  """The position of all groups from those of each process."""
  groups = {group: p for position in positions for group, p in position['groups'].items()}
  return positions[0] | {'groups': {group: groups[group] for group in sorted(groups, key=int)}}
