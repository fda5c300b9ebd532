"""`Bert`: the encoder and the output layers asked for, by name.

A head is a module on top of the encoder's states; `HEADS` is the list of them. Pre-training uses
'mlm' and 'nsp' (Devlin et al. 2018, section 3.1); () gives the bare encoder with its pooler.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bertjax.model.config import EncoderConfig
from bertjax.model.encoder import ACTIVATION, Encoder, LayerNorm, dense

BATCH_KEYS = (
  'input_ids', 'token_type_ids', 'segment_ids', 'position_ids', 'cls_positions',
  'masked_lm_positions', 'masked_lm_ids', 'masked_lm_weights', 'next_sentence_labels',
  'labels', 'example_weights', 'example_ids',
)  # fmt: skip

# What other libraries call our keys, for the error message.
_ALIASES = {
  'attention_mask': "segment_ids (0 = padding, 1 = text: the same numbers)",
  'input_mask': "segment_ids (0 = padding, 1 = text: the same numbers)",
  'input_word_ids': 'input_ids',
  'input_type_ids': 'token_type_ids',
  'next_sentence_label': 'next_sentence_labels',
  'label_ids': 'labels',
}  # fmt: skip


class Pooler(nn.Module):
  """Tanh-projects the [CLS] state."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [CLS] states [B, D] (or [B, S, D]) to sequence states of the same shape."""
    dense_layer = dense(self.config, self.config.hidden_size, 'dense')
    nn.share_scope(self, dense_layer)
    return jnp.tanh(dense_layer(x))


class MlmHead(nn.Module):
  """Dense, GELU, LayerNorm, then the transposed word table and a bias of its own."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, word_table: jax.Array) -> jax.Array:
    """Maps states [B, P, D] and the table [V, D] to float32 logits [B, P, V]."""
    config = self.config
    x = dense(config, config.hidden_size, 'transform')(x)
    x = LayerNorm(config, name='layer_norm')(ACTIVATION[config.activation](x))
    bias = self.param('bias', nn.initializers.zeros, (config.vocab_size,), jnp.float32)
    logits = jnp.einsum(
      'bpd,vd->bpv', x, word_table.astype(x.dtype), preferred_element_type=jnp.float32
    )
    return logits + bias.astype(jnp.float32)


class NspHead(nn.Module):
  """Next sentence or not, from the pooled state; class 0 is "is the next sentence"."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, pooled: jax.Array) -> jax.Array:
    """Maps [B, D] to float32 logits [B, 2]."""
    dense_layer = dense(self.config, 2, 'dense')
    nn.share_scope(self, dense_layer)
    return dense_layer(pooled).astype(jnp.float32)


HEADS = ('mlm', 'nsp')


class Bert(nn.Module):
  """BERT: the encoder, its pooler and `heads`.

  Attributes:
    config: sizes and switches.
    heads: names out of `HEADS`.
    pooler: False leaves the pooler out where nothing reads the pooled state (Hugging Face's
      BertForMaskedLM); the 'nsp' head needs it.
  """

  config: EncoderConfig
  heads: tuple[str, ...] = ('mlm', 'nsp')
  pooler: bool = True

  @nn.compact
  def __call__(self, batch: dict, *, train: bool = False, capture: tuple[str, ...] = ()) -> dict:
    """Runs the model on a batch.

    Args:
      batch: `input_ids` int32 [B, L]; optional `token_type_ids` (default 0), `segment_ids`
        (default 1; 0 is padding), `position_ids` (default 0..L-1), all [B, L];
        `masked_lm_positions` [B, P]; `cls_positions` [B, S] where rows hold S packed sequences.
        Labels and weights may be present and are not read.
      train: dropout on; apply with `rngs={'dropout': key}`.
      capture: 'hidden' and 'attention' add the states and probabilities of every layer.

    Returns:
      'hidden' [B, L, D] (with capture 'hidden': 'all_hidden' [N+1, B, L, D]); 'pooled' [B, D] or
      [B, S, D]; 'mlm_logits' float32 [B, P, V], or [B, L, V] without `masked_lm_positions`;
      'nsp_logits' float32 [B, 2] or [B, S, 2].

    Raises:
      ValueError: for an unknown key, head or capture, or a row longer than the position table.
    """
    self._check(batch, capture)
    ids = batch['input_ids']
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    out, word_table = Encoder(self.config, name='encoder')(
      ids,
      batch.get('token_type_ids', jnp.zeros_like(ids)),
      batch.get('segment_ids', jnp.ones_like(ids)),
      batch.get('position_ids', positions),
      train,
      capture,
    )
    x = out['hidden']
    if self.pooler:
      first = gather(x, batch['cls_positions']) if 'cls_positions' in batch else x[:, 0]
      out['pooled'] = Pooler(self.config, name='pooler')(first)
    if 'mlm' in self.heads:
      masked = gather(x, batch['masked_lm_positions']) if 'masked_lm_positions' in batch else x
      out['mlm_logits'] = MlmHead(self.config, name='mlm')(masked, word_table)
    if 'nsp' in self.heads:
      out['nsp_logits'] = NspHead(self.config, name='nsp')(out['pooled'])
    return out

  def _check(self, batch, capture):
    for key in batch:
      if key not in BATCH_KEYS:
        hint = f'; use {_ALIASES[key]}' if key in _ALIASES else f'; known keys are {BATCH_KEYS}'
        raise ValueError(f'unknown batch key {key!r}{hint}.')
    if 'input_ids' not in batch:
      raise ValueError(f"a batch needs 'input_ids' [B, L], got the keys {tuple(batch)}.")
    length = batch['input_ids'].shape[1]
    if length > self.config.max_positions:
      raise ValueError(
        f'rows may be at most max_positions={self.config.max_positions} tokens long, got {length}.'
      )
    for name, given, known in (('head', self.heads, HEADS),
                               ('capture', capture, ('hidden', 'attention'))):  # fmt: skip
      for item in given:
        if item not in known:
          raise ValueError(f'unknown {name} {item!r}; choose from {known}.')
    if 'nsp' in self.heads and not self.pooler:
      raise ValueError("the 'nsp' head reads the pooled state; leave pooler=True.")


def gather(x: jax.Array, positions: jax.Array) -> jax.Array:
  """Picks rows of x [B, L, D] at positions [B, P]: returns [B, P, D]."""
  return jnp.take_along_axis(x, positions[..., None], axis=1)


def init_params(model: Bert, rng: jax.Array) -> dict:
  """Initialises parameters: a nested dict of arrays, by itself and under jit or eval_shape."""
  ids = jnp.zeros((1, min(8, model.config.max_positions)), jnp.int32)
  return model.init(rng, {'input_ids': ids})['params']
