"""Metrics of a run: the log, curves, stalls, padding, pace, MFU, traces."""

import json
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from bertjax.training import metrics
from bertjax.training.hardware import Chip
from bertjax.training.metrics import RunLog, plot_curves, read_metrics


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


def test_the_log_reports_padding_and_the_times_of_steps(clock, run_log, tmp_path):
  for wait, work in ((0.03, 0.0), (0.0, 0.03)):
    for _ in run_log.watched(batches(10, clock, wait)):
      clock.now += work
    run_log.train(10 + int(1e3 * work), {'loss': 1.0}, 0.3, 10)
    row = logged(tmp_path)
    assert row['padding'] == 0.25
    assert row['step_ms_p50'] == pytest.approx(30) == row['step_ms_p90']


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


def test_a_file_asks_for_a_trace_of_the_next_steps(run_log, tmp_path):
  (tmp_path / 'profile').touch()
  run_log.train(1, {'loss': 1.0}, 1.0, 1)
  assert not (tmp_path / 'profile').exists()
  jnp.ones(8).sum().block_until_ready()
  run_log.train(2, {'loss': 1.0}, 1.0, 1)
  assert list((tmp_path / 'logs/profile').rglob('*.xplane.pb'))
  run_log.train(3, {'loss': 1.0}, 1.0, 1)  # one trace for one request


def test_padding_is_that_of_the_steps_not_of_the_batches_read_ahead(tmp_path):
  def padding(start):
    shares = iter(range(start, 100))
    batches = ({'segment_ids': np.arange(100)[None] >= next(shares)} for _ in range(100))
    log = RunLog(tmp_path, steps=30, start=start)
    stream = log.watched(batches)
    for _ in range(2):
      next(stream)  # read ahead
    for step in range(start + 1, 31):
      next(stream)
      if step % 10 == 0:
        log.train(step, {'loss': 1.0}, 1.0, 10)
    log.close()
    return {row['step']: row['padding'] for row in read_metrics(tmp_path)}

  whole, resumed = padding(0), padding(10)
  assert [whole[step] for step in (10, 20, 30)] == pytest.approx([0.045, 0.145, 0.245])
  assert [resumed[step] for step in (20, 30)] == pytest.approx([0.145, 0.245])


def test_a_later_file_wins_where_a_resumed_run_repeats_steps(tmp_path):
  for value in (1.0, 2.0):
    log = RunLog(tmp_path, steps=10, start=0)
    log.tokens_per_step = 100
    log.train(5, {'loss': value, 'a_loss': value}, 1.0, 5)
    log.close()
  (row,) = read_metrics(tmp_path)
  assert row['loss'] == 2.0 and row['tokens_per_second'] == 500


def test_a_half_written_line_of_a_killed_process_is_passed_over(tmp_path):
  log = RunLog(tmp_path, steps=10, start=0)
  log.train(1, {'loss': 3.0, 'a_loss': 3.0}, 1.0, 1)
  log.close()
  (path,) = (tmp_path / 'logs').glob('*.jsonl')
  path.write_text(path.read_text() + '{"kind": "tr')
  assert [row['step'] for row in read_metrics(tmp_path)] == [1]


