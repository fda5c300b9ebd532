"""Finetune: a pre-trained model and one more output layer learn a task (paper, sections 3.2 and 4).

  bertjax finetune --config=configs/finetune/glue.py:sst2 --workdir=DIR \\
      --config.init_from=MODEL --config.data.source=GLUE/SST-2

`init_from` is a model of any kind (see `bertjax convert --help`), whose vocabulary is taken too.
The same command started again resumes. With several seeds or learning rates
(`--config.num_seeds=5 --config.learning_rates=2e-5,3e-5,5e-5`) all runs train at once, in one program,
and `trials.json` has their mean, deviation, best and failed ones. The workdir gets what `pretrain`
leaves, `metrics.json` with the task's official metrics on the dev split, `predictions/` of dev and
test in the official format, `report.html`, and `model/`, the best of the evaluations by the task's
main metric. `bertjax evaluate --workdir=DIR` scores it again, on any split.
"""

import functools
import json
import logging
import math

import jax
import numpy as np

from bertjax import io
from bertjax.data import loader as loader_lib
from bertjax.finetuning.scoring import decode_and_score, make_predict, score
from bertjax.finetuning.setup import Setup, load_params, run_identity, set_up, state_maker
from bertjax.interop import loading
from bertjax.tasks import report, rows
from bertjax.training import checkpoint, distributed, log, loop, trials
from bertjax.training import mesh as mesh_lib
from bertjax.training import run as run_lib

_log = logging.getLogger(__name__)


def run(config, *, workdir: str, **peers) -> dict[str, float]:
  """Fine-tunes, from a checkpoint in `workdir` if there is one; returns the best dev scores.

  Raises:
    ValueError: for a config or data that cannot be trained, before anything compiles.
    loop.DivergedError: if a loss is not finite, but for trials, whose others go on.
    SystemExit: with code 75, after SIGTERM and a save.
    KeyboardInterrupt: after the first Ctrl-C and a save, or at the second.
  """
  if not workdir or not config.init_from:
    raise ValueError('finetune needs --workdir=DIR and --config.init_from=MODEL.')
  workdir = checkpoint.check_path(workdir)
  distributed.start(**peers)
  setup = set_up(config)
  identity = run_identity(setup)
  run_lib.check_same(workdir, identity)
  distributed.agree('configuration', [identity, config.to_dict()])
  workdir.mkdir(parents=True, exist_ok=True)
  checkpoints = checkpoint.Checkpoints(
    workdir / 'checkpoints', keep=config.max_to_keep, best=setup.task.metric, highest=True
  )
  state, shardings, meta = run_lib.start(
    state_maker(setup), setup.shard, checkpoints, functools.partial(load_params, setup)
  )
  if jax.process_index() == 0:
    log.write_run(workdir / 'run.json', config.to_dict(), identity=identity)
    setup.tokenizer.save(workdir / 'tokenizer', max_length=setup.bert.config.max_positions)
  history = meta.get('evaluations', [])  # {'step', 'scores' of each trial}
  predict = make_predict(config, setup.bert, setup.task, setup.mesh, many=setup.many)
  try:
    stopped, step = train(setup, state, shardings, predict, checkpoints, workdir, identity, history)
    if not stopped:
      params, scores = best(setup, checkpoints, history)
  finally:
    checkpoints.close()
  run_lib.exit_if_stopped(stopped, step)
  if setup.many:  # of the best trial alone
    alone = mesh_lib.make_mesh(devices=jax.devices()[:1])
    predict = make_predict(config, setup.bert, setup.task, alone)
  return finish(setup, workdir, predict, params, scores, history)


