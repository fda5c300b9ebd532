"""Scaled dot-product attention behind one function; kernels are chosen by `impl`.

`segment_ids` is the only mask: 0 marks padding, 1.. the sequences packed in a row. A key is visible
when `seg_k > 0 and (seg_q == seg_k or seg_q == 0)`: a sequence attends to itself, padding queries
to every real key, as in Google's and Hugging Face's BERT, where only keys are masked. With a local
window a key is visible at most half a window away; sequences are contiguous in their row, so a
distance in the row is a distance in the sequence.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.model.dropout import dropout

_HEADS = 'tensor'  # mesh axis that splits heads; all others split rows, see `training.mesh`
# From 341 tokens on the probabilities (a float32 and a bfloat16 copy, 64 wide heads) outweigh all
# else that a layer keeps for its gradient. 384 is the first length of splash's tiles above.
_FLASH_LENGTH = 384
_TILE = 128
# Finite, so that a row without any visible key gives a uniform distribution and not NaN.
_MASKED = -1e9
CONTEXT = 'attention_context'  # name of the result for a policy of rematerialisation


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  *,
  bias: jax.Array | None = None,
  causal: bool = False,
  window: int = 0,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
  impl: str = 'auto',
  return_probs: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """Attends within each sequence.

  Args:
    q: queries [B, L, H, K], not scaled.
    k: keys [B, L, G, K], where G divides H; each is that of H / G consecutive queries.
    v: values [B, L, G, K].
    segment_ids: int32 [B, L]; 0 = padding, 1.. = packed sequence.
    bias: float32 [H, L, L], added to the scaled scores ('xla' only).
    causal: a token attends only to itself and earlier tokens.
    window: a token attends to itself and window / 2 tokens on each side; 0 = to all. 'xla' computes
      long rows in blocks, in O(L * window) time and memory; 'splash' skips the tiles outside.
    dropout_rate: dropout probability of attention probabilities, sampled for each element.
    dropout_rng: key of the dropout bits; needed when dropout_rate > 0.
    impl: 'xla' (any backend, has dropout and probabilities), 'cudnn' (flash attention on NVIDIA
      GPUs of compute capability 8.0 on, bfloat16, without dropout), 'splash' (flash attention on
      TPUs, lengths in multiples of 128, without dropout) or 'auto', which takes a flash kernel
      where it can from 384 tokens on, else 'xla', and logs its choice; with a window it leaves
      cuDNN, which computes all tiles. The flash kernels leave the context of padding undefined.
    return_probs: also return the probabilities [B, H, L, L] before dropout ('xla' only).

  Returns:
    The context [B, L, H, K] in q's dtype, and the probabilities in float32 or None.

  Raises:
    ValueError: if `impl` is unknown or cannot do what is asked.
  """
  if dropout_rate > 0 and dropout_rng is None:
    raise ValueError(f'attention dropout of {dropout_rate} needs a dropout_rng, got None.')
  if k.shape[2] < q.shape[2]:
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
  mesh = jax.sharding.get_abstract_mesh()
  backend = backend_of_step() if impl != 'xla' else ''
  # A program exported for any length is for any platform too: no kernel in it.
  flash = {'gpu': 'cudnn', 'tpu': 'splash'}.get(backend) if isinstance(q.shape[1], int) else None
  if impl == 'auto':
    reason = flash and _why_unsupported(flash, backend, mesh, q, dropout_rate, return_probs, bias)
    if flash == 'cudnn' and window:
      reason = reason or f'a global layer to be the faster one, got a window of {window}'
    impl = flash if flash and not reason and q.shape[1] >= _FLASH_LENGTH else 'xla'
    _log_choice(impl, backend, f' at length {q.shape[1]}' if flash else '', reason)
  if impl == 'xla':
    drop = lambda probs: dropout(probs, dropout_rate, dropout_rng)  # noqa: E731
    if window and isinstance(q.shape[1], int) and q.shape[1] >= 2 * window and not return_probs:
      return _xla_in_blocks(q, k, v, segment_ids, causal, window, drop), None
    context, probs = _xla(q, k, v, segment_ids, causal, window, drop, bias)
    return context, probs if return_probs else None
  if impl not in ('cudnn', 'splash'):
    raise ValueError(f"attention impl must be 'auto', 'xla', 'cudnn' or 'splash', got {impl!r}.")
  reason = _why_unsupported(impl, backend, mesh, q, dropout_rate, return_probs, bias)
  if reason:
    raise ValueError(f"attention impl {impl!r} needs {reason}; use 'xla' or 'auto'.")
  if impl == 'splash':
    return _splash(q, k, v, segment_ids, causal, window, mesh), None
  mask = visible(segment_ids, causal, window)[:, None]  # [B, 1, L, L]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='cudnn'), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`jnp.einsum` with a float32 result, whose gradients are matmuls in the operands' dtype.

  Without this the float32 gradient of bfloat16 operands would be multiplied in float32, several
  times slower on a TPU.
  """
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _einsum_gradient(spec, operands, cotangent):
  _, pull = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), *operands)
  return pull(cotangent.astype(operands[0].dtype))


