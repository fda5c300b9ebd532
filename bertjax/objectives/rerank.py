"""Kinds of labels of rerankers: a cross-encoder reads query and document and gives one score.

Trained are `Relevance` (labelled pairs) and the lists of a query's candidates: `Candidates` (binary
cross-entropy), `Listwise` (softmax) and `MarginMse` (a teacher's scores). Evaluated is `Ranking`,
and `Relevance` by correlation. A candidate is a batch row, those of a list follow one another.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.objectives.embeddings import Retrieval
from bertjax.objectives.labels import (
  NEVER,
  Label,
  Regression,
  binary_losses,
  soft_binary_losses,
)
from bertjax.objectives.mlm import cross_entropy, soft_cross_entropy


def listwise_losses(scores: jax.Array, absent: jax.Array) -> jax.Array:
  """Cross-entropies [B], in nats, of the softmax over each query's candidates.

  >>> import jax.numpy as jnp
  >>> scores, absent = jnp.zeros((1, 4)), jnp.array([[False, False, True, True]])
  >>> listwise_losses(scores, absent).round(4)  # log(2)
  Array([0.6931], dtype=float32)

  Args:
    scores: [B, R], the first one is the positive's.
    absent: bool [B, R], no candidates.
  """
  return cross_entropy(jnp.where(absent, NEVER, scores), jnp.zeros(len(scores), jnp.int32))


def margin_losses(scores: jax.Array, targets: jax.Array) -> jax.Array:
  """Squared errors [B, R - 1] of how far the first score is above each other one (Hofstätter et
  al. 2020); scores and targets are [B, R]."""
  return jnp.square((scores[:, :1] - scores[:, 1:]) - (targets[:, :1] - targets[:, 1:]))


@dataclasses.dataclass(frozen=True)
class Relevance(Regression):
  """Labelled pairs. Label: how relevant the document is, in [0, 1]; labels [B], logits [B, 1]."""

  problem_type = ''
  unit = 'nats'

  def sentence(self, max_length):
    return {'activation': 'sigmoid'}

  def losses(self, logits, batch):
    return binary_losses(logits[..., 0], batch['labels'])

  def soft_losses(self, logits, targets, batch, temperature):
    return soft_binary_losses(logits[..., 0], targets[..., 0], temperature)

  def parse(self, value):
    label, error = super().parse(value)
    if not error and not 0 <= label <= 1:
      label, error = None, f'the label {label:g} is outside 0..1, irrelevant to relevant'
    return label, error


@dataclasses.dataclass(frozen=True)
class Candidates(Label):
  """A query's positive and hard negatives, each learnt by binary cross-entropy.

  Label: a target for each of them, 1 for the positive and 0 for the negatives, NaN for what is no
  candidate; labels [B * R], NaN where a list is shorter than R.
  """

  rows: int = 2  # type: ignore[misc]
  dtype = 'float32'
  numeric = True
  activation: ClassVar[str] = 'sigmoid'

  def sentence(self, max_length):
    return {'activation': self.activation}

  def targets(self, values: Sequence, texts: Sequence[str]) -> tuple[tuple | None, str]:
    """(the label, '') or (None, why there is none) of a record.

    Args:
      values: of its columns of labels.
      texts: query, positive and negatives; negatives with the text of the positive are skipped.
    """
    _, positive, *negatives = texts
    if not set(negatives) - {positive}:
      return None, 'all negatives are the positive'
    return (1.0, *(math.nan if text == positive else 0.0 for text in negatives)), ''

  def row_labels(self, label: Any, count: int) -> Sequence[float]:
    """The labels of the rows of an example with so many documents."""
    return [*label, *[math.nan] * (self.rows - count)]

  def _lists(self, logits, batch):
    """Scores, labels without NaN, and which are absent, [B, R] each."""
    labels = batch['labels'].reshape(-1, self.rows)
    absent = jnp.isnan(labels)
    return logits.reshape(-1, self.rows), jnp.where(absent, 0, labels), absent

  def losses(self, logits, batch):
    scores, labels, _ = self._lists(logits, batch)
    return binary_losses(scores, labels)

  def soft_losses(self, logits, targets, batch, temperature):
    scores, *_ = self._lists(logits, batch)
    return soft_binary_losses(scores, targets.reshape(scores.shape), temperature)

  def weights(self, batch, class_weights=()):
    present = ~jnp.isnan(batch['labels'])
    return (batch['example_weights'] * present).reshape(-1, self.rows)

  def describe(self, labels):
    values = [value for label in labels for value in label if value == value]
    if not values:
      return []
    return [f'{len(values):,} candidates from {min(values):g} to {max(values):g}']


@dataclasses.dataclass(frozen=True)
class Listwise(Candidates):
  """The same lists, learnt by the softmax over each one; the loss is the mean over queries."""

  activation: ClassVar[str] = 'identity'

  def losses(self, logits, batch):
    scores, _, absent = self._lists(logits, batch)
    return listwise_losses(scores, absent)

  def soft_losses(self, logits, targets, batch, temperature):
    scores, _, absent = self._lists(logits, batch)
    ours, theirs = (jnp.where(absent, NEVER, x.reshape(scores.shape)) for x in (scores, targets))
    return soft_cross_entropy(ours, theirs, temperature)

  def weights(self, batch, class_weights=()):
    return batch['example_weights'].reshape(-1, self.rows)[:, 0]


@dataclasses.dataclass(frozen=True)
class MarginMse(Candidates):
  """Lists with a teacher's score of each candidate, learnt by the squared error of its margins; the
  loss is the mean over negatives."""

  unit = 'squared error'
  activation: ClassVar[str] = 'identity'

  def targets(self, values, texts):
    lists = [value if isinstance(value, list) else [value] for value in values]
    scores = list(itertools.chain.from_iterable(lists))
    numbers = [Regression().parse(score)[0] for score in scores]
    if None in numbers:
      wrong = scores[numbers.index(None)]
      return None, f"the teacher's score must be a finite number, got {wrong!r}"
    if len(numbers) != len(texts) - 1:
      return None, (
        f'the positive and {len(texts) - 2} negatives need a score of the teacher each, got '
        f'{len(numbers)}'
      )
    return tuple(numbers), ''

  def losses(self, logits, batch):
    scores, labels, _ = self._lists(logits, batch)
    return margin_losses(scores, labels)

  def soft_losses(self, logits, targets, batch, temperature):
    scores, *_ = self._lists(logits, batch)
    return margin_losses(scores, targets.reshape(scores.shape))

  def weights(self, batch, class_weights=()):
    return super().weights(batch)[:, 1:]


@dataclasses.dataclass(frozen=True)
class Ranking(Label):
  """Queries with their candidates, a row each. Label: {id of a document: relevance}, the candidates
  in their order, then relevant documents that are none. Prediction: {id: score}, best first."""

  metrics: tuple[str, ...] = Retrieval.metrics
  dtype = 'float32'
  unit = ''

  def row_labels(self, label: Mapping, count: int) -> Sequence[float]:
    return [0.0] * count

  def losses(self, logits, batch):
    return jnp.zeros_like(batch['labels'])  # ranked, not trained

  def decode(self, items, encoded, logits, threshold=0.0):
    """Equal scores are ranked by id, the last one first, as in trec_eval."""
    ends = np.cumsum([len(item.texts) - 1 for item in items])
    parts = np.split(np.asarray(logits).ravel(), ends[:-1])
    rankings = []
    for item, scores in zip(items, parts, strict=True):
      pairs = sorted(zip(scores.tolist(), item.label, strict=False), reverse=True)
      rankings.append({name: score for score, name in pairs})
    return rankings

  def text(self, prediction):
    return next(iter(prediction), '')

  def collapsed(self, predictions):
    scores = {score for ranking in predictions for score in ranking.values()}
    count = sum(map(len, predictions))
    return f'all {count:,} candidates have the same score' if count > 1 == len(scores) else ''

  def compare(self, texts, label, prediction):
    documents = dict(zip(label, texts[1:], strict=False))
    first = self.text(prediction)
    best = max(documents, key=lambda name: label[name], default='')
    shown = [documents.get(name, '(no candidate)') for name in (best, first)]
    return shown[0], shown[0] if label.get(first, 0) > 0 else shown[1]

  def counted(self, label):
    return ['query']

  def confidence(self, predictions, logits):
    return None

  def readable(self, texts):
    return texts[:1]
