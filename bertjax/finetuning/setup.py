"""From a config to all that a fine-tuning run needs: data, model, loss, optimizer, weights."""

import dataclasses
import functools
import hashlib
import logging
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import loading
from bertjax.model import encoder, heads
from bertjax.tasks import batches, rows
from bertjax.tasks import task as task_lib
from bertjax.training import mesh as mesh_lib
from bertjax.training import optimizer, trials
from bertjax.training import run as run_lib

_log = logging.getLogger(__name__)


class Setup(NamedTuple):
  """All of a run that does not change while it trains."""

  config: Any  # the run's
  trials: list[tuple[int, float]]  # (seed, learning rate) of each; one of an ordinary run
  task: task_lib.Task  # with its data
  tokenizer: Tokenizer  # of `init_from`
  bert: heads.Bert  # the model with the task's head
  weights: tuple  # config and parameters of `init_from`, as read
  mesh: jax.sharding.Mesh  # the devices; with trials each holds some of them whole
  shard: Any  # trees of shapes to trees of shardings
  loss: tuple  # `loss_fn` and `loss_weights`
  transform: Any  # the optimizer
  columns: dict[str, np.ndarray]  # rows to train on
  batches: batches.TaskBatches | batches.TrialBatches  # makes the training batches
  examples: list[task_lib.Example]  # of the dev split
  dev: task_lib.Encoded  # these, encoded
  steps: int  # of the run

  @property
  def many(self) -> bool:
    return len(self.trials) > 1

  @property
  def per_epoch(self) -> int:
    return -(-self.examples_to_train // self.config.batch_size)

  @property
  def examples_to_train(self) -> int:
    return len(self.columns['input_ids']) // self.task.choices


def set_up(config) -> Setup:
  """Reads and checks everything that a run needs."""
  run_lib.check_integers(config)
  run_lib.check_save_model(config)
  run_lib.check_least(config, 1, ('batch_size', 'log_every', 'max_to_keep'))
  run_lib.check_least(
    config, 0, ('patience', 'eval_every', 'save_every', 'data.max_train_examples')
  )
  optimizer.check_rate('num_train_epochs', config.num_train_epochs)
  task, runs = rows.make_task(config), trials.list_trials(config)
  one = len(runs) == 1
  if one:
    mesh = mesh_lib.make_mesh(**config.mesh)
    mesh_lib.check_batch_size(mesh, config.batch_size)
  elif jax.process_count() > 1:
    raise ValueError(f'trials run in one process, got {jax.process_count()}; start it on one host.')
  elif config.mesh.to_dict() != {'data': -1, 'fsdp': 1, 'tensor': 1}:
    raise ValueError('trials lie whole on the devices there are; leave mesh.* out.')
  else:
    mesh = trials.make_trials_mesh(len(runs))
  tokenizer = loading.load_tokenizer(config.init_from)
  weights = loading.load_weights(config.init_from)
  bert = make_model(config, task, weights[0])
  if not config.reinit_head and task.head in weights[1]:
    check_labels(config.init_from, weights[1], task)
  packing = (packed_length(config, task, bert.config), mesh_lib.replicas(mesh) if one else 1)
  columns = rows.training_columns(config, task, tokenizer)
  examples = task.read(config.data.dev)
  task_lib.golds(examples)  # before anything compiles
  dev = rows.encode(task, examples, tokenizer, config.data.length, config.data.dev)
  local = mesh_lib.local_rows(mesh_lib.batch_sharding(mesh), config.batch_size) if one else None
  each = [batches.make_batches(config, task, columns, seed, local, *packing) for seed, _ in runs]
  steps = math.ceil(config.num_train_epochs * each[0].examples / config.batch_size)
  shard = mesh_lib.sharder(mesh, encoder.PARAM_AXES) if one else trials.sharder(mesh)
  return Setup(
    config, runs, task, tokenizer, bert, weights, mesh, shard,
    make_loss(config, bert, task, columns), make_transform(config, bert, runs[0][1], steps),
    columns, each[0] if one else batches.TrialBatches(each), examples, dev, steps,
  )  # fmt: skip


def check_labels(source, params: dict, task) -> None:
  """Refuses a model whose output layer is for other labels than the task's, or in another order.

  Without a name in common (`LABEL_0`) they cannot be compared: the labels are matched by index,
  which is logged.
  """
  own, count = loading.read_labels(source)[0], params[task.head]['bias'].size
  if count != task.num_labels:
    raise ValueError(f'{source} predicts {count} labels {own}, {task.name} has {task.num_labels}: '
                     f'{list(task.labels)}.')  # fmt: skip
  if not task.labels:
    return
  theirs, ours = ([name.casefold() for name in names] for names in (own, task.labels))
  if theirs != ours and set(theirs) & set(ours):
    raise ValueError(
      f'the labels of {source} are {own}, those of {task.name} {list(task.labels)}; they must be '
      'the same in the same order.'
    )
  if theirs != ours:
    pairs = zip(own or range(count), task.labels, strict=True)
    order = ', '.join(f'{theirs} is {ours}' for theirs, ours in pairs)
    _log.warning(
      "%s does not name the labels of %s; they are taken in the task's order: %s",
      source, task.name, order,
    )  # fmt: skip


def make_model(config, task, encoder_config) -> heads.Bert:
  """The model of `init_from` with the task's output layer."""
  changes = {
    name: value for name, value in config.model.items()
    if not (name.endswith('dropout') and value == -1.0)
  }  # fmt: skip
  changes['frozen'] = config.num_trainable_layers == 0
  if len(trials.list_trials(config)) > 1 and config.model.attention == 'auto':
    changes['attention'] = 'xla'  # the mesh splits trials, which no kernel knows of
  encoder_config = dataclasses.replace(encoder_config, **changes)
  if config.data.length > encoder_config.max_positions:
    raise ValueError(
      f'data.length={config.data.length} is longer than the {encoder_config.max_positions} '
      f'positions of {config.init_from}.'
    )
  for field, least in (('num_trainable_layers', -1), ('reinit_top_layers', 0)):
    if not least <= config[field] <= encoder_config.num_layers:
      raise ValueError(
        f'{field} must be in {least}..{encoder_config.num_layers}, the layers of '
        f'{config.init_from}, got {config[field]}.'
      )
  return heads.Bert(
    encoder_config, heads=(task.head,), pooler=task.label.pooled,
    num_labels=task.num_labels,
  )  # fmt: skip


def packed_length(config, task, encoder_config) -> int:
  """Tokens of a training row that holds several examples; 0 where a row holds one.

  `data.packed_length=-1` is `data.length`, at least 128; but 0 with choices, a CRF or BiLSTM, and with
  `span_loss_includes_padding`, where a row is one example.

  Raises:
    ValueError: if rows of `data.packed_length` tokens cannot hold every example, or may not hold several.
  """
  pack, most = config.data.packed_length, encoder_config.max_positions
  alone = [
    name for name, used in (('bilstm', encoder_config.bilstm), ('crf', encoder_config.crf),
                            ('span_loss_includes_padding', task.label.includes_padding)) if used
  ]  # fmt: skip
  if pack == -1:
    return 0 if alone or task.choices > 1 else max(config.data.length, min(128, most))
  least = config.data.length * task.choices
  if pack and not least <= pack <= most:
    raise ValueError(
      f'data.packed_length={pack} must be -1, 0 or from {least}, the longest example, to {most}, the '
      'positions of the model.'
    )
  if pack and alone:
    raise ValueError(f'{alone[0]} reads a row as one example; set data.packed_length=0.')
  return pack


def factors_of(config, bert):
  """How much of the learning rate each layer has; None if all have it whole."""
  return encoder.layer_factors(
    bert.config.num_layers,
    config.num_trainable_layers,
    config.layerwise_lr_decay,
    config.head_lr_multiplier,
  )


def make_transform(config, bert, learning_rate: float, steps: int):
  """The optimizer of a config, with the factors of its layers."""
  schedule = optimizer.make_schedule(config.schedule, steps, round(config.warmup_ratio * steps))
  return optimizer.make_optimizer(
    **config.optimizer.to_dict(), learning_rate=learning_rate, schedule=schedule,
    param_axes=encoder.PARAM_AXES, factors=factors_of(config, bert),
  )  # fmt: skip


def make_loss(config, bert, task, columns):
  """`(loss_fn, loss_weights)` of a task, parts with factor 0 cut off from the gradient."""
  weights = task.label.class_weights(config.class_weights, columns['labels'])
  loss_fn, loss_weights = task.label.make_loss(bert, weights)
  factors = factors_of(config, bert)
  if factors is None:
    return loss_fn, loss_weights
  cut = functools.partial(optimizer.stop_gradients, factors=factors)
  return lambda params, batch, rng: loss_fn(cut(params), batch, rng), loss_weights


def state_maker(setup: Setup):
  """`make(params=None)`: the state at step 0, of trials stacked [K, ...]."""
  init = functools.partial(heads.init_params, setup.bert)
  make = functools.partial(run_lib.make_state, init, setup.transform)
  if not setup.many:
    return functools.partial(make, setup.trials[0][0])

  def trial(seed, rate, *params):
    state = make(seed, *params)
    return state.replace(opt_state=optimizer.with_peak(state.opt_state, rate))

  seeds, rates = (np.array(column) for column in zip(*setup.trials, strict=True))
  return lambda *params: jax.vmap(trial)(seeds, rates.astype(np.float32), *params)


def load_params(setup: Setup) -> dict:
  """The weights of `init_from`, with each trial's own new layers."""
  config, head = setup.config, setup.task.head
  initial = jax.device_get(jax.jit(lambda: state_maker(setup)().params)())
  loaded = []
  for trial in range(len(setup.trials)):
    drawn = trials.take(initial, trial) if setup.many else initial
    params = loading.load_params(
      config.init_from, setup.bert, weights=setup.weights, tokenizer=setup.tokenizer,
      fresh=('pooler', head), initial=drawn,
      redraw=((head,) if config.reinit_head else ()) + (('pooler',) if config.reinit_top_layers else ()),
    )  # fmt: skip
    loaded.append(loading.reinit_top_layers(params, drawn, config.reinit_top_layers))
  return jax.tree.map(lambda *x: np.stack(x), *loaded) if setup.many else loaded[0]


_SAME = ('task', 'init_from', 'reinit_head', 'reinit_top_layers', 'num_trainable_layers', 'layerwise_lr_decay',
         'head_lr_multiplier',
         'num_train_epochs', 'batch_size', 'warmup_ratio', 'schedule', 'patience', 'class_weights',
         'optimizer', 'model', 'span_loss_includes_padding')  # fmt: skip
_FREE = ('model.attention', 'model.remat', 'model.unroll')  # change no result


def run_identity(setup: Setup) -> dict:
  """Flat {field: value} of all that may not change between a start and its resumption."""
  digests = {}
  for split, columns in (('rows', setup.columns), ('dev', setup.dev.columns)):
    digest = hashlib.sha256()
    for name in sorted(columns):
      digest.update(np.ascontiguousarray(columns[name]))
    digests[split] = digest.hexdigest()[:16]
  flat = run_lib.flatten(setup.config, _SAME)
  flat = {name: value for name, value in flat.items() if name not in _FREE}
  return flat | {
    'data.packed_length': setup.config.data.packed_length, 'data.buckets': setup.config.data.buckets,
    'trials': [list(trial) for trial in setup.trials],
    'tokenizer': setup.tokenizer.fingerprint, **digests,
  }  # fmt: skip
