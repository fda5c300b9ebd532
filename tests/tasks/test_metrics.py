"""Metrics against hand-computed values, naive counts and the official libraries."""

import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bertjax.tasks import metrics

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)
TAGS = st.sampled_from(['O', 'B-A', 'I-A', 'B-B', 'I-B'])


@given(LABELS)
@settings(deadline=None, max_examples=100)
@pytest.mark.filterwarnings('ignore')
def test_class_metrics_are_scikit_learns(pairs):
  predicted, gold = zip(*pairs, strict=True)
  table = metrics.confusion(predicted, gold, 4)
  np.testing.assert_array_equal(
    table, sklearn.metrics.confusion_matrix(gold, predicted, labels=range(4))
  )
  scores = metrics.of_classes(predicted, gold)
  ours = [scores[name] for name in ('accuracy', 'macro_f1', 'matthews')]
  theirs = [
    sklearn.metrics.accuracy_score(gold, predicted),
    sklearn.metrics.f1_score(gold, predicted, average='macro'),
    sklearn.metrics.matthews_corrcoef(gold, predicted),
  ]
  np.testing.assert_allclose(ours, theirs, atol=1e-12)
  binary = metrics.of_classes(np.minimum(predicted, 1), np.minimum(gold, 1))
  expected = sklearn.metrics.f1_score(np.minimum(gold, 1), np.minimum(predicted, 1))
  assert binary['f1'] == pytest.approx(expected)


def test_class_metrics_by_hand():
  # True positives 3, false positives 1, false negatives 2, true negatives 4.
  scores = metrics.of_classes([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
  assert scores['accuracy'] == 0.7
  assert scores['f1'] == 2 * 3 / (2 * 3 + 1 + 2)
  assert scores['matthews'] == pytest.approx((3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5)


def test_a_model_that_always_says_the_same_has_no_correlation():
  assert metrics.of_classes([1, 1, 1], [0, 1, 1])['matthews'] == 0
  assert metrics.of_classes([0, 0], [0, 0])['f1'] == 0
  none = {'pearson': 0.0, 'spearman': 0.0}
  assert metrics.correlations([2.5, 2.5, 2.5], [0, 1, 2]) == none
  assert metrics.correlations([1, np.nan, 2], [0, 1, 2]) == none


def test_correlations_are_scipys_also_with_ties():
  predicted, gold = [0.1, 0.1, 3.0, 2.0, 9.0], [1, 2, 2, 2, 5]
  scores = metrics.correlations(predicted, gold)
  assert scores['pearson'] == pytest.approx(np.corrcoef(predicted, gold)[0, 1])
  ranks = [1.5, 1.5, 4, 3, 5], [1, 3, 3, 3, 5]
  assert scores['spearman'] == pytest.approx(np.corrcoef(*ranks)[0, 1])
  assert scores['spearman'] == pytest.approx(stats.spearmanr(predicted, gold).statistic)


def test_the_precision_recall_curve_is_scikit_learns():
  rng = np.random.default_rng(0)
  gold, score = rng.random(60) < 0.3, rng.integers(0, 20, 60) / 4  # with ties
  precision, recall, mean = metrics.precision_recall(gold, score)
  expected = sklearn.metrics.precision_recall_curve(gold, score)
  np.testing.assert_allclose(precision, expected[0][-2::-1])
  np.testing.assert_allclose(recall, expected[1][-2::-1])
  assert mean == pytest.approx(sklearn.metrics.average_precision_score(gold, score))


def test_several_labels_at_once_are_scored_as_scikit_learn_does():
  rng = np.random.default_rng(0)
  predicted, gold = rng.random((2, 50, 4)) < 0.4
  predicted[:, 3] = gold[:, 3] = False
  scores = metrics.multilabel(predicted, gold)
  f1 = {
    kind: sklearn.metrics.f1_score(gold, predicted, average=kind, zero_division=0)
    for kind in ('micro', 'macro')
  }
  assert scores['micro_f1'] == pytest.approx(f1['micro'])
  assert scores['macro_f1'] == pytest.approx(f1['macro'])
  assert scores['exact'] == sklearn.metrics.accuracy_score(gold, predicted)


@pytest.mark.parametrize(
  'tags, spans',
  [
    ('I-A I-A O I-A', [('A', 0, 2), ('A', 3, 4)]),  # IOB1: no B needed
    ('I-A B-A I-A', [('A', 0, 1), ('A', 1, 3)]),  # IOB1: B parts neighbours
    ('I-A I-B', [('A', 0, 1), ('B', 1, 2)]),
    ('B-A I-B I-B', [('A', 0, 1), ('B', 1, 3)]),  # strict about types
    ('B-A E-A S-A B-A I-A E-A', [('A', 0, 2), ('A', 2, 3), ('A', 3, 6)]),  # IOBES
    ('E-A E-A', [('A', 0, 1), ('A', 1, 2)]),
    ('S-A I-A', [('A', 0, 1), ('A', 1, 2)]),
    ('B-X-Y I-X-Y', [('X-Y', 0, 2)]),  # a type may hold a dash
    ('O', []),
    ('', []),
  ],
)
def test_spans_of_tags_are_conllevals(tags, spans):
  assert metrics.entities(tags.split()) == spans


@given(st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=9), min_size=1, max_size=5))
@settings(deadline=None, max_examples=150)
@pytest.mark.filterwarnings('ignore')
def test_span_scores_are_seqevals(sentences):
  predicted = [[a for a, _ in sentence] for sentence in sentences]
  gold = [[b for _, b in sentence] for sentence in sentences]
  scores = metrics.span_scores(predicted, gold)
  for name in ('f1', 'precision', 'recall', 'accuracy'):
    theirs = getattr(seqeval.metrics, f'{name}_score')(gold, predicted)
    assert scores[name] == pytest.approx(theirs), name
  report = seqeval.metrics.classification_report(gold, predicted, output_dict=True)
  for name in 'AB':
    assert scores.get(f'f1_{name}', 0) == pytest.approx(report.get(name, {}).get('f1-score', 0))


@pytest.mark.parametrize(
  'text, normal',
  [
    ('The  Cat-in-the-Hat!', 'catinthehat'),
    ('An apple a day', 'apple day'),
    ('the', ''),
    ('theatre "A.B." U.S.', 'theatre ab us'),
    ('Beyoncé’s 10%', 'beyoncé’s 10'),  # only ASCII punctuation is removed
  ],
)
def test_answers_are_normalised_as_in_the_official_scripts(text, normal):
  assert metrics.normalize_answer(text) == normal


def test_the_f1_of_answers_counts_repeated_words():
  # 'to be to' against 'to be or not to be': 3 in common of 3 and of 6.
  assert metrics.answer_f1('to be to', 'to be or not to be') == pytest.approx(2 * 1 * 0.5 / 1.5)
  assert metrics.answer_f1('The cat', 'a cat!') == 1 and metrics.answer_f1('dog', 'cat') == 0


def test_empty_answers_differ_between_the_two_scripts():
  f1, exact = metrics.answer_f1, metrics.answer_exact
  assert (
    metrics.best_answer(f1, 'the', ['a']) == 0 and metrics.best_answer(exact, 'the', ['a']) == 1
  )
  assert metrics.best_answer_v2(f1, 'the', ['a']) == 1  # an empty reference is no answer
  assert metrics.best_answer_v2(f1, '', []) == 1 and metrics.best_answer_v2(f1, 'cat', []) == 0
  assert metrics.best_answer_v2(f1, '', ['cat']) == 0
  assert metrics.best_answer_v2(f1, 'big cat', ['a', 'cat']) == pytest.approx(2 / 3)


ODDS = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0])


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0]), ODDS, st.booleans()), min_size=1))
@settings(deadline=None, max_examples=200)
def test_the_best_threshold_is_the_best_of_all(items):
  scores, odds, answerable = map(np.array, zip(*items, strict=True))
  scores = np.where(answerable, scores, scores == 1)  # 1: the best text is '', which is right

  def mean(threshold):
    return np.where(odds > threshold, ~answerable, scores).mean()

  best, threshold = metrics.best_threshold(scores, odds, answerable)
  assert best == pytest.approx(max(map(mean, [-9.0, *odds])))
  assert mean(threshold) == pytest.approx(best)


