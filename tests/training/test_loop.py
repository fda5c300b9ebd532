"""The train step is exact for any split of the batch; the loop evaluates, logs, stops and saves."""

import functools
import itertools
import os
import signal
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bertjax.model.encoder import PARAM_AXES
from bertjax.model.heads import Bert, init_params
from bertjax.objectives import mlm
from bertjax.training import loop, stopping
from bertjax.training import mesh as mesh_lib
from bertjax.training.optimizer import make_optimizer, make_schedule
from tests.model.test_encoder import PRE_NORM, TINY, dataclasses

STILL = dataclasses.replace(TINY, hidden_dropout=0.0, attention_dropout=0.0, vocab_size=96)
MODERN = dataclasses.replace(PRE_NORM['modernbert'], vocab_size=96)
SHAKY = dataclasses.replace(STILL, hidden_dropout=0.1, attention_dropout=0.1)


def batch_at(step, rows=16, length=16, slots=4):
  """A batch with rows of unequal weight, so that a mean of means would be wrong."""
  rng = np.random.default_rng(step)
  weights = np.arange(slots) < rng.integers(1, slots + 1, rows)[:, None]
  return {
    'input_ids': rng.integers(0, 96, (rows, length), dtype=np.int32),
    'segment_ids': (np.arange(length) < rng.integers(8, 17, rows)[:, None]).astype(np.int32),
    'masked_lm_positions': rng.integers(0, 8, (rows, slots), dtype=np.int32),
    'masked_lm_ids': rng.integers(0, 96, (rows, slots), dtype=np.int32),
    'masked_lm_weights': weights.astype(np.float32),
    'next_sentence_labels': rng.integers(0, 2, rows, dtype=np.int32),
    'example_weights': np.ones(rows, np.float32),
  }


@functools.cache
def program(config, sizes, devices, accumulation=1, name='bert'):
  """(train step, eval step, make a state, mesh) on the first `devices` devices."""
  mesh = mesh_lib.make_mesh(*sizes, devices=jax.devices()[:devices])
  bert = Bert(config)
  transform = make_optimizer(
    name, 3e-3, schedule=make_schedule('google', 40, 4), param_axes=PARAM_AXES
  )
  objective = mlm.pretraining(bert)

  def make_state():
    params = init_params(bert, jax.random.key(0))
    return loop.TrainState.create(params, transform, jax.random.key(1))

  shard = mesh_lib.sharder(mesh, PARAM_AXES)
  _, shardings = loop.init_state(make_state, shard)
  train_step = loop.make_train_step(
    objective.loss, objective.weights, transform, mesh=mesh, state_shardings=shardings,
    accumulation=accumulation,
  )  # fmt: skip
  eval_step = loop.make_eval_step(objective.loss, objective.weights, mesh=mesh)
  return train_step, eval_step, lambda: loop.init_state(make_state, shard)[0], mesh


@functools.cache
def train(config, sizes, devices, steps=20, **options):
  """Losses of `steps` steps, and the last parameters."""
  train_step, _, new_state, mesh = program(config, sizes, devices, **options)
  state, values = new_state(), []
  for batch in loop.to_device((batch_at(s) for s in range(steps)), mesh):
    state, metrics = train_step(state, batch)
    values.append(metrics['loss'])
  return np.array(jax.device_get(values)), jax.device_get(state.params)


@pytest.mark.parametrize(
  ('config', 'sizes'),
  [(SHAKY, (8, 1, 1)), pytest.param(SHAKY, (2, 2, 2), marks=pytest.mark.stack),
   *(pytest.param(*pair, marks=pytest.mark.full)
     for pair in ((SHAKY, (4, 2, 1)), (SHAKY, (1, 4, 2)), (MODERN, (2, 2, 2))))],
)  # fmt: skip
@pytest.mark.e2e
def test_any_mesh_gives_the_losses_of_one_device_with_dropout(config, sizes):
  one, params = train(config, (1, 1, 1), 1)
  many, other = train(config, sizes, 8)
  np.testing.assert_allclose(many, one, rtol=2e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-3), params, other)