float32_einsum.defvjp(lambda spec, a, b: (float32_einsum(spec, a, b), (a, b)), _einsum_gradient)


def visible(segment_ids: jax.Array, causal: bool, window: int = 0) -> jax.Array:
  """Returns bool [B, L, L]: may query q (axis 1) see key k (axis 2)?"""
  index = jnp.arange(segment_ids.shape[1])
  return _visible(segment_ids, segment_ids, index, index, causal, window)


def _visible(seg_q, seg_k, index_q, index_k, causal, window):
  """Bool [..., Q, S] for segments [..., Q] and [..., S], and indices in the row likewise."""
  seg_q, seg_k = seg_q[..., :, None], seg_k[..., None, :]
  mask = (seg_k > 0) & ((seg_q == seg_k) | (seg_q == 0))
  distance = index_q[..., :, None] - index_k[..., None, :]
  if causal:
    mask &= distance >= 0
  if window:
    mask &= abs(distance) <= window // 2
  return mask


def _xla_in_blocks(q, k, v, segment_ids, causal, window, drop):
  """`_xla` of a local layer: each block of half a window attends to itself and its neighbours."""
  length, size = q.shape[1], window // 2
  count = -(-length // size)

  def split(x):  # [B, L, ..] -> [B, C, size, ..]
    x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], count, size, *x.shape[2:])

  def near(x):  # [B, L, ..] -> [B, C, 3 * size, ..]
    x = jnp.pad(split(x), ((0, 0), (1, 1)) + ((0, 0),) * (x.ndim - 1))
    return jnp.concatenate([x[:, i : i + count] for i in range(3)], axis=2)

  index = jnp.arange(count)[:, None] * size + jnp.arange(-size, 2 * size)  # [C, 3 * size]
  mask = _visible(
    split(segment_ids), near(segment_ids), index[:, size : 2 * size], index, causal, window
  )  # [B, C, size, 3 * size]
  q, k, v = (x.swapaxes(2, 3) for x in (split(q), near(k), near(v)))  # [B, C, H, .., K]
  scores = float32_einsum('bchqk,bchsk->bchqs', q, k) * q.shape[-1] ** -0.5
  probs = jax.nn.softmax(jnp.where(mask[:, :, None], scores, _MASKED), axis=-1)
  context = jnp.einsum('bchqs,bchsk->bcqhk', drop(probs).astype(v.dtype), v)
  return context.reshape(context.shape[0], count * size, *context.shape[3:])[:, :length]


def _xla(q, k, v, segment_ids, causal, window, drop, bias=None):
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, H, L, K], over which CPUs are much faster
  scores = float32_einsum('bhqk,bhsk->bhqs', q, k)
  scores = scores * q.shape[-1] ** -0.5
  if bias is not None:
    scores += bias
  scores = jnp.where(visible(segment_ids, causal, window)[:, None], scores, _MASKED)
  probs = jax.nn.softmax(scores, axis=-1)  # float32 [B, H, L, L]
  context = jnp.einsum('bhqs,bhsk->bhqk', drop(probs).astype(v.dtype), v)
  return context.swapaxes(1, 2), probs


