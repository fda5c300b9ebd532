"""Texts and pairs from tables, documents and TFDS: reading, rows, the store, bad input."""

import json

import numpy as np
import pytest

from bertjax import TASKS, Tokenizer, config
from bertjax.data import dataset, loader
from bertjax.data.tokenizer import SPECIAL_TOKENS
from bertjax.model.heads import BATCH_KEYS
from bertjax.objectives.labels import Class
from bertjax.tasks import make_task, options, task

WORDS = ['a', 'b', 'c', 'd', 'e', 'f', '##x', 'good', 'bad', 'film', '.']


@pytest.fixture
def tokenizer():
  return Tokenizer([*SPECIAL_TOKENS, *WORDS])


def write(folder, name, text):
  (folder / name).write_text(text, encoding='utf-8')
  return str(folder)


def make(folder, train, dev='', name='train.csv', **options):
  """A task of one or two files."""
  source = write(folder, name, train)
  names = {'train': name} | ({'dev': f'dev-{name}'} if dev else {})
  write(folder, f'dev-{name}', dev)
  return TASKS['table'](source, files=names, **{'text': 'text'} | options)


@pytest.mark.parametrize(
  'name, text',
  [
    ('t.csv', 'label,text,other\r\npos,"good, ""film""",b\r\nneg,"bad\nfilm",c\r\n'),
    ('t.tsv', '\ufefftext\tlabel\ngood, "film"\tpos\n\nbad film\tneg\n'),
    (
      't.jsonl',
      '{"label": 1, "text": "good, \\"film\\""}\n{"label": 0, "text": "bad film"}',
    ),
  ],
)
def test_tables_are_read_and_their_labels_found(tmp_path, name, text):
  table = make(tmp_path, text, name=name)
  first, second = table.read('train')
  assert table.labels in (('neg', 'pos'), ('0', '1')) and (first.label, second.label) == (1, 0)
  assert first.texts == ('good, "film"',) and second.texts[0].split() == ['bad', 'film']
  assert (table.head, type(table.label), table.metric) == ('classification', Class, 'accuracy')


def test_pairs_are_truncated_at_the_end_of_the_longer_and_counted(tokenizer):
  encode = TASKS['rte']('.').encode
  texts = ('a b c d e', 'f f'), ('a b', 'c'), ('a b c', 'd e f')  # of equal ones, the second
  items = [task.Example('', pair, i % 2) for i, pair in enumerate(texts)]
  encoded = encode(items, tokenizer, 8)
  names = [tokenizer.decode(row) for row in encoded.columns['input_ids']]
  assert names == [
    '[CLS] a b c [SEP] f f [SEP]',
    '[CLS] a b [SEP] c [SEP] [PAD] [PAD]',
    '[CLS] a b c [SEP] d e [SEP]',
  ]
  assert encoded.columns['ends'].tolist() == [[[5, 8]], [[4, 6]], [[5, 8]]]
  assert encoded.columns['labels'].tolist() == [0, 1, 0]
  assert encoded.counts == {'features': 3, 'truncated': 2}
  batch = loader.make_batch(encoded.columns)
  assert batch['token_type_ids'][:2].tolist() == [[0] * 5 + [1] * 3, [0] * 4 + [1] * 2 + [0] * 2]
  assert set(batch) <= set(BATCH_KEYS)


@pytest.mark.parametrize('kind', ['class', 'regression', 'multilabel'])
def test_rows_go_through_the_store_unchanged(tmp_path, tokenizer, kind):
  labels = {'class': ['a', 'b'], 'regression': [0.5, -1], 'multilabel': [['a', 'b'], []]}[kind]
  lines = [json.dumps({'text': 'good film', 'label': label}) for label in labels]
  table = make(tmp_path, '\n'.join(lines), name='t.jsonl', kind=kind)
  encoded = table.encode(table.read('train'), tokenizer, 6)
  writer = dataset.Writer(tmp_path / 'rows', {}, task.columns(table, 6, tokenizer.vocab_size))
  writer.add_shard('train', 0, [encoded.columns])
  assert writer.finish({'train': 1, 'heldout': 0}, tokenizer=tokenizer.fingerprint)
  rows = dataset.Dataset(tmp_path / 'rows', 'train')[np.arange(2)]
  assert rows.keys() == encoded.columns.keys()
  for name, column in encoded.columns.items():
    np.testing.assert_array_equal(rows[name], column)
    assert rows[name].dtype == column.dtype
  expected = {'class': [0, 1], 'regression': [0.5, -1], 'multilabel': [[1, 1], [0, 0]]}[kind]
  assert loader.make_batch(rows)['labels'].tolist() == expected


