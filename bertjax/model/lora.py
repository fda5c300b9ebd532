"""Low-rank adapters (LoRA, Hu et al. 2021): trained matrices that are added to frozen ones.

A matrix W [D, F] becomes W + scale * A B, with A [D, r] and B [r, F]. Adapters turn parameters into
parameters, so no module of the model knows them. Those of stacked layers are stacked as well.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp


class Matrix(NamedTuple):
  """Where a matrix is among the parameters.

  Attributes:
    kernel: path of the module whose kernel it is or is in, 'encoder/layers/attention/qkv'.
    part: its place in the kernel, such as [:, :, 0] for the queries of all layers; () = all of it.
    shape: (D, F), or (N, D, F) for N stacked layers.
  """

  kernel: str
  part: tuple
  shape: tuple[int, ...]


class Adapters(NamedTuple):
  """Adapters of some matrices.

  Attributes:
    matrices: name -> matrix.
    rank: r.
    scale: alpha / r, or alpha / sqrt(r).
  """

  matrices: Mapping[str, Matrix]
  rank: int
  scale: float

  def init(self, rng: jax.Array) -> dict:
    """New adapters {name: {'a', 'b'}}, nested by the parts of a name, that change nothing: A is
    uniform within 1 / sqrt(D), as in PEFT, and B is 0."""
    flat = {}
    keys = jax.random.split(rng, len(self.matrices))
    for key, (name, matrix) in zip(keys, sorted(self.matrices.items()), strict=True):
      *layers, inputs, outputs = matrix.shape
      bound = inputs**-0.5
      flat[f'{name}/a'] = jax.random.uniform(
        key, (*layers, inputs, self.rank), jnp.float32, -bound, bound
      )
      flat[f'{name}/b'] = jnp.zeros((*layers, self.rank, outputs), jnp.float32)
    return flax.traverse_util.unflatten_dict(flat, sep='/')

  def merge(self, params: dict, adapters: dict) -> dict:
    """The parameters with adapters added to their matrices, in float32."""
    flat = flax.traverse_util.flatten_dict(params, sep='/')
    arrays = flax.traverse_util.flatten_dict(adapters, sep='/')
    for name, matrix in self.matrices.items():
      path = f'{matrix.kernel}/kernel'
      kernel = jnp.asarray(flat[path], jnp.float32)
      change = jnp.matmul(arrays[f'{name}/a'], arrays[f'{name}/b'], precision='highest')
      old = kernel[matrix.part]
      new = old + self.scale * change.reshape(old.shape)
      flat[path] = kernel.at[matrix.part].set(new) if matrix.part else new
    return flax.traverse_util.unflatten_dict(flat, sep='/')

  def complete(self, params: dict) -> dict:
    """The parameters of the model out of those of a run: {'lora': adapters, 'base': frozen
    parameters, and what is trained beside}."""
    rest = {name: part for name, part in params.items() if name not in ('lora', 'base')}
    return rest | self.merge(params['base'], params['lora'])
