"""Prepare: turns raw text into training rows on disk, once, for any number of runs and hosts.

  bertjax prepare --config=configs/pretrain/bert_mini.py --out=DIR \\
      --config.data.input=TEXTS --config.data.vocab=vocab.txt

Documents are split by a hash of their text into training and held-out ones and into shards, so
exact duplicates never stand on both sides. Worker processes tokenise and write shards in parallel;
`--shard=i/n` on each of n machines that share the folder divides the shards between them; neither
changes a byte. The same command goes on after a kill. With a recipe of configs/finetune it writes a
task's training rows instead, for its `--config.data.prepared`. The folder carries its vocabulary;
`--config.data.prepared=DIR` trains from it, also on machines without TensorFlow.
"""

import collections
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable

import numpy as np
from etils import epath

from bertjax.data import examples, packing, sources, store
from bertjax.data import workers as worker_lib
from bertjax.data.batches import Batches
from bertjax.data.masking import Masking, unmasked
from bertjax.data.order import SHARD, mix
from bertjax.data.spill import Part, Spill, read_corpus
from bertjax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

FLAGS = {
  'config': ('bert_mini', 'a recipe, path or name; its data section says what to prepare'),
  'out': ('', 'the folder to write; a finished one is refused, one left by a kill is completed'),
  'workers': (-1, 'worker processes; 0 = none, -1 = one a core where the text is worth it'),
  'format': ('rows', "'rows' to train from, or 'google': TFRecords with masks drawn for good"),
  'shard': ('0/1', "'i/n': do part i, counted from 0, of n; all n write into the same --out"),
}

