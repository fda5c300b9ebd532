"""The bidirectional Transformer encoder of BERT (Devlin et al. 2018, section 3), post-norm.

All layers live in one parameter tree stacked along a leading axis, which a scan walks over, so
compile time does not grow with depth; `config.unroll` unrolls the same tree. Parameters carry no
sharding annotations: `PARAM_AXES` names the axes of each parameter by its path, and
`training.mesh` turns the names into shardings.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from bertjax.model.attention import attention
from bertjax.model.config import EncoderConfig
from bertjax.model.dropout import dropout

# Path regex -> logical axis names of the parameter, without the leading layer axis, which is
# 'layers'. The first match counts; the optimizer's moments match as well, since their paths end in
# their parameter's.
PARAM_AXES = (
  (r'embeddings/word/embedding$', ('vocab', None)),
  (r'embeddings/(position|token_type)/embedding$', (None, None)),
  (r'attention/qkv/kernel$', ('embed', 'qkv', 'heads', 'head_size')),
  (r'attention/qkv/bias$', ('qkv', 'heads', 'head_size')),
  (r'attention/out/kernel$', ('heads', 'head_size', 'embed')),
  (r'mlp/in/kernel$', ('embed', 'mlp')),
  (r'mlp/in/bias$', ('mlp',)),
  (r'mlp/out/kernel$', ('mlp', 'embed')),
  (r'(pooler|mlm/transform)/kernel$', ('embed', None)),
  (r'mlm/bias$', ('vocab',)),
  (r'(nsp|classification|tagging|span|choice)/kernel$', ('embed', None)),
  # Replicated: a sharded kernel would add a collective to each step of the LSTM's scan.
  (r'bilstm_\d+_\w+/\w+/kernel$|tagging/transitions$', (None, None)),
  (r'(layer_norm/(scale|bias)|bias|layer_weights|tagging/(start|end))$', (None,)),
)


def _gelu_by_erf(x: jax.Array, erf=jax.lax.erf) -> jax.Array:
  wide = x.astype(jnp.float32)
  return (wide * (0.5 + 0.5 * erf(wide * 0.5**0.5))).astype(x.dtype)


# erf(x) / x as a Chebyshev series in x^2 up to 4, where erf is 1 in float32; within 1e-8.
_ERF = np.polynomial.Chebyshev.interpolate(
  np.vectorize(lambda u: math.erf(u**0.5) / u**0.5), 16, domain=[0, 16]
)


def _plain_erf(x: jax.Array) -> jax.Array:
  """erf by additions and multiplications (Clenshaw's recurrence), within 4e-7."""
  x = jnp.clip(x, -4, 4)
  t, b1, b2 = x * x / 8 - 1, 0.0, 0.0
  for c in _ERF.coef[:0:-1].tolist():
    b1, b2 = 2 * t * b1 - b2 + c, b1
  return jnp.clip(x * (t * b1 - b2 + float(_ERF.coef[0])), -1, 1)


def _gelu(x: jax.Array) -> jax.Array:
  """Exact GELU. A TPU computes erf in a third of erfc's operations. Programs exported for any shape
  have neither: newer jax lowers both to composites, which TensorFlow 2.21 cannot refine."""
  if any(map(export.is_symbolic_dim, x.shape)):
    return _gelu_by_erf(x, _plain_erf)
  erfc = functools.partial(jax.nn.gelu, approximate=False)
  return jax.lax.platform_dependent(x, tpu=_gelu_by_erf, default=erfc)


# Recomputed for the gradient: a layer's loop would keep every intermediate array otherwise.
_again = functools.partial(jax.checkpoint, prevent_cse=False)
ACTIVATION = {
  'gelu': _again(_gelu),
  'gelu_tanh': _again(functools.partial(jax.nn.gelu, approximate=True)),
}

_REMAT = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def layer_factors(num_layers: int, trained: int = -1, decay: float = 1.0, head: float = 1.0):
  """Factors of the learning rate by part, for `training.optimizer.scale_by_part`.

  What is outside the encoder has `head`, the top layer `decay`, each layer below one factor more,
  and the embeddings one more than the lowest. Where `trained` is not negative, layers below the top
  `trained` and the embeddings have 0.

  Returns:
    Path of a parameter -> factor, or [num_layers] for the stacked layers; None if all are 1.
  """
  if not 0 < decay <= 1:
    raise ValueError(f'layerwise_lr_decay must be above 0 and at most 1, got {decay}.')
  if head <= 0:
    raise ValueError(f'head_lr_multiplier must be above 0, got {head}.')
  if trained < 0 and decay == head == 1:
    return None
  depth = num_layers - np.arange(num_layers)  # 1 for the top
  kept = trained < 0

  def factors(name: str):
    if 'encoder/embeddings/' in name:
      return kept * decay ** (num_layers + 1)
    return decay**depth * (kept | (depth <= trained)) if 'encoder/layers/' in name else head

  return factors


def kernel_init(config: EncoderConfig):
  """Normal(0, initializer_range) truncated at two standard deviations, without correcting the
  deviation for the truncation: TensorFlow's `truncated_normal`, as Google's BERT uses it."""
  return nn.initializers.truncated_normal(config.initializer_range)


def dense(config: EncoderConfig, features, name: str, axis=-1) -> nn.DenseGeneral:
  """A linear layer with BERT's initialisers and the config's dtypes."""
  return nn.DenseGeneral(
    features, axis=axis, name=name, dtype=config.dtype,
    kernel_init=kernel_init(config),
  )  # fmt: skip


def drop(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
  """Dropout in training, its key from the module's scope."""
  if not train or rate == 0:
    return x
  return dropout(x, rate, module.make_rng('dropout'))


class LayerNorm(nn.Module):
  """`nn.LayerNorm` in float32, whatever the computation dtype is: an epsilon of 1e-12 needs it."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of x [..., D]; keeps x's dtype."""
    norm = nn.checkpoint(nn.LayerNorm, prevent_cse=False)(
      epsilon=self.config.layer_norm_eps, dtype=jnp.float32, name='layer_norm',
      use_fast_variance=False,
    )  # fmt: skip
    nn.share_scope(self, norm)
    return norm(x).astype(x.dtype)


class Embeddings(nn.Module):
  """Sum of word, position and token-type embeddings, LayerNorm, dropout."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, batch: dict, train: bool) -> tuple[jax.Array, jax.Array]:
    """Maps a batch to states [B, L, D]; also returns the word table [V, D] for the tied head.

    Only words, and positions that are given (packed rows), are looked up. The gradient of a look-up
    adds rows one by one, that of a product or a slice is a sum, which costs less for few rows.
    """
    config = self.config
    table = functools.partial(
      nn.Embed, features=config.hidden_size, embedding_init=kernel_init(config), dtype=config.dtype
    )
    word, position = (
      table(config.vocab_size, name='word'),
      table(config.max_positions, name='position'),
    )
    token_type = table(config.type_vocab_size, name='token_type').embedding.astype(config.dtype)
    if 'input_embeddings' in batch:
      x = batch['input_embeddings'].astype(config.dtype)
    else:
      x = word(batch['input_ids'])
    if 'position_ids' in batch:
      x += position(batch['position_ids'])
    else:
      x += position.embedding[: x.shape[1]].astype(x.dtype)
    types = batch.get('token_type_ids', jnp.zeros(x.shape[:2], jnp.int32))
    x += jax.nn.one_hot(types, config.type_vocab_size, dtype=x.dtype) @ token_type
    x = LayerNorm(config, name='layer_norm')(x)
    return drop(self, x, config.hidden_dropout, train), word.embedding


class SelfAttention(nn.Module):
  """Multi-head self-attention with one fused projection for queries, keys and values."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x, segment_ids, train: bool, capture: bool):
    """Maps x [B, L, D] to ([B, L, D], probabilities [B, H, L, L] or None)."""
    config = self.config
    qkv = dense(config, (3, config.num_heads, config.head_size), 'qkv')(x)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, L, H, K] each
    rate = config.attention_dropout if train else 0.0
    context, probs = attention(
      q, k, v, segment_ids, causal=config.causal, dropout_rate=rate,
      dropout_rng=self.make_rng('dropout') if rate else None,
      # Initialising runs a few tokens, perhaps on another device.
      impl='xla' if self.is_initializing() else config.attention, return_probs=capture,
    )  # fmt: skip
    return dense(config, config.hidden_size, 'out', axis=(-2, -1))(context), probs


class Mlp(nn.Module):
  """Two linear layers with GELU between them; no dropout after the GELU."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = dense(self.config, self.config.mlp_size, 'in')(x)
    x = ACTIVATION[self.config.activation](x)
    return dense(self.config, self.config.hidden_size, 'out')(x)


class Block(nn.Module):
  """One layer: LayerNorm(x + dropout(sublayer(x))) for attention, then for the MLP.

  Has the (carry, output) form of a scan's body; `capture` names what the output collects.
  """

  config: EncoderConfig
  train: bool
  capture: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, x, segment_ids):
    config = self.config
    y, probs = SelfAttention(config, name='attention')(
      x, segment_ids, self.train, 'attention' in self.capture
    )
    x += drop(self, y, config.hidden_dropout, self.train)
    x = LayerNorm(config, name='attention_layer_norm')(x)
    y = Mlp(config, name='mlp')(x)
    x += drop(self, y, config.hidden_dropout, self.train)
    x = LayerNorm(config, name='mlp_layer_norm')(x)
    collected = {'attention': probs, 'hidden': x}
    return x, {name: collected[name] for name in self.capture}


class Encoder(nn.Module):
  """Embeddings and N blocks."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, batch: dict, train: bool, capture: tuple[str, ...] = ()):
    """Encodes a batch as `Bert` takes it.

    Returns:
      `out` with 'hidden' [B, L, D]; and for each name in `capture`: 'hidden' adds 'all_hidden'
      [N+1, B, L, D] (the embeddings first), 'attention' adds 'attention' [N, B, H, L, L].
      The second value is the word table [V, D].
    """
    config = self.config
    embedded, word_table = Embeddings(config, name='embeddings')(batch, train)
    segment_ids = batch.get('segment_ids', jnp.ones(embedded.shape[:2], jnp.int32))
    block = Block
    if config.remat != 'none':
      # A loop keeps XLA from merging the recomputation with the original; unrolled layers need the
      # (costlier) barrier instead.
      unrolled = config.unroll >= config.num_layers
      block = nn.remat(block, prevent_cse=unrolled, policy=_REMAT[config.remat])
    layers = nn.scan(
      block, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
      in_axes=nn.broadcast, length=config.num_layers, unroll=min(config.unroll, config.num_layers),
    )  # fmt: skip
    x, collected = layers(config, train, tuple(capture), name='layers')(embedded, segment_ids)
    out = {'hidden': x}
    if 'attention' in capture:
      out['attention'] = collected['attention']
    if 'hidden' in capture:
      out['all_hidden'] = jnp.concatenate([embedded[None], collected['hidden']])
    return out, word_table
