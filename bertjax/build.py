"""The parts that a config names: checks, stages, model, optimizer, layout, batches and identity.

Programs read a config here or themselves; libraries get plain arguments.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
import optax
from etils import epath

from bertjax import tasks
from bertjax.config import flat
from bertjax.data import dataset, masking, mixture, streaming
from bertjax.data import loader as loader_lib
from bertjax.fields import OF_TASKS, REPLACED
from bertjax.model import config as model_config
from bertjax.model import encoder, heads
from bertjax.objectives import mlm
from bertjax.tasks import task as task_lib
from bertjax.training import layout as layout_lib
from bertjax.training import loop, optimizer
from bertjax.training import mesh as mesh_lib
from bertjax.training import run as run_lib

_log = logging.getLogger(__name__)

_LEAST = {
  1: ('batch_size', 'log_every', 'max_eval_examples', 'max_to_keep'),
  0: ('patience', 'eval_every', 'save_every', 'stall_seconds', 'loss_spike_threshold',
      'data.max_train_examples', 'data.mixture_exponent', 'num_train_steps'),
}  # fmt: skip
_CHOICES = {
  'save_model': ('last', 'best'), 'on_divergence': ('stop', 'skip'),
  'objective': loader_lib.OBJECTIVES, 'prng_impl': ('threefry2x32', 'rbg'),
}  # fmt: skip


def check(config) -> None:
  """Raises ValueError for fields that are out of range."""
  fields = flat(config)
  for name, value in fields.items():
    if name != 'seed' and type(value) is int and abs(value) >= 2**31:
      raise ValueError(f'{name} must be below 2**31, got {value}.')
    if name in _CHOICES and value not in _CHOICES[name]:
      raise ValueError(f'{name} must be one of {_CHOICES[name]}, got {value!r}.')
    if name in ('learning_rate', 'num_train_epochs'):
      optimizer.check_rate(name, value)
  for least, names in _LEAST.items():
    for name in filter(fields.__contains__, names):
      if not least <= fields[name] < math.inf:
        raise ValueError(f'{name} must be at least {least}, got {fields[name]}.')
  for name, value in fields.items():
    least = -1 if name.endswith('.max_predictions') else 0
    if name.startswith('stages[') and not isinstance(value, str) and not least <= value < math.inf:
      raise ValueError(f'{name} must be at least {least}, got {value}.')
  if not 0 <= config.seed < 2**63:
    raise ValueError(f'seed must be at least 0 and below 2**63, got {config.seed}.')
  if config.seed >= 2**32:
    _log.warning(
      "seed=%d: jax's keys, for weights and dropout, use its lower 32 bits, %d.",
      config.seed, config.seed % 2**32,
    )  # fmt: skip
  if fields.get('data.input') and fields['data.heldout_fraction'] == 1:
    raise ValueError(
      'data.heldout_fraction=1 leaves no document to train on; it is for `bertjax evaluate`. Use '
      '0.05.'
    )


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
  if config.objective == 'mlm' or config.masking.max_predictions == -1:
    config.masking.max_predictions = masking.predictions(
      config.masking, config.data.length, sequences
    )


def make_model(config, vocab_size: int) -> heads.Bert:
  """The model of a pre-training config, its vocabulary size checked against the tokenizer's."""
  fields = config.model.to_dict()
  fields['vocab_size'] = fields['vocab_size'] or vocab_size
  if fields['vocab_size'] < vocab_size:
    raise ValueError(
      f'model.vocab_size={fields["vocab_size"]} is smaller than the vocabulary, which has '
      f"{vocab_size} entries; leave it 0 to take the vocabulary's size."
    )
  encoder_config = model_config.EncoderConfig(**fields)
  if config.data.length > encoder_config.max_positions:
    raise ValueError(
      f'data.length={config.data.length} is longer than '
      f'model.max_positions={encoder_config.max_positions}.'
    )
  if (config.objective == 'next_token') != encoder_config.causal:
    raise ValueError(
      f'objective={config.objective} with model.causal={encoder_config.causal}: predicting the '
      'next token needs a causal encoder, and masked LM one that attends to both sides.'
    )
  if config.nsp and (encoder_config.causal or encoder_config.type_vocab_size < 2):
    raise ValueError(
      'next-sentence prediction needs model.type_vocab_size of 2 and an encoder that attends to '
      f'both sides, got {encoder_config.type_vocab_size} and '
      f'model.causal={encoder_config.causal}; set --config.nsp=False.'
    )
  return heads.Bert(encoder_config, heads=loss_terms(config), pooler=config.nsp)


def loss_terms(config) -> tuple[str, ...]:
  return ('mlm', 'nsp') if config.nsp else ('mlm',)


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


