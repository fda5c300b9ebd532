"""Google's TFRecords: read into batches, written, and refused where they are wrong."""

import gzip
import random
import subprocess
import sys

import numpy as np
import pytest

from bertjax import prepare, pretrain
from bertjax.config import load_recipe
from bertjax.data import dataset, instances, loader, tfrecords
from bertjax.data.masking import Masking, unmasked
from bertjax.data.tokenizer import Tokenizer

LENGTH, PREDICTIONS, VOCAB = 24, 4, 600
CLS, SEP, MASK = 101, 102, 103


def instance(rng: random.Random) -> dict[str, list]:
  """What create_pretraining_data.py puts into one record, made list by list."""
  a, b = ([rng.randrange(104, VOCAB) for _ in range(rng.randint(1, 10))] for _ in range(2))
  tokens, types = [CLS, *a, SEP, *b, SEP], [0] * (len(a) + 2) + [1] * (len(b) + 1)
  real = [i for i, token in enumerate(tokens) if token not in (CLS, SEP)]
  positions = sorted(rng.sample(real, min(len(real), rng.randint(1, PREDICTIONS))))
  targets = [tokens[i] for i in positions]
  for i in positions:
    tokens[i] = rng.choice([MASK, tokens[i], rng.randrange(VOCAB)])
  pad, slots = LENGTH - len(tokens), PREDICTIONS - len(positions)
  return {
    'input_ids': tokens + [0] * pad,
    'input_mask': [1] * len(tokens) + [0] * pad,
    'segment_ids': types + [0] * pad,
    'masked_lm_positions': positions + [0] * slots,
    'masked_lm_ids': targets + [0] * slots,
    'masked_lm_weights': [1.0] * len(positions) + [0.0] * slots,
    'next_sentence_labels': [rng.randint(0, 1)],
  }


def google_instances(count, seed=0):
  rng = random.Random(seed)
  return [instance(rng) for _ in range(count)]


def write(path, records):
  import tensorflow as tf

  def feature(values):
    if isinstance(values[0], float):
      return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in records:
      features = {name: feature(values) for name, values in record.items()}
      example = tf.train.Example(features=tf.train.Features(feature=features))
      writer.write(example.SerializeToString())
  return path


def read(source, size=4096):
  return list(tfrecords.rows_from_tfrecords(str(source), VOCAB, size=size))


def join(parts):
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_google_s_records_become_the_batch_they_describe(tmp_path):
  records = google_instances(50)
  write(tmp_path / 'a-00000', records[:30]), write(tmp_path / 'a-00001', records[30:])
  batch = loader.expand(join(read(f'{tmp_path}/a-*', size=7)))
  names = {
    'input_ids': 'input_ids', 'input_mask': 'segment_ids', 'segment_ids': 'token_type_ids',
    **{name: name for name in loader.PREDICTIONS},
  }  # fmt: skip
  for theirs, ours in names.items():
    np.testing.assert_array_equal(batch[ours], [record[theirs] for record in records], theirs)
  labels = [record['next_sentence_labels'][0] for record in records]
  np.testing.assert_array_equal(batch['next_sentence_labels'], labels)
  assert {batch[name].dtype.name for name in names.values()} == {'int32', 'float32'}
  assert batch['masked_lm_weights'].dtype == np.float32


def test_the_rows_can_be_stored_and_come_back(tmp_path):
  rows = join(read(write(tmp_path / 'a', google_instances(50))))
  writer = dataset.Writer(tmp_path / 'rows', {}, tfrecords.masked_columns(24, 4, VOCAB))
  assert writer.add_shard('train', 0, [rows])['rows'] == 50
  assert writer.finish({'train': 1, 'heldout': 0}, tokenizer='x')
  found = dataset.Dataset(tmp_path / 'rows', 'train')[np.array([41, 3])]
  for name, array in found.items():
    np.testing.assert_array_equal(array, rows[name][[41, 3]], name)
  assert sum(array[0].nbytes for array in found.values()) == 48 + 4 + 1 + 8 + 8 + 4


def test_ids_of_a_large_vocabulary_are_not_truncated(tmp_path):
  record = google_instances(1)[0]
  record['input_ids'][1] = record['masked_lm_ids'][0] = 100_000
  path = write(tmp_path / 'a', [record])
  (rows,) = tfrecords.rows_from_tfrecords(str(path), 119_547)
  assert rows['input_ids'][0, 1] == rows['masked_lm_ids'][0, 0] == 100_000


@pytest.fixture(scope='module')
def batch(tiny_rows):
  """The only evaluation batch, larger than the number of examples."""
  tokenizer = Tokenizer.from_dir(tiny_rows)
  rows = dataset.Dataset(tiny_rows, 'heldout')
  return loader.Batches(
    rows, len(rows) + 3, 1, Masking(max_predictions=10), tokenizer.vocab_size, tokenizer.special
  ).evaluation(0)


