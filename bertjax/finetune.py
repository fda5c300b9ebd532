"""Finetune: a pre-trained model and one more output layer learn a task (paper, sections 3.2 and 4).

  bertjax finetune --config=configs/finetune/glue.py:sst2 --workdir=DIR \\
      --config.init_from=MODEL --config.data.source=GLUE/SST-2

`init_from` is a model of any kind (see `bertjax convert --help`), whose vocabulary is taken too.
The same command started again resumes. With several seeds or learning rates
(`--config.seeds=5 --config.learning_rates=2e-5,3e-5,5e-5`) all runs train at once, in one program,
and `trials.json` has their mean, deviation, best and failed ones. The workdir gets what `pretrain`
leaves, `metrics.json` with the task's official metrics on the dev split, `predictions/` of dev and
test in the official format, `report.html`, and `model/`, the best of the evaluations by the task's
main metric. `bertjax evaluate --workdir=DIR` scores it again, on any split.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from bertjax.data import batches as batches_lib
from bertjax.data import store
from bertjax.interop import directory
from bertjax.model import crf, encoder, heads, losses
from bertjax.model.config import POOLED_HEADS
from bertjax.tasks import batches, report, rows
from bertjax.tasks import task as task_lib
from bertjax.training import checkpoint, distributed, log, loop, optimizer, trials
from bertjax.training import mesh as mesh_lib
from bertjax.training import run as run_lib

_log = logging.getLogger(__name__)

FLAGS = {
  'config': ('glue', 'a recipe: a file, or the name of one in configs/finetune; :WORDS vary it'),
  'workdir': ('', 'folder of the run; the same folder resumes it'),
} | distributed.FLAGS

PROBLEMS = {
  'class': 'single_label_classification',
  'regression': 'regression',
  'multilabel': 'multi_label_classification',
}


def default_config(task: str = 'sst2') -> ml_collections.ConfigDict:
  """Every field of a fine-tuning run; recipes change some and flags change any."""
  c = ml_collections.ConfigDict
  return c({
    'task': task,  # a name in bertjax.TASKS
    'init_from': '',  # the model to start from: a folder (ours, HF's, Google's) or a hub name
    'fresh_head': True,  # False: goes on with the model's own output layer for this task
    'redraw_layers': 0,  # top layers and pooler drawn afresh (Zhang et al. 2021)
    'trained_layers': -1,  # top layers that are trained, without embeddings; -1 = all, 0 = frozen
    'layer_decay': 1.0,  # factor of the learning rate from each layer to the one below
    'head_factor': 1.0,  # of the learning rate outside the encoder, say 10.0 for a CRF or BiLSTM
    'seed': 0,  # of the new layer, data order and dropout
    'seeds': 1,  # trials from this many seeds, the first is `seed`
    'epochs': 3.0,  # passes over the training split
    'batch_size': 32,  # examples of a global batch
    'learning_rate': 2e-5,  # the peak
    'learning_rates': '',  # trials of several peaks, as '2e-5,3e-5,5e-5', each with every seed
    'warmup_share': 0.1,  # of the steps, from 0 to the peak
    'schedule': 'google',  # decay counted from step 0; 'linear': from the warm-up; 'constant'
    'patience': 0,  # evaluations without a better one after which the run ends; 0 = never
    'class_weights': '',  # of the loss: 'balanced', or a number for each class, as '1.0,2.5'
    'optimizer': c({
      'name': 'bert',  # AdamW without bias correction; 'adamw' (with it), 'lamb', 'sgd'
      'b1': 0.9,  # decay of the first moment; the momentum of 'sgd'
      'b2': 0.999,  # decay of the second moment
      'eps': 1e-6,  # added outside the root
      'weight_decay': 0.01,  # not on biases and LayerNorm
      'clip_norm': 1.0,  # global norm of the whole batch's gradient; 0.0 = off
    }),
    'data': c({
      'source': '',  # folder in the official layout, or tfds:NAME
      'prepared': '',  # training rows by `bertjax prepare` with this config; '' = made at the start
      'files': '',  # other names for some splits' files, as 'train=a.json,dev=b.json'
      'options': '',  # of the task, as 'text=review,label=stars'; see bertjax/tasks
      'length': 128,  # tokens a row; longer examples are cut, and counted
      'buckets': '32,48,64,96,128,192,256,384',  # lengths of batches that are not packed
      'pack': -1,  # tokens of a row of several examples; 0 = one a row; -1 = length, at least 128
      'train': 'train',  # split to train on
      'dev': 'dev',  # split to evaluate on
      'test': 'test',  # split to predict at the end, if the source has it; '' = none
      'max_train': 0,  # training examples at most, the first of a shuffle by `seed`; 0 = all
      'loader': 'auto',  # 'tfdata', 'threads', or the first of them that is installed
    }),
    'model': c({
      'hidden_dropout': -1.0,  # -1.0 = as the model has it
      'attention_dropout': -1.0,  # -1.0 = as the model has it
      'classifier_dropout': -1.0,  # before the output layer; -1.0 = as the model has it
      'features': 'last',  # states the head reads; 'concat_last_four', ... (paper, table 7)
      'bilstm': 0,  # bidirectional LSTM layers under the output layer
      'bilstm_size': 768,  # their units in each direction
      'crf': False,  # True: a conditional random field chooses the tags of a sentence together
      'dtype': 'float32',  # of activations and products; 'bfloat16' on TPU and GPU
      'attention': 'auto',  # or a kernel by name: 'xla', 'cudnn'
      'remat': 'none',  # 'full' saves nothing within a layer, 'dots' saves matrix products
      'unroll': 1,  # layers per iteration of the layer loop
    }),
    'span_over_padding': False,  # True: Google's SQuAD loss, which also ranks padding; no buckets
    'mesh': c({
      'data': -1,  # replicas; -1 takes the devices left over
      'fsdp': 1,  # replicas that split parameters and moments between them
      'tensor': 1,  # devices that split each layer
    }),
    'log_every': 50,  # steps between log lines
    'eval_every': 0,  # steps between evaluations; 0 = after each epoch
    'save_every': 0,  # steps between checkpoints besides those of evaluations
    'keep': 1,  # newest checkpoints kept; the best one stays besides
  })  # fmt: skip


class Setup(NamedTuple):
  """All of a run that does not change while it trains.

  Attributes:
    config: the run's.
    trials: (seed, learning rate) of each trial; one of an ordinary run.
    task: with its data.
    tokenizer: of `init_from`.
    bert: the model with the task's head.
    weights: config and parameters of `init_from`, as read.
    mesh: the devices; with trials each holds some of them whole.
    shard: trees of shapes to shardings.
    loss: `loss_fn` and `loss_weights`.
    transform: the optimizer.
    schedule: step to factor of the peak rate.
    columns: rows to train on.
    batches: makes the training batches.
    examples: of the dev split.
    dev: these, encoded.
    steps: of the run.
  """

  config: Any
  trials: list[tuple[int, float]]
  task: task_lib.Task
  tokenizer: Any
  bert: heads.Bert
  weights: tuple
  mesh: jax.sharding.Mesh
  shard: Any
  loss: tuple
  transform: Any
  schedule: Any
  columns: dict[str, np.ndarray]
  batches: batches.TaskBatches | batches.TrialBatches
  examples: list[task_lib.Example]
  dev: task_lib.Encoded
  steps: int

  @property
  def many(self) -> bool:
    return len(self.trials) > 1

  @property
  def per_epoch(self) -> int:
    return -(-self.examples_to_train // self.config.batch_size)

  @property
  def examples_to_train(self) -> int:
    return len(self.columns['input_ids']) // self.task.choices


def run(config, *, workdir: str, **peers) -> dict[str, float]:
  """Fine-tunes, from a checkpoint in `workdir` if there is one; returns the best dev scores.

  Raises:
    ValueError: for a config or data that cannot be trained, before anything compiles.
    loop.DivergedError: if a loss is not finite, but for trials, whose others go on.
    SystemExit: with code 75, after SIGTERM and a save.
  """
  if not workdir or not config.init_from:
    raise ValueError('finetune needs --workdir=DIR and --config.init_from=MODEL.')
  distributed.start(**peers)
  workdir = epath.Path(workdir)
  setup = set_up(config)
  identity = run_identity(setup)
  run_lib.check_same(workdir, identity)
  distributed.agree('configuration', [identity, config.to_dict()])
  workdir.mkdir(parents=True, exist_ok=True)
  checkpoints = checkpoint.Checkpoints(
    workdir / 'checkpoints', keep=config.keep, best=setup.task.metric, highest=True
  )
  state, shardings, meta = run_lib.start(
    state_maker(setup), setup.shard, checkpoints, functools.partial(load_params, setup)
  )
  if jax.process_index() == 0:
    log.write_run(workdir / 'run.json', config.to_dict(), identity=identity)
  history = meta.get('evaluations', [])  # {'step', 'scores' of each trial}
  predict = make_predict(config, setup.bert, setup.task, setup.mesh, many=setup.many)
  try:
    stopped_at = train(setup, state, shardings, predict, checkpoints, workdir, identity, history)
    if stopped_at is None:
      params, scores = best(setup, checkpoints, history)
  finally:
    checkpoints.close()
  run_lib.exit_if_stopped(stopped_at)
  if setup.many:  # of the best trial alone
    alone = mesh_lib.make_mesh(devices=jax.devices()[:1])
    predict = make_predict(config, setup.bert, setup.task, alone)
  return finish(setup, workdir, predict, params, scores, history)


def set_up(config) -> Setup:
  """Reads and checks everything that a run needs."""
  run_lib.check_least(config, 1, ('batch_size', 'log_every', 'keep'))
  run_lib.check_least(config, 0, ('patience', 'eval_every', 'save_every'))
  run_lib.check_least(config.data, 0, ('max_train',))
  optimizer.check_rate('epochs', config.epochs)
  task, runs = rows.make_task(config), trials.list_trials(config)
  one = len(runs) == 1
  if one:
    mesh = mesh_lib.make_mesh(**config.mesh)
    mesh_lib.check_batch_size(mesh, config.batch_size)
  elif jax.process_count() > 1:
    raise ValueError(f'trials run in one process, got {jax.process_count()}; start it on one host.')
  elif dict(config.mesh) != dict(default_config().mesh):
    raise ValueError('trials lie whole on the devices there are; leave mesh.* out.')
  else:
    mesh = trials.make_trials_mesh(len(runs))
  tokenizer = directory.load_tokenizer(config.init_from)
  weights = directory.load_weights(config.init_from)
  bert = make_model(config, task, weights[0])
  if not config.fresh_head and task.head in weights[1]:
    check_labels(config.init_from, weights[1], task)
  packing = (packed_length(config, task, bert.config), mesh_lib.replicas(mesh) if one else 1)
  columns = rows.training_columns(config, task, tokenizer)
  examples = task.read(config.data.dev)
  task_lib.golds(examples)  # before anything compiles
  dev = rows.encode(task, examples, tokenizer, config.data.length, config.data.dev)
  local = local_examples(config, mesh) if one else None
  each = [batches.make_batches(config, task, columns, seed, local, *packing) for seed, _ in runs]
  steps = math.ceil(config.epochs * each[0].examples / config.batch_size)
  schedule = optimizer.unit_schedule(config.schedule, steps, round(config.warmup_share * steps))
  shard = mesh_lib.sharder(mesh, encoder.PARAM_AXES) if one else trials.sharder(mesh)
  return Setup(
    config, runs, task, tokenizer, bert, weights, mesh, shard,
    make_loss(config, bert, task, columns), make_transform(config, bert), schedule, columns,
    each[0] if one else batches.TrialBatches(each), examples, dev, steps,
  )  # fmt: skip


def check_labels(source, params: dict, task) -> None:
  """Refuses a model whose output layer is for other labels than the task's, or in another order.

  Names that the model gives none of (`LABEL_0`, or all others) cannot be compared; that is logged.
  """
  if task.kind in ('span', 'choice'):
    return
  own, count = directory.read_labels(source)[0], params[task.head]['bias'].size
  if count != task.num_labels:
    raise ValueError(f'{source} predicts {count} labels {own}, {task.name} has {task.num_labels}: '
                     f'{list(task.labels)}.')  # fmt: skip
  if not own or not task.labels or all(re.fullmatch(r'LABEL_\d+', name) for name in own):
    return
  theirs, ours = ([name.casefold() for name in names] for names in (own, task.labels))
  if theirs != ours and set(theirs) & set(ours):
    raise ValueError(
      f'the labels of {source} are {own}, those of {task.name} {list(task.labels)}; they must be '
      'the same in the same order.'
    )
  if theirs != ours:
    _log.warning('%s calls the labels %s, taken for %s.', source, own, list(task.labels))


def local_examples(config, mesh) -> np.ndarray:
  """Which examples of a global batch this process brings."""
  return mesh_lib.local_rows(mesh_lib.batch_sharding(mesh), config.batch_size)


def make_model(config, task, encoder_config) -> heads.Bert:
  """The model of `init_from` with the task's output layer."""
  changes = {name: value for name, value in config.model.items() if value != -1.0}
  changes['frozen'] = config.trained_layers == 0
  if len(trials.list_trials(config)) > 1 and config.model.attention == 'auto':
    changes['attention'] = 'xla'  # the mesh splits trials, which no kernel knows of
  encoder_config = dataclasses.replace(encoder_config, **changes)
  if config.data.length > encoder_config.max_positions:
    raise ValueError(
      f'data.length={config.data.length} is longer than the {encoder_config.max_positions} '
      f'positions of {config.init_from}.'
    )
  for field in ('trained_layers', 'redraw_layers'):
    if not -(field == 'trained_layers') <= config[field] <= encoder_config.num_layers:
      raise ValueError(
        f'{field}={config[field]}, but {config.init_from} has {encoder_config.num_layers} layers.'
      )
  return heads.Bert(
    encoder_config, heads=(task.head,), pooler=task.head in POOLED_HEADS,
    num_labels=task.num_labels,
  )  # fmt: skip


