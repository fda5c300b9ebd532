"""GLUE in its official files: counts, labels, metrics, the leaderboard's format."""

import numpy as np
import pytest

from bertjax import TASKS, Tokenizer
from bertjax.tasks import glue

COUNTS = {  # train, dev, test: of the official download
  'cola': ('CoLA', 8551, 1043, 1063),
  'sst2': ('SST-2', 67349, 872, 1821),
  'mrpc': ('MRPC', 3668, 408, 1725),
  'stsb': ('STS-B', 5749, 1500, 1379),
  'rte': ('RTE', 2490, 277, 3000),
  'wnli': ('WNLI', 635, 71, 146),
}
FIRST = {
  'cola': ("Our friends won't buy this analysis, let alone the next one we propose.", 1),
  'sst2': ('hide new secretions from the parental units ', 0),
  'mrpc': ('Amrozi accused his brother , whom he called " the witness " , of deliberately '
           'distorting his evidence .', 1),
  'stsb': ('A plane is taking off.', 5.0),
  'rte': ('No Weapons of Mass Destruction Found in Iraq Yet.', 1),
  'wnli': ('I stuck a pin through a carrot. When I pulled the pin out, it had a hole.', 1),
}  # fmt: skip
PAIR = 'sentence1\tsentence2'


def write(folder, name, *lines):
  (folder / name).write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return str(folder)


@pytest.mark.data
@pytest.mark.parametrize('name', COUNTS)
def test_the_official_files_are_read_encoded_and_scored(data_dir, tmp_path, name):
  folder, *counts = COUNTS[name]
  task = TASKS[name](str(data_dir / 'glue' / folder))
  splits = {split: task.read(split) for split in ('train', 'dev', 'test')}
  assert [len(items) for items in splits.values()] == counts
  first = splits['train'][0]
  assert (first.texts[0], first.label) == FIRST[name]
  assert all(item.label is None for item in splits['test'])
  vocab = data_dir / 'vocab' / 'bert-base-uncased-vocab.txt'
  items = splits['dev']
  encoded = task.encode(items, Tokenizer.from_file(vocab), 64)
  assert encoded.columns['input_ids'].shape == (len(items), 64)
  gold = encoded.columns['labels']
  logits = gold[:, None] if name == 'stsb' else np.eye(task.num_labels)[gold]
  predictions = task.decode(items, encoded, logits)
  scores = task.score(items, predictions)
  assert next(iter(scores)) == task.metric
  assert set(scores.values()) == {1.0} or scores == pytest.approx(dict.fromkeys(scores, 1.0))
  [path] = task.write(tmp_path, 'test', items, predictions)
  assert path.name == f'{folder}.tsv'
  lines = path.read_text().splitlines()
  assert lines[0] == 'index\tprediction' and len(lines) == len(items) + 1


def test_the_order_of_classes_is_that_of_hugging_face():
  assert TASKS['mnli']().labels == ('entailment', 'neutral', 'contradiction')
  assert TASKS['qnli']().labels == TASKS['rte']().labels == ('entailment', 'not_entailment')


def test_mnli_has_two_dev_and_two_test_sets(tmp_path):
  mnli = TASKS['mnli'](str(tmp_path))
  assert mnli.splits == ('train', 'dev', 'dev_mismatched', 'test', 'test_mismatched')
  lines = [f'a\tb\t{label}' for label in ('neutral', 'contradiction', 'entailment')]
  write(tmp_path, 'dev_mismatched.tsv', f'{PAIR}\tgold_label', *lines)
  items = mnli.read('dev_mismatched')
  assert [item.label for item in items] == [1, 2, 0]
  [path] = mnli.write(tmp_path, 'test_mismatched', items, [1, 2, 0])
  assert path.name == 'MNLI-mm.tsv'
  assert path.read_text() == 'index\tprediction\n0\tneutral\n1\tcontradiction\n2\tentailment\n'
  names = [mnli.write(tmp_path, split, items, [0, 0, 0])[0].name for split in ('test', 'dev')]
  assert names == ['MNLI-m.tsv', 'MNLI-m-dev.tsv']


