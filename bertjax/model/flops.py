"""Model FLOPs: what the mathematics of a training step needs, whatever a compiler makes of it."""

from bertjax.model.config import EncoderConfig


def train_flops(config: EncoderConfig, length: int, predictions: int) -> float:
  """Floating-point operations of one sequence, forward and backward, of masked-LM training.

  6 for each weight of the layers and token, 12 N L^2 D for attention's two matmuls, and the
  masked-LM head at `predictions` positions only; a multiply-add counts 2, everything else 0.
  """
  width = config.hidden_size
  layer = 4 * width**2 + 2 * width * config.mlp_size
  return (
    6 * config.num_layers * layer * length
    + 12 * config.num_layers * length**2 * width
    + 6 * predictions * (width**2 + width * config.vocab_size)
  )
