"""Fixtures shared by all tests. The suite runs on 8 fake CPU devices, set before JAX starts."""

import importlib.util
import os
import pathlib
import shutil
import signal
import tempfile
import types

from tests.flags import QUICK

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8 '
  f'{QUICK if os.environ["JAX_PLATFORMS"] == "cpu" else ""}'
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test asks the network
# Many tests compile the same small programs; so do the processes that tests start.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', f'{tempfile.gettempdir()}/bertjax-tests-{os.getpid()}'
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import numpy as np
import pytest

from bertjax import prepare
from bertjax.data import instances, loader, preprocess, vocabulary
from bertjax.data import text as text_lib
from bertjax.data.tokenizer import Tokenizer


def pytest_unconfigure(config):
  folder = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])
  if folder.name == f'bertjax-tests-{os.getpid()}':  # workers have the first process's
    shutil.rmtree(folder, ignore_errors=True)


# Files of a minute and more begin first: of two workers none waits for one of them at the end.
LONG = {'test_compile', 'test_finetune', 'test_pretrain', 'test_quickstart', 'e2e/test_distributed',
        'e2e/test_notebooks'}  # fmt: skip
# Files that run with --full only; others mark single tests. What remains has a test of every
# module, and takes ten minutes at most on two cores.
FULL = {f'e2e/test_{name}' for name in ('benchmarks', 'doc_code', 'finetune_parity', 'readme',
                                        'recovery', 'stages', 'tpu', 'ways')}  # fmt: skip

# Files with tests of seconds, as are those beside PyTorch. The fast subset leaves both out; these
# run on the gate's newest Python too.
SECONDS = {
  'data/test_streaming', 'data/test_tokenizer_json', 'data/test_tokenizer_tf', 'data/test_words',
  'inference/test_predictor', 'model/test_crf', 'objectives/test_distill', 'objectives/test_lora',
}  # fmt: skip

# Fixtures that train, or build the documentation; tests that use one are end-to-end tests.
RUNS = {'finished', 'site', 'trained', 'uninterrupted'}


def pytest_configure(config):
  # Ctrl-C is tested, and shells start background jobs with SIGINT ignored.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  config.option.loadscopereorder = False  # xdist's own order puts files of few, long tests last


def pytest_addoption(parser):
  parser.addoption('--full', action='store_true', help='also run end-to-end tests')
  parser.addoption('--slow', action='store_true', help='run all tests, some of minutes')


def name(item) -> str:
  """The path of a test's file below tests/, without the suffix."""
  return str(item.path.relative_to(pathlib.Path(__file__).parent).with_suffix(''))


def pytest_collection_modifyitems(config, items):
  full = config.getoption('--full') or config.getoption('--slow')
  for item in items:
    if name(item) in FULL:
      item.add_marker('full')
    seconds = name(item) in SECONDS or hasattr(item.module, 'torch')
    if seconds or name(item).startswith('e2e/') or RUNS & set(item.fixturenames):
      item.add_marker('e2e')
    if name(item) in SECONDS and 'full' not in item.keywords:
      item.add_marker('stack')
    if 'slow' in item.keywords and not config.getoption('--slow'):
      item.add_marker(pytest.mark.skip(reason='takes minutes; run with --slow'))
    elif 'full' in item.keywords and not full:
      item.add_marker(pytest.mark.skip(reason='an end-to-end run; run with --full'))
  items.sort(key=lambda item: name(item) not in LONG | FULL)


@pytest.fixture(scope='session', autouse=True)
def no_tensorflow():
  """Where programs choose TensorFlow, whose import and graphs take seconds, they do without it.

  Rows and batches are the same, as the tests show that name a loader or use `tensorflow`.
  """
  choose = loader.choose_loader
  missing = types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda name: None))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(preprocess, 'importlib', missing)
    patch.setattr(
      loader, 'choose_loader', lambda name: choose('threads' if name == 'auto' else name)
    )
    yield


@pytest.fixture
def tensorflow(monkeypatch):
  """Preparation tokenizes with TensorFlow, as it does where it is installed."""
  monkeypatch.setattr(preprocess, 'importlib', importlib)


@pytest.fixture(scope='session')
def data_dir() -> pathlib.Path:
  """The folder of real data sets."""
  if not os.environ.get('BERTJAX_DATA'):
    pytest.skip('set BERTJAX_DATA to the folder of unpacked real data sets')
  return pathlib.Path(os.environ['BERTJAX_DATA'])


@pytest.fixture(scope='session')
def documents() -> list[str]:
  """Forty small documents of real prose, the first ones of the embedded corpus."""
  return [text[:2500] for text, _ in zip(text_lib.embedded_documents(), range(40), strict=False)]


def make_corpus(documents) -> instances.Corpus:
  """Lists of documents of sentences of ids, end to end."""
  sentences = [sentence for document in documents for sentence in document]
  return instances.Corpus(
    np.array([token for sentence in sentences for token in sentence], np.int32),
    np.cumsum([0, *map(len, sentences)]),
    np.cumsum([0, *map(len, documents)]),
  )


@pytest.fixture(scope='session')
def vocab(tmp_path_factory, documents) -> pathlib.Path:
  """A vocab.txt of 600 entries."""
  path = tmp_path_factory.mktemp('vocab') / 'vocab.txt'
  entries = vocabulary.train_wordpiece(vocabulary.count_words(documents), 600)
  path.write_text('\n'.join(entries) + '\n')
  return path


@pytest.fixture(scope='session')
def corpus(tmp_path_factory, documents) -> pathlib.Path:
  """The documents as a folder of text files."""
  folder = tmp_path_factory.mktemp('corpus')
  for i, text in enumerate(documents):
    (folder / f'{i:02d}.txt').write_text(text)
  return folder


@pytest.fixture(scope='session')
def tiny_rows(tmp_path_factory, corpus, vocab) -> pathlib.Path:
  """Prepared rows: sentence pairs of 64 tokens."""
  folder = tmp_path_factory.mktemp('rows') / 'rows'
  settings = prepare.Settings(length=64, heldout_fraction=0.2)
  prepare.prepare(str(corpus), Tokenizer.from_file(vocab), settings, folder)
  return folder


@pytest.fixture(scope='session')
def texts(documents) -> list[str]:
  """Forty documents a sentence a line, some of them hard on tokenizers."""
  texts = ['\n'.join(line for line in text.splitlines() if line.strip()) for text in documents]
  texts[3] += '\nΟΔΟΣ, a\u2028b, soft\u00adhyphen and [MASK] [SEP].\n\x01\x02\n…'
  return texts


@pytest.fixture
def corpus_file(tmp_path, texts) -> pathlib.Path:
  """The texts as one file, an empty line between documents."""
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'corpus.txt').write_text('\n\n'.join(texts), encoding='utf-8')
  return tmp_path / 'in' / 'corpus.txt'
