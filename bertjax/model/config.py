"""`EncoderConfig`: every size and switch of the encoder, and presets.

Sizes follow Devlin et al. (2018, section 3), the compact models of Turc et al. (2019) and
ModernBERT (Warner et al. 2024).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

ACTIVATIONS = ('gelu', 'gelu_tanh', 'silu', 'relu')
POSITIONS = ('learned', 'rotary')
REMAT_POLICIES = ('none', 'full', 'dots')
POOLINGS = ('cls', 'mean', 'late')
HIDDEN_ACTIVATIONS = ('', 'tanh', 'relu', 'gelu')
DTYPES = ('float32', 'bfloat16')
ATTENTION_IMPLS = ('auto', 'xla', 'cudnn', 'splash')
HEADS = ('mlm', 'nsp', 'rtd', 'classification', 'tagging', 'span', 'choice')
TASK_HEADS = ('classification', 'tagging', 'span', 'choice')
LABELLED_HEADS = ('classification', 'tagging')  # with `num_labels` outputs
# What a task's head reads -> which of the states, of which the embeddings are the first.
FEATURES = {
  'last': slice(-1, None),
  'second_to_last': slice(-2, -1),
  'embeddings': slice(0, 1),
  'sum_last_four': slice(-4, None),
  'weighted_sum_last_four': slice(-4, None),
  'concat_last_four': slice(-4, None),
  'sum_all': slice(1, None),
  'weighted_sum': slice(1, None),
}
# The fields of `EncoderConfig` between the encoder and a task's scores.
HEAD_FIELDS = ('features', 'bilstm', 'bilstm_size', 'crf')


def _field(default, help: str) -> Any:
  """A field of `EncoderConfig` with its help for the command line."""
  return dataclasses.field(default=default, metadata={'help': help})


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """The sizes and switches of an encoder; hashable, so it can be a static argument of `jax.jit`.

  The first block of fields is the model (a checkpoint depends on it); the second is what a task's
  head has besides its linear layer (paper, section 5.3); the third is how it is computed.

  >>> import bertjax
  >>> config = bertjax.EncoderConfig(num_layers=6, hidden_size=512, num_heads=8, mlp_size=2048)
  >>> config.head_size
  64

  Raises:
    ValueError: on construction, if a field is out of range or two fields contradict.
  """

  vocab_size: int = _field(30522, 'entries of the vocabulary (V)')
  hidden_size: int = _field(768, "width of a token's state (D)")
  num_layers: int = _field(12, 'Transformer blocks (N)')
  num_heads: int = _field(12, 'attention heads (H); the head size K is hidden_size / num_heads')
  mlp_size: int = _field(3072, 'width of the feed-forward layer (F), 4 * D in every BERT')
  max_positions: int = _field(
    512, 'maximum input length in tokens; a learned position table has position_offset rows more'
  )
  num_kv_heads: int = _field(
    0, 'heads of keys and values, each shared by num_heads / num_kv_heads queries; 0 = num_heads'
  )
  position_offset: int = _field(
    0, "row of the position table for a sequence's first token; RoBERTa 2, its padding's id + 1"
  )
  relative_buckets: int = _field(
    0, 'buckets of a relative position bias, which all layers share; 0 = none, MPNet 32'
  )
  positions: str = _field(
    'learned', "position embedding: 'learned' (a table), or 'rotary' (queries and keys are rotated)"
  )
  rope_theta: float = _field(
    10_000.0, 'base of the rotary wavelengths; of the global layers where there are local ones'
  )
  local_rope_theta: float = _field(10_000.0, 'base of the rotary wavelengths of local layers')
  local_window: int = _field(
    0, 'tokens that a local layer attends to around each token, half on each side; 0 = all global'
  )
  global_every: int = _field(
    3, 'with local_window: every n-th layer is global, from the first on; 3 in ModernBERT'
  )
  type_vocab_size: int = _field(
    2,
    'entries of the token-type table; BERT 2, RoBERTa 1 (every token has type 0), 0 = no table',
  )
  embedding_size: int = _field(
    0, 'width of the embeddings (E), projected to hidden_size; 0 = hidden_size, ALBERT 128'
  )
  shared_layers: bool = _field(False, 'one set of weights for all layers, as in ALBERT')
  norm: str = _field('layer', "normalisation: 'layer' (LayerNorm) or 'rms' (RMSNorm, without bias)")
  norm_bias: bool = _field(True, 'bias of every LayerNorm')
  norm_position: str = _field(
    'post',
    "normalisation 'post' (after each sub-layer, as BERT) or 'pre' (before it, and a final one)",
  )
  embedding_norm: bool = _field(
    True,
    'normalised embeddings; with norm_position=pre, the first layer has no attention norm then',
  )
  linear_bias: bool = _field(
    True, 'biases of attention, MLP and the dense layers of heads, but not of output layers'
  )
  gated_mlp: bool = _field(
    False, 'gated linear unit: activation(x W) * (x V) in place of activation(x W)'
  )
  activation: str = _field(
    'gelu',
    "activation function: 'gelu' (exact, by erf), 'gelu_tanh' as in Google's later code, 'silu' "
    "or 'relu'",
  )
  hidden_dropout: float = _field(0.1, 'dropout rate after the embeddings and both sub-layers')
  attention_dropout: float = _field(0.1, 'dropout rate of the attention probabilities')
  classifier_dropout: float = _field(
    -1.0, "dropout rate before a task's output layer; -1.0 = hidden_dropout"
  )
  classifier_hidden: str = _field(
    '',
    "activation of a classifier's dense layer on [CLS]: 'tanh' (RoBERTa), 'relu' (DistilBERT), "
    "'gelu' (ELECTRA); '' = it reads the pooled state, as in BERT",
  )
  classifier_norm: bool = _field(
    False,
    'normalisation after the dense layer of a classifier; heads on tokens have both then, as in '
    'ModernBERT',
  )
  classifier_pooling: str = _field(
    'cls',
    "state that a classifier's dense layer reads: 'cls', 'mean' (of the tokens), or 'late' = every "
    "token's, and the logits are averaged (EuroBERT)",
  )
  tied_embeddings: bool = _field(
    True, 'word table as the output layer of masked LM; False = a separate matrix'
  )
  mlm_transform: bool = _field(
    True, 'dense layer, activation and norm before the output layer of masked LM'
  )
  mlm_bias: bool = _field(True, 'bias of the output layer of masked LM')
  layer_norm_eps: float = _field(
    1e-12, "epsilon of normalisation, which always runs in float32; 1e-12 in Google's BERT"
  )
  initializer_range: float = _field(
    0.02, 'standard deviation of initial weights, a normal truncated at two of them'
  )
  scaled_init: bool = _field(
    False, 'initial output projections divided by sqrt(2 * num_layers), as in ModernBERT'
  )
  causal: bool = _field(
    False,
    'causal attention: a token attends to itself and those before it (paper, section 5.1, "LTR")',
  )

  features: str = _field(
    'last',
    "states that a task's head reads: 'last', 'concat_last_four', ... (paper, table 7), or a layer",
  )
  bilstm: int = _field(0, "bidirectional LSTM layers under a task's output layer; 2 in the paper")
  bilstm_size: int = _field(768, 'LSTM units in each direction')
  crf: bool = _field(False, 'conditional random field over the tags of a sentence')

  frozen: bool = _field(False, 'frozen encoder: no gradient and no dropout')
  dtype: str = _field(
    'float32',
    "dtype of activations and matmuls: 'float32' or 'bfloat16'; parameters stay float32",
  )
  attention: str = _field('auto', "attention kernel: 'auto', 'xla', 'cudnn' or 'splash'")
  remat: str = _field(
    'none',
    "rematerialisation: 'none', 'dots' (stores matmuls only) or 'full' (stores no activations)",
  )
  unroll: int = _field(
    0,
    'layers per iteration of the layer loop; num_layers = unrolled completely; 0 = all in a '
    'training step on a GPU, which is faster and takes longer to compile, else 1',
  )

  @property
  def head_size(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def bare_first_layer(self) -> bool:
    """Whether the first layer has no attention norm, since the embeddings are normalised."""
    return self.norm_position == 'pre' and self.embedding_norm

  @property
  def patterned(self) -> bool:
    """Whether layers differ: local and global ones, or a bare first one."""
    return self.local_window > 0 or self.bare_first_layer

  @property
  def embedding_width(self) -> int:
    """E, the width of the embedding tables."""
    return self.embedding_size or self.hidden_size

  @property
  def pooled_heads(self) -> tuple[str, ...]:
    """The heads that read the pooled state; a classifier with a dense layer reads [CLS]."""
    dense_heads = {'': (), 'tanh': ('classification',)}  # RoBERTa and MPNet pool for 'choice'
    own = dense_heads.get(self.classifier_hidden, ('classification', 'choice'))
    return tuple(head for head in ('nsp', 'classification', 'choice') if head not in own)

  @property
  def linear_head(self) -> bool:
    """Whether a task's head is one linear layer, as in other libraries."""
    return self.features == 'last' and not self.bilstm and not self.crf

  @property
  def feature_layers(self) -> range:
    """The layers that a task's head reads, out of 0 (the embeddings) .. num_layers."""
    first = int(self.features) if self.features.isdecimal() else 0
    return range(self.num_layers + 1)[FEATURES.get(self.features, slice(first, first + 1))]

  def __post_init__(self):
    for names, fits, rule in _RULES:
      for name in names.split():
        if not fits(getattr(self, name)):
          raise ValueError(f'{name} must be {rule}, got {getattr(self, name)!r}.')
    if self.hidden_size % self.num_heads:
      raise ValueError(
        f'hidden_size must be a multiple of num_heads, got hidden_size={self.hidden_size}, '
        f'num_heads={self.num_heads}; num_heads={_heads(self.hidden_size)} fits.'
      )
    if self.num_kv_heads and self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_kv_heads must be 0 or divide num_heads={self.num_heads}, got {self.num_kv_heads}.'
      )
    if self.positions == 'rotary' and self.head_size % 2:
      raise ValueError(
        f"positions='rotary' needs heads of an even size, got hidden_size={self.hidden_size} / "
        f'num_heads={self.num_heads} = {self.head_size}.'
      )
    if self.local_window and self.global_every == 1:
      raise ValueError(
        f'local_window={self.local_window} needs local layers, and global_every=1 makes all '
        'global; set global_every=3, or local_window=0.'
      )
    for name in ('position_offset', 'relative_buckets'):
      if self.positions == 'rotary' and getattr(self, name):
        raise ValueError(
          f"{name}={getattr(self, name)} needs positions='learned', got 'rotary'; set {name}=0."
        )
    for name in ('shared_layers', 'relative_buckets'):
      if self.patterned and getattr(self, name):
        raise ValueError(
          f'{name}={getattr(self, name)} needs layers that are all the same, got local_window='
          f'{self.local_window}, norm_position={self.norm_position!r}.'
        )
    if self.positions != 'rotary' and self.rope_theta != type(self).rope_theta:
      raise ValueError(
        f"rope_theta={self.rope_theta} needs positions='rotary', got {self.positions!r}."
      )
    if not self.classifier_hidden and (self.classifier_norm or self.classifier_pooling != 'cls'):
      raise ValueError(
        f'classifier_norm={self.classifier_norm} and classifier_pooling='
        f"{self.classifier_pooling!r} need a dense layer; set classifier_hidden='gelu', or False "
        "and 'cls' for the pooled state."
      )
    if self.tied_embeddings and not self.mlm_transform and not self.mlm_bias:
      raise ValueError(
        'tied_embeddings=True leaves a masked-LM head without parameters where mlm_transform and '
        'mlm_bias are False; set one of the three otherwise.'
      )
    if self.features not in FEATURES and not (self.features.isdecimal() and self.feature_layers):
      raise ValueError(
        f'features must be one of {tuple(FEATURES)} or a layer from 0 (the embeddings) to '
        f'{self.num_layers}, got {self.features!r}.'
      )
    if 'last_four' in self.features and self.num_layers < 4:
      raise ValueError(f'features={self.features!r} needs 4 layers, got {self.num_layers}.')