def packed_length(config, task, encoder_config) -> int:
  """Tokens of a training row that holds several examples; 0 where a row holds one.

  `data.pack=-1` is `data.length`, at least 128; but 0 with choices, a CRF or BiLSTM, and with
  `span_over_padding`, where a row is one example.

  Raises:
    ValueError: if rows of `data.pack` tokens cannot hold every example, or may not hold several.
  """
  pack, most = config.data.pack, encoder_config.max_positions
  alone = [
    name for name, used in (('bilstm', encoder_config.bilstm), ('crf', encoder_config.crf),
                            ('span_over_padding', config.span_over_padding)) if used
  ]  # fmt: skip
  if pack == -1:
    return 0 if alone or task.choices > 1 else max(config.data.length, min(128, most))
  least = config.data.length * task.choices
  if pack and not least <= pack <= most:
    raise ValueError(
      f'data.pack={pack} must be -1, 0 or from {least}, the longest example, to {most}, the '
      'positions of the model.'
    )
  if pack and alone:
    raise ValueError(f'{alone[0]} reads a row as one example; set data.pack=0.')
  return pack


def factors_of(config, bert):
  """How much of the learning rate each layer has; None if all have it whole."""
  return encoder.layer_factors(
    bert.config.num_layers, config.trained_layers, config.layer_decay, config.head_factor
  )


