"""Prepare: turns raw text into training rows on disk, once, for any number of runs and hosts.

  bertjax prepare --config=configs/pretrain/bert_mini.py --out=DIR \\
      --config.data.input=TEXTS --config.data.vocab=vocab.txt

Documents are split by a hash of their text into training and held-out ones and into shards, so
exact duplicates are never in both. Worker processes tokenise and write shards in parallel;
`--shard=i/n` on each of n machines that share the folder divides the shards between them; neither
changes a byte. The same command resumes after a kill. With a recipe of configs/finetune it writes a
task's training rows instead, for its `--config.data.prepared`. The folder carries its vocabulary;
`--config.data.prepared=DIR` trains from it, also on machines without TensorFlow.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re

from etils import epath

from bertjax import io
from bertjax.data import dataset, instances
from bertjax.data import text as text_lib
from bertjax.data.loader import Batches
from bertjax.data.masking import Masking, predictions
from bertjax.data.preprocess import Settings, prepare
from bertjax.data.tokenizer import Tokenizer
from bertjax.data.vocabulary import count_cased

_log = logging.getLogger(__name__)


def settings_of(config) -> Settings:
  """The settings that a recipe's config asks for."""
  names = {field.name for field in dataclasses.fields(Settings)} - {'kind', 'seed'}
  kind = config.data.kind or ('nsp' if config.nsp else 'doc_sentences')
  if config.nsp and kind not in instances.PAIR_KINDS:
    raise ValueError(
      f'data.kind={kind!r} has no sentence pairs; train without them (--config.nsp=False) or '
      f'choose one of {instances.PAIR_KINDS}.'
    )
  return Settings(kind=kind, seed=config.seed, **{name: config.data[name] for name in names})


def run(
  config, *, out: str, workers: int = -1, format: str = 'rows', shard: str = '0/1'
) -> dict | None:
  """Prepares what the config's data section names into `out`; returns the finished manifest."""
  if not out:
    raise ValueError('prepare needs --out=DIR, the folder to write.')
  whole = epath.Path(out) / 'manifest.json' if '://' in out else epath.Path(out)
  if whole.exists():  # a partial copy in a bucket is overwritten
    raise ValueError(f'{out} exists already; remove it or choose another --out.')
  if 'task' in config:
    from bertjax.interop import loading
    from bertjax.tasks import rows

    if (workers, format, shard) != (-1, 'rows', '0/1'):
      raise ValueError("--workers, --format and --shard are for pre-training's text.")
    tokenizer = loading.load_tokenizer(config.init_from)
    manifest = rows.prepare(config, rows.make_task(config), tokenizer, out)
    print(f'prepared {out}: {manifest["counts"]}')
    return manifest
  if workers < -1:
    raise ValueError(f'--workers must be at least -1, got {workers}.')
  match = re.fullmatch(r'(\d+)/(\d+)', shard)
  if not match or int(match[1]) >= int(match[2]):
    raise ValueError(f'--shard must be i/n with i in 0..n-1, got {shard!r}.')
  part = (int(match[1]), int(match[2]))
  if format not in ('rows', 'google'):
    raise ValueError(f"--format must be 'rows' or 'google', got {format!r}.")
  if format == 'google':  # before the long work
    io.import_tensorflow('--format=google', 'prepare')
    config = config.copy_and_resolve_references()
    config.masking.max_predictions = predictions(config.masking, config.data.length)
    Masking(**config.masking)
    if not config.nsp or config.data.max_sequences_per_row > 1:
      raise ValueError(
        "Google's TFRecords hold sentence pairs, one a row; set nsp=True and data.max_sequences_per_row=1."
      )
  folder, remote = out, '://' in out
  if remote or format == 'google':  # goes through a folder of rows on this machine
    if part[1] > 1:
      raise ValueError(f'--shard writes rows into a folder that all machines mount, got {out}.')
    key = _key(config, out if remote else str(pathlib.Path(out).resolve()))
    folder = cache_folder(config.data.cache_dir) / f'for-{key}'
  tokenizer = load_vocab(config.data)
  settings = settings_of(config)
  manifest = prepare(config.data.input, tokenizer, settings, folder, workers=workers, part=part)
  if manifest:
    warn_of_case(tokenizer)
    dataset.log_report(manifest.get('report') or {}, config.data.length)
  if format == 'google':
    _write_tfrecords(config, folder, epath.Path(out))
  elif remote:
    dataset.copy(folder, out)
  if folder != out:
    epath.Path(folder).rmtree()
  print(f'prepared {out}: {manifest["counts"]}' if manifest else f'{out}: part {shard} is done.')
  return manifest