# Fields, whether a value fits, and the rule in words.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
  ('vocab_size hidden_size num_layers num_heads mlp_size max_positions global_every bilstm_size',
   lambda size: size >= 1, 'at least 1'),
  ('hidden_dropout attention_dropout', lambda rate: 0 <= rate <= 0.99, 'in [0, 0.99]'),
  ('classifier_dropout', lambda rate: rate == -1 or 0 <= rate < 1,
   'in [0, 1), or -1.0 to be hidden_dropout'),
  ('layer_norm_eps initializer_range', lambda x: 0 < x < 1, 'above 0 and below 1'),
  ('bilstm', lambda layers: layers >= 0, '0 (none) or a number of layers'),
  ('relative_buckets', lambda count: count == 0 or (count >= 8 and count % 4 == 0),
   '0 (none) or a multiple of 4 from 8 on'),
  ('classifier_pooling', POOLINGS.__contains__, f'one of {POOLINGS}'),
  ('classifier_hidden', HIDDEN_ACTIVATIONS.__contains__, f'one of {HIDDEN_ACTIVATIONS}'),
  ('type_vocab_size position_offset embedding_size num_kv_heads unroll',
   lambda size: size >= 0, 'at least 0'),
  ('local_window', lambda tokens: tokens >= 0 and tokens % 2 == 0, '0 or an even number of tokens'),
  ('rope_theta local_rope_theta', lambda theta: 0 < theta < float('inf'), 'above 0 and finite'),
  ('positions', POSITIONS.__contains__, f'one of {POSITIONS}'),
  ('norm', ('layer', 'rms').__contains__, "'layer' or 'rms'"),
  ('norm_position', ('post', 'pre').__contains__, "'post' or 'pre'"),
  ('activation', ACTIVATIONS.__contains__, f'one of {ACTIVATIONS}'),
  ('remat', REMAT_POLICIES.__contains__, f'one of {REMAT_POLICIES}'),
  ('attention', ATTENTION_IMPLS.__contains__, f'one of {ATTENTION_IMPLS}'),
  ('dtype', DTYPES.__contains__, f'one of {DTYPES}'),
)  # fmt: skip


