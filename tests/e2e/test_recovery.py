"""What a run does after a divergence, and copies of parameters that differ."""

import itertools

import numpy as np
import pytest

from bertjax import config as config_lib
from bertjax import pretrain
from bertjax.data.loader import Batches
from bertjax.training import loop
from bertjax.training.checkpoint import Checkpoints
from bertjax.training.metrics import read_metrics


def config_of(rows, **fields):
  config = config_lib.pretraining('tiny')
  config.update_from_flattened_dict(
    config_lib.SMOKE
    | {'data.prepared': str(rows), 'data.loader': 'threads', 'num_train_steps': 20, 'log_every': 1}
    | {'eval_every': 0, 'save_every': 5, 'on_divergence': 'skip', 'max_to_keep': 9}
    | fields
  )
  return config


@pytest.fixture
def poisoned(monkeypatch):
  """Lets the loss of some calls of the train step be NaN; lists the batches that were made."""
  read, bad = [], set()
  make_train_step, training = loop.make_train_step, Batches.training

  def make(*args, **kwargs):
    step, calls = make_train_step(*args, **kwargs), itertools.count()

    def poisonous(state, batch):
      state, metrics = step(state, batch)
      return state, metrics | ({'loss': np.float32('nan')} if next(calls) in bad else {})

    return poisonous

  def noted(self, step):
    read.append(step)
    return training(self, step)

  monkeypatch.setattr(loop, 'make_train_step', make)
  monkeypatch.setattr(Batches, 'training', noted)
  return read, bad


def test_a_divergence_goes_back_and_leaves_the_batches_since_out(tmp_path, tiny_rows, poisoned):
  read, bad = poisoned
  bad |= {13, 16}  # step 14; and, started again at step 10, its 3rd step from there
  pretrain.run(config_of(tiny_rows), workdir=str(tmp_path))
  skips = [{'step': 10, 'batches': 7}]  # 4, then 3 more
  checkpoints = Checkpoints(tmp_path / 'checkpoints', read_only=True)
  assert checkpoints.steps() == [5, 10, 15, 20]
  assert checkpoints.meta(20)['skipped'] == skips and checkpoints.meta(10)['skipped'] == []
  assert 17 + 9 in read and max(read) < 17 + 9 + 8  # the 20th step's, and few ahead
  logged = [row for row in read_metrics(tmp_path) if row['kind'] == 'skip']
  assert logged == [{'kind': 'skip', 'step': 10, 'batches': 7}]  # of a repeated step the last


def test_a_resumed_run_knows_the_skipped_batches(tmp_path, tiny_rows, poisoned):
  read, bad = poisoned
  bad.add(7)
  pretrain.run(config_of(tiny_rows, num_train_steps=10), workdir=str(tmp_path))
  read.clear()
  pretrain.run(config_of(tiny_rows, num_train_steps=12), workdir=str(tmp_path))
  assert min(read) == 13  # 10 steps and 3 batches


@pytest.mark.parametrize(
  ('bad_step', 'fields'), [(7, {'on_divergence': 'stop'}), (3, {'on_divergence': 'skip'})]
)
def test_a_divergence_ends_the_run_by_default_or_before_a_checkpoint(
  tmp_path, tiny_rows, poisoned, bad_step, fields
):
  poisoned[1].add(bad_step)
  with pytest.raises(loop.DivergedError, match=f'at step {bad_step + 1}'):
    pretrain.run(config_of(tiny_rows, **fields), workdir=str(tmp_path))


def test_a_run_that_diverges_again_and_again_ends(tmp_path, tiny_rows, poisoned):
  poisoned[1].update(range(5, 1000))
  with pytest.raises(loop.DivergedError):
    pretrain.run(config_of(tiny_rows), workdir=str(tmp_path))
