"""Preparing: raw text to shards of examples, reproducibly, with held-out documents apart."""

import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bertjax import prepare
from bertjax.data import dataset, preprocess, vocabulary
from bertjax.data import text as text_lib
from bertjax.data.preprocess import TokenShards
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests import articles

SETTINGS = prepare.Settings(format='google', length=32, heldout_fraction=0.3)


@pytest.fixture(scope='module')
def tokenizer(vocab):
  return Tokenizer.from_file(vocab)


@pytest.fixture
def make(tmp_path, corpus_file, tokenizer):
  """make(name, **changes of the settings) -> (folder, manifest)."""

  def make(name='rows', source=corpus_file, tokenizer=tokenizer, workers=0, part=(0, 1), **changes):
    settings, folder = dataclasses.replace(SETTINGS, **changes), tmp_path / name
    manifest = prepare.prepare(str(source), tokenizer, settings, folder, workers=workers, part=part)
    return folder, manifest

  return make


def contents(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_the_manifest_counts_what_was_read_and_written(make, corpus_file, tokenizer):
  folder, manifest = make()
  counts = manifest['counts']
  assert counts['files'] == 1 and counts['documents'] == 40
  assert counts['train_documents'] + counts['heldout_documents'] == 40
  for split in dataset.SPLITS:
    assert len(dataset.Dataset(folder, split)) == counts[f'{split}_rows'] > 10
  lines = corpus_file.read_text(encoding='utf-8').split('\n')
  tokens = counts['train_tokens'] + counts['heldout_tokens']
  assert tokens == sum(map(len, tokenizer.encode(lines)))
  assert manifest['settings'] == dataclasses.asdict(SETTINGS)
  assert Tokenizer.from_dir(folder).fingerprint == manifest['tokenizer'] == tokenizer.fingerprint


def write_prose(folder, sentences):
  """Twenty documents of 60 sentences, no two alike; returns a tokenizer of their characters."""
  folder.mkdir()
  texts = [''.join(sentences[(i >> j % 5 ^ j) % 2] for j in range(60)) for i in range(20)]
  for i, text in enumerate(texts):
    (folder / f'{i}.txt').write_text(f'{text}{text[:i]}', encoding='utf-8')
  letters = sorted(set(''.join(texts)) - {' '})
  vocab = [*SPECIAL_TOKENS, *letters, *('##' + letter for letter in letters)]
  return Tokenizer(vocab, lowercase=False)


@pytest.mark.parametrize('language', articles.PHRASES)
def test_rows_of_any_language_have_random_labels_by_the_rule(make, tmp_path, language, caplog):
  caplog.set_level('INFO', 'bertjax')
  texts = articles.write(tmp_path / 'texts', language)
  counts = vocabulary.count_words(texts, lowercase=False)
  sizes = {'Thai': 300, 'Chinese': 238}  # without spaces, merges would be entire clauses
  vocab = vocabulary.train_wordpiece(counts, sizes.get(language, 350))
  tokenizer = Tokenizer(vocab, lowercase=False)
  _, manifest = make(
    source=tmp_path / 'texts',
    tokenizer=tokenizer,
    format='prose',
    length=128,
    heldout_fraction=0.15,
  )
  report = manifest['report']
  assert report['sentences_per_document'] > 25 and report['unknown'] == 0
  assert 0.45 < report['random_labels'] < 0.62 and report['tokens_used'] > 0.9
  counts = manifest['counts']
  assert report['random_labels'] == counts['train_label_1'] / counts['train_pairs']
  assert counts['train_pairs'] == counts['train_rows'] == report['rows']
  dataset.log_report(report, 128)
  assert not [record for record in caplog.records if record.levelname == 'WARNING']
  assert caplog.text.count('Thai and Lao mark no ends of sentences') == (language == 'Thai')


def test_labels_tokens_and_unknown_words_far_from_the_rule_are_warned_about(make, tmp_path, caplog):
  tokenizer = write_prose(tmp_path / 'texts', ('no end and no mark ', 'of any sentence '))
  for path in (tmp_path / 'texts').iterdir():
    path.write_text(path.read_text() + '\n\nend')
  tokenizer = Tokenizer([piece for piece in tokenizer.vocab if 'k' not in piece])
  _, manifest = make(source=tmp_path / 'texts', tokenizer=tokenizer, format='prose')
  assert manifest['report']['random_labels'] == 1 and manifest['report']['tokens_used'] < 0.2
  dataset.log_report(manifest['report'], 32)
  for message in ('100% of the next-sentence labels are random; the rule gives a little over 50%',
                  'of the tokens are in the rows: sentences longer than a row (data.length=32)',
                  '% of the tokens are [UNK]: the vocabulary'):  # fmt: skip
    assert message in caplog.text


def test_the_vocabulary_report_estimates_the_fraction_of_random_labels(
  make, tokenizer, vocab, texts
):
  _, manifest = make(length=128, heldout_fraction=0.3)
  found = vocabulary.describe(texts, vocab, format='google')['random_labels']
  assert abs(found - manifest['report']['random_labels']) < 0.1


@pytest.mark.parametrize('kind', ['doc_sentences', 'full_sentences'])
def test_full_sentences_have_the_complete_text_between_special_tokens(make, kind, texts, tokenizer):
  folder, _ = make(kind=kind, num_shards=3)
  found = []
  for split in dataset.SPLITS:
    rows = dataset.Dataset(folder, split)
    columns = rows[np.arange(len(rows))]
    assert set(columns) == {'input_ids', 'ends'}
    for ids, ((first_end, end),) in zip(columns['input_ids'], columns['ends'], strict=True):
      assert ids[0] == tokenizer.cls_id and ids[end - 1] == tokenizer.sep_id and first_end == end
      assert (ids[end:] == tokenizer.pad_id).all()
      found += ids[1 : end - 1].tolist()
  separators = found.count(tokenizer.sep_id) - sum(text.count('[SEP]') for text in texts)
  assert (separators > 0) == (kind == 'full_sentences')
  wanted = [token for ids in tokenizer.encode(texts) for token in ids]
  assert sorted(found) == sorted(wanted + [tokenizer.sep_id] * separators)


def test_two_preparations_are_the_same_bytes(make):
  one, two = contents(make('one')[0]), contents(make('two')[0])
  assert one == two
  kept = [
    f'{s}/00000.{c}.bin'
    for s in dataset.SPLITS
    for c in json.loads(one['manifest.json'])['columns']
  ]
  files = {'manifest.json', 'vocab.txt', 'tokenizer.json', 'tokenizer_config.json', *kept}
  assert set(one) == files  # and no trace of the work


@pytest.fixture
def small_batches(monkeypatch):
  """Some twenty batches of text, so that there is work to divide."""
  monkeypatch.setattr(preprocess, '_BATCH_CHARS', 5000)


@pytest.mark.e2e
def test_rows_are_the_same_for_any_number_of_workers(make, small_batches, tmp_path, monkeypatch):
  none = contents(make('none', num_shards=3)[0])
  assert none == contents(make('one', num_shards=3, workers=1)[0])
  # Two workers without TensorFlow, which takes each of them seconds to import.
  (tmp_path / 'site').mkdir()
  (tmp_path / 'site' / 'sitecustomize.py').write_text(
    "import sys; sys.modules['tensorflow_text'] = None"
  )
  monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'site'))
  assert none == contents(make('two', num_shards=3, workers=2)[0])


