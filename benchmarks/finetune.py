"""Fine-tuning beside a plain transformers loop: same weights, batches and hyper-parameters.

  python -m benchmarks finetune --config=glue:stsb --source=GLUE/STS-B --model=MODEL --steps=50
  python -m benchmarks finetune --config=glue:stsb --source=GLUE/STS-B --model=MODEL --seeds=5 \\
      --max_train=1000 --epochs=3

With `--steps` there is no dropout, and the losses of each step are compared. With `--seeds`
complete runs with dropout are, by the task's metrics on the dev split (the last evaluation, not the
best).
"""

import functools
import json
import pathlib
import tempfile
import time

import jax
import numpy as np

from benchmarks import machine
from benchmarks._transformers_loop import TransformersLoop
from bertjax import build, finetune
from bertjax.config import load_recipe
from bertjax.data import loader
from bertjax.interop import loading
from bertjax.training import layout as layout_lib
from bertjax.training import optimizer

FLAGS = {
  'config': ('glue:stsb', 'a recipe of configs/finetune'),
  'source': ('', 'data.source'),
  'train_file': ('', 'data.train_file'),
  'dev_file': ('', 'data.dev_file'),
  'model': ('', 'init_from'),
  'steps': (0, 'compare the losses of so many steps'),
  'seeds': (0, 'number of complete runs to compare'),
  'first_seed': (0, 'the first of them'),
  'who': ('both', "sides of complete runs: 'ours', 'theirs' or 'both'"),
  'epochs': (3.0, 'epochs of complete runs'),
  'learning_rate': (5e-5, 'the peak'),
  'batch_size': (32, 'examples'),
  'length': (0, "tokens a row; 0 = the recipe's"),
  'max_train': (0, 'training examples; 0 = all'),
  'pack': (-1, 'data.packed_length of our complete runs'),
  'over_padding': (0, "1 = SQuAD's loss as transformers has it, over padding too"),
  'out': ('', 'JSON file to write'),
}


def run(config, source, train_file, dev_file, model, steps, seeds, first_seed, who, epochs,
        learning_rate, batch_size, length, max_train, pack, over_padding, out):  # fmt: skip
  name, config = config, load_recipe(config)
  config.update({'init_from': model, 'batch_size': batch_size, 'learning_rate': learning_rate,
                 'num_train_epochs': epochs, 'schedule': 'linear', 'seed': first_seed})  # fmt: skip
  config.data.update({'source': source, 'train_file': train_file, 'dev_file': dev_file, 'test': '',
                      'max_train_examples': max_train,
                      'length': length or config.data.length})  # fmt: skip
  config.optimizer.name, config.log_every = 'adamw', 20
  config.span_loss_includes_padding = bool(over_padding)
  result = {'config': name, 'learning_rate': learning_rate, 'batch_size': batch_size,
            'length': config.data.length, 'max_train': max_train, 'pack': pack,
            'over_padding': over_padding}  # fmt: skip
  if steps:
    result |= losses_side_by_side(config, steps)
  else:
    result |= {'epochs': epochs} | runs_side_by_side(config, seeds, who, pack)
  result |= machine()
  print(json.dumps(result, indent=1))
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result


