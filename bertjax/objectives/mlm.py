"""Pre-training objectives: masked LM, next sentence, sentence order, next token (paper, app. A.2).

Google's code divides by `weight + 1e-5` on each core and averages the cores' means; here sums and
weights are added over the global batch before the division.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from bertjax.model.heads import Bert, init_params
from bertjax.objectives import Objective

Sums = dict[str, jax.Array]


@jax.custom_vjp
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Negative log likelihood in nats: logits [..., V] (any dtype) and labels [...] to [...].

  The gradient is computed from the logits in one pass, without a second [..., V] array and without
  a scatter. At 640 x 30,522 logits it needs half the temporary memory of
  `optax.losses.softmax_cross_entropy_with_integer_labels`.
  """
  return _cross_entropy(logits, labels)[0]


def _cross_entropy(logits, labels):
  total = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
  return total - _label_logits(logits, labels), (logits, labels, total)


def _cross_entropy_gradient(saved, cotangent):
  logits, labels, total = saved
  probs = jnp.exp(logits.astype(jnp.float32) - total[..., None])
  one_hot = jnp.arange(logits.shape[-1]) == labels[..., None]
  return ((probs - one_hot) * cotangent[..., None]).astype(logits.dtype), None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradient)


def soft_cross_entropy(logits: jax.Array, targets: jax.Array, temperature: float) -> jax.Array:
  """temperature^2 * KL(softmax(targets / t) || softmax(logits / t)): [..., C] to [...], float32."""
  ours, theirs = (
    jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits, targets)
  )
  return temperature**2 * (jnp.exp(theirs) * (theirs - ours)).sum(-1)


def _label_logits(logits, labels):
  """The logits [...] of the labels."""
  return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0].astype(jnp.float32)


def _is_best(logits, labels):
  """Whether the label's logit is the largest; faster than `argmax` over a large vocabulary."""
  return _label_logits(logits, labels) >= logits.max(-1)


def pretraining(model: Bert) -> Objective:
  """The objective of a model's pre-training heads: 'mlm', 'nsp' or both.

  'mlm' predicts `masked_lm_ids` [B, P] at `masked_lm_positions`, weighted by `masked_lm_weights`:
  masked tokens, or every next token of a causal model. 'nsp' predicts `next_sentence_labels` [B] or
  [B, S] (next sentence or sentence order), weighted by `example_weights`.

  Example:
    >>> import jax
    >>> from bertjax import Bert, EncoderConfig
    >>> from bertjax.objectives import mlm
    >>> config = EncoderConfig(vocab_size=50, hidden_size=8, num_layers=1, num_heads=2, mlp_size=16)
    >>> sorted(mlm.pretraining(Bert(config)).init(jax.random.key(0)))
    ['encoder', 'mlm', 'nsp', 'pooler']
  """
  terms = tuple(head for head in model.heads if head in ('mlm', 'nsp'))

  def loss(params, batch, rng):
    rngs = None if rng is None else {'dropout': rng}
    out: Any = model.apply({'params': params}, batch, train=rng is not None, rngs=rngs)
    return pretraining_sums(out, batch, terms)

  weights = functools.partial(pretraining_weights, terms=terms)
  return Objective(functools.partial(init_params, model), loss, weights)


def pretraining_sums(
  out: dict, batch: dict, terms: tuple[str, ...] = ('mlm', 'nsp')
) -> tuple[Sums, Sums]:
  """Loss sums in nats and metric sums of a batch.

  Args:
    out: what `Bert` returned: 'mlm_logits' [B, P, V], 'nsp_logits' [B, 2] or [B, S, 2].
    batch: 'masked_lm_ids' and 'masked_lm_weights' [B, P]; 'next_sentence_labels' [B] or [B, S].
    terms: terms of the total loss.

  Returns:
    ({term: weighted sum of negative log likelihoods}, {metric: sum}); 'mlm_accuracy' and
    'nsp_accuracy' are weighted counts of correct predictions, accuracies once divided.
  """
  losses, metrics = {}, {}
  for term in terms:
    logits, (labels, weights) = out[f'{term}_logits'], _labels(batch, term)
    losses[term] = (cross_entropy(logits, labels) * weights).sum()
    metrics[f'{term}_accuracy'] = (_is_best(logits, labels) * weights).sum()
  return losses, metrics


def pretraining_weights(batch: dict, terms: tuple[str, ...] = ('mlm', 'nsp')) -> Sums:
  """Total weight of each term: masked tokens for 'mlm', sentence pairs for 'nsp'."""
  return {term: _labels(batch, term)[1].sum() for term in terms}


def _labels(batch: dict, term: str) -> tuple[jax.Array, jax.Array]:
  """The labels of a term and how much each counts."""
  if term == 'mlm':
    return batch['masked_lm_ids'], batch['masked_lm_weights']
  labels = batch['next_sentence_labels']
  return labels, batch.get('example_weights', jnp.ones(labels.shape, jnp.float32))


def token_weights(batch: dict) -> jax.Array:
  """[B, L]: 1 for the tokens of a batch, 0 for padding; `example_weights` [B] or [B, S] of their
  sequences where there are any."""
  segments = batch['segment_ids'] if 'segment_ids' in batch else jnp.ones_like(batch['input_ids'])
  real = (segments > 0).astype(jnp.float32)
  if 'example_weights' not in batch:
    return real
  weights = batch['example_weights'].reshape(len(segments), -1)
  return jnp.take_along_axis(weights, jnp.maximum(segments - 1, 0), 1) * real


def add_perplexity(scores: dict[str, float]) -> dict[str, float]:
  """The scores of an evaluation and 'mlm_perplexity', exp of the masked-LM loss if they have it."""
  if 'mlm_loss' not in scores:
    return scores
  return scores | {'mlm_perplexity': math.exp(min(scores['mlm_loss'], 80.0))}
