"""Training batches from raw text as it is read, without a prepared dataset: `data.streaming`.

A batch is a function of its number, given the run's seed, settings and text:

  shards    the files of a source (or shards of TFDS), in another order each epoch
  groups    as many as the run had processes when it started. A group reads every G-th shard of
            that order, or with fewer shards than groups its part of the documents of one. It makes
            the same rows of every global batch, whichever processes these rows belong to. Of a
            mixture, it reads each source and takes rows from them as `data.mixture` says.
  blocks    of the documents of a group and source, see `data.blocks`. A record waits for 0 to 63
            further blocks, at random, so a batch mixes the text of 64; none waits beyond the
            end of its epoch.
  position  where the oldest block begins of which a record waits, and how many records are used of
            those that the newest block let go; it is saved with a checkpoint. Resuming reads these
            blocks again.
  stages    continue where the stage before ended. Where records have another length, what waits is
            dropped: reading continues behind the newest block.

A run on another number of hosts makes the same batches: a group whose rows belong to two processes
is read by both.
"""

import collections
import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from bertjax import io
from bertjax.data import prng
from bertjax.data import workers as worker_lib
from bertjax.data.blocks import FRONT, Shard, Text
from bertjax.data.dataset import Arrays
from bertjax.data.mixture import Mixed, Mixture, heldout_each

_log = logging.getLogger(__name__)

_MIXED_BLOCKS = 64
_KEPT_POSITIONS = 64  # of the newest batches: more than are on their way to the devices
# The position of a reader: where the oldest block begins of which records wait, its number, that of
# the newest block of which records are used (`block`), how many it let go are used (`taken`), where
# it begins (`newest`), and the last block of which no record is used (`dropped`).
_START = FRONT | {'oldest': 0, 'block': 0, 'taken': 0, 'newest': FRONT, 'dropped': -1}
_MARKS = ('key', 'epoch', 'block', 'index', 'source')  # of a record, beside its columns


class Texts:
  """The text of a run, or the texts of a mixture.

  Args:
    texts: {name: text}, with the same tokenizer and settings; {'': text} without a mixture.
    mixture: of these names, or None.
  """

  def __init__(self, texts: Mapping[str, Text], mixture: Mixture | None = None):
    self.texts, self.mixture = texts, mixture
    self.tokenizer = next(iter(texts.values())).tokenizer

  @property
  def identity(self) -> dict:
    """That of the text, or of the texts by name and the mixture."""
    if self.mixture is None:
      return self.texts[''].identity
    facts = {'shares': str(self.mixture)}
    for name, text in self.texts.items():
      of_text = text.identity
      facts |= {f'data.input.{name}': of_text.pop('data.input')} | of_text
    return facts

  def sample(self) -> Arrays:
    """Training records of the first blocks, in the proportions of the mixture."""
    parts = {name: text.sample() for name, text in self.texts.items()}
    return Mixed(parts, self.mixture).sample() if self.mixture else parts['']

  def heldout(self, most: int) -> dict[str, Arrays]:
    """{name: held-out records of each source}, at most `most` together."""
    each = heldout_each(most, self.texts)
    return {name: text.heldout(each) for name, text in self.texts.items()}


