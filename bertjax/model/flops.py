"""Model FLOPs: what the mathematics of a training step needs, whatever a compiler makes of it."""

from bertjax.model.config import EncoderConfig


def train_flops(config: EncoderConfig, length: int, predictions: int) -> float:
  """Floating-point operations of one sequence, forward and backward, of masked-LM training.

  6 for each weight of the layers (shared ones count in each) and of the projection of embeddings
  and token, 12 D for each pair of tokens in attention's two matmuls
  (L^2 pairs in a layer, those within the window in a local one), and the masked-LM head at
  `predictions` positions only; a multiply-add counts 2, everything else 0.
  """
  width, window = config.hidden_size, config.local_window // 2
  embedding = config.embedding_width
  kv_width = (config.num_kv_heads or config.num_heads) * config.head_size
  mlp = (3 if config.gated_mlp else 2) * width * config.mlp_size
  layer = 2 * width**2 + 2 * width * kv_width + mlp
  layers = config.num_layers
  local = layers - len(range(0, layers, config.global_every)) if window else 0
  near = min(window, length - 1)  # on each side; the ends of a row have fewer
  pairs = (layers - local) * length**2 + local * (length * (2 * near + 1) - near * (near + 1))
  return (
    6 * layers * layer * length
    + 12 * pairs * width
    + 6 * config.embedding_size * width * length
    + 6 * predictions * embedding * (width + config.vocab_size)
  )
