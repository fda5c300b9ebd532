"""Metric logging: console, JSONL, TensorBoard, trackers, loss curves, `run.json`.

Each start of the process writes a new file under `logs/`, so nothing is appended to a file that an
earlier, killed process may have left incomplete. `read_metrics` joins them; where a
resumed run repeats steps, the later file counts.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from bertjax import io
from bertjax.training.hardware import chip

_log = logging.getLogger(__name__)


class RunLog:
  """Writes the metrics of one process start.

  Args:
    workdir: the run's folder.
    steps: the last step, for the progress bar and the remaining time.
    start: the step the run starts from.
    active: False on all processes but the first.
    trackers: runs of `start_trackers`, which get what the files get.

  Attributes:
    tokens_per_step: real and padding tokens of a global batch; set by the caller, or
      counted by `watched` where batches differ.
    flops_per_step: of the model for a global batch (0.0 = unknown), for the MFU.
    progress: step -> more numbers for its log line.

  A file `profile` in the workdir asks for a `jax.profiler` trace of the steps up to the next log
  line, under `logs/`.
  """

  def __init__(
    self, workdir, *, steps: int, start: int, active: bool = True, trackers: Sequence = ()
  ):
    self._trackers = list(trackers)
    self._active, self._steps, self._workdir = active, steps, epath.Path(workdir)
    self.tokens_per_step, self.flops_per_step = 0, 0.0
    self.progress: Callable[[int], dict] = lambda step: {}
    self._stage: dict[str, int] = {}  # {'stage': number}, {} in a run without stages
    self._begun, self._useful = time.perf_counter(), 0.0
    self._times, self._padding, self._tokens = [], [], []
    self._tracing = False
    self._bar = tqdm(
      total=steps, initial=start, unit='step', dynamic_ncols=True,
      disable=None if active else True,  # None: unless stderr is a terminal
    )  # fmt: skip
    if active:
      self._open(start)

  def _open(self, start: int) -> None:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder = self._workdir / 'logs'
    board = folder / 'tensorboard'  # one folder, so that a resumed run continues its curves
    board.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime('%Y%m%d-%H%M%S') + f'-{time.time_ns() % 10**9:09d}'
    self._file = (folder / f'metrics-{stamp}.jsonl').open('w')
    # Not SummaryWriter: on a full disk its writer thread dies and the training loop hangs.
    self._board = EventsWriter(str(board / f'events-{stamp}'))
    if start:  # TensorBoard discards the events of an earlier start from this step on
      log = SessionLog(status=SessionLog.START)
      self._board.write_event(Event(step=start + 1, session_log=log))

  def begin(self, progress: Callable[[int], dict]) -> None:
    """Forgets batches that were read ahead and not trained on; sets `progress`."""
    self.progress, self._tokens, self._padding = progress, [], []

  def stage(self, label: str, first: int, stop: int, changes: Mapping) -> None:
    """Logs that a stage begins, 'NUMBER of COUNT', and marks the lines of its steps."""
    text = '  '.join(f'{name}={value}' for name, value in changes.items())
    _log.info('stage %s, steps %d to %d: %s', label, first + 1, stop, text)
    self._stage = {'stage': int(label.split()[0])}
    if self._active:
      facts = {'kind': 'stage', 'step': first, **self._stage, **changes}
      self._file.write(json.dumps(facts) + '\n')

  def train(self, step: int, metrics: dict, seconds: float, steps: int) -> None:
    """Logs means over the last `steps` steps, which took `seconds`."""
    tokens = np.mean(self._tokens[:steps]) if self._tokens else self.tokens_per_step
    per_second = float(tokens) * steps / max(seconds, 1e-9)
    metrics = metrics | self.progress(step)
    facts = {'tokens_per_second': per_second} | self._facts(seconds, steps) | self._stage
    self._write('train', step, metrics | facts)
    self._trace()
    self._bar.update(step - self._bar.n)
    self._bar.set_postfix_str(f'loss {metrics["loss"]:.3f} {per_second:,.0f} tok/s')
    if self._bar.disable:
      left = datetime.timedelta(seconds=int((self._steps - step) * seconds / steps))
      speed = f'{per_second:,.0f} tok/s  {left} left'
      stage = ''.join(f'  stage {number}' for number in self._stage.values())
      _log.info('step %d/%d%s  %s  %s', step, self._steps, stage, _brief(metrics), speed)

  def watched(self, batches: Iterator[dict]) -> Iterator[dict]:
    """Passes host batches on, one for each step; times them and counts their padding."""
    before = time.perf_counter()
    for batch in batches:
      now = time.perf_counter()
      waited = now - before
      if 'segment_ids' in batch:
        self._padding.append(float((batch['segment_ids'] == 0).mean()))
        self._tokens.append(batch['segment_ids'].size * jax.process_count())
      yield batch
      before = time.perf_counter()
      self._times.append(before - now + waited)

  def _facts(self, seconds: float, steps: int) -> dict:
    """How the machine did since the last line: what `watched` saw, MFU, memory, goodput."""
    facts = {}
    if self._times:
      p50, p90, most = np.percentile(self._times, (50, 90, 100))
      facts |= {'step_ms_p50': 1e3 * p50, 'step_ms_p90': 1e3 * p90, 'step_ms_max': 1e3 * most}
      # What the steps so far take at their usual pace, of all the time since the start.
      self._useful += steps * min(p50, seconds / steps)
      facts['goodput'] = self._useful / (time.perf_counter() - self._begun)
    if self._padding:
      facts['padding'] = float(np.mean(self._padding[:steps]))
    device = jax.local_devices()[0]
    sheet = chip(device.device_kind)
    if sheet and self.flops_per_step:
      facts['mfu'] = self.flops_per_step * steps / seconds / jax.device_count() / sheet.flops
    if stats := device.memory_stats():
      facts['memory_gb'] = stats['peak_bytes_in_use'] / 1e9
    # Batches are read ahead of their steps; those of later steps count there.
    del self._padding[:steps], self._tokens[:steps]
    self._times = []
    return {name: float(value) for name, value in facts.items()}

  def _trace(self) -> None:
    """Ends a profiler trace, or begins one if the file `profile` asks for it."""
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
    elif self._active and (self._workdir / 'profile').exists():
      (self._workdir / 'profile').unlink()
      jax.profiler.start_trace(str(self._workdir / 'logs' / 'profile'))
      self._tracing = True

  def evaluation(self, step: int, metrics: dict) -> None:
    """Logs an evaluation."""
    self._write('eval', step, metrics | self._stage)
    text = f'step {step}/{self._steps}  held-out  {_brief(metrics)}'
    if self._bar.disable:
      _log.info(text)
    else:
      self._bar.write(text, file=sys.stderr)

  def skip(self, step: int, batches: int) -> None:
    """Logs that a run rolled back to `step` and skips that many batches there."""
    self._write('skip', step, {'batches': batches})

  def close(self) -> None:
    """Closes the files and draws the loss curves."""
    if self._tracing:
      jax.profiler.stop_trace()
    self._bar.close()
    if self._active:
      self._file.close()
      self._board.close()
      for tracker in self._trackers:
        tracker.finish()
      plot_curves(self._workdir)

  def _write(self, kind, step, metrics):
    if not self._active:
      return
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    self._file.write(json.dumps({'kind': kind, 'step': step, **metrics}) + '\n')
    self._file.flush()
    values = [Summary.Value(tag=f'{kind}/{k}', simple_value=v) for k, v in metrics.items()]
    self._board.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
    self._board.flush()
    for tracker in list(self._trackers):
      try:
        tracker.log({f'{kind}/{k}': v for k, v in metrics.items()}, step=step)
      except Exception as error:  # a service that is away must not end a run
        self._trackers.remove(tracker)
        _log.warning('%s is not used any more: %s', type(tracker).__module__, error)


TRACKERS = ('wandb', 'trackio')


def check_trackers(names: str) -> None:
  """Raises ValueError for a tracker that is not known, or not installed.

  >>> check_trackers('')
  >>> check_trackers('mlflow')
  Traceback (most recent call last):
    ...
  ValueError: trackers must be 'wandb', 'trackio', both with a comma, or empty, got 'mlflow'.
  """
  for name in filter(None, names.split(',')):
    if name not in TRACKERS:
      raise ValueError(
        f"trackers must be 'wandb', 'trackio', both with a comma, or empty, got {names!r}."
      )
    if not importlib.util.find_spec(name):
      raise ValueError(f'trackers={names} needs a package; pip install {name}.')


def start_trackers(names: str, workdir, config: dict) -> list:
  """Runs of Weights & Biases or trackio (checked by `check_trackers`), continued where a run
  resumes.

  The project is that of the environment variable WANDB_PROJECT, else 'bertjax'.
  """
  started, path = [], epath.Path(workdir) / 'logs' / 'tracker'
  if names and not path.exists():
    io.write_text(path, secrets.token_hex(4))
  for name in filter(None, names.split(',')):
    number, title = path.read_text(), epath.Path(workdir).name
    own = {'name': f'{title}-{number}'}
    if name == 'wandb':
      own = {'id': number, 'name': title, 'dir': str(path.parent)}
    project = os.environ.get('WANDB_PROJECT', 'bertjax')
    module = importlib.import_module(name)
    try:
      started.append(module.init(project=project, config=config, resume='allow', **own))
    except Exception as error:  # such as wandb without a login
      reason = io.first_line(error).rstrip('.')
      raise ValueError(f'trackers={names}: {name} does not start ({reason}).') from error
  return started


def _brief(metrics: dict) -> str:
  hidden = ('grad_norm', 'learning_rate')
  shown = {k: v for k, v in metrics.items() if k not in hidden and not k.endswith('_weight')}
  return '  '.join(f'{name} {value:.4g}' for name, value in shown.items())


def read_metrics(workdir) -> list[dict]:
  """All logged lines of a run in order of kind and step; of a repeated step the latest counts."""
  rows = {}
  for path in sorted((epath.Path(workdir) / 'logs').glob('metrics-*.jsonl')):
    for line in path.read_text().splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue  # the last line of a killed process
      rows[row['kind'], row['step']] = row
  return [rows[key] for key in sorted(rows)]


def plot_curves(workdir) -> None:
  """Plots training and held-out losses and the learning rate over steps into `loss.png`, with the
  starts of the stages.

  `run.json` may describe the losses: {'losses': {'mlm_loss': {'unit': 'nats per token', 'baseline':
  7.1, 'baseline_name': 'unigram', 'heldout': name of the held-out loss if another}}}.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  workdir = epath.Path(workdir)
  rows, run = read_metrics(workdir), workdir / 'run.json'
  losses = json.loads(run.read_text()).get('losses', {}) if run.exists() else {}
  names = sorted({name for row in rows for name in row if name.endswith('_loss')})
  if len({row['step'] for row in rows}) < 2 or not names:
    return  # no curve
  starts: dict[int, int] = {}
  for row in rows:
    if row['kind'] == 'stage':
      starts.setdefault(row['stage'], row['step'])
  names += ['learning_rate'] * any('learning_rate' in row for row in rows)
  figure = Figure(figsize=(4.5 * len(names), 3.6), layout='constrained')
  figure.suptitle(workdir.name)
  for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
    parts = sorted({key for row in rows for key in row if key.startswith(f'{name}/')})
    about = losses.get(name, {})
    heldout = about.get('heldout', name)
    curves = [('train', name, 'training', 1), ('eval', heldout, 'held-out', 2)]
    curves += [('eval', part, f'held-out {part.partition("/")[2]}', 1) for part in parts]
    for kind, key, label, width in curves:
      points = [(r['step'], r[key]) for r in rows if r['kind'] == kind and key in r]
      if points:
        marker = 'o' if kind == 'eval' or len(points) == 1 else ''
        axes.plot(*zip(*points, strict=True), label=label, lw=width, marker=marker, alpha=0.8)
    if 'baseline' in about:
      axes.axhline(about['baseline'], color='gray', ls=':', label=about['baseline_name'])
    for number, step in starts.items():
      axes.axvline(step, color='gray', lw=0.8, alpha=0.6)
      axes.annotate('stage 1' if number == 1 else str(number), (step, 1), fontsize=7,
                    xycoords=('data', 'axes fraction'), xytext=(2, -8),
                    textcoords='offset points')  # fmt: skip
    axes.set(xlabel='step', ylabel=about.get('unit', ''), title=name.replace('_', ' '))
    axes.grid(alpha=0.3)
    if name != 'learning_rate':
      axes.legend()
  with io.replacing(workdir / 'loss.png') as path, path.open('wb') as file:
    FigureCanvasAgg(figure).print_png(file)


def write_run(path, config: dict, **facts) -> None:
  """Writes `run.json`: versions, machine, command, commit and config of this process; the starts
  before it stay listed under 'earlier'."""
  names = ('bertjax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tensorflow')
  versions = {'python': platform.python_version()}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = 'not installed'
  start = {
    'command': sys.argv, 'started': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'commit': _commit(),
    'versions': versions,
  }  # fmt: skip
  info = start | {
    'devices': [str(d.device_kind) for d in jax.devices()], 'machine': platform.platform(),
    'config': config, **facts,
  }  # fmt: skip
  path = epath.Path(path)
  if path.exists():
    before = json.loads(path.read_text())
    info['earlier'] = [*before.get('earlier', []), {name: before[name] for name in start}]
  io.write_json(path, info)


def _commit() -> str:
  here = epath.Path(__file__).parent
  try:
    command = ['git', '-C', str(here), 'describe', '--always', '--dirty', '--abbrev=12']
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
