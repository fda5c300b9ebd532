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
from bertjax.data import blocks, dataset, instances, mixture, streaming
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
  """Prepares what the config's data section names into `out`; returns the complete manifest."""
  if not out:
    raise ValueError('prepare needs --out=DIR, the folder to write.')
  target = epath.Path(out) / 'manifest.json' if '://' in out else epath.Path(out)
  if target.exists():  # a partial copy in a bucket is overwritten
    raise ValueError(f'{out} exists already; remove it or choose another --out.')
  if 'task' in config:
    if (workers, format, shard) != (-1, 'rows', '0/1'):
      raise ValueError("--workers, --format and --shard are for pre-training's text.")
    manifest = _prepare_task(config, out)
  else:
    part = _check(workers, format, shard)
    if '' not in (names := mixture.read_sources(config.data.input)):
      folders = ','.join(f'{name}=DIR' for name in names)
      raise ValueError(
        f'prepare writes the records of one source, got {config.data.input}; prepare each of '
        f'{", ".join(names)} into its own --out, and train on --config.data.prepared={folders}.'
      )
    masking = _static_masking(config) if format == 'google' else None
    manifest = _prepare_text(
      config.data.input, load_vocab(config), settings_of(config), out, workers=workers,
      part=part, masking=masking, cache_dir=config.data.cache_dir,
    )  # fmt: skip
  print(f'prepared {out}: {manifest["counts"]}' if manifest else f'{out}: part {shard} is done.')
  return manifest


def _prepare_task(config, out: str) -> dict:
  """Writes the encoded training split of a task for `data.prepared`; returns the manifest."""
  from bertjax import build  # imports jax
  from bertjax.interop import loading
  from bertjax.tasks import task as task_lib

  tokenizer, task = loading.load_tokenizer(config.init_from), build.make_task(config)
  settings = build.preparation_settings(config, task, tokenizer)
  layout = task_lib.columns(task, config.data.length, tokenizer.vocab_size)
  columns = build.training_columns(config, task, tokenizer)
  writer = dataset.Writer(out, settings, layout)
  tokenizer.save(writer.folder)
  writer.add_shard('train', 0, [columns])
  writer.finish({'train': 1, 'heldout': 0})
  return dataset.read_manifest(out)


def _check(workers: int, format: str, shard: str) -> tuple[int, int]:
  """Checks the flags; returns (i, n) of --shard=i/n."""
  if workers < -1:
    raise ValueError(f'--workers must be at least -1, got {workers}.')
  match = re.fullmatch(r'(\d+)/(\d+)', shard)
  if not match or int(match[1]) >= int(match[2]):
    raise ValueError(f'--shard must be i/n with i in 0..n-1, got {shard!r}.')
  if format not in ('rows', 'google'):
    raise ValueError(f"--format must be 'rows' or 'google', got {format!r}.")
  return int(match[1]), int(match[2])


def _static_masking(config) -> Masking:
  """The masking of Google's TFRecords, checked before the long work."""
  io.import_tensorflow('--format=google', 'prepare')
  if not config.nsp or config.data.max_sequences_per_row > 1:
    raise ValueError(
      "Google's TFRecords hold sentence pairs, one per row; pass --config.nsp=True "
      '--config.data.max_sequences_per_row=1.'
    )
  count = predictions(config.masking, config.data.length)
  return Masking(**{**config.masking, 'max_predictions': count})


def _prepare_text(
  source: str, tokenizer: Tokenizer, settings: Settings, out: str, *, workers: int,
  part: tuple[int, int], masking: Masking | None, cache_dir: str,
) -> dict | None:  # fmt: skip
  """Prepares text into a local or remote dataset, or with `masking` into Google's TFRecords."""
  folder, remote = out, '://' in out
  if remote or masking:  # prepared in the cache first
    if part[1] > 1:
      raise ValueError(f'--shard writes rows into a folder that all machines mount, got {out}.')
    key = _key(source, tokenizer, settings, out if remote else str(pathlib.Path(out).resolve()))
    folder = cache_folder(cache_dir) / f'for-{key}'
  manifest = prepare(source, tokenizer, settings, folder, workers=workers, part=part)
  if manifest:
    _report(manifest, tokenizer)
  if masking:
    _write_tfrecords(folder, epath.Path(out), masking, settings.seed)
  elif remote:
    dataset.copy(folder, out)
  if folder != out:
    epath.Path(folder).rmtree()
  return manifest


def _report(manifest: dict, tokenizer: Tokenizer) -> None:
  warn_of_case(tokenizer)
  if report := manifest.get('report'):
    dataset.log_report(report, manifest['settings']['length'])


