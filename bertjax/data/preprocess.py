"""From a source of texts to a folder of prepared rows, in two halves: documents are tokenised into
files of ids for each shard, and shards are built from these. Both resume after a kill."""

import collections
import dataclasses
import functools
import gc
import itertools
import logging
import pathlib
import shutil
import time
from collections.abc import Iterable

import numpy as np

from bertjax.data import dataset, encode, instances, packing
from bertjax.data import text as text_lib
from bertjax.data import workers as worker_lib
from bertjax.data.masking import unmasked
from bertjax.data.prng import hash_u64
from bertjax.data.spill import Spill, output_name, read_corpus
from bertjax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_SHARD_BYTES = 64 * 2**20  # of text: a shard's size where data.num_shards is 0
_WORKER_BYTES = 192 * 2**20  # of text: below it, starting workers takes longer than the work
_THREAD_BYTES = 4 * 2**20  # of text: less is read and tokenised by turns
_BATCH_CHARS = 2**18  # of text: what a worker gets at a time
_COMMIT_SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that decides the rows, apart from text and tokenizer."""

  kind: str = 'nsp'  # 'nsp', 'sop', 'doc_sentences' or 'full_sentences', see `data.instances`
  length: int = 128  # tokens a row
  format: str = 'prose'  # how the source falls into documents, see `data.text`
  text_key: str = 'text'  # field of the text in JSONL and TFDS, column in Parquet
  encoding: str = 'utf-8'  # of text files
  on_bad_row: str = 'stop'  # or 'skip' rows of JSONL and Parquet that hold no text
  heldout_fraction: float = (
    0.05  # fraction of documents kept for evaluation; 1 = all, to score a text
  )
  dupe_factor: int = 1  # passes over the documents with other pairs (Google's dupe_factor)
  short_seq_prob: float = 0.1  # share of documents cut to a random shorter length in a pass
  seed: int = 0  # of pairs and lengths
  binary: str = 'refuse'  # 'refuse' or 'skip' binary files
  num_shards: int = 0  # of training rows; 0 = one for each 64 MB of text
  max_sequences_per_row: int = 1  # packed into a row at most; 1 = no packing

  def __post_init__(self):
    if self.kind not in instances.KINDS:
      raise ValueError(f'kind must be one of {instances.KINDS}, got {self.kind!r}.')
    if not 8 <= self.length < 2**16:
      raise ValueError(f'data.length must be in 8..65535, got {self.length}.')
    if not 0 < self.heldout_fraction <= 1:
      raise ValueError(
        f'data.heldout_fraction must be above 0 and at most 1, got {self.heldout_fraction}.'
      )
    if not 0 <= self.seed < 2**63:
      raise ValueError(f'seed must be at least 0 and below 2**63, got {self.seed}.')
    if self.dupe_factor < 1:
      raise ValueError(f'data.dupe_factor must be at least 1, got {self.dupe_factor}.')
    if self.dupe_factor > 1 and self.kind not in instances.PAIR_KINDS:
      raise ValueError(
        f'data.dupe_factor makes other pairs each time, {self.kind!r} has none; got {self.dupe_factor}, '
        'pass --config.data.dupe_factor=1.'
      )
    if not 0 <= self.num_shards <= 99_999:
      raise ValueError(f'data.num_shards must be in 0..99999, got {self.num_shards}.')
    if not 1 <= self.max_sequences_per_row <= 100:
      raise ValueError(
        f'data.max_sequences_per_row must be in 1..100, got {self.max_sequences_per_row}.'
      )
    if not 0 <= self.short_seq_prob <= 1:
      raise ValueError(f'data.short_seq_prob must be in [0, 1], got {self.short_seq_prob}.')


def prepare(
  source: str, tokenizer: Tokenizer, settings: Settings, directory, *, workers: int = -1,
  part: tuple[int, int] = (0, 1),
) -> dict | None:  # fmt: skip
  """Writes a prepared folder and returns its manifest; resumes where a killed run stopped.

  Args:
    source: see `data.text`.
    tokenizer: whose ids to write.
    settings: what decides the rows.
    directory: the folder; it grows as DIRECTORY.incomplete.
    workers: processes; 0 = none, -1 = one a core where the text is worth it.
    part: (i, n), this machine's part; the manifest is written by who finishes last, and the others
      get None.

  Raises:
    ValueError: if the source cannot be read or leaves no text, or next-sentence prediction has
      too few documents; nothing is left behind.
  """
  dataset.refuse_remote(directory)
  directory = pathlib.Path(directory)
  if settings.format == 'tfrecord':
    if part[1] > 1:
      raise ValueError('--shard divides text; TFRecords are read by one machine.')
    return _from_tfrecords(source, tokenizer, settings, directory)
  incomplete = directory.with_name(directory.name + '.incomplete')
  listing = [(name, size) for name, size, _ in text_lib.list_source(source)]
  size = sum(size for _, size in listing)
  shards = 0 if settings.heldout_fraction == 1 else settings.num_shards or 1 + size // _SHARD_BYTES
  outputs = [('train', number) for number in range(shards)] + [('heldout', 0)]
  mine = outputs[part[0] :: part[1]]
  if not mine:
    raise ValueError(
      f'--shard={part[0]}/{part[1]}: there are only {len(outputs)} shards to divide; raise '
      'data.num_shards or take fewer parts.'
    )
  plan = {
    'settings': dataclasses.asdict(settings), 'tokenizer': tokenizer.fingerprint,
    'source': [(n if n.startswith('tfds:') else pathlib.Path(n).name, size) for n, size in listing],
  }  # fmt: skip
  with dataset.lock(incomplete / f'lock-{part[0]}-of-{part[1]}'):
    if (manifest := _finished(directory, plan)) is not None:  # another process was faster
      shutil.rmtree(incomplete, ignore_errors=True)
      return manifest
    columns = instances.columns(
      settings.kind, settings.length, tokenizer.vocab_size, settings.max_sequences_per_row
    )
    try:
      writer = dataset.Writer(directory, plan, columns)
      tokenizer.save(writer.folder)
      met = _write_shards(writer, source, size, settings, tokenizer, shards, mine, workers, part)
    except ValueError as error:
      foreign = isinstance(error, dataset.DatasetError) and (incomplete / 'plan.json').exists()
      if part[1] == 1 and not foreign:  # what was begun with another plan is not ours to delete
        shutil.rmtree(incomplete, ignore_errors=True)
      raise
    whole = writer.finish(
      {'train': shards, 'heldout': 1}, settings=dataclasses.asdict(settings), source=source,
      tokenizer=tokenizer.fingerprint, counts=met, report=report,
    )  # fmt: skip
  return dataset.read_manifest(directory) if whole else None


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
    facts: of `report`; {} for rows that have none.
    length: tokens of a row.
  """
  if not facts:
    return
  random, used = facts.get('random_labels', 0), facts.get('tokens_used', 1)
  parts = [f'{facts["rows"]:,} rows, {facts["unknown"]:.2%} [UNK]']
  if 'documents' in facts:
    parts += [
      f'{facts["documents"]:,} documents of {facts["sentences_per_document"]:.1f} sentences'
    ]
    parts += [f'{used:.1%} of {facts["tokens"]:,} tokens used']
  if 'random_labels' in facts:
    parts += [f'{random:.1%} of next-sentence labels random']
  _log.info('prepared: %s', ', '.join(parts))
  if random > MOST_RANDOM:
    _log.warning(
      '%.0f%% of the next-sentence labels are random; the rule gives a little over 50%%. Sentences '
      'are about as long as the rows (data.length=%d) or are not found in this text (see '
      'data.format). Raise data.length, or train without these labels (nsp=False).',
      100 * random, length,
    )  # fmt: skip
  if used < LEAST_USED:
    _log.warning(
      'only %.0f%% of the tokens are in the rows: sentences longer than a row (data.length=%d) are '
      'truncated. Raise data.length, or use data.kind=doc_sentences (nsp=False), which truncates '
      'nothing.', 100 * used, length,
    )  # fmt: skip
  if facts['unknown'] > MOST_UNKNOWN:
    _log.warning(
      '%.1f%% of the tokens are [UNK]: the vocabulary (or data.lowercase) does not fit the text; '
      '`bertjax vocab` trains one.', 100 * facts['unknown'],
    )  # fmt: skip