def losses_side_by_side(config, steps: int) -> dict:
  """The losses of the first steps without dropout."""
  config.model.update(
    dict.fromkeys(('hidden_dropout', 'attention_dropout', 'classifier_dropout'), 0.0)
  )
  config.span_loss_includes_padding = config.task.name.startswith('squad')  # as theirs
  config.log_every, config.data.packed_length = 1, 0
  config.schedule, config.warmup_ratio = 'linear', 0.1
  setup = finetune.set_up(config)
  schedule = optimizer.make_schedule('linear', steps, steps // 10)
  transform = build.make_optimizer(config, schedule)
  load = functools.partial(finetune.load, setup)
  state, shardings, _ = layout_lib.restore_or_init(
    setup.objective, transform, setup.layout, load=load
  )
  step = setup.layout.train_step(setup.objective, transform, shardings)
  peer = transformers_twin(setup, train_padding=True)
  ours, theirs = [], []
  for number in range(steps):
    batch = setup.batches.training(number)
    state, metrics = step(state, batch)
    theirs.append(peer.step(batch, float(metrics['learning_rate'])))
    ours.append(float(metrics['loss']))
    print(f'{number} {ours[-1]:.6f} {theirs[-1]:.6f}', flush=True)
  apart = np.abs(np.subtract(ours, theirs))
  return {'steps': steps, 'largest_difference': float(apart.max()), 'ours': ours, 'theirs': theirs}


def transformers_twin(setup, train_padding: bool) -> TransformersLoop:
  """Their loop from the same weights, the new head's included."""
  task, params = setup.task, start_of(setup)
  with tempfile.TemporaryDirectory() as folder:
    start = pathlib.Path(folder) / 'start'
    loading.save_model(
      start, setup.model, params, setup.tokenizer,
      labels=task.labels, problem_type=task.label.problem_type,
    )  # fmt: skip
    return TransformersLoop(start, task, train_padding=train_padding)


def start_of(setup) -> dict:
  """The weights of a run's first step, on the host."""
  load = functools.partial(finetune.load, setup)
  state, _, _ = layout_lib.restore_or_init(
    setup.objective, setup.optimizer, setup.layout, load=load
  )
  return jax.device_get(state.params)


def runs_side_by_side(config, seeds: int, who: str, pack: int) -> dict:
  """Metrics at the end of complete runs, seed by seed, with their mean and deviation."""
  contenders = {'ours': our_run, 'theirs': their_run}
  found = {}
  for name in contenders if who == 'both' else [who]:
    found[name], seconds = [], []
    for seed in range(config.seed, config.seed + seeds):
      config.seed, config.data.packed_length = seed, pack if name == 'ours' else 0
      before = time.perf_counter()
      scores = contenders[name](config)
      seconds.append(time.perf_counter() - before)
      print(name, seed, scores, f'{seconds[-1]:.0f} s', flush=True)
      found[name].append(scores)
    config.seed -= seeds - 1
    found[f'{name}_seconds'] = seconds
  summary = {}
  for name in set(contenders) & set(found):
    for metric in found[name][0]:
      values = [scores[metric] for scores in found[name]]
      deviation = float(np.std(values, ddof=1)) if seeds > 1 else 0.0
      summary[f'{name}_{metric}'] = {'mean': float(np.mean(values)), 'deviation': deviation}
  return found | {'summary': dict(sorted(summary.items()))}


def our_run(config) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    config.eval_every = 10**9  # at the end only
    return finetune.run(config, workdir=f'{folder}/run')


def their_run(config) -> dict:
  """The same steps by their loop, their dropout, our batches and metrics."""
  import torch

  torch.manual_seed(config.seed)
  config.eval_every = 10**9
  setup = finetune.set_up(config)
  peer = transformers_twin(setup, train_padding=False)
  schedule = optimizer.make_schedule(
    config.schedule, setup.steps, round(config.warmup_ratio * setup.steps)
  )
  rates = jax.device_get(jax.vmap(schedule)(np.arange(setup.steps)))
  for number in range(setup.steps):
    loss = peer.step(setup.batches.training(number), config.learning_rate * float(rates[number]))
    if number % 50 == 0:
      print(f'{number}/{setup.steps} {loss:.4f}', flush=True)
  data = loader.task_batches(
    setup.task.label, setup.dev.columns, config.batch_size, config.data.buckets
  )
  parts = [peer.logits(data.in_order(step))[None] for step in range(data.steps)]
  logits = loader.gather_logits(data, parts)[0]
  predictions = setup.task.decode(setup.examples, setup.dev, logits)
  return setup.task.score(setup.examples, predictions)
