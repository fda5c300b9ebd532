"""One table of parameter names: ours, and those of Hugging Face, Google's TF1 code and former Flax.

Ours stack all layers along a leading axis and keep queries, keys and values in one array; theirs
hold an array for each layer and projection. The table has Hugging Face's module names; the two
other formats name the same tensors by rule.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from bertjax.model.config import EncoderConfig

# What a tensor is -> how its name ends in Hugging Face's, Google's and the former Flax format.
_ENDINGS = {
  'kernel': {'huggingface': '.weight', 'google': '/kernel', 'flax': '/kernel'},
  'bias': {'huggingface': '.bias', 'google': '/bias', 'flax': '/bias'},
  'embedding': {'huggingface': '.weight', 'google': '', 'flax': '/embedding'},
  'scale': {'huggingface': '.weight', 'google': '/gamma', 'flax': '/scale'},
  'shift': {'huggingface': '.bias', 'google': '/beta', 'flax': '/bias'},
}
# Google's output layers are variables of their own, and their matrices are (out, in).
_GOOGLE_OUTPUTS = {
  'cls.predictions': 'cls/predictions/output',
  'cls.seq_relationship': 'cls/seq_relationship/output',
  'classifier': 'output',
  'qa_outputs': 'cls/squad/output',
}
_MODULES = {'nsp': 'cls.seq_relationship', 'span': 'qa_outputs', 'classification': 'classifier',
            'tagging': 'classifier', 'choice': 'classifier'}  # fmt: skip
_OWN = 'bertjax'  # the module of tensors that no other library has


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs, and where it lies in ours. Styles: 'huggingface', 'google', 'flax'."""

  path: str  # our path, 'encoder/layers/mlp/in/kernel'
  module: str  # Hugging Face's module that holds it, 'bert.encoder.layer.0.intermediate.dense'
  index: tuple = ()  # index into our array: () for all of it, (layer,), or (layer, ..., part)

  @property
  def kind(self) -> str:
    kind = self.path.rsplit('/', 1)[1]
    return 'shift' if kind == 'bias' and 'LayerNorm' in self.module else kind

  def name(self, style: str) -> str:
    """Their name, or ours where they have none."""
    if self.module == _OWN:
      return f'{_OWN}.{self.path.replace("/", ".")}'
    if style == 'google' and self.module in _GOOGLE_OUTPUTS:
      return _GOOGLE_OUTPUTS[self.module] + ('_bias' if self.kind == 'bias' else '_weights')
    module = self.module
    if style != 'huggingface':
      module = module.replace('.', '/')
    if style == 'google':
      module = re.sub(r'layer/(\d+)', r'layer_\1', module)
    return module + _ENDINGS[self.kind][style]

  def read(self, tensor: np.ndarray, shape: tuple[int, ...], style: str) -> np.ndarray:
    """Their tensor in our slice's shape."""
    return (tensor.T if self._transposed(style) else tensor).reshape(shape)

  def write(self, array: np.ndarray, style: str) -> np.ndarray:
    """Our array's slice in their shape: a vector, or a matrix as their style has it."""
    part = array[self.index]
    if self.kind == 'kernel':
      inputs = 2 if self.path.endswith('attention/out/kernel') else 1
      part = part.reshape(int(np.prod(part.shape[:inputs])), -1)
    elif self.kind == 'bias':
      part = part.reshape(-1)
    return np.ascontiguousarray(part.T if self._transposed(style) else part)

  def _transposed(self, style):
    """Theirs is (out, in), ours (in..., out...)."""
    outputs_first = style == 'huggingface' or (style == 'google' and self.module in _GOOGLE_OUTPUTS)
    return self.kind == 'kernel' and outputs_first


def entries(config: EncoderConfig, heads: tuple[str, ...], pooler: bool) -> Iterator[Entry]:
  """The tensors of a model with these heads."""
  e = 'encoder/embeddings/'
  for table in ('word', 'position', 'token_type'):
    yield Entry(f'{e}{table}/embedding', f'bert.embeddings.{table}_embeddings')
  yield from _norm(e + 'layer_norm', 'bert.embeddings.LayerNorm')
  for layer in range(config.num_layers):
    ours, theirs = 'encoder/layers/', f'bert.encoder.layer.{layer}.'
    for part, name in enumerate(('query', 'key', 'value')):
      module = f'{theirs}attention.self.{name}'
      yield Entry(ours + 'attention/qkv/kernel', module, (layer, slice(None), part))
      yield Entry(ours + 'attention/qkv/bias', module, (layer, part))
    yield from _linear(ours + 'attention/out', theirs + 'attention.output.dense', (layer,))
    yield from _norm(ours + 'attention_layer_norm', theirs + 'attention.output.LayerNorm', (layer,))
    yield from _linear(ours + 'mlp/in', theirs + 'intermediate.dense', (layer,))
    yield from _linear(ours + 'mlp/out', theirs + 'output.dense', (layer,))
    yield from _norm(ours + 'mlp_layer_norm', theirs + 'output.LayerNorm', (layer,))
  if pooler:
    yield from _linear('pooler', 'bert.pooler.dense')
  for head in heads:
    yield from head_entries(head, config)


