"""Kinds of labels of sentence embeddings: the output is a vector for each text, without a head.

Trained are `Positives` (contrastive) and `Similarity` (scored pairs); evaluated are `Similarity`
and `Retrieval`. An example has `rows` texts, one batch row each.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from bertjax.model import similarity
from bertjax.objectives import contrastive
from bertjax.objectives.labels import Label, Regression

DEPTH = 100  # documents of a ranking


@dataclasses.dataclass(frozen=True)
class Embedding(Label):
  """Base of the kinds whose output is a vector.

  Attributes:
    pooling: of token states, see `model.similarity.pool`.
    prompts: {'query': text, 'document': text} in front of the texts.
    widths: of Matryoshka vectors, see `contrastive.couple`.
  """

  rows: int = 2  # type: ignore[misc]
  pooling: str = 'mean'
  prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  widths: tuple[int, ...] = ()
  head: ClassVar[str] = ''
  problem_type: ClassVar[str] = ''

  def sentence(self, max_length):
    named = {name: text for name, text in self.prompts.items() if text}
    return {'pooling': self.pooling, 'prompts': named, 'max_length': max_length}

  def row_losses(self, vectors, labels, weights):
    """Losses [B] of vectors [B, R, D], from labels [B, R] and weights [B]."""
    raise NotImplementedError

  def make_loss(self, model, class_weights=()):
    if class_weights:
      raise ValueError(f'class_weights are for classes, not for embeddings; got {class_weights}.')
    large = [width for width in self.widths if not 0 < width < model.config.hidden_size]
    if large:
      raise ValueError(
        f'task.widths={large[0]} must be above 0 and below {model.config.hidden_size}, the width '
        'of the vectors, which is trained in any case.'
      )
    objective = self._objective(model)
    return objective.loss, objective.weights

  def make_coupled(self, model):
    return self._objective(model).coupled

  def _objective(self, model):
    return contrastive.make_objective(model, self.pooling, self.row_losses, self.rows, self.widths)

  def select(self, out, batch):
    return similarity.unit(similarity.pool(out, batch, self.pooling))

  def shorter(self, logits):
    return {width: np.asarray(similarity.unit(logits[:, :width])) for width in self.widths}

  def number(self, labels: Sequence, texts: Sequence[str]) -> np.ndarray:
    """The column 'labels' [N * R] of examples with these labels [N] and texts [N * R]."""
    return np.repeat(self.column(labels), self.rows)

  def confidence(self, predictions, logits):
    return None


@dataclasses.dataclass(frozen=True)
class Positives(Embedding):
  """Anchor, positive and hard negatives. Label: the number of negatives of the example; labels
  [B * R] are numbers of texts, equal for equal texts.

  Attributes:
    temperature: see `contrastive.info_nce`.
    symmetric: likewise.
  """

  temperature: float = 0.05
  symmetric: bool = False

  def row_losses(self, vectors, labels, weights):
    return contrastive.info_nce(
      vectors, labels, weights, temperature=self.temperature, symmetric=self.symmetric
    )

  def number(self, labels, texts):
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return np.array([numbers[text] if text else contrastive.ABSENT for text in texts], np.int32)

  def counted(self, label):
    return [f'{label} hard negatives']

  def check_batch_size(self, batch_size):
    if batch_size < 2 and self.rows < 3:
      raise ValueError(
        f'batch_size={batch_size} leaves no negatives, which are the other texts of a batch; use '
        'at least 2, or name columns of hard negatives (--config.task.negatives).'
      )


@dataclasses.dataclass(frozen=True)
class Similarity(Embedding, Regression):
  """A scored pair of texts. Label: its score; labels [2 * B] as cosines.

  Attributes:
    max_score: the score of a cosine of 1; scores may be from its negative to it.
  """

  metrics: tuple[str, ...] = ('spearman', 'pearson')
  max_score: float = 1.0
  unit: str = 'squared error'  # type: ignore[misc]

  def row_losses(self, vectors, labels, weights):
    return contrastive.cosine_regression(vectors, labels[:, 0])

  def column(self, labels):
    return super().column(labels) / np.float32(self.max_score)

  def parse(self, value):
    score, error = super().parse(value)
    if not error and abs(score) > self.max_score:
      score, error = None, (
        f'the score {score:g} is outside {-self.max_score:g}..{self.max_score:g}; set '
        '--config.task.max_score to the largest one'
      )  # fmt: skip
    return score, error

  def decode(self, items, encoded, logits, threshold=0.0):
    pairs = np.asarray(logits).reshape(len(items), 2, -1)
    return (pairs[:, 0] * pairs[:, 1]).sum(-1)

  def collapsed(self, predictions):
    return _alike(predictions)


@dataclasses.dataclass(frozen=True)
class Retrieval(Embedding):
  """Queries and documents, one text each. Label: of a query {id of a document: relevance}, of a
  document {}. A query's prediction is {id: cosine} of the `DEPTH` nearest documents, best first."""

  metrics: tuple[str, ...] = ('ndcg@10', 'mrr@10', 'recall@10', 'recall@100', 'map@100')
  rows: int = 1  # type: ignore[misc]
  unit: str = ''  # type: ignore[misc]

  def row_losses(self, vectors, labels, weights):
    return 0 * weights  # ranked, not trained

  def column(self, labels):
    return np.zeros(len(labels), np.int32)

  def decode(self, items, encoded, logits, threshold=0.0):
    """Equal cosines are ranked by id, the last one first, as in trec_eval."""
    queries = [i for i, item in enumerate(items) if not item.document]
    documents = [i for i, item in enumerate(items) if item.document]
    documents.sort(key=lambda i: items[i].id, reverse=True)
    scores, nearest = similarity.nearest(logits[queries], logits[documents], DEPTH)
    rankings: list[dict] = [{} for _ in items]
    for query, cosines, places in zip(queries, scores.tolist(), nearest.tolist(), strict=True):
      names = [items[documents[place]].id for place in places]
      rankings[query] = dict(zip(names, cosines, strict=True))
    return rankings

  def text(self, prediction):
    return next(iter(prediction), '')

  def collapsed(self, predictions):
    cosines = [cosine for ranking in predictions for cosine in ranking.values()]
    return _alike(cosines) or super().collapsed([ranking for ranking in predictions if ranking])

  def compare(self, texts, label, prediction):
    gold, best = ', '.join(label), self.text(prediction)
    return gold, gold if label.get(best, 0) > 0 else best

  def counted(self, label):
    return ['query' if label else 'document']


def _alike(cosines: Sequence[float]) -> str:
  """What is suspicious about cosines of different texts; '' if nothing is."""
  if len(cosines) < 2 or np.ptp(cosines) >= 0.01:
    return ''
  return f'all {len(cosines):,} cosines are {min(cosines):.3f} to {max(cosines):.3f}'
