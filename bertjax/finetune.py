"""Finetune: a pre-trained model and one more output layer learn a task (paper, sections 3.2 and 4).

  bertjax finetune --config=configs/finetune/glue.py:sst2 --workdir=DIR \\
      --config.init_from=MODEL --config.data.source=GLUE/SST-2

`init_from` is a model of any kind (see `bertjax convert --help`), whose vocabulary is taken too.
The same command started again resumes. The workdir gets what `pretrain` leaves, `metrics.json` with
the task's official metrics on the dev split, `predictions/` of dev and test in the official format,
and `model/`, the best of the evaluations by the task's main metric.
"""

import dataclasses
import functools
import hashlib
import logging
import math

import jax
import ml_collections
import numpy as np
from etils import epath

from bertjax import pretrain
from bertjax.data import batches as batches_lib
from bertjax.data import store
from bertjax.data.order import training_slots
from bertjax.interop import directory
from bertjax.model import encoder, heads, losses
from bertjax.model.config import POOLED_HEADS
from bertjax.tasks import TASKS
from bertjax.tasks import task as task_lib
from bertjax.training import checkpoint, log, loop, optimizer
from bertjax.training import mesh as mesh_lib
from bertjax.training import run as run_lib

_log = logging.getLogger(__name__)

FLAGS = {
  'config': ('glue', 'a recipe: a file, or the name of one in configs/finetune; :WORDS vary it'),
  'workdir': ('', 'folder of the run; the same folder resumes it'),
}

_PROBLEMS = {
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
    'init_resize': False,  # always False here: the vocabulary is the model's
    'fresh_head': True,  # False: goes on with the model's own output layer for this task
    'seed': 0,  # of the new layer, data order and dropout
    'epochs': 3.0,  # passes over the training split
    'batch_size': 32,  # examples of a global batch
    'learning_rate': 2e-5,  # the peak
    'warmup_share': 0.1,  # of the steps, from 0 to the peak
    'schedule': 'google',  # decay counted from step 0; 'linear': from the warm-up; 'constant'
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
      'length': 128,  # tokens a row; longer examples are cut, and counted
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
      'dtype': 'float32',  # of activations and products; 'bfloat16' on TPU and GPU
      'attention': 'auto',  # or a kernel by name: 'xla', 'cudnn'
      'remat': 'none',  # 'full' saves nothing within a layer, 'dots' saves matrix products
      'unroll': 1,  # layers per iteration of the layer loop
    }),
    'span_over_padding': False,  # True: Google's SQuAD loss, which also ranks padding
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


@dataclasses.dataclass(frozen=True)
class TaskBatches:
  """Batches of a task's encoded rows.

  Attributes:
    rows: columns of `Encoded`.
    batch_size: examples of the global batch; an example has `group` rows, one after another.
    seed: of the order.
    group: rows of an example (choices).
  """

  rows: dict[str, np.ndarray]
  batch_size: int
  seed: int
  group: int = 1

  @property
  def examples(self) -> int:
    return len(self.rows['input_ids']) // self.group

  def training(self, step: int) -> dict[str, np.ndarray]:
    """The batch of a training step: contract 5's order over examples."""
    return self._make(training_slots(step, self.batch_size, self.examples, self.seed)[1])

  def in_order(self, step: int) -> dict[str, np.ndarray]:
    """The step-th batch in order; examples past the end have weight 0."""
    index = step * self.batch_size + np.arange(self.batch_size)
    batch = self._make(np.minimum(index, self.examples - 1))
    batch['example_weights'] *= np.repeat(index < self.examples, self.group)
    return batch

  def _make(self, examples):
    row = (examples[:, None] * self.group + np.arange(self.group)).ravel()
    return task_lib.make_batch({name: column[row] for name, column in self.rows.items()})