def make_transform(config, bert):
  """The optimizer of a config, with the factors of its layers."""
  transform = optimizer.make_optimizer(**config.optimizer.to_dict(), param_axes=encoder.PARAM_AXES)
  factors = factors_of(config, bert)
  return optimizer.scale_by_part(transform, factors) if factors else transform


def make_loss(config, bert, task, columns):
  """`(loss_fn, loss_weights)` of a task, parts with factor 0 cut off from the gradient."""
  loss_fn, loss_weights = losses.task_loss(
    bert, task.kind, choices=task.choices, span_over_padding=config.span_over_padding,
    class_weights=rows.class_weights(config, task, columns),
  )  # fmt: skip
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
    return functools.partial(make, *setup.trials[0])
  seeds, rates = (np.array(column) for column in zip(*setup.trials, strict=True))
  return lambda *params: jax.vmap(make)(seeds, rates.astype(np.float32), *params)


def load_params(setup: Setup) -> dict:
  """The weights of `init_from`, with each trial's own new layers."""
  config, head = setup.config, setup.task.head
  initial = jax.device_get(jax.jit(lambda: state_maker(setup)().params)())
  loaded = []
  for trial in range(len(setup.trials)):
    drawn = trials.take(initial, trial) if setup.many else initial
    params = directory.load_params(
      config.init_from, setup.bert, weights=setup.weights, tokenizer=setup.tokenizer,
      fresh=('pooler', head), initial=drawn,
      redraw=((head,) if config.fresh_head else ()) + (('pooler',) if config.redraw_layers else ()),
    )  # fmt: skip
    loaded.append(directory.redraw_layers(params, drawn, config.redraw_layers))
  return jax.tree.map(lambda *x: np.stack(x), *loaded) if setup.many else loaded[0]


