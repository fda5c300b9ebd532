"""FLOPs of a train step by the formula."""

import pytest

from bertjax.model import config as model_config
from bertjax.model.attention import splash_tile
from bertjax.model.flops import splash_flops, train_flops


@pytest.mark.parametrize(
  ('preset', 'length', 'predictions', 'giga'),
  [
    ('base', 128, 20, 69.9),
    ('base', 512, 76, 300.9),
    ('large', 128, 20, 240.6),
    ('large', 512, 76, 1019.8),
  ],
)
def test_model_flops_are_the_known_ones(preset, length, predictions, giga):
  flops = train_flops(model_config.PRESETS[preset](), length, predictions)
  assert flops / 1e9 == pytest.approx(giga, abs=0.05)


def test_windows_gates_and_grouped_heads_are_counted_pair_by_pair():
  config = model_config.EncoderConfig(
    vocab_size=50, hidden_size=32, num_layers=5, num_heads=4, num_kv_heads=2, mlp_size=48,
    gated_mlp=True, local_window=6, global_every=3,
  )  # fmt: skip
  length, predictions = 11, 2
  layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48  # queries, keys, values, output; gate, in, out
  near = sum(abs(i - j) <= 3 for i in range(length) for j in range(length))
  pairs = 2 * length**2 + 3 * near  # layers 0 and 3 are global
  head = predictions * (32 * 32 + 32 * 50)
  assert train_flops(config, length, predictions) == 6 * (
    5 * layer * length + 2 * pairs * 32 + head
  )


@pytest.mark.parametrize(('length', 'window'), [(384, 0), (1024, 128), (1024, 1026), (896, 258)])
def test_the_kernels_flops_are_those_of_the_tiles_that_splash_visits(length, window):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

  config = model_config.modernbert_base(num_layers=4, hidden_size=64, local_window=window)
  tile = splash_tile(length)

  def tiles(mask):
    found, _ = info.process_mask(masks.MultiHeadMask([mask]), (tile, tile))
    return (length // tile) ** 2 if found.block_mask is None else (found.block_mask > 0).sum()

  local = masks.LocalMask((length, length), (window // 2, window // 2), offset=0)
  every = tiles(masks.FullMask((length, length)))
  count = 2 * every + 2 * tiles(local) if window else 4 * every  # layers 0 and 3 are global
  assert splash_flops(config, length) == 9 * count * 2 * tile**2 * 64
