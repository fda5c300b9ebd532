"""`Bert`: the encoder and the output layers asked for, by name.

A head is a module on top of the encoder's states; `HEADS` is the list of them. Pre-training uses
'mlm' and 'nsp' (Devlin et al. 2018, section 3.1); tasks use 'classification', 'tagging', 'span' and
'choice' (sections 4 and 5.3), with what `config` puts under their linear layer; () gives the bare
encoder with its pooler.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bertjax.model import crf
from bertjax.model.attention import float32_einsum
from bertjax.model.config import HEADS, EncoderConfig, describe_heads
from bertjax.model.encoder import ACTIVATION, Encoder, Norm, dense, drop, kernel_init

BATCH_KEYS = (
  'input_ids', 'token_type_ids', 'segment_ids', 'position_ids', 'cls_positions',
  'masked_lm_positions', 'masked_lm_ids', 'masked_lm_weights', 'next_sentence_labels',
  'labels', 'example_weights', 'example_ids', 'input_embeddings', 'sample_seeds',
)  # fmt: skip

_HIDDEN = ACTIVATION | {'tanh': jnp.tanh}

CAPTURES = ('hidden', 'attention')

# What other libraries call our keys, for the error message.
_ALIASES = {
  'attention_mask': "segment_ids (0 = padding, 1 = text: the same numbers)",
  'input_mask': "segment_ids (0 = padding, 1 = text: the same numbers)",
  'input_word_ids': 'input_ids',
  'input_type_ids': 'token_type_ids',
  'next_sentence_label': 'next_sentence_labels',
  'label_ids': 'labels',
}  # fmt: skip


class MlmHead(nn.Module):
  """Dense to E, activation, normalisation, then the transposed word table and a separate bias; or
  less of it, as the config has it."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, word_table: jax.Array) -> jax.Array:
    """Maps states [B, P, D] and the table [V, E] to float32 logits [B, P, V]."""
    config = self.config
    width, size = config.embedding_width, config.vocab_size
    if config.mlm_transform:
      x = dense(config, width, 'transform', bias=config.linear_bias, output=True)(x)
      # ModernBERT's heads share one activation, whatever that of its layers is.
      activation = config.classifier_hidden if config.classifier_norm else config.activation
      x = Norm(config, name='layer_norm')(_HIDDEN[activation](x))
    if not config.tied_embeddings:
      own = nn.Embed(size, x.shape[-1], embedding_init=kernel_init(config), name='output')
      word_table = own.embedding
    tokens = x.reshape(-1, x.shape[-1])  # XLA CPU would transpose the gradient of [B, P, V]
    logits = float32_einsum('td,vd->tv', tokens, word_table.astype(x.dtype))
    logits = logits.reshape(*x.shape[:-1], size)
    if not config.mlm_bias:
      return logits
    bias = self.param('bias', nn.initializers.zeros, (size,), jnp.float32)
    return logits + bias.astype(jnp.float32)


