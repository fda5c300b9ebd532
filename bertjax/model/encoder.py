"""The bidirectional Transformer encoder: one `Block`, whose switches make BERT (Devlin et al. 2018,
section 3) or a later encoder of it.

| switches | RoBERTa | DistilBERT | ELECTRA | ALBERT | MPNet |
|---|---|---|---|---|---|
| position_offset | 2 | | | | 2 |
| relative_buckets | | | | | 32 |
| type_vocab_size | 1 | 0 | 2 | 2 | 0 |
| embedding_size | | | 128 (small) | 128 | |
| shared_layers | | | | yes | |
| classifier_hidden | tanh | relu | gelu | | tanh |
| heads beside mlm and those of tasks | | | rtd | nsp (sentence order) | |

| switches | ModernBERT (Ettin, mmBERT) | NeoBERT | EuroBERT |
|---|---|---|---|
| norm, norm_position, embedding_norm | layer, pre, yes | rms, pre, no | rms, pre, no |
| positions | rotary, local and global | rotary | rotary |
| MLP | gelu, gated | silu, gated | silu, gated |
| biases of norms, linear layers | none | none | none |
| num_kv_heads | | | fewer than num_heads |
| tied_embeddings, mlm_transform, mlm_bias | yes, yes, yes | no, no, yes | no, no, no |
| classifier_hidden, _norm, _pooling | gelu, yes, cls or mean | tanh, no, cls | gelu, no, late |

All layers live in one parameter tree stacked along a leading axis, which a scan walks over, so
compile time does not grow with depth; `config.unroll` unrolls the same tree. Parameters carry no
sharding annotations: `PARAM_AXES` names the axes of each parameter by its path, and
`training.mesh` turns the names into shardings.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.ad_checkpoint import checkpoint_name

from bertjax.model.attention import (
  CONTEXT,
  Angles,
  attention,
  backend_of_step,
  rotary_angles,
  rotate,
)
from bertjax.model.config import EncoderConfig
from bertjax.model.dropout import dropout

# Path regex -> logical axis names of the parameter, without the leading layer axis, which is
# 'layers'. The first match counts; the optimizer's moments match as well, since their paths end in
# their parameter's.
PARAM_AXES = (
  (r'embeddings/word/embedding$', ('vocab', None)),
  (r'embeddings/(position|token_type)/embedding$', (None, None)),
  (r'encoder/relative/embedding$', (None, 'heads')),
  (r'embeddings/project/kernel$', (None, 'embed')),
  (r'attention/qkv/kernel$', ('embed', 'qkv', 'heads', 'head_size')),
  (r'attention/qkv/bias$', ('qkv', 'heads', 'head_size')),
  (r'attention/query/kernel$', ('embed', 'heads', 'head_size')),
  (r'attention/query/bias$', ('heads', 'head_size')),
  (r'attention/kv/kernel$', ('embed', 'qkv', 'heads', 'head_size')),
  (r'attention/kv/bias$', ('qkv', 'heads', 'head_size')),
  (r'attention/out/kernel$', ('heads', 'head_size', 'embed')),
  (r'mlp/in/kernel$', ('embed', 'mlp')),
  (r'mlp/in/bias$', ('mlp',)),
  (r'mlp/gated_in/kernel$', ('embed', None, 'mlp')),
  (r'mlp/gated_in/bias$', (None, 'mlp')),
  (r'mlp/out/kernel$', ('mlp', 'embed')),
  (r'(pooler|mlm/transform)/kernel$', ('embed', None)),
  (r'mlm/output/embedding$', ('vocab', None)),
  (r'mlm/bias$', ('vocab',)),
  (r'(nsp|rtd|classification|tagging|span|choice)(/hidden)?/kernel$', ('embed', None)),
  (r'(^|/)lora/.*/[ab]$', (None, None)),  # small
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
  """Exact GELU. TPUs and GPUs compute erf in a third of erfc's operations. Programs exported for
  any shape have neither: newer jax lowers both to composites, which TensorFlow 2.21 cannot refine.
  """
  if any(map(export.is_symbolic_dim, x.shape)):
    return _gelu_by_erf(x, _plain_erf)
  erfc = functools.partial(jax.nn.gelu, approximate=False)
  return jax.lax.platform_dependent(x, tpu=_gelu_by_erf, cuda=_gelu_by_erf, default=erfc)


# Recomputed for the gradient: a layer's loop would keep every intermediate array otherwise.
_again = functools.partial(jax.checkpoint, prevent_cse=False)
ACTIVATION = {
  'gelu': _again(_gelu),
  'gelu_tanh': _again(functools.partial(jax.nn.gelu, approximate=True)),
  'silu': _again(jax.nn.silu),
  'relu': jax.nn.relu,
}

# 'dots' also keeps attention's result, which costs two matmuls of [L, L] to compute again and no
# more memory than the projection after it.
_REMAT = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(CONTEXT),
  ),
}


def layer_factors(
  num_layers: int, trained: int = -1, decay: float = 1.0, head: float = 1.0, shared: bool = False
):
  """Factors of the learning rate by part, for `training.optimizer.scale_by_part`.

  What is outside the encoder has `head`, the top layer `decay`, each layer below one factor more,
  and the embeddings one more than the lowest. Where `trained` is not negative, layers below the top
  `trained` and the embeddings have 0.

  Args:
    num_layers: layers of the encoder.
    trained: top layers to train; -1 trains everything.
    decay: factor between a layer and the one above it.
    head: factor of what is outside the encoder.
    shared: the layers share their weights.

  Returns:
    Path of a parameter -> factor, or [num_layers] for the stacked layers; None if all are 1.

  Raises:
    ValueError: for a factor out of range, or layers that are treated apart and share their weights.
  """
  if not 0 < decay <= 1:
    raise ValueError(f'layerwise_lr_decay must be above 0 and at most 1, got {decay}.')
  if head <= 0:
    raise ValueError(f'head_lr_multiplier must be above 0, got {head}.')
  if shared and (decay != 1 or 0 < trained < num_layers):
    raise ValueError(
      f'the {num_layers} layers share their weights (shared_layers=True), got layerwise_lr_decay='
      f'{decay} and num_trainable_layers={trained}; set 1.0, and -1, 0 or {num_layers}.'
    )
  if trained < 0 and decay == head == 1:
    return None
  depth = num_layers - np.arange(num_layers)  # 1 for the top
  kept = trained < 0

  def factors(name: str):
    if 'encoder/embeddings/' in name:
      return kept * decay ** (num_layers + 1)
    if 'encoder/final_layer_norm/' in name:  # of the top layer's states
      return decay * (kept | (trained > 0))
    if 'encoder/relative/' in name:  # every layer reads it
      return decay**num_layers * (kept or trained >= num_layers)
    if 'encoder/layers/' in name:
      stacked = decay**depth * (kept | (depth <= trained))
      return float(stacked[0]) if shared else stacked
    return head

  return factors


def kernel_init(config: EncoderConfig, output: bool = False):
  """Normal(0, initializer_range) truncated at two standard deviations, without correcting the
  deviation for the truncation: TensorFlow's `truncated_normal`, as Google's BERT uses it. That of a
  layer whose `output` is added to the states is smaller with `scaled_init`."""
  smaller = (2 * config.num_layers) ** -0.5 if output and config.scaled_init else 1.0
  return nn.initializers.truncated_normal(config.initializer_range * smaller)


def _dot_of_tokens(x: jax.Array, kernel: jax.Array, dimensions, **options) -> jax.Array:
  """`lax.dot_general` of x [B, L, D] and a kernel [D, E], on a CPU as of tokens [B L, D].

  The gradient of the kernel then sums over one axis, before which XLA CPU transposes neither array.
  On a TPU this would cost 4% more memory traffic (docs/costs.md).
  """
  if x.ndim != 3 or kernel.ndim != 2 or backend_of_step() != 'cpu':
    return jax.lax.dot_general(x, kernel, dimensions, **options)
  tokens = x.reshape(-1, x.shape[-1])
  out = jax.lax.dot_general(tokens, kernel, (((1,), (0,)), ((), ())), **options)
  return out.reshape(*x.shape[:-1], kernel.shape[-1])


def _promote_all_but_bias(*arrays, dtype=None, inexact=True) -> list:
  return [*nn.dtypes.promote_dtype(*arrays[:-1], dtype=dtype, inexact=inexact), arrays[-1]]


class Dense(nn.DenseGeneral):
  """`nn.DenseGeneral` that adds its bias in float32, so that its gradient, a sum over all tokens,
  is one of float32 too: 32,768 gradients of about 1 add up to 16,384 in bfloat16 on a CPU."""

  def __call__(self, inputs: jax.Array) -> jax.Array:
    return super().__call__(inputs).astype(self.dtype)


def dense(
  config: EncoderConfig, features, name: str, axis=-1, *, bias: bool = True, output: bool = False
) -> Dense:
  """A linear layer with the config's initialisers and dtypes."""
  return Dense(
    features, axis=axis, name=name, dtype=config.dtype, use_bias=bias,
    promote_dtype=_promote_all_but_bias, kernel_init=kernel_init(config, output),
    dot_general=_dot_of_tokens,
  )  # fmt: skip


