"""Scaled dot-product attention behind one function; kernels are chosen by `impl`.

`segment_ids` is the only mask: 0 marks padding, 1.. the sequences packed in a row. A key is visible
when `seg_k > 0 and (seg_q == seg_k or seg_q == 0)`: a sequence sees itself, padding queries see
every real key, as in Google's and Hugging Face's BERT, where only keys are masked.
"""

import functools
import logging

import jax
import jax.numpy as jnp

# Finite, so that a row without any visible key gives a uniform distribution and not NaN.
_MASKED = -1e9


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  *,
  causal: bool = False,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
  impl: str = 'auto',
  return_probs: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """Attends within each sequence.

  Args:
    q: queries [B, L, H, K], not scaled.
    k: keys [B, L, H, K].
    v: values [B, L, H, K].
    segment_ids: int32 [B, L]; 0 = padding, 1.. = packed sequence.
    causal: a token sees only itself and earlier tokens.
    dropout_rate: dropped share of attention probabilities, drawn for each element.
    dropout_rng: key of the dropout bits; needed when dropout_rate > 0.
    impl: 'xla' (any backend, has dropout and probabilities), 'cudnn' (flash attention on NVIDIA
      GPUs, bfloat16 or float16, without dropout) or 'auto', which takes 'xla' and logs it.
    return_probs: also return the probabilities [B, H, L, L] before dropout ('xla' only).

  Returns:
    The context [B, L, H, K] in q's dtype, and the probabilities in float32 or None.

  Raises:
    ValueError: if `impl` is unknown or cannot do what is asked.
  """
  if dropout_rate > 0 and dropout_rng is None:
    raise ValueError(f'attention dropout of {dropout_rate} needs a dropout_rng, got None.')
  if impl == 'auto':
    impl = 'xla'
    _log_choice(impl, jax.default_backend())
  if impl == 'xla':
    return _xla(q, k, v, segment_ids, causal, dropout_rate, dropout_rng, return_probs)
  if impl == 'cudnn':
    _check_cudnn(q.dtype, dropout_rate, return_probs)
    mask = visible(segment_ids, causal)[:, None]  # [B, 1, L, L]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='cudnn'), None
  raise ValueError(f"attention impl must be 'auto', 'xla' or 'cudnn', got {impl!r}.")


def visible(segment_ids: jax.Array, causal: bool) -> jax.Array:
  """Returns bool [B, L, L]: may query q (axis 1) see key k (axis 2)?"""
  seg_q, seg_k = segment_ids[:, :, None], segment_ids[:, None, :]
  mask = (seg_k > 0) & ((seg_q == seg_k) | (seg_q == 0))
  if causal:
    position = jnp.arange(segment_ids.shape[1])
    mask &= position[:, None] >= position[None, :]
  return mask


def _xla(q, k, v, segment_ids, causal, dropout_rate, dropout_rng, return_probs):
  scores = jnp.einsum('bqhk,bshk->bhqs', q, k, preferred_element_type=jnp.float32)
  scores = scores * q.shape[-1] ** -0.5
  scores = jnp.where(visible(segment_ids, causal)[:, None], scores, _MASKED)
  probs = jax.nn.softmax(scores, axis=-1)  # float32 [B, H, L, L]
  kept = probs
  if dropout_rate > 0:
    keep = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, probs.shape)
    kept = jnp.where(keep, probs / (1 - dropout_rate), 0)
  context = jnp.einsum('bhqs,bshk->bqhk', kept.astype(v.dtype), v)
  return context, probs if return_probs else None


def _check_cudnn(dtype, dropout_rate, return_probs):
  if jax.default_backend() != 'gpu':
    raise ValueError(
      f"attention impl 'cudnn' needs an NVIDIA GPU, got backend {jax.default_backend()!r}; "
      "use 'xla' or 'auto'."
    )
  if dropout_rate > 0:
    raise ValueError(
      f"attention impl 'cudnn' has no attention dropout here, got {dropout_rate}; "
      "set attention_dropout=0.0 or use 'xla'."
    )
  if dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(f"attention impl 'cudnn' needs bfloat16 or float16, got {dtype}.")
  if return_probs:
    raise ValueError("attention impl 'cudnn' never forms the probabilities; capture with 'xla'.")


@functools.cache
def _log_choice(impl: str, backend: str) -> None:
  logging.getLogger(__name__).info("attention: 'auto' chose %r on backend %r", impl, backend)