def train(
  setup: Setup, state, shardings, predict, checkpoints, workdir, identity, history
) -> int | None:  # fmt: skip
  """Trains and appends each evaluation to `history`; returns the step where SIGTERM stopped it."""
  config, task = setup.config, setup.task
  train_step = loop.make_train_step(
    *setup.loss, setup.transform, setup.schedule, mesh=setup.mesh, state_shardings=shardings,
    trials=setup.many,
  )  # fmt: skip

  def going():
    metric = metric_values(task, history)
    return trials.running(metric, config.patience, len(setup.trials))

  def evaluate(params):
    results = [
      task.score(setup.examples, task.decode(setup.examples, setup.dev, logits)) | {'loss': loss}
      for logits, loss in zip(*predict(params, setup.dev), strict=True)
    ]
    alive = going()
    history.append({'step': 0, 'scores': results})
    if not setup.many:
      return results[0]
    values = metric_values(task, history[-1:])[0]
    best_now = max((v for v, on in zip(values, alive, strict=True) if on), default=-1.0)
    means = {n: float(np.mean([r[n] for r in results])) for n in results[0]}
    return means | {f'mean_{task.metric}': means[task.metric], task.metric: best_now}

  def save(state, step, scores):
    if scores:
      history[-1]['step'] = step
    meta = {'identity': identity, 'config': config.to_dict(), 'next_batch': step,
            'evaluations': history}  # fmt: skip
    checkpoints.save(step, state, meta, scores)

  start = int(np.ravel(state.step)[0])
  run_log = log.RunLog(workdir, steps=setup.steps, start=start, active=jax.process_index() == 0)
  loader = batches_lib.choose_loader(config.data.loader)
  stream = batches_lib.iterate(setup.batches.training, start, loader=loader)
  on_device = loop.to_device(run_log.watched(stream), setup.mesh)
  try:
    state, _, stopped = loop.fit(
      state, train_step, on_device, steps=setup.steps, log=run_log, log_every=config.log_every,
      evaluate_fn=evaluate, eval_every=config.eval_every or setup.per_epoch, save=save,
      save_every=config.save_every, trials=setup.many,
      finished=lambda: not setup.many and not any(going()),
    )  # fmt: skip
    stream.close()
  finally:
    run_log.close()
  step = int(np.ravel(state.step)[0])
  return step if stopped and step < setup.steps else None