def _from_tfrecords(source, tokenizer, settings, directory) -> dict:
  """Rows of create_pretraining_data.py, masks as they are.

  These files know no documents, so rows are held out by a hash of their unmasked ids: copies of a
  row with other masks stay together, but rows of one document may be in both splits.
  """
  from bertjax.data import tfrecords

  first = next(tfrecords.rows_from_tfrecords(source, tokenizer.vocab_size, size=1), None)
  if first is None:
    raise ValueError(f'data.input={source} holds no records.')
  length, slots = first['input_ids'].shape[1], first['masked_lm_ids'].shape[1]
  if (settings.kind, settings.length, settings.max_sequences_per_row) != ('nsp', length, 1):
    raise ValueError(
      f'data.input={source} holds sentence pairs (nsp=True) of {length} tokens, one a row; got '
      f'kind={settings.kind}, data.length={settings.length}, '
      f'data.max_sequences_per_row={settings.max_sequences_per_row}.'
    )
  columns = tfrecords.masked_columns(length, slots, tokenizer.vocab_size)
  plan = {'settings': dataclasses.asdict(settings), 'tokenizer': tokenizer.fingerprint}
  with dataset.lock(directory.with_name(f'{directory.name}.incomplete') / 'lock'):
    writer = dataset.Writer(directory, plan, columns)
    tokenizer.save(writer.folder)
    for split in dataset.SPLITS:
      counts = collections.Counter()
      batches = (
        _held_out(batch, settings.heldout_fraction, split == 'heldout', tokenizer, counts)
        for batch in tfrecords.rows_from_tfrecords(source, tokenizer.vocab_size)
      )
      rows = writer.add_shard(split, 0, batches, tally=counts)['rows']
      if not rows and not (split == 'train' and settings.heldout_fraction == 1):
        shutil.rmtree(writer.folder)
        raise ValueError(
          f'no row was assigned to {split}; change data.heldout_fraction (now {settings.heldout_fraction}).'
        )
    writer.finish(
      dict.fromkeys(dataset.SPLITS, 1), settings=dataclasses.asdict(settings), source=source,
      tokenizer=tokenizer.fingerprint, report=report,
    )  # fmt: skip
  return dataset.read_manifest(directory)


