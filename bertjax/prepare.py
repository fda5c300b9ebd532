"""Prepare: turns raw text into training rows on disk, once, for any number of runs and hosts.

  bertjax prepare --config=configs/pretrain/bert_mini.py --out=DIR \\
      --config.data.input=TEXTS --config.data.vocab=vocab.txt

Documents are split by a hash of their text into training and held-out ones, so exact duplicates
never stand on both sides. The folder carries its vocabulary; `--config.data.prepared=DIR` trains
from it, also on machines without TensorFlow.
"""

import array
import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import platform
from collections.abc import Iterator

from etils import epath

from bertjax.data import examples, sources, store
from bertjax.data.order import mix
from bertjax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

FLAGS = {
  'config': ('bert_mini', 'a recipe, path or name; its data section says what to prepare'),
  'out': ('', 'the folder to write; it must not exist yet'),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that decides the rows, apart from text and tokenizer.

  Attributes:
    kind: 'nsp' pairs or 'full_sentences'.
    length: tokens a row.
    format: how the source falls into documents, see `data.sources`.
    text_key: field of the text in JSONL and TFDS.
    heldout: share of documents kept for evaluation.
    passes: passes over the documents with other pairs (Google's dupe_factor).
    short_probability: share of documents cut to a random shorter length in a pass.
    seed: of pairs and lengths.
    binary: 'refuse' or 'skip' binary files.
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

  def __post_init__(self):
    if self.kind not in examples.KINDS:
      raise ValueError(f'kind must be one of {examples.KINDS}, got {self.kind!r}.')
    if not 8 <= self.length < 2**16:
      raise ValueError(f'data.length must be in 8..65535, got {self.length}.')
    if not 0 < self.heldout < 1:
      raise ValueError(f'data.heldout must be between 0 and 1, got {self.heldout}.')
    if self.passes < 1:
      raise ValueError(f'data.passes must be at least 1, got {self.passes}.')
    if not 0 <= self.short_probability <= 1:
      raise ValueError(f'data.short_probability must be in [0, 1], got {self.short_probability}.')


def settings_of(config) -> Settings:
  """The settings that a recipe's config asks for."""
  names = {field.name for field in dataclasses.fields(Settings)} - {'kind', 'seed'}
  kind = 'nsp' if config.nsp else 'full_sentences'
  return Settings(kind=kind, seed=config.seed, **{name: config.data[name] for name in names})


def run(config, *, out: str) -> dict:
  """Prepares what the config's data section names into `out`; returns the manifest."""
  if not out:
    raise ValueError('prepare needs --out=DIR, the folder to write.')
  if epath.Path(out).exists():
    raise ValueError(f'{out} exists already; remove it or choose another --out.')
  manifest = prepare(config.data.input, load_vocab(config), settings_of(config), out)
  print(f'prepared {out}: {manifest["counts"]}')
  return manifest


def load_vocab(config) -> Tokenizer:
  """The tokenizer a config names by `data.vocab` and `data.lowercase`."""
  if not config.data.vocab:
    raise ValueError(
      'data.vocab is empty: name a vocab.txt (--config.data.vocab=PATH); '
      '`bertjax vocab --input=TEXTS --out=vocab.txt` trains one.'
    )
  return Tokenizer.from_file(config.data.vocab, lowercase=config.data.lowercase)


def prepare(source: str, tokenizer: Tokenizer, settings: Settings, directory) -> dict:
  """Writes a prepared folder and returns its manifest.

  Raises:
    ValueError: if the source cannot be read or leaves no text, or next-sentence prediction has
      too few documents; nothing is left behind.
  """
  documents = {split: [] for split in store.SPLITS}
  report = sources.Report()
  tokens = 0
  texts = sources.read_documents(
    source, settings.format, text_key=settings.text_key, binary=settings.binary, report=report
  )
  for text, document in _tokenised(texts, tokenizer, settings):
    documents['heldout' if _is_heldout(text, settings.heldout) else 'train'].append(document)
    tokens += sum(map(len, document))
  report.tell()
  _check_documents(documents, source, settings)

  columns = examples.columns(settings.kind, settings.length, tokenizer.vocab_size)
  counts = dataclasses.asdict(report) | {'tokens': tokens}
  with store.Writer(directory, columns) as writer:
    for split in store.SPLITS:
      rows = examples.build_rows(
        documents[split], settings.kind, length=settings.length, seed=settings.seed,
        short_probability=settings.short_probability,
        passes=settings.passes if split == 'train' else 1,
      )  # fmt: skip
      ids = {f'{name}_id': tokenizer.special[name] for name in ('cls', 'sep', 'pad')}
      counts[f'{split}_documents'] = len(documents[split])
      counts[f'{split}_rows'] = writer.add_shard(
        split, examples.to_columns(rows, settings.length, **ids)
      )
    tokenizer.save(writer.folder)
    writer.finish(
      {
        'settings': dataclasses.asdict(settings),
        'source': source,
        'tokenizer': tokenizer.fingerprint,
        'counts': counts,
      }
    )
  return store.read_manifest(directory)


def cached(config, cache_dir='') -> epath.Path:
  """The prepared folder for a config's raw text: found in the cache, or prepared into it.

  The cache is `data.cache_dir`, `$BERTJAX_CACHE` or ~/.cache/bertjax. Its key covers the settings,
  the vocabulary, and the names, sizes and times of the files (of Python, if the text is its own).
  """
  tokenizer, settings = load_vocab(config), settings_of(config)
  files = []
  for part in sources.split_source(config.data.input):
    if part == 'embedded':
      files.append(platform.python_version())
      continue
    path = part.removeprefix('tfds:').partition(':')[0] if part.startswith('tfds:') else part
    if path == part or epath.Path(path).is_dir():  # a TFDS name stands for its version
      stats = [(str(p), p.stat()) for p in sources.list_files(path)]
      files += [(name, stat.length, stat.mtime) for name, stat in stats]
  key = json.dumps(
    [store.VERSION, config.data.input, files, dataclasses.asdict(settings), tokenizer.fingerprint]
  )
  cache = cache_dir or os.environ.get('BERTJAX_CACHE') or pathlib.Path.home() / '.cache' / 'bertjax'
  folder = epath.Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:16]
  if (folder / 'manifest.json').exists():
    _log.info('prepared rows: found in %s', folder)
  else:
    _log.info('preparing %s into %s', config.data.input or 'nothing', folder)
    counts = prepare(config.data.input, tokenizer, settings, folder)['counts']
    _log.info('prepared: %s', '  '.join(f'{name} {value:,}' for name, value in counts.items()))
  return folder


def _tokenised(texts, tokenizer, settings) -> Iterator[tuple[str, examples.Document]]:
  """Pairs each text with its sentences' ids; encodes many documents at once."""
  encode = tokenizer.encode
  if importlib.util.find_spec('tensorflow_text'):
    from bertjax.data import graph_tokenizer

    encode = graph_tokenizer.make_encoder(tokenizer)
  waiting, sentences = [], []

  def flush():
    ids = iter(encode(sentences))
    for text, count in waiting:
      document = [array.array('i', next(ids)) for _ in range(count)]  # 4 bytes a token, not 36
      document = [sentence for sentence in document if sentence]
      if document:
        yield text, document

  for text in texts:
    pieces = sources.split_document(text, settings.format)
    waiting.append((text, len(pieces)))
    sentences += pieces
    if len(sentences) >= 10_000:
      yield from flush()
      waiting, sentences = [], []
  if sentences:
    yield from flush()


def _is_heldout(text: str, share: float) -> bool:
  digest = hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
  return int(mix(int.from_bytes(digest, 'little'))) < share * 2**64


def _check_documents(documents, source, settings) -> None:
  train, heldout = (len(documents[split]) for split in store.SPLITS)
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
