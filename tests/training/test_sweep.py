"""Which trials of a sweep run on, and which is the best."""

import math

import numpy as np

from bertjax.training import run as run_lib
from bertjax.training import sweep


def test_which_trials_run_on():
  history = [[0.5, 0.5], [0.4, 0.6], [0.45, np.nan], [0.9, 0.7]]
  assert run_lib.still_running(history[:2], 2) == [True, True]
  assert run_lib.still_running(history[:3], 2) == [False, True]
  assert run_lib.still_running(history, 2) == [False, True]  # too late
  assert run_lib.still_running(history, 0) == [True, True]
  table = sweep.summarise(
    [(0, 1e-3), (1, 1e-3)], np.array(history), 2, lambda trial, last: history[last][trial] < 0.5
  )
  assert [t['best'] for t in table['trials']] == [0.5, 0.7]
  assert [t['last'] for t in table['trials']] == [0.45, 0.7]
  assert table['learning_rates']['0.001']['failed'] == 1


def test_a_diverged_trial_is_never_the_best():
  options = run_lib.Options(metric='accuracy', highest=True)
  scores = [{'accuracy': 0.7, 'loss': math.nan}, {'accuracy': 0.6, 'loss': 0.5}]
  assert run_lib.ranking(scores, options) == [-math.inf, 0.6]
  assert sweep.best_run([{'step': 3, 'scores': scores}], 3, options) == 1