def make_optimizer(config, schedule: Callable, **options) -> optax.GradientTransformation:
  """The optimizer of a config."""
  options = {'learning_rate': config.learning_rate, **config.optimizer.to_dict(), **options}
  return optimizer.make_optimizer(schedule=schedule, param_axes=encoder.PARAM_AXES, **options)


def make_layout(config, devices=None) -> layout_lib.Layout:
  """The layout of a pre-training run on all devices, or on these."""
  return layout_lib.Layout(
    mesh_lib.make_mesh(**config.mesh, devices=devices), encoder.PARAM_AXES, config.seed,
    config.prng_impl, config.gradient_accumulation_steps,
  )  # fmt: skip


def make_batches(config, rows, tokenizer, mesh, first: int = 0) -> loader_lib.Batches:
  """The batches of the rows of a split from an example on, this process's rows of them."""
  sharding, masks = mesh_lib.batch_sharding(mesh), masking.Masking(**config.masking)
  if config.objective == 'mlm':
    tokenizer.id_of('mask')  # raises if there is none
  return loader_lib.Batches(
    rows, config.batch_size, config.seed, masks,
    vocab_size=tokenizer.vocab_size, special=tokenizer.special, objective=config.objective,
    word_flags=None if masks.unit == 'subword' else tokenizer.word_flags,
    local=mesh_lib.local_rows(sharding, config.batch_size), first=first,
  )  # fmt: skip


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


def make_evaluate(objective, mesh, loader: str) -> Callable:
  """Returns (params, {source: heldout batches}, maximum number of rows) -> scores of pre-training.

  The scores are those of all rows together; of named sources there is also 'LOSS/SOURCE'.
  """
  eval_step = loop.make_eval_step(objective.loss, objective.weights, mesh=mesh)

  def sums(params, heldout: loader_lib.Batches, most: int):
    stream = loader_lib.iterate(heldout.evaluation, 0, heldout.steps_for(most), loader=loader)
    return loop.evaluation_sums(eval_step, params, loop.to_device(stream, mesh))

  def evaluate(params, heldout: Mapping[str, loader_lib.Batches], most: int) -> dict[str, float]:
    each = mixture.heldout_each(most, heldout)
    parts = {name: sums(params, batches, each) for name, batches in heldout.items()}
    total = jax.tree.map(lambda *x: sum(x), *parts.values())
    scores = mlm.add_perplexity(loop.scores(total, objective.scale))
    for name in filter(None, parts):
      of_source = loop.scores(parts[name], objective.scale)
      scores |= {f'{k}/{name}': v for k, v in of_source.items() if k.endswith('_loss')}
    return scores

  return evaluate


def packed_length(config, label, encoder_config) -> int:
  """Tokens of a training row that holds several examples; 0 where a row holds one.

  `data.packed_length=-1` is `data.length`, at least 128; but 0 with choices, a CRF or BiLSTM, and
  with `span_loss_includes_padding`, where a row is one example.

  Raises:
    ValueError: if rows of that many tokens cannot hold every example, or may not hold several.
  """
  pack, most = config.data.packed_length, encoder_config.max_positions
  alone = [
    name for name, used in (('bilstm', encoder_config.bilstm), ('crf', encoder_config.crf),
                            ('span_loss_includes_padding', label.includes_padding)) if used
  ]  # fmt: skip
  if pack == -1:
    return 0 if alone or label.rows > 1 else max(config.data.length, min(128, most))
  least = config.data.length * label.rows
  if pack and not least <= pack <= most:
    raise ValueError(
      f'data.packed_length={pack} must be -1, 0 or from {least}, the longest example, to {most}, '
      'the positions of the model.'
    )
  if pack and alone:
    raise ValueError(f'{alone[0]} reads a row as one example; set data.packed_length=0.')
  return pack


def run_options(config) -> run_lib.Options:
  """The intervals and stopping rules of a config."""
  names = {field.name for field in dataclasses.fields(run_lib.Options)}
  fields = {name: value for name, value in config.items() if name in names}
  skip = config.get('on_divergence') == 'skip'
  return run_lib.Options(**fields, skip_divergence=skip)


# What a resumed run must share with its start.
_SAME = ('init_from', 'init_resize', 'nsp', 'objective', 'seed', 'prng_impl', 'batch_size',
         'gradient_accumulation_steps', 'learning_rate', 'warmup_steps', 'schedule', 'optimizer',
         'masking')  # fmt: skip


