"""Multiple choice: SWAG, CODAH and tables of that shape."""

import numpy as np
import pytest

from bertjax import TASKS, Tokenizer
from bertjax.data.tokenizer import SPECIAL_TOKENS
from bertjax.tasks import task

SWAG = ',video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3'


@pytest.mark.data
def test_codah_is_read_encoded_and_scored(data_dir):
  codah = TASKS['codah'](str(data_dir / 'codah'), files={'all': 'full_data.tsv'})
  assert [len(codah.read(s)) for s in ('train', 'dev', 'test', 'all')] == [1665, 556, 555, 2776]
  items = codah.read('dev')
  assert items[0].texts[2:4] == (
    'The driver pulled up to a gas station. He', 'walked inside and bought a lotto ticket.'
  )  # fmt: skip
  vocab = Tokenizer.from_file(data_dir / 'vocab' / 'bert-base-cased-vocab.txt', lowercase=False)
  encoded = codah.encode(items, vocab, 48)
  assert len(encoded.columns['input_ids']) == 4 * 556 == encoded.counts['features']
  labels = encoded.columns['labels']
  logits = (np.arange(len(labels)) % 4 == labels).astype(float)
  assert codah.score(items, codah.decode(items, encoded, logits)) == {'accuracy': 1.0}
  assert codah.score(items, codah.decode(items, encoded, -logits))['accuracy'] == 0


def test_each_ending_of_swag_is_a_row_behind_its_start(tmp_path):
  (tmp_path / 'val.csv').write_text(f'{SWAG},label\n0,v,1,x,"a, b",c,gold,d,e,f,a,2\n')
  (tmp_path / 'test.csv').write_text(f'{SWAG}\n0,v,1,x,a b,c,gold,d,e,f,a\n')
  swag = TASKS['swag'](str(tmp_path))
  items = swag.read('dev')
  tokenizer = Tokenizer([*SPECIAL_TOKENS, *'abcdef,'])
  encoded = swag.encode(items, tokenizer, 9)
  assert [tokenizer.decode(row) for row in encoded.columns['input_ids']] == [
    f'[CLS] a, b [SEP] c {end} [SEP] [PAD]' for end in 'defa'
  ]
  assert encoded.columns['example_ids'].tolist() == [0] * 4
  assert encoded.columns['labels'].tolist() == [2] * 4
  assert (swag.choices, swag.head, swag.num_labels) == (4, 'choice', 1)
  assert task.columns(swag, 9, 12)['labels'] == ('int32', ())
  unlabelled = swag.encode(swag.read('test'), tokenizer, 9)
  assert unlabelled.columns['labels'].tolist() == [-1] * 4


def test_a_table_of_three_choices_is_read_by_its_columns(tmp_path):
  (tmp_path / 'x.jsonl').write_text('{"q": "a", "x": "b", "y": "c", "z": "d", "right": 1}\n')
  choice = TASKS['choice'](
    str(tmp_path), files={'dev': 'x.jsonl'}, prompt='q', endings='xyz', label='right'
  )
  [item] = choice.read('dev')
  assert item.texts == ('a', 'b', 'a', 'c', 'a', 'd') and item.label == 1
  predictions = choice.decode([item], None, np.array([0.1, 0.3, 0.2]))
  [path] = choice.write(tmp_path, 'dev', [item], predictions)
  assert path.read_text() == 'index\tprediction\n0\t1\n'


@pytest.mark.parametrize(
  'line, message',
  [
    ('o\ta\tb\tc\td\te\t4', r"dev.tsv:2: unknown label '4'; .*\['0', '1', '2', '3'\]"),
    ('o\ta\tb\tc\td\te', r'dev.tsv:2: 6 fields, the first row has 7'),
    ('o\ta\tb\tc\t\te\t3', r'dev.tsv:2: column 4 holds no text'),
    ('o\ta\tb\tc\td\te\t', r'dev.tsv:2: the label is missing'),
  ],
)
def test_bad_questions_are_named_by_file_and_line(tmp_path, line, message):
  (tmp_path / 'dev.tsv').write_text(f'o\ta\tb\tc\td\te\t0\n{line}\n')
  with pytest.raises(ValueError, match=message):
    TASKS['codah'](str(tmp_path)).read('dev')


def test_training_questions_need_not_have_every_ending_right(tmp_path):
  (tmp_path / 'train.tsv').write_text('o\ta\tb\tc\td\te\t0\n')
  assert TASKS['codah'](str(tmp_path)).read('train')[0].label == 0
