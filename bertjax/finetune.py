"""Finetune: a pre-trained model and one more output layer learn a task (paper, sections 3.2 and 4).

  bertjax finetune --config=configs/finetune/glue.py:sst2 --workdir=DIR \\
      --config.init_from=MODEL --config.data.source=GLUE/SST-2

`init_from` is a model of any kind (see `bertjax convert --help`), whose vocabulary is used as well.
The same command started again resumes. With several seeds or learning rates
(`--config.num_seeds=5 --config.learning_rates=2e-5,3e-5,5e-5`) all runs train at once, in one
program, and `trials.json` has their mean, deviation, best and failed ones. The workdir gets what
`pretrain` leaves, `metrics.json` with the task's official metrics on the dev split, `predictions/`
of dev and test in the official format, `report.html`, and `model/`, the best of the evaluations by
the task's main metric. `bertjax evaluate --workdir=DIR` scores it again, on any split.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from bertjax import adapters, build, build_objective, io
from bertjax.config import flat
from bertjax.data import loader as loader_lib
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import hub, huggingface, loading
from bertjax.model import encoder, heads
from bertjax.objectives import Objective, distill
from bertjax.scoring import check_labels, decode_and_score, make_predict, score, with_loss
from bertjax.tasks import report
from bertjax.tasks import task as task_lib
from bertjax.training import checkpoint, distributed, metrics, optimizer, sweep
from bertjax.training import layout as layout_lib
from bertjax.training import mesh as mesh_lib
from bertjax.training import run as run_lib

_log = logging.getLogger(__name__)


class Setup(NamedTuple):
  """All of a run that does not change while it trains."""

  config: Any  # the run's
  training: task_lib.Task  # with its data
  tokenizer: Tokenizer  # of `init_from`
  model: heads.Bert  # with the task's head
  weights: tuple  # config and parameters of `init_from`, as read
  layout: layout_lib.Layout  # a `sweep.Sweep` of several runs
  objective: Objective
  optimizer: optax.GradientTransformation
  columns: dict[str, np.ndarray]  # rows to train on
  batches: loader_lib.TaskBatches | loader_lib.TrialBatches  # makes the training batches
  examples: list[task_lib.Example]  # of the dev split
  dev: task_lib.Encoded  # these, encoded
  steps: int  # of the run
  lora: adapters.Lora | None = None  # with adapters

  @property
  def task(self) -> task_lib.Task:
    """The task by which the model is evaluated."""
    return self.training.judge

  @property
  def runs(self) -> tuple[tuple[int, float], ...]:
    """(seed, learning rate) of each run of a sweep; () for a single run."""
    return getattr(self.layout, 'runs', ())

  def frozen(self, mesh) -> dict | None:
    """The frozen parameters that adapters need, on a mesh."""
    if self.lora is None:
      return None
    if mesh is self.layout.mesh:
      return {'base': self.objective.frozen['base']}
    return {'base': self.lora.place(mesh, self.model.config.dtype)}

  @property
  def num_train_examples(self) -> int:
    return len(self.columns['input_ids']) // self.training.label.rows

  @property
  def options(self) -> run_lib.Options:
    per_epoch = -(-self.num_train_examples // self.config.batch_size)
    options = build.run_options(self.config)
    return dataclasses.replace(
      options, metric=self.task.metric, highest=True, eval_every=options.eval_every or per_epoch
    )


def run(config, *, workdir: str, **processes) -> dict[str, float]:
  """Fine-tunes, from a checkpoint in `workdir` if there is one; returns the best dev scores.

  Raises:
    ValueError: for a config or data that cannot be trained, before anything compiles.
    loop.DivergedError: if a loss is not finite; of a sweep, if none is.
    SystemExit: with code 75, after SIGTERM and a save.
    KeyboardInterrupt: after the first Ctrl-C and a save, or at the second.
  """
  if not workdir or not config.init_from:
    raise ValueError('finetune needs --workdir=DIR and --config.init_from=MODEL.')
  workdir = checkpoint.check_path(workdir)
  distributed.start(**processes)
  setup = set_up(config)
  task = setup.task
  make = functools.partial(
    make_predict, setup.model, task, batch_size=config.batch_size, buckets=config.data.buckets
  )
  if setup.lora:
    make = functools.partial(make, complete=setup.lora.adapters.complete)
  predict = make(setup.layout.mesh, many=bool(setup.runs), frozen=setup.frozen(setup.layout.mesh))

  def evaluate(params):
    found = []
    for index, (logits, loss) in enumerate(zip(*predict(params, setup.dev), strict=True)):
      predictions, scores = decode_and_score(task, setup.examples, setup.dev, logits)
      if problem := task.label.collapsed(predictions):
        which = f' (trial {index}, seed {setup.runs[index][0]})' if setup.runs else ''
        _log.info('%s: %s%s', config.data.dev, problem, which)
      found.append(with_loss(task, scores, loss))
    return found

  def finish(params, step, evaluations):
    if setup.runs:
      best = sweep.best_run(evaluations, step, setup.options)
      seed, rate = setup.runs[best]
      params, chosen = sweep.take(params, best), {'step': step, 'seed': seed, 'learning_rate': rate}
      mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
      score_one = make(mesh, frozen=setup.frozen(mesh))
      return save(setup, workdir, score_one, params, chosen, evaluations)
    return save(setup, workdir, predict, params, {'step': step}, evaluations)

  stream = functools.partial(
    loader_lib.iterate, setup.batches.training, loader=loader_lib.choose_loader(config.data.loader)
  )
  model = run_lib.model_facts(
    setup.model.config, labels=task.labels, problem_type=task.label.problem_type,
    trials=len(setup.runs) or 1, sentence=setup.training.label.sentence(config.data.length),
    lora=setup.lora and setup.lora.facts(),
  )  # fmt: skip
  return run_lib.train(
    [run_lib.Stage(setup.steps, setup.objective, stream, evaluate, model)], setup.optimizer,
    layout=setup.layout, workdir=workdir, identity=identity_of(setup), config=config.to_dict(),
    finish=finish, options=setup.options, load=functools.partial(load, setup),
    about={'losses': {'task_loss': {'unit': setup.training.label.unit, 'heldout': 'loss'}}},
    begin=lambda: setup.tokenizer.save(
      workdir / 'tokenizer', max_length=setup.model.config.max_positions
    ),
  )  # fmt: skip


def set_up(config) -> Setup:
  """Reads and checks everything that a run needs."""
  build.check(config)
  task, layout = build.make_task(config), make_layout(config)
  tokenizer = loading.load_tokenizer(config.init_from)
  weights = build_objective.source_weights(config)
  huggingface.check_padding(weights[0], tokenizer.pad_id)
  model = make_model(config, task, weights[0])
  if not config.reinit_head and set(task.heads) & set(weights[1]):
    check_labels(config.init_from, weights[1], task)
  lora = adapters.make(config, model, weights[1], task.heads)
  pack = build.packed_length(config, task.label, model.config)
  columns = build.training_columns(config, task, tokenizer)
  judge = task.judge
  examples = judge.read(config.data.dev)
  task_lib.gold_labels(examples)  # before anything compiles
  dev = task_lib.encode_split(judge, examples, tokenizer, config.data.length, config.data.dev)
  make = functools.partial(
    loader_lib.task_batches, task.label, columns, config.batch_size, config.data.buckets, pack=pack
  )
  if runs := getattr(layout, 'runs', ()):
    each = [make(seed, replicas=layout.accumulation) for seed, _ in runs]
    training, examples_per_epoch = loader_lib.TrialBatches(each), each[0].examples
  else:
    local = mesh_lib.local_rows(mesh_lib.batch_sharding(layout.mesh), config.batch_size)
    training = make(
      config.seed, local, replicas=mesh_lib.replicas(layout.mesh) * layout.accumulation
    )
    examples_per_epoch = training.examples
  steps = math.ceil(config.num_train_epochs * examples_per_epoch / config.batch_size)
  factors = encoder.layer_factors(
    model.config.num_layers, config.num_trainable_layers, config.layerwise_lr_decay,
    config.head_lr_multiplier, model.config.shared_layers,
  )  # fmt: skip
  rate = runs[0][1] if runs else list_runs(config)[0][1]
  schedule = optimizer.make_schedule(
    config.schedule, steps, round(config.warmup_ratio * steps), decay_ratio=config.decay_ratio
  )
  transform = build.make_optimizer(config, schedule, learning_rate=rate, factors=factors)
  return Setup(
    config, task, tokenizer, model, weights, layout,
    make_objective(config, model, task, columns, factors, tokenizer, layout, lora), transform,
    columns, training, examples, dev, steps, lora,
  )  # fmt: skip


def list_runs(config) -> tuple[tuple[int, float], ...]:
  """(seed, learning rate) of each run."""
  return sweep.list_runs(config.seed, config.num_seeds, config.learning_rate, config.learning_rates)


def make_layout(config) -> layout_lib.Layout:
  """One run on the config's mesh, or a sweep over seeds and learning rates."""
  runs, parts = list_runs(config), config.gradient_accumulation_steps
  if len(runs) == 1:
    mesh = mesh_lib.make_mesh(**config.mesh)
    mesh_lib.check_batch_size(mesh, config.batch_size, parts)
    return layout_lib.Layout(mesh, encoder.PARAM_AXES, config.seed, config.prng_impl, parts)
  if jax.process_count() > 1:
    raise ValueError(f'trials run in one process, got {jax.process_count()}; start it on one host.')
  if config.mesh.to_dict() != {'data': -1, 'fsdp': 1, 'tensor': 1}:
    raise ValueError('trials are not sharded over devices there are; leave mesh.* out.')
  if config.batch_size % parts:
    raise ValueError(
      f'batch_size={config.batch_size} is not divisible by gradient_accumulation_steps={parts}.'
    )
  mesh = mesh_lib.make_dividing_mesh(len(runs), 'runs')
  return sweep.Sweep(
    mesh, encoder.PARAM_AXES, prng_impl=config.prng_impl, accumulation=parts, runs=runs
  )