def test_batches_written_and_read_again_are_the_same(batch, tmp_path):
  paths = [tmp_path / f'part-{i}' for i in range(2)]
  count = tfrecords.write_tfrecords(paths, [batch])
  assert count == batch['example_weights'].sum() == len(batch['input_ids']) - 3
  assert sorted(tmp_path.iterdir()) == paths
  for i, path in enumerate(paths):  # rows go to the files in turn
    found = loader.expand(join(read(path)))
    assert set(found) == set(batch)
    for name, array in found.items():
      assert array.dtype == batch[name].dtype
      np.testing.assert_array_equal(array, batch[name][i:count:2], name)


def test_written_records_have_google_s_features_and_types(batch, tmp_path):
  import tensorflow as tf

  tfrecords.write_tfrecords([tmp_path / 'a'], [batch])
  record = next(tf.data.TFRecordDataset(str(tmp_path / 'a')).as_numpy_iterator())
  example = tf.train.Example.FromString(record)
  kinds = {n: (f, f.WhichOneof('kind')) for n, f in example.features.feature.items()}
  found = {n: (kind, len(getattr(f, kind).value)) for n, (f, kind) in kinds.items()}
  assert found == {
    **dict.fromkeys(['input_ids', 'input_mask', 'segment_ids'], ('int64_list', 64)),
    **dict.fromkeys(['masked_lm_positions', 'masked_lm_ids'], ('int64_list', 10)),
    'masked_lm_weights': ('float_list', 10),
    'next_sentence_labels': ('int64_list', 1),
  }


def change(name, index, value):
  def edit(records):
    records[7][name][index] = value

  return edit


@pytest.mark.parametrize(
  'edit, message',
  [
    (lambda r: r[7].pop('masked_lm_ids'), ' has a record without the feature masked_lm_ids'),
    (lambda r: r[7]['input_ids'].pop(), ' has records with input_ids of 23 and 24'),
    (lambda r: r[7].update(input_mask=[1.0] * 24), ' holds other records than create_pretraining'),
    (change('input_ids', 1, VOCAB), ', record 7: input_ids has ids beyond the vocabulary of 600'),
    (change('masked_lm_ids', 0, -1), ', record 7: masked_lm_ids has ids beyond the vocabulary'),
    (change('input_mask', 0, 0), ', record 7: input_mask is not ones and then zeros'),
    (change('segment_ids', 0, 1), ', record 7: segment_ids are not zeros, then ones'),
    (change('masked_lm_weights', 0, 0.5), ', record 7: masked_lm_weights are not all 0 or 1'),
    (change('masked_lm_positions', 0, 23), ', record 7: masked_lm_positions point at padding'),
    (change('next_sentence_labels', 0, 2), ', record 7: next_sentence_labels is not 0 or 1'),
  ],
)
def test_a_wrong_record_is_named(tmp_path, edit, message):
  records = google_instances(20)
  edit(records)
  path = write(tmp_path / 'a', records)
  for size in (3, 4096):
    with pytest.raises(ValueError, match=str(path) + message):
      read(path, size)


@pytest.mark.parametrize(
  'damage',
  [
    lambda data: data[:-5],
    lambda data: data[:700] + bytes([data[700] ^ 1]) + data[701:],
    lambda data: b'One sentence.\nAnother one of them.\n',
    gzip.compress,
  ],
)
def test_a_corrupt_file_is_named(tmp_path, damage):
  write(tmp_path / 'a', google_instances(20))
  path = write(tmp_path / 'b', google_instances(20))
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=f'{path} is corrupt, or no uncompressed TFRecord'):
    read(tmp_path)


def test_files_of_other_lengths_are_refused_and_a_missing_one_is_named(tmp_path):
  write(tmp_path / 'a', google_instances(5))
  longer = [
    r | {name: [*r[name], 0 * r[name][0]] for name in loader.PREDICTIONS}
    for r in google_instances(5)
  ]
  path = write(tmp_path / 'b', longer)
  with pytest.raises(ValueError, match=f'{path} has rows of 24 tokens and 5 .* it 24 and 4'):
    read(tmp_path)
  with pytest.raises(ValueError, match=f'no such file or folder.*{tmp_path}/c'):
    read(tmp_path / 'c')


def test_rows_that_google_s_files_cannot_hold_are_refused_and_nothing_is_left(batch, tmp_path):
  plain = {name: array for name, array in batch.items() if name != 'next_sentence_labels'}
  packed = batch | {'segment_ids': batch['segment_ids'] * 2}
  for wrong in (plain, packed):
    with pytest.raises(ValueError, match="Google's TFRecords hold sentence pairs"):
      tfrecords.write_tfrecords([tmp_path / 'a'], [batch, wrong])
  assert list(tmp_path.iterdir()) == []