@pytest.mark.parametrize(
  'kind, logits, written',
  [
    ('class', [[0, 2], [3, 1]], ['yes', 'no']),
    ('multilabel', [[0.1, 2], [-3, -1]], ['no|yes', '']),
  ],
)
def test_perfect_logits_score_one_and_are_written_by_name(
  tmp_path, tokenizer, kind, logits, written
):
  labels = written if kind == 'multilabel' else ['yes', 'no']
  table = make(tmp_path, '\n'.join(['text,label', *(f'a,{x}' for x in labels)]), kind=kind)
  items = table.read('train')
  predictions = table.decode(items, table.encode(items, tokenizer, 4), np.array(logits))
  assert set(table.score(items, predictions).values()) == {1.0}
  [path] = table.write(tmp_path / 'out', 'dev', items, predictions)
  assert path.read_text().splitlines() == [
    'index\tprediction',
    f'0\t{written[0]}',
    f'1\t{written[1]}',
  ]
  if kind == 'multilabel':
    strict = table.decode(items, table.encode(items, tokenizer, 4), np.array(logits), 1.0)
    assert strict.tolist() == [[False, True], [False, False]]


def test_a_test_split_may_lack_labels_and_is_then_not_scored(tmp_path, tokenizer):
  write(tmp_path, 'test.csv', 'text\na\nb\n')
  for kind, missing in (('class', [-1, -1]), ('regression', [np.nan] * 2)):
    table = TASKS['table'](
      str(tmp_path), files={'test': 'test.csv'}, text='text', kind=kind, labels=('x', 'y')
    )
    items = table.read('test')
    encoded = table.encode(items, tokenizer, 4)
    np.testing.assert_array_equal(encoded.columns['labels'], missing)
    with pytest.raises(ValueError, match='scoring need labels, example 0 has none'):
      table.score(items, [0, 0])


@pytest.mark.parametrize(
  'train, message, options',
  [
    ('text,lab\na,b\n', r"t.csv has no column 'label'; it has \['lab', 'text'\]", {}),
    ('text,label\na\n', r't.csv:2: 1 fields, the first row has 2', {}),
    ('text,label\na,x\n" ",y\n', r"t.csv:3: column 'text' holds no text", {}),
    ('text,label\na,x\nb,\n', r't.csv:3: the label is missing', {}),
    (
      '{"text": 3, "label": "x"}\n',
      r"t.jsonl:1: column 'text' holds no text but 3",
      {'name': 't.jsonl', 'labels': 'xy'},
    ),
    (
      '{"label": "x"}\n',
      r"t.jsonl:1: no column 'text'; it has \['label'\]",
      {'name': 't.jsonl', 'labels': 'xy'},
    ),
    ('text,label\na,x\n', r"on_bad_row must be 'stop' or 'skip', got 'no'", {'on_bad_row': 'no'}),
    (
      '{"text": "a", "label": null}\n',
      r't.jsonl:1: the label is missing',
      {'name': 't.jsonl', 'labels': 'xy'},
    ),
    (
      '{"text": "a", "label": "x"}\n{"text": "b", "label": NaN}\n',
      r't.jsonl:2: the label is missing',
      {'name': 't.jsonl'},
    ),
    ('text,label\na,x\nb,z\n', r"t.csv:3: unknown label 'z'; .*\['x', 'y'\]", {'labels': 'xy'}),
    ('text,label\na,x\nb,x\n', r"t.csv has no training example of the class 'y'", {'labels': 'xy'}),
    ('text,label\na,x\nb,x\n', r"two or more, found \['x'\]", {}),
    ('text,label\na,1\nb,nan\n', r"t.csv:3: .*finite number, got 'nan'", {'kind': 'regression'}),
    ('text,label\na,1\nb,x\n', r"t.csv:3: .*finite number, got 'x'", {'kind': 'regression'}),
    ('text,label\n"a,x\nb,y\n', r't.csv:2: no CSV', {}),
    ('text,label\n', r't.csv holds no examples', {'kind': 'regression'}),
    ('', r't.csv is empty', {}),
    ('text,label\na,x\n', r"kind must be one of .* got 'rank'", {'kind': 'rank'}),
  ],
)
def test_bad_tables_are_named_by_file_and_line(tmp_path, train, message, options):
  with pytest.raises(ValueError, match=message):
    make(tmp_path, train, **{'name': 't.csv'} | options).read('train')


