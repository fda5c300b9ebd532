"""The stages of a pre-training run, as a config plans them: steps, sizes, schedule and examples."""

from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import numpy as np

from bertjax.config import flat
from bertjax.data import dataset, masking, mixture, streaming
from bertjax.fields import REPLACED
from bertjax.training import optimizer


class StagePlan(NamedTuple):
  """Steps start..stop-1 of a pre-training run, on batches of one shape.

  A stage whose batch size warms up has four, all with its label.
  """

  name: str  # of its section in the config, 'stages[1]'; '' in a run without stages
  start: int
  stop: int
  config: ml_collections.ConfigDict  # the run's, with the stage's values
  label: str = ''  # '2 of 3'
  section: ml_collections.ConfigDict | None = None  # the stage's own
  rows: mixture.Prepared | None = None
  text: streaming.Texts | None = None  # instead of rows, where text is streamed

  @property
  def data(self) -> mixture.Prepared | streaming.Texts:
    """The prepared rows or the streamed text."""
    return self.text or self.rows

  @property
  def examples(self) -> int:
    return (self.stop - self.start) * self.config.batch_size


def stages(config) -> list[StagePlan]:
  """The stages of a run; sets `num_train_steps` to their sum, and `max_predictions` of a run
  without stages.

  Raises:
    ValueError: for numbers of steps that do not add up, or rows that are not prepared alike or also
      streamed.
  """
  prepared = [section.prepared for section in (config.data, *config.stages)]
  if config.data.streaming and any(prepared):
    raise ValueError(
      f'data.streaming=True reads raw text, got prepared rows ({max(prepared)}); give one of them.'
    )
  steps, result, stop = stage_steps(config), [], 0
  config.num_train_steps = sum(steps)
  if not config.stages:
    derive_predictions(config)
    return [StagePlan('', 0, steps[0], config)]
  for number, section in enumerate(config.stages):
    name, label = f'stages[{number}]', f'{number + 1} of {len(steps)}'
    staged = _stage_config(config, section, name)
    for size, count in _batch_sizes(staged.batch_size, section, steps[number], name):
      own = staged.copy_and_resolve_references()
      own.batch_size, start, stop = size, stop, stop + count
      result.append(StagePlan(name, start, stop, own, label, section))
  return result


def stage_steps(config) -> list[int]:
  """The number of steps of each stage, or of the run without stages."""
  steps, total = [stage.steps for stage in config.stages] or [0], config.num_train_steps
  rest = total - sum(steps)
  if steps.count(0) > 1:
    raise ValueError(
      f'{steps.count(0)} of {len(steps)} stages have steps=0; only one of them can take the steps '
      'that the others leave.'
    )
  if 0 in steps and rest < 1:
    raise ValueError(
      f'num_train_steps={total} leaves no steps for stages[{steps.index(0)}], the others have '
      f'{sum(steps)}; set num_train_steps to more, or the steps of each stage.'
      if config.stages else f'num_train_steps must be at least 1, got {total}.'
    )  # fmt: skip
  if 0 not in steps and total not in (0, sum(steps)):
    raise ValueError(
      f'num_train_steps={total}, but the stages have {sum(steps)} steps; set num_train_steps=0, or '
      'steps=0 in one stage, which then has what the others leave.'
    )
  return [count or rest for count in steps]


def _stage_config(config, section, name: str) -> ml_collections.ConfigDict:
  """The config of a run with the values of a stage."""
  result = config.copy_and_resolve_references()
  changes = {field: section[name] for name, field in REPLACED.items() if section[name]}
  result.update_from_flattened_dict(changes)
  data = result.data
  if section.prepared and section.input:
    raise ValueError(
      f'{name} has both prepared rows ({section.prepared}) and input ({section.input}); give one.'
    )
  if section.prepared:
    data.input = ''
  elif section.input:
    data.prepared = ''
  elif data.prepared and data.length != config.data.length:
    raise ValueError(
      f'every stage needs prepared rows of its length, or raw text: got data.prepared='
      f"{data.prepared!r}, {name}.length={data.length} and {name}.prepared=''."
    )
  derive_predictions(result)
  return result


def _batch_sizes(size: int, section, steps: int, name: str) -> list[tuple[int, int]]:
  """[(batch size, steps)] of a stage: one, or an eighth, a quarter and a half of it before."""
  warmup = section.batch_size_warmup_steps
  if not warmup:
    return [(size, steps)]
  if size % 8 or not 3 <= warmup < steps:
    raise ValueError(
      f'{name}.batch_size_warmup_steps={warmup} grows the batch from an eighth: it must be from 3 '
      f'to {steps - 1}, below the steps of the stage, and batch_size={size} a multiple of 8.'
    )
  bounds = [round(warmup * part / 3) for part in range(4)]
  counts = [*np.diff(bounds).tolist(), steps - warmup]
  return [(size // 2**power, count) for power, count in zip((3, 2, 1, 0), counts, strict=True)]


def describe_stage(stage: StagePlan, before: StagePlan | None) -> dict:
  """The fields of a stage that differ from those of the stage before; for the first one all but
  those of the model."""

  def fields(plan):
    run, names = flat(plan.config), ('schedule', 'start_factor', 'end_factor')
    own = {name: plan.section[name] for name in names}
    return {name: run[field] for name, field in REPLACED.items()} | own

  if not stage.section:
    return {}
  now = fields(stage)
  earlier = fields(before) if before else {'rope_theta': now['rope_theta'], 'remat': now['remat']}
  return {name: v for name, v in now.items() if v and v != earlier.get(name)}


def derive_predictions(config) -> None:
  """Replaces `masking.max_predictions=-1` by the number that rate and length need."""
  sequences = config.data.max_sequences_per_row
  if config.data.prepared:  # packed as the folder says
    folders = mixture.read_sources(config.data.prepared)
    settings = dataset.read_manifest(next(iter(folders.values())))['settings']
    sequences = settings.get('max_sequences_per_row', sequences)
  if config.objective != 'next_token' or config.masking.max_predictions == -1:
    config.masking.max_predictions = masking.predictions(
      config.masking, config.data.length, sequences
    )


def make_schedule(config) -> Callable:
  """The schedule of a pre-training run: one over all steps, or a segment for each stage."""
  named = [stage.schedule for stage in config.stages]
  if not any(named) and not any(s.start_factor or s.end_factor for s in config.stages):
    return optimizer.make_schedule(
      config.schedule, config.num_train_steps, config.warmup_steps, config.decay_ratio
    )
  if '' in named:
    raise ValueError(
      f'stages[{named.index("")}] has no schedule, but another stage has a schedule, start_factor '
      'or end_factor; give every stage a schedule, such as constant, or none.'
    )
  segments = [
    optimizer.Segment(stage.schedule, steps, stage.start_factor, stage.end_factor)
    for stage, steps in zip(config.stages, stage_steps(config), strict=True)
  ]
  return optimizer.join_schedules(segments, config.warmup_steps, config.decay_ratio)


def examples_before(stages: list[StagePlan], number: int) -> dict[str, int]:
  """How many examples of each prepared source of a stage the stages before have trained on."""
  rows = stages[number].rows
  used = dict.fromkeys(rows.folders, 0) if rows else {}
  for stage in stages[:number]:
    for name in used:
      for earlier, count in stage.rows.used(stage.examples).items():
        if stage.rows.folders[earlier] == rows.folders[name]:
          used[name] += count
  return used