@pytest.mark.parametrize('order', [(0, 1), (1, 0)])
def test_parts_of_two_machines_make_the_bytes_of_one(make, order, tmp_path):
  whole, _ = make('whole', num_shards=3)
  for _ in range(2):  # the second time there is nothing left to do
    assert make(num_shards=3, part=(order[0], 2))[1] is None
    assert not (tmp_path / 'rows').exists()
  folder, manifest = make(num_shards=3, part=(order[1], 2))
  assert manifest == dataset.read_manifest(whole) and contents(folder) == contents(whole)


def test_the_last_part_clears_up_behind_one_that_has_not_yet(make, monkeypatch):
  whole, _ = make('whole', num_shards=3)
  with monkeypatch.context() as patch:
    patch.setattr(TokenShards, 'clear', lambda self: None)
    make(num_shards=3, part=(0, 2))
  folder, manifest = make(num_shards=3, part=(1, 2))
  assert manifest and contents(folder) == contents(whole)


def test_more_parts_than_shards_are_refused(make, tmp_path):
  with pytest.raises(ValueError, match=r'--shard=4/5: there are only 4 shards.*data.num_shards'):
    make(num_shards=3, part=(4, 5))
  assert [path.name for path in tmp_path.iterdir()] == ['in']


KILLED = """if True:
  import json, os, signal, sys
  sys.modules['tensorflow_text'] = None  # starts sooner; the rows are the same
  from bertjax import prepare
  from bertjax.data import preprocess
  from bertjax.data.preprocess import TokenShards
  from bertjax.data.dataset import Writer
  from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer

  what, source, vocab, folder, settings = sys.argv[1:]
  preprocess._BATCH_CHARS, preprocess._COMMIT_SECONDS = 5000, 0
  commit, add_shard, calls = TokenShards.commit, Writer.add_shard, []

  def kill():
    os.kill(os.getpid(), signal.SIGKILL)

  def killing_commit(self, *arguments):
    calls.append(1)
    if len(calls) == 4:
      for file in self._files.values():
        file.flush()  # more than the committed length
      kill()
    commit(self, *arguments)

  def killing_add_shard(self, split, number, batches, tally):
    def broken():
      yield next(batches)
      kill()
    calls.append(1)
    add_shard(self, split, number, broken() if len(calls) == 3 else batches, tally)

  if what == 'tokenising':
    TokenShards.commit = killing_commit
  else:
    Writer.add_shard = killing_add_shard
  settings = prepare.Settings(**json.loads(settings))
  prepare.prepare(source, Tokenizer.from_file(vocab), settings, folder, workers=0)"""