class OutputLayer(nn.Module):
  """Dropout, then a linear layer: every head but 'mlm'.

  Attributes:
    config: of the encoder.
    features: of the output.
    dropout: before the linear layer.
    hidden: activation of a dense layer before that, normalised with `config.classifier_norm`;
      '' = none.
    hidden_dropout: before the dense layer.
  """

  config: EncoderConfig
  features: int
  dropout: float = 0.0
  hidden: str = ''
  hidden_dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps states [..., D] to float32 logits [..., features]."""
    if self.hidden:
      x = drop(self, x, self.hidden_dropout, train)
      bias = self.config.linear_bias or not self.config.classifier_norm  # EuroBERT's has one
      hidden = dense(self.config, self.config.hidden_size, 'hidden', bias=bias, output=True)
      x = _HIDDEN[self.hidden](hidden(x))
      if self.config.classifier_norm:
        x = Norm(self.config, name='hidden_layer_norm')(x)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    dense_layer = dense(self.config, self.features, 'dense')
    nn.share_scope(self, dense_layer)
    return dense_layer(x).astype(jnp.float32)


class TaskHead(nn.Module):
  """A task's head, as the config has it (paper, table 7).

  The layers that `features` names become one ('weighted_sum' with learnt shares and a learnt scale,
  Peters et al. 2018), BiLSTMs read it, dropout and a linear layer follow. A sequence is read off
  the pooled state; with other features off [CLS], without the pooler; with BiLSTMs off the last
  one's final states, which are the last token's forwards and the first one's backwards. Instead of
  [CLS], which attends to nothing before it, a causal model's heads read the last token.

  Attributes:
    config: of the encoder.
    size: of the output.
    dropout: before the linear layer.
    sequence: reads one state for each sequence, not every token's.
    hidden, hidden_dropout: of `OutputLayer`.
    crf: also holds the parameters of `model.crf`, which the loss and predictions use.
  """

  config: EncoderConfig
  size: int
  dropout: float
  sequence: bool = False
  hidden: str = ''
  hidden_dropout: float = 0.0
  crf: bool = False

  @nn.compact
  def __call__(self, states: jax.Array, pooled: jax.Array | None, batch: dict, train: bool):
    """Maps states [K, B, L, D] to float32 logits [B, L, size], or [B, size] if `sequence`."""
    config = self.config
    if pooled is not None and config.features == 'last' and not config.bilstm:
      x = pooled
    else:
      x = self._mix(states)
      lengths = (batch.get('segment_ids', jnp.ones(x.shape[:2], jnp.int32)) > 0).sum(1)
      for i in range(config.bilstm):
        forward, backward = (
          nn.RNN(nn.OptimizedLSTMCell(
            config.bilstm_size, dtype=jnp.float32, name=f'bilstm_{i}_{direction}'
          ))
          for direction in ('forward', 'backward')
        )  # fmt: skip
        x = jnp.asarray(nn.Bidirectional(forward, backward)(x, seq_lengths=lengths))
      if self.sequence and config.bilstm:
        ends = x[jnp.arange(len(x)), jnp.maximum(lengths - 1, 0)]
        size = config.bilstm_size
        x = jnp.concatenate([ends[:, :size], x[:, 0, size:]], axis=-1)
      elif self.sequence and config.classifier_pooling == 'cls':
        x = sequence_states(x, batch, config)
      elif self.sequence and config.classifier_pooling == 'mean':
        x = mean_states(x, batch).astype(x.dtype)
    if self.crf:
      for name, shape in crf.shapes(self.size).items():
        self.param(name, nn.initializers.zeros, shape, jnp.float32)
    output = OutputLayer(
      config, self.size, self.dropout, self.hidden, self.hidden_dropout, name='output'
    )
    nn.share_scope(self, output)
    logits = output(x, train)
    late = self.sequence and config.classifier_pooling == 'late' and not config.bilstm
    return mean_states(logits, batch) if late else logits

  def _mix(self, states):
    how = self.config.features.partition('_')[0]
    if how == 'concat':
      return jnp.concatenate(tuple(states), axis=-1)
    if how == 'weighted':
      weights = self.param('layer_weights', nn.initializers.zeros, states.shape[:1], jnp.float32)
      scale = self.param('layer_scale', nn.initializers.ones, (), jnp.float32)
      return scale * jnp.einsum('k,kbld->bld', nn.softmax(weights), states)
    return states.sum(0)


class Bert(nn.Module):
  """BERT: the encoder, its pooler and `heads`, a Flax (Linen) module.

  >>> import bertjax, jax, jax.numpy as jnp
  >>> model = bertjax.Bert(bertjax.bert_tiny(vocab_size=100), heads=('mlm',), pooler=False)
  >>> batch = {'input_ids': jnp.array([[2, 7, 8, 3]]), 'segment_ids': jnp.array([[1, 1, 1, 1]])}
  >>> params = model.init(jax.random.key(0), batch)['params']
  >>> model.apply({'params': params}, batch)['mlm_logits'].shape  # [B, L, V]
  (1, 4, 100)

  Attributes:
    config: sizes and switches.
    heads: names out of `HEADS`.
    pooler: False leaves the pooler out where nothing reads the pooled state (Hugging Face's
      BertForMaskedLM); those of `config.pooled_heads` need it.
    num_labels: C, classes of the 'classification' and 'tagging' heads.
  """

  config: EncoderConfig
  heads: tuple[str, ...] = ('mlm', 'nsp')
  pooler: bool = True
  num_labels: int = 2

  @nn.compact
  def __call__(self, batch: dict, *, train: bool = False, capture: tuple[str, ...] = ()) -> dict:
    """Runs the model on a batch.

    Args:
      batch: `input_ids` int32 [B, L], or `input_embeddings` [B, L, E], word embeddings in place of
        the table's rows (attributions, soft prompts); optional `token_type_ids` (default 0),
        `segment_ids` (default 1; 0 is padding), `position_ids` (default 0..L-1), all [B, L];
        `masked_lm_positions` [B, P]; `cls_positions` [B, S] where rows hold S packed sequences.
        Labels and weights may be present and are not read.
      train: dropout on; apply with `rngs={'dropout': key}`.
      capture: 'hidden' and 'attention' add the states and probabilities of every layer.

    Returns:
      'hidden' [B, L, D] (with capture 'hidden': 'all_hidden' [N+1, B, L, D]); 'pooled' [B, D] or
      [B, S, D]; 'mlm_logits' float32 [B, P, V], or [B, L, V] without `masked_lm_positions`;
      'nsp_logits' float32 [B, 2] or [B, S, 2]; 'rtd_logits' float32 [B, L], how likely a token has
      been replaced. Of the tasks' heads, float32:
      'classification_logits' [B, C] or [B, S, C]; 'tagging_logits' [B, L, C], from which
      `crf.viterbi` chooses if `config.crf`; 'span_logits' [B, L, 2], start and end; 'choice_logits'
      [B] or [B, S], the rows of one question consecutive, so that the caller reshapes to
      [questions, choices].

    Raises:
      ValueError: for an unknown key, head or capture, a row longer than the position table, or
        parameters without one of the heads.
    """
    self._check(batch, capture)
    config = self.config
    reading = capture if config.features == 'last' else (*capture, 'hidden')
    out, word_table = Encoder(config, name='encoder')(batch, train and not config.frozen, reading)
    if config.frozen:
      out, word_table = jax.lax.stop_gradient((out, word_table))
    x, layers = out['hidden'], config.feature_layers
    states = out['all_hidden'][layers.start : layers.stop] if 'hidden' in reading else x[None]
    if 'hidden' not in capture:
      out.pop('all_hidden', None)
    if self.pooler:
      pooler = dense(config, config.hidden_size, 'pooler')
      out['pooled'] = jnp.tanh(pooler(sequence_states(x, batch, config)))
    if 'mlm' in self.heads:
      masked = gather(x, batch['masked_lm_positions']) if 'masked_lm_positions' in batch else x
      out['mlm_logits'] = MlmHead(config, name='mlm')(masked, word_table)
    if 'nsp' in self.heads:
      out['nsp_logits'] = OutputLayer(config, 2, name='nsp')(out['pooled'], train)
    if 'rtd' in self.heads:
      layer = OutputLayer(config, 1, hidden=config.activation, name='rtd')
      out['rtd_logits'] = layer(x, train)[..., 0]
    return out | self._task_logits(states, out.get('pooled'), batch, train)

  def _task_logits(self, states, pooled, batch, train):
    config, logits = self.config, {}
    rate = config.hidden_dropout if config.classifier_dropout < 0 else config.classifier_dropout
    sizes = {'classification': self.num_labels, 'tagging': self.num_labels, 'span': 2, 'choice': 1}
    for head in [head for head in sizes if head in self.heads]:
      sequence, hidden = head in ('classification', 'choice'), config.classifier_hidden
      # No dropout in Google's head on spans; DistilBERT's heads on tokens have another one.
      dropout = 0.0 if head == 'span' and not config.classifier_norm else rate
      if hidden == 'relu' and not sequence:
        dropout = config.hidden_dropout
      # RoBERTa, ELECTRA and NeoBERT drop [CLS] before the dense layer too.
      drops_cls = hidden == 'tanh' or (hidden == 'gelu' and config.norm_position == 'post')
      before = drops_cls and head == 'classification'
      layer = TaskHead(
        config, sizes[head], dropout, sequence,
        hidden=hidden if _has_dense(head, config) else '', hidden_dropout=rate if before else 0.0,
        crf=config.crf and head == 'tagging', name=head,
      )  # fmt: skip
      read = pooled if head in config.pooled_heads else None
      logits[f'{head}_logits'] = layer(states, read, batch, train)
    if 'choice' in self.heads:
      logits['choice_logits'] = logits['choice_logits'][..., 0]
    return logits

  def _check(self, batch, capture):
    for key in batch:
      if key not in BATCH_KEYS:
        hint = f'; use {_ALIASES[key]}' if key in _ALIASES else f'; known keys are {BATCH_KEYS}'
        raise ValueError(f'unknown batch key {key!r}{hint}.')
    if ('input_ids' in batch) == ('input_embeddings' in batch):
      raise ValueError(
        "a batch needs 'input_ids' [B, L] or 'input_embeddings' [B, L, E], and not both; got the "
        f'keys {tuple(batch)}.'
      )
    config = self.config
    shape = batch['input_ids' if 'input_ids' in batch else 'input_embeddings'].shape
    if 'input_embeddings' in batch and shape[2:] != (config.embedding_width,):
      width = f'{"embedding" if config.embedding_size else "hidden"}_size={config.embedding_width}'
      raise ValueError(f"'input_embeddings' must be [B, L, {width}], got {shape}.")
    if shape[1] > config.max_positions:
      raise ValueError(
        f'rows may be at most max_positions={config.max_positions} tokens long, got {shape[1]}.'
      )
    if 'cls_positions' in batch and (config.bilstm or config.crf):
      raise ValueError('bilstm and crf read a row as one sequence; give a packed one a row each.')
    for name, wanted, known in (('head', self.heads, HEADS), ('capture', capture, CAPTURES)):
      if unknown := [item for item in wanted if item not in known]:
        raise ValueError(f'unknown {name} {unknown[0]!r}; choose from {known}.')
    reading = [head for head in self.heads if head in config.pooled_heads]
    if reading and not self.pooler:
      raise ValueError(f'the {reading[0]!r} head reads the pooled state; leave pooler=True.')
    if self.num_labels < 1:
      raise ValueError(f'num_labels must be at least 1, got {self.num_labels}.')
    if not self.is_mutable_collection('params'):
      parts = [*self.heads, *(['pooler'] if self.pooler else [])]
      if missing := [part for part in parts if not self.has_variable('params', part)]:
        have = describe_heads(self.variables['params'])
        kind = 'pooler' if missing[0] == 'pooler' else f'{missing[0]} head'
        raise ValueError(f'the parameters have no {kind}; they have {have}.')


def _has_dense(head: str, config: EncoderConfig) -> bool:
  """Whether a task's head has the dense layer that `classifier_hidden` names."""
  of_sequence = head in ('classification', 'choice') and head not in config.pooled_heads
  return of_sequence or config.classifier_norm


