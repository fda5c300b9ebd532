"""Vectors of texts: pooled states, cosine similarity, and the nearest vectors."""

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.model.heads import cls_states, last_states, mean_states


def pool(out: dict, batch: dict, pooling: str) -> jax.Array:
  """One float32 vector for each sequence, [B, D], or [B, S, D] where S sequences are packed.

  Args:
    out: what `Bert` returned.
    batch: what it read.
    pooling: 'mean' over the tokens, the state of [CLS] ('cls') or of the last token ('last'), or
      'last_four': the mean of the last four layers side by side, 4D (Devlin et al. 2018, table 7).
  """
  states = out['hidden']
  if pooling == 'cls':
    return cls_states(states, batch).astype(jnp.float32)
  if pooling == 'last':
    return last_states(states, batch).astype(jnp.float32)
  if pooling == 'last_four':
    if len(out['all_hidden']) < 5:
      raise ValueError(
        f"'last_four' needs four layers, the model has {len(out['all_hidden']) - 1}."
      )
    states = jnp.concatenate(list(out['all_hidden'][-4:]), -1)
  return mean_states(states, batch)


def unit(vectors: jax.Array) -> jax.Array:
  """Vectors [..., D] of length 1; a zero vector stays zero, with a gradient of zero."""
  squares = jnp.square(vectors).sum(-1, keepdims=True)
  return vectors * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))


def cosines(a: jax.Array, b: jax.Array) -> jax.Array:
  """Cosine similarities [N, M] of unit vectors [N, D] and [M, D], float32."""
  return jnp.einsum('nd,md->nm', a, b, precision='highest', preferred_element_type=jnp.float32)


def nearest(
  queries: np.ndarray, corpus: np.ndarray, k: int, *, rows: int = 1024, columns: int = 65_536
) -> tuple[np.ndarray, np.ndarray]:
  """The k vectors of a corpus with the largest cosine to each query: exact, on a device, in blocks.

  Args:
    queries: [Q, D] of length 1.
    corpus: [N, D] of length 1.
    k: number of vectors; N where that is smaller.
    rows: queries of a block.
    columns: vectors of the corpus in a block.

  Returns:
    Cosines, the largest first, and indices [Q, k]; of equal cosines the lowest index comes first.
  """
  k, rows, columns = min(k, len(corpus)), min(rows, len(queries)), min(columns, len(corpus))
  found = [
    (jnp.full((rows, k), -jnp.inf), jnp.zeros((rows, k), jnp.int32))
    for _ in range(0, len(queries), rows)
  ]
  for start in range(0, len(corpus), columns):
    block = jax.device_put(_fill(corpus[start : start + columns], columns))
    for number, before in enumerate(found):
      part = _fill(queries[number * rows : (number + 1) * rows], rows)
      found[number] = _nearest(part, block, *before, start, len(corpus))
  scores, places = (
    np.concatenate(jax.device_get(x))[: len(queries)] for x in zip(*found, strict=True)
  )
  return scores, places


@jax.jit
def _nearest(queries, block, scores, places, start, end):
  """Merges the nearest vectors so far with those of a block that begins at `start`."""
  index = start + jnp.arange(len(block))
  new = jnp.where(index < end, cosines(queries, block), -jnp.inf)
  index = jnp.broadcast_to(index.astype(places.dtype), new.shape)
  best, which = jax.lax.top_k(jnp.concatenate([scores, new], 1), scores.shape[1])
  return best, jnp.take_along_axis(jnp.concatenate([places, index], 1), which, 1)


def _fill(vectors, count: int):
  return np.pad(vectors, ((0, count - len(vectors)), (0, 0)))