def labels_of(items, table):
  return [table.labels[item.label] for item in items]


def test_bad_rows_are_skipped_and_counted_where_an_option_says_so(tmp_path, caplog):
  lines = ['{"text": "a", "label": "x"}', '{"text": null, "label": "x"}', '{"text": "b"}',
           '{"text": 3, "label": "y"}', 'no', '{"text": "c", "label": null}',
           '{"text": " ", "label": "x"}', '{"text": "d", "label": "y"}']  # fmt: skip
  table = make(tmp_path, '\n'.join(lines), name='t.jsonl', on_bad_row='skip')
  items = table.read('train')
  assert [(item.id, item.texts) for item in items] == [('0', ('a',)), ('7', ('d',))]
  assert 'train: 6 of 8 rows skipped: ' in caplog.text
  assert "t.jsonl:2: column 'text' holds no text but null; " in caplog.text
  table = make(tmp_path, 'text,label\na,x\nb\nc,y\n', 'text,label\n,x\nb,z\n', on_bad_row='skip')
  assert labels_of(table.read('train'), table) == ['x', 'y']
  with pytest.raises(ValueError, match=r"dev-train.csv:3: unknown label 'z'"):  # a blank is kept
    table.read('dev')


@pytest.mark.parametrize('name, kind', [('t.csv', 'class'), ('t.jsonl', 'class'),
                                        ('t.jsonl', 'multilabel')])  # fmt: skip
def test_blanks_around_labels_do_not_count(tmp_path, name, kind):
  labels = [' ham', 'ham', 'spam', 'ham ']
  if name == 't.csv':
    text = 'text,label\n' + ''.join(f'a,{x}\n' for x in labels)
  else:
    values = [[x] for x in labels] if kind == 'multilabel' else labels
    text = '\n'.join(json.dumps({'text': 'a', 'label': x}) for x in values)
  table = make(tmp_path, text, name=name, kind=kind)
  assert table.labels == ('ham', 'spam')
  items = table.read('train')
  assert task.describe_labels(table, items) == 'ham 3  spam 1'
  given = make(tmp_path, text, name=name, kind=kind, labels=(' spam', 'ham '))
  assert task.describe_labels(given, given.read('train')) == 'ham 3  spam 1'


def test_suspicious_names_of_labels_are_warned_about(tmp_path, caplog):
  labels = ['NaN', 'None', 'null', 'N/A', 'Bad', 'bad', 'good']
  make(tmp_path, 'text,label\n' + ''.join(f'a,{x}\n' for x in labels))
  for name in labels[:4]:
    assert f'{name!r} is taken for a label; is it a missing value?' in caplog.text
  assert "'Bad' and 'bad' differ by case only and are two labels" in caplog.text
  assert len(caplog.records) == 5