@pytest.mark.e2e
def test_training_lowers_the_loss():
  train_step, _, new_state, mesh = program(STILL, (1, 1, 1), 1)
  state, values = new_state(), []
  for batch in loop.to_device((batch_at(0) for _ in range(20)), mesh):
    state, metrics = train_step(state, batch)
    values.append(float(metrics['loss']))
  assert values[-1] < values[0] - 0.5


@pytest.mark.parametrize(('sizes', 'devices'), [((1, 1, 1), 1), ((4, 1, 1), 4)])
@pytest.mark.e2e
def test_accumulation_equals_one_big_batch(sizes, devices):
  one, params = train(STILL, sizes, devices)
  four, other = train(STILL, sizes, devices, accumulation=4)
  np.testing.assert_allclose(four, one, rtol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, other)


def test_the_step_reports_weighted_means():
  train_step, _, new_state, _ = program(STILL, (1, 1, 1), 1)
  state, batch = new_state(), batch_at(3)
  out = jax.jit(Bert(STILL).apply)({'params': state.params}, batch)
  logits = np.asarray(out['mlm_logits'], np.float64)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  nats = -np.take_along_axis(logits, batch['masked_lm_ids'][..., None], -1)[..., 0]
  weights = batch['masked_lm_weights']
  _, metrics = train_step(state, batch)
  assert float(metrics['mlm_loss']) == pytest.approx(
    (nats * weights).sum() / weights.sum(), rel=1e-5
  )
  assert float(metrics['loss']) == pytest.approx(
    float(metrics['mlm_loss'] + metrics['nsp_loss']), rel=1e-6
  )
  right = (logits.argmax(-1) == batch['masked_lm_ids']) * weights
  assert float(metrics['mlm_accuracy']) == pytest.approx(right.sum() / weights.sum(), rel=1e-5)


OPTAX = {
  'adamw': lambda: optax.adamw(1e-3),
  'scheduled': lambda: optax.adamw(optax.schedules.linear_schedule(0.0, 1e-3, 5)),
  'chain': lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
  'hyperparams': lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
  'muon': lambda: make_optimizer('muon', 1e-3, param_axes=PARAM_AXES, average=0.9),
  'multi_steps': lambda: optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(),
}


def optax_loop(optimizer, accumulation, batches):
  """The losses, last parameters and last optimizer state of a hand-written optax loop."""
  objective = mlm.pretraining(Bert(STILL))

  @jax.jit
  def step(params, opt_state, batch):
    weights = objective.weights(batch)

    def loss(params, part):
      sums, _ = objective.loss(params, part, jax.random.key(0))
      return sum(sums[term] / weights[term] for term in ('mlm', 'nsp'))

    parts = [{k: v[i::accumulation] for k, v in batch.items()} for i in range(accumulation)]
    value, grads = jax.value_and_grad(loss)(params, parts[0])
    for part in parts[1:]:
      value, grads = jax.tree.map(jnp.add, (value, grads), jax.value_and_grad(loss)(params, part))
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  params, values = jax.jit(objective.init)(jax.random.key(0)), []
  opt_state = optimizer.init(params)
  for batch in batches:
    params, opt_state, value = step(params, opt_state, batch)
    values.append(float(value))
  return values, params, opt_state