def test_similarities_are_clipped_before_they_are_scored_and_written(tmp_path):
  stsb = TASKS['stsb']()
  write(tmp_path, 'dev.tsv', f'{PAIR}\tscore', 'a\tb\t0.5', 'a\tc\t4.8', 'a\td\t5')
  items = TASKS['stsb'](str(tmp_path)).read('dev')
  predictions = stsb.decode(items, None, np.array([[-0.25], [1.23456], [6]]))
  [path] = stsb.write(tmp_path, 'test', items, predictions)
  assert path.read_text() == 'index\tprediction\n0\t0.000\n1\t1.235\n2\t5.000\n'
  expected = np.corrcoef([0, 1.235, 5], [0.5, 4.8, 5])[0, 1]
  assert stsb.score(items, predictions) == pytest.approx({'pearson': expected, 'spearman': 1.0})


def test_the_diagnostic_set_is_read_with_and_without_labels(tmp_path):
  write(tmp_path, 'diagnostic.tsv', f'index\t{PAIR}', '0\ta\tb')
  write(tmp_path, 'diagnostic-full.tsv', 'Logic\tPremise\tHypothesis\tLabel', '\ta\tb\tneutral')
  ax = TASKS['ax'](str(tmp_path))
  assert ax.read('test')[0].texts == ax.read('dev')[0].texts == ('a', 'b')
  assert (ax.read('test')[0].label, ax.read('dev')[0].label, ax.metric) == (None, 1, 'matthews')


def test_broken_records_of_qqp_are_skipped_and_logged(tmp_path, caplog):
  header = 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate'
  rows = ['1\t1\t2\ta?\tb?\t1', '2\t3\t4\tc?', '3\t5\t6\t\td?\t0', '4\t7\t8\te?\tf?\t0']
  write(tmp_path, 'train.tsv', header, *rows)
  items = TASKS['qqp'](str(tmp_path)).read('train')
  assert [(item.texts, item.label) for item in items] == [(('a?', 'b?'), 1), (('e?', 'f?'), 0)]
  assert 'train: 2 of 4 rows skipped: ' in caplog.text
  assert 'train.tsv:3: 4 fields, the first row has 6; ' in caplog.text
  assert "train.tsv:4: column 'question1' holds no text." in caplog.text
  write(tmp_path, 'test.tsv', 'id\tquestion1\tquestion2', '0\ta?\t', '1\tb?\tc?')
  items = TASKS['qqp'](str(tmp_path)).read('test')  # each counts on the leaderboard
  assert [(item.id, item.texts) for item in items] == [('0', ('a?', '')), ('1', ('b?', 'c?'))]


@pytest.mark.parametrize(
  'name, lines, message',
  [
    ('rte', [f'{PAIR}\tlabel', 'a\tb\tmaybe'], r"dev.tsv:2: unknown label 'maybe'"),
    ('rte', [PAIR, 'a\tb'], r"dev.tsv has no column 'label'"),
    ('cola', ['gj04\t1\t\tHi.', 'gj04\t1\tHi.'], r'dev.tsv:2: 3 fields, the first row has 4'),
    ('cola', ['gj04\t2\t\tHi.'], r"dev.tsv:1: unknown label '2'; the labels are \['0', '1'\]"),
    ('stsb', [f'{PAIR}\tscore', 'a\tb\tinf'], r"dev.tsv:2: the label must be a finite number"),
  ],
)  # fmt: skip
def test_bad_rows_are_named_by_file_and_line(tmp_path, name, lines, message):
  with pytest.raises(ValueError, match=message):
    TASKS[name](write(tmp_path, 'dev.tsv', *lines)).read('dev')


def test_other_file_names_can_be_given_for_known_splits(tmp_path):
  write(tmp_path, 'mine.tsv', f'{PAIR}\tlabel', 'a\tb\t1')
  assert len(TASKS['wnli'](str(tmp_path), files={'dev': 'mine.tsv'}).read('dev')) == 1
  with pytest.raises(ValueError, match=r"there is no split 'devel'; there are \('train', 'dev'"):
    TASKS['wnli'](str(tmp_path), files={'devel': 'mine.tsv'})


def test_all_nine_tasks_and_the_diagnostic_set_are_there():
  assert len(glue.SPECS) == 10 and set(glue.SPECS) < set(TASKS)