def describe_heads(parts) -> str:
  """The heads among a model's parts, for a message: 'the heads mlm, nsp'."""
  heads = [head for head in HEADS if head in parts]
  return f'the heads {", ".join(heads)}' if heads else 'no heads, only the bare encoder'


def _bert(layers: int, width: int, changes: dict) -> EncoderConfig:
  """A preset with some fields changed; heads and MLP follow `hidden_size` unless given."""
  sizes: dict[str, Any] = {'num_layers': layers, 'hidden_size': width} | changes
  width = sizes['hidden_size']
  defaults: dict[str, Any] = {'num_heads': _heads(width), 'mlp_size': 4 * width}
  return EncoderConfig(**defaults | sizes)


def _heads(width: int) -> int:
  """Heads of 64, as in every released BERT, or fewer and wider where 64 does not divide `width`."""
  return next((h for h in range(width // 64, 1, -1) if width % h == 0), 1)


def bert_tiny(**changes) -> EncoderConfig:
  """2 layers, 128 wide, 4.4 M parameters (Turc et al. 2019).

  >>> import bertjax
  >>> bertjax.bert_tiny(vocab_size=8192).num_heads
  2

  Args:
    **changes: fields of `EncoderConfig` that differ; heads and MLP follow `hidden_size`.
  """
  return _bert(2, 128, changes)


def bert_mini(**changes) -> EncoderConfig:
  """4 layers, 256 wide, 11.3 M parameters (Turc et al. 2019).

  >>> import bertjax
  >>> bertjax.bert_mini().mlp_size
  1024

  Args:
    **changes: fields of `EncoderConfig` that differ; heads and MLP follow `hidden_size`.
  """
  return _bert(4, 256, changes)


def bert_small(**changes) -> EncoderConfig:
  """4 layers, 512 wide, 29 M parameters (Turc et al. 2019).

  >>> import bertjax
  >>> bertjax.bert_small(hidden_size=256).num_heads
  4

  Args:
    **changes: fields of `EncoderConfig` that differ; heads and MLP follow `hidden_size`.
  """
  return _bert(4, 512, changes)


def bert_medium(**changes) -> EncoderConfig:
  """8 layers, 512 wide, 42 M parameters (Turc et al. 2019).

  >>> import bertjax
  >>> bertjax.bert_medium(max_positions=1024).num_layers
  8

  Args:
    **changes: fields of `EncoderConfig` that differ; heads and MLP follow `hidden_size`.
  """
  return _bert(8, 512, changes)


def bert_base(**changes) -> EncoderConfig:
  """12 layers, 768 wide, 110 M parameters (Devlin et al. 2018).

  >>> import bertjax
  >>> bertjax.bert_base() == bertjax.EncoderConfig()
  True

  Args:
    **changes: fields of `EncoderConfig` that differ; heads and MLP follow `hidden_size`.
  """
  return _bert(12, 768, changes)


def bert_large(**changes) -> EncoderConfig:
  """24 layers, 1024 wide, 336 M parameters (Devlin et al. 2018).

  >>> import bertjax
  >>> bertjax.bert_large(dtype='bfloat16').head_size
  64

  Args:
    **changes: fields of `EncoderConfig` that differ; heads and MLP follow `hidden_size`.
  """
  return _bert(24, 1024, changes)


# What the released sizes of ModernBERT share; Ettin and mmBERT have other sizes and vocabularies.
_MODERNBERT: dict[str, Any] = {
  'vocab_size': 50368, 'max_positions': 8192, 'positions': 'rotary', 'rope_theta': 160_000.0,
  'local_window': 128, 'type_vocab_size': 0, 'norm_bias': False, 'norm_position': 'pre',
  'linear_bias': False, 'gated_mlp': True, 'hidden_dropout': 0.0, 'attention_dropout': 0.0,
  'layer_norm_eps': 1e-5, 'scaled_init': True, 'classifier_hidden': 'gelu', 'classifier_norm': True,
}  # fmt: skip


def _modernbert(layers: int, width: int, mlp: int, changes: dict) -> EncoderConfig:
  sizes: dict[str, Any] = {'num_layers': layers, 'hidden_size': width, 'mlp_size': mlp} | changes
  return EncoderConfig(**{'num_heads': _heads(sizes['hidden_size'])} | _MODERNBERT | sizes)


def modernbert_base(**changes) -> EncoderConfig:
  """22 layers, 768 wide, 149 M parameters, 8,192 positions (Warner et al. 2024).

  >>> import bertjax
  >>> bertjax.modernbert_base(num_layers=4, hidden_size=256).num_heads
  4

  Args:
    **changes: fields of `EncoderConfig` that differ; heads follow `hidden_size`.
  """
  return _modernbert(22, 768, 1152, changes)


def modernbert_large(**changes) -> EncoderConfig:
  """28 layers, 1024 wide, 395 M parameters, 8,192 positions (Warner et al. 2024).

  >>> import bertjax
  >>> bertjax.modernbert_large().local_window
  128

  Args:
    **changes: fields of `EncoderConfig` that differ; heads follow `hidden_size`.
  """
  return _modernbert(28, 1024, 2624, changes)


def roberta_base(**changes) -> EncoderConfig:
  """RoBERTa: BERT-base without next-sentence prediction, 125 M parameters (Liu et al. 2019).

  >>> import bertjax
  >>> bertjax.roberta_base().vocab_size
  50265

  Args:
    **changes: fields of `EncoderConfig` that differ; `position_offset` is the id of the tokenizer's
      padding token + 1.
  """
  switches = {'vocab_size': 50265, 'position_offset': 2, 'type_vocab_size': 1,
              'layer_norm_eps': 1e-5, 'classifier_hidden': 'tanh'}  # fmt: skip
  return _bert(12, 768, switches | changes)


def albert_base(**changes) -> EncoderConfig:
  """ALBERT v2: 12 layers that share their weights, 12 M parameters (Lan et al. 2020).

  >>> import bertjax
  >>> bertjax.albert_base().shared_layers
  True

  Args:
    **changes: fields of `EncoderConfig` that differ; heads and MLP follow `hidden_size`.
  """
  switches = {'vocab_size': 30000, 'embedding_size': 128, 'shared_layers': True,
              'activation': 'gelu_tanh', 'hidden_dropout': 0.0, 'attention_dropout': 0.0,
              'classifier_dropout': 0.1}  # fmt: skip
  return _bert(12, 768, switches | changes)


def electra_small(**changes) -> EncoderConfig:
  """ELECTRA-small: 12 layers, 256 wide, 14 M parameters (Clark et al. 2020).

  >>> import bertjax
  >>> bertjax.electra_small().embedding_size
  128

  Args:
    **changes: fields of `EncoderConfig` that differ; heads and MLP follow `hidden_size`.
  """
  return _bert(12, 256, {'embedding_size': 128, 'classifier_hidden': 'gelu'} | changes)


PRESETS = {
  'tiny': bert_tiny,
  'mini': bert_mini,
  'small': bert_small,
  'medium': bert_medium,
  'base': bert_base,
  'large': bert_large,
  'modernbert_base': modernbert_base,
  'modernbert_large': modernbert_large,
  'roberta_base': roberta_base,
  'albert_base': albert_base,
  'electra_small': electra_small,
}
