"""One table of parameter names: ours, and those of Hugging Face, Google's TF1 code and former Flax.

Ours stack all layers along a leading axis and keep queries, keys and values in one array; theirs
hold an array for each layer and projection. The table has Hugging Face's module names; the two
other formats name the same tensors by rule.
"""

import dataclasses
import functools
import re
import types
from collections.abc import Iterator, Mapping

import flax.traverse_util
import jax
import numpy as np

from bertjax.model.config import POOLED_HEADS, EncoderConfig
from bertjax.model.heads import Bert, init_params

# What a tensor is -> how its name ends in Hugging Face's, Google's and the former Flax format.
_ENDINGS = {
  'kernel': {'huggingface': '.weight', 'google': '/kernel', 'flax': '/kernel'},
  'bias': {'huggingface': '.bias', 'google': '/bias', 'flax': '/bias'},
  'embedding': {'huggingface': '.weight', 'google': '', 'flax': '/embedding'},
  'scale': {'huggingface': '.weight', 'google': '/gamma', 'flax': '/scale'},
  'shift': {'huggingface': '.bias', 'google': '/beta', 'flax': '/bias'},
}
# Google's output layers are separate variables, and their matrices are (out, in).
_GOOGLE_OUTPUTS = {
  'cls.predictions': 'cls/predictions/output',
  'cls.seq_relationship': 'cls/seq_relationship/output',
  'classifier': 'output',
  'qa_outputs': 'cls/squad/output',
}
_MODULES = {'nsp': 'cls.seq_relationship', 'span': 'qa_outputs', 'classification': 'classifier',
            'tagging': 'classifier', 'choice': 'classifier'}  # fmt: skip
_LAYER = {
  'attention/out': 'attention.output.dense',
  'attention_layer_norm': 'attention.output.LayerNorm',
  'mlp/in': 'intermediate.dense',
  'mlp/out': 'output.dense',
  'mlp_layer_norm': 'output.LayerNorm',
}
_OWN = 'bertjax'  # the module of tensors that no other library has


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs, and its path in ours. Styles: 'huggingface', 'google', 'flax'."""

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
  yield from _module(e + 'layer_norm', 'bert.embeddings.LayerNorm')
  for layer in range(config.num_layers):
    ours, theirs = 'encoder/layers/', f'bert.encoder.layer.{layer}.'
    for part, name in enumerate(('query', 'key', 'value')):
      module = f'{theirs}attention.self.{name}'
      yield Entry(ours + 'attention/qkv/kernel', module, (layer, slice(None), part))
      yield Entry(ours + 'attention/qkv/bias', module, (layer, part))
    for part, name in _LAYER.items():
      yield from _module(ours + part, theirs + name, (layer,))
  if pooler:
    yield from _module('pooler', 'bert.pooler.dense')
  for head in heads:
    yield from head_entries(head, config)


def head_entries(head: str, config: EncoderConfig) -> Iterator[Entry]:
  """The tensors of one head."""
  if head == 'mlm':
    yield Entry('mlm/bias', 'cls.predictions')
    yield from _module('mlm/transform', 'cls.predictions.transform.dense')
    yield from _module('mlm/layer_norm', 'cls.predictions.transform.LayerNorm')
  elif head == 'nsp' or config.linear_head:
    yield from _module(head, _MODULES[head])
  else:  # under their names, another library would take the linear layer for the complete head
    for path in shapes(config, (head,), head in POOLED_HEADS):
      if path.startswith(f'{head}/'):
        yield Entry(path, _OWN)


@functools.cache
def shapes(
  config: EncoderConfig, heads: tuple[str, ...], pooler: bool, num_labels: int = 2
) -> Mapping[str, tuple[int, ...]]:
  """Shapes of our parameters by path, for a model with these heads; computes nothing."""
  model = Bert(config, heads, pooler, num_labels)
  tree = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return types.MappingProxyType({path: leaf.shape for path, leaf in flat.items()})


def _module(ours: str, theirs: str, index=()) -> Iterator[Entry]:
  """The two tensors of a linear layer or LayerNorm."""
  yield Entry(f'{ours}/{"scale" if theirs.endswith("LayerNorm") else "kernel"}', theirs, index)
  yield Entry(f'{ours}/bias', theirs, index)