def make_model(config, task, encoder_config) -> heads.Bert:
  """The model of `init_from` with the task's output layer."""
  changes = {
    name: value for name, value in config.model.items()
    if not (name.endswith('dropout') and value == -1.0)
  }  # fmt: skip
  changes['frozen'] = config.num_trainable_layers == 0
  if len(list_runs(config)) > 1 and config.model.attention == 'auto':
    changes['attention'] = 'xla'  # the mesh splits runs; kernels split batches
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
  layers = encoder_config.num_layers
  if encoder_config.shared_layers and config.reinit_top_layers not in (0, layers):
    raise ValueError(
      f'the layers of {config.init_from} share their weights, got reinit_top_layers='
      f'{config.reinit_top_layers}; set 0, or {layers} for all.'
    )
  return heads.Bert(
    encoder_config,
    heads=task.heads,
    pooler=task.head in encoder_config.pooled_heads,
    num_labels=task.num_labels,
  )


def make_objective(
  config, model, task, columns, factors, tokenizer, layout, lora=None
) -> Objective:
  """The objective of a task; parameters with factor 0 get no gradient."""
  weights = task.label.parse_class_weights(config.class_weights, columns['labels'])
  if config.distill.teacher:
    objective = _distillation(config, model, task, weights, tokenizer, layout)
  else:
    loss, loss_weights = task.label.make_loss(model, weights)
    init, coupled = functools.partial(heads.init_params, model), task.label.make_coupled(model)
    objective = Objective(init, loss, loss_weights, coupled=coupled)
  # A packed row has all of an example.
  if not build.packed_length(config, task.label, model.config):
    objective = objective._replace(group=task.label.rows)
  if lora:
    objective = lora.adapt(objective, lora.place(layout.mesh, model.config.dtype))
  if factors is None:
    return objective

  def stop(params):
    own = {name: part for name, part in params.items() if name not in (objective.frozen or {})}
    return params | optimizer.stop_gradients(own, factors)

  coupled = objective.coupled and (_after(stop, objective.coupled[0]), objective.coupled[1])
  return objective._replace(loss=_after(stop, objective.loss), coupled=coupled)


