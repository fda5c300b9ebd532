"""Contrastive losses and gradients equal sentence-transformers'; microbatches and devices do not
change them; known positives are no negatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bertjax.model.heads import Bert
from bertjax.objectives import contrastive
from bertjax.objectives.contrastive import ABSENT, cosine_regression, info_nce
from tests.model.test_encoder import TINY, dataclasses
from tests.models import steps_of

STILL = dataclasses.replace(TINY, hidden_dropout=0.0, attention_dropout=0.0, vocab_size=96)
B, D = 6, 16


def vectors_of(rows: int) -> np.ndarray:
  return np.random.default_rng(rows).normal(size=(B, rows, D)).astype(np.float32)


def theirs(name: str, vectors: np.ndarray, labels=None, widths=(), **options):
  """The loss and its gradient by sentence-transformers, from vectors [B, R, D]."""
  library = pytest.importorskip('sentence_transformers')
  import torch

  class Table(torch.nn.Module):
    """A model whose texts are rows of a table."""

    def forward(self, features):
      return dict(features, sentence_embedding=features['input_ids'])

    def get_embedding_dimension(self):
      return D

  losses = library.sentence_transformer.losses
  table, leaf = Table(), torch.tensor(vectors, requires_grad=True)
  loss = getattr(losses, name)(table, **options)
  if widths:
    loss = losses.MatryoshkaLoss(table, loss, [D, *widths])
  columns = [{'input_ids': leaf[:, i]} for i in range(vectors.shape[1])]
  value = loss(columns, None if labels is None else torch.tensor(labels))
  value.backward()
  return value.item(), leaf.grad.numpy()


def ours(losses, vectors, labels, widths=()):
  def mean(x):
    batch = {'labels': labels.ravel(), 'example_weights': jnp.ones(labels.size)}
    flat = x.reshape(-1, x.shape[-1])
    sums, _ = contrastive.couple(flat, batch, losses=losses, rows=x.shape[1], widths=widths)
    return sums['task'] / len(x)

  return jax.value_and_grad(mean)(jnp.asarray(vectors))


@pytest.mark.full
@pytest.mark.parametrize('widths', [(), (8, 4)], ids=str)
@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('rows', [2, 3, 5])
def test_info_nce_equals_multiple_negatives_ranking(rows, symmetric, widths):
  vectors = vectors_of(rows)
  options = {'directions': ('query_to_doc', 'doc_to_query'), 'partition_mode': 'per_direction'}
  expected = theirs(
    'MultipleNegativesRankingLoss', vectors, widths=widths, scale=20.0,
    **options if symmetric else {},
  )  # fmt: skip
  losses = functools.partial(info_nce, temperature=0.05, symmetric=symmetric)
  loss, gradient = ours(losses, vectors, np.arange(B * rows).reshape(B, rows), widths)
  assert float(loss) == pytest.approx(expected[0], abs=1e-5)
  np.testing.assert_allclose(gradient, expected[1], atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize('widths', [(), (8, 4)], ids=str)
def test_cosine_regression_equals_cosine_similarity_loss(widths):
  vectors, scores = vectors_of(2), np.linspace(-1, 1, B, dtype=np.float32)
  expected = theirs('CosineSimilarityLoss', vectors, scores, widths)

  def losses(vectors, labels, _):
    return cosine_regression(vectors, labels[:, 0])

  loss, gradient = ours(losses, vectors, np.repeat(scores[:, None], 2, 1), widths)
  assert float(loss) == pytest.approx(expected[0], abs=1e-5)
  np.testing.assert_allclose(gradient, expected[1], atol=1e-5)


def brute_force(vectors, known, absent):
  """Each anchor's loss: a list of candidates less those that are known or absent."""
  unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
  losses = []
  for i in range(len(unit)):
    kept = [
      (j, c) for j in range(len(unit)) for c in range(1, unit.shape[1])
      if (j, c) == (i, 1) or not ((i, j, c) in known or (j, c) in absent)
    ]  # fmt: skip
    scores = np.array([unit[i, 0] @ unit[j, c] for j, c in kept], np.float64) / 0.05
    losses.append(np.log(np.exp(scores).sum()) - scores[kept.index((i, 1))])
  return losses


def test_known_positives_and_absent_texts_are_no_negatives():
  texts = np.array([
    [0, 1, 2],
    [3, 1, 4],  # the positive of example 0 again
    [0, 5, ABSENT],  # the anchor of example 0 with another positive, and one negative less
    [6, 7, 0],  # the anchor of examples 0 and 2 as a hard negative
    [8, 9, 10],
    [8, 9, 10],  # of weight 0: it fills up a batch
  ])  # fmt: skip
  weights, vectors = np.array([1, 1, 1, 1, 1, 0.0]), vectors_of(3)
  known = {(0, 1, 1), (1, 0, 1), (0, 2, 1), (2, 0, 1), (0, 3, 2), (2, 3, 2)}
  absent = {(2, 2), (5, 1), (5, 2)}
  found = info_nce(jnp.asarray(vectors), jnp.asarray(texts), jnp.asarray(weights))
  np.testing.assert_allclose(found[:5], brute_force(vectors, known, absent)[:5], rtol=1e-4)


def test_a_vector_of_zeros_has_a_finite_gradient():
  gradient = jax.grad(lambda v: info_nce(v, jnp.arange(12).reshape(6, 2), jnp.ones(6)).sum())(
    jnp.asarray(vectors_of(2)).at[0].set(0.0)
  )
  assert np.isfinite(gradient).all()


@functools.cache
def train(devices: int, accumulation: int, widths=(8,), steps: int = 3):
  """Losses, and the last parameters, of steps on batches of 16 examples of 3 texts."""
  objective = contrastive.contrastive(
    Bert(STILL, heads=(), pooler=False), rows=3, symmetric=True, widths=widths
  )
  return steps_of(objective, optax.sgd(0.1), map(batch_at, range(steps)), devices, accumulation)


def batch_at(step: int, examples: int = 16, rows: int = 3, length: int = 12) -> dict:
  rng, count = np.random.default_rng(step), examples * rows
  weights = np.repeat(np.arange(examples) < 14, rows)
  return {
    'input_ids': rng.integers(5, 96, (count, length), dtype=np.int32),
    'segment_ids': (np.arange(length) < rng.integers(4, 13, count)[:, None]).astype(np.int32),
    'labels': rng.integers(0, 40, count, dtype=np.int32),  # some texts occur twice
    'example_weights': weights.astype(np.float32),
  }


@pytest.mark.parametrize(
  ('devices', 'accumulation'),
  [
    pytest.param(1, 8, marks=pytest.mark.stack),
    *(pytest.param(*pair, marks=pytest.mark.full) for pair in ((8, 1), (4, 4))),
  ],
)
@pytest.mark.e2e
def test_microbatches_and_devices_give_the_gradient_of_one_batch(devices, accumulation):
  losses, params = train(1, 1)
  other_losses, other = train(devices, accumulation)
  assert losses[-1] < losses[0] and losses[0] != losses[1]
  np.testing.assert_allclose(other_losses, losses, rtol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), other, params)
