"""Contrastive objectives: sentence embeddings from pairs, hard negatives and scored pairs.

An example has R texts in consecutive batch rows: anchor, positive and hard negatives, or the two
texts of a scored pair. Only the cosines of the vectors couple rows, so microbatches that are
encoded separately have the gradient of the complete batch (`Objective.coupled`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bertjax.model.heads import Bert, init_params
from bertjax.model.similarity import cosines, pool, unit
from bertjax.objectives import Objective
from bertjax.objectives.labels import NEVER
from bertjax.objectives.mlm import cross_entropy

ABSENT = -1  # the number of a text that fills up a short list of negatives


def info_nce(
  vectors: jax.Array, texts: jax.Array, weights: jax.Array, *, temperature: float = 0.05,
  symmetric: bool = False,
) -> jax.Array:  # fmt: skip
  """InfoNCE with in-batch negatives (van den Oord et al. 2018) in nats, float32 [B].

  The candidates of an anchor are all positives and hard negatives of the global batch. Known
  positives are no negatives: candidates with the text of the anchor or of its positive, and the
  positives of an equal anchor, are masked.

  >>> import jax.numpy as jnp
  >>> vectors = jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])  # [B=2, R=2, D=2]
  >>> texts = jnp.array([[0, 1], [2, 3]])
  >>> info_nce(vectors, texts, jnp.ones(2), temperature=1.0).round(4)  # log(1 + 1 / e)
  Array([0.3133, 0.3133], dtype=float32)

  Args:
    vectors: [B, R, D] of any length: anchor, positive, hard negatives.
    texts: int32 [B, R], equal numbers for equal texts; `ABSENT` is no candidate.
    weights: [B]; an example of weight 0 has no candidates.
    temperature: divides the cosines; the inverse of sentence-transformers' `scale`.
    symmetric: the mean of this loss and that of finding the anchor of each positive.
  """
  (count, rows, width), vectors = vectors.shape, unit(vectors)
  per = rows - 1  # candidates of an example, the first one its positive
  scores = cosines(vectors[:, 0], vectors[:, 1:].reshape(-1, width)) / temperature
  anchors, positives, candidates = texts[:, :1], texts[:, 1:2], texts[:, 1:].ravel()
  number = jnp.arange(count * per)
  known = (candidates == anchors) | (candidates == positives)
  known |= (number % per == 0) & (anchors[number // per, 0] == anchors)
  absent = (candidates == ABSENT) | (weights[number // per] == 0)
  labels = jnp.arange(count)
  losses = _loss(scores, known | absent, labels * per)
  if not symmetric:
    return losses
  back = known[:, ::per].T | (weights == 0)
  return (losses + _loss(scores[:, ::per].T, back, labels)) / 2


def _loss(scores, masked, labels):
  masked &= jnp.arange(scores.shape[1]) != labels[:, None]
  return cross_entropy(jnp.where(masked, NEVER, scores), labels)


def cosine_regression(vectors: jax.Array, scores: jax.Array) -> jax.Array:
  """Squared errors [B] of the cosines of pairs [B, 2, D] as predictions of scores [B]."""
  return jnp.square(pair_cosines(vectors) - scores)


def pair_cosines(vectors: jax.Array) -> jax.Array:
  """The cosines [B] of pairs [B, 2, D]."""
  vectors = unit(vectors)
  return (vectors[:, 0] * vectors[:, 1]).sum(-1)


def couple(
  vectors: jax.Array, batch: dict, *, losses: Callable, rows: int, widths: tuple[int, ...] = ()
) -> tuple[dict, dict]:
  """({'task': weighted sum}, {}) of the vectors [B * R, D] of a batch.

  Args:
    vectors: float32.
    batch: 'labels' and 'example_weights' [B * R].
    losses: (vectors [B, R, D], labels [B, R], weights [B]) -> losses [B].
    rows: R.
    widths: first components that are trained as vectors too, beside all D of them; their losses
      are added (Kusupati et al. 2022, Matryoshka).
  """
  vectors = vectors.reshape(-1, rows, vectors.shape[-1])
  labels, weights = (batch[k].reshape(-1, rows) for k in ('labels', 'example_weights'))
  each = [losses(vectors[..., :n], labels, weights[:, 0]) for n in (vectors.shape[-1], *widths)]
  return {'task': (sum(each) * weights[:, 0]).sum()}, {}


def encoder_of(model: Bert, pooling: str) -> Callable:
  """Returns (params, batch, rng) -> the pooled vectors [rows, D] of a model."""

  def encode(params, batch, rng):
    rngs = None if rng is None else {'dropout': rng}
    out: Any = model.apply({'params': params}, batch, train=rng is not None, rngs=rngs)
    return pool(out, batch, pooling)

  return encode


def contrastive(
  model: Bert, *, rows: int = 2, pooling: str = 'mean', temperature: float = 0.05,
  symmetric: bool = False, widths: tuple[int, ...] = (),
) -> Objective:  # fmt: skip
  """The objective of sentence embeddings from pairs and hard negatives, see `info_nce`.

  Args:
    model: a `Bert` without heads.
    rows: R, texts of an example.
    pooling: see `model.similarity.pool`.
    temperature: see `info_nce`.
    symmetric: see `info_nce`.
    widths: see `couple`.

  Example:
    >>> import bertjax, jax
    >>> model = bertjax.Bert(bertjax.bert_tiny(vocab_size=100), heads=(), pooler=False)
    >>> sorted(bertjax.objectives.contrastive.contrastive(model).init(jax.random.key(0)))
    ['encoder']
  """
  losses = functools.partial(info_nce, temperature=temperature, symmetric=symmetric)
  return make_objective(model, pooling, losses, rows, widths)


def make_objective(
  model: Bert, pooling: str, losses: Callable, rows: int, widths: tuple[int, ...] = ()
) -> Objective:
  """The objective of losses as `couple` takes them."""
  parts = (
    encoder_of(model, pooling), functools.partial(couple, losses=losses, rows=rows, widths=widths)
  )  # fmt: skip

  def loss(params, batch, rng):
    return parts[1](parts[0](params, batch, rng), batch)

  def weights(batch):
    return {'task': batch['example_weights'].reshape(-1, rows)[:, 0].sum()}

  return Objective(functools.partial(init_params, model), loss, weights, coupled=parts)