@pytest.mark.parametrize('what', ['tokenising', 'building'])
@pytest.mark.e2e
def test_a_killed_preparation_resumes_to_the_bytes_of_an_uninterrupted_one(
  what, make, small_batches, corpus_file, vocab, tmp_path, monkeypatch
):
  whole, _ = make('whole', num_shards=3)
  settings = json.dumps(dataclasses.asdict(dataclasses.replace(SETTINGS, num_shards=3)))
  command = [sys.executable, '-c', KILLED, what, corpus_file, vocab, tmp_path / 'rows', settings]
  assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
  assert not (tmp_path / 'rows').exists()
  state_file = tmp_path / 'rows.incomplete' / 'work' / 'tokens-0-of-1' / 'state.json'
  tokenised = json.loads(state_file.read_text())['documents']

  def record(module, name):
    function, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args: calls.append(args[-1]) or function(*args))
    return calls

  encoded, built = record(preprocess, 'tokenize'), record(preprocess, '_build_shard')
  if what == 'building':
    monkeypatch.setattr(text_lib, 'read_documents', None)  # it is not called
  folder, _ = make(num_shards=3)
  assert contents(folder) == contents(whole)
  assert sum(map(len, encoded)) == 40 - tokenised  # nothing is done twice
  if what == 'tokenising':
    assert 0 < tokenised < 40 and len(built) == 4
  else:
    assert tokenised == 40 and len(built) == 2


