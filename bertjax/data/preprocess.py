"""Builds a prepared dataset from raw text: the way of a document to a training row.

1. `data.text` reads the source and yields its documents, one string each.
2. `tokenize`, in worker processes, assigns each document to a shard by a hash of its text,
   splits it into sentences and encodes these to token ids.
3. `TokenShards` appends the ids to intermediate files, in the order of the source. It
   records the committed length of each file, where a killed run resumes.
4. `_build_shard` turns the documents of one shard into instances (pairs or spans of sentences,
   `data.instances`), packs them into rows of `length` tokens (`data.packing`) and writes these
   (`data.dataset`). Masks are added by `data.loader`, in every epoch.

The split and shard of a document are functions of its text, and its instances of the seed, the
shard and its position there. So the bytes do not depend on workers, machines or interruptions, and
exact duplicates are never in both splits.
"""

import collections
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import logging
import pathlib
import re
import time
from collections.abc import Callable

import numpy as np

from bertjax import io
from bertjax.data import dataset, instances, packing, prng
from bertjax.data import text as text_lib
from bertjax.data import workers as worker_lib
from bertjax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_SHARD_BYTES = 64 * 2**20  # of text: size of a shard where data.num_shards is 0
_WORKER_BYTES = 192 * 2**20  # of text: below it, starting workers takes longer than the work
_BATCH_CHARS = 2**18  # of text: sent to a worker at a time
_PIECE_CHARS = 100_000  # longer sentences are split at white space before tokenization
_COMMIT_SECONDS = 20