def drop(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
  """Dropout in training, its key from the module's scope."""
  if not train or rate == 0:
    return x
  return dropout(x, rate, module.make_rng('dropout'))


class Norm(nn.Module):
  """LayerNorm or RMSNorm in float32, whatever the computation dtype is: an epsilon of 1e-12 needs
  it."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of x [..., D]; keeps x's dtype."""
    config = self.config
    kind: Any = nn.RMSNorm
    options: dict[str, Any] = {}
    if config.norm == 'layer':
      kind, options = nn.LayerNorm, {'use_bias': config.norm_bias}
    norm = nn.checkpoint(kind, prevent_cse=False)(
      epsilon=config.layer_norm_eps, dtype=jnp.float32, name='layer_norm',
      use_fast_variance=False, **options,
    )  # fmt: skip
    nn.share_scope(self, norm)
    return norm(x).astype(x.dtype)


class Embeddings(nn.Module):
  """Sum of word, position and token-type embeddings, normalisation, dropout, projection to D."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, batch: dict, train: bool) -> tuple[jax.Array, jax.Array]:
    """Maps a batch to states [B, L, D]; also returns the word table [V, E] for the tied head.

    Only words, and positions that are given (packed rows), are looked up. The gradient of a look-up
    adds rows one by one, that of a product or a slice is a sum, which costs less for few rows. Sums
    are float32 up to the norm: a word may be a thousand tokens of a batch, and a sum of so many
    gradients in bfloat16 ends at some hundred times the first one.
    """
    config = self.config
    table = functools.partial(
      nn.Embed, features=config.embedding_width, embedding_init=kernel_init(config)
    )
    word = table(config.vocab_size, name='word')
    if 'input_embeddings' in batch:
      x = batch['input_embeddings'].astype(jnp.float32)
    else:
      x = word(batch['input_ids']).astype(jnp.float32)
    if config.positions == 'learned':
      offset = config.position_offset  # in every packed sequence
      position = table(offset + config.max_positions, name='position')
      if 'position_ids' in batch:
        x += position(batch['position_ids'] + offset)
      else:
        x += position.embedding[offset : offset + x.shape[1]]
    if config.type_vocab_size:
      token_type = table(config.type_vocab_size, name='token_type').embedding.astype(config.dtype)
      types = batch.get('token_type_ids', jnp.zeros(x.shape[:2], jnp.int32))
      if config.type_vocab_size == 1:  # the second text of a pair has type 1 in a batch
        types = jnp.zeros_like(types)
      x += jax.nn.one_hot(types, config.type_vocab_size, dtype=config.dtype) @ token_type
    if config.embedding_norm:
      x = Norm(config, name='layer_norm')(x)
    x = drop(self, x.astype(config.dtype), config.hidden_dropout, train)
    if config.embedding_size:
      x = dense(config, config.hidden_size, 'project')(x)
    return x, word.embedding


# Distances from which on the buckets of a relative position bias stop growing.
_MAX_DISTANCE = 128


def relative_position_buckets(length: int, count: int) -> jax.Array:
  """Buckets [L, L] of the distance from query (axis 0) to key (axis 1), as T5 and MPNet have them.

  Half of the `count` buckets are for keys after the query. Of each half, the lower half holds a
  distance each, and the others grow with its logarithm up to 128.
  """
  exact, distances = count // 4, np.arange(_MAX_DISTANCE, dtype=np.float32)
  scale = np.log(np.maximum(distances, 1) / exact) / math.log(_MAX_DISTANCE / exact)
  buckets = np.where(distances < exact, distances, exact + (scale * exact).astype(np.int32))
  buckets = np.minimum(buckets, 2 * exact - 1).astype(np.int32)
  place = jnp.arange(length)
  distance = place[None] - place[:, None]
  table = jnp.asarray(np.append(buckets, 2 * exact - 1))
  return table[jnp.minimum(jnp.abs(distance), _MAX_DISTANCE)] + (distance > 0) * (count // 2)


class SelfAttention(nn.Module):
  """Multi-head self-attention with one fused projection for queries, keys and values, or one for
  queries and one for fewer keys and values."""

  config: EncoderConfig
  window: int = 0  # 0 = global

  @nn.compact
  def __call__(
    self, x, segment_ids, angles: Angles | None, position_bias, train: bool, capture: bool
  ):
    """Maps x [B, L, D] to ([B, L, D], probabilities [B, H, L, L] or None)."""
    config, bias = self.config, self.config.linear_bias
    heads, groups = config.num_heads, config.num_kv_heads or config.num_heads
    if groups == heads:
      qkv = dense(config, (3, heads, config.head_size), 'qkv', bias=bias)(x)
      q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, L, H, K] each
    else:
      q = dense(config, (heads, config.head_size), 'query', bias=bias)(x)
      kv = dense(config, (2, groups, config.head_size), 'kv', bias=bias)(x)
      k, v = kv[:, :, 0], kv[:, :, 1]  # [B, L, G, K] each
    if angles is not None:
      q, k = rotate(q, angles), rotate(k, angles)
    rate = config.attention_dropout if train else 0.0
    context, probs = attention(
      q, k, v, segment_ids, bias=position_bias, causal=config.causal, window=self.window,
      dropout_rate=rate, dropout_rng=self.make_rng('dropout') if rate else None,
      # Initialising runs a few tokens, perhaps on another device.
      impl='xla' if self.is_initializing() else config.attention, return_probs=capture,
    )  # fmt: skip
    out = dense(config, config.hidden_size, 'out', axis=(-2, -1), bias=bias, output=True)
    return out(checkpoint_name(context, CONTEXT)), probs


class Mlp(nn.Module):
  """Two linear layers with the activation between them, gated or not; no dropout inside."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config, bias = self.config, self.config.linear_bias
    if config.gated_mlp:  # apart, so that each half of a tensor axis has both parts
      x = dense(config, (2, config.mlp_size), 'gated_in', bias=bias)(x)
      x = ACTIVATION[config.activation](x[..., 0, :]) * x[..., 1, :]
    else:
      x = dense(config, config.mlp_size, 'in', bias=bias)(x)
      x = ACTIVATION[config.activation](x)
    return dense(config, config.hidden_size, 'out', bias=bias, output=True)(x)


class Block(nn.Module):
  """One layer, post-norm: norm(x + dropout(sublayer(x))) for attention, then for the MLP; or
  pre-norm: x + dropout(sublayer(norm(x))).

  Has the (carry, output) form of a scan's body; `capture` names what the output collects.
  """

  config: EncoderConfig
  train: bool
  capture: tuple[str, ...] = ()
  window: int = 0  # of a local layer
  attention_norm: bool = True  # False in the first layer where pre-norm embeddings are normalised

  @nn.compact
  def __call__(self, x, segment_ids, angles: Angles | None, position_bias=None):
    config = self.config
    pre = config.norm_position == 'pre'
    y = Norm(config, name='attention_layer_norm')(x) if pre and self.attention_norm else x
    y, probs = SelfAttention(config, self.window, name='attention')(
      y, segment_ids, angles, position_bias, self.train, 'attention' in self.capture
    )
    x += drop(self, y, config.hidden_dropout, self.train)
    if not pre:
      x = Norm(config, name='attention_layer_norm')(x)
    y = Norm(config, name='mlp_layer_norm')(x) if pre else x
    y = Mlp(config, name='mlp')(y)
    x += drop(self, y, config.hidden_dropout, self.train)
    if not pre:
      x = Norm(config, name='mlp_layer_norm')(x)
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
      The second value is the word table [V, E].
    """
    config = self.config
    embedded, word_table = Embeddings(config, name='embeddings')(batch, train)
    segment_ids = batch.get('segment_ids', jnp.ones(embedded.shape[:2], jnp.int32))
    angles: tuple = (None, None)  # of global and of local layers
    if config.positions == 'rotary':  # positions restart in every packed sequence
      positions = batch.get('position_ids', jnp.arange(embedded.shape[1])[None])
      angles = tuple(
        rotary_angles(positions, config.head_size, theta)
        for theta in (config.rope_theta, config.local_rope_theta)
      )
    inputs = (embedded, segment_ids, angles)
    if config.patterned:
      x, collected = self._patterned(*inputs, train, tuple(capture))
    else:
      x, collected = self._alike(*inputs, self._position_bias(embedded.shape[1]), train, capture)
    out = {'hidden': x}
    if config.norm_position == 'pre':
      out['hidden'] = x = Norm(config, name='final_layer_norm')(x)
    if 'attention' in capture:
      out['attention'] = collected['attention']
    if 'hidden' in capture:
      out['all_hidden'] = jnp.concatenate([embedded[None], collected['hidden'][:-1], x[None]])
    return out, word_table

  def _unroll(self, train) -> int:
    """Layers an iteration of the loop. In training a GPU spends over a fifth of its time on copies
    into and out of the stacked arrays that a loop keeps for the gradient (docs/costs.md)."""
    config = self.config
    return config.unroll or (config.num_layers if train and backend_of_step() == 'gpu' else 1)

  def _position_bias(self, length):
    """The relative position bias [H, L, L] of all layers; None without one."""
    config = self.config
    if not config.relative_buckets:
      return None
    table = nn.Embed(
      config.relative_buckets, config.num_heads, embedding_init=kernel_init(config),
      name='relative',
    )  # fmt: skip
    return table(relative_position_buckets(length, config.relative_buckets)).transpose(2, 0, 1)

  def _alike(self, x, segment_ids, angles, position_bias, train, capture):
    """Runs layers that are all the same: a scan, over one set of weights where they are shared."""
    config, block, unroll = self.config, Block, self._unroll(train)
    if config.remat != 'none':
      # A loop keeps XLA from merging the recomputation with the original; unrolled layers need the
      # (costlier) barrier instead.
      unrolled = unroll >= config.num_layers
      block = nn.remat(block, prevent_cse=unrolled, policy=_REMAT[config.remat])
    shared = config.shared_layers
    layers = nn.scan(
      block, variable_axes={} if shared else {'params': 0},
      variable_broadcast='params' if shared else False,
      split_rngs={'params': not shared, 'dropout': True},
      in_axes=nn.broadcast, length=config.num_layers, unroll=min(unroll, config.num_layers),
    )  # fmt: skip
    stack = layers(config, train, tuple(capture), name='layers')
    return stack(x, segment_ids, angles[0], position_bias)

  def _patterned(self, x, segment_ids, angles, train, capture):
    """Runs layers of several kinds: the first one; a scan over groups of `global_every` layers,
    so that each of a group has a static window; then the rest."""
    config, total = self.config, self.config.num_layers
    every, unroll = config.global_every if config.local_window else 1, self._unroll(train)
    if self.is_initializing():  # as in SelfAttention, which runs apart from this module
      config = dataclasses.replace(config, attention='xla')
    params = self.param('layers', _init_layers, config)
    dropout = train and max(config.hidden_dropout, config.attention_dropout) > 0
    keys = jax.random.split(self.make_rng('dropout'), total) if dropout else None

    def layer(i, x, params, key):  # i: its index, or that of one of its kind
      local = config.local_window > 0 and i % every > 0
      block = Block(
        config, train, capture, config.local_window if local else 0,
        i > 0 or not config.bare_first_layer, parent=None,
      )  # fmt: skip
      rngs = None if key is None else {'dropout': key}
      return block.apply({'params': params}, x, segment_ids, angles[local], rngs=rngs)

    count = (total - 1) // every
    lone = looped = layer
    if config.remat != 'none':
      # XLA merges the recomputation with the original unless a loop or a barrier separates them.
      lone, looped = (
        jax.checkpoint(layer, prevent_cse=barrier, policy=_REMAT[config.remat], static_argnums=0)
        for barrier in (True, unroll > (count - 1) * every)
      )

    def alone(i, x):  # arrays of N - 1 rows have none for the first layer, which reads none
      x, output = lone(i, x, *jax.tree.map(lambda a: a[max(i - total + len(a), 0)], (params, keys)))
      return x, jax.tree.map(lambda a: a[None], output)

    def group(x, rows):
      outputs = []
      for j in range(every):
        x, output = looped(j + 1, x, *jax.tree.map(lambda a: a[j], rows))  # noqa: B023
        outputs.append(output)
      return x, jax.tree.map(lambda *a: jnp.stack(a), *outputs)

    x, output = alone(0, x)
    outputs = [output]
    if count:
      grouped = jax.tree.map(
        lambda a: a[1 - total + len(a) :][: count * every].reshape(count, every, *a.shape[1:]),
        (params, keys),
      )
      x, output = jax.lax.scan(group, x, grouped, unroll=min(-(-unroll // every), count))
      outputs.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), output))
    for i in range(1 + count * every, total):
      x, output = alone(i, x)
      outputs.append(output)
    return x, jax.tree.map(lambda *a: jnp.concatenate(a), *outputs)


def _init_layers(rng: jax.Array, config: EncoderConfig) -> dict:
  """Stacked parameters of all layers: [N, ...], the attention norm [N - 1, D] where the first layer
  has none."""
  block = Block(config, False, parent=None)
  x, segment_ids = jnp.zeros((1, 2, config.hidden_size), config.dtype), jnp.ones((1, 2), jnp.int32)

  def init(key):
    return block.init(key, x, segment_ids, None)['params']

  params = jax.vmap(init)(jax.random.split(rng, config.num_layers))
  if config.bare_first_layer:
    params['attention_layer_norm'] = jax.tree.map(lambda a: a[1:], params['attention_layer_norm'])
  return params