def _after(change, function):
  """A function of parameters that gets changed ones."""
  return lambda params, *rest: function(change(params), *rest)


def _distillation(config, model, task, class_weights, tokenizer, layout) -> Objective:
  """The objective of a task with a teacher that was fine-tuned on it."""
  options = config.distill
  distill.check_temperature(options.temperature)
  if not task.head:
    raise ValueError(
      f'distill.teacher={options.teacher!r} is for tasks with a head, and {task.name} trains '
      'embeddings; leave it out.'
    )
  length = max(config.data.length, build.packed_length(config, task.label, model.config))
  teacher, frozen = build_objective.load_teacher(
    config, model, (task.head,), layout.mesh, tokenizer, length
  )
  check_labels(options.teacher, frozen['teacher'], task)
  return distill.task(
    task.label, model, teacher, temperature=options.temperature,
    soft_weight=options.soft_weight, class_weights=class_weights, frozen=frozen,
  )  # fmt: skip


def load(setup: Setup, make) -> dict:
  """The weights of `init_from`, with each run's own new layers from `make()`."""
  config, own, initial = setup.config, setup.task.heads, make()
  loaded = []
  for index in range(len(setup.runs) or 1):
    fresh = sweep.take(initial, index) if setup.runs else initial
    params = loading.load_params(
      config.init_from, setup.model, weights=setup.weights, tokenizer=setup.tokenizer,
      fresh=('pooler', *own), initial=fresh,
      reinit=(own if config.reinit_head else ())
      + (('pooler',) if config.reinit_top_layers else ()),
    )  # fmt: skip
    count, shared = config.reinit_top_layers, setup.model.config.shared_layers
    params = loading.reinit_top_layers(params, fresh, count, shared)
    loaded.append(setup.lora.start(params, fresh) if setup.lora else params)
  return jax.tree.map(lambda *x: np.stack(x), *loaded) if setup.runs else loaded[0]


# What a resumed run must share with its start.
_SAME = ('task', 'init_from', 'reinit_head', 'reinit_top_layers', 'num_trainable_layers',
         'layerwise_lr_decay', 'head_lr_multiplier', 'prng_impl', 'num_train_epochs', 'batch_size',
         'gradient_accumulation_steps', 'warmup_ratio', 'schedule', 'patience', 'class_weights',
         'optimizer', 'model', 'span_loss_includes_padding')  # fmt: skip