@pytest.mark.parametrize('placeholder', ['-1', '?', 'unknown', ''])
def test_a_test_split_with_placeholders_is_predicted(tmp_path, placeholder, caplog):
  write(tmp_path, 'test.csv', f'text,label\na,{placeholder}\nb,{placeholder}\n')
  options = {'text': 'text', 'labels': ('0', '1')}
  table = TASKS['table'](str(tmp_path), files={'test': 'test.csv', 'dev': 'test.csv'}, **options)
  assert [item.label for item in table.read('test')] == [None, None]
  assert f'2 of 2 examples have no label of the task (the first has {placeholder!r})' in caplog.text
  with pytest.raises(ValueError, match=r'test.csv:2: (unknown label|the label is missing)'):
    table.read('dev')
  numbers = TASKS['table'](str(tmp_path), files={'test': 'test.csv'}, text='text',
                           kind='regression')  # fmt: skip
  assert [item.label for item in numbers.read('test')] == [None, None]


def test_labels_of_every_kind_are_counted(tmp_path):
  words = task.Example('0', ('a', 'b'), ('B-PER', 'O'))
  tagging = TASKS['conll'](files={'dev': ''}, types=['PER'])
  assert task.describe_labels(tagging, [words, words._replace(label=None)]) == (
    'PER spans 1  (none) 1'
  )
  answers = [task.Example('0', ('q', 'c'), label) for label in ((('c', 0),), (), ())]
  assert task.describe_labels(TASKS['squad2'](), answers) == 'no answer 2  answer 1'
  numbers = [task.Example('0', ('a', 'b'), label) for label in (1.0, 4.0)]
  assert task.describe_labels(TASKS['stsb'](), numbers) == 'from 1 to 4, mean 2.5'


def test_files_without_a_header_have_columns_by_number(tmp_path):
  text = 'ham\tsee you at noon\nspam\twin money now\nham\tok\n'
  for name, delimiter in (('t.tsv', ''), ('t.txt', 'tab')):
    table = make(tmp_path, text, name=name, delimiter=delimiter, **{'text': '1', 'label': '0'})
    items = table.read('train')
    assert items[0].texts == ('see you at noon',) and labels_of(items, table) == [
      'ham', 'spam', 'ham'
    ]  # fmt: skip


def test_half_characters_are_replaced_as_they_are_read(tmp_path):
  table = make(tmp_path, '{"text": "a \\ud83d", "label": 1.0}\n', name='t.jsonl', kind='regression')
  assert table.read('train')[0].texts == ('a \ufffd',)


def test_a_label_that_training_lacks_is_found_in_dev(tmp_path):
  table = make(tmp_path, 'text,label\na,x\nb,y\n', 'text,label\na,x\nb,z\n', name='t.csv')
  with pytest.raises(ValueError, match=r"dev-t.csv:3: unknown label 'z'"):
    table.read('dev')
  with pytest.raises(ValueError, match=r"there is no split 'test'; there are \('train', 'dev'\)"):
    table.read('test')


def test_a_row_too_short_for_its_special_tokens_is_refused(tokenizer):
  for name in ('rte', 'conll2003', 'codah'):
    with pytest.raises(ValueError, match=r'data\.length must be at least .*, got 3'):
      items = [task.Example('0', ('a', 'b'), None)]
      TASKS[name]('.').encode(items, tokenizer, 3)


def test_a_dev_split_is_held_out_of_training_by_a_hash_of_the_texts(tmp_path, caplog):
  caplog.set_level('INFO')
  lines = ['text,label', *(f'text {i % 90},{"xy"[i % 2]}' for i in range(180))]  # each text twice
  write(tmp_path, 't.csv', '\n'.join(lines))
  made = make_task('table', str(tmp_path), files={'train': 't.csv'}, text='text', dev_fraction=0.2)
  train, dev = made.read('train'), made.read('dev')
  assert made.splits == ('train', 'dev') and len(train) + len(dev) == 180
  assert not {item.texts for item in train} & {item.texts for item in dev}
  assert 10 < len(dev) < 70 and f'{len(dev)} of 180 training examples' in caplog.text
  assert dev == made.read('dev')  # the same in every process
  named = make_task('table', str(tmp_path), files={'train': 't.csv', 'dev': 't.csv'}, text='text',
                    dev_fraction=0.2)  # fmt: skip
  assert len(named.read('dev')) == len(named.read('train')) == 180