def _write_tfrecords(folder, out, masking: Masking, seed: int) -> None:
  """Writes records as create_pretraining_data.py does, one file per shard, and the vocabulary."""
  from bertjax.data import tfrecords

  tokenizer = Tokenizer.from_dir(folder)
  shards = dataset.read_manifest(folder)['shards']
  with io.replacing(out) as partial:
    tokenizer.save(partial)
    for split, entries in shards.items():
      batches = Batches(
        dataset.Dataset(folder, split), 1024, seed, masking, tokenizer.vocab_size,
        tokenizer.special, None if masking.unit == 'subword' else tokenizer.word_flags,
      )  # fmt: skip
      # Held-out records keep their order, with the masks of epoch 0.
      make = batches.shuffled if split == 'train' else batches.evaluation
      ending = f'of-{len(entries):05d}.tfrecord'
      paths = [partial / f'{split}-{i:05d}-{ending}' for i in range(len(entries))]
      tfrecords.write_tfrecords(paths, map(make, range(batches.evaluation_steps)))


def load_vocab(config) -> Tokenizer:
  """The tokenizer that a config's data section names by `vocab`, `lowercase` and `rules`.

  Raises:
    ValueError: if there is none, or it has no mask token and the objective needs one.
  """
  data = config.data
  if not data.vocab:
    raise ValueError(
      'data.vocab is empty: name a vocab.txt (--config.data.vocab=PATH); '
      '`bertjax vocab --input=TEXTS --out=vocab.txt` trains one.'
    )
  tokenizer = Tokenizer.from_file(data.vocab, lowercase=data.lowercase, rules=data.rules)
  if config.objective != 'next_token':
    tokenizer.id_of('mask')
  return tokenizer


def warn_of_case(tokenizer: Tokenizer) -> None:
  """Logs a warning if a vocabulary does not go with the tokenizer's case."""
  if problem := case_problem(tokenizer):
    _log.warning(problem)


def case_problem(tokenizer: Tokenizer) -> str:
  """Why a vocabulary does not go with the tokenizer's case; '' if it does."""
  cased, entries = count_cased(tokenizer)
  if tokenizer.lowercase and cased > 0.01 * entries:
    return (
      f'{cased} of {entries} vocabulary entries have capitals and are never used with '
      'data.lowercase=True; is this a cased vocabulary (--config.data.lowercase=False)?'
    )
  if not tokenizer.lowercase and entries and not cased:
    return (
      'no vocabulary entry has capitals, and data.lowercase=False keeps those of the text: they '
      'become [UNK]; is this an uncased vocabulary (--config.data.lowercase=True)?'
    )
  return ''


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


def _key(source: str, tokenizer: Tokenizer, settings: Settings, *more) -> str:
  """A hash of settings and vocabulary, and of names, sizes and times of the source's files (of
  Python's version for its embedded text)."""
  content = [dataset.VERSION, source, text_lib.list_source(source), dataclasses.asdict(settings)]
  key = json.dumps([*content, tokenizer.fingerprint, *more])
  return hashlib.sha256(key.encode()).hexdigest()[:16]


def cached(config, cache_dir: str = '') -> epath.Path:
  """The prepared dataset of a config's raw text, from the cache or prepared into it.

  The cache is `data.cache_dir`, `$BERTJAX_CACHE` or ~/.cache/bertjax.
  """
  source, tokenizer = config.data.input, load_vocab(config)
  settings = settings_of(config)
  folder = cache_folder(cache_dir) / _key(source, tokenizer, settings)
  if (folder / 'manifest.json').exists():
    _log.info('prepared rows: found in %s', folder)
    manifest = dataset.read_manifest(folder)
  else:
    _log.info('preparing %s into %s', source or 'nothing', folder)
    manifest = prepare(source, tokenizer, settings, folder)
    counts = manifest['counts']
    _log.info('prepared: %s', '  '.join(f'{name} {value:,}' for name, value in counts.items()))
  _report(manifest, tokenizer)
  return folder


def streamed_text(config) -> streaming.Texts:
  """The text of a config with data.streaming=True, or its texts in a mixture."""
  tokenizer = load_vocab(config)
  warn_of_case(tokenizer)
  settings, names = settings_of(config), _named_sources(config, 'input')
  texts = {name: blocks.Text(path, tokenizer, settings) for name, path in names.items()}
  return streaming.Texts(texts, _mix(config, {name: text.size for name, text in texts.items()}))


