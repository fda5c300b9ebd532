"""Pre-training losses as sums and weights, never as means (Devlin et al. 2018, appendix A.2).

`loss_weights(batch)` gives each term's total weight from the batch alone; `loss_fn` gives each
term's weighted sum. Whoever trains divides the one by the other after adding both over all
microbatches and devices, so the loss is the same number however the batch is cut up. Google's code
divides by `weight + 1e-5` for each core and averages the cores' means instead.
"""

import functools

import jax
import jax.numpy as jnp

Sums = dict[str, jax.Array]


@jax.custom_vjp
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Negative log likelihood in nats: logits [..., V] (any dtype) and labels [...] to [...].

  The gradient is formed from the logits in one pass: no second [..., V] array is kept for it, and
  nothing is scattered.
  """
  return _cross_entropy(logits, labels)[0]


def _cross_entropy(logits, labels):
  total = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
  return total - _chosen(logits, labels), (logits, labels, total)


def _cross_entropy_gradient(saved, cotangent):
  logits, labels, total = saved
  probs = jnp.exp(logits.astype(jnp.float32) - total[..., None])
  one_hot = jnp.arange(logits.shape[-1]) == labels[..., None]
  return ((probs - one_hot) * cotangent[..., None]).astype(logits.dtype), None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradient)


def _chosen(logits, labels):
  """The logits [...] of the labels."""
  return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0].astype(jnp.float32)


def _is_best(logits, labels):
  """Whether the label's logit is the largest; `argmax` is slow where V is long, and this is not."""
  return _chosen(logits, labels) >= logits.max(-1)


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
    metrics['mlm_accuracy'] = (_is_best(out['mlm_logits'], ids) * weights).sum()
  if 'nsp' in terms:
    labels, weights = batch['next_sentence_labels'], _nsp_weights(batch)
    losses['nsp'] = (cross_entropy(out['nsp_logits'], labels) * weights).sum()
    metrics['nsp_accuracy'] = (_is_best(out['nsp_logits'], labels) * weights).sum()
  return losses, metrics


def pretraining_loss(model):
  """Returns `loss_fn(params, batch, rng)` and `loss_weights(batch)` for `training.loop`; their
  terms are the model's heads for pre-training. rng=None runs without dropout."""
  terms = tuple(head for head in model.heads if head in ('mlm', 'nsp'))

  def loss_fn(params, batch, rng):
    rngs = None if rng is None else {'dropout': rng}
    out = model.apply({'params': params}, batch, train=rng is not None, rngs=rngs)
    return pretraining_sums(out, batch, terms)

  return loss_fn, functools.partial(pretraining_weights, terms=terms)