def test_the_oracle_of_spans_agrees_on_a_long_mixed_text():
  rng = np.random.default_rng(1)
  tags = rng.choice(['O', 'B-A', 'I-A', 'E-A', 'S-A', 'B-B', 'I-B', 'E-B', 'S-B'], 3000).tolist()
  assert metrics.entities(tags) == conlleval(tags)


def conlleval(tags):
  """startOfChunk and endOfChunk of conlleval.pl, rule by rule."""
  spans, start = [], None
  previous, before = 'O', ''
  for place, tag in enumerate([*tags, 'O']):
    current, _, name = tag.partition('-')
    ends = (previous, current) in {
      ('B', 'B'), ('B', 'O'), ('I', 'B'), ('I', 'O'), ('E', 'E'), ('E', 'I'), ('E', 'O'),
      ('B', 'S'), ('I', 'S'),
    } or previous in 'ES' or (previous != 'O' and before != name)  # fmt: skip
    starts = (previous, current) in {
      ('O', 'I'), ('O', 'E'), ('E', 'E'), ('E', 'I'), ('S', 'E'), ('S', 'I')
    } or current in 'BS' or (current != 'O' and before != name)  # fmt: skip
    if ends and previous != 'O':
      spans.append((before, start, place))
    if starts:
      start = place
    previous, before = current, name
  return spans


def test_every_type_that_is_labelled_or_predicted_has_an_f1():
  scores = metrics.span_scores([['B-A', 'O', 'B-C']], [['B-A', 'B-B', 'O']])
  by_type = {name: value for name, value in scores.items() if name.startswith('f1_')}
  assert by_type == {'f1_A': 1, 'f1_B': 0, 'f1_C': 0} and scores['f1'] == 0.5


@pytest.mark.parametrize(
  'predicted, gold, exact, f1',
  [  # of cmrc2018_evaluate.py by hand: the longest common run of segments
    ('《北京》。', '北京', 1, 1),
    ('在北京大学', '北京大学', 0, 8 / 9),
    ('北京的大学', '北京大学', 0, 4 / 9),  # 'AB' of 'ABxCD': not four characters, two in a run
    ('1999年', '1999年9月', 0, 4 / 6),
    ('iPhone 手机', 'iphone手机', 0, 1),
    ('the cat', 'cat', 0, 2 / 3),  # articles count
    ('3.5米', '3.5 米', 0, 1),
    ('', '北京', 0, 0),
    ('上海', '北京', 0, 0),
  ],
)
def test_answers_in_chinese_are_scored_by_characters_as_in_cmrc_2018(predicted, gold, exact, f1):
  assert metrics.cmrc_exact(predicted, gold) == exact
  assert metrics.cmrc_f1(predicted, gold) == pytest.approx(f1)