def test_the_columns_extend_those_of_sentence_pairs():
  columns = tfrecords.masked_columns(128, 20, 30522)
  assert set(columns) == {*instances.columns('nsp', 128, 30522), *loader.PREDICTIONS}


def test_static_masks_need_no_tensorflow():
  code = "import sys, bertjax.data.tfrecords; print('tensorflow' in sys.modules)"
  assert subprocess.check_output([sys.executable, '-c', code], text=True) == 'False\n'


@pytest.fixture
def config(corpus, vocab, tmp_path):
  config = load_recipe('bert_mini:smoke')
  config.data.update(
    input=str(corpus), vocab=str(vocab), heldout_fraction=0.2, cache_dir=str(tmp_path)
  )
  config.eval_every = 0
  return config


@pytest.mark.full
def test_prepared_text_written_in_google_s_format_trains_from_its_masks(config, tmp_path):
  prepare.run(config, out=str(tmp_path / 'rows'))
  prepare.run(config, out=str(tmp_path / 'google'), format='google')
  assert not list(tmp_path.glob('for-*')) and (tmp_path / 'google' / 'vocab.txt').exists()
  config.data.update(input=f'{tmp_path}/google/train-*', format='tfrecord')
  scores = pretrain.run(config, workdir=str(tmp_path / 'run'))
  assert np.isfinite(scores['loss'])

  (folder,) = {path.parent for path in tmp_path.glob('*/manifest.json')} - {tmp_path / 'rows'}
  sides = [dataset.Dataset(folder, split) for split in dataset.SPLITS]
  assert all(map(len, sides))
  reports = [dataset.read_manifest(path)['report'] for path in (tmp_path / 'rows', folder)]
  assert reports[1]['rows'] == len(sides[0]) and reports[1]['unknown'] < 0.1
  assert set(reports[0]) - set(reports[1]) == {'documents', 'sentences_per_document', 'tokens_used'}
  train = sides[0][np.arange(len(sides[0]))]
  assert reports[1]['random_labels'] == train['next_sentence_labels'].mean()
  assert reports[1]['tokens'] == (train['ends'].max((1, 2)).astype(int) - 3).sum()
  found = join([side[np.arange(len(side))] for side in sides])
  rows = dataset.Dataset(tmp_path / 'rows', 'train')
  tokenizer = Tokenizer.from_dir(tmp_path / 'rows')
  made = loader.Batches(
    rows, len(rows), config.seed, Masking(**config.masking), tokenizer.vocab_size, tokenizer.special
  )
  wanted, ours = made.shuffled(0), loader.expand(found)
  assert len(ours['input_ids']) == len(rows)
  for name in ('input_ids', 'masked_lm_positions', 'masked_lm_ids'):
    assert sorted(map(tuple, ours[name].tolist())) == sorted(map(tuple, wanted[name].tolist()))
  plain = rows[np.arange(len(rows))]['input_ids'].tolist()
  assert sorted(unmasked(found).tolist()) == sorted(plain) == sorted(unmasked(wanted).tolist())
  assert unmasked(wanted).tolist() != plain  # neighbours are parted, as Google's are
  again = loader.Batches(sides[0], 8, 0, Masking(), 600, {})
  seen = [again.training(step)['input_ids'].tolist() for step in range(2 * again.evaluation_steps)]
  assert {tuple(row) for batch in seen for row in batch} == {  # in every epoch the same masks
    tuple(row) for row in sides[0][np.arange(len(sides[0]))]['input_ids'].tolist()
  }


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data.length': 48}, r'holds sentence pairs .* of 64 tokens.* got kind=nsp, data.length=48'),
    ({'nsp': False, 'data.dupe_factor': 1}, r'got kind=doc_sentences'),
    ({'data.heldout_fraction': 1e-9}, 'no row was assigned to heldout'),
  ],
)
def test_what_does_not_fit_google_s_rows_is_refused(config, tmp_path, vocab, changes, message):
  ids = Tokenizer.from_file(vocab).vocab_size
  records = [r for r in google_instances(400) if max(r['input_ids'] + r['masked_lm_ids']) < ids][
    :40
  ]
  for record in records:
    for name in ('input_ids', 'input_mask', 'segment_ids'):
      record[name] += [0] * (64 - LENGTH)
  config.data.update(input=str(write(tmp_path / 'a', records)), format='tfrecord')
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    prepare.run(config, out=str(tmp_path / 'rows'))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['a']


def test_a_file_without_records_is_refused(config, tmp_path):
  config.data.update(input=str(write(tmp_path / 'a', [])), format='tfrecord')
  with pytest.raises(ValueError, match='holds no records'):
    prepare.run(config, out=str(tmp_path / 'rows'))
