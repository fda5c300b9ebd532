"""Model FLOPs: what the mathematics of a training step needs, whatever a compiler makes of it."""

from bertjax.model.attention import splash_tile
from bertjax.model.config import EncoderConfig


def train_flops(config: EncoderConfig, length: int, predictions: int) -> float:
  """Floating-point operations of one sequence, forward and backward, of masked-LM training.

  6 for each weight of the layers (shared ones count in each) and of the projection of embeddings
  and token, 12 D for each pair of tokens in attention's two matmuls
  (L^2 pairs in a layer, those within the window in a local one), and the masked-LM head at
  `predictions` positions only; a multiply-add counts 2, everything else 0.
  """
  width, window = config.hidden_size, config.local_window // 2
  local = local_layers(config)
  embedding = config.embedding_width
  kv_width = (config.num_kv_heads or config.num_heads) * config.head_size
  mlp = (3 if config.gated_mlp else 2) * width * config.mlp_size
  layer = 2 * width**2 + 2 * width * kv_width + mlp
  layers = config.num_layers
  near = min(window, length - 1)  # on each side; the ends of a row have fewer
  pairs = (layers - local) * length**2 + local * (length * (2 * near + 1) - near * (near + 1))
  return (
    6 * layers * layer * length
    + 12 * pairs * width
    + 6 * config.embedding_size * width * length
    + 6 * predictions * embedding * (width + config.vocab_size)
  )


def local_layers(config: EncoderConfig) -> int:
  """How many layers attend within the window only."""
  count = config.num_layers
  return count - len(range(0, count, config.global_every)) if config.local_window else 0


def splash_flops(config: EncoderConfig, length: int) -> float:
  """Floating-point operations of splash attention's kernels for one sequence, forward and backward.

  The kernels compute complete tiles, so a local layer has more than its window, and nine matmuls
  where the mathematics has six: two forward, four for the gradient of keys and values, three for
  that of queries, each of which computes the scores again. `remat='full'` repeats the forward ones.
  """
  tile, count = splash_tile(length), length // splash_tile(length)
  reach = min((config.local_window // 2 + tile - 1) // tile, count - 1)  # tiles on each side
  near, local = count * (2 * reach + 1) - reach * (reach + 1), local_layers(config)
  tiles = (config.num_layers - local) * count**2 + local * near
  matmuls = 9 + 2 * (config.remat == 'full')
  return matmuls * 2 * tiles * tile**2 * config.hidden_size
