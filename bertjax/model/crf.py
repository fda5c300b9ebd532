"""A linear-chain conditional random field over tags (Lafferty et al. 2001; Lample et al. 2016).

A sequence of tags scores its logits, plus `transitions[a, b]` for each b that follows an a, plus
`start` of its first and `end` of its last tag. The chain runs only over the positions in
`mask`, however they are scattered: from a word's first token to the next one's.
"""

import functools

import jax
import jax.numpy as jnp

Scores = dict[str, jax.Array]  # of a 'tagging' head: 'transitions' [C, C], 'start' and 'end' [C]


def shapes(num_labels: int) -> dict[str, tuple[int, ...]]:
  """The shapes of the parameters."""
  return {'transitions': (num_labels, num_labels), 'start': (num_labels,), 'end': (num_labels,)}


@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def log_partition(scores: Scores, logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Log of the summed exponents of all sequences' scores, by the forward algorithm.

  Args:
    scores: the parameters; others in the dict are not read.
    logits: [B, L, C], any float.
    mask: bool [B, L], the positions of the chain.

  Returns:
    float32 [B]; 0 for a row without a position.
  """

  def step(alpha, position):
    logit, here, first = position
    onward = jax.nn.logsumexp(alpha[:, None] + scores['transitions'], axis=0)
    return jnp.where(here, jnp.where(first, scores['start'], onward) + logit, alpha), None

  alpha, _ = jax.lax.scan(step, jnp.zeros_like(scores['start']), _positions(logits, mask))
  return jnp.where(mask.any(), jax.nn.logsumexp(alpha + scores['end']), 0.0)


def sequence_score(scores: Scores, logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Scores of the sequences in `labels` int [B, L], whose chain has the positions >= 0: [B]."""
  chosen = labels[..., None] == jnp.arange(logits.shape[-1])
  # The partition of a lattice from which all paths but one are struck is the score of that path.
  return log_partition(scores, jnp.where(chosen, logits.astype(jnp.float32), -1e9), labels >= 0)


def negative_log_likelihood(scores: Scores, logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Nats of the sequences in `labels` int [B, L], -1 = no position of the chain: float32 [B]."""
  # The difference is the same for any constant added at a position, and with this one both are
  # small where the tags are learnt, so that float32 keeps its digits on long rows.
  logits = jax.nn.log_softmax(logits.astype(jnp.float32))
  return log_partition(scores, logits, labels >= 0) - sequence_score(scores, logits, labels)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def viterbi(scores: Scores, logits: jax.Array, mask: jax.Array) -> jax.Array:
  """The best sequences of tags, int32 [B, L], -1 outside of `mask`; for the rest as above."""
  stay = jnp.arange(logits.shape[-1])

  def step(best, position):
    logit, here, first = position
    paths = best[:, None] + scores['transitions']  # [from, to]
    onward = jnp.where(first, scores['start'], paths.max(0)) + logit
    # Outside of the chain each tag points to itself, so that the way back passes through.
    return jnp.where(here, onward, best), jnp.where(here, paths.argmax(0), stay)

  best, pointers = jax.lax.scan(step, jnp.zeros_like(scores['start']), _positions(logits, mask))
  last = (best + scores['end']).argmax()
  _, tags = jax.lax.scan(lambda tag, back: (back[tag], tag), last, pointers, reverse=True)
  return jnp.where(mask, tags, -1).astype(jnp.int32)


def _positions(logits, mask):
  """What a scan over the positions of one row reads: logits, is it in the chain, is it the first"""
  return logits.astype(jnp.float32), mask, mask & (jnp.cumsum(mask) == 1)