def sequence_states(x: jax.Array, batch: dict, config: EncoderConfig) -> jax.Array:
  """The states that stand for sequences: of [CLS], or of a causal model's last tokens."""
  return last_states(x, batch) if config.causal else cls_states(x, batch)


def _tokens_of_sequences(x: jax.Array, batch: dict) -> jax.Array:
  """Bool [B, S, L]: which tokens of x [B, L, C] are of each of the S sequences of a row."""
  segments = batch.get('segment_ids', jnp.ones(x.shape[:2], jnp.int32))
  slots = batch['cls_positions'].shape[1] if 'cls_positions' in batch else 1
  return segments[:, None] == jnp.arange(1, slots + 1)[:, None]


def mean_states(x: jax.Array, batch: dict) -> jax.Array:
  """Means of x [B, L, C] over a sequence's tokens, float32: [B, C], or [B, S, C] where S sequences
  are packed."""
  own = _tokens_of_sequences(x, batch)
  sums = jnp.einsum(
    'bsl,blc->bsc', own.astype(jnp.float32), x.astype(jnp.float32), precision='highest'
  )
  means = sums / jnp.maximum(own.sum(-1), 1)[..., None]
  return means if 'cls_positions' in batch else means[:, 0]


def cls_states(x: jax.Array, batch: dict) -> jax.Array:
  """The [CLS] states of x [B, L, D]: [B, D], or [B, S, D] where S sequences are packed."""
  return gather(x, batch['cls_positions']) if 'cls_positions' in batch else x[:, 0]