def test_work_begun_with_another_plan_is_refused_by_name_and_kept(
  make, tokenizer, vocab, tmp_path, monkeypatch
):
  def interrupt(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(preprocess, '_build_shard', interrupt)
    make()
  begun = contents(tmp_path / 'rows.incomplete')
  assert any(name.endswith('.tokens') for name in begun)
  (tmp_path / 'other.txt').write_text('Another text.')
  for named, changes in (
    ('settings', {'length': 48}),
    ('source', {'source': tmp_path / 'other.txt'}),
    ('tokenizer', {'tokenizer': Tokenizer.from_file(vocab, lowercase=False)}),
  ):
    with pytest.raises(ValueError, match=f'rows.incomplete was begun with other {named}; remove'):
      make(**changes)
    assert contents(tmp_path / 'rows.incomplete') == begun
  make()


def test_a_folder_prepared_otherwise_is_refused_and_kept(make, tmp_path):
  folder, manifest = make()
  assert make()[1] == manifest  # the same is there already
  before = contents(folder)
  with pytest.raises(ValueError, match=f'{folder} exists and is not empty'):
    make(length=48)
  assert contents(folder) == before
  assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'rows']


def test_a_huge_sentence_has_the_ids_it_has_uncut(make, monkeypatch):
  uncut, _ = make('uncut')
  monkeypatch.setattr(preprocess, '_PIECE_CHARS', 20)
  assert contents(make('cut')[0]) == contents(uncut)


