"""Pre-training losses as sums and weights, never as means (Devlin et al. 2018, appendix A.2).

`loss_weights(batch)` gives each term's total weight from the batch alone; `loss_fn` gives each
term's weighted sum. Whoever trains divides the one by the other after adding both over all
microbatches and devices, so the loss is the same number however the batch is cut up. Google's code
divides by `weight + 1e-5` for each core and averages the cores' means instead.
"""

import jax
import jax.numpy as jnp
import optax

Sums = dict[str, jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Negative log likelihood in nats: logits [..., V] (any dtype) and labels [...] to [...]."""
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def _nsp_weights(batch):
  labels = batch['next_sentence_labels']
  return batch.get('example_weights', jnp.ones(labels.shape, jnp.float32))


def pretraining_weights(batch: dict, terms: tuple[str, ...] = ('mlm', 'nsp')) -> Sums:
  """Total weight of each term: masked tokens for 'mlm', sentence pairs for 'nsp'."""
  weights = {
    'mlm': lambda: batch['masked_lm_weights'].sum(),
    'nsp': lambda: _nsp_weights(batch).sum(),
  }
  return {term: weights[term]() for term in terms}


def pretraining_sums(out: dict, batch: dict, terms: tuple[str, ...] = ('mlm', 'nsp')):
  """Sums of the losses and of the metrics over a batch.

  Args:
    out: what `Bert` returned: 'mlm_logits' [B, P, V], 'nsp_logits' [B, 2].
    batch: 'masked_lm_ids' and 'masked_lm_weights' [B, P]; 'next_sentence_labels' [B].
    terms: the terms of the total loss.

  Returns:
    ({term: sum of weighted negative log likelihoods in nats}, {metric: sum}); the metrics
    'mlm_accuracy' and 'nsp_accuracy' are weighted counts of right predictions,
    named after what they become when divided.
  """
  losses, metrics = {}, {}
  if 'mlm' in terms:
    ids, weights = batch['masked_lm_ids'], batch['masked_lm_weights']
    losses['mlm'] = (cross_entropy(out['mlm_logits'], ids) * weights).sum()
    metrics['mlm_accuracy'] = ((out['mlm_logits'].argmax(-1) == ids) * weights).sum()
  if 'nsp' in terms:
    labels, weights = batch['next_sentence_labels'], _nsp_weights(batch)
    losses['nsp'] = (cross_entropy(out['nsp_logits'], labels) * weights).sum()
    metrics['nsp_accuracy'] = ((out['nsp_logits'].argmax(-1) == labels) * weights).sum()
  return losses, metrics


def pretraining_loss(model, terms: tuple[str, ...] = ('mlm', 'nsp')):
  """Returns `loss_fn(params, batch, rng)` for `training.loop`; rng=None runs without dropout."""

  def loss_fn(params, batch, rng):
    rngs = None if rng is None else {'dropout': rng}
    out = model.apply({'params': params}, batch, train=rng is not None, rngs=rngs)
    return pretraining_sums(out, batch, terms)

  return loss_fn
