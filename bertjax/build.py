"""The parts that a config names: checks, stages, model, optimizer, layout, batches and identity.

Programs read a config here or themselves; libraries get plain arguments.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import numpy as np
import optax
from etils import epath

from bertjax import tasks
from bertjax.config import flat
from bertjax.data import blocks, dataset, masking
from bertjax.data import loader as loader_lib
from bertjax.fields import OF_TASKS
from bertjax.model import config as model_config
from bertjax.model import encoder, heads
from bertjax.objectives import mlm
from bertjax.tasks import task as task_lib
from bertjax.training import layout as layout_lib
from bertjax.training import loop, optimizer
from bertjax.training import mesh as mesh_lib
from bertjax.training import run as run_lib

_log = logging.getLogger(__name__)

_LATER = ('stage2', 'stage3')
_LEAST = {
  1: ('num_train_steps', 'batch_size', 'log_every', 'max_eval_examples', 'max_to_keep'),
  0: ('patience', 'eval_every', 'save_every', 'stall_seconds', 'loss_spike_threshold',
      'data.max_train_examples',
      *(f'{stage}.{name}' for stage in _LATER for name in ('length', 'batch_size', 'mask_rate'))),
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


class Stage(NamedTuple):
  """Steps start..stop-1 of a pre-training run, on rows of one kind."""

  name: str  # of its section in the config, '' for the first
  start: int
  stop: int
  config: ml_collections.ConfigDict  # the run's, with the stage's values
  folder: epath.Path | None = None  # of the prepared rows
  text: blocks.Text | None = None  # instead of a folder, where text is streamed


def stages(config) -> list[Stage]:
  """The stages of a run; completes `max_predictions` in the config.

  Raises:
    ValueError: for fractions out of range, or rows that are not prepared alike or also streamed.
  """
  prepared = [section.prepared for section in (config.data, *(config[name] for name in _LATER))]
  if config.data.streaming and any(prepared):
    raise ValueError(
      f'data.streaming=True reads raw text, got prepared rows ({max(prepared)}); give one of them.'
    )
  fractions = [config[name].fraction for name in _LATER]
  if not all(fraction >= 0 for fraction in fractions) or not sum(fractions) < 1:
    raise ValueError(
      'stage2.fraction and stage3.fraction must be at least 0 and together below 1, got '
      f'{fractions[0]} and {fractions[1]}.'
    )
  derive_predictions(config)
  total, result = config.num_train_steps, [Stage('', 0, config.num_train_steps, config)]
  for number, name in enumerate(_LATER):
    start = total - round(sum(fractions[number:]) * total)
    if round(fractions[number] * total):
      before = result[-1]
      result[-1] = before._replace(stop=start)
      result.append(Stage(name, start, total, _stage_config(before.config, name)))
  return result


def _stage_config(before, name: str) -> ml_collections.ConfigDict:
  """The config of a stage after that of the stage before."""
  config = ml_collections.ConfigDict(before.to_dict())
  stage, data = config[name], config.data
  prepared = stage.prepared or (data.prepared if stage.length in (0, data.length) else '')
  if bool(data.prepared) != bool(prepared):
    raise ValueError(
      f'every stage needs prepared rows of its length, or raw text: got data.prepared='
      f'{data.prepared!r} and {name}.prepared={stage.prepared!r}.'
    )
  data.update(length=stage.length or data.length, prepared=prepared)
  config.batch_size = stage.batch_size or config.batch_size
  config.masking.rate = stage.mask_rate or config.masking.rate
  config.masking.max_predictions = stage.max_predictions or config.masking.max_predictions
  derive_predictions(config)
  return config


def derive_predictions(config) -> None:
  """Replaces `masking.max_predictions=-1` by the number that rate and length need."""
  sequences = config.data.max_sequences_per_row
  if config.data.prepared:  # packed as the folder says
    settings = dataset.read_manifest(config.data.prepared)['settings']
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


def make_optimizer(
  config, num_train_steps: int, warmup_steps: int, **options
) -> optax.GradientTransformation:
  """The optimizer and schedule of a config."""
  options = {'learning_rate': config.learning_rate, **config.optimizer.to_dict(), **options}
  schedule = optimizer.make_schedule(config.schedule, num_train_steps, warmup_steps)
  return optimizer.make_optimizer(schedule=schedule, param_axes=encoder.PARAM_AXES, **options)


def make_layout(config, devices=None) -> layout_lib.Layout:
  """The layout of a pre-training run on all devices, or on these."""
  return layout_lib.Layout(
    mesh_lib.make_mesh(**config.mesh, devices=devices), encoder.PARAM_AXES, config.seed,
    config.prng_impl, config.gradient_accumulation_steps,
  )  # fmt: skip


def make_batches(config, rows, tokenizer, mesh) -> loader_lib.Batches:
  """The batches of the rows of a split, this process's rows of them."""
  sharding, masks = mesh_lib.batch_sharding(mesh), masking.Masking(**config.masking)
  if config.objective == 'mlm':
    tokenizer.id_of('mask')  # raises if there is none
  return loader_lib.Batches(
    rows, config.batch_size, config.seed, masks,
    vocab_size=tokenizer.vocab_size, special=tokenizer.special, objective=config.objective,
    word_flags=None if masks.unit == 'subword' else tokenizer.word_flags,
    local=mesh_lib.local_rows(sharding, config.batch_size),
  )  # fmt: skip


def make_evaluate(objective, mesh, loader: str) -> Callable:
  """Returns (params, heldout batches, maximum number of rows) -> scores of pre-training."""
  eval_step = loop.make_eval_step(objective.loss, objective.weights, mesh=mesh)

  def evaluate(params, heldout: loader_lib.Batches, most: int) -> dict[str, float]:
    stream = loader_lib.iterate(heldout.evaluation, 0, heldout.steps_for(most), loader=loader)
    batches = loop.to_device(stream, mesh)
    return mlm.add_perplexity(loop.evaluate(eval_step, params, batches, objective.scale))

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


def pretraining_identity(config, encoder_config, stages: list[Stage]) -> dict:
  """Flat {field: value} of everything that may not change when a run is resumed."""
  fields = flat({name: config.to_dict()[name] for name in _SAME})
  model = dataclasses.asdict(encoder_config)
  free = ('attention', 'classifier_dropout', 'remat', 'unroll', *OF_TASKS)  # change no result
  fields |= {f'model.{k}': v for k, v in model.items() if k not in free}
  for stage in stages:
    if stage.text:
      facts, tokenizer = stage.text.identity, stage.text.tokenizer.fingerprint
    else:
      manifest = dataset.read_manifest(stage.folder)
      facts, tokenizer = {'rows': dataset.manifest_hash(manifest)}, manifest['tokenizer']
    if tokenizer != fields.setdefault('tokenizer', tokenizer):
      folders = f'{stages[0].folder} and {stage.folder}'
      raise ValueError(f'{folders} were prepared with different tokenizers.')
    if stage.name:
      section = stage.config.masking
      facts |= {'start': stage.start, 'batch_size': stage.config.batch_size, 'rate': section.rate,
                'max_predictions': section.max_predictions}  # fmt: skip
    fields |= {f'{stage.name}.{k}'.lstrip('.'): v for k, v in facts.items()}
  return fields


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