@given(
  st.text(st.sampled_from('abé \t\r\x0b\x1c\x85\u2028\u3000\u0301\u200d[MASK].中'), max_size=60)
)
@hypothesis_settings(
  deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_parts_of_a_sentence_have_its_ids(tokenizer, monkeypatch, sentence):
  monkeypatch.setattr(preprocess, '_PIECE_CHARS', 4)
  pieces = preprocess.split_huge(sentence)
  assert [id for ids in tokenizer.encode(pieces) for id in ids] == tokenizer.encode([sentence])[0]


@pytest.mark.parametrize('megabytes', [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.e2e
def test_one_line_of_many_megabytes(make, tmp_path, texts, tokenizer, megabytes):
  line = texts[0].replace('\n', ' ') + ' '
  times = megabytes * 10**6 // len(line)
  path = tmp_path / 'in' / 'line.txt'
  path.write_text('\n\n'.join([line * times, *(f'Document {i}.' for i in range(10))]))
  start = time.process_time()
  counts = make(source=path, kind='doc_sentences')[1]['counts']
  assert time.process_time() - start < 10 * megabytes
  assert counts['documents'] == 11
  ids = tokenizer.encode([line, *(f'Document {i}.' for i in range(10))])
  assert counts['train_tokens'] + counts['heldout_tokens'] == times * len(ids[0]) + sum(
    map(len, ids[1:])
  )


@pytest.mark.e2e
def test_a_million_empty_documents_are_none(make, tmp_path, texts):
  path = tmp_path / 'in' / 'empty.txt'
  path.write_text('\n' * 10**6 + ('\n' * 10**5).join(texts) + ' \n' * 10**6)
  start = time.process_time()
  with_empty = make('with', path)[1]
  assert time.process_time() - start < 60
  assert with_empty['shards'] == make('without')[1]['shards']


@pytest.mark.e2e
def test_rows_are_the_same_with_tensorflow_text(make, monkeypatch, tensorflow):
  from bertjax.data import tokenizer_tf

  made, real = [], tokenizer_tf.make_flat_encoder
  monkeypatch.setattr(tokenizer_tf, 'make_flat_encoder', lambda t: made.append(t) or real(t))
  graph, _ = make('with')
  assert made
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(tokenizer_tf, 'make_flat_encoder', None)  # it is not called
  without, _ = make('without')
  assert contents(graph) == contents(without)


@pytest.mark.e2e
def test_entries_too_long_for_tensorflow_are_used(make, tokenizer, texts, tmp_path, tensorflow):
  word = 'ก' * 90
  (tmp_path / 'thai.txt').write_text('\n\n'.join(f'{text}\n{word}' for text in texts))
  tokenizer = Tokenizer([*tokenizer.vocab, word])
  folder, _ = make(source=tmp_path / 'thai.txt', tokenizer=tokenizer)
  rows = dataset.Dataset(folder, 'train')
  assert (rows[np.arange(len(rows))]['input_ids'] == tokenizer.vocab_size - 1).any()


def test_exact_duplicates_are_on_the_same_side(make, tmp_path, texts):
  once = make('once')[1]['counts']
  path = tmp_path / 'thrice.jsonl'
  path.write_text('\n'.join(json.dumps({'text': text}) for text in texts * 3))
  thrice = make('thrice', path, format='jsonl')[1]['counts']
  for split in dataset.SPLITS:
    assert thrice[f'{split}_documents'] == 3 * once[f'{split}_documents'] > 0


def test_the_held_out_share_is_as_asked(make, tmp_path):
  path = tmp_path / 'many.txt'
  path.write_text('\n\n'.join(f'Document {i}.' for i in range(3000)))
  counts = make('many', path, heldout_fraction=0.2, kind='doc_sentences')[1]['counts']
  assert abs(counts['heldout_documents'] - 600) < 5 * np.sqrt(3000 * 0.2 * 0.8)


def test_more_passes_are_over_training_documents_only(make):
  one, four = (make(str(n), dupe_factor=n)[1]['counts'] for n in (1, 4))
  assert four['train_rows'] > 3.5 * one['train_rows']
  assert four['heldout_rows'] == one['heldout_rows']


ONE_SENTENCE = '\n\n'.join(f'Sentence {i}.' for i in range(30))


@pytest.mark.parametrize(
  'content, changes, message',
  [
    ('One.\nTwo.', {}, r'is one document \(data.format=google\).*--config.nsp=False'),
    ('\n \n\n', {}, 'has no text once blank documents are dropped'),
    (
      'A.\n\nB.\n\nC.',
      {'heldout_fraction': 1e-9},
      'of 3 documents, 0 were assigned to held-out and 2 are',
    ),
    ('A.\n\nB.\n\nC.', {'heldout_fraction': 1 - 1e-9}, '0 were assigned to train and 2 are needed'),
    (
      'A.',
      {'kind': 'doc_sentences', 'heldout_fraction': 1e-9},
      '0 were assigned to held-out and 1 are',
    ),
    (ONE_SENTENCE, {}, r'every document of data.input=.* is one sentence.*--config.nsp=False'),
    (ONE_SENTENCE, {'kind': 'sop'}, 'every document of data.input=.* is one sentence'),
    (
      ONE_SENTENCE.replace('.', '.\nYes.'),
      {'num_shards': 16},
      r'got [01] document.*fewer shards \(--config.data.num_shards\)',
    ),
  ],
)
def test_too_little_text_is_refused_and_nothing_left(make, tmp_path, content, changes, message):
  path = tmp_path / 'in' / 'little.txt'
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    make('rows', path, **changes)
  assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_a_mistake_in_the_last_file_leaves_nothing(make, small_batches, tmp_path):
  (tmp_path / 'in' / 'z.bin').write_bytes(b'\0' * 99)
  with pytest.raises(ValueError, match=r'z.bin is a binary file'):
    make('rows', tmp_path / 'in')
  assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_shards_without_documents_hold_no_rows(make):
  many, one = (make(str(n), kind='doc_sentences', num_shards=n)[1] for n in (64, 1))
  entries = many['shards']['train']
  assert len(entries) == 64 and 0 in {entry['rows'] for entry in entries}
  for name in ('train_documents', 'train_tokens', 'heldout_rows'):
    assert many['counts'][name] == one['counts'][name]


@pytest.mark.parametrize(
  'field, value',
  [
    ('kind', 'pairs'),
    ('num_shards', -1),
    ('max_sequences_per_row', 0),
    ('length', 7),
    ('length', 2**16),
    ('heldout_fraction', 0.0),
    ('heldout_fraction', 1.5),
    ('dupe_factor', 0),
    ('short_seq_prob', 1.1),
  ],
)
def test_a_wrong_setting_is_named_with_its_value(field, value):
  with pytest.raises(ValueError, match=f'{field}.* got .?{value}'):
    prepare.Settings(**{field: value})