def train(
  setup: Setup, state, shardings, predict, checkpoints, workdir, identity, history
) -> tuple[int, int]:  # fmt: skip
  """Trains and appends each evaluation to `history`; returns the signal that stopped it (0 = none)
  and the last step."""
  config, task = setup.config, setup.task
  train_step = loop.make_train_step(
    *setup.loss, setup.transform, mesh=setup.mesh, state_shardings=shardings,
    trials=setup.many,
  )  # fmt: skip

  def going():
    metric = metric_values(task, history)
    return trials.running(metric, config.patience, len(setup.trials))

  def evaluate(params):
    results = [
      decode_and_score(task, setup.examples, setup.dev, logits)[1] | {'loss': loss}
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
            'evaluations': history,
            'model': run_lib.model_facts(
              setup.bert.config, labels=task.labels, problem_type=task.label.problem_type,
              trials=len(setup.trials),
            )}  # fmt: skip
    checkpoints.save(step, state, meta, scores)

  start = int(np.ravel(state.step)[0])
  run_log = log.RunLog(workdir, steps=setup.steps, start=start, active=jax.process_index() == 0)
  loader = loader_lib.choose_loader(config.data.loader)
  stream = loader_lib.iterate(setup.batches.training, start, loader=loader)
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
  return stopped if step < setup.steps else 0, step


def metric_values(task, history) -> list[list[float]]:
  """The metric [evaluations, K] by which trials are chosen; -1, the least, of a diverged one."""
  return [
    [s[task.metric] if math.isfinite(s['loss']) else -1.0 for s in evaluation['scores']]
    for evaluation in history
  ]


def best(setup: Setup, checkpoints, history) -> tuple[dict, dict]:
  """The parameters and step of the best evaluation, or the last, of its best trial."""
  checkpoints.wait()
  abstract, _ = run_lib.abstract_state(state_maker(setup), setup.shard)
  step = checkpoints.best_step() if setup.config.save_model == 'best' else checkpoints.steps()[-1]
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
  loading.save_model(
    workdir / 'model', setup.bert, params, setup.tokenizer,
    labels=task.labels, problem_type=task.label.problem_type,
  )  # fmt: skip
  table = trials_table(setup, history) if setup.many else {}
  if table:
    io.write_json(workdir / 'trials.json', table)
  io.write_json(workdir / 'metrics.json', scores)
  facts = {'task': task.name, 'from': config.init_from, **chosen,
           'training examples': setup.examples_to_train, 'steps': setup.steps}  # fmt: skip
  if not config.data.prepared:
    labels = [example.label for example in rows.training_examples(config, task)]
    facts['training labels'] = ', '.join(task.label.describe(labels))
  notes = report.remarks(task, config.data.dev, setup.examples, predictions, scores)
  page = report.page(
    task, setup.examples, predictions, logits, scores, log.read_metrics(workdir), facts, table,
    notes, name=workdir.name, run=json.loads((workdir / 'run.json').read_text()),
  )  # fmt: skip
  io.write_text(workdir / 'report.html', page)
  _log.info(
    '%s: step %d, %s %.4f', config.save_model, chosen['step'], task.metric, scores[task.metric]
  )
  return scores


def predict_test(setup: Setup, predict, params, threshold: float) -> list[tuple]:
  """[(split, examples, predictions)] of the test split; [] where the source lacks it."""
  config, task, split = setup.config, setup.task, setup.config.data.test
  if split not in task.splits:
    return []
  try:
    examples = task.read(split)
  except (ValueError, OSError) as error:
    _log.warning('no predictions for %s: %s', split, error)
    return []
  encoded = rows.encode(task, examples, setup.tokenizer, config.data.length, split)
  logits, _ = predict(params, encoded)
  return [(split, examples, task.decode(examples, encoded, logits[0], threshold))]


def trials_table(setup: Setup, history) -> dict:
  """The content of trials.json. A trial has failed if at its end its loss is not finite, or it is
  no better than always the most frequent class."""
  task, examples = setup.task, setup.examples
  metric = np.array([[scores[task.metric] for scores in e['scores']] for e in history])
  _, floor = report.majority_score(task, examples) or ('', -np.inf)

  def failed(trial, last):
    loss = history[last]['scores'][trial]['loss']
    return not math.isfinite(loss) or metric[last, trial] <= floor

  table = trials.summarise(setup.trials, metric, setup.config.patience, failed)
  return {'metric': task.metric, 'steps': [e['step'] for e in history]} | table
