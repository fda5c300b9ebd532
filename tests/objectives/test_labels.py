"""Kinds of labels: losses against NumPy, tables to labels and back, what each kind refuses."""

import types

import numpy as np
import pytest
import scipy.special

from bertjax.data.packing import Places
from bertjax.model.config import HEADS
from bertjax.objectives.labels import Choice, Class, Multilabel, Regression, Span, Tags

KINDS = (Class, Multilabel, Regression, Tags, Span, Choice)


def model_of(**logits):
  """A model that returns these logits."""
  return types.SimpleNamespace(
    config=types.SimpleNamespace(crf=False),
    apply=lambda *_, **__: {f'{head}_logits': value for head, value in logits.items()},
  )


def mean_loss(label, logits, batch, class_weights=()):
  loss_fn, loss_weights = label.make_loss(model_of(**{label.head: logits}), class_weights)
  sums, metrics = loss_fn({}, batch, None)
  assert sums.keys() == loss_weights(batch).keys() == {'task'} and metrics == {}
  return float(sums['task'] / loss_weights(batch)['task'])


def normal(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_has_a_head_of_the_model(kind):
  label = kind()
  assert label.head in HEADS
  assert label.metrics and label.dtype in ('int32', 'float32')


def test_losses_are_means_over_weighted_labels():
  weights = np.array([1, 1, 0], np.float32)
  logits, classes = normal(3, 4), np.array([2, 0, 1])
  expected = -scipy.special.log_softmax(logits, 1)[np.arange(3), classes]
  batch = {'labels': classes, 'example_weights': weights}
  assert mean_loss(Class(), logits, batch) == pytest.approx(expected[:2].mean(), rel=1e-5)

  several = (normal(3, 4) > 0).astype(np.float32)
  expected = np.logaddexp(0, logits) - logits * several
  batch = {'labels': several, 'example_weights': weights}
  assert mean_loss(Multilabel(), logits, batch) == pytest.approx(expected[:2].mean(), rel=1e-5)

  numbers = np.array([0.5, -1, 9], np.float32)
  expected = (logits[:, 0] - numbers) ** 2
  batch = {'labels': numbers, 'example_weights': weights}
  assert mean_loss(Regression(), logits[:, :1], batch) == pytest.approx(
    expected[:2].mean(), rel=1e-5
  )


def test_tags_count_per_token_and_choices_per_example():
  logits, labels = normal(2, 3, 4), np.array([[1, -1, 2], [0, 3, -1]])
  nats = -scipy.special.log_softmax(logits, -1)
  expected = np.mean([nats[0, 0, 1], nats[0, 2, 2], nats[1, 0, 0], nats[1, 1, 3]])
  batch = {'labels': labels, 'example_weights': np.ones(2, np.float32),
           'segment_ids': np.ones((2, 3), np.int32)}  # fmt: skip
  assert mean_loss(Tags(), logits, batch) == pytest.approx(expected, rel=1e-5)

  logits = normal(6)
  expected = -scipy.special.log_softmax(logits.reshape(2, 3), 1)[[0, 1], [2, 0]]
  batch = {'labels': np.repeat([2, 0], 3), 'example_weights': np.ones(6, np.float32)}
  assert mean_loss(Choice(rows=3), logits, batch) == pytest.approx(expected.mean(), rel=1e-5)


def test_spans_rank_padding_only_where_that_is_asked_for():
  logits = normal(1, 4, 2)
  batch = {'labels': np.array([[1, 2]]), 'example_weights': np.ones(1, np.float32),
           'segment_ids': np.array([[1, 1, 1, 0]])}  # fmt: skip
  for label, count in ((Span(), 3), (Span(includes_padding=True), 4)):
    nats = -scipy.special.log_softmax(logits[0, :count], 0)
    expected = (nats[1, 0] + nats[2, 1]) / 2
    assert mean_loss(label, logits, batch) == pytest.approx(expected, rel=1e-5)
    selected = np.asarray(label.select({'span_logits': logits}, batch))
    assert (selected[0, 3] == -1e9).all() == (count == 3)


def test_spans_move_with_their_sequence_into_a_packed_row():
  labels = np.array([[[1, 2], [3, 4]]], np.int32)
  one, two = np.array([0, 0]), np.array([0, 1])
  places = Places(item=two, row=one, slot=two, start=np.array([0, 10]))
  Span().shift(labels, places)
  assert labels.tolist() == [[[1, 2], [13, 14]]]


@pytest.mark.parametrize(
  ('label', 'field', 'parsed', 'written'),
  [
    (Class(('no', 'yes')), ' yes ', 1, 'yes'),
    (Multilabel(('a', 'b')), 'b| a', (1, 0), 'a|b'),
    (Regression(), '2.5', 2.5, '2.5'),
  ],
)
def test_a_field_becomes_a_label_and_a_prediction_is_written_as_one(label, field, parsed, written):
  assert label.parse(field) == (parsed, '')
  assert label.parse(None)[1] and label.parse('x')[1]
  assert label.text(label.references([parsed])[0]) == written
  missing = label.column([None])
  assert np.isnan(missing).all() if label.dtype == 'float32' else (missing == -1).all()


def test_kinds_refuse_what_their_loss_does_not_have():
  for kind in KINDS:
    model = model_of()
    if not kind.takes_class_weights:
      with pytest.raises(ValueError, match=f"not for '{kind.__name__.lower()}'"):
        kind().make_loss(model, (1.0, 2.0))
    model.config.crf = True
    if not kind.takes_crf:
      with pytest.raises(ValueError, match='crf=True is for tags'):
        kind().make_loss(model)


def test_class_weights_are_torch_s():
  torch = pytest.importorskip('torch')
  logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
  labels = np.array([0, 1, 2, 2, 2, 1])

  class Model:
    config = types.SimpleNamespace(crf=False)

    @staticmethod
    def apply(*_, **__):
      return {'classification_logits': logits}

  loss_fn, weights_of = Class().make_loss(Model, (1.0, 3.0, 0.5))
  batch = {'labels': labels, 'example_weights': np.ones(6, np.float32)}
  ours = loss_fn({}, batch, None)[0]['task'] / weights_of(batch)['task']
  theirs = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]))
  assert float(ours) == pytest.approx(theirs(torch.tensor(logits), torch.tensor(labels)).item())


def test_a_question_without_the_position_of_its_answer_is_not_in_the_loss():
  logits = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)

  class Model:
    config = types.SimpleNamespace(crf=False)

    @staticmethod
    def apply(*_, **__):
      return {'span_logits': logits}

  loss_fn, weights_of = Span().make_loss(Model)
  labels = np.array([[1, 2], [-1, -1], [0, 0]])
  batch = {'labels': labels, 'example_weights': np.ones(3, np.float32),
           'segment_ids': np.ones((3, 5), np.int32)}  # fmt: skip
  chosen = scipy.special.log_softmax(logits, 1)
  expected = -(chosen[0, 1, 0] + chosen[0, 2, 1] + chosen[2, 0].sum()) / 2
  assert float(loss_fn({}, batch, None)[0]['task']) == pytest.approx(expected, rel=1e-5)
  assert float(weights_of(batch)['task']) == 2