def test_the_curves_are_drawn(tmp_path):
  (tmp_path / 'logs').mkdir()
  rows = [
    {'kind': kind, 'step': s, 'mlm_loss': 9 - s / 10, 'nsp_loss': 0.7}
    for kind in ('train', 'eval')
    for s in range(1, 20)
  ]
  (tmp_path / 'logs' / 'metrics-x.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  plot_curves(tmp_path)
  assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')


def drawn(workdir, monkeypatch, rows, **run):
  """The figure that `plot_curves` writes for these lines; None for none."""
  (workdir / 'logs').mkdir()
  (workdir / 'logs' / 'metrics-x.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (workdir / 'run.json').write_text(json.dumps(run))
  figures = []
  monkeypatch.setattr(
    'matplotlib.backends.backend_agg.FigureCanvasAgg.print_png',
    lambda canvas, file: figures.append(canvas.figure),
  )
  plot_curves(workdir)
  return figures[0] if figures else None


def test_curves_have_units_baselines_and_the_rate(tmp_path, monkeypatch):
  rows = [
    {'kind': 'train', 'step': s, 'nsp_loss': 0.7, 'task_loss': 0.5, 'learning_rate': s / 10}
    for s in (1, 2, 3)
  ]
  rows.append({'kind': 'eval', 'step': 3, 'nsp_loss': 0.6, 'loss': 0.4})
  losses = {'nsp_loss': {'unit': 'nats per pair', 'baseline': 0.693, 'baseline_name': 'chance'},
            'task_loss': {'heldout': 'loss'}}  # fmt: skip
  figure = drawn(tmp_path, monkeypatch, rows, losses=losses)
  assert figure.get_suptitle() == tmp_path.name
  nsp, task, rate = figure.axes
  assert [axes.get_title() for axes in figure.axes] == ['nsp loss', 'task loss', 'learning rate']
  assert (nsp.get_ylabel(), task.get_ylabel()) == ('nats per pair', '')
  training, heldout, chance = nsp.lines
  assert (training.get_marker(), heldout.get_marker()) == ('', 'o')  # one point is visible
  assert list(chance.get_ydata()) == [0.693, 0.693] and chance.get_label() == 'chance'
  assert [line.get_ydata().tolist() for line in task.lines] == [[0.5] * 3, [0.4]]
  assert rate.lines[0].get_ydata().tolist() == [0.1, 0.2, 0.3]


def test_one_step_makes_no_picture(tmp_path, monkeypatch):
  rows = [{'kind': kind, 'step': 1, 'a_loss': 1.0} for kind in ('train', 'eval')]
  assert drawn(tmp_path, monkeypatch, rows) is None


def test_a_resumed_run_continues_its_curve_in_tensorboard(tmp_path):
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  for start, steps in ((0, (5, 10)), (5, (10, 15))):
    log = RunLog(tmp_path, steps=20, start=start)
    for step in steps:
      log.train(step, {'loss': 1.0 + start, 'a_loss': 1.0}, 1.0, 5)
    log.close()
  events = []
  for path in sorted((tmp_path / 'logs' / 'tensorboard').glob('*tfevents*')):
    content = path.read_bytes()
    while content:  # records: length, its checksum, the event, its checksum
      (length,) = struct.unpack('<Q', content[:8])
      event = Event.FromString(content[12 : 12 + length])
      if event.session_log.status == SessionLog.START:  # as TensorBoard does
        events = [e for e in events if e[0] < event.step]
      events += [(event.step, v.simple_value) for v in event.summary.value if v.tag == 'train/loss']
      content = content[16 + length :]
  assert events == [(5, 1.0), (10, 6.0), (15, 6.0)]


def test_trackers_get_the_metrics_of_the_files_and_resume_under_one_name(tmp_path, monkeypatch):
  calls = []

  class Run:
    def log(self, values, step):
      calls.append((step, values))
      if step == 30:
        raise ConnectionError('away')

    def finish(self):
      calls.append('finish')

  module = types.ModuleType('wandb')
  module.init = lambda **options: calls.append(options) or Run()
  monkeypatch.setitem(sys.modules, 'wandb', module)
  monkeypatch.setenv('WANDB_PROJECT', 'mine')
  for start in (0, 20):
    trackers = metrics.start_trackers('wandb', tmp_path, {'seed': 1})
    log = RunLog(tmp_path, steps=40, start=start, trackers=trackers)
    log.evaluation(start + 10, {'loss': 2.0})
    log.close()
  first, second = calls[0], calls[3]
  assert first == second and first['project'] == 'mine' and first['name'] == tmp_path.name
  assert (first['resume'], first['config']) == ('allow', {'seed': 1})
  assert calls[1:3] == [(10, {'eval/loss': 2.0}), 'finish']
  assert calls[4:] == [(30, {'eval/loss': 2.0})]  # it failed and is not used any more
  assert logged(tmp_path)['step'] == 30


def test_a_tracker_that_does_not_start_is_one_sentence(tmp_path, monkeypatch):
  def init(**options):
    raise RuntimeError('No API key configured.\nUse `wandb login`.')

  monkeypatch.setitem(sys.modules, 'wandb', types.ModuleType('wandb'))
  sys.modules['wandb'].init = init
  with pytest.raises(ValueError, match=r'wandb does not start \(No API key configured\)'):
    metrics.start_trackers('wandb', tmp_path, {})


@pytest.mark.parametrize(
  ('names', 'words'),
  [('mlflow', "must be 'wandb', 'trackio'"), ('wandb', 'pip install wandb')],
)
def test_an_unknown_tracker_is_refused(names, words, monkeypatch):
  monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=words):
    metrics.check_trackers(names)
