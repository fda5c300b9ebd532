"""Tagging: schemes, first tokens, document context, long sentences, CoNLL columns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax import TASKS, Tokenizer
from bertjax.data.tokenizer import SPECIAL_TOKENS
from bertjax.objectives.labels import Tags
from bertjax.tasks import metrics, tagging
from bertjax.tasks.task import Example

TOKENIZER = Tokenizer([*SPECIAL_TOKENS, 'a', 'b', 'c', '##x', '.'], lowercase=False)
LABELS = ('O', 'B-T', 'I-T')


def shown(row):
  return TOKENIZER.decode([i for i in row if i != TOKENIZER.pad_id]).replace('##', '')


def example(words, document=0, tags=None):
  words = words.split()
  return Example('0', tuple(words), tuple(tags.split()) if tags else ('O',) * len(words), document)


@pytest.mark.parametrize(
  'scheme', ['I-A I-A B-A I-B O I-A', 'B-A I-A B-A B-B O B-A', 'B-A E-A S-A S-B O S-A']
)
def test_all_schemes_become_the_same_bio(scheme):
  assert ' '.join(tagging.to_bio(scheme.split())) == 'B-A I-A B-A B-B O B-A'


@given(st.lists(st.sampled_from(['O', 'B-A', 'I-A', 'E-A', 'S-A', 'B-B', 'I-B']), max_size=12))
@settings(deadline=None, max_examples=100)
def test_bio_keeps_the_spans_and_is_its_own_bio(tags):
  bio = tagging.to_bio(tags)
  assert metrics.entities(bio) == metrics.entities(tags) and tagging.to_bio(bio) == bio


def test_the_first_token_has_the_tag_and_nothing_else_is_in_the_loss():
  items = [example('ax b zz .', tags='B-T I-T O O')]
  encoded = tagging.encode(items, TOKENIZER, 8, labels=LABELS, context=False)
  assert shown(encoded.columns['input_ids'][0]) == '[CLS] ax b [UNK]. [SEP]'
  assert encoded.columns['labels'].tolist() == [[-1, 1, -1, 2, 0, 0, -1, -1]]
  assert encoded.alignment.tolist() == [[-1, 0, -1, 1, 2, 3, -1, -1]]
  assert encoded.columns['ends'].tolist() == [[[7, 7]]]


def test_a_word_without_tokens_is_tagged_too():
  items = [example('a \x00 b', tags='O B-T O')]
  encoded = tagging.encode(items, TOKENIZER, 6, labels=LABELS, context=False)
  assert encoded.columns['labels'].tolist() == [[-1, 0, 1, 0, -1, -1]]
  assert encoded.columns['input_ids'][0, 2] == TOKENIZER.unk_id


def test_context_fills_the_row_from_both_sides_of_the_same_document():
  items = [example(*item) for item in (('b b', 1), ('a a', 2), ('c', 2), ('b b', 2), ('c', 3))]
  rows = tagging.encode(items, TOKENIZER, 7, labels=LABELS, context=True)
  assert [shown(row) for row in rows.columns['input_ids']] == [
    '[CLS] b b [SEP]',
    '[CLS] a a c b b [SEP]',
    '[CLS] a a c b b [SEP]',
    '[CLS] a a c b b [SEP]',
    '[CLS] c [SEP]',
  ]
  assert [np.flatnonzero(row >= 0).tolist() for row in rows.columns['labels']] == [
    [1, 2], [1, 2], [3], [4, 5], [1]
  ]  # fmt: skip
  small = tagging.encode(items, TOKENIZER, 5, labels=LABELS, context=True)
  assert [shown(row) for row in small.columns['input_ids'][1:4]] == [
    '[CLS] a a c [SEP]', '[CLS] a c b [SEP]', '[CLS] c b b [SEP]'
  ]  # fmt: skip


def test_a_long_sentence_gets_several_rows_and_every_word_one_tag():
  items = [example('a b'), example('a ax axxxx b c', tags='O B-T I-T I-T O')]
  encoded = tagging.encode(items, TOKENIZER, 6, labels=LABELS, context=False)
  assert encoded.counts == {'features': 4, 'split': 2, 'truncated_words': 1}
  assert encoded.columns['example_ids'].tolist() == [0, 1, 1, 1]
  words = [row[row >= 0].tolist() for row in encoded.alignment]
  assert words == [[0, 1], [0, 1], [2], [3, 4]]
  tags = Tags(LABELS).decode(items, encoded, np.maximum(encoded.columns['labels'], 0))
  assert tags == [['O', 'O'], ['O', 'B-T', 'I-T', 'I-T', 'O']]
  assert shown(encoded.columns['input_ids'][3]) == '[CLS]xx b c [SEP]'  # the word before fills


SENTENCE = st.lists(st.sampled_from(['a', 'axx', 'axxxxxx', 'b']), min_size=1, max_size=9)


@given(
  st.lists(st.tuples(SENTENCE, st.integers(0, 2)), min_size=1, max_size=8),
  st.integers(4, 12),
  st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_every_word_is_tagged_exactly_once_at_its_first_token(sentences, length, context):
  items = [example(' '.join(words), document) for words, document in sentences]
  encoded = tagging.encode(items, TOKENIZER, length, labels=LABELS, context=context)
  found = []
  for row, owner, place in zip(encoded.columns['input_ids'], encoded.columns['example_ids'],
                               encoded.alignment, strict=True):  # fmt: skip
    for position in np.flatnonzero(place >= 0):
      found.append((owner, place[position]))
      assert TOKENIZER.vocab[row[position]] == items[owner].texts[place[position]][0]
  assert sorted(found) == [(i, w) for i, item in enumerate(items) for w in range(len(item.texts))]
  assert ((encoded.columns['labels'] >= 0) == (encoded.alignment >= 0)).all()


def test_logits_and_chosen_tags_decode_alike(tmp_path):
  items = [example('a ax', tags='B-T I-T')]
  encoded = tagging.encode(items, TOKENIZER, 6, labels=LABELS, context=False)
  logits = np.random.default_rng(0).normal(size=(1, 6, 3))
  tags = Tags(LABELS).decode(items, encoded, logits)
  assert tags == Tags(LABELS).decode(items, encoded, logits.argmax(-1))
  [path] = tagging.write(tmp_path, 'dev', items * 2, [['B-T', 'O']] * 2)
  assert path.read_text() == 'a B-T B-T\nax I-T O\n\na B-T B-T\nax I-T O\n'
  [path] = tagging.write(tmp_path, 'test', [Example('0', ('New York',))], [['B-T']])
  assert path.read_text() == 'New York\tB-T\n'


@pytest.mark.data
@pytest.mark.parametrize('context', [False, True])
@pytest.mark.e2e
def test_conll_2003_is_read_encoded_and_scored(data_dir, tmp_path, context):
  ner = TASKS['conll2003'](str(data_dir / 'conll2003'), context=context)
  train, items = ner.read('train'), ner.read('dev')
  assert (len(train), len(items)) == (14041, 3250)
  assert (train[-1].document, items[-1].document) == (945, 215)  # counted from 0
  entities = [sum(len(metrics.entities(i.label)) for i in part) for part in (train, items)]
  assert entities == [23499, 5942]  # Tjong Kim Sang and De Meulder (2003), table 2
  vocab = Tokenizer.from_file(data_dir / 'vocab' / 'bert-base-cased-vocab.txt', lowercase=False)
  encoded = ner.encode(items, vocab, 96)
  assert (encoded.columns['labels'] >= 0).sum() == sum(len(item.texts) for item in items) == 51362
  used = encoded.columns['ends'][:, 0, 1].mean()
  assert used > 85 if context else used < 30
  tags = ner.decode(items, encoded, np.maximum(encoded.columns['labels'], 0))
  scores = ner.score(items, tags)
  assert scores['f1'] == scores['accuracy'] == scores['f1_MISC'] == 1
  [path] = ner.write(tmp_path, 'dev', items, tags)
  again = [item for _, item in tagging.read_conll(path)]
  assert [item.texts for item in again] == [item.texts for item in items]


def test_other_files_find_their_types_and_columns(tmp_path):
  (tmp_path / 'train.txt').write_text('1\tNew York\tS-LOC\n2\tx\tO\n\n\n1\ty\tS-ORG\n')
  (tmp_path / 'test.txt').write_text('x\ny\r\n \nz')
  task = TASKS['conll'](str(tmp_path), files={'train': 'train.txt', 'test': 'test.txt'}, word=1)
  assert task.labels == ('O', 'B-LOC', 'I-LOC', 'B-ORG', 'I-ORG') and task.num_labels == 5
  assert [item.texts for item in task.read('train')] == [('New York', 'x'), ('y',)]
  plain = TASKS['conll'](str(tmp_path), files={'test': 'test.txt'}, types=['LOC'])
  assert [(i.texts, i.label) for i in plain.read('test')] == [(('x', 'y'), None), (('z',), None)]
  unlabelled = plain.encode(plain.read('test'), TOKENIZER, 6)
  assert (unlabelled.columns['labels'] == -1).all() and (unlabelled.alignment >= 0).sum() == 3


@pytest.mark.parametrize(
  'text, message',
  [
    ('a O\nb\n', r'f.txt:2: 1 columns, the first line of words has 2'),
    ('a X O\nb O\n', r'f.txt:2: 2 columns, the first line of words has 3'),
    ('a\n', r'f.txt:1: a word without a tag'),
    ('a O\nb PER\n', r"f.txt:2: 'PER' is no tag; tags are O, B-X"),
    (
      'a O\n\nb B-PER\nc B-X\n',
      r"f.txt:3: the sentence has the unknown type 'X'; the types",
    ),
    ('a O\n', r"f.txt has no training example of the class 'PER'"),
    ('\n', r'f.txt holds no sentences'),
  ],
)
def test_bad_tags_are_named_by_file_and_line(tmp_path, text, message):
  (tmp_path / 'f.txt').write_text(text)
  with pytest.raises(ValueError, match=message):
    TASKS['conll'](str(tmp_path), files={'train': 'f.txt'}, types=['PER']).read('train')


def read(folder, text, split='dev', **options):
  """[(words, tags, document)] of a file's sentences."""
  (folder / 'f').write_text(text)
  options = {'types': ('PER', 'LOC', 'GPE')} | options
  task = TASKS['conll'](files={split: str(folder / 'f')}, **options)
  return [(item.texts, item.label, item.document) for item in task.read(split)]


