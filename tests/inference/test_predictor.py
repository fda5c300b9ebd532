"""Predictor: one item in, one item out; what a call refuses; nothing is truncated."""

import jax
import numpy as np
import pytest

from bertjax.inference.predictor import Predictor
from bertjax.interop.loading import save_model
from tests.models import LONG, TEXTS, applied, model


@pytest.fixture(scope='module')
def classifier(vocab):
  parts = model(vocab, 'classification', labels=3)
  return Predictor(*parts, labels=('x', 'y', 'z'), batch_size=8, long='window')


@pytest.mark.e2e
def test_one_item_in_one_item_out_and_lists_in_order(classifier):
  results = classifier.classify(TEXTS)
  assert [classifier.classify(text).labels for text in TEXTS] == [r.labels for r in results]
  assert classifier.classify(TEXTS[0], TEXTS[1]).scores == pytest.approx(
    classifier.classify(TEXTS[:1], TEXTS[1:2])[0].scores
  )
  assert classifier.classify([]) == []


def test_long_texts_are_windowed_or_refused_and_never_truncated(classifier, vocab):
  strict = Predictor(*model(vocab, 'classification', labels=3), batch_size=8)
  for call in (strict.classify, strict.embed):
    with pytest.raises(
      ValueError, match=r'has \d+ tokens with its special ones, the model takes at most 48'
    ):
      call(['short', LONG])
  with pytest.raises(ValueError, match='takes at most 48'):
    classifier.classify(LONG, 'a pair cannot be windowed')
  [ids] = classifier.tokenizer.encode([LONG])
  parts = [part for (part,) in classifier.runner.split((ids,))]
  assert [token for part in parts for token in part] == ids and max(map(len, parts)) <= 46
  assert max(map(len, parts)) - min(map(len, parts)) <= 1
  batch = [[classifier.tokenizer.cls_id, *p, classifier.tokenizer.sep_id] for p in parts]
  apply = applied(classifier.config, ('classification',), 3)
  logits = [apply(classifier.runner.params, {'input_ids': np.array([row])}) for row in batch]
  each = [jax.nn.softmax(out['classification_logits'][0]) for out in logits]
  expected = np.average(each, axis=0, weights=[len(row) for row in batch])
  np.testing.assert_allclose([*classifier.classify(LONG).scores.values()], expected, atol=1e-5)


def test_a_missing_head_is_named_with_those_there_are(mlm, classifier, vocab):
  with pytest.raises(ValueError, match=r'needs a model with a classification head; .* mlm, nsp'):
    mlm.classify('a')
  with pytest.raises(ValueError, match='mlm head; this one has the heads classification'):
    classifier.score('a')
  with pytest.raises(ValueError, match='the bare encoder'):
    Predictor(*model(vocab)).tag('a')
  causal = Predictor(*model(vocab, 'mlm', causal=True))
  with pytest.raises(ValueError, match='this one is causal'):
    causal.fill_mask('[MASK]')


@pytest.mark.e2e
def test_problem_types_decide_what_scores_are(vocab):
  parts = model(vocab, 'classification', labels=3)
  plain, several, number = (
    Predictor(*parts, problem_type=kind, batch_size=8).classify('the name')
    for kind in ('', 'multi_label_classification', 'regression')
  )
  logits = np.array([*number.scores.values()])
  assert number.labels == [] and list(plain.scores) == ['LABEL_0', 'LABEL_1', 'LABEL_2']
  np.testing.assert_allclose([*several.scores.values()], 1 / (1 + np.exp(-logits)), rtol=1e-5)
  assert several.labels == [f'LABEL_{i}' for i in np.flatnonzero(logits > 0)]
  weights = np.exp(logits)
  np.testing.assert_allclose([*plain.scores.values()], weights / weights.sum(), rtol=1e-5)
  assert plain.labels == [f'LABEL_{logits.argmax()}']
  one = model(vocab, 'classification', labels=1)
  number = Predictor(*one, problem_type='regression').classify('the name').scores['LABEL_0']
  score = Predictor(*one).classify('the name').scores['LABEL_0']  # as transformers' pipeline
  assert score == pytest.approx(1 / (1 + np.exp(-number)), rel=1e-5) != 1.0