_SHARD_BYTES = 64 * 2**20  # of text: a shard's size where data.shards is 0
_WORKER_BYTES = 192 * 2**20  # of text: less is done sooner than worker processes start
_THREAD_BYTES = 4 * 2**20  # of text: less is read and tokenised by turns
_BATCH_CHARS = 2**18  # of text: what a worker gets at a time
_COMMIT_SECONDS = 20
_PIECE_CHARS = 100_000  # longer sentences are tokenised in parts, cut at white space


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that decides the rows, apart from text and tokenizer.

  Attributes:
    kind: 'nsp', 'sop', 'doc_sentences' or 'full_sentences', see `data.examples`.
    length: tokens a row.
    format: how the source falls into documents, see `data.sources`.
    text_key: field of the text in JSONL and TFDS.
    heldout: share of documents kept for evaluation.
    passes: passes over the documents with other pairs (Google's dupe_factor).
    short_probability: share of documents cut to a random shorter length in a pass.
    seed: of pairs and lengths.
    binary: 'refuse' or 'skip' binary files.
    shards: of training rows; 0 = one for each 64 MB of text.
    sequences: packed into a row at most; 1 = no packing.
  """

  kind: str = 'nsp'
  length: int = 128
  format: str = 'prose'
  text_key: str = 'text'
  heldout: float = 0.05
  passes: int = 1
  short_probability: float = 0.1
  seed: int = 0
  binary: str = 'refuse'
  shards: int = 0
  sequences: int = 1

  def __post_init__(self):
    if self.kind not in examples.KINDS:
      raise ValueError(f'kind must be one of {examples.KINDS}, got {self.kind!r}.')
    if not 8 <= self.length < 2**16:
      raise ValueError(f'data.length must be in 8..65535, got {self.length}.')
    if not 0 < self.heldout < 1:
      raise ValueError(f'data.heldout must be between 0 and 1, got {self.heldout}.')
    if self.passes < 1:
      raise ValueError(f'data.passes must be at least 1, got {self.passes}.')
    if self.passes > 1 and self.kind not in examples.PAIR_KINDS:
      raise ValueError(
        f'data.passes makes other pairs each time, {self.kind!r} has none; got {self.passes}, '
        'pass --config.data.passes=1.'
      )
    if not 0 <= self.shards <= 99_999:
      raise ValueError(f'data.shards must be in 0..99999, got {self.shards}.')
    if not 1 <= self.sequences <= 100:
      raise ValueError(f'data.sequences must be in 1..100, got {self.sequences}.')
    if not 0 <= self.short_probability <= 1:
      raise ValueError(f'data.short_probability must be in [0, 1], got {self.short_probability}.')


def settings_of(config) -> Settings:
  """The settings that a recipe's config asks for."""
  names = {field.name for field in dataclasses.fields(Settings)} - {'kind', 'seed'}
  kind = config.data.kind or ('nsp' if config.nsp else 'doc_sentences')
  if config.nsp and kind not in examples.PAIR_KINDS:
    raise ValueError(
      f'data.kind={kind!r} has no sentence pairs; train without them (--config.nsp=False) or '
      f'choose one of {examples.PAIR_KINDS}.'
    )
  return Settings(kind=kind, seed=config.seed, **{name: config.data[name] for name in names})


def run(
  config, *, out: str, workers: int = -1, format: str = 'rows', shard: str = '0/1'
) -> dict | None:
  """Prepares what the config's data section names into `out`; returns the manifest when whole."""
  if not out:
    raise ValueError('prepare needs --out=DIR, the folder to write.')
  whole = epath.Path(out) / 'manifest.json' if '://' in out else epath.Path(out)
  if whole.exists():  # what was begun in a bucket is written again
    raise ValueError(f'{out} exists already; remove it or choose another --out.')
  if 'task' in config:
    from bertjax import finetune

    if (workers, format, shard) != (-1, 'rows', '0/1'):
      raise ValueError("--workers, --format and --shard are for pre-training's text.")
    manifest = finetune.prepare_rows(config, out)
    print(f'prepared {out}: {manifest["counts"]}')
    return manifest
  match = re.fullmatch(r'(\d+)/(\d+)', shard)
  if not match or int(match[1]) >= int(match[2]):
    raise ValueError(f'--shard must be i/n with i in 0..n-1, got {shard!r}.')
  part = (int(match[1]), int(match[2]))
  if format not in ('rows', 'google'):
    raise ValueError(f"--format must be 'rows' or 'google', got {format!r}.")
  if format == 'google':  # before the long work
    Masking(**config.masking)
    if not config.nsp or config.data.sequences > 1:
      raise ValueError(
        "Google's TFRecords hold sentence pairs, one a row; set nsp=True and data.sequences=1."
      )
  folder, remote = out, '://' in out
  if remote or format == 'google':  # goes through a folder of rows on this machine
    if part[1] > 1:
      raise ValueError(f'--shard writes rows into a folder that all machines mount, got {out}.')
    key = _key(config, out if remote else str(pathlib.Path(out).resolve()))
    folder = cache_folder(config.data.cache_dir) / f'for-{key}'
  manifest = prepare(
    config.data.input, load_vocab(config), settings_of(config), folder, workers=workers, part=part
  )
  if format == 'google':
    _write_tfrecords(config, folder, epath.Path(out))
  elif remote:
    store.copy(folder, out)
  if folder != out:
    epath.Path(folder).rmtree()
  print(f'prepared {out}: {manifest["counts"]}' if manifest else f'{out}: part {shard} is done.')
  return manifest


def _write_tfrecords(config, folder, out) -> None:
  """Writes rows as create_pretraining_data.py would, a file a shard, and the vocabulary."""
  from bertjax.data import tfrecords

  tokenizer, masking = Tokenizer.from_dir(folder), Masking(**config.masking)
  partial = out.parent / f'{out.name}.incomplete'
  if partial.exists():
    partial.rmtree()
  tokenizer.save(partial)
  shards = store.read_manifest(folder)['shards']
  for split, entries in shards.items():
    made = Batches(
      store.Rows(folder, split), 1024, config.seed, masking, tokenizer.vocab_size,
      tokenizer.special, tokenizer.word_starts,
    )  # fmt: skip
    trained = split == 'train'  # evaluation's order is the rows', its masks are epoch 0's
    make = made.shuffled if trained else made.evaluation
    batches = map(make, range(made.evaluation_steps))
    count = len(entries)
    paths = [partial / f'{split}-{i:05d}-of-{count:05d}.tfrecord' for i in range(count)]
    tfrecords.write_tfrecords(paths, batches)
  partial.rename(out)


def load_vocab(config) -> Tokenizer:
  """The tokenizer a config names by `data.vocab` and `data.lowercase`."""
  if not config.data.vocab:
    raise ValueError(
      'data.vocab is empty: name a vocab.txt (--config.data.vocab=PATH); '
      '`bertjax vocab --input=TEXTS --out=vocab.txt` trains one.'
    )
  return Tokenizer.from_file(
    config.data.vocab, lowercase=config.data.lowercase, rules=config.data.rules
  )


def prepare(
  source: str, tokenizer: Tokenizer, settings: Settings, directory, *, workers: int = -1,
  part: tuple[int, int] = (0, 1),
) -> dict | None:  # fmt: skip
  """Writes a prepared folder and returns its manifest; goes on where a killed run stopped.

  Args:
    source: see `data.sources`.
    tokenizer: whose ids to write.
    settings: what decides the rows.
    directory: the folder; it grows as DIRECTORY.incomplete.
    workers: processes, see `FLAGS`.
    part: (i, n), this machine's part; the manifest is written by who finishes last, and the others
      get None.

  Raises:
    ValueError: if the source cannot be read or leaves no text, or next-sentence prediction has
      too few documents; nothing is left behind.
  """
  store.refuse_remote(directory)
  directory = pathlib.Path(directory)
  if settings.format == 'tfrecord':
    if part[1] > 1:
      raise ValueError('--shard divides text; TFRecords are read by one machine.')
    return _from_tfrecords(source, tokenizer, settings, directory)
  incomplete = directory.with_name(directory.name + '.incomplete')
  listing = list_source(source)
  size = sum(size for _, size in listing)
  shards = settings.shards or 1 + size // _SHARD_BYTES
  outputs = [('train', number) for number in range(shards)] + [('heldout', 0)]
  mine = outputs[part[0] :: part[1]]
  if not mine:
    raise ValueError(
      f'--shard={part[0]}/{part[1]}: there are only {len(outputs)} shards to divide; raise '
      'data.shards or take fewer parts.'
    )
  plan = {
    'settings': dataclasses.asdict(settings), 'tokenizer': tokenizer.fingerprint,
    'source': [(n if n.startswith('tfds:') else pathlib.Path(n).name, size) for n, size in listing],
  }  # fmt: skip
  with store.lock(incomplete / f'lock-{part[0]}-of-{part[1]}'):
    if (manifest := _finished(directory, plan)) is not None:  # another process was faster
      shutil.rmtree(incomplete, ignore_errors=True)
      return manifest
    columns = examples.columns(
      settings.kind, settings.length, tokenizer.vocab_size, settings.sequences
    )
    try:
      writer = store.Writer(directory, plan, columns)
      tokenizer.save(writer.folder)
      report = _write_shards(writer, source, size, settings, tokenizer, shards, mine, workers, part)
    except ValueError as error:
      foreign = isinstance(error, store.StoreError) and (incomplete / 'plan.json').exists()
      if part[1] == 1 and not foreign:  # what was begun with another plan is not ours to delete
        shutil.rmtree(incomplete, ignore_errors=True)
      raise
    whole = writer.finish(
      {'train': shards, 'heldout': 1}, settings=dataclasses.asdict(settings), source=source,
      tokenizer=tokenizer.fingerprint, counts=report,
    )  # fmt: skip
  return store.read_manifest(directory) if whole else None


def _from_tfrecords(source, tokenizer, settings, directory) -> dict:
  """Rows of create_pretraining_data.py, masks as they are.

  These files know no documents, so rows are held out by a hash of their unmasked ids: copies of a
  row with other masks stay together, but rows of one document may stand on both sides.
  """
  from bertjax.data import tfrecords

  first = next(tfrecords.rows_from_tfrecords(source, tokenizer.vocab_size, size=1), None)
  if first is None:
    raise ValueError(f'data.input={source} holds no records.')
  length, slots = first['input_ids'].shape[1], first['masked_lm_ids'].shape[1]
  if (settings.kind, settings.length, settings.sequences) != ('nsp', length, 1):
    raise ValueError(
      f'data.input={source} holds sentence pairs (nsp=True) of {length} tokens, one a row; got '
      f'kind={settings.kind}, data.length={settings.length}, data.sequences={settings.sequences}.'
    )
  columns = tfrecords.masked_columns(length, slots, tokenizer.vocab_size)
  plan = {'settings': dataclasses.asdict(settings), 'tokenizer': tokenizer.fingerprint}
  with store.lock(directory.with_name(f'{directory.name}.incomplete') / 'lock'):
    writer = store.Writer(directory, plan, columns)
    tokenizer.save(writer.folder)
    for split in store.SPLITS:
      batches = (
        _held_out(batch, settings.heldout, split == 'heldout')
        for batch in tfrecords.rows_from_tfrecords(source, tokenizer.vocab_size)
      )
      if not writer.add_shard(split, 0, batches)['rows']:
        shutil.rmtree(writer.folder)
        raise ValueError(
          f'no row fell to the {split} side; change data.heldout (now {settings.heldout}).'
        )
    writer.finish(
      dict.fromkeys(store.SPLITS, 1), settings=dataclasses.asdict(settings), source=source,
      tokenizer=tokenizer.fingerprint,
    )  # fmt: skip
  return store.read_manifest(directory)


def _held_out(batch: dict, share: float, wanted: bool) -> dict:
  """The rows of a batch on one side."""
  hashes = (hashlib.blake2b(row, digest_size=8).digest() for row in unmasked(batch))
  keys = [int.from_bytes(digest, 'little') for digest in hashes]
  held = np.array([key < share * 2**64 for key in mix(np.array(keys, np.uint64)).tolist()])
  return {name: array[held == wanted] for name, array in batch.items()}


def _finished(directory, plan: dict) -> dict | None:
  """The manifest of a folder that holds what the plan would make; the writer refuses any other."""
  if not (directory / 'manifest.json').exists():
    return None
  manifest = store.read_manifest(directory)
  same = all(manifest[name] == plan[name] for name in ('settings', 'tokenizer'))
  return manifest if same else None


def _write_shards(writer, source, size, settings, tokenizer, shards, mine, workers, part) -> dict:
  """Both halves of the work, for this machine's outputs; returns what reading met."""
  dtype = examples.columns(settings.kind, settings.length, tokenizer.vocab_size)['input_ids'][0]
  folder = writer.folder / f'spill-{part[0]}-of-{part[1]}'
  spill = Spill(folder, [_name(output) for output in mine], dtype)
  if spill.facts is None:
    encoder = (str(writer.folder), settings, shards, tuple(mine))
    count = _auto(workers, size, _WORKER_BYTES)
    threads = size >= _THREAD_BYTES
    if threads and not count:
      _encoder(*encoder)  # once, before threads ask for it
    with worker_lib.processes(count, threads) as in_order:
      _tokenise(source, settings, spill, functools.partial(_encode, encoder), in_order)
  spill.close()
  read = functools.partial(read_corpus, folder, dtype=dtype)
  todo = [output for output in mine if writer.shard(*output) is None]
  if len(todo) == len(mine):
    corpora = {output: read(_name(output)) for output in mine}
    if part[1] == 1:
      _check_documents(corpora, source, settings)
    _check_pairs(corpora.values(), source, settings)
  build = functools.partial(_build_shard, writer, settings, tokenizer.special, read)
  count = _auto(workers, size * settings.passes, 2 * _WORKER_BYTES) if len(todo) > 2 else 0
  gc.freeze()  # else each collection walks all of TensorFlow: a third of the time in one process
  try:
    with worker_lib.processes(count, threads=False) as in_order:
      for _ in in_order(build, todo):
        pass
  finally:
    gc.unfreeze()
  spill.clear()
  return spill.facts


def _auto(workers: int, size: int, least: int) -> int:
  """How many processes: as asked, or by the bytes of text."""
  return workers if workers >= 0 else worker_lib.cores() if size >= least else 0


def _name(output) -> str:
  return f'{output[0]}-{output[1]:05d}'


def _tokenise(source, settings, spill: Spill, encode, in_order) -> None:
  """The first half: reads documents and appends their ids to the outputs, in order."""
  report = sources.Report()
  texts = sources.read_documents(
    source, settings.format, text_key=settings.text_key, binary=settings.binary, report=report
  )
  done, saved, sizes = spill.texts, time.monotonic(), collections.deque()
  collections.deque(itertools.islice(texts, done), maxlen=0)  # of a run that was killed

  def batches():
    for batch in worker_lib.batches(texts, _BATCH_CHARS):
      sizes.append(len(batch))
      yield batch

  for parts in in_order(encode, batches()):
    for name, part in parts.items():
      spill.append(name, part)
    done += sizes.popleft()
    if time.monotonic() - saved > _COMMIT_SECONDS:
      spill.commit(done)
      saved = time.monotonic()
      _log.info('prepare: %d documents tokenised', done)
  report.tell()
  spill.commit(done, dataclasses.asdict(report))


def _encode(encoder: tuple, texts: list[str]) -> dict[str, Part]:
  return _encoder(*encoder)(texts)


@functools.lru_cache(1)
def _encoder(folder: str, settings: Settings, shards: int, outputs: tuple) -> Callable:
  """Made once in a process: documents to the token ids of each output."""
  tokenizer = Tokenizer.from_dir(folder)
  encode = tokenizer.encode_flat
  if importlib.util.find_spec('tensorflow_text'):
    from bertjax.data import graph_tokenizer

    encode = graph_tokenizer.make_flat_encoder(tokenizer)

  def run(texts: list[str]) -> dict[str, Part]:
    kept, sentences = [], []
    for text, output in zip(texts, _outputs(texts, settings.heldout, shards), strict=True):
      if output in outputs:
        pieces = sources.split_document(text, settings.format)
        kept.append((_name(output), len(pieces)))
        sentences += pieces
    tokens, lengths = _encode_sentences(encode, sentences)
    return _divide(kept, tokens, lengths)

  return run


def _outputs(texts, heldout: float, shards: int) -> list[tuple[str, int]]:
  """Where each text goes, by a hash of it: exact duplicates go together."""
  digests = (
    hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest() for text in texts
  )
  keys = np.array([int.from_bytes(digest, 'little') for digest in digests], np.uint64)
  held = [key < heldout * 2**64 for key in mix(keys).tolist()]
  numbers = (mix(keys, SHARD) % np.uint64(shards)).tolist()
  return [('heldout', 0) if h else ('train', n) for h, n in zip(held, numbers, strict=True)]


def _encode_sentences(encode, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
  """All ids end to end, and how many each sentence has."""
  pieces = sentences
  if huge := any(len(sentence) > _PIECE_CHARS for sentence in sentences):
    cut = [_cut(sentence) for sentence in sentences]
    pieces = list(itertools.chain.from_iterable(cut))
  tokens, lengths = encode(pieces)
  if huge:
    of = np.repeat(np.arange(len(cut)), [len(parts) for parts in cut])
    lengths = np.bincount(of, lengths, len(cut)).astype(np.int64)
  return tokens, lengths


def _cut(sentence: str) -> list[str]:
  """Cuts a huge sentence at the white space that no tokenizer drops, so words end there anyway."""
  inside = r'[^ \t\n\r]'
  return re.findall(rf'(?s).{{1,{_PIECE_CHARS}}}(?!{inside})|{inside}+', sentence)


def _divide(kept: list[tuple[str, int]], tokens, lengths) -> dict[str, Part]:
  """Sorts the documents, (output, number of sentences) each, into the outputs."""
  parts = collections.defaultdict(lambda: ([], [], []))
  ends, sentence = np.concatenate([[0], np.cumsum(lengths)]), 0
  for name, count in kept:
    own = lengths[sentence : sentence + count]
    own = own[own > 0]
    if len(own):
      start, sentence_end = ends[sentence], sentence + count
      for column, value in zip(
        parts[name], (tokens[start : ends[sentence_end]], own, [len(own)]), strict=True
      ):
        column.append(value)
    sentence += count
  return {name: tuple(map(np.concatenate, part)) for name, part in parts.items()}


def _build_shard(writer: store.Writer, settings: Settings, special, read, output) -> None:
  """The second half: the rows of one shard from its tokens."""
  split, number = output
  corpus = read(_name(output))
  rows = examples.build(
    corpus, settings.kind, length=settings.length, seed=int(mix(settings.seed, number)),
    short_probability=settings.short_probability,
    passes=settings.passes if split == 'train' else 1,
  )  # fmt: skip
  packed = packing.first_fit(rows, settings.length, settings.sequences)
  ids = {f'{name}_id': special[name] for name in ('cls', 'sep', 'pad')}
  columns = examples.to_columns(packed, corpus.tokens, settings.length, settings.sequences, **ids)
  writer.add_shard(split, number, columns, documents=len(corpus), tokens=len(corpus.tokens))


def cache_folder(cache_dir: str = '') -> epath.Path:
  """Where raw text is prepared and remote rows are copied."""
  home = pathlib.Path.home() / '.cache' / 'bertjax'
  return epath.Path(cache_dir or os.environ.get('BERTJAX_CACHE') or home)


def list_source(source: str) -> list[tuple[str, int]]:
  """Name and bytes of everything that a source reads; (name, 0) for what is no file."""
  return [(name, size) for name, size, _ in _files(source)]


def _files(source: str) -> list[tuple[str, int, float]]:
  """(name, bytes, time of change)."""
  files = []
  for part in sources.split_source(source):
    if part == 'embedded':
      files.append((f'Python {platform.python_version()}', 0, 0))
      continue
    path = part.removeprefix('tfds:').partition(':')[0] if part.startswith('tfds:') else part
    if path != part:
      files.append((part, 0, 0))  # with its version and split
    if path == part or epath.Path(path).is_dir():
      stats = [(str(p), p.stat()) for p in sources.list_files(path)]
      files += [(name, stat.length, stat.mtime) for name, stat in stats]
  return files


def _key(config, *more) -> str:
  """A hash of the settings, the vocabulary, and the names, sizes and times of the files (of Python,
  if the text is its own)."""
  key = json.dumps([
    store.VERSION, config.data.input, _files(config.data.input),
    dataclasses.asdict(settings_of(config)), load_vocab(config).fingerprint, *more,
  ])  # fmt: skip
  return hashlib.sha256(key.encode()).hexdigest()[:16]


def cached(config, cache_dir='') -> epath.Path:
  """The prepared folder for a config's raw text: found in the cache, or prepared into it.

  The cache is `data.cache_dir`, `$BERTJAX_CACHE` or ~/.cache/bertjax.
  """
  folder = cache_folder(cache_dir) / _key(config)
  if (folder / 'manifest.json').exists():
    _log.info('prepared rows: found in %s', folder)
  else:
    _log.info('preparing %s into %s', config.data.input or 'nothing', folder)
    manifest = prepare(config.data.input, load_vocab(config), settings_of(config), folder)
    counts = manifest['counts']
    _log.info('prepared: %s', '  '.join(f'{name} {value:,}' for name, value in counts.items()))
  return folder


def _check_documents(corpora: dict[tuple[str, int], examples.Corpus], source, settings) -> None:
  documents = collections.Counter()
  for (split, _), corpus in corpora.items():
    documents[split] += len(corpus)
  train, heldout = (documents[split] for split in store.SPLITS)
  if not train + heldout:
    raise ValueError(f'data.input={source} holds no text once blank documents are left out.')
  if train + heldout == 1 and settings.kind == 'nsp':
    raise ValueError(
      f'data.input={source} is one document (data.format={settings.format}), and next-sentence '
      'prediction draws its wrong answers from others; name another format, add text, or train '
      'without it (--config.nsp=False).'
    )
  least = 2 if settings.kind == 'nsp' else 1
  for split, count in (('train', train), ('held-out', heldout)):
    if count < least:
      raise ValueError(
        f'of {train + heldout} documents, {count} fell to the {split} side and {least} are needed; '
        f'change data.heldout (now {settings.heldout}) or add documents.'
      )
  fewest = min(map(len, corpora.values()))
  if fewest < least == 2:
    raise ValueError(
      f'next-sentence prediction draws its wrong answers from other documents, and one of '
      f'{len(corpora) - 1} shards got {fewest} document(s); add text, use fewer shards '
      '(--config.data.shards), or train without it (--config.nsp=False).'
    )


def _check_pairs(corpora: Iterable[examples.Corpus], source, settings) -> None:
  longest = max(int(np.diff(corpus.documents).max(initial=0)) for corpus in corpora)
  if settings.kind in examples.PAIR_KINDS and longest < 2:
    raise ValueError(
      f'every document of data.input={source} is one sentence (data.format={settings.format}), so '
      'none is followed by a true next one; name another format or train without pairs '
      '(--config.nsp=False).'
    )
