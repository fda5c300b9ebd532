"""Pre-training losses as sums and weights, never as means (Devlin et al. 2018, appendix A.2).

`loss_weights(batch)` gives each term's total weight from the batch alone; `loss_fn` gives each
term's weighted sum. Whoever trains divides the one by the other after adding both over all
microbatches and devices, so the loss is the same number however the batch is cut up. Google's code
divides by `weight + 1e-5` for each core and averages the cores' means instead.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from bertjax.model import crf

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


def task_loss(
  model, kind: str, *, choices: int = 1, span_loss_includes_padding: bool = False,
  class_weights: Sequence[float] = (),
) -> tuple:  # fmt: skip
  """Returns `(loss_fn, loss_weights)` of a task, with the one term 'task', for `training.loop`.

  Args:
    model: `Bert` with the head of the task.
    kind: of label, with `labels` as in contract 1: 'class' [B], 'regression' [B] (squared error),
      'multilabel' [B, C] (mean of C binary cross-entropies), 'tags' [B, L] (each token counts, -1 =
      none; with `config.crf` a sentence's log likelihood, which also counts as many times as it
      has tokens, so that both are nats for a token), 'span' [B, 2] (mean of start and end; [CLS] =
      no answer, -1 = not counted), 'choice' [B] (the rows of a question follow one another). Of
      packed rows [B, S] in the place of [B], but for tags.
    choices: rows of a question.
    span_loss_includes_padding: whether a span's softmax runs over padding too, as in run_squad.py.
    class_weights: [C], how much an example of each class (a token of each tag) counts.

  Raises:
    ValueError: if the model has a CRF and the labels are no tags, or class weights have no meaning.
  """
  if class_weights and (kind not in ('class', 'tags') or model.config.crf):
    raise ValueError(f'class_weights are for classes and tags without a CRF, not for {kind!r}.')
  if model.config.crf and kind != 'tags':
    raise ValueError(f'crf=True is for tags, the labels are of the kind {kind!r}; set crf=False.')
  head = {'tags': 'tagging', 'span': 'span', 'choice': 'choice'}.get(kind, 'classification')

  def weights_of(batch):
    labels, weights = batch['labels'], batch['example_weights']
    if kind == 'tags':
      sequence = jnp.maximum(batch['segment_ids'] - 1, 0)
      weights = jnp.take_along_axis(weights.reshape(len(labels), -1), sequence, 1) * (labels >= 0)
    if kind == 'span':
      weights = weights * (labels[..., 0] >= 0)
    if class_weights:
      weights *= jnp.asarray(class_weights, jnp.float32)[jnp.maximum(labels, 0)]
    return weights.reshape(-1, choices)[:, 0] if kind == 'choice' else weights

  def loss_fn(params, batch, rng):
    rngs = None if rng is None else {'dropout': rng}
    out = model.apply({'params': params}, batch, train=rng is not None, rngs=rngs)
    logits, labels = out[f'{head}_logits'], batch['labels']
    if model.config.crf:
      nats = crf.negative_log_likelihood(params['tagging'], logits, labels)
      return {'task': (nats * batch['example_weights']).sum()}, {}
    if kind == 'regression':
      values = jnp.square(logits[..., 0] - labels)
    elif kind == 'multilabel':
      values = optax.losses.sigmoid_binary_cross_entropy(logits, labels).mean(-1)
    elif kind == 'choice':
      values = cross_entropy(logits.reshape(-1, choices), labels.reshape(-1, choices)[:, 0])
    elif kind == 'span':
      values = _span_losses(logits, batch, span_loss_includes_padding)
    else:
      values = cross_entropy(logits, jnp.maximum(labels, 0))
    return {'task': (values * weights_of(batch)).sum()}, {}

  return loss_fn, lambda batch: {'task': weights_of(batch).sum()}


def _span_losses(logits, batch, over_padding: bool):
  """The mean loss of start and end of each sequence, among its own tokens [B] or [B, S]."""
  labels, segments = batch['labels'], batch['segment_ids']
  pairs = jnp.maximum(labels, 0).reshape(len(labels), -1, 2).swapaxes(1, 2)  # [B, 2, S]
  own = segments[:, None] == jnp.arange(1, pairs.shape[2] + 1)[:, None]  # [B, S, L]
  logits = jnp.where(own[:, None] | over_padding, logits.swapaxes(1, 2)[:, :, None], -1e9)
  return cross_entropy(logits, pairs).mean(1).reshape(labels.shape[:-1])
