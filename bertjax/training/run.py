"""The run engine: check, resume, step, log, evaluate, save, roll back, finish; written once.

`train` gets an objective, the stages that the run consists of and an optimizer, and handles arrays
only as pytrees: it reads no config, no key of a batch and no field of a model.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from bertjax.training import distributed, loop, metrics
from bertjax.training.checkpoint import Checkpoints
from bertjax.training.layout import Layout, abstract_of, restore_or_init
from bertjax.training.loop import DivergedError, TrainState
from bertjax.training.stopping import exit_if_stopped

_log = logging.getLogger(__name__)

Scores = dict[str, float]
MAX_DIVERGENCES = 10  # of a stage; as many mean too high a learning rate, not bad batches


class Stage(NamedTuple):
  """Consecutive steps of a run on batches of one kind.

  Attributes:
    stop: the step after the last one, counted from the start of the run.
    objective: an `objectives.Objective`; all stages have the same parameters. Stages that share an
      objective share its compiled programs.
    batches: n -> iterator over this process's rows of the stage's batches n, n + 1, ...; where
      there is `position`, also gets the newest one of the run: that of the checkpoint it resumes
      from, or of the end of the stage before.
    evaluate: params -> the scores of each run (one, unless the layout is a sweep), with 'loss'.
    model: facts about the model for the checkpoints, see `model_facts`.
    tokens: tokens of a global batch including padding; 0 counts those of each batch.
    flops: model FLOPs of a step, for the MFU; 0.0 = unknown.
    position: n -> the position of the input before batch n, one of the newest, as JSON, for the
      checkpoint; None = it is n.
    label: what the log calls the stage, '2 of 3'; '' = not logged, the run has no stages.
    changes: {field: value} of the stage for the log.
    progress: n -> numbers for the log before batch n, one of the newest, such as epochs.
  """

  stop: int
  objective: Any
  batches: Callable[..., Iterator[dict]]
  evaluate: Callable[[Any], Sequence[Scores]]
  model: dict
  tokens: int = 0
  flops: float = 0.0
  position: Callable[[int], Any] | None = None
  label: str = ''
  changes: Mapping[str, Any] = MappingProxyType({})
  progress: Callable[[int], dict[str, float]] = lambda n: {}


@dataclasses.dataclass(frozen=True)
class Options:
  """When a run logs, evaluates, saves and stops. Intervals are in steps.

  Attributes:
    log_every: steps between log lines.
    eval_every: steps between evaluations; 0 evaluates at the end of each stage only.
    save_every: steps between checkpoints; 0 saves after evaluations only.
    max_to_keep: newest checkpoints kept; the best one is kept as well.
    metric: score that decides which evaluation is best.
    highest: whether the highest `metric` is best.
    save_model: checkpoint passed to `finish`: 'last' or 'best'.
    patience: evaluations without improvement after which a run stops; 0 = never.
    skip_divergence: a run that diverges resumes from its newest checkpoint and skips the batches
      since, instead of ending.
    loss_spike_threshold: nats above the median of the last 100 losses that count as a divergence;
      0.0 = none.
    stall_seconds: a step that takes longer ends the process; 0.0 = never.
    trackers: 'wandb', 'trackio', both with a comma, or '', which get the metrics too.
  """

  log_every: int = 100
  eval_every: int = 0
  save_every: int = 0
  max_to_keep: int = 2
  metric: str = 'loss'
  highest: bool = False
  save_model: str = 'last'
  patience: int = 0
  skip_divergence: bool = False
  loss_spike_threshold: float = 0.0
  stall_seconds: float = 0.0
  trackers: str = ''


def train(
  stages: Sequence[Stage], optimizer, *, layout: Layout, workdir, identity: dict, config: dict,
  finish: Callable, options: Options = Options(),
  load: Callable | None = None, begin: Callable[[], None] = lambda: None, about: dict | None = None,
):  # fmt: skip
  """Trains from the newest checkpoint in `workdir`, else from step 0.

  Args:
    stages: what the run consists of, in order; step and optimizer state continue from one to the
      next. A best checkpoint and `patience` only consider evaluations of the last stage.
    optimizer: an optax optimizer.
    layout: one run on a mesh, or a sweep.
    workdir: folder of the run; `training.checkpoint.check_path` has checked it.
    identity: flat {field: value} that a resumed run must share with its start.
    config: for `run.json` and the checkpoints; not read.
    finish: (params, step, evaluations) -> the result; called once the run has ended.
    options: intervals and stopping rules.
    load: (make) -> params to start from; `make()` returns freshly initialised ones on the host.
    begin: called by the first process when the workdir has been accepted.
    about: more content of `run.json`, such as the units of the losses for `loss.png`.

  Returns:
    What `finish` returns.

  Raises:
    OtherRunError: if `workdir` is of a run with another identity, before anything compiles.
    DivergedError: if a loss or gradient norm is not finite.
    SystemExit: with code 75, after SIGTERM and a save.
    KeyboardInterrupt: after the first Ctrl-C and a save, or at the second.
  """
  check_same(workdir, identity, config)
  distributed.agree('configuration', [identity, config])
  workdir.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(
    workdir / 'checkpoints', keep=options.max_to_keep, best=options.metric, highest=options.highest
  )
  state, shardings, meta = restore_or_init(
    stages[0].objective, optimizer, layout, checkpoints, load, num_train_steps=stages[-1].stop
  )
  trackers: list = []
  if jax.process_index() == 0:
    trackers = metrics.start_trackers(options.trackers, workdir, config)
    metrics.write_run(workdir / 'run.json', config, identity=identity, **(about or {}))
    begin()
  objectives = {id(stage.objective): stage.objective for stage in stages}
  train_steps = {
    key: layout.train_step(objective, optimizer, shardings) for key, objective in objectives.items()
  }
  run_log = metrics.RunLog(
    workdir,
    steps=stages[-1].stop,
    start=loop.step_of(state),
    active=jax.process_index() == 0,
    trackers=trackers,
  )
  facts = {'identity': identity, 'config': config}
  starts = [0, *(stage.stop for stage in stages[:-1])]
  run = _Run(starts[-1], layout, options, train_steps, checkpoints, run_log, facts, meta)
  stopped = 0
  try:
    for first, stage in zip(starts, stages, strict=True):
      if not stopped and loop.step_of(state) < stage.stop:
        state, _, stopped = run.train_stage(stage, first, state)
    step = loop.step_of(state)
    stopped = stopped if step < stages[-1].stop else 0  # a signal in the last step is too late
    if not stopped and options.save_model == 'best':
      state = run.best(state)
  finally:
    checkpoints.close()  # first: it waits for pending writes
    run_log.close()
  exit_if_stopped(stopped, step)
  return finish(loop.trained_params(state), loop.step_of(state), run.evaluations)


class _Run:
  """A run, or the runs of a sweep, in progress: what the stages share.

  Attributes:
    evaluations: {'step', 'scores'}, the scores of each run, of every evaluation so far.
    skipped: {'step', 'batches'}, batches skipped before a step, see `Options.skip_divergence`.
  """

  def __init__(self, last_start, layout, options, train_steps, checkpoints, run_log, facts, meta):
    self._last_start, self._layout, self._options = last_start, layout, options
    self._train_steps, self._checkpoints, self._log = train_steps, checkpoints, run_log
    self._facts, self._position = facts, meta.get('position')
    self._scores: list[Scores] = []  # of each run, at the last evaluation
    self.evaluations, self.skipped = meta.get('evaluations', []), meta.get('skipped', [])

  def train_stage(self, stage: Stage, first: int, state: TrainState):
    """Trains a stage, whose first step is `first`, from the state's step on; see `loop.fit`.

    After a divergence, trains again from the newest checkpoint without the batches since then, if
    there is one of this stage; `MAX_DIVERGENCES` end the run.
    """
    self._log.tokens_per_step, self._log.flops_per_step = stage.tokens, stage.flops
    if stage.label:
      self._log.stage(stage.label, first, stage.stop, stage.changes)
    abstract = abstract_of(state)
    for times in itertools.count(1):
      try:
        return self._fit(stage, first, state)
      except DivergedError as error:
        self._checkpoints.wait()
        saved = [step for step in self._checkpoints.steps() if step >= first]
        if not self._options.skip_divergence or not saved or times == MAX_DIVERGENCES:
          raise
        state = self._roll_back(abstract, error)

  def _fit(self, stage, first, state):
    options, step = self._options, loop.step_of(state)
    self.evaluations[:] = [e for e in self.evaluations if e['step'] <= step]
    # Step n of the run takes batch n + offset of the stage.
    offset = sum(s['batches'] for s in self.skipped if s['step'] >= first) - first
    saved = {'position': self._position} if stage.position else {}

    def save(state, step, scores):
      position = {'position': stage.position(step + offset)} if stage.position else {}
      self._save(state, step, scores, position | {'model': stage.model})

    self._log.begin(lambda step: stage.progress(step + offset))
    step = max(step, first)  # a corrupt checkpoint may have led back to the stage before
    with (
      contextlib.closing(stage.batches(step + offset, **saved)) as stream,
      distributed.Watch(options.stall_seconds) as watch,
    ):
      batches = loop.to_device(self._log.watched(stream), self._layout.mesh)
      ended = loop.fit(
        state, self._train_steps[id(stage.objective)], batches, steps=stage.stop, log=self._log,
        log_every=options.log_every, evaluate_fn=lambda params: self._evaluate(stage, params),
        eval_every=options.eval_every, save=save, save_every=options.save_every,
        finished=lambda: not any(self._alive()), watch=watch.at, spike=options.loss_spike_threshold,
      )  # fmt: skip
    if stage.position:  # the next stage continues there
      self._position = stage.position(loop.step_of(ended[0]) + offset)
    return ended

  def _roll_back(self, abstract, error: DivergedError) -> TrainState:
    state, meta = self._checkpoints.restore_newest(abstract)
    step, before, self._position = loop.step_of(state), meta['skipped'], meta.get('position')
    count = error.step - step + sum(s['batches'] for s in self.skipped[len(before) :])
    self.skipped[:] = [*before, {'step': step, 'batches': count}]
    self._log.skip(step, count)
    _log.warning('%s Resuming from step %d without the %d batches since.', error, step, count)
    return state

  def _alive(self) -> list[bool]:
    """Which runs have not run out of patience in the last stage; [True] before its evaluations."""
    scores = [e['scores'] for e in self.evaluations if e['step'] > self._last_start]
    values = [ranking(s, self._options) for s in scores]
    return still_running(values, self._options.patience) if values else [True]

  def _evaluate(self, stage: Stage, params) -> Scores:
    self._scores = list(stage.evaluate(params))
    values = np.where(self._alive(), ranking(self._scores, self._options), -np.inf)
    return self._layout.summary(self._scores, values.tolist(), self._options)

  def _save(self, state: TrainState, step: int, scores: Scores | None, facts: dict) -> None:
    if scores:
      self.evaluations.append({'step': step, 'scores': self._scores})
    meta = self._facts | facts | {'skipped': self.skipped, 'evaluations': self.evaluations}
    # Losses of stages with different rows cannot be compared.
    self._checkpoints.save(step, state, meta, scores if step > self._last_start else None)

  def best(self, state: TrainState) -> TrainState:
    """The state of the best evaluation."""
    self._checkpoints.wait()
    step = self._checkpoints.best_step()
    if step == loop.step_of(state):
      return state
    _log.info('save_model=best: step %d', step)
    return self._checkpoints.restore(step, abstract_of(state))[0]


def ranking(scores: Sequence[Scores], options: Options) -> list[float]:
  """The value by which each run is ranked, the highest is best; -inf for one that has diverged."""
  sign = 1 if options.highest else -1
  finite = [math.isfinite(s.get('loss', 0.0)) for s in scores]  # an evaluation may have no loss
  return [
    sign * s[options.metric] if ok else -math.inf for s, ok in zip(scores, finite, strict=True)
  ]


def still_running(values: np.ndarray | Sequence[Sequence[float]], patience: int) -> list[bool]:
  """Which of K runs continue after these evaluations.

  Args:
    values: `ranking` of each evaluation so far [evaluations, K].
    patience: evaluations without improvement after which a run stops; 0 = never.
  """
  table = np.array(values, float)
  best, waited = np.full(table.shape[1], -np.inf), np.zeros(table.shape[1])
  stopped = np.zeros(table.shape[1], bool)
  for row in table if patience else ():
    better = row > best  # never for NaN
    best, waited = np.where(better, row, best), np.where(better, 0, waited + 1)
    stopped |= waited >= patience
  return (~stopped).tolist()


def model_facts(
  config,
  *,
  labels=(),
  problem_type: str = '',
  trials: int = 1,
  sentence: dict | None = None,
  lora: dict | None = None,
) -> dict:
  """The model's entry in a checkpoint's meta, which `interop.loading` reads: an `EncoderConfig`
  without the fields that do not change the model, the labels, the number of runs in it, the
  pooling of embeddings, and the base model of adapters."""
  free = ('frozen', 'dtype', 'attention', 'remat', 'unroll')
  fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
  return {
    'config': fields, 'labels': list(labels), 'problem_type': problem_type, 'trials': trials,
    **({'sentence': sentence} if sentence else {}), **({'lora': lora} if lora else {}),
  }  # fmt: skip


class OtherRunError(ValueError):
  """A workdir holds a run with other settings.

  Attributes:
    changes: {field: (value there, value here)}.
  """

  def __init__(self, workdir, changes: dict):
    super().__init__(workdir, changes)
    self.changes = changes

  def __str__(self):
    fields = [f'{k}: {there} there, {here} here' for k, (there, here) in self.changes.items()]
    return (
      f'{self.args[0]} holds a run of another config ({", ".join(fields)}); use another --workdir, '
      'or the same settings to resume it.'
    )


def saved_run(workdir) -> dict:
  """The `run.json` of a workdir; {} if there is no checkpoint to resume from or to lose."""
  path, saved = epath.Path(workdir) / 'run.json', epath.Path(workdir) / 'checkpoints'
  resumes = path.exists() and saved.exists() and any(saved.iterdir())
  return json.loads(path.read_text()) if resumes else {}


def check_same(workdir, identity: dict, config: dict) -> None:
  """Raises OtherRunError if a workdir holds a run of another identity; lists the differences.

  Beside an entry of the identity that is no field of the config, such as a digest of the training
  rows, it lists all fields that have changed: they may be the reason.
  """
  before, now = saved_run(workdir), traverse_util.flatten_dict(config, sep='.')
  if not before:
    return
  changes = _differences(before['identity'], identity)
  if changes.keys() - now.keys():
    free = {field.name for field in dataclasses.fields(Options)}
    fields = _differences(traverse_util.flatten_dict(before['config'], sep='.'), now)
    changes = {name: v for name, v in fields.items() if name not in free} | changes
  if changes:
    raise OtherRunError(workdir, changes)


def _differences(before: dict, now: dict) -> dict:
  """{field: (value before, value now)} of the fields that differ."""
  names = sorted(before.keys() | now.keys())
  return {n: (before.get(n), now.get(n)) for n in names if before.get(n) != now.get(n)}