def last_states(x: jax.Array, batch: dict) -> jax.Array:
  """The states of x [B, L, D] at the last token of each sequence, [B, D] or [B, S, D]."""
  own = _tokens_of_sequences(x, batch)
  states = gather(x, (own * jnp.arange(x.shape[1])).max(-1))
  return states if 'cls_positions' in batch else states[:, 0]


def gather(x: jax.Array, positions: jax.Array) -> jax.Array:
  """Picks rows of x [B, L, D] at positions [B, P]: returns [B, P, D]."""
  return jnp.take_along_axis(x, positions[..., None], axis=1)


# Of ELECTRA's generator, those of the discriminator: all that Google's code has in one scope.
SHARED_EMBEDDINGS = ('word', 'position', 'token_type', 'layer_norm')


def generator_params(params: dict) -> dict:
  """The parameters of ELECTRA's generator, out of both models' with shared embeddings."""
  generator, embeddings = params['generator'], params['encoder']['embeddings']
  shared = {name: embeddings[name] for name in SHARED_EMBEDDINGS if name in embeddings}
  own = generator['encoder']['embeddings']
  return generator | {'encoder': generator['encoder'] | {'embeddings': shared | own}}


def init_params(model: Bert, rng: jax.Array) -> dict:
  """Initialises parameters: a nested dict of arrays; also under jit or eval_shape."""
  ids = jnp.zeros((1, min(8, model.config.max_positions)), jnp.int32)
  return model.init(rng, {'input_ids': ids})['params']