def _write_tfrecords(config, folder, out) -> None:
  """Writes rows as create_pretraining_data.py would, a file a shard, and the vocabulary."""
  from bertjax.data import tfrecords

  tokenizer, masking = Tokenizer.from_dir(folder), Masking(**config.masking)
  shards = dataset.read_manifest(folder)['shards']
  with io.replacing(out) as partial:
    tokenizer.save(partial)
    for split, entries in shards.items():
      made = Batches(
        dataset.Dataset(folder, split), 1024, config.seed, masking, tokenizer.vocab_size,
        tokenizer.special, tokenizer.word_flags,
      )  # fmt: skip
      trained = split == 'train'  # evaluation's order is the rows', its masks are epoch 0's
      make = made.shuffled if trained else made.evaluation
      batches = map(make, range(made.evaluation_steps))
      count = len(entries)
      paths = [partial / f'{split}-{i:05d}-of-{count:05d}.tfrecord' for i in range(count)]
      tfrecords.write_tfrecords(paths, batches)


def load_vocab(data) -> Tokenizer:
  """The tokenizer that a config's data section names by `vocab`, `lowercase` and `rules`."""
  if not data.vocab:
    raise ValueError(
      'data.vocab is empty: name a vocab.txt (--config.data.vocab=PATH); '
      '`bertjax vocab --input=TEXTS --out=vocab.txt` trains one.'
    )
  return Tokenizer.from_file(data.vocab, lowercase=data.lowercase, rules=data.rules)


def warn_of_case(tokenizer: Tokenizer) -> None:
  """Logs a warning if a vocabulary does not go with the tokenizer's case."""
  cased, entries = count_cased(tokenizer)
  if tokenizer.lowercase and cased > 0.01 * entries:
    _log.warning(
      '%d of %d vocabulary entries have capitals and are never used with data.lowercase=True; is '
      'this a cased vocabulary (--config.data.lowercase=False)?', cased, entries,
    )  # fmt: skip
  elif not tokenizer.lowercase and entries and not cased:
    _log.warning(
      'no vocabulary entry has capitals, and data.lowercase=False keeps those of the text: they '
      'become [UNK]; is this an uncased vocabulary (--config.data.lowercase=True)?'
    )


def cache_folder(cache_dir: str = '') -> epath.Path:
  """Where raw text is prepared and remote rows are copied."""
  named = cache_dir or os.environ.get('BERTJAX_CACHE')
  folder = os.path.expanduser(named or '~/.cache/bertjax')  # noqa: PTH111 (may be gs://)
  if not named and folder.startswith('~'):
    raise ValueError(
      'this user has no home directory for a cache; name one (--config.data.cache_dir=DIR or '
      '$BERTJAX_CACHE).'
    )
  return epath.Path(folder)


def _key(config, *more) -> str:
  """A hash of the settings, the vocabulary, and the names, sizes and times of the files (of Python,
  if the text is its own)."""
  key = json.dumps([
    dataset.VERSION, config.data.input, text_lib.list_source(config.data.input),
    dataclasses.asdict(settings_of(config)), load_vocab(config.data).fingerprint, *more,
  ])  # fmt: skip
  return hashlib.sha256(key.encode()).hexdigest()[:16]


def cached(config, cache_dir='') -> epath.Path:
  """The prepared folder for a config's raw text: found in the cache, or prepared into it.

  The cache is `data.cache_dir`, `$BERTJAX_CACHE` or ~/.cache/bertjax.
  """
  folder, tokenizer = cache_folder(cache_dir) / _key(config), load_vocab(config.data)
  if (folder / 'manifest.json').exists():
    _log.info('prepared rows: found in %s', folder)
    manifest = dataset.read_manifest(folder)
  else:
    _log.info('preparing %s into %s', config.data.input or 'nothing', folder)
    manifest = prepare(config.data.input, tokenizer, settings_of(config), folder)
    counts = manifest['counts']
    _log.info('prepared: %s', '  '.join(f'{name} {value:,}' for name, value in counts.items()))
  warn_of_case(tokenizer)
  dataset.log_report(manifest.get('report') or {}, config.data.length)
  return folder