@pytest.mark.parametrize(('name', 'accumulation'), [
  pytest.param('adamw', 1, marks=pytest.mark.stack), ('adamw', 4), ('hyperparams', 1),
  ('multi_steps', 1),
  *(pytest.param(name, 1, marks=pytest.mark.full) for name in ('scheduled', 'chain', 'muon')),
])  # fmt: skip
@pytest.mark.e2e
def test_any_optax_optimizer_trains_as_in_a_hand_written_loop(name, accumulation):
  optimizer, batches = OPTAX[name](), [batch_at(0)] * 12
  expected, params, _ = optax_loop(optimizer, accumulation, batches)
  assert expected[-1] < expected[0] - 0.01  # descends
  objective = mlm.pretraining(Bert(STILL))
  step = loop.make_train_step(
    objective.loss, objective.weights, optimizer, accumulation=accumulation
  )
  start = jax.jit(lambda: init_params(Bert(STILL), jax.random.key(0)))()
  state, values = loop.TrainState.create(start, optimizer, jax.random.key(1)), []
  for batch in batches:
    state, metrics = step(state, batch)
    values.append(float(metrics['loss']))
  assert ('learning_rate' in metrics) == (name in ('hyperparams', 'muon'))
  if accumulation == 1:
    assert values == expected
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
  else:  # the sum of four gradients may be rounded in another order
    np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize(('name', 'sizes'), [
  ('muon', (2, 2, 2)),
  *(pytest.param(name, sizes, marks=pytest.mark.full)
    for name, sizes in (('adamw', (2, 2, 2)), ('hyperparams', (8, 1, 1)))),
])  # fmt: skip
@pytest.mark.e2e
def test_any_optax_optimizer_trains_on_eight_devices(name, sizes):
  optimizer, batches = OPTAX[name](), [batch_at(0)] * 12
  expected, _, _ = optax_loop(optimizer, 1, batches)
  mesh = mesh_lib.make_mesh(*sizes)

  def make():
    params = init_params(Bert(STILL), jax.random.key(0))
    return loop.TrainState.create(params, optimizer, jax.random.key(1))

  state, shardings = loop.init_state(make, mesh_lib.sharder(mesh, PARAM_AXES))
  objective = mlm.pretraining(Bert(STILL))
  step = loop.make_train_step(
    objective.loss, objective.weights, optimizer, mesh=mesh, state_shardings=shardings
  )
  values = []
  for batch in loop.to_device(iter(batches), mesh):
    state, metrics = step(state, batch)
    values.append(float(metrics['loss']))
  np.testing.assert_allclose(values, expected, rtol=2e-4)


@pytest.mark.e2e
def test_the_learning_rate_metric_is_that_of_the_step():
  rate = optax.schedules.linear_schedule(1e-3, 0.0, 4)
  objective, optimizer = (
    mlm.pretraining(Bert(STILL)), optax.inject_hyperparams(optax.adamw)(learning_rate=rate)
  )  # fmt: skip
  step = loop.make_train_step(objective.loss, objective.weights, optimizer)
  params = jax.jit(lambda: init_params(Bert(STILL), jax.random.key(0)))()
  state, found = loop.TrainState.create(params, optimizer, jax.random.key(1)), []
  for _ in range(3):
    state, metrics = step(state, batch_at(0))
    found.append(float(metrics['learning_rate']))
  assert found == pytest.approx([1e-3, 0.75e-3, 0.5e-3])


def test_terms_are_scaled_in_the_total_only():
  losses, weights = {'mlm': 6.0, 'rtd': 8.0}, {'mlm': 3.0, 'rtd': 4.0}
  means = loop.means(losses, {'rtd_accuracy': 3.0}, weights, {'rtd': 50.0})
  assert means == {'loss': 102.0, 'mlm_loss': 2.0, 'rtd_loss': 2.0, 'rtd_accuracy': 0.75}


def test_the_first_step_of_a_warm_up_changes_nothing():
  train_step, _, new_state, _ = program(STILL, (1, 1, 1), 1)
  before = jax.device_get(new_state().params)
  state, metrics = train_step(new_state(), batch_at(0))
  assert float(metrics['learning_rate']) == 0.0
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def test_the_state_is_donated():
  train_step, _, new_state, _ = program(STILL, (1, 1, 1), 1)
  state = new_state()
  train_step(state, batch_at(0))
  assert jax.tree.leaves(state.params)[0].is_deleted()