def _splash(q, k, v, segment_ids, causal, window, mesh, interpret=False):
  """Splash attention; under a mesh each device runs it on its rows and heads."""
  # Imported here: Pallas is slow to import, and only a TPU needs it.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  length = q.shape[1]
  tile = splash_tile(length)
  names = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
  tiles: dict[str, Any] = {f'block_{name}': tile for name in names}
  shape, half = (length, length), window // 2
  mask: Any
  if window:
    mask = masks.LocalMask(shape, (half, 0 if causal else half), offset=0)
  else:
    mask = (masks.CausalMask if causal else masks.FullMask)(shape)

  def local(q, k, v, segment_ids):
    kernel = kernels.make_splash_mha(
      masks.MultiHeadMask([mask] * q.shape[2]), head_shards=1, q_seq_shards=1,
      block_sizes=kernels.BlockSizes(**tiles), residual_checkpoint_name=CONTEXT,
      interpret=interpret,
    )  # fmt: skip
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))  # [B, H, L, K]
    segments = kernels.SegmentIds(q=segment_ids, kv=segment_ids)
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)

  if mesh.size == 1 or mesh.empty:
    return local(q, k, v, segment_ids)
  batch = tuple(name for name in mesh.axis_names if name != _HEADS)
  rows, heads = jax.P(batch), jax.P(batch, None, _HEADS if _HEADS in mesh.axis_names else None)
  return jax.shard_map(
    local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
  )(q, k, v, segment_ids)


def splash_tile(length: int) -> int:
  """The side of splash's tiles of queries and keys, for rows of a multiple of 128 tokens."""
  return next(n for n in (512, 384, 256, _TILE) if length % n == 0)


Angles = tuple[jax.Array, jax.Array]


def rotary_angles(position_ids: jax.Array, head_size: int, theta: float) -> Angles:
  """Cosines and sines [..., L, 1, K/2] of positions [..., L], float32 (RoPE, Su et al. 2021)."""
  frequencies = (theta ** (-np.arange(0, head_size, 2) / head_size)).astype(np.float32)
  angles = (position_ids.astype(jnp.float32)[..., None] * frequencies)[..., None, :]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
  """Rotates queries or keys x [B, L, H, K]; element i of the first half pairs with element i of the
  second. Computes in float32 and returns x's dtype."""
  cos, sin = angles
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def backend_of_step() -> str:
  """The platform of the mesh that the step runs on, which need not be this machine's."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def _compute_capability() -> float:
  """That of this machine's GPU, 7.5 for a T4; infinite without one, where nothing is executed."""
  return float(getattr(jax.local_devices()[0], 'compute_capability', None) or 'inf')


def _why_unsupported(impl, backend, mesh, q, dropout_rate, return_probs, bias=None) -> str:
  """What a flash kernel needs and has not got; '' if nothing is in its way."""
  if backend != {'cudnn': 'gpu', 'splash': 'tpu'}[impl]:
    return f'{"an NVIDIA GPU" if impl == "cudnn" else "a TPU"}, got backend {backend!r}'
  if dropout_rate > 0:
    return f'attention_dropout=0.0, got {dropout_rate}'
  if return_probs:
    return 'no capture of probabilities, which it never forms'
  if bias is not None:
    return 'relative_buckets=0, got a position bias'
  if impl == 'cudnn' and q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"dtype='bfloat16', got {q.dtype}"
  if impl == 'cudnn' and _compute_capability() < 8:
    return f'a GPU of compute capability 8.0 or more, got {_compute_capability()}'
  if impl == 'cudnn' and (q.shape[3] % 8 or q.shape[3] > 128 or q.shape[1] % 2):
    return f'heads of 8, 16, .. 128 and an even length, got {q.shape[3]} and {q.shape[1]}'
  if impl == 'splash' and q.shape[1] % _TILE:
    return f'a length in multiples of {_TILE}, got {q.shape[1]}'
  if impl == 'splash' and q.shape[2] % mesh.shape.get(_HEADS, 1):
    return f'num_heads in multiples of mesh.{_HEADS}={mesh.shape[_HEADS]}, got {q.shape[2]}'
  return ''


@functools.cache
def _log_choice(impl: str, backend: str, length: str, reason: str | None) -> None:
  logging.getLogger(__name__).info(
    "attention: 'auto' chose %r on backend %r%s%s", impl, backend, length,
    f' (flash attention needs {reason})' if reason else '',
  )  # fmt: skip
