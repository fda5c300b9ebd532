"""FLOPs of a train step by the formula."""

import pytest

from bertjax.model import config as model_config
from bertjax.model.flops import train_flops


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