def test_evaluation_is_exact_on_any_batch_size():
  _, eval_step, new_state, _ = program(STILL, (1, 1, 1), 1)
  params = new_state().params
  whole = batch_at(5, rows=12)

  def cut(size):
    for start in range(0, 12, size):
      part = {k: v[start : start + size] for k, v in whole.items()}
      missing = size - len(part['input_ids'])
      part = {k: np.concatenate([v, v[:1].repeat(missing, 0)]) for k, v in part.items()}
      if missing:  # what `Batches.evaluation` does to a ragged last batch
        part['example_weights'][-missing:] = 0
        part['masked_lm_weights'][-missing:] = 0
      yield part

  a = loop.evaluate(eval_step, params, cut(12))
  b = loop.evaluate(eval_step, params, cut(5))
  assert a['nsp_weight'] == b['nsp_weight'] == 12
  for name, value in a.items():
    assert b[name] == pytest.approx(value, rel=1e-6), name


class Recorder:
  """A log that remembers."""

  def __init__(self):
    self.lines, self.evaluations = [], []

  def train(self, step, metrics, seconds, steps):
    self.lines.append((step, steps, metrics['loss']))

  def evaluation(self, step, metrics):
    self.evaluations.append((step, metrics))


def fit(steps=10, batches=None, **options):
  train_step, eval_step, new_state, mesh = program(STILL, (1, 1, 1), 1)
  log, saves = Recorder(), []
  host = batches or (batch_at(s) for s in range(10_000))
  result = loop.fit(
    options.pop('state', None) or new_state(), train_step, loop.to_device(host, mesh),
    steps=steps, log=log, log_every=options.pop('log_every', 2),
    evaluate_fn=lambda params: loop.evaluate(eval_step, params, [batch_at(99)]),
    save=options.pop('save', None)
    or (lambda state, step, scores: saves.append((step, int(state.step), bool(scores)))),
    **options,
  )  # fmt: skip
  return result, log, saves


def test_the_average_of_the_parameters_is_evaluated():
  optimizer = make_optimizer('sgd', 1.0, average=0.5, weight_decay=0.0)
  step = loop.make_train_step(
    lambda params, batch, rng: ({'fit': jnp.square(params['w'] - 1).sum()}, {}),
    lambda batch: {'fit': 1.0}, optimizer,
  )  # fmt: skip
  state, seen = loop.TrainState.create({'w': jnp.zeros(1)}, optimizer, jax.random.key(0)), []
  state, *_ = loop.fit(
    state, step, itertools.repeat({}), steps=1, log=Recorder(), log_every=1,
    evaluate_fn=lambda params: seen.append(float(params['w'][0])) or {'loss': 0.0},
  )  # fmt: skip
  assert float(state.params['w'][0]) == 1.0  # the gradient -2, clipped to length 1
  assert seen == pytest.approx([0.9])  # 1 / 10 of the initial value


def test_fit_logs_evaluates_and_saves_at_its_intervals():
  (state, scores, stopped), log, saves = fit(10, eval_every=4, save_every=3)
  assert (int(state.step), stopped) == (10, False)
  assert [step for step, _ in log.evaluations] == [4, 8, 10]
  assert log.evaluations[-1] == (10, scores)
  assert saves == [
    (3, 3, False),
    (4, 4, True),
    (6, 6, False),
    (8, 8, True),
    (9, 9, False),
    (10, 10, True),
  ]
  assert sum(steps for _, steps, _ in log.lines) == 10


def test_fit_logs_the_mean_of_its_steps():
  _, each, _ = fit(4, log_every=1)
  _, pairs, _ = fit(4, log_every=2)
  singles = [loss for _, _, loss in each.lines]
  assert [loss for _, _, loss in pairs.lines] == pytest.approx(
    [np.mean(singles[:2]), np.mean(singles[2:])], rel=1e-6
  )


