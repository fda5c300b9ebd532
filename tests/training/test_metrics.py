"""What a run logs about the machine: stalls, padding, pace, MFU, traces."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from bertjax.training import metrics
from bertjax.training.hardware import Chip, chip


@pytest.fixture
def run_log(tmp_path):
  run_log = metrics.RunLog(tmp_path, steps=100, start=0)
  yield run_log
  run_log.close()


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test moves on."""
  clock = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: clock.now)
  return clock


def batches(count, clock, seconds=0.0):
  for _ in range(count):
    clock.now += seconds
    yield {'segment_ids': np.array([[1, 1, 1, 0]])}


def logged(tmp_path):
  return metrics.read_metrics(tmp_path)[-1]


def test_the_log_reports_padding_and_whether_the_input_or_the_device_was_slow(
  clock, run_log, tmp_path
):
  for wait, work in ((0.03, 0.0), (0.0, 0.03)):
    for _ in run_log.watched(batches(10, clock, wait)):
      clock.now += work
    run_log.train(10 + int(1e3 * work), {'loss': 1.0}, 0.3, 10)
    row = logged(tmp_path)
    assert row['padding'] == 0.25
    assert row['step_ms_p50'] == pytest.approx(30) == row['step_ms_p90']
    assert (row['input_stall'] > 0.8) == (wait > 0) and (row['input_stall'] < 0.2) == (work > 0)


def test_lines_are_logged_while_batches_are_read(clock, run_log, tmp_path):
  for i, _ in enumerate(run_log.watched(batches(4, clock, 0.01))):
    run_log.train(i + 1, {'loss': 1.0}, 0.01, 1)
  assert logged(tmp_path)['step_ms_p50'] > 9


def test_goodput_counts_what_is_no_training_as_lost(clock, run_log, tmp_path):
  clock.now += 0.6  # an evaluation, a save
  for _ in run_log.watched(batches(10, clock)):
    clock.now += 0.02
  run_log.train(10, {'loss': 1.0}, 0.2, 10)
  assert logged(tmp_path)['goodput'] == pytest.approx(0.25)


def test_mfu_is_the_models_flops_by_the_data_sheets(run_log, tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, 'chip', lambda kind: Chip(1e12, 0, 0, 0))
  run_log.flops_per_step = 4e12
  run_log.train(5, {'loss': 1.0}, 5.0, 5)  # 4e12 FLOP/s on 8 devices of 1e12
  assert logged(tmp_path)['mfu'] == pytest.approx(0.5)


def test_a_device_is_found_by_a_part_of_its_name():
  assert chip('TPU v5 lite').hbm == 16e9 and chip('TPU v5').hbm == 95e9
  assert chip('NVIDIA H200').hbm == 141e9 and chip('cpu') is None


def test_a_file_asks_for_a_trace_of_the_next_steps(run_log, tmp_path):
  (tmp_path / 'profile').touch()
  run_log.train(1, {'loss': 1.0}, 1.0, 1)
  assert not (tmp_path / 'profile').exists()
  jnp.ones(8).sum().block_until_ready()
  run_log.train(2, {'loss': 1.0}, 1.0, 1)
  assert list((tmp_path / 'logs/profile').rglob('*.xplane.pb'))
  run_log.train(3, {'loss': 1.0}, 1.0, 1)  # one trace for one request
