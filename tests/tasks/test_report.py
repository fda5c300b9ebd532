"""report.html: what it says of the run, its mistakes, its calibration, its sweep."""

import json
import re

import numpy as np
import pytest

from bertjax import pages
from bertjax.objectives import labels
from bertjax.tasks import TASKS, question_answering, report
from bertjax.tasks.question_answering import Answer
from bertjax.tasks.task import Example
from bertjax.training import sweep
from tests.test_scoring import TOKENIZER, squad_file

TABLE = TASKS['table'](files={}, text='text', labels=('ham', 'spam'))
ITEMS = [Example(str(i), (f'text {i}',), int(i > 2)) for i in range(5)]  # 3 ham, 2 spam
LOGITS = np.log(
  [[0.92, 0.08], [0.28, 0.72], [0.04, 0.96], [0.36, 0.64], [0.16, 0.84]]
)  # 3 of 5 right
RUN = {
  'config': {
    'learning_rate': 5e-5,
    'data': {'source': 'mails', 'prepared': ''},
    'optimizer': {'name': 'bert'},
  },
  'versions': {'jax': '0.10.2', 'bertjax': '0.1.0'}, 'started': '2026-11-25T19:20:00+0000',
  'commit': 'abc', 'devices': ['TPU v5e'] * 8, 'machine': 'Linux', 'command': ['bertjax', 'x<y'],
}  # fmt: skip


def made(logits=LOGITS, rows=(), trials=None, items=ITEMS, **more):
  predictions = logits.argmax(1)
  scores = TABLE.score(items, predictions)
  return report.page(TABLE, items, predictions, logits, scores, rows, {}, trials or {}, **more)


def test_the_report_says_what_was_run_on_what():
  page = made(run=RUN, name='mail-filter')
  assert '<title>mail-filter: report</title>' in page and '<h1>mail-filter</h1>' in page
  assert 'accuracy 0.6000 on 5 dev examples; 0.6000 by always predicting &#x27;ham&#x27;.' in page
  cells = re.findall('<td[^>]*>(.*?)</td>', page)
  facts = dict(zip(cells[::2], cells[1::2], strict=False))
  assert facts['dev labels'] == 'ham 3, spam 2'
  assert facts['started'] == RUN['started'] and facts['devices'] == '8 x TPU v5e, Linux'
  assert facts['versions'] == 'jax 0.10.2, bertjax 0.1.0; commit abc'
  assert facts['command'] == 'bertjax x&lt;y'
  assert (facts['data.source'], facts['optimizer.name']) == ('mails', 'bert')
  assert facts['learning_rate'] == '5e-05' and 'data.prepared' not in facts


def test_mistakes_come_in_the_order_of_their_probability():
  page = made().partition('<h2>Mistakes</h2>')[2]
  assert '2 of 5 examples differ, the most confident first:' in page
  rows = re.findall('<td>(text .)</td><td>ham</td><td>spam</td><td class="n">(.*?)</td>', page)
  assert rows == [('text 2', '0.960'), ('text 1', '0.720')]


def test_a_perfect_model_has_no_table_of_mistakes():
  right = np.eye(2)[[item.label for item in ITEMS]]
  page = made(right).partition('<h2>Mistakes</h2>')[2]
  assert 'All 5 predictions are right.' in page and '<table>' not in page


def test_calibration_is_the_mean_gap_of_probability_and_accuracy():
  # 0.92 is right and 0.96 wrong in one tenth; 0.72 is wrong, 0.64 and 0.84 are right
  error = (2 * abs(0.94 - 0.5) + 0.72 + 0.36 + 0.16) / 5
  assert f'expected calibration error {error:.3f}' in made()


def test_a_class_without_examples_has_no_empty_figure():
  ham = [item._replace(label=0) for item in ITEMS]
  page = made(items=ham)
  assert '>recall</text>' in made() and '>recall</text>' not in page
  assert '>predicted</text>' in page


def test_a_curve_has_two_points_at_least():
  rows = [{'kind': 'train', 'step': s, 'loss': 1.0} for s in (1, 2)]
  rows += [{'kind': 'eval', 'step': 2, 'loss': 1.0, 'accuracy': 0.5}]
  curves = made(rows=rows).partition('<h2>Curves</h2>')[2].partition('<section>')[0]
  assert curves.count('<svg') == 1 and '>training</text>' in curves and '>dev</text>' in curves
  assert '<h2>Curves</h2>' not in made(rows=rows[1:])


