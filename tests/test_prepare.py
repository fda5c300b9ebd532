"""Preparing: raw text to a folder of rows, reproducibly, with held-out documents apart."""

import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import pytest

from bertjax import prepare, pretrain
from bertjax.data import store
from bertjax.data.tokenizer import Tokenizer

SETTINGS = prepare.Settings(format='google', length=32, heldout=0.3)


@pytest.fixture(scope='module')
def tokenizer(vocab):
  return Tokenizer.from_file(vocab)


@pytest.fixture(scope='module')
def texts(documents):
  """Forty documents a sentence a line, some of them hard on tokenizers."""
  texts = ['\n'.join(line for line in text.splitlines() if line.strip()) for text in documents]
  texts[3] += '\nΟΔΟΣ, a\u2028b, soft\u00adhyphen and [MASK] [SEP].\n\x01\x02\n…'
  return texts


@pytest.fixture
def corpus_file(tmp_path, texts):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'corpus.txt').write_text('\n\n'.join(texts), encoding='utf-8')
  return tmp_path / 'in' / 'corpus.txt'


@pytest.fixture
def make(tmp_path, corpus_file, tokenizer):
  """make(name, **changes of the settings) -> (folder, manifest)."""

  def make(name='rows', source=corpus_file, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return tmp_path / name, prepare.prepare(str(source), tokenizer, settings, tmp_path / name)

  return make


@pytest.fixture
def config(tmp_path, corpus_file, vocab):
  config = pretrain.default_config('tiny')
  config.data.update(input=str(corpus_file), vocab=str(vocab), format='google', length=32)
  config.data.update(heldout=0.3, cache_dir=str(tmp_path / 'cache'))
  return config


def cached(config):
  return prepare.cached(config, config.data.cache_dir)


def contents(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_the_manifest_counts_what_was_read_and_written(make, corpus_file, tokenizer):
  folder, manifest = make()
  counts = manifest['counts']
  assert counts['files'] == 1 and counts['documents'] == 40
  assert counts['train_documents'] + counts['heldout_documents'] == 40
  for split in store.SPLITS:
    assert len(store.Rows(folder, split)) == counts[f'{split}_rows'] > 10
  lines = corpus_file.read_text(encoding='utf-8').split('\n')
  assert counts['tokens'] == sum(map(len, tokenizer.encode(lines)))
  assert manifest['settings'] == dataclasses.asdict(SETTINGS)
  assert Tokenizer.from_dir(folder).fingerprint == manifest['tokenizer'] == tokenizer.fingerprint


def test_full_sentences_hold_the_whole_text_between_special_tokens(make, texts, tokenizer):
  folder, _ = make(kind='full_sentences')
  found = []
  for split in store.SPLITS:
    rows = store.Rows(folder, split)
    columns = rows[np.arange(len(rows))]
    assert set(columns) == {'input_ids', 'ends'}
    for ids, (_, end) in zip(columns['input_ids'], columns['ends'], strict=True):
      assert ids[0] == tokenizer.cls_id and ids[end - 1] == tokenizer.sep_id
      assert (ids[end:] == tokenizer.pad_id).all()
      found += ids[1 : end - 1].tolist()
  assert sorted(found) == sorted(token for ids in tokenizer.encode(texts) for token in ids)


def test_two_preparations_are_the_same_bytes(make):
  one, two = contents(make('one')[0]), contents(make('two')[0])
  assert one == two and {'train/00000.input_ids.bin', 'vocab.txt'} < set(one)


def test_rows_are_the_same_without_tensorflow_text(make, monkeypatch):
  assert importlib.util.find_spec('tensorflow_text')
  tensorflow, _ = make('with')
  monkeypatch.setattr(prepare.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr('bertjax.data.graph_tokenizer.make_encoder', None)  # it is not called
  without, _ = make('without')
  assert contents(tensorflow) == contents(without)


def test_exact_duplicates_are_on_the_same_side(make, tmp_path, texts):
  once = make('once')[1]['counts']
  path = tmp_path / 'thrice.jsonl'
  path.write_text('\n'.join(json.dumps({'text': text}) for text in texts * 3))
  thrice = make('thrice', path, format='jsonl')[1]['counts']
  for split in store.SPLITS:
    assert thrice[f'{split}_documents'] == 3 * once[f'{split}_documents'] > 0


def test_the_held_out_share_is_as_asked(make, tmp_path):
  path = tmp_path / 'many.txt'
  path.write_text('\n\n'.join(f'Document {i}.' for i in range(3000)))
  counts = make('many', path, heldout=0.2, kind='full_sentences')[1]['counts']
  assert abs(counts['heldout_documents'] - 600) < 5 * np.sqrt(3000 * 0.2 * 0.8)


def test_more_passes_are_over_training_documents_only(make):
  one, four = (make(passes=passes)[1]['counts'] for passes in (1, 4))
  assert four['train_rows'] > 3.5 * one['train_rows']
  assert four['heldout_rows'] == one['heldout_rows']


def test_run_writes_what_the_config_names_and_refuses_an_existing_folder(tmp_path, config):
  folder = tmp_path / 'rows'
  manifest = prepare.run(config, out=str(folder))
  assert manifest['settings']['length'] == 32 and manifest['settings']['kind'] == 'nsp'
  before = contents(folder)
  with pytest.raises(ValueError, match=f'{folder} exists already'):
    prepare.run(config, out=str(folder))
  assert contents(folder) == before


def test_the_cache_is_found_again_without_preparing(config, monkeypatch):
  folder = cached(config)
  monkeypatch.setattr(prepare, 'prepare', None)
  assert cached(config) == folder and len(store.Rows(folder, 'train')) > 0


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
  hashes = {store.manifest_hash(store.read_manifest(folder)) for folder in folders}
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


@pytest.mark.parametrize(
  'content, changes, message',
  [
    ('One.\nTwo.', {}, r'is one document \(data.format=google\).*--config.nsp=False'),
    ('\n \n\n', {}, 'holds no text once blank documents are left out'),
    ('A.\n\nB.\n\nC.', {'heldout': 1e-9}, 'of 3 documents, 0 fell to the held-out side and 2 are'),
    ('A.\n\nB.\n\nC.', {'heldout': 1 - 1e-9}, '0 fell to the train side and 2 are needed'),
    ('A.', {'kind': 'full_sentences', 'heldout': 1e-9}, '0 fell to the held-out side and 1 are'),
  ],
)
def test_too_little_text_is_refused_and_nothing_left(make, tmp_path, content, changes, message):
  path = tmp_path / 'in' / 'little.txt'
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    make('rows', path, **changes)
  assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_no_vocabulary_and_no_folder_are_refused_with_what_to_pass(config):
  with pytest.raises(ValueError, match='prepare needs --out=DIR'):
    prepare.run(config, out='')
  config.data.vocab = ''
  with pytest.raises(ValueError, match=r'data.vocab is empty.*`bertjax vocab'):
    cached(config)


@pytest.mark.parametrize(
  'field, value',
  [
    ('kind', 'sop'),
    ('length', 7),
    ('length', 2**16),
    ('heldout', 0.0),
    ('heldout', 1.0),
    ('passes', 0),
    ('short_probability', 1.1),
  ],
)
def test_a_wrong_setting_is_named_with_its_value(field, value):
  with pytest.raises(ValueError, match=f'{field}.* got .?{value}'):
    prepare.Settings(**{field: value})