_FREE = ('model.attention', 'model.remat', 'model.unroll')  # change no result


def identity_of(setup: Setup) -> dict:
  """Flat {field: value} of everything that may not change when a run is resumed."""
  digests, config = {}, setup.config
  for split, columns in (('rows', setup.columns), ('dev', setup.dev.columns)):
    digest = hashlib.sha256()
    for name in sorted(columns):
      digest.update(np.ascontiguousarray(columns[name]))
    digests[split] = digest.hexdigest()[:16]
  fields = flat({name: config.to_dict()[name] for name in _SAME})
  return {name: value for name, value in fields.items() if name not in _FREE} | {
    'data.packed_length': config.data.packed_length, 'data.buckets': config.data.buckets,
    'trials': [list(run) for run in list_runs(config)],
    'tokenizer': setup.tokenizer.fingerprint, **digests, **build.distillation_fields(config),
    **adapters.identity(config, setup.lora),
  }  # fmt: skip


def save(setup: Setup, workdir, predict, params, chosen: dict, evaluations) -> dict[str, float]:
  """Writes the model, its predictions, metrics and report; returns the scores of dev."""
  config, task = setup.config, setup.task
  predictions, scores, logits = score(task, setup.examples, setup.dev, predict, params)
  splits = [(config.data.dev, setup.examples, predictions)]
  splits += predict_test(setup, predict, params, scores.get('best_f1_threshold', 0.0))
  params = distributed.host_copy(params)
  if jax.process_index():
    return scores
  for split, examples, predicted in splits:
    task.write(workdir / 'predictions', split, examples, predicted)
  about = json.loads((workdir / 'run.json').read_text())
  best = about['config'] | {k: chosen[k] for k in ('seed', 'learning_rate') if k in chosen}
  full, write = adapters.complete(setup.lora, config.lora.save, params)
  write(
    workdir / 'model', setup.model, full, setup.tokenizer,
    labels=task.labels, problem_type=task.label.problem_type,
    sentence=setup.training.label.sentence(config.data.length),
    card=hub.model_card(
      f'{workdir.name}/model', setup.model, full, task.labels, scores, about | {'config': best}
    ),
  )  # fmt: skip
  table = trials_table(setup, evaluations) if setup.runs else {}
  if table:
    io.write_json(workdir / 'trials.json', table)
  io.write_json(workdir / 'metrics.json', scores)
  facts = {'task': task.name, 'from': config.init_from, **chosen,
           'training examples': setup.num_train_examples, 'steps': setup.steps}  # fmt: skip
  if not config.data.prepared:
    labels = [example.label for example in build.training_examples(config, setup.training)]
    facts['training labels'] = ', '.join(setup.training.label.describe(labels))
  notes = report.remarks(task, config.data.dev, setup.examples, predictions, scores)
  page = report.page(
    task, setup.examples, predictions, logits, scores, metrics.read_metrics(workdir), facts, table,
    notes, name=workdir.name, run=about,
  )  # fmt: skip
  io.write_text(workdir / 'report.html', page)
  _log.info(
    '%s: step %d, %s %.4f', config.save_model, chosen['step'], task.metric, scores[task.metric]
  )
  _log.info('model written to %s, report to %s', workdir / 'model', workdir / 'report.html')
  return scores


def predict_test(setup: Setup, predict, params, threshold: float) -> list[tuple]:
  """[(split, examples, predictions)] of the test split; [] if the source has none."""
  config, task, split = setup.config, setup.task, setup.config.data.test
  if split not in task.splits:
    return []
  try:
    examples = task.read(split)
  except (ValueError, OSError) as error:
    _log.warning('no predictions for %s: %s', split, error)
    return []
  encoded = task_lib.encode_split(task, examples, setup.tokenizer, config.data.length, split)
  logits, _ = predict(params, encoded)
  return [(split, examples, task.decode(examples, encoded, logits[0], threshold))]


def trials_table(setup: Setup, evaluations) -> dict:
  """The content of trials.json. A run has failed if at its end its loss is not finite, or its score
  is no better than 0 or that of always predicting the most frequent class."""
  task, examples = setup.task, setup.examples
  metric = np.array([[scores[task.metric] for scores in e['scores']] for e in evaluations])
  _, floor = report.majority_score(task, examples) or ('', 0.0)

  def failed(index, last):
    loss = evaluations[last]['scores'][index]['loss']
    return not math.isfinite(loss) or metric[last, index] <= floor

  table = sweep.summarise(setup.runs, metric, setup.config.patience, failed)
  return {'metric': task.metric, 'steps': [e['step'] for e in evaluations]} | table
