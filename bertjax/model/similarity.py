"""Vectors of texts: pooled states, cosine similarity, and the nearest vectors."""

import jax
import jax.numpy as jnp

from bertjax.model.heads import cls_states, gather, mean_states


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
    return _last_states(states, batch).astype(jnp.float32)
  if pooling == 'last_four':
    if len(out['all_hidden']) < 5:
      raise ValueError(
        f"'last_four' needs four layers, the model has {len(out['all_hidden']) - 1}."
      )
    states = jnp.concatenate(list(out['all_hidden'][-4:]), -1)
  return mean_states(states, batch)


def _last_states(x: jax.Array, batch: dict) -> jax.Array:
  """The states of x [B, L, D] at the last token of each sequence."""
  segments = batch.get('segment_ids', jnp.ones(x.shape[:2], jnp.int32))
  slots = batch['cls_positions'].shape[1] if 'cls_positions' in batch else 1
  own = segments[:, None] == jnp.arange(1, slots + 1)[:, None]  # [B, S, L]
  states = gather(x, (own * jnp.arange(x.shape[1])).max(-1))
  return states if 'cls_positions' in batch else states[:, 0]


def unit(vectors: jax.Array) -> jax.Array:
  """Vectors [..., D] of length 1; a zero vector stays zero, with a gradient of zero."""
  squares = jnp.square(vectors).sum(-1, keepdims=True)
  return vectors * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))


def cosines(a: jax.Array, b: jax.Array) -> jax.Array:
  """Cosine similarities [N, M] of unit vectors [N, D] and [M, D], float32."""
  return jnp.einsum('nd,md->nm', a, b, precision='highest', preferred_element_type=jnp.float32)