@pytest.mark.parametrize('ahead', [False, True])
def test_waiting_for_a_batch_counts_as_a_stall_when_no_step_runs(monkeypatch, ahead):
  """5 ms of waiting in each of 10 steps, which take 20 ms."""
  clock = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(loop, 'time', types.SimpleNamespace(perf_counter=lambda: clock.now))
  monkeypatch.setattr(loop, '_runs', lambda pending: ahead)

  def batches():
    for _ in itertools.count():
      clock.now += 0.005
      yield {}

  def step(state, batch):
    clock.now += 0.015
    return state, {'loss': 1.0, 'grad_norm': 1.0}

  state, lines = loop.TrainState.create({}, optax.sgd(1.0), jax.random.key(0)), []
  log = types.SimpleNamespace(train=lambda step, metrics, *_: lines.append(metrics['input_stall']))
  loop.fit(state, step, batches(), steps=20, log=log, log_every=10)
  # The first step compiles and does not count.
  assert lines == pytest.approx([0.0, 0.0] if ahead else [9 * 5 / 180, 10 * 5 / 200])


def test_a_step_runs_until_its_outputs_are_there():
  compute = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda _, x: x @ x, x))
  x = compute(jnp.eye(1000)).block_until_ready()
  output = compute(x)
  assert loop._runs([{'loss': x}, {'loss': output}])
  output.block_until_ready()
  assert not loop._runs([{'loss': output}])
  assert not loop._runs([])


def test_a_loss_that_is_not_finite_names_its_step_and_is_not_saved():
  def batches():
    for step in range(100):
      batch = batch_at(step)
      if step == 4:
        batch['masked_lm_weights'][0, 0] = np.nan
      yield batch

  saved = []
  train_step, _, new_state, mesh = program(STILL, (1, 1, 1), 1)
  with pytest.raises(loop.DivergedError, match='nan at step 5'):
    loop.fit(
      new_state(), train_step, loop.to_device(batches(), mesh), steps=10, log=Recorder(),
      log_every=100, save=lambda state, step, scores: saved.append(step), save_every=3,
    )  # fmt: skip
  assert saved == [3]


def test_sigterm_saves_the_step_at_hand_and_restores_the_handler():
  def batches():
    for step in range(100):
      if step == 6:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch_at(step)

  before = signal.getsignal(signal.SIGTERM)
  (state, _, stopped), _, saves = fit(50, batches())
  assert stopped and saves[-1][0] == int(state.step) < 10
  assert signal.getsignal(signal.SIGTERM) is before


def interrupted(times):
  """Batches that press Ctrl-C before step 6, so many times."""
  for step in range(100):
    if step == 6:
      for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
    yield batch_at(step)


def test_the_first_ctrl_c_saves_the_step_at_hand(caplog):
  before = signal.getsignal(signal.SIGINT)
  (state, _, stopped), _, saves = fit(50, interrupted(1))
  assert stopped == signal.SIGINT and saves[-1][0] == int(state.step) < 10
  assert signal.getsignal(signal.SIGINT) is before and 'again to abort' in caplog.text
  with pytest.raises(KeyboardInterrupt, match='stopped at step 7, saved; the same command resumes'):
    stopping.exit_if_stopped(stopped, 7)


def test_the_second_ctrl_c_aborts_without_a_save():
  before, saves = signal.getsignal(signal.SIGINT), []
  with pytest.raises(KeyboardInterrupt):
    fit(50, interrupted(2), save=lambda *_: saves.append(1))
  assert not saves and signal.getsignal(signal.SIGINT) is before


def test_a_background_job_that_ignores_ctrl_c_still_does():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    assert fit(10, interrupted(1))[0][2] == 0
  finally:
    signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_ctrl_c_stays_pythons_own():
  def inside():
    results.append((fit(10)[0][2], signal.getsignal(signal.SIGINT)))

  results, before = [], signal.getsignal(signal.SIGINT)
  thread = threading.Thread(target=inside)
  thread.start()
  thread.join()
  assert results == [(0, before)]