Shard = tuple[str, int]  # split and number
# Ids of sentences end to end, tokens of each sentence, sentences of each document.
Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that decides the rows, apart from the text and the tokenizer."""

  kind: str = 'nsp'  # 'nsp', 'sop', 'doc_sentences' or 'full_sentences', see `data.instances`
  length: int = 128  # tokens per row
  format: str = 'prose'  # how the source is split into documents, see `data.text`
  text_key: str = 'text'  # field of the text in JSONL and TFDS, column in Parquet
  encoding: str = 'utf-8'  # of text files
  on_bad_row: str = 'stop'  # or 'skip' rows of JSONL and Parquet without a text
  heldout_fraction: float = 0.05  # of the documents; 1 = all, to score a text
  dupe_factor: int = 1  # times each document is used, with other pairs (as in Google's script)
  short_seq_prob: float = 0.1  # probability of a random shorter target length
  seed: int = 0  # of pairs and lengths
  binary: str = 'refuse'  # or 'skip' binary files
  num_shards: int = 0  # of training rows; 0 = one per 64 MB of text
  max_sequences_per_row: int = 1  # 1 = no packing

  def __post_init__(self):
    for name, valid, rule in (
      ('data.kind', self.kind in instances.KINDS, f'one of {instances.KINDS}'),
      ('data.length', 8 <= self.length < 2**16, 'in 8..65535'),
      ('data.heldout_fraction', 0 < self.heldout_fraction <= 1, 'above 0 and at most 1'),
      ('data.dupe_factor', self.dupe_factor >= 1, 'at least 1'),
      ('data.dupe_factor', self.dupe_factor == 1 or self.kind in instances.PAIR_KINDS,
       f'1 for kind={self.kind!r}, which has no pairs to sample again'),
      ('data.short_seq_prob', 0 <= self.short_seq_prob <= 1, 'in 0..1'),
      ('data.num_shards', 0 <= self.num_shards < 10**5, 'in 0..99999'),
      ('data.max_sequences_per_row', 1 <= self.max_sequences_per_row <= 100, 'in 1..100'),
      ('seed', 0 <= self.seed < 2**63, 'at least 0 and below 2**63'),
    ):  # fmt: skip
      if not valid:
        value = getattr(self, name.removeprefix('data.'))
        raise ValueError(f'{name} must be {rule}, got {value!r}.')


def prepare(
  source: str, tokenizer: Tokenizer, settings: Settings, directory, *, workers: int = -1,
  part: tuple[int, int] = (0, 1),
) -> dict | None:  # fmt: skip
  """Writes a prepared dataset and returns its manifest; resumes a killed run.

  Args:
    source: see `data.text`.
    tokenizer: whose ids are written; the dataset carries a copy.
    settings: what decides the rows.
    directory: of the dataset; DIRECTORY.incomplete until it is complete.
    workers: processes; 0 = none, -1 = one per core if the text is large enough.
    part: (i, n) of --shard=i/n prepares every n-th shard from the i-th, for n machines that share
      the directory. The one that finishes last writes the manifest; the others get None.

  Raises:
    ValueError: if the source cannot be read or has no text, or next-sentence prediction has too
      few documents; nothing is left behind.
  """
  if settings.format == 'tfrecord':
    from bertjax.data import tfrecords

    if part[1] > 1:
      raise ValueError('--shard divides text; TFRecords are read by one machine.')
    return tfrecords.prepare(source, tokenizer, settings, directory)
  files = [(name, size) for name, size, _ in text_lib.list_source(source)]
  size = sum(size for _, size in files)
  num_shards = settings.num_shards or 1 + size // _SHARD_BYTES
  shard_counts = {'train': 0 if settings.heldout_fraction == 1 else num_shards, 'heldout': 1}
  shards = [(split, number) for split, n in shard_counts.items() for number in range(n)]
  if part[0] >= len(shards):
    shard = f'--shard={part[0]}/{part[1]}'
    raise ValueError(f'{shard}: there are only {len(shards)} shards; raise data.num_shards.')
  plan = {
    'settings': dataclasses.asdict(settings), 'tokenizer': tokenizer.fingerprint,
    'source': [(n if n.startswith(('tfds:', 'http')) else pathlib.Path(n).name, size)
               for n, size in files],
  }  # fmt: skip
  columns = instances.columns(
    settings.kind, settings.length, tokenizer.vocab_size, settings.max_sequences_per_row
  )
  with dataset.writing(directory, plan, columns, part) as writer:
    if writer:  # else another process was faster
      tokenizer.save(writer.folder)
      folder, mine = writer.work / f'tokens-{part[0]}-of-{part[1]}', shards[part[0] :: part[1]]
      token_shards = TokenShards(folder, mine, columns['input_ids'][0])
      if token_shards.facts is None:
        report = text_lib.Report()
        _tokenize_source(source, size, settings, writer, num_shards, token_shards, report, workers)
        report.warn(tokenizer.lowercase and tokenizer.standard)
      todo = [shard for shard in mine if writer.shard(*shard) is None]
      if todo == mine:  # before the first shard
        _check(token_shards, source, settings, complete=mine == shards)
      _build_shards(todo, size, settings, writer, tokenizer, token_shards, workers)
      token_shards.clear()
      if not writer.finish(shard_counts, source=source, counts=token_shards.facts):
        return None
  return dataset.read_manifest(directory)


def _num_workers(workers: int, size: int, least: float) -> int:
  """As asked, or one per core for at least so many bytes of text."""
  return workers if workers >= 0 else worker_lib.cores() if size >= least else 0


# Documents to token ids


def _tokenize_source(
  source: str, size: int, settings: Settings, writer: dataset.Writer, num_shards: int,
  token_shards: 'TokenShards', report: text_lib.Report, workers: int,
) -> None:  # fmt: skip
  """Reads the documents that are not committed yet and appends their ids, in order."""
  documents = text_lib.read_documents(
    source, settings.format, text_key=settings.text_key, binary=settings.binary,
    encoding=settings.encoding, on_bad_row=settings.on_bad_row, report=report,
  )  # fmt: skip
  done, committed = token_shards.documents, time.monotonic()
  collections.deque(itertools.islice(documents, done), maxlen=0)  # skips what is committed
  folder, shards = str(writer.folder), tuple(token_shards.shards)
  tokenize_batch = functools.partial(
    tokenize, folder, settings.format, settings.heldout_fraction, num_shards, shards
  )
  workers = _num_workers(workers, size, _WORKER_BYTES)
  if not workers:
    _encoder(folder)  # once, before threads ask for it
  with (
    worker_lib.processes(workers) as in_order,
    io.progress('tokenizing', size, unit='B') as update,
  ):
    for count, tokens in in_order(tokenize_batch, worker_lib.batches(documents, _BATCH_CHARS)):
      for shard, arrays in tokens.items():
        token_shards.append(shard, arrays)
      done += count
      if time.monotonic() - committed > _COMMIT_SECONDS:
        token_shards.commit(done)
        committed = time.monotonic()
      update(report.bytes_read())
  token_shards.commit(done, dataclasses.asdict(report))


def tokenize(
  directory: str, format: str, heldout_fraction: float, num_shards: int, shards: tuple[Shard, ...],
  documents: list[str],
) -> tuple[int, dict[Shard, Tokens]]:  # fmt: skip
  """The number of documents, and their token ids by shard; what a worker process does.

  Args:
    directory: of the tokenizer.
    format: how a document is split into sentences.
    heldout_fraction: fraction of documents that are held out.
    num_shards: shards of training rows, of all machines.
    shards: of this machine; documents of others are skipped.
    documents: a batch of `read_documents`.
  """
  (tokenizer, encode), kept, sentences = _encoder(directory), [], []
  for text, shard in zip(documents, _shards(documents, heldout_fraction, num_shards), strict=True):
    if shard in shards:
      document = tokenizer.as_running_text(text_lib.split_document(text, format))
      kept.append((shard, len(document)))
      sentences += document
  tokens, lengths = _encode(encode, sentences)
  ends, first = np.concatenate([[0], np.cumsum(lengths)]), 0
  result = collections.defaultdict(lambda: ([], [], []))
  for shard, count in kept:
    last = first + count
    nonempty = lengths[first:last][lengths[first:last] > 0]
    if len(nonempty):
      arrays = tokens[ends[first] : ends[last]], nonempty, [len(nonempty)]
      for column, array in zip(result[shard], arrays, strict=True):
        column.append(array)
    first = last
  by_shard = {shard: tuple(map(np.concatenate, columns)) for shard, columns in result.items()}
  return len(documents), by_shard


def _shards(documents: list[str], heldout_fraction: float, num_shards: int) -> list[Shard]:
  """The shard of each document, by a hash of its text."""
  contents = (text.encode('utf-8', 'surrogatepass') for text in documents)
  keys, heldout = prng.choose_heldout(contents, heldout_fraction)
  numbers = prng.hash_u64(keys, prng.SHARD) % np.uint64(max(num_shards, 1))
  pairs = zip(heldout, numbers.tolist(), strict=True)
  return [('heldout', 0) if out else ('train', number) for out, number in pairs]


@functools.lru_cache(1)
def _encoder(directory: str) -> tuple[Tokenizer, Callable]:
  """The tokenizer, and a function of strings to (ids end to end, tokens per string): TensorFlow's
  where it can, which is faster."""
  tokenizer = Tokenizer.from_dir(directory)
  if tokenizer.standard and importlib.util.find_spec('tensorflow_text'):
    from bertjax.data import tokenizer_tf

    if not tokenizer_tf.unsupported(tokenizer):
      return tokenizer, tokenizer_tf.make_flat_encoder(tokenizer)
  return tokenizer, tokenizer.encode_flat


def _encode(encode: Callable, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
  """All ids end to end, and the number of tokens of each sentence."""
  if all(len(sentence) <= _PIECE_CHARS for sentence in sentences):
    return encode(sentences)
  pieces = [split_huge(sentence) for sentence in sentences]
  tokens, lengths = encode(list(itertools.chain.from_iterable(pieces)))
  sentence = np.repeat(np.arange(len(pieces)), list(map(len, pieces)))
  return tokens, np.bincount(sentence, lengths, len(pieces)).astype(np.int64)


def split_huge(sentence: str) -> list[str]:
  """Splits a huge sentence at white space, where no tokenizer continues a word."""
  if len(sentence) <= _PIECE_CHARS:
    return [sentence]
  inside = r'[^ \t\n\r]'
  return re.findall(rf'(?s).{{1,{_PIECE_CHARS}}}(?!{inside})|{inside}+', sentence)


# Token ids on disk

_FILES = ('tokens', 'sentences', 'documents')


class TokenShards:
  """Intermediate files between tokenizing and building: token ids by shard.

  A shard has three append-only files: its ids, the tokens of each sentence, the sentences of each
  document. `state.json` records the committed length of each file.

  Args:
    folder: of the files, which are truncated to their committed length.
    shards: those of this machine.
    dtype: of the ids.

  Attributes:
    documents: committed documents of the source.
    facts: counts for the manifest once all documents are committed, else None.
  """

  def __init__(self, folder: pathlib.Path, shards: list[Shard], dtype: str):
    self.folder, self.shards, self.dtype = folder, shards, dtype
    self._state_file, self._files = folder / 'state.json', {}
    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(self._state_file.read_text()) if self._state_file.exists() else {}
    self.documents: int = state.get('documents', 0)
    self.facts: dict | None = state.get('facts')
    dataset.allow_files()
    for shard in shards if self.facts is None else ():
      for name in _FILES:
        path = _path(folder, shard, name)
        file = self._files[shard, name] = path.open('ab')
        file.truncate(state.get('sizes', {}).get(path.name, 0))
        file.seek(0, 2)

  def append(self, shard: Shard, tokens: Tokens) -> None:
    for name, array in zip(_FILES, tokens, strict=True):
      dtype = self.dtype if name == 'tokens' else np.uint32
      self._files[shard, name].write(np.ascontiguousarray(array, dtype))

  def commit(self, documents: int, facts: dict | None = None) -> None:
    """Records that all of so many documents is appended; `facts` marks the end of the source."""
    self.documents, self.facts, sizes = documents, facts, {}
    for file in self._files.values():
      file.flush()
      sizes[pathlib.Path(file.name).name] = file.tell()
    state = {'documents': documents, 'facts': facts, 'sizes': sizes}
    io.write_text(self._state_file, json.dumps(state))

  def clear(self) -> None:
    """Deletes the ids; `state.json` stays and shows that this machine is done."""
    for path in self.folder.glob('*-*'):
      path.unlink(missing_ok=True)


def _path(folder, shard: Shard, name: str) -> pathlib.Path:
  return folder / f'{shard[0]}-{shard[1]:05d}.{name}'


def read_tokens(folder: pathlib.Path, shard: Shard, dtype: str) -> instances.Corpus:
  """The documents of a shard, ids memory-mapped."""
  arrays = []
  for name in _FILES:
    path, file_dtype = _path(folder, shard, name), dtype if name == 'tokens' else np.uint32
    empty = not path.stat().st_size
    arrays.append(np.empty(0, file_dtype) if empty else np.memmap(path, file_dtype, 'r'))
  starts = (np.concatenate([[0], np.cumsum(a, dtype=np.int64)]) for a in arrays[1:])
  return instances.Corpus(arrays[0], *starts)


# Token ids to rows


def _build_shards(
  shards: list[Shard], size: int, settings: Settings, writer: dataset.Writer,
  tokenizer: Tokenizer, token_shards: TokenShards, workers: int,
) -> None:  # fmt: skip
  """Builds the shards that are not written yet, each in one process."""
  unknown = tokenizer.special.get('unk', -1)
  build = functools.partial(
    _build_shard, writer, settings, tokenizer.template, tokenizer.pad_id, unknown,
    token_shards.folder, token_shards.dtype,
  )  # fmt: skip
  workers = _num_workers(workers, size, 2 * _WORKER_BYTES / settings.dupe_factor)
  gc.freeze()  # else each collection walks all of TensorFlow: a third of the time in one process
  try:
    with (
      worker_lib.processes(workers, threads=False) as in_order,
      io.progress('building shards', len(shards)) as update,
    ):
      for done, _ in enumerate(in_order(build, shards), 1):
        update(done)
  finally:
    gc.unfreeze()


def _build_shard(
  writer, settings: Settings, template: instances.Template, pad_id: int, unknown: int, folder,
  dtype, shard: Shard,
) -> None:  # fmt: skip
  """Makes the instances of a shard, packs them into rows and writes these."""
  split, number = shard
  corpus = read_tokens(folder, shard, dtype)
  sequences = instances.build(
    corpus, settings.kind, length=settings.length, seed=int(prng.hash_u64(settings.seed, number)),
    short_seq_prob=settings.short_seq_prob,
    dupe_factor=settings.dupe_factor if split == 'train' else 1, separators=len(template.between),
  )  # fmt: skip
  counts = {
    'documents': len(corpus), 'sentences': len(corpus.sentences) - 1, 'tokens': len(corpus.tokens),
    'unknown': int((np.asarray(corpus.tokens) == unknown).sum()),
  }  # fmt: skip
  sequences = instances.tally(sequences, corpus, counts)
  length, most = settings.length, settings.max_sequences_per_row
  rows = packing.first_fit(sequences, length, most, template.size)
  columns = instances.to_columns(
    rows, corpus.tokens, length, most, template=template, pad_id=pad_id
  )
  writer.add_shard(split, number, columns, counts)  # reads the rows, which completes the counts


def _check(token_shards: TokenShards, source: str, settings: Settings, complete: bool) -> None:
  """Raises ValueError if the documents do not suffice; `complete`: these are all shards."""
  sizes, longest = {'train': 0, 'heldout': 0}, 0
  for shard in token_shards.shards:
    corpus = read_tokens(token_shards.folder, shard, token_shards.dtype)
    sizes[shard[0]] += len(corpus)
    longest = max(longest, int(np.diff(corpus.documents).max(initial=0)))
  where, total = f'data.input={source}', sum(sizes.values())
  least = 2 if settings.kind == 'nsp' else 1
  if complete and not total:
    raise ValueError(f'{where} has no text once blank documents are dropped.')
  if complete and total < least:
    raise ValueError(
      f'{where} is one document (data.format={settings.format}), and next-sentence prediction '
      'samples negatives from other documents; set another format, add text, or train without it '
      '(--config.nsp=False).'
    )
  for split, name in (('train', 'train'), ('heldout', 'held-out')):
    enough = sizes[split] >= least or (split == 'train' and settings.heldout_fraction == 1)
    if complete and not enough:
      raise ValueError(
        f'of {total} documents, {sizes[split]} were assigned to {name} and {least} are needed; '
        f'change data.heldout_fraction (now {settings.heldout_fraction}) or add documents.'
      )
  if settings.kind in instances.PAIR_KINDS and longest < 2:
    raise ValueError(
      f'every document of {where} is one sentence (data.format={settings.format}), so none is '
      'followed by a true next one; set another format or train without pairs '
      '(--config.nsp=False).'
    )