def make_predict(config, bert, task, mesh, many: bool = False):
  """Returns (params, encoded) -> (logits [K, N, ...] in the order of rows, mean losses [K]).

  K is the number of trials, 1 without. With a CRF the logits are its tags [K, N, L]. Only the
  text's own positions are ranked as spans, unless `span_over_padding`. Every process gets all.
  """
  loss_fn, loss_weights = losses.task_loss(
    bert, task.kind, choices=task.choices, span_over_padding=config.span_over_padding
  )
  apart = task.kind == 'span' and not config.span_over_padding

  def step(params, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask where they will run
      logits = bert.apply({'params': params}, batch)[f'{task.head}_logits']
      loss = loss_fn(params, batch, None)[0]['task']
    if apart:
      logits = jnp.where(batch['segment_ids'][..., None] > 0, logits, _NEVER)
    return logits, loss, loss_weights(batch)['task']

  everywhere = NamedSharding(mesh, PartitionSpec())
  rows_sharding = everywhere if many else mesh_lib.batch_sharding(mesh)
  compiled = jax.jit(
    jax.vmap(step, (0, None)) if many else step, in_shardings=(None, rows_sharding),
    out_shardings=everywhere,
  )  # fmt: skip

  def predict(params, encoded):
    local = None if many else local_examples(config, mesh)
    data = batches.make_batches(config, task, encoded.columns, local=local)
    stream = map(data.in_order, range(data.steps))
    if not many:
      stream = loop.to_device(stream, mesh)
    parts = jax.device_get([compiled(params, batch) for batch in stream])
    if not many:
      parts = jax.tree.map(lambda x: np.asarray(x)[None], parts)
    logits = batches.gather(data, [part for part, _, _ in parts], _NEVER if apart else 0.0)
    loss, weight = (sum(p[i].astype(np.float64) for p in parts) for i in (1, 2))
    if bert.config.crf:
      tagging = params['tagging'] if many else jax.tree.map(lambda x: x[None], params['tagging'])
      chosen = [
        crf.viterbi(trials.take(tagging, k), row, encoded.alignment >= 0)
        for k, row in enumerate(logits)
      ]
      logits = np.stack(jax.device_get(chosen))
    return logits, (loss / np.maximum(weight, 1e-9)).tolist()

  return predict


_NEVER = -1e9  # the logit of what cannot be chosen


def metric_values(task, history) -> list[list[float]]:
  """The metric [evaluations, K] by which trials are chosen; -1, the least, of a diverged one."""
  return [
    [s[task.metric] if math.isfinite(s['loss']) else -1.0 for s in evaluation['scores']]
    for evaluation in history
  ]


def best(setup: Setup, checkpoints, history) -> tuple[dict, dict]:
  """The parameters and scores of the best evaluation, of its best trial."""
  checkpoints.wait()
  abstract, _ = run_lib.abstract_state(state_maker(setup), setup.shard)
  step = checkpoints.best_step()
  state, _ = checkpoints.restore(step, abstract)
  if not setup.many:
    return state.params, {'step': step}
  metric = metric_values(setup.task, history)
  place = next(i for i, e in enumerate(history) if e['step'] == step)
  alive = trials.running(metric[:place], setup.config.patience, len(setup.trials))
  trial = int(np.argmax(np.where(alive, metric[place], -np.inf)))
  seed, rate = setup.trials[trial]
  return trials.take(state.params, trial), {'step': step, 'seed': seed, 'learning_rate': rate}


def finish(setup: Setup, workdir, predict, params, chosen: dict, history) -> dict[str, float]:
  """Writes the model, its predictions, metrics and report; returns the scores of dev."""
  config, task = setup.config, setup.task
  predictions, scores, logits = score(task, setup.examples, setup.dev, predict, params)
  told = [(config.data.dev, setup.examples, predictions)]
  told += predict_test(setup, predict, params, scores.get('best_f1_threshold', 0.0))
  params = distributed.host_copy(params)
  if jax.process_index():
    return scores
  for split, examples, found in told:
    task.write(workdir / 'predictions', split, examples, found)
  directory.save_model(
    workdir / 'model', setup.bert.config, params, setup.tokenizer,
    labels=task.labels, problem_type=PROBLEMS.get(task.kind, ''),
  )  # fmt: skip
  table = trials_table(setup, history) if setup.many else {}
  if table:
    log.write_json(workdir / 'trials.json', table)
  log.write_json(workdir / 'metrics.json', scores)
  facts = {'task': task.name, 'from': config.init_from, **chosen,
           'training examples': setup.examples_to_train, 'steps': setup.steps}  # fmt: skip
  page = report.page(
    task, setup.examples, predictions, logits, scores, log.read_metrics(workdir), facts, table
  )
  store.write_text(workdir / 'report.html', page)
  _log.info('best: step %d, %s %.4f', chosen['step'], task.metric, scores[task.metric])
  return scores


def score(task, examples, encoded, predict, params, threshold: float | None = None):
  """(predictions, scores, logits); without a threshold the predictions have the one that is tuned
  on the split, if the task has one."""
  logits, loss = predict(params, encoded)
  predictions = task.decode(examples, encoded, logits[0], threshold or 0.0)
  scores = task.score(examples, predictions)
  if threshold is None and 'best_f1_threshold' in scores:
    predictions = task.decode(examples, encoded, logits[0], scores['best_f1_threshold'])
  return predictions, scores | {'loss': loss[0]}, logits[0]


def predict_test(setup: Setup, predict, params, threshold: float) -> list[tuple]:
  """[(split, examples, predictions)] of the test split; [] where the source lacks it."""
  config, task, split = setup.config, setup.task, setup.config.data.test
  if split not in task.splits:
    return []
  try:
    examples = task.read(split)
  except (ValueError, OSError) as error:
    _log.info('no predictions for %s: %s', split, error)
    return []
  encoded = rows.encode(task, examples, setup.tokenizer, config.data.length, split)
  logits, _ = predict(params, encoded)
  return [(split, examples, task.decode(examples, encoded, logits[0], threshold))]


def trials_table(setup: Setup, history) -> dict:
  """The content of trials.json. A trial has failed if at its end its loss is not finite, or it is
  no better than always the most frequent class."""
  task, examples = setup.task, setup.examples
  metric = np.array([[scores[task.metric] for scores in e['scores']] for e in history])
  floor = -np.inf
  if task.kind == 'class':
    constant = np.bincount([e.label for e in examples]).argmax()
    floor = task.score(examples, np.full(len(examples), constant))[task.metric]

  def failed(trial, last):
    loss = history[last]['scores'][trial]['loss']
    return not math.isfinite(loss) or metric[last, trial] <= floor

  table = trials.summarise(setup.trials, metric, setup.config.patience, failed)
  return {'metric': task.metric, 'steps': [e['step'] for e in history]} | table


def evaluate(config, model: str, split: str = '', out: str = '') -> dict[str, float]:
  """Scores a model directory on a split of the config's task; writes its predictions into `out`.

  A split without labels gets no scores ({}), so it needs `out`. Other splits than dev are answered
  with the threshold that the run tuned on dev (SQuAD 2.0), from the metrics.json beside the model.
  """
  task, tokenizer = rows.make_task(config), directory.load_tokenizer(model)
  mesh = mesh_lib.make_mesh(**config.mesh)
  mesh_lib.check_batch_size(mesh, config.batch_size)
  encoder_config, params = directory.load_weights(model)
  if task.head not in params:
    raise ValueError(f'{model} has no {task.head} head, it has {sorted(params)}.')
  check_labels(model, params, task)
  split = split or config.data.dev
  bert = heads.Bert(
    encoder_config, heads=(task.head,), pooler='pooler' in params, num_labels=task.num_labels
  )
  examples = task.read(split)
  encoded = rows.encode(task, examples, tokenizer, config.data.length, split)
  names = {'encoder', task.head, *({'pooler'} & set(params))}
  params = mesh_lib.replicate({name: params[name] for name in names}, mesh)
  predict = make_predict(config, bert, task, mesh)
  threshold = None if split == config.data.dev else tuned_threshold(model)
  if examples[0].label is None and out:
    logits, _ = predict(params, encoded)
    predictions, scores = task.decode(examples, encoded, logits[0], threshold or 0.0), {}
  else:
    predictions, scores, _ = score(task, examples, encoded, predict, params, threshold)
  if out and jax.process_index() == 0:
    paths = task.write(out, split, examples, predictions)
    _log.info('predictions written to %s', ', '.join(map(str, paths)))
  return scores


def tuned_threshold(model) -> float:
  """The null odds above which a run's model refuses to answer, tuned on its dev split; else 0."""
  path = epath.Path(model).parent / 'metrics.json'
  return json.loads(path.read_text()).get('best_f1_threshold', 0.0) if path.exists() else 0.0


_SAME = ('task', 'init_from', 'fresh_head', 'redraw_layers', 'trained_layers', 'layer_decay',
         'head_factor',
         'epochs', 'batch_size', 'warmup_share', 'schedule', 'patience', 'class_weights',
         'optimizer', 'model', 'span_over_padding')  # fmt: skip
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
    'data.pack': setup.config.data.pack, 'data.buckets': setup.config.data.buckets,
    'trials': [list(trial) for trial in setup.trials],
    'tokenizer': setup.tokenizer.fingerprint, **digests,
  }  # fmt: skip


def prepare_rows(config, out: str) -> dict:
  """Writes the training rows of a task for `data.prepared`; returns the manifest."""
  tokenizer = directory.load_tokenizer(config.init_from)
  return rows.prepare(config, rows.make_task(config), tokenizer, out)