def run(config, *, workdir: str) -> dict[str, float]:
  """Fine-tunes, from a checkpoint in `workdir` if there is one; returns the best dev scores.

  Raises:
    ValueError: for a config or data that cannot be trained, before anything compiles.
    loop.DivergedError: if a loss is not finite.
    SystemExit: with code 75, after SIGTERM and a save.
  """
  if not workdir or not config.init_from:
    raise ValueError('finetune needs --workdir=DIR and --config.init_from=MODEL.')
  workdir = epath.Path(workdir)
  task = make_task(config)
  mesh = mesh_lib.make_mesh(**config.mesh)
  mesh_lib.check_batch_size(mesh, config.batch_size)
  transform, loader = pretrain.make_transform(config), batches_lib.choose_loader(config.data.loader)
  tokenizer = directory.load_tokenizer(config.init_from)
  bert = make_model(config, task)
  columns = training_columns(config, task, tokenizer)
  dev_examples = task.read(config.data.dev)
  dev = encode(task, dev_examples, tokenizer, config.data.length, config.data.dev)
  train_batches = TaskBatches(columns, config.batch_size, config.seed, task.choices)
  per_epoch = -(-train_batches.examples // config.batch_size)
  steps = math.ceil(config.epochs * train_batches.examples / config.batch_size)
  schedule = optimizer.unit_schedule(config.schedule, steps, round(config.warmup_share * steps))

  identity = run_identity(config, columns, tokenizer)
  run_lib.check_same(workdir, identity)
  workdir.mkdir(parents=True, exist_ok=True)
  checkpoints = checkpoint.Checkpoints(
    workdir / 'checkpoints', keep=config.keep, best=task.metric, highest=True
  )
  make = pretrain.state_maker(config, bert, transform)

  def load():
    return directory.load_params(
      config.init_from, bert, tokenizer=tokenizer, fresh=('pooler', task.head),
      redraw=(task.head,) if config.fresh_head else (),
      initial=jax.device_get(jax.jit(make)().params),
    )  # fmt: skip

  state, shardings, _ = run_lib.start(make, mesh, encoder.PARAM_AXES, checkpoints, load)
  log.write_run(workdir / 'run.json', config.to_dict(), identity=identity)

  loss_fn, loss_weights = losses.task_loss(
    bert, task.kind, choices=task.choices, span_over_padding=config.span_over_padding
  )
  train_step = loop.make_train_step(
    loss_fn, loss_weights, transform, schedule, mesh=mesh, state_shardings=shardings
  )
  predict = make_predict(bert, task, loss_fn, loss_weights, mesh, config.batch_size)

  def evaluate(params):
    logits, scores = predict(params, dev.columns)
    return task.score(dev_examples, task.decode(dev_examples, dev, logits)) | scores

  def save(state, step, scores):
    meta = {'identity': identity, 'config': config.to_dict(), 'next_batch': step}
    checkpoints.save(step, state, meta, scores)

  run_log = log.RunLog(workdir, steps=steps, start=int(state.step))
  run_log.tokens_per_step = config.batch_size * task.choices * config.data.length
  stream = batches_lib.iterate(train_batches.training, int(state.step), loader=loader)
  batch_rows = config.batch_size * task.choices
  try:
    state, _, stopped = loop.fit(
      state, train_step, loop.to_device(stream, mesh, batch_rows), steps=steps, log=run_log,
      log_every=config.log_every, evaluate_fn=evaluate, eval_every=config.eval_every or per_epoch,
      save=save, save_every=config.save_every,
    )  # fmt: skip
    stream.close()
    checkpoints.wait()
    if not stopped:
      abstract, _ = run_lib.abstract_state(make, mesh, encoder.PARAM_AXES)
      state, _ = checkpoints.restore(checkpoints.best_step(), abstract)
  finally:
    checkpoints.close()
    run_log.close()
  run_lib.exit_if_stopped(stopped, state.step)

  logits, scores = predict(state.params, dev.columns)
  predictions = task.decode(dev_examples, dev, logits)
  scores = task.score(dev_examples, predictions) | scores
  task.write(workdir / 'predictions', config.data.dev, dev_examples, predictions)
  if config.data.test in task.splits:
    write_test(config, task, tokenizer, functools.partial(predict, state.params), workdir)
  directory.save_model(
    workdir / 'model', bert.config, jax.device_get(state.params), tokenizer, labels=task.labels,
    problem_type=_PROBLEMS.get(task.kind, ''),
  )  # fmt: skip
  log.write_json(workdir / 'metrics.json', scores)
  _log.info('best: step %d, %s %.4f', state.step, task.metric, scores[task.metric])
  return scores


def make_task(config) -> task_lib.Task:
  """The task that a config names."""
  if config.task not in TASKS:
    raise ValueError(f'unknown task {config.task!r}; known are {", ".join(TASKS)}.')
  if not config.data.source:
    raise ValueError(f'{config.task} needs its data: --config.data.source=FOLDER.')
  named = [part.partition('=') for part in config.data.files.split(',') if part]
  if not all(split and file for split, _, file in named):
    raise ValueError(f"data.files is written 'split=file,split=file', got {config.data.files!r}.")
  return TASKS[config.task](config.data.source, files={split: file for split, _, file in named})


def make_model(config, task) -> heads.Bert:
  """The model of `init_from` with the task's output layer."""
  encoder_config, _ = directory.load_weights(config.init_from)
  changes = {name: value for name, value in config.model.items() if value != -1.0}
  encoder_config = dataclasses.replace(encoder_config, **changes)
  if config.data.length > encoder_config.max_positions:
    raise ValueError(
      f'data.length={config.data.length} is longer than the {encoder_config.max_positions} '
      f'positions of {config.init_from}.'
    )
  return heads.Bert(
    encoder_config, heads=(task.head,), pooler=task.head in POOLED_HEADS,
    num_labels=task.num_labels,
  )  # fmt: skip


def training_columns(config, task, tokenizer) -> dict[str, np.ndarray]:
  """The rows to train on: encoded now, or read from `data.prepared`.

  Raises:
    ValueError: if the prepared rows are not those that this config would make.
  """
  if not config.data.prepared:
    examples = sample(task.read(config.data.train), config.data.max_train, config.seed)
    return encode(task, examples, tokenizer, config.data.length, config.data.train).columns
  rows = store.Rows(config.data.prepared, 'train')
  wanted = _settings(config, tokenizer)
  found = {name: rows.manifest.get(name) for name in wanted}
  if found != wanted:
    raise ValueError(
      f'{config.data.prepared} was prepared with {found}, this run wants {wanted}; prepare again.'
    )
  return rows[np.arange(len(rows))]


def prepare_rows(config, out: str) -> dict:
  """Writes the training rows of a task for `data.prepared`; returns the manifest."""
  task, tokenizer = make_task(config), directory.load_tokenizer(config.init_from)
  columns = training_columns(config, task, tokenizer)
  layout = task_lib.columns(task, config.data.length, tokenizer.vocab_size)
  settings = _settings(config, tokenizer)
  writer = store.Writer(out, settings, layout)
  tokenizer.save(writer.folder)
  writer.add_shard('train', 0, [columns])
  writer.finish({'train': 1, 'heldout': 0}, **settings)
  return store.read_manifest(out)


def _settings(config, tokenizer) -> dict:
  names = ('length', 'train', 'max_train')
  chosen = {name: config.data[name] for name in names}
  if config.data.max_train:
    chosen['seed'] = config.seed  # of the sample
  return {'task': config.task, 'tokenizer': tokenizer.fingerprint, 'settings': chosen}


def sample(examples: list, most: int, seed: int) -> list:
  """The first `most` of a shuffle; all, in their order, for 0."""
  if not most or most >= len(examples):
    return examples
  return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:most]]


