"""Configs: the stages of a run and what is refused about them."""

import pytest

from bertjax import build
from bertjax import config as config_lib
from bertjax.__main__ import parse


def test_three_stages_take_missing_fields_from_the_stage_before():
  config = config_lib.pretraining('tiny')
  config.num_train_steps, config.batch_size = 1000, 64
  config.stage2.update(fraction=0.2, length=256, max_predictions=-1, mask_rate=0.3)
  config.stage3.update(fraction=0.1, batch_size=32)
  first, second, third = build.stages(config)
  assert [(s.name, s.start, s.stop) for s in (first, second, third)] == [
    ('', 0, 700), ('stage2', 700, 900), ('stage3', 900, 1000)
  ]  # fmt: skip
  sizes = [(s.config.data.length, s.config.batch_size) for s in (first, second, third)]
  assert sizes == [(128, 64), (256, 64), (256, 32)]
  masks = [(s.config.masking.rate, s.config.masking.max_predictions) for s in (second, third)]
  assert masks == [(0.3, 77)] * 2 and first.config.masking.max_predictions == 20


def test_stage_fields_are_flags():
  flags = [
    '--config=bert_mini:two_lengths',
    '--config.stage2.length=256',
    '--config.stage3.fraction=0.05',
  ]
  config = parse('pretrain', flags)['config']
  assert [s.stop for s in build.stages(config)] == [34_000, 38_000, 40_000]


@pytest.mark.parametrize('fractions', [(1.0, 0.0), (0.6, 0.5), (-0.1, 0.0), (float('nan'), 0.0)])
def test_stages_that_leave_no_first_one_are_refused(fractions):
  config = config_lib.pretraining('tiny')
  config.stage2.fraction, config.stage3.fraction = fractions
  with pytest.raises(ValueError, match='at least 0 and together below 1'):
    build.stages(config)