def _held_out(batch: dict, share: float, wanted: bool, tokenizer, counts) -> dict:
  """The rows of a batch in one split, added to its counts."""
  ids = unmasked(batch)
  chosen = np.array(encode.draw_heldout(ids, share)[1]) == wanted
  batch, ids = {name: array[chosen] for name, array in batch.items()}, ids[chosen]
  outside = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)
  counts.update(
    tokens=int((~np.isin(ids, outside)).sum()), unknown=int((ids == tokenizer.unk_id).sum()),
    pairs=len(ids), label_1=int(batch['next_sentence_labels'].sum()),
  )  # fmt: skip
  return batch


def _finished(directory, plan: dict) -> dict | None:
  """The manifest of a folder that holds what the plan would make; the writer refuses any other."""
  if not (directory / 'manifest.json').exists():
    return None
  manifest = dataset.read_manifest(directory)
  same = all(manifest[name] == plan[name] for name in ('settings', 'tokenizer'))
  return manifest if same else None


def _write_shards(writer, source, size, settings, tokenizer, shards, mine, workers, part) -> dict:
  """Both halves of the work, for this machine's outputs; returns what reading met."""
  dtype = instances.columns(settings.kind, settings.length, tokenizer.vocab_size)['input_ids'][0]
  folder = writer.folder / f'spill-{part[0]}-of-{part[1]}'
  spill = Spill(folder, [output_name(output) for output in mine], dtype)
  if spill.facts is None:
    made_by = (str(writer.folder), settings.format, settings.heldout_fraction, shards, tuple(mine))
    count = _auto(workers, size, _WORKER_BYTES)
    threads = size >= _THREAD_BYTES
    if threads and not count:
      encode.encoder(*made_by)  # once, before threads ask for it
    with worker_lib.processes(count, threads) as in_order:
      _tokenise(
        source, settings, tokenizer, spill, functools.partial(encode.encode, made_by), in_order
      )
  spill.close()
  read = functools.partial(read_corpus, folder, dtype=dtype)
  todo = [output for output in mine if writer.shard(*output) is None]
  if len(todo) == len(mine):
    corpora = {output: read(output_name(output)) for output in mine}
    if part[1] == 1:
      _check_documents(corpora, source, settings)
    _check_pairs(corpora.values(), source, settings)
  build = functools.partial(_build_shard, writer, settings, tokenizer.special, read)
  count = _auto(workers, size * settings.dupe_factor, 2 * _WORKER_BYTES) if len(todo) > 2 else 0
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