def test_comment_lines_are_skipped_and_words_with_a_hash_are_kept(tmp_path, caplog):
  caplog.set_level('INFO')
  text = '#\tsource of 01.01.2005\n1\tAda\tB-PER\tO\n2\t#ada\tO\tO\n# text\n3\t#\tO\tO\n'
  assert read(tmp_path, text, word=1, tag=2) == [(('Ada', '#ada', '#'), ('B-PER', 'O', 'O'), 0)]
  assert '2 comment lines, the first in line 1' in caplog.text
  text = '# sent_id = 1\n#ada O\n# O\n#lyon B-LOC\n'
  assert read(tmp_path, text) == [(('#ada', '#', '#lyon'), ('O', 'O', 'B-LOC'), 0)]
  assert read(tmp_path, '# text = a b\n#a\nb\n', 'test') == [(('#a', 'b'), None, 0)]


def test_marks_of_documents_are_no_words(tmp_path):
  text = ('#begin document (x)\nx 0 0 In IN - O\nx 0 1 Lyon NNP - B-GPE\n#end document\n'
          '#begin document (y)\ny 0 0 Ada NNP - B-PER\n\n#end document\n')  # fmt: skip
  assert read(tmp_path, text, word=3) == [
    (('In', 'Lyon'), ('O', 'B-GPE'), 1), (('Ada',), ('B-PER',), 2)
  ]  # fmt: skip


