"""One table of parameter names: ours, and Hugging Face's for `BertForPreTraining`.

Google's TF1 names follow the same structure. Ours stack all layers along a leading axis and keep
queries, keys and values in one array; theirs hold an array for each layer and projection, and
linear kernels the other way round (out, in).
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from bertjax.model.config import EncoderConfig


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs and where it lies in ours.

  Attributes:
    path: our path, 'encoder/layers/mlp/in/kernel'.
    theirs: their name.
    index: index into our array: () for all of it, (layer,), or (layer, ..., part).
    transpose: their tensor is a matrix (out, in), ours is (in..., out...).
  """

  path: str
  theirs: str
  index: tuple = ()
  transpose: bool = False

  def read(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Their tensor in our slice's shape."""
    return (tensor.T if self.transpose else tensor).reshape(shape)

  def write(self, array: np.ndarray) -> np.ndarray:
    """Our array's slice in their shape: a matrix (out, in), or as it is."""
    part = array[self.index]
    if not self.transpose:
      return np.ascontiguousarray(part.reshape(-1) if self._is_bias else part)
    inputs = self._input_axes(part)
    rows = int(np.prod(part.shape[:inputs]))
    return np.ascontiguousarray(part.reshape(rows, -1).T)

  @property
  def _is_bias(self):
    return self.path.endswith('bias')

  def _input_axes(self, part):
    return 2 if self.path.endswith('attention/out/kernel') else 1


def entries(num_layers: int, heads: tuple[str, ...], pooler: bool) -> Iterator[Entry]:
  """The tensors of a model with these heads, in Hugging Face's names."""
  e = 'encoder/embeddings/'
  yield Entry(e + 'word/embedding', 'bert.embeddings.word_embeddings.weight')
  yield Entry(e + 'position/embedding', 'bert.embeddings.position_embeddings.weight')
  yield Entry(e + 'token_type/embedding', 'bert.embeddings.token_type_embeddings.weight')
  yield from _norm(e + 'layer_norm', 'bert.embeddings.LayerNorm')
  for layer in range(num_layers):
    ours, theirs = 'encoder/layers/', f'bert.encoder.layer.{layer}.'
    for part, name in enumerate(('query', 'key', 'value')):
      their = f'{theirs}attention.self.{name}'
      every = slice(None)
      yield Entry(ours + 'attention/qkv/kernel', their + '.weight', (layer, every, part), True)
      yield Entry(ours + 'attention/qkv/bias', their + '.bias', (layer, part))
    yield from _linear(ours + 'attention/out', theirs + 'attention.output.dense', (layer,))
    yield from _norm(ours + 'attention_layer_norm', theirs + 'attention.output.LayerNorm', (layer,))
    yield from _linear(ours + 'mlp/in', theirs + 'intermediate.dense', (layer,))
    yield from _linear(ours + 'mlp/out', theirs + 'output.dense', (layer,))
    yield from _norm(ours + 'mlp_layer_norm', theirs + 'output.LayerNorm', (layer,))
  if pooler:
    yield from _linear('pooler', 'bert.pooler.dense')
  if 'mlm' in heads:
    yield from _linear('mlm/transform', 'cls.predictions.transform.dense')
    yield from _norm('mlm/layer_norm', 'cls.predictions.transform.LayerNorm')
    yield Entry('mlm/bias', 'cls.predictions.bias')
  if 'nsp' in heads:
    yield from _linear('nsp', 'cls.seq_relationship')


def shapes(config: EncoderConfig, heads: tuple[str, ...], pooler: bool) -> dict[str, tuple]:
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
  return result | {f'{name}/{part}': s for name, s in norms.items() for part in ('scale', 'bias')}


def _linear(ours, theirs, index=()):
  yield Entry(ours + '/kernel', theirs + '.weight', index, True)
  yield Entry(ours + '/bias', theirs + '.bias', index)


def _norm(ours, theirs, index=()):
  yield Entry(ours + '/scale', theirs + '.weight', index)
  yield Entry(ours + '/bias', theirs + '.bias', index)