def pretraining_identity(config, encoder_config, stages: list[StagePlan]) -> dict:
  """Flat {field: value} of everything that may not change when a run is resumed."""
  fields = flat({name: config.to_dict()[name] for name in _SAME})
  schedules = (config.schedule, *(stage.schedule for stage in config.stages))
  if any(name.startswith('wsd') for name in schedules):
    fields['decay_ratio'] = config.decay_ratio
  model = dataclasses.asdict(encoder_config)
  free = ('attention', 'classifier_dropout', 'remat', 'unroll', *OF_TASKS)  # change no result
  fields |= {f'model.{k}': v for k, v in model.items() if k not in free}
  for number, stage in enumerate(stages):
    if f'{stage.name}.start' in fields:  # the same stage with a larger batch
      continue
    facts, tokenizer = stage.data.identity, stage.data.tokenizer.fingerprint
    if tokenizer != fields.setdefault('tokenizer', tokenizer):
      folders = f'{stages[0].config.data.prepared} and {stage.config.data.prepared}'
      raise ValueError(f'{folders} were prepared with different tokenizers.')
    if stage.name:
      facts['start'] = stage.start
      for name, count in examples_before(stages, number).items():
        facts[f'first_example.{name}'.rstrip('.')] = count
      facts |= _stage_identity(stage.config, stage.section)
    fields |= {f'{stage.name}.{k}'.lstrip('.'): v for k, v in facts.items()}
  return fields


def _stage_identity(config, section) -> dict:
  """What a stage of a resumed run must share with its start, apart from its rows."""
  fields, free = flat(config), ('length', 'prepared', 'input', 'remat')  # rows, or no result
  values = {name: fields[field] for name, field in REPLACED.items() if name not in free}
  return values | {name: section[name] for name in section if name not in (*REPLACED, 'steps')}


def check_run(workdir) -> None:
  """Raises ValueError for a run of an earlier version with stages as fractions of its steps."""
  path = epath.Path(workdir) / 'run.json'
  config = json.loads(path.read_text())['config'] if path.exists() else {}
  if any(config.get(name, {}).get('fraction') for name in ('stage2', 'stage3')):
    raise ValueError(
      f'{workdir} is a run of an earlier version, with stage2.fraction; start it again with '
      '--config.stages[1].steps, or continue from its weights with --config.init_from.'
    )


def make_task(config):
  """The task that a config for fine-tuning describes in `task` and `data`.

  Raises:
    ValueError: if the task is unknown, lacks its data or an option, or has another task's option.
  """
  data, options = config.data, config.task.to_dict()
  name = options.pop('name')
  for option in ('labels', 'endings', 'types'):  # several names, joined by '|'
    options[option] = tuple(part for part in options[option].split('|') if part)
  if config.span_loss_includes_padding:
    if not name.startswith('squad'):
      raise ValueError(f'span_loss_includes_padding is for SQuAD, got {name!r}; leave it False.')
    options['loss_includes_padding'] = True
  files = {split: data[f'{split}_file'] for split in ('train', 'dev', 'test')}
  files = {split: file for split, file in files.items() if file}
  return tasks.make_task(name, data.source, files=files, dev_fraction=data.dev_fraction, **options)


def training_examples(config, task) -> list[task_lib.Example]:
  """The labelled examples to train on, a random subset of `data.max_train_examples`."""
  data = config.data
  return task_lib.training_examples(task, data.train, data.max_train_examples, config.seed)


def training_columns(config, task, tokenizer) -> dict[str, np.ndarray]:
  """The encoded training split: encoded now, or read from `data.prepared`.

  Raises:
    ValueError: if `data.prepared` was prepared with another config.
  """
  data = config.data
  if not data.prepared:
    examples = training_examples(config, task)
    return task_lib.encode_split(task, examples, tokenizer, data.length, data.train).columns
  prepared = dataset.Dataset(data.prepared, 'train')
  wanted = preparation_settings(config, task, tokenizer)
  found = {name: prepared.manifest.get(name) for name in wanted}
  before, now = (flat(settings) for settings in (found, wanted))
  if changed := sorted(name for name in now if before.get(name) != now[name]):
    old, new = (
      ', '.join(f'{name.removeprefix("settings.")}={settings.get(name)!r}' for name in changed)
      for settings in (before, now)
    )
    raise ValueError(
      f'{data.prepared} was prepared with {old}, this run has {new}; prepare it again.'
    )
  return prepared[np.arange(len(prepared))]


def preparation_settings(config, task, tokenizer) -> dict:
  """The settings on which the encoded training split depends, for the manifest."""
  named = ('length', 'train', 'max_train_examples', 'train_file', 'dev_file', 'dev_fraction')
  chosen = {name: config.data[name] for name in named} | {'labels': list(task.labels)}
  if config.data.max_train_examples:
    chosen['seed'] = config.seed  # of the subset
  return {'task': config.task.to_dict(), 'tokenizer': tokenizer.fingerprint, 'settings': chosen}