def test_an_empty_word_between_tabs_is_a_word(tmp_path):
  text = 'Ada\tB-PER\nsmiles\tO\n\tO\n\nBye\tO\n'
  items = read(tmp_path, text)
  assert items == [(('Ada', 'smiles', ''), ('B-PER', 'O', 'O'), 0), (('Bye',), ('O',), 0)]
  task = TASKS['conll'](files={'dev': str(tmp_path / 'f')}, types=['PER'])
  found = task.read('dev')
  encoded = task.encode(found, TOKENIZER, 8)
  assert encoded.columns['input_ids'][0, 3] == TOKENIZER.unk_id
  [path] = task.write(tmp_path, 'dev', found, [item.label for item in found])
  assert [item.texts for _, item in tagging.read_conll(path)] == [item.texts for item in found]


@pytest.mark.parametrize(
  'scheme', ['B-A L-A U-A U-B O U-A', 'B-A E-A S-A S-B O S-A', 'B-A I-A U-A U-B O B-A']
)
def test_the_tags_of_bilou_and_bmes_are_spans(tmp_path, scheme):
  text = ''.join(f'w {tag}\n' for tag in scheme.split())
  [(_, tags, _)] = read(tmp_path, text, types=('A', 'B'))
  assert ' '.join(tags) == 'B-A I-A B-A B-B O B-A'
  assert read(tmp_path, 'a B-PER\nb M-PER\nc M-PER\nd E-PER\ne S-PER\n')[0][1] == (
    'B-PER', 'I-PER', 'I-PER', 'I-PER', 'B-PER'
  )  # fmt: skip
  assert metrics.entities(['U-PER', 'U-PER', 'B-PER', 'M-PER', 'L-PER', 'I-PER']) == [
    ('PER', 0, 1), ('PER', 1, 2), ('PER', 2, 5), ('PER', 5, 6)
  ]  # fmt: skip


def test_a_test_split_may_have_placeholders_and_other_types(tmp_path):
  text = 'a _\nb _\n\nc B-FAC\n'
  assert read(tmp_path, text, 'test') == [(('a', 'b'), None, 0), (('c',), ('B-FAC',), 0)]
  with pytest.raises(ValueError, match=r"f:1: '_' is no tag"):
    read(tmp_path, text)


def test_columns_that_are_not_there_are_named(tmp_path):
  with pytest.raises(ValueError, match=r'f:1: 2 columns, so there is no tag=5 \(from 0\)'):
    read(tmp_path, 'a O\n', tag=5)
  with pytest.raises(ValueError, match=r'f:1: 2 columns, so there is no word=2 \(from 0\)'):
    read(tmp_path, 'a O\n', word=2)


def test_other_encodings_are_read(tmp_path):
  (tmp_path / 'f').write_bytes('里昂 B-LOC\n。 O\n'.encode('gb18030'))
  task = TASKS['conll'](files={'dev': str(tmp_path / 'f')}, types=['LOC'], encoding='gb18030')
  assert task.read('dev')[0].texts == ('里昂', '。')


def test_types_need_a_training_split_or_names():
  with pytest.raises(ValueError, match="types are found in the 'train' split"):
    TASKS['conll'](files={'dev': 'x'})
