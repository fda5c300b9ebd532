"""What the engine decides about a run."""

import collections

import pytest

from bertjax.training import loop


def test_a_loss_that_jumps_is_a_divergence_and_one_that_creeps_is_not():
  before = collections.deque([2.0] * 30, maxlen=100)
  for loss in (2.4, 2.9):
    loop._check({'loss': loss, 'grad_norm': 1.0}, 31, before, 1.0)
  loop._check({'loss': 9.0, 'grad_norm': 1.0}, 31, collections.deque(), 1.0)  # too early to decide
  with pytest.raises(loop.DivergedError, match=r'jumped from 2\.000 to 3\.100 at step 33') as found:
    loop._check({'loss': 3.1, 'grad_norm': 1.0}, 33, before, 1.0)
  assert found.value.step == 33