def head_entries(head: str, config: EncoderConfig) -> Iterator[Entry]:
  """The tensors of one head."""
  if head == 'mlm':
    yield Entry('mlm/bias', 'cls.predictions')
    yield from _linear('mlm/transform', 'cls.predictions.transform.dense')
    yield from _norm('mlm/layer_norm', 'cls.predictions.transform.LayerNorm')
  elif head == 'nsp' or config.linear_head:
    yield from _linear(head, _MODULES[head])
  else:  # under theirs, another library would take the linear layer for the whole head
    for path in _task_head_shapes(config, head, 1):
      yield Entry(path, _OWN)


def shapes(
  config: EncoderConfig, heads: tuple[str, ...], pooler: bool, num_labels: int = 2
) -> dict[str, tuple]:
  """Shapes of our parameters by path, for a model with these heads."""
  c = config
  n, d, h, k, f = c.num_layers, c.hidden_size, c.num_heads, c.head_size, c.mlp_size
  layers = 'encoder/layers/'
  result = {
    'encoder/embeddings/word/embedding': (c.vocab_size, d),
    'encoder/embeddings/position/embedding': (c.max_positions, d),
    'encoder/embeddings/token_type/embedding': (c.type_vocab_size, d),
    layers + 'attention/qkv/kernel': (n, d, 3, h, k),
    layers + 'attention/qkv/bias': (n, 3, h, k),
    layers + 'attention/out/kernel': (n, h, k, d),
    layers + 'attention/out/bias': (n, d),
    layers + 'mlp/in/kernel': (n, d, f),
    layers + 'mlp/in/bias': (n, f),
    layers + 'mlp/out/kernel': (n, f, d),
    layers + 'mlp/out/bias': (n, d),
  }
  norms = {'encoder/embeddings/layer_norm': (d,)}
  norms |= {layers + name: (n, d) for name in ('attention_layer_norm', 'mlp_layer_norm')}
  if pooler:
    result |= {'pooler/kernel': (d, d), 'pooler/bias': (d,)}
  if 'mlm' in heads:
    result |= {'mlm/transform/kernel': (d, d), 'mlm/transform/bias': (d,)}
    result['mlm/bias'] = (c.vocab_size,)
    norms['mlm/layer_norm'] = (d,)
  if 'nsp' in heads:
    result |= {'nsp/kernel': (d, 2), 'nsp/bias': (2,)}
  for head in set(heads) - {'mlm', 'nsp'}:
    result |= _task_head_shapes(c, head, {'span': 2, 'choice': 1}.get(head, num_labels))
  return result | {f'{name}/{part}': s for name, s in norms.items() for part in ('scale', 'bias')}


def _task_head_shapes(config, head, size) -> dict[str, tuple]:
  result, count = {}, len(config.feature_layers)
  width = config.hidden_size * (count if config.features.startswith('concat') else 1)
  if config.features.startswith('weighted'):
    result |= {'layer_weights': (count,), 'layer_scale': ()}
  for layer in range(config.bilstm):
    for lstm in (f'bilstm_{layer}_forward/', f'bilstm_{layer}_backward/'):
      for gate in 'ifgo':
        result[f'{lstm}i{gate}/kernel'] = (width, config.bilstm_size)
        result[f'{lstm}h{gate}/kernel'] = (config.bilstm_size, config.bilstm_size)
        result[f'{lstm}h{gate}/bias'] = (config.bilstm_size,)
    width = 2 * config.bilstm_size
  if head == 'tagging' and config.crf:
    result |= {'transitions': (size, size), 'start': (size,), 'end': (size,)}
  result |= {'kernel': (width, size), 'bias': (size,)}
  return {f'{head}/{name}': shape for name, shape in result.items()}


def _linear(ours, module, index=()):
  yield Entry(ours + '/kernel', module, index)
  yield Entry(ours + '/bias', module, index)


def _norm(ours, module, index=()):
  yield Entry(ours + '/scale', module, index)
  yield Entry(ours + '/bias', module, index)