class Reader:
  """The records of a source for one group, in order.

  Args:
    text: the source.
    number: of the source in a mixture; None = the only one.
    group, groups: which part of each epoch's shards it reads.
    front: the position to start from.
    size: of the global batch, for the message if there are fewer records.
  """

  def __init__(self, text: Text, number, group: int, groups: int, front: dict, size):
    self.text, self.front, self._size = text, front, size
    self._group, self._groups = group, groups
    self._number, self._filled = number, front['epoch']  # the newest epoch that gave records
    self._begins: dict[int, dict] = {}  # positions of blocks
    self._arrived, self._epoch = front['oldest'], front['epoch']  # of the next block to shuffle
    self._waiting = collections.deque([] for _ in range(_MIXED_BLOCKS))  # records, by blocks to go

  def shards(self, epoch: int) -> list[tuple[Shard, int, int]]:
    """(shard, index, count): what the group reads in an epoch, see `Text.blocks`."""
    shards, seed = self.text.shards, self.text.settings.seed
    key = prng.hash_u64(seed, prng.ORDER, 0, epoch)
    order = prng.permute(np.arange(len(shards)), len(shards), key).tolist()
    if len(shards) >= self._groups:
      return [(shards[i], 0, 1) for i in order[self._group :: self._groups]]
    place = self._group % len(shards)
    sharing = len(range(place, self._groups, len(shards)))
    return [(shards[order[place]], self._group // len(shards), sharing)]

  def blocks(self) -> Iterator[tuple[int, int, list[str]]]:
    """Yields (epoch, number, documents) of the blocks from the front on, endlessly."""
    blocks = self.text.blocks(self.front, self.shards)
    for number, (position, documents) in enumerate(blocks, self.front['oldest']):
      self._begins[number] = position
      yield position['epoch'], number, documents

  def position(self, block: int, taken: int) -> dict:
    """Where the reader is when `taken` of the records are used that a block let go."""
    oldest = max(block - _MIXED_BLOCKS + 1, self.front['oldest'])
    for old in [number for number in list(self._begins) if number < oldest]:  # a thread adds to it
      del self._begins[old]
    return self._begins[oldest] | {'oldest': oldest, 'block': block, 'taken': taken,
                                   'newest': self._begins[block],
                                   'dropped': self.front['dropped']}  # fmt: skip

  def encode(self, block: tuple[int, int, list[str]]) -> dict[str, np.ndarray]:
    epoch, number, documents = block
    texts, *counts = self.text.split(documents)
    return self.records(epoch, number, *self.text.tokenizer.encode_flat(texts), *counts)

  def records(self, epoch, block, *tokens) -> dict[str, np.ndarray]:
    """The records of a block, with `_MARKS`; tokens as for `Text.records`."""
    epoch, block = int(epoch), int(block)
    records = self.text.records(*tokens, *self._key(block))
    if block <= self.front['dropped']:
      records = {name: column[:0] for name, column in records.items()}
    count = len(records['key'])
    self._filled = max(self._filled, epoch if count else 0)
    if epoch > self._filled + 1:
      raise ValueError(self.too_few())
    marks = {'epoch': epoch, 'block': block, 'index': 0, 'source': self._number or 0}
    return records | {name: np.full(count, value) for name, value in marks.items()}

  def shuffle(self, records: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the waiting records and the given ones of the next block that now go, shuffled."""
    block, self._arrived = self._arrived, self._arrived + 1
    if len(records['key']) and records['epoch'][0] != self._epoch:  # the last one ends
      self._epoch, ends = records['epoch'][0], list(itertools.chain(*self._waiting))
      self._waiting = collections.deque([ends, *([] for _ in range(1, _MIXED_BLOCKS))])
    seed = self.text.settings.seed
    delays = prng.hash_u64(seed, prng.ORDER, records['key']) % _MIXED_BLOCKS
    for delay, waiting in enumerate(self._waiting):
      own = np.flatnonzero(delays == delay)
      waiting.append({name: column[own] for name, column in records.items()})
    self._waiting.append([])
    records = _joined(self._waiting.popleft())
    count = len(records['key'])
    key = prng.hash_u64(seed, prng.ORDER, *self._key(block))
    order = np.lexsort((prng.permute(np.arange(count), count, key), records['epoch']))
    records = {name: column[order] for name, column in records.items()}
    records |= {'block': np.full(count, block), 'index': np.arange(count)}
    front = self.front['block']
    used = count if block < front else self.front['taken'] if block == front else 0
    return {name: column[used:] for name, column in records.items()}

  def _key(self, block: int) -> tuple[int, ...]:
    source = () if self._number is None else (self._number,)
    return 0, self._group, block, *source

  def too_few(self) -> str:
    return (
      f'data.input={self.text.source} gives fewer training records than a batch has '
      f'(batch_size={self._size}); add text or lower batch_size.'
    )


class Stream:
  """The training batches of a text, or of a mixture of texts, from any position.

  Args:
    texts: what to read, by the name of the source; {'': text} without a mixture.
    batch_size: B, of the global batch.
    targets: `loader.Batches.targets`, which masks records.
    mixture: which source an example comes from; None = there is one.
    groups: G of a new run.
    stage: a number; a position of another one is that of the end of the stage before.
    local: rows of the global batch that this process makes; None = all.
    loader: 'tfdata' or 'threads'; the batches are the same.
    workers: threads; 0 = one per core, at most 8.
  """

  def __init__(
    self, texts: Mapping[str, Text], batch_size: int, targets: Callable, *,
    mixture: Mixture | None = None, groups: int = 1, stage: int = 0,
    local: np.ndarray | None = None, loader: str = 'threads', workers: int = 0,
  ):  # fmt: skip
    self._texts, self._size, self._targets, self._stage = texts, batch_size, targets, stage
    self._text, self._mixture = next(iter(texts.values())), mixture
    self._local = np.arange(batch_size) if local is None else local
    self._new_groups, self._loader = groups, loader
    self._workers = workers or min(worker_lib.cores(), 8)
    self._identities = {name: text.identity for name, text in texts.items()}
    self._positions: dict[int, dict] = {}  # of batches, the newest ones
    self._error: Exception | None = None

  def position(self, number: int) -> dict:
    """The position before batch `number`, one of the newest, of the groups of this process."""
    return self._positions[number]

  def epochs(self, number: int) -> dict[str, float]:
    """{'epoch/NAME': about how many times this process's groups have read each source of a mixture
    before batch `number`, one of the newest}; {} without a mixture."""
    fronts, result = self.position(number)['groups'], {}
    for name, text in self._texts.items() if self._mixture else ():
      of = [f['newest'] for key, f in fronts.items() if key.partition('/')[2] == name]
      of = [text.epochs(begin['epoch'], begin['documents'], self._groups) for begin in of]
      result[f'epoch/{name}'] = float(np.mean(of))
    return result

  def batches(self, number: int = 0, position: dict | None = None) -> Iterator[dict]:
    """Yields the batches from `number` on, this process's rows of them.

    Args:
      number: of the first batch in this stage.
      position: a saved one of all groups, at or before that batch, or of the end of the stage
        before; None = the front of the text.

    Raises:
      ValueError: if the text cannot be read, has changed, or gives fewer records than a batch.
    """
    fronts = position['groups'] if position else {}
    groups = len({key.partition('/')[0] for key in fronts}) or self._new_groups
    if not position or position['stage'] != self._stage:
      fronts = self._follow(fronts, position['texts']) if position else {}
      position = {'batch': 0}
    self._groups, owner = groups, np.arange(self._size) * groups // self._size
    wanted = sorted(set(owner[self._local].tolist()))
    local = np.isin(np.flatnonzero(np.isin(owner, wanted)), self._local)
    readers = {}
    for group in wanted:
      for i, (name, text) in enumerate(self._texts.items()):
        key, number_of_source = f'{group}/{name}'.rstrip('/'), i if self._mixture else None
        readers[key] = Reader(
          text, number_of_source, group, groups, fronts.get(key, _START), self._size
        )
    rows = [np.flatnonzero(owner == group) for group in wanted]
    positions = {key: reader.front for key, reader in readers.items()}
    first = position['batch']
    self._keep(first, positions)
    make = self._tfdata if self._loader == 'tfdata' else self._threads
    with contextlib.closing(make(list(readers.values()), rows, first, local)) as stream:
      for following, (batch, ends) in enumerate(stream, first + 1):
        for (key, reader), (block, taken) in zip(readers.items(), ends.tolist(), strict=True):
          if block >= 0:  # some of the batch is of this source
            positions[key] = reader.position(block, taken)
        self._keep(following, positions)
        if following > number:
          yield batch

  def _follow(self, fronts: dict, texts: dict[str, dict]) -> dict:
    """Where the readers of a stage begin, of where those of the stage before, on these `texts`,
    ended; a source of other files begins at its front."""
    result = {}
    for key, front in fronts.items():
      name, block = key.partition('/')[2], front['block']
      before, now = texts[name], self._identities.get(name, {'data.input': ''})
      if before['data.input'] == now['data.input']:
        behind = {'newest': front['newest'], 'oldest': block, 'block': block, 'taken': 0,
                  'dropped': block}  # fmt: skip
        same = before == now or not front['taken']
        result[key] = front if same else front['newest'] | behind
    return result

  def _keep(self, number: int, positions: dict) -> None:
    self._positions[number] = {'stage': self._stage, 'batch': number, 'groups': dict(positions),
                               'texts': self._identities}  # fmt: skip
    self._positions.pop(number - _KEPT_POSITIONS, None)

  def _choose(self, rows: np.ndarray, batch: int) -> np.ndarray:
    """The sources of some rows of a batch."""
    if self._mixture is None:
      return np.zeros(len(rows), np.int64)
    return self._mixture.locate(batch * self._size + rows)[0]

  def _finish(self, readers, local: np.ndarray, parts: list[dict]) -> tuple[dict, np.ndarray]:
    """A batch of the records of each group; and of each reader (block, records of it used), or
    (-1, 0) where the batch has none of it."""
    ends, count = [], len(self._texts)
    for number, reader in enumerate(readers):
      part = parts[number // count]
      of = np.flatnonzero(part['source'] == number % count)
      if len(of) and np.ptp(part['epoch'][of]) > 1:
        raise ValueError(reader.too_few())
      ends.append((part['block'][of[-1]], part['index'][of[-1]] + 1) if len(of) else (-1, 0))
    records = {name: column[local] for name, column in _joined(parts).items()}
    epoch, key = records['epoch'], records['key']
    batch = self._targets({n: records[n] for n in self._text.columns}, epoch, key)
    return batch, np.array(ends, np.int64)

  def _threads(self, readers, rows, first, local) -> Iterator[tuple[dict, np.ndarray]]:
    with (
      worker_lib.threads_in_order(self._workers) as in_order,
      worker_lib.threads_in_order(1) as ahead,  # reads the text
    ):
      parts = [map(r.shuffle, in_order(r.encode, r.blocks())) for r in readers]
      count = len(self._texts)
      streams = [
        _choose_rows(
          parts[i * count : (i + 1) * count],
          map(functools.partial(self._choose, own), itertools.count(first)),
        )
        for i, own in enumerate(rows)
      ]
      finish = functools.partial(self._finish, readers, local)
      yield from ahead(next, itertools.repeat(in_order(finish, zip(*streams, strict=True))))

  def _tfdata(self, readers, rows, first, local) -> Iterator[tuple[dict, np.ndarray]]:
    tf = io.import_tensorflow("data.loader='tfdata'", "use 'threads'")
    parallel = {'num_parallel_calls': self._workers, 'deterministic': True}
    tokenize, count = self._graph(tf), len(self._texts)
    records = [self._tf_records(tf, reader, tokenize, parallel) for reader in readers]

    def stream(sources, own):
      if count == 1:
        return sources[0].rebatch(len(own))

      def choose(batch):
        return self._numpy(tf, lambda batch: self._choose(own, batch), [tf.int64], batch)[0]

      steps = tf.data.Dataset.range(first, np.iinfo(np.int64).max)
      choices = steps.map(lambda step: tf.ensure_shape(choose(step), [len(own)])).unbatch()
      rows = tf.data.Dataset.choose_from_datasets([source.unbatch() for source in sources], choices)
      return rows.batch(len(own))

    example = {n: np.zeros((1, *s), dtype) for n, (dtype, s) in self._text.columns.items()}
    batch = self._targets(example, np.ones(1, np.int64), np.zeros(1, np.int64))

    def finish(*parts):
      names = list(parts[0])

      def run(*arrays):
        size = len(names)
        own = [dict(zip(names, arrays[i : i + size], strict=True))
               for i in range(0, len(arrays), size)]  # fmt: skip
        made, ends = self._finish(readers, local, own)
        return [*(made[name] for name in batch), ends]

      arrays = [part[name] for part in parts for name in names]
      dtypes = [*(array.dtype for array in batch.values()), tf.int64]
      outputs = self._numpy(tf, run, dtypes, *arrays)
      return dict(zip(batch, outputs, strict=False)), outputs[-1]

    streams = [stream(records[i * count : (i + 1) * count], own) for i, own in enumerate(rows)]
    batches = tf.data.Dataset.zip(*streams).map(finish, **parallel).prefetch(2)
    try:
      yield from batches.as_numpy_iterator()
    except tf.errors.OpError as error:
      raise (self._error or error) from None

  def _graph(self, tf) -> Callable:
    """The tokenizer for tf.data: texts -> (ids end to end, number of each text)."""
    from bertjax.data import tokenizer_tf

    tokenizer = self._text.tokenizer
    if reason := tokenizer_tf.unsupported(tokenizer):
      _log.info('the tokenizer has %s: tf.data calls it as a function', reason)

      def encode(texts):
        ids, lengths = tokenizer.encode_flat([text.decode() for text in texts])
        return ids.astype(np.int32), lengths.astype(np.int64)

      return lambda texts: self._numpy(tf, encode, (tf.int32, tf.int64), texts)
    graph = tokenizer_tf.GraphTokenizer(tokenizer)

    def tokenize(texts):
      ragged = graph(texts)
      return ragged.values, tf.cast(ragged.row_lengths(), tf.int64)

    return tokenize

  def _tf_records(self, tf, reader: Reader, tokenize: Callable, parallel: dict):
    """The records of a reader as a tf.data.Dataset of blocks: documents, sentences, tokens,
    records."""
    long, columns = tf.int64, reader.text.columns
    dtypes = {name: dtype for name, (dtype, _) in columns.items()} | dict.fromkeys(_MARKS, 'int64')
    shapes = {name: shape for name, (_, shape) in columns.items()}

    def blocks():
      with self._noting_errors():
        for epoch, block, documents in reader.blocks():
          yield epoch, block, [document.encode() for document in documents]

    def split(epoch, block, documents):
      def run(documents):
        texts, *counts = reader.text.split([document.decode() for document in documents])
        return np.array([text.encode() for text in texts], object), *counts

      texts, *counts = self._numpy(tf, run, (tf.string, long, long), documents)
      return epoch, block, tf.ensure_shape(texts, [None]), *counts

    def build(*arrays):
      run = lambda *arrays: [*reader.records(*arrays).values()]  # noqa: E731
      return self._numpy(tf, run, [*dtypes.values()], *arrays)

    def shuffle(*arrays):
      run = lambda *a: [*reader.shuffle(dict(zip(dtypes, a, strict=True))).values()]  # noqa: E731
      made = dict(zip(dtypes, self._numpy(tf, run, [*dtypes.values()], *arrays), strict=True))
      return {n: tf.ensure_shape(c, [None, *shapes.get(n, ())]) for n, c in made.items()}

    spec = tf.TensorSpec([], long), tf.TensorSpec([], long), tf.TensorSpec([None], tf.string)
    documents = tf.data.Dataset.from_generator(blocks, output_signature=spec)
    sentences = documents.map(split, **parallel)
    tokens = sentences.map(
      lambda epoch, block, texts, *counts: (epoch, block, *tokenize(texts), *counts), **parallel
    )
    return tokens.map(build, **parallel).map(shuffle)  # in order: it keeps what waits

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


def _choose_rows(sources: list[Iterator[dict]], choices: Iterator[np.ndarray]) -> Iterator[dict]:
  """Batches whose i-th record is the next one of the source that a choice names at i."""
  held: list[list[dict]] = [[] for _ in sources]  # parts that are not used up

  def take(number: int, count: int) -> list[dict]:
    parts, taken = held[number], []
    while count:
      if not parts:
        parts.append(next(sources[number]))
      part = parts[0]
      size = min(count, len(part['key']))
      taken.append({name: column[:size] for name, column in part.items()})
      parts[0] = {name: column[size:] for name, column in part.items()}
      if not len(parts[0]['key']):
        parts.clear()
      count -= size
    return taken

  for choice in choices:
    counts = np.bincount(choice, minlength=len(sources)).tolist()
    parts = [part for number, count in enumerate(counts) for part in take(number, count)]
    order = np.argsort(np.argsort(choice, kind='stable'))
    yield {name: column[order] for name, column in _joined(parts).items()}


def _joined(parts: list[dict]) -> dict[str, np.ndarray]:
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def merge(positions: list[dict]) -> dict:
  """The position of all groups from those of each process."""
  groups = {group: p for position in positions for group, p in position['groups'].items()}
  order = sorted(groups, key=lambda key: (int(key.partition('/')[0]), key))
  return positions[0] | {'groups': {group: groups[group] for group in order}}
