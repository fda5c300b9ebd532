"""One table of parameter names: ours, and those of Hugging Face, Google's TF1 code and former Flax.

Ours stack all layers along a leading axis and keep queries, keys and values in one array; theirs
hold an array for each layer and projection. `families` has Hugging Face's module names; the two
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

from bertjax.interop import families
from bertjax.interop.family import Family
from bertjax.model.config import HEADS, TASK_HEADS, EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.model.lora import Matrix

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
# Ours that hold several matrices of theirs -> these, in order.
_FUSED = {'qkv': ('query', 'key', 'value'), 'kv': ('key', 'value'), 'gated_in': ('gate', 'up')}
_OWN = 'bertjax'  # the module of tensors that no other library has


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs, and its path in ours. Styles: 'huggingface', 'google', 'flax'."""

  path: str  # our path, 'encoder/layers/mlp/in/kernel'
  module: str  # Hugging Face's module that holds it, 'bert.encoder.layer.0.intermediate.dense'
  index: tuple = ()  # index into our array: () for all of it, (layer,), or (layer, ..., part)
  interleaved: bool = False  # see `Family`

  @property
  def kind(self) -> str:
    kind = self.path.rsplit('/', 1)[1]
    return 'shift' if self.path.endswith('layer_norm/bias') else kind

  @property
  def layer(self) -> int | None:
    """Its row of our array where that stacks layers."""
    return self.index[0] if self.index and isinstance(self.index[0], int) else None

  @property
  def matrix(self) -> str:
    """Our name of a matrix, 'encoder/layers/attention/query' also where 'qkv' holds it."""
    parent, _, name = self.path.rpartition('/')[0].rpartition('/')
    part = _FUSED[name][self.index[-1]] if len(self.index) > 1 else name
    return f'{parent}/{part}'.lstrip('/')

  def name(self, style: str) -> str:
    """Their name, or ours where they have none."""
    if self.module == _OWN:
      return f'{_OWN}.{self.path.replace("/", ".")}'
    module = self._google_module if style == 'google' else self.module
    if style == 'google' and module in _GOOGLE_OUTPUTS:
      return _GOOGLE_OUTPUTS[module] + ('_bias' if self.kind == 'bias' else '_weights')
    if style != 'huggingface':
      module = module.replace('.', '/')
    if style == 'google':
      module = re.sub(r'layer/(\d+)', r'layer_\1', module)
    return module + _ENDINGS[self.kind][style]

  def read(self, tensor: np.ndarray, shape: tuple[int, ...], style: str) -> np.ndarray:
    """Their tensor in our slice's shape."""
    tensor = tensor.T if self._transposed(style) else tensor
    if self.interleaved:
      inputs, _, heads, size = shape
      tensor = _pairs_to_halves(tensor.reshape(inputs, heads, 3, size)).swapaxes(1, 2)
    return tensor.reshape(shape)

  def write(self, array: np.ndarray, style: str) -> np.ndarray:
    """Our array's slice in their shape: a vector, or a matrix as their style has it."""
    part = array[self.index]
    if self.interleaved:
      part = _pairs_to_halves(part.swapaxes(1, 2), back=True)
    if self.kind == 'kernel':
      inputs = 2 if self.path.endswith('attention/out/kernel') else 1
      part = part.reshape(int(np.prod(part.shape[:inputs])), -1)
    elif self.kind == 'bias':
      part = part.reshape(-1)
    return np.ascontiguousarray(part.T if self._transposed(style) else part)

  def _transposed(self, style):
    """Theirs is (out, in), ours (in..., out...)."""
    google_output = style == 'google' and self._google_module in _GOOGLE_OUTPUTS
    return self.kind == 'kernel' and (style == 'huggingface' or google_output)

  @property
  def _google_module(self):
    return families.GOOGLE_ALBERT.get(self.module, self.module)