def prepared_rows(config, processes: int = 1) -> mixture.Prepared:
  """The prepared records that a config names; raw text is prepared into the cache.

  `processes` is the number of processes that call this for the same run.

  Raises:
    ValueError: if both or neither of `data.prepared` and `data.input` are given, if several
      processes were to prepare the same text, the folder's settings are not the config's, or the
      sources of a mixture differ in settings or do not go with `data.mixture`.
  """
  data = config.data
  if bool(data.prepared) == bool(data.input):
    raise ValueError(
      'give either raw text (--config.data.input=PATH) or prepared rows '
      f'(--config.data.prepared=DIR), got data.input={data.input!r}, '
      f'data.prepared={data.prepared!r}.'
    )
  field, folders = 'prepared' if data.prepared else 'input', {}
  for name, path in _named_sources(config, field).items():
    part = config.copy_and_resolve_references() if name else config
    part.data[field] = path
    folders[name] = _prepared_folder(part, processes)
  _check_alike(folders)
  data.max_sequences_per_row = part.data.max_sequences_per_row
  counts = {name: dataset.read_manifest(f)['counts'] for name, f in folders.items()}
  mixed = _mix(config, {name: count['train_rows'] for name, count in counts.items()})
  return mixture.Prepared(folders, Tokenizer.from_dir(folders[name]), mixed)


def _named_sources(config, field: str) -> dict[str, str]:
  """{name: source} of data.input or data.prepared; {'': source} without a mixture."""
  names = mixture.read_sources(config.data[field])
  if '' in names and config.data.mixture:
    raise ValueError(
      f'data.mixture={config.data.mixture} gives shares of named sources, and data.{field} has no '
      f"names; write --config.data.{field}='NAME=SOURCE,NAME=SOURCE'."
    )
  if (exponent := config.data.mixture_exponent) != 1 and (config.data.mixture or '' in names):
    raise ValueError(
      f'data.mixture_exponent={exponent} makes the shares of named sources from their sizes; leave '
      'it 1.0 where data.mixture gives the shares, or where there is one source.'
    )
  if config.data.mixture:  # raises now what it would raise after a long preparation
    mixture.Mixture(mixture.read_shares(config.data.mixture, names), config.seed)
  return names


def _mix(config, sizes: dict[str, int]) -> mixture.Mixture | None:
  """The mixture of named sources, which is logged; None without names."""
  if '' in sizes:
    return None
  shares = mixture.read_shares(config.data.mixture, sizes, config.data.mixture_exponent)
  mixed = mixture.Mixture(shares, config.seed)
  _log.info('mixture of training examples: %s', mixed)
  return mixed


def _check_alike(folders: dict[str, epath.Path]) -> None:
  """Raises ValueError unless prepared folders have rows of one kind; names the first difference."""
  facts = {}
  for name, folder in folders.items():
    manifest = dataset.read_manifest(folder)
    settings = {f'data.{key}': manifest['settings'].get(key, 1)
                for key in ('kind', 'length', 'max_sequences_per_row')}  # fmt: skip
    facts[name] = settings | {'tokenizer': manifest['tokenizer'], 'columns': manifest['columns']}
  (first, wanted), *others = facts.items()
  for name, found in others:
    for key in wanted:
      if found[key] != wanted[key]:
        raise ValueError(
          f'source {name!r} ({folders[name]}) was prepared with {key}={found[key]} and source '
          f'{first!r} with {wanted[key]}; sources of a mixture need the same, so prepare one again.'
        )


def _prepared_folder(config, processes: int) -> epath.Path:
  """The prepared dataset of one source; raw text is prepared into the cache."""
  data = config.data
  if not data.prepared:
    if processes > 1:
      raise ValueError(
        f'{processes} processes would each prepare the text; run `bertjax prepare` once '
        'and give every process --config.data.prepared=DIR.'
      )
    return cached(config, data.cache_dir)
  folder = dataset.local(data.prepared, cache_folder(data.cache_dir))
  manifest, tokenizer = dataset.read_manifest(folder), Tokenizer.from_dir(folder)
  found, wanted = manifest['settings'], dataclasses.asdict(settings_of(config))
  if 'kind' not in found:
    raise ValueError(f'{folder} holds the rows of a task, not of pre-training; see `finetune`.')
  for name, before, now in (
    ('kind', found['kind'], wanted['kind']),
    ('length', found['length'], wanted['length']),
    ('lowercase', tokenizer.lowercase, data.lowercase),
    ('rules', tokenizer.rules, data.rules),
  ):
    if before != now:
      pairs = f' --config.nsp={before in instances.PAIR_KINDS}' if name == 'kind' else ''
      raise ValueError(
        f'{folder} was prepared with data.{name}={before}, this run wants {now}; pass '
        f'--config.data.{name}={before}{pairs}, or prepare again.'
      )
  if data.vocab and load_vocab(config).fingerprint != manifest['tokenizer']:
    raise ValueError(
      f'{folder} was prepared with another vocabulary than data.vocab={data.vocab}; prepare again, '
      'or leave data.vocab empty to use the one in the folder.'
    )
  _report(manifest, tokenizer)
  for name, value in wanted.items():
    if name in data and found.get(name, value) != value:
      _log.warning(
        '%s was prepared with data.%s=%r; the value of the config, %r, is replaced by it.',
        folder, name, found[name], value,
      )  # fmt: skip
      data[name] = found[name]
  return folder