def test_a_sweep_is_a_table_of_rates_by_seeds():
  runs = [(0, 2e-5), (1, 2e-5), (0, 5e-5), (1, 5e-5)]
  values = np.array([[0.5, 0.6, 0.7, 0.5], [0.6, 0.8, 0.65, 0.5]])
  table = sweep.summarise(runs, values, 0, lambda trial, last: trial == 3)
  page = made(trials={'metric': 'accuracy', 'steps': [10, 20]} | table)
  section = page.partition('<h2>Sweep</h2>')[2].partition('<section>')[0]
  lines = [re.findall('<t[hd][^>]*>(.*?)</t', line) for line in section.split('<tr>')[1:]]
  assert lines == [
    ['learning rate', 'seed 0', 'seed 1', 'mean', 'deviation', 'failed'],
    ['2e-05', '0.6000', '0.8000', '0.7000', '0.1414', '0'],
    ['5e-05', '0.7000', '0.5000 (failed)', '0.6000', '0.1414', '1'],
  ]
  assert section.count('<svg') == 1


def test_confidence_is_the_probability_of_the_prediction():
  def of(label, predictions, logits):
    return label.confidence(predictions, np.array(logits))

  two = ('a', 'b')
  assert of(labels.Class(two), [1], np.log([[0.2, 0.8]])) == pytest.approx([0.8])
  assert of(labels.Choice(rows=2), [0], np.log([0.7, 0.3])) == pytest.approx([0.7])
  logits = np.log([[0.9 / 0.1, 0.2 / 0.8]])
  assert of(labels.Multilabel(two), np.array([[True, False]]), logits) == pytest.approx([0.72])
  answer = Answer(
    'b', 'b', 0.0, [{'text': t, 'probability': p} for t, p in (('', 0.6), ('b', 0.4))]
  )
  assert of(labels.Span(), [answer], np.zeros((1, 3, 2))).tolist() == [0.4]
  assert of(labels.Regression(), [1.0], [[1.0]]) is None
  assert of(labels.Tags(two), [['a']], np.zeros((1, 3, 2))) is None


def test_a_model_that_says_always_the_same_is_remarked_on(caplog):
  table = TASKS['table'](files={}, text='text', labels=('ham', 'spam'))
  items = [Example(str(i), ('a',), int(i > 2)) for i in range(5)]  # 3 ham, 2 spam

  def remarks(task, items, predictions):
    scores = task.score(items, predictions) if items[0].label is not None else {}
    return report.remarks(task, 'dev', items, predictions, scores)

  assert remarks(table, items, np.zeros(5, int)) == [
    "dev: all 5 predictions are 'ham'",
    "dev: accuracy 0.6000 is not above 0.6000, that of always predicting 'ham', the most frequent "
    'class',
  ]
  assert 'the model may not have learnt the task' in caplog.text
  [note] = remarks(table, items, np.array([0, 0, 1, 0, 1]) ^ np.array([1, 0, 0, 0, 0]))
  assert note.startswith('dev: accuracy 0.4000 is not above 0.6000')
  assert remarks(table, items, np.array([0, 0, 0, 1, 0])) == []
  unlabelled = [item._replace(label=None) for item in items]
  assert remarks(table, unlabelled, np.ones(5, int)) == ["dev: all 5 predictions are 'spam'"]
  words = [Example('0', ('a', 'b'), ('B-PER', 'O'))] * 2
  conll = TASKS['conll'](files={}, types=('PER',))
  assert remarks(conll, words, [['O', 'O']] * 2) == [
    'dev: no entity is predicted in 2 sentences (f1 0.0000)'
  ]
  assert remarks(conll, words, [['O', 'O'], ['B-PER', 'O']]) == []
  several = TASKS['table'](files={}, text='text', labels=('x', 'y'), kind='multilabel')
  sets = [Example('0', ('a',), (0,)), Example('1', ('a',), (1,))]
  assert remarks(several, sets, np.zeros((2, 2), bool)) == [
    'dev: no label is predicted for any of 2 examples (micro_f1 0.0000)'
  ]
  numbers = TASKS['table'](files={}, text='text', kind='regression')
  assert remarks(numbers, [Example('0', ('a',), 1.0), Example('1', ('a',), 2.0)], [3.0, 3.0]) == [
    "dev: all 2 predictions are '3.0' (spearman 0.0000)"
  ]
  questions = [Example('0', ('q', 'c'), (('c', 0),)), Example('1', ('q', 'c'), ())]
  nothing = [question_answering.Answer('', 'c', 1.0, [])] * 2
  assert remarks(TASKS['squad2'](), questions, nothing)[0].startswith(
    'dev: none of 2 questions is answered'
  )
  options = {'files': {}, 'text': 'a', 'pair': 'b'}
  pairs = TASKS['embed'](**options, label='s', loss='cosine', evaluation='similarity').judge
  scored = [Example(str(i), ('a', 'b'), 1.0 - i) for i in range(2)]
  assert remarks(pairs, scored, np.array([0.9991, 0.9987])) == [
    'dev: all 2 cosines are 0.999 to 0.999 (spearman 1.0000)'
  ]
  assert remarks(pairs, scored, np.array([0.99, 0.4])) == []