def test_a_held_out_split_must_leave_examples_of_every_class(tmp_path):
  write(tmp_path, 't.csv', 'text,label\na,x\nb,y\n')
  for fraction, message in ((1e-9, r'dev_fraction=1e-09 of 2 examples leaves a split empty'),
                            (1.5, r'dev_fraction must be above 0 and below 1, got 1\.5'),
                           ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      made = make_task('table', str(tmp_path), files={'train': 't.csv'}, text='text',
                       dev_fraction=fraction)  # fmt: skip
      made.read('train')
  lines = ['text,label', 'one,rare', *(f'text {i},often' for i in range(200))]
  write(tmp_path, 't.csv', '\n'.join(lines))
  held = task.hold_out(
    make_task('table', str(tmp_path), files={'train': 't.csv'}, text='text'), 0.999
  )
  with pytest.raises(ValueError, match=r"(class 'rare' are held out|leaves a split empty)"):
    held.read('train')


def test_options_in_the_config_are_those_of_the_tasks_with_their_defaults():
  fields = config.finetuning().task.to_dict()
  assert fields.pop('name') == 'sst2'
  known = {n: p for name in TASKS for n, p in options(name).items()}
  assert fields['loss'] == options('embed')['loss'].default  # the recipe `rerank` sets its own
  assert fields.keys() == known.keys() - {'loss_includes_padding'}
  for name, parameter in known.items():
    if name in fields and name != 'loss' and parameter.default is not parameter.empty:
      assert fields[name] == (parameter.default or type(fields[name])()), name


@pytest.mark.parametrize('delimiter, name', [(';', 'semicolon'), ('\t', 'tab'), ('|', 'pipe')])
def test_another_delimiter_is_detected_in_the_header_and_logged(tmp_path, caplog, delimiter, name):
  caplog.set_level('INFO')
  rows = [('text', 'label'), ('a, b', 'x'), ('c', 'y')]
  table = make(tmp_path, '\n'.join(delimiter.join(row) for row in rows), name='t.csv')
  assert [item.texts for item in table.read('train')] == [('a, b',), ('c',)]
  assert f't.csv: columns are separated by {name} (detected in the header)' in caplog.text


def test_parquet_trains_as_other_tables_do(tmp_path):
  pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
  columns = {'review': ['good', 'bad', 'fine'], 'stars': [5, 1, 5]}
  pq.write_table(pa.table(columns), tmp_path / 't.parquet')
  made = make_task('table', files={'train': str(tmp_path / 't.parquet')}, text='review',
                   label='stars')  # fmt: skip
  assert made.labels == ('1', '5')
  assert [item.label for item in made.read('train')] == [1, 0, 1]


@pytest.mark.parametrize('name, right', [('sentence_order', 'in_order'), ('next_sentence', 'next')])
def test_neighbouring_sentences_become_a_task(tmp_path, name, right):
  documents = [' '.join(f'Sentence {d} {i}.' for i in range(8)) for d in range(20)]
  for d, text in enumerate(documents):
    write(tmp_path, f'{d:02d}.txt', text)
  pairs = TASKS[name](files={'train': str(tmp_path)})
  items = pairs.read('train')
  assert items == pairs.read('train') and len(items) == 80
  assert 25 < sum(item.label for item in items) < 55
  joined = ' '.join(documents)
  for item in items:
    assert (' '.join(item.texts) in joined) == (pairs.labels[item.label] == right)
  others = TASKS[name](files={'train': str(tmp_path)}, seed=1).read('train')
  assert [item.label for item in others] != [item.label for item in items]
  write(tmp_path, '../short.txt', 'Only one. Pair.')
  with pytest.raises(ValueError, match=r'has 1 pairs of sentences; two are needed'):
    TASKS[name](files={'train': str(tmp_path.parent / 'short.txt')}).read('train')


@pytest.fixture(scope='module')
def tfds_set(tmp_path_factory):
  """Returns a function that writes examples as a TensorFlow data set and gives its source."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  def write_set(name, features, splits):
    features = tfds.features.FeaturesDict(features)
    signature = tf.nest.map_structure(
      lambda spec: tf.TensorSpec(spec.shape, spec.dtype), features.get_tensor_spec()
    )
    data = {
      split: tf.data.Dataset.from_generator(lambda rows=rows: rows, output_signature=signature)
      for split, rows in splits.items()
    }
    builder = tfds.dataset_builders.store_as_tfds_dataset(
      name=name, version='1.0.0', data_dir=tmp_path_factory.mktemp('tfds'), features=features,
      split_datasets=data,
    )  # fmt: skip
    return f'tfds:{builder.data_path}'

  return tfds_set_features(tfds), write_set


def tfds_set_features(tfds):
  text = tfds.features.Text()
  classes = tfds.features.ClassLabel(names=['entailment', 'not_entailment'])
  tags = tfds.features.ClassLabel(names=['O', 'B-PER', 'I-PER'])
  answers = tfds.features.Sequence({'text': text, 'answer_start': np.int32})
  return {
    'rte': {'sentence1': text, 'sentence2': text, 'label': classes},
    'conll2003': {'tokens': tfds.features.Sequence(text), 'ner': tfds.features.Sequence(tags)},
    'squad': {'id': text, 'question': text, 'context': text, 'answers': answers,
              'is_impossible': np.bool_},
  }  # fmt: skip


def test_tfds_gives_the_pairs_and_labels_of_glue(tfds_set):
  features, write_set = tfds_set
  rows = [{'sentence1': f'a é {i}', 'sentence2': 'b', 'label': i % 2} for i in range(4)]
  unlabelled = [row | {'label': -1} for row in rows]
  source = write_set('rte', features['rte'], {'train': rows, 'test': unlabelled})
  rte = TASKS['rte'](source)
  found = sorted((item.texts, item.label) for item in rte.read('train'))
  assert found == [((f'a é {i}', 'b'), i % 2) for i in range(4)]
  assert [item.label for item in rte.read('test')] == [None] * 4
  own = TASKS['table'](source, files={'train': 'train'}, text='sentence1', label='label')
  assert own.labels == rte.labels
  own = TASKS['table'](source, files={'test': 'test'}, text='sentence1', labels=rte.labels)
  assert [item.label for item in own.read('test')] == [None] * 4
  with pytest.raises(ValueError, match=r"tfds:.*rte.* has no column 'question1'"):
    TASKS['qqp'](source).read('train')
  with pytest.raises(ValueError, match=r'tfds:.*rte'):
    rte.read('dev')


def test_tfds_gives_the_words_and_tags_of_conll(tfds_set):
  features, write_set = tfds_set
  rows = [{'tokens': ['Bo', 'é', 'Al'], 'ner': [1, 2, 1]}, {'tokens': ['x'], 'ner': [0]}]
  source = write_set('conll2003', features['conll2003'], {'dev': rows})
  items = sorted(TASKS['conll2003'](source).read('dev'), key=lambda item: item.texts)
  assert [item.texts for item in items] == [('Bo', 'é', 'Al'), ('x',)]
  assert [item.label for item in items] == [('B-PER', 'I-PER', 'B-PER'), ('O',)]
  assert items[0].document != items[1].document
  source = write_set('broken', features['conll2003'], {'dev': [rows[0] | {'ner': [1, 2]}]})
  with pytest.raises(ValueError, match=r'dev example 0: 3 words and 2 tags'):
    TASKS['conll2003'](source).read('dev')


def test_tfds_gives_the_questions_and_answers_of_squad(tfds_set):
  features, write_set = tfds_set
  row = {'id': '7', 'question': 'where', 'context': 'in Zürich now', 'is_impossible': False,
         'answers': {'text': ['Zürich'], 'answer_start': [3]}}  # fmt: skip
  none = row | {'id': '8', 'is_impossible': True, 'answers': {'text': [], 'answer_start': []}}
  source = write_set('squad', features['squad'], {'validation': [row, none]})
  items = sorted(TASKS['squad2'](source).read('dev'))
  assert items == [
    task.Example('7', ('where', 'in Zürich now'), (('Zürich', 3),)),
    task.Example('8', ('where', 'in Zürich now'), ()),
  ]
