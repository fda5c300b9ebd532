"""`bertjax prepare`: what the config names is prepared once, and found again."""

import concurrent.futures
import pathlib
import re
import threading

import pytest

from bertjax import config as config_lib
from bertjax import prepare
from bertjax.data import dataset, preprocess
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture
def config(tmp_path, corpus_file, vocab):
  config = config_lib.pretraining('tiny')
  config.data.update(input=str(corpus_file), vocab=str(vocab), format='google', length=32)
  config.data.update(heldout_fraction=0.3, cache_dir=str(tmp_path / 'cache'))
  return config


def cached(config):
  return prepare.cached(config, config.data.cache_dir)


def contents(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_two_runs_that_want_the_same_rows_prepare_them_once(config, monkeypatch, tmp_path):
  waiting, made, tokenize = threading.Event(), [], preprocess._tokenize_source
  monkeypatch.setattr(
    dataset._log, 'info', lambda *_: waiting.set()
  )  # another process is preparing

  def tokenize_when_the_other_waits(*args):
    made.append(args)
    assert waiting.wait(60)
    return tokenize(*args)

  monkeypatch.setattr(preprocess, '_tokenize_source', tokenize_when_the_other_waits)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    one, two = pool.map(cached, [config, config])
  assert one == two and len(made) == 1 and len(dataset.Dataset(one, 'train')) > 0
  assert [path.name for path in (tmp_path / 'cache').iterdir()] == [one.name]


def test_run_writes_what_the_config_names_and_refuses_an_existing_folder(tmp_path, config):
  folder = tmp_path / 'rows'
  manifest = prepare.run(config, out=str(folder))
  assert manifest['settings']['length'] == 32 and manifest['settings']['kind'] == 'nsp'
  before = contents(folder)
  with pytest.raises(ValueError, match=f'{folder} exists already'):
    prepare.run(config, out=str(folder))
  assert contents(folder) == before


@pytest.mark.parametrize(
  'entries, lowercase, message',
  [
    (['Word', 'Text', 'ok'], True, '2 of 3 vocabulary entries have capitals .*lowercase=False'),
    (['word', 'text', '字'], False, 'no vocabulary entry has capitals, .*lowercase=True'),
    (['Word', 'text'], False, None),
    (['word', '字'], True, None),
    (['字', '1'], False, None),
  ],
)
def test_a_vocabulary_of_the_other_case_is_warned_about(entries, lowercase, message, caplog):
  prepare.warn_of_case(Tokenizer([*SPECIAL_TOKENS, *entries], lowercase=lowercase))
  assert re.search(message, caplog.text) if message else not caplog.records


def test_the_cache_is_found_again_without_preparing(config, monkeypatch):
  folder = cached(config)
  monkeypatch.setattr(prepare, 'prepare', None)
  assert cached(config) == folder and len(dataset.Dataset(folder, 'train')) > 0


def test_the_cache_is_another_for_other_text_settings_vocabulary_or_seed(config, tmp_path, vocab):
  folders = [cached(config)]
  with pathlib.Path(config.data.input).open('a') as file:
    file.write('\nOne more sentence.')
  folders.append(cached(config))
  (tmp_path / 'vocab.txt').write_text(vocab.read_text() + 'another\n')
  for field, value in (
    ('data.length', 48),
    ('seed', 5),
    ('nsp', False),
    ('data.vocab', f'{tmp_path}/vocab.txt'),
  ):
    config.update_from_flattened_dict({field: value})
    folders.append(cached(config))
  hashes = {dataset.manifest_hash(dataset.read_manifest(folder)) for folder in folders}
  assert len(set(folders)) == len(hashes) == 6


def test_the_cache_follows_the_files_of_tfds_and_the_python_of_embedded_text(
  config, corpus_file, monkeypatch
):
  monkeypatch.setattr(prepare, 'prepare', lambda *_: {'counts': {}})
  seen = []
  for change in (lambda: None, lambda: corpus_file.write_text('other')):
    change()
    config.data.input = f'tfds:{corpus_file.parent}:train'
    seen.append(cached(config))
  for version in ('3.11.1', '3.12.1'):
    monkeypatch.setattr('platform.python_version', lambda version=version: version)
    config.data.input = 'embedded'
    seen.append(cached(config))
  assert len(set(seen)) == 4


@pytest.mark.parametrize('shard', ['', '1', '2/2', '0/0', '-1/2', '0/2/4', 'a/b'])
def test_a_shard_that_is_none_of_them_is_refused(config, tmp_path, shard):
  with pytest.raises(ValueError, match=f'--shard must be i/n with i in 0..n-1, got {shard!r}'):
    prepare.run(config, out=str(tmp_path / 'rows'), shard=shard)


def test_a_part_says_that_it_is_done_and_the_last_one_what_there_is(config, tmp_path, capsys):
  out = str(tmp_path / 'rows')
  assert prepare.run(config, out=out, shard='1/2') is None
  assert capsys.readouterr().out == f'{out}: part 1/2 is done.\n'
  assert prepare.run(config, out=out, shard='0/2')['counts']['documents'] == 40
  assert capsys.readouterr().out.startswith(f'prepared {out}: ')


def test_no_vocabulary_and_no_folder_are_refused_with_what_to_pass(config):
  with pytest.raises(ValueError, match='prepare needs --out=DIR'):
    prepare.run(config, out='')
  config.data.vocab = ''
  with pytest.raises(ValueError, match=r'data.vocab is empty.*`bertjax vocab'):
    cached(config)
