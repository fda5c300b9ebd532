"""A linear-chain conditional random field over tags (Lafferty et al. 2001; Lample et al. 2016).

The score of a tag sequence is the sum of its logits, of `transitions[a, b]` for each tag b after a
tag a, of `start` of its first and `end` of its last tag. The chain connects the positions in `mask`
and skips those between: it runs from the first token of a word to that of the next.
"""

import functools

import jax
import jax.numpy as jnp

Scores = dict[str, jax.Array]  # of a 'tagging' head: 'transitions' [C, C], 'start' and 'end' [C]


def shapes(num_labels: int) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters."""
  return {'transitions': (num_labels, num_labels), 'start': (num_labels,), 'end': (num_labels,)}


@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def log_partition(scores: Scores, logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Log-partition function by the forward algorithm: logsumexp of the scores of all sequences.

  Args:
    scores: the parameters; other entries are ignored.
    logits: [B, L, C], any floating dtype.
    mask: bool [B, L], the positions of the chain.

  Returns:
    float32 [B]; 0 for a row without positions.
  """

  def step(alpha, position):
    logit, here, first = position
    onward = jax.nn.logsumexp(alpha[:, None] + scores['transitions'], axis=0)
    return jnp.where(here, jnp.where(first, scores['start'], onward) + logit, alpha), None

  alpha, _ = jax.lax.scan(step, jnp.zeros_like(scores['start']), _positions(logits, mask))
  return jnp.where(mask.any(), jax.nn.logsumexp(alpha + scores['end']), 0.0)


def sequence_score(scores: Scores, logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Scores [B] of the tag sequences in `labels` int [B, L]; -1 = not in the chain."""
  chosen = labels[..., None] == jnp.arange(logits.shape[-1])
  # With all other paths masked out, the log-partition function is the score of this path.
  return log_partition(scores, jnp.where(chosen, logits.astype(jnp.float32), -1e9), labels >= 0)


def negative_log_likelihood(scores: Scores, logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Negative log likelihood in nats [B] of the tags `labels` int [B, L]; -1 = not in the chain."""
  # A constant added to the logits of a position cancels in the difference. With log_softmax both
  # terms are small once the tags are learnt, so float32 keeps its precision on long rows.
  logits = jax.nn.log_softmax(logits.astype(jnp.float32))
  return log_partition(scores, logits, labels >= 0) - sequence_score(scores, logits, labels)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def viterbi(scores: Scores, logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Best tag sequences, int32 [B, L], -1 outside `mask`; arguments as of `log_partition`."""
  stay = jnp.arange(logits.shape[-1])

  def step(best, position):
    logit, here, first = position
    paths = best[:, None] + scores['transitions']  # [from, to]
    onward = jnp.where(first, scores['start'], paths.max(0)) + logit
    # Outside the chain each tag points to itself, so backtracking passes through.
    return jnp.where(here, onward, best), jnp.where(here, paths.argmax(0), stay)

  best, pointers = jax.lax.scan(step, jnp.zeros_like(scores['start']), _positions(logits, mask))
  last = (best + scores['end']).argmax()
  _, tags = jax.lax.scan(lambda tag, back: (back[tag], tag), last, pointers, reverse=True)
  return jnp.where(mask, tags, -1).astype(jnp.int32)


def _positions(logits, mask):
  """Inputs of a scan over the positions of a row: logits, whether in the chain, whether first."""
  return logits.astype(jnp.float32), mask, mask & (jnp.cumsum(mask) == 1)