def test_labels_of_a_directory_are_used(tmp_path, vocab):
  bert, params, tokenizer = model(vocab, 'classification', labels=2)
  save_model(tmp_path / 'm', bert, params, tokenizer, labels=['bad', 'good'])
  assert set(Predictor.from_dir(tmp_path / 'm').classify('the name').scores) == {'bad', 'good'}
  with pytest.raises(ValueError, match="has 2 labels, got the names \\['one'\\]"):
    Predictor(bert, params, tokenizer, labels=['one'])


def test_numbers_out_of_range_are_refused(mlm, vocab):
  spans = Predictor(*model(vocab, 'span'))
  for call, words in (
    (lambda: mlm.fill_mask('[MASK]', top_k=0), 'top_k must be in 1'),
    (lambda: mlm.correct('the name', ratio=float('nan')), 'ratio must be above 0, got nan'),
    (lambda: mlm.nearest('a', ['b', 'c'], top_k=-1), 'top_k must be at least 1, got -1'),
    (lambda: mlm.summarise('A name.', sentences=0), 'sentences must be at least 1, got 0'),
    (lambda: spans.answer('a', 'b', max_answer=0), 'top_k and max_answer must be at least 1'),
    (lambda: mlm.next_sentence(['a', 'b'], ['c']), r'must be as many, got \[2, 1\]'),
  ):
    with pytest.raises(ValueError, match=words):
      call()


def test_choices_are_scored_together(vocab):
  predictor = Predictor(*model(vocab, 'choice'), batch_size=4)
  endings = [['the end', 'a name', 'None'], ['one', 'two']]
  found = predictor.choose(['first', 'second'], endings)
  assert [len(item.probabilities) for item in found] == [3, 2]
  for item, options in zip(found, endings, strict=True):
    assert item.text == options[item.number] == options[np.argmax(item.probabilities)]
    assert sum(item.probabilities) == pytest.approx(1)
  batch = predictor.tokenizer(['second'] * 2, endings[1])
  logits = applied(predictor.config, ('choice',))(predictor.runner.params, batch)['choice_logits']
  np.testing.assert_allclose(found[1].probabilities, jax.nn.softmax(logits), atol=1e-5)
  with pytest.raises(ValueError, match='question 1 has no endings'):
    predictor.choose(['a', 'b'], [['c'], []])


def test_one_text_among_lists_is_refused_not_read_as_letters(vocab):
  predictor = Predictor(*model(vocab, 'classification', labels=2), batch_size=4)
  assert predictor.classify('the', 'name').scores == predictor.classify(['the'], ['name'])[0].scores
  for call in (
    lambda: predictor.classify(['the', 'a'], 'ab'), lambda: predictor.classify('the', ['a']),
    lambda: predictor.nearest('the', corpus='a file'), lambda: predictor.index('a file'),
  ):  # fmt: skip
    with pytest.raises(ValueError, match='one text'):
      call()
  choosing = Predictor(*model(vocab, 'choice'), batch_size=4)
  with pytest.raises(ValueError, match='one text'):
    choosing.choose('the', 'ab')


@pytest.mark.e2e
def test_embeddings_pool_as_they_say(vocab):
  predictor = Predictor(*model(vocab), batch_size=4)
  apply = applied(predictor.config, capture=('hidden',))
  out = apply(predictor.runner.params, predictor.tokenizer(TEXTS[:1]))
  layers = [np.asarray(layer[0]) for layer in out['all_hidden']]
  expected = {
    'cls': layers[-1][0], 'mean': layers[-1].mean(0), 'last': layers[-1][-1],
    'last_four': np.concatenate([layer.mean(0) for layer in layers[-4:]]),
  }  # fmt: skip
  for pooling, vector in expected.items():
    found = predictor.embed(TEXTS, pooling=pooling, normalise=False)
    np.testing.assert_allclose(found[0], vector, atol=1e-5)
    unit = predictor.embed(TEXTS[0], pooling=pooling)
    np.testing.assert_allclose(unit, vector / np.linalg.norm(vector), atol=1e-5)
  with pytest.raises(ValueError, match=r"pooling must be one of .* got 'max'"):
    predictor.embed(TEXTS, pooling='max')
