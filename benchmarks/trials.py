"""Trials in one compiled program against the same runs one after another, and in processes.

  python -m benchmarks trials --config=glue:rte --source=GLUE/RTE --model=MODEL

All do the same steps of the same runs, without evaluation. 'one program' and 'one process' count
from set-up to the last step, compilation included; 'processes' also count starting Python.
"""

import concurrent.futures
import functools
import os
import subprocess
import sys
import time

import jax
import numpy as np

from benchmarks import report
from bertjax import finetune
from bertjax.config import load_recipe
from bertjax.training import layout as layout_lib

FLAGS = {
  'config': ('glue:rte', 'a recipe of configs/finetune'),
  'source': ('', 'data.source'),
  'model': ('', 'init_from'),
  'seeds': (5, 'of the trials'),
  'learning_rates': ('2e-5,3e-5,5e-5', 'of the trials'),
  'steps': (30, 'of each run'),
  'batch_size': (8, 'examples'),
  'length': (64, 'tokens a row'),
  'pack': (0, 'data.packed_length; -1 = as runs have it by default'),
  'only': ('', "do one run and stop, 'SEED,RATE': what each process does"),
  'out': ('', 'JSON file to write'),
}


def run(config, source, model, seeds, learning_rates, steps, batch_size, length, pack, only, out):
  config = load_recipe(config)
  config.update({'init_from': model, 'batch_size': batch_size, 'num_seeds': seeds,
                 'learning_rates': learning_rates})  # fmt: skip
  config.data.update({'source': source, 'length': length, 'buckets': '', 'packed_length': pack})
  if only:
    seed, rate = only.split(',')
    train(one_trial(config, int(seed), float(rate)), steps)
    return None
  runs = finetune.list_runs(config)
  examples = steps * batch_size * len(runs)

  def timed(work):
    before = time.perf_counter()
    work()
    return examples / (time.perf_counter() - before)

  def one_process():
    step = None
    for seed, rate in runs:
      step = train(one_trial(config, seed, rate), steps, step)

  def processes():
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      list(pool.map(lambda r: start_process(r, sys.argv[1:]), runs))

  contenders = {
    'one program': lambda: train(finetune.set_up(config), steps),
    'one process, step compiled once': one_process,
    f'{len(runs)} processes, {os.cpu_count()} at a time': processes,
  }
  rates = {name: [timed(work)] for name, work in contenders.items()}
  return report(
    'trials', rates, 'examples/s', out, trials=len(runs), steps=steps, batch_size=batch_size,
    length=length, pack=pack,
  )  # fmt: skip


def one_trial(config, seed: int, rate: float):
  one = config.copy_and_resolve_references()
  one.update({'seed': seed, 'num_seeds': 1, 'learning_rate': rate, 'learning_rates': ''})
  return finetune.set_up(one)


def train(setup, steps: int, train_step=None):
  """Steps of a run or of trials; returns the compiled step."""
  state, shardings, _ = layout_lib.restore_or_init(
    setup.objective, setup.optimizer, setup.layout, load=functools.partial(finetune.load, setup)
  )
  if train_step is None:
    train_step = setup.layout.train_step(setup.objective, setup.optimizer, shardings)
  for number in range(steps):
    state, metrics = train_step(state, setup.batches.training(number))
  losses = np.atleast_1d(jax.device_get(metrics['loss']))
  if not np.isfinite(losses).all():
    raise RuntimeError(f'losses after {steps} steps: {losses}')
  return train_step


def start_process(trial, arguments) -> None:
  seed, rate = trial
  command = [sys.executable, '-m', 'benchmarks', *arguments, f'--only={seed},{rate}']
  subprocess.run(command, check=True, capture_output=True)
