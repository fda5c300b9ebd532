"""The parts that a config names: checks, model, optimizer, layout, batches and identity.

Programs read a config here or themselves; libraries get plain arguments.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
import optax
from etils import epath

from bertjax import build_objective, plan, tasks
from bertjax.config import flat
from bertjax.data import dataset, masking, mixture, remote
from bertjax.data import loader as loader_lib
from bertjax.fields import OF_TASKS, REPLACED
from bertjax.interop import loading, sentences
from bertjax.model import config as model_config
from bertjax.model import encoder, heads
from bertjax.objectives import mlm
from bertjax.tasks import task as task_lib
from bertjax.training import layout as layout_lib
from bertjax.training import loop, metrics, optimizer
from bertjax.training import mesh as mesh_lib
from bertjax.training import run as run_lib

_log = logging.getLogger(__name__)

_LEAST = {
  1: ('batch_size', 'gradient_accumulation_steps', 'log_every', 'max_eval_examples', 'max_to_keep'),
  0: ('lora.rank', 'patience', 'eval_every', 'save_every', 'stall_seconds', 'loss_spike_threshold',
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
  metrics.check_trackers(config.trackers)
  if fields.get('init_layers') and not fields['init_from']:
    raise ValueError(
      f'init_layers={config.init_layers!r} are layers of init_from, which is empty; name a model.'
    )
  if fields.get('data.input') and fields['data.heldout_fraction'] == 1:
    raise ValueError(
      'data.heldout_fraction=1 leaves no document to train on; it is for `bertjax evaluate`. Use '
      '0.05.'
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
  return heads.Bert(encoder_config, heads=build_objective.loss_terms(config), pooler=config.nsp)


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
  if config.objective != 'next_token':
    tokenizer.id_of('mask')  # raises if there is none
  return loader_lib.Batches(
    rows, config.batch_size, config.seed, masks,
    vocab_size=tokenizer.vocab_size, special=tokenizer.special, objective=config.objective,
    word_flags=None if masks.unit == 'subword' else tokenizer.word_flags,
    local=mesh_lib.local_rows(sharding, config.batch_size), first=first,
  )  # fmt: skip


def make_evaluate(objective, mesh, loader: str) -> Callable:
  """Returns (params, {source: heldout batches}, maximum number of rows) -> scores of pre-training.

  The scores are those of all rows together; of named sources there is also 'LOSS/SOURCE'.
  """
  eval_step = loop.make_eval_step(
    objective.loss, objective.weights, mesh=mesh, frozen=objective.frozen
  )

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
                            ('span_loss_includes_padding', label.includes_padding),
                            ('task.name=embed', not label.head)) if used
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


def distillation_fields(config) -> dict:
  """The fields of a teacher, and of the layers to start from, for the identity of a run."""
  fields = flat({'distill': config.distill.to_dict()}) if config.distill.teacher else {}
  return fields | ({'init_layers': config.init_layers} if config.init_layers else {})


def pretraining_identity(config, encoder_config, stages: list[plan.StagePlan]) -> dict:
  """Flat {field: value} of everything that may not change when a run is resumed."""
  fields = flat({name: config.to_dict()[name] for name in _SAME})
  schedules = (config.schedule, *(stage.schedule for stage in config.stages))
  if any(name.startswith('wsd') for name in schedules):
    fields['decay_ratio'] = config.decay_ratio
  if config.objective == 'electra':
    fields |= {name: config[name] for name in ('generator_size', 'generator_from', 'rtd_weight')}
  fields |= distillation_fields(config)
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
      for name, count in plan.examples_before(stages, number).items():
        facts[f'first_example.{name}'.rstrip('.')] = count
      facts |= _stage_identity(stage.config, stage.section)
    fields |= {f'{stage.name}.{k}'.lstrip('.'): v for k, v in facts.items()}
  return fields


def _stage_identity(config, section) -> dict:
  """What a stage of a resumed run must share with its start, apart from its rows."""
  fields, free = flat(config), ('length', 'prepared', 'input', 'remat')  # rows, or no result
  values = {name: fields[field] for name, field in REPLACED.items() if name not in free}
  return values | {name: section[name] for name in section if name not in (*REPLACED, 'steps')}


def pin_hub_data(config, commits: Mapping[str, str]) -> dict[str, str]:
  """Adds `@COMMIT` to the data sets of the hub that a run trains on; returns {source: commit}.

  A source that is not in `commits` gets the present one of its revision.
  """
  config.stages = tuple(stage.copy_and_resolve_references() for stage in config.stages)
  commits = dict(commits)
  for section in (config.data, *config.stages):
    section.input, found = remote.pin(section.input, commits)
    commits |= found
  return commits


def check_run(workdir) -> None:
  """Raises ValueError for a run of an earlier version with stages as fractions of its steps."""
  path = epath.Path(workdir) / 'run.json'
  config = json.loads(path.read_text())['config'] if path.exists() else {}
  if any(config.get(name, {}).get('fraction') for name in ('stage2', 'stage3')):
    raise ValueError(
      f'{workdir} is a run of an earlier version, with stage2.fraction; start it again with '
      '--config.stages[1].steps, or continue from its weights with --config.init_from.'
    )


def make_task(config, model: str = ''):
  """The task that a config for fine-tuning describes in `task` and `data`.

  Args:
    config: of the run.
    model: whose embeddings are meant, by its pooling and prompts; '' = `init_from`.

  Raises:
    ValueError: if the task is unknown, lacks its data or an option, or has another task's option.
  """
  data, options = config.data, config.task.to_dict()
  name = options.pop('name')
  for option in ('labels', 'endings', 'types', 'negatives', 'widths'):  # several, joined by '|'
    options[option] = tuple(part for part in options[option].split('|') if part)
  if config.span_loss_includes_padding:
    if not name.startswith('squad'):
      raise ValueError(f'span_loss_includes_padding is for SQuAD, got {name!r}; leave it False.')
    options['loss_includes_padding'] = True
  if name == 'embed':
    options |= embedding_options(options, model or config.init_from)
  files = {split: data[f'{split}_file'] for split in ('train', 'dev', 'test')}
  files = {split: file for split, file in files.items() if file}
  task = tasks.make_task(name, data.source, files=files, dev_fraction=data.dev_fraction, **options)
  task.label.check_batch_size(config.batch_size)
  if not task.heads and config.num_trainable_layers == 0:
    raise ValueError(
      f'num_trainable_layers=0 leaves nothing to train: {name} has no head; use at least 1.'
    )
  return task


def embedding_options(options: dict, model: str) -> dict:
  """The options of 'embed' with what a model's files say where they are empty.

  Raises:
    ValueError: for widths that are no numbers, or a model with layers that are not trained.
  """
  layers = loading.read_sentence_layers(model) if model else None
  if layers and layers.steps not in ((), (sentences.normalise,)):
    raise ValueError(
      f'{model} has Dense layers after its pooling, which are not trained; start from a model '
      'without them.'
    )
  prompts = layers.prompts if layers else {}
  if not all(width.isdecimal() for width in options['widths']):
    raise ValueError(f"task.widths are written '256|128', got {'|'.join(options['widths'])!r}.")
  return {
    'pooling': options['pooling'] or (layers.pooling if layers else 'mean'),
    'query_prompt': options['query_prompt'] or prompts.get('query', ''),
    'document_prompt': options['document_prompt'] or prompts.get('document', ''),
    'widths': tuple(map(int, options['widths'])),
  }


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