def encode(task, examples, tokenizer, length: int, split: str) -> task_lib.Encoded:
  """Encodes examples and tells what was cut."""
  encoded = task.encode(examples, tokenizer, length)
  told = '  '.join(f'{name} {count:,}' for name, count in encoded.counts.items())
  _log.info('%s: examples %s  rows %s  %s', split, f'{len(examples):,}',
            f'{len(encoded.columns["input_ids"]):,}', told)  # fmt: skip
  return encoded


def make_predict(bert, task, loss_fn, loss_weights, mesh, batch_size: int):
  """Returns (params, columns) -> (logits in the order of rows, {'loss': mean})."""

  @functools.partial(jax.jit, in_shardings=(None, mesh_lib.batch_sharding(mesh)))
  def step(params, batch):
    out = bert.apply({'params': params}, batch)
    return out[f'{task.head}_logits'], loss_fn(params, batch, None)[0], loss_weights(batch)

  def predict(params, columns):
    rows = TaskBatches(columns, batch_size, 0, task.choices)
    stream = map(rows.in_order, range(-(-rows.examples // batch_size)))
    parts = [
      jax.device_get(step(params, batch))
      for batch in loop.to_device(stream, mesh, batch_size * task.choices)
    ]
    logits = np.concatenate([part for part, _, _ in parts])[: len(columns['input_ids'])]
    loss, weight = (sum(float(part[i]['task']) for part in parts) for i in (1, 2))
    return logits, {'loss': loss / weight if weight else 0.0}

  return predict


def write_test(config, task, tokenizer, predict, workdir) -> None:
  """Predicts the test split, which may be missing from the source."""
  try:
    examples = task.read(config.data.test)
  except (ValueError, OSError) as error:
    _log.info('no predictions for %s: %s', config.data.test, error)
    return
  encoded = encode(task, examples, tokenizer, config.data.length, config.data.test)
  predictions = task.decode(examples, encoded, predict(encoded.columns)[0])
  task.write(workdir / 'predictions', config.data.test, examples, predictions)


_SAME = ('task', 'init_from', 'fresh_head', 'seed', 'epochs', 'batch_size', 'learning_rate',
         'warmup_share', 'schedule', 'optimizer', 'span_over_padding')  # fmt: skip


def run_identity(config, columns, tokenizer) -> dict:
  """Flat {field: value} of all that may not change between a start and its resumption."""
  flat = run_lib.flatten(config, _SAME)
  digest = hashlib.sha256()
  for name in sorted(columns):
    digest.update(np.ascontiguousarray(columns[name]))
  return flat | {'tokenizer': tokenizer.fingerprint, 'rows': digest.hexdigest()[:16]}