def _tokenise(source, settings, tokenizer, spill: Spill, encode_texts, in_order) -> None:
  """The first half: reads documents and appends their ids to the outputs, in order."""
  report = text_lib.Report()
  texts = text_lib.read_documents(
    source, settings.format, text_key=settings.text_key, binary=settings.binary,
    encoding=settings.encoding, on_bad_row=settings.on_bad_row, report=report,
  )  # fmt: skip
  done, saved, sizes = spill.texts, time.monotonic(), collections.deque()
  collections.deque(itertools.islice(texts, done), maxlen=0)  # of a run that was killed

  def batches():
    for batch in worker_lib.batches(texts, _BATCH_CHARS):
      sizes.append(len(batch))
      yield batch

  for parts in in_order(encode_texts, batches()):
    for name, part in parts.items():
      spill.append(name, part)
    done += sizes.popleft()
    if time.monotonic() - saved > _COMMIT_SECONDS:
      spill.commit(done)
      saved = time.monotonic()
      _log.info('prepare: %d documents tokenised', done)
  report.warn(tokenizer.lowercase and tokenizer.standard)
  spill.commit(done, dataclasses.asdict(report))


def _build_shard(writer: dataset.Writer, settings: Settings, special, read, output) -> None:
  """The second half: the rows of one shard from its tokens."""
  split, number = output
  corpus = read(output_name(output))
  rows = instances.build(
    corpus, settings.kind, length=settings.length, seed=int(hash_u64(settings.seed, number)),
    short_seq_prob=settings.short_seq_prob,
    passes=settings.dupe_factor if split == 'train' else 1,
  )  # fmt: skip
  counts = {
    'documents': len(corpus), 'sentences': len(corpus.sentences) - 1, 'tokens': len(corpus.tokens),
    'unknown': int((np.asarray(corpus.tokens) == special['unk']).sum()),
  }  # fmt: skip
  rows = instances.tally(rows, corpus, counts)
  packed = packing.first_fit(rows, settings.length, settings.max_sequences_per_row)
  ids = {f'{name}_id': special[name] for name in ('cls', 'sep', 'pad')}
  columns = instances.to_columns(
    packed, corpus.tokens, settings.length, settings.max_sequences_per_row, **ids
  )
  writer.add_shard(split, number, columns, tally=counts)


def _check_documents(corpora: dict[tuple[str, int], instances.Corpus], source, settings) -> None:
  documents = collections.Counter()
  for (split, _), corpus in corpora.items():
    documents[split] += len(corpus)
  train, heldout = (documents[split] for split in dataset.SPLITS)
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
    if count < least and not (split == 'train' and settings.heldout_fraction == 1):
      raise ValueError(
        f'of {train + heldout} documents, {count} were assigned to {split} and {least} are needed; '
        f'change data.heldout_fraction (now {settings.heldout_fraction}) or add documents.'
      )
  fewest = min(map(len, corpora.values()))
  if fewest < least == 2:
    raise ValueError(
      f'next-sentence prediction draws its wrong answers from other documents, and one of '
      f'{len(corpora) - 1} shards got {fewest} document(s); add text, use fewer shards '
      '(--config.data.num_shards), or train without it (--config.nsp=False).'
    )


def _check_pairs(corpora: Iterable[instances.Corpus], source, settings) -> None:
  longest = max(int(np.diff(corpus.documents).max(initial=0)) for corpus in corpora)
  if settings.kind in instances.PAIR_KINDS and longest < 2:
    raise ValueError(
      f'every document of data.input={source} is one sentence (data.format={settings.format}), so '
      'none is followed by a true next one; name another format or train without pairs '
      '(--config.nsp=False).'
    )