def _pairs_to_halves(x: np.ndarray, back: bool = False) -> np.ndarray:
  """Reorders the queries and keys of x [D, H, 3, K]: the two elements that a rotary position turns
  together are neighbours in theirs, and half a head apart in ours."""
  x, (*rows, _, size) = x.copy(), x.shape
  split = (2, size // 2) if back else (size // 2, 2)
  x[..., :2, :] = x[..., :2, :].reshape(*rows, 2, *split).swapaxes(-1, -2).reshape(*rows, 2, size)
  return x


def entries(config: EncoderConfig, heads: tuple[str, ...], pooler: bool) -> Iterator[Entry]:
  """The tensors of a model with these heads."""
  family, paths = families.family_of(config), shapes(config, heads, pooler)
  for path in sorted(paths, key=lambda path: '/word/' not in path):  # messages name the first
    yield from _entries(path, paths[path], config, family)


def head_entries(head: str, config: EncoderConfig) -> Iterator[Entry]:
  """The tensors of one head, or of the pooler."""
  family = families.family_of(config)
  for path, shape in shapes(config, HEADS, True).items():
    if path.startswith(f'{head}/'):
      yield from _entries(path, shape, config, family)


def matrices(config: EncoderConfig, pooler: bool) -> dict[str, tuple[Matrix, str]]:
  """The matrices of an encoder and its pooler by our name, as transformers has them: (where it is,
  the name of their module in the first layer).

  >>> from bertjax.interop import mapping
  >>> from bertjax.model.config import bert_tiny
  >>> matrix, module = mapping.matrices(bert_tiny(), False)['encoder/layers/attention/query']
  >>> matrix.kernel, matrix.shape, module
  ('encoder/layers/attention/qkv', (2, 128, 128), 'bert.encoder.layer.0.attention.self.query')
  """
  found, all_shapes = {}, shapes(config, (), pooler)
  for entry in entries(config, (), pooler):
    if entry.kind != 'kernel' or entry.module == _OWN or entry.matrix in found:
      continue
    shape, index = all_shapes[entry.path], entry.index
    sides = entry.write(np.broadcast_to(np.float32(0), shape), 'google').shape
    layers = shape[:1] if entry.layer is not None else ()
    index = (slice(None), *index[1:]) if layers and index[1:] else index[1:] and index
    kernel = entry.path.removesuffix('/kernel')
    found[entry.matrix] = Matrix(kernel, index, (*layers, *sides)), entry.module
  return found


def _entries(path: str, shape, config: EncoderConfig, family: Family) -> Iterator[Entry]:
  """The tensors of theirs that are one array of ours."""
  module, kind = path.rsplit('/', 1)
  part = path.partition('/')[0]
  names: list[tuple[str | None, tuple]] = [(family.module(module), ())]
  if part in TASK_HEADS and not config.linear_head:
    # Under their names, another library would take the linear layer for the complete head.
    names = [(None, ())]
  elif parts := module not in family.modules and _FUSED.get(module.rpartition('/')[2]):
    before = (slice(None),) if kind == 'kernel' else ()
    parent = module.rpartition('/')[0]
    names = [(family.module(f'{parent}/{name}'), (*before, i)) for i, name in enumerate(parts)]
  for name, index in names:
    if name is None:
      yield Entry(path, _OWN)
    elif '{}' in name:
      first = config.num_layers - shape[0]  # 1 where the first layer has no such tensor
      for layer in range(first, config.num_layers):
        mixed = family.interleaved and module.endswith('/qkv')
        yield Entry(path, name.format(layer), (layer - first, *index), mixed)
    else:
      yield Entry(path, name, index)


def shapes(
  config: EncoderConfig, heads: tuple[str, ...], pooler: bool, num_labels: int = 2
) -> Mapping[str, tuple[int, ...]]:
  """Shapes of our parameters by path, for a model with these heads; computes nothing."""
  parts = ('encoder', *heads, *(('pooler',) if pooler else ()))
  found = _shapes(config, num_labels)
  return {path: shape for path, shape in found.items() if path.partition('/')[0] in parts}


@functools.cache
def _shapes(config, num_labels) -> Mapping[str, tuple[int, ...]]:
  """Those of a model with all heads, which takes a moment to trace."""
  model = Bert(config, HEADS, True, num_labels)
  tree = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return types.MappingProxyType({path: leaf.shape for path, leaf in flat.items()})