def test_the_report_lists_no_tags_that_the_metric_counts_as_right(tmp_path):
  (tmp_path / 'f').write_text('ada O\nlyon B-LOC\nthe I-LOC\n\na B-PER\nb O\n')
  task = TASKS['conll'](files={'dev': str(tmp_path / 'f')}, types=('LOC', 'PER'))
  items = task.read('dev')
  predictions = [['O', 'I-LOC', 'I-LOC'], ['B-PER', 'I-PER']]
  assert task.score(items, predictions)['f1'] == 0.5
  page = report._mistakes(task, items, predictions)
  assert '<p>1 of 2 examples differ' in page
  assert '<td>a [PER]</td><td>a b [PER]</td>' in page and 'LOC' not in page


def test_the_report_shows_chinese_words_without_blanks(tmp_path):
  (tmp_path / 'f').write_text('他 O\n在 O\n北 B-LOC\n京 I-LOC\n。 O\n', encoding='utf-8')
  task = TASKS['conll'](files={'dev': str(tmp_path / 'f')}, types=('LOC',))
  page = report._mistakes(task, task.read('dev'), [['O'] * 5])
  assert '<td>他在北京。</td><td>北京 [LOC]</td><td>(none)</td>' in page


def test_the_report_lists_the_answers_that_the_metric_counts_as_wrong(tmp_path):
  (tmp_path / 'dev-v2.0.json').write_text(json.dumps(squad_file(True, 4)))
  task = TASKS['squad2'](str(tmp_path))
  items = task.read('dev')
  encoded = task.encode(items, TOKENIZER, 80)
  logits = np.zeros((*encoded.columns['input_ids'].shape, 2))
  logits[:, 0] = 9
  predictions = task.decode(items, encoded, logits)
  assert [p.text for p in predictions] == [''] * 4
  assert task.score(items, predictions)['exact'] == 0.5
  assert '<p>2 of 4 examples differ' in report._mistakes(task, items, predictions)


def test_odd_labels_are_text_in_the_figures_of_the_report():
  labels = ('$5 to $10', r'$\foo$', '<script>')
  table = TASKS['table'](files={}, text='text', labels=labels)
  items = [Example(str(i), ('a',), i) for i in range(3)]
  scores = table.score(items, np.arange(3))
  page = report.page(table, items, np.arange(3), np.eye(3), scores, [], {}, {})
  for label in labels[:2]:
    assert page.count(f'>{label}</text>') == 2  # of the confusion matrix
    assert f'>{label} (mean 1.000)</text>' in page
  assert '<script' not in page and page.count('>&lt;script&gt;</text>') == 2


def test_the_report_shows_remarks():
  table = TASKS['table'](files={}, text='text', labels=('ham', 'spam'))
  items = [Example(str(i), ('a',), int(i > 2)) for i in range(5)]
  predictions, logits = np.zeros(5, int), np.eye(2)[np.zeros(5, int)]
  scores = table.score(items, predictions)
  notes = report.remarks(table, 'dev', items, predictions, scores)
  page = report.page(table, items, predictions, logits, scores, [], {}, {}, notes)
  assert '<p><strong>dev: all 5 predictions are &#x27;ham&#x27;.</strong></p>' in page


def test_only_columns_of_numbers_are_aligned_right():
  facts = pages.table([('from', 'model'), ('step', 43)])
  assert 'class="n"' not in facts and facts.startswith('<table class="facts">')
  assert pages.table([('accuracy', '0.5'), ('loss', '0.7')]).count('class="n"') == 2
