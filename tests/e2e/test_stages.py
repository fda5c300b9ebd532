"""Runs in stages: rows of 64 tokens, then of 128, then a decay with fewer masks; one optimizer."""

import itertools
import json
import logging

import jax
import numpy as np
import pytest

from bertjax import prepare, pretrain
from bertjax.__main__ import main
from bertjax.config import load_recipe, stage
from bertjax.data.tokenizer import Tokenizer
from bertjax.training.checkpoint import Checkpoints
from bertjax.training.metrics import RunLog, read_metrics


@pytest.fixture(scope='module')
def long_rows(tmp_path_factory, corpus, vocab):
  folder = tmp_path_factory.mktemp('long') / 'rows'
  settings = prepare.Settings(length=128, heldout_fraction=0.2)
  prepare.prepare(str(corpus), Tokenizer.from_file(vocab), settings, folder)
  return folder


@pytest.fixture
def config(tiny_rows, long_rows):
  return make_config(tiny_rows, long_rows)


def make_config(tiny_rows, long_rows):
  """Stages of 8, 6 and 6 steps; the last two have batches of one shape."""
  config = load_recipe('bert_mini:smoke')
  config.data.prepared, config.batch_size, config.model.max_positions = str(tiny_rows), 16, 128
  config.log_every, config.eval_every, config.save_every = 1, 0, 3
  config.data.loader = 'threads'
  longer = {'length': 128, 'batch_size': 8, 'max_predictions': 20, 'prepared': str(long_rows)}
  config.stages = (
    stage(schedule='constant'), stage(steps=6, schedule='constant', start_factor=0.5, **longer),
    stage(steps=6, schedule='one_minus_sqrt', mask_rate=0.1, **longer),
  )  # fmt: skip
  return config


@pytest.fixture(scope='module')
def whole(tmp_path_factory, tiny_rows, long_rows):
  """The workdir of a run in one go, and the log lines of compilations of a step."""
  folder, lines = tmp_path_factory.mktemp('whole'), []
  logger, handler = logging.getLogger('jax._src.interpreters.pxla'), logging.Handler()
  handler.emit = lambda record: lines.append(record.getMessage())
  logger.addHandler(handler)
  with jax.log_compiles():
    pretrain.run(make_config(tiny_rows, long_rows), workdir=str(folder))
  logger.removeHandler(handler)
  return folder, [line for line in lines if line.startswith('Compiling jit(step)')]


def logged(workdir, name='loss', kind='train'):
  return {r['step']: r[name] for r in read_metrics(workdir) if r['kind'] == kind}


def weights(workdir):
  return (workdir / 'model' / 'model.safetensors').read_bytes()


def test_stages_have_their_rows_masks_and_learning_rates(whole):
  workdir, _ = whole
  peak, rate = 1e-3, logged(workdir, 'learning_rate')
  expected = [min(step / 5, 1) for step in range(8)] + [0.5] * 6
  expected += [0.5 * (1 - np.sqrt(step / 6)) for step in range(6)]
  np.testing.assert_allclose(list(rate.values()), peak * np.array(expected), rtol=1e-6)
  masked = logged(workdir, 'mlm_weight', 'eval')
  assert list(masked) == [8, 14, 20] and masked[14] > masked[20] > 0


def test_log_and_curves_show_the_stage(whole):
  workdir, _ = whole
  assert logged(workdir, 'stage') == {n + 1: 1 + (n >= 8) + (n >= 14) for n in range(20)}
  assert logged(workdir, 'stage', 'eval') == {8: 1, 14: 2, 20: 3}
  begun = [row for row in read_metrics(workdir) if row['kind'] == 'stage']
  assert [row['step'] for row in begun] == [0, 8, 14]
  assert {'length': 128, 'batch_size': 8, 'start_factor': 0.5}.items() <= begun[1].items()
  assert begun[2] == {'kind': 'stage', 'step': 14, 'stage': 3, 'mask_rate': 0.1,
                      'schedule': 'one_minus_sqrt'}  # fmt: skip
  assert (workdir / 'loss.png').stat().st_size > 10_000


def test_stages_of_one_shape_share_a_program(whole):
  _, lines = whole
  assert len(lines) == 4  # two shapes, training and evaluation


def test_a_run_killed_in_any_stage_or_between_resumes_bitwise(
  whole, config, tmp_path, monkeypatch, capsys
):
  workdir, _ = whole
  train = RunLog.train
  # The newest checkpoints are those of steps 3, 6 (killed before that of 8 is saved), 8 and 15.
  for step, saved in ((5, 3), (8, 6), (9, 8), (17, 15)):

    def killed(self, now, *rest, at=step):
      if now == at:
        raise KeyboardInterrupt
      train(self, now, *rest)

    monkeypatch.setattr(RunLog, 'train', killed)
    with pytest.raises(KeyboardInterrupt):
      pretrain.run(config, workdir=str(tmp_path))
    assert Checkpoints(tmp_path / 'checkpoints', read_only=True).steps()[-1] == saved
  assert main(['evaluate', f'--workdir={tmp_path}', '--checkpoint=newest']) == 0
  masked = logged(workdir, 'mlm_weight', 'eval')[20]  # of the stage that it is in
  assert f'"mlm_weight": {masked}' in capsys.readouterr().out
  monkeypatch.setattr(RunLog, 'train', train)
  pretrain.run(config, workdir=str(tmp_path))
  assert logged(tmp_path) == logged(workdir)
  assert weights(tmp_path) == weights(workdir)


def test_evaluate_reads_the_rows_of_the_stage(whole, capsys):
  workdir, _ = whole
  masked = logged(workdir, 'mlm_weight', 'eval')
  kept = Checkpoints(workdir / 'checkpoints', read_only=True).steps()
  assert kept == [18, 20]
  assert main(['evaluate', f'--workdir={workdir}']) == 0  # the best is one of the last stage
  assert f'"mlm_weight": {masked[20]}' in capsys.readouterr().out


def test_accumulation_over_a_change_of_stages_equals_large_batches(tiny_rows, tmp_path):
  losses = []
  for accumulation in (1, 2):
    config = load_recipe('bert_mini:smoke')
    config.data.prepared, config.data.loader = str(tiny_rows), 'threads'
    config.model.num_layers = 1
    config.update(num_train_steps=4, batch_size=32, warmup_steps=1, log_every=1, eval_every=0)
    config.stages, config.gradient_accumulation_steps = (stage(), stage(steps=2)), accumulation
    config.stages[1].update(batch_size=16, mask_rate=0.3)
    pretrain.run(config, workdir=str(tmp_path / str(accumulation)))
    losses.append(list(logged(tmp_path / str(accumulation)).values()))
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_the_batch_grows_over_the_rows_without_repeating_one(config, tmp_path):
  config.num_train_steps, config.stages = 6, (stage(batch_size_warmup_steps=4, batch_size=64),)
  setup = pretrain.set_up(config)
  made = [s.batches(0) for s in pretrain.make_stages(setup)]
  counts = [s.stop - s.start for s in setup.stages]
  ids = [np.asarray(next(batches)['input_ids']) for batches, count in zip(made, counts, strict=True)
         for _ in range(count)]  # fmt: skip
  for batches in made:
    batches.close()
  assert [len(batch) for batch in ids] == [8, 16, 16, 32, 64, 64]
  config.batch_size, config.stages = 8, ()
  (plain,) = pretrain.make_stages(pretrain.set_up(config))
  expected = [b['input_ids'] for b in itertools.islice(plain.batches(0), 25)]
  np.testing.assert_array_equal(np.concatenate(ids), np.concatenate(expected))


def test_a_stage_changes_the_rotary_base(config, monkeypatch):
  monkeypatch.setattr(pretrain.families, 'family_of', lambda config: None)  # BERT is not rotary
  config.model.positions, config.stages[2].rope_theta = 'rotary', 500.0
  stages = pretrain.make_stages(pretrain.set_up(config))
  assert [s.model['config']['rope_theta'] for s in stages] == [10_000.0, 10_000.0, 500.0]
  assert stages[0].objective is stages[1].objective  # one program for a shape
  params, batch = stages[0].objective.init(jax.random.key(0)), next(stages[2].batches(0))
  losses = [float(s.objective.loss(params, batch, None)[0]['mlm']) for s in stages]
  assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'prepared': ''}, r'every stage needs prepared rows of its length, .* stages\[1\].length=128'),
    ({'length': 512}, r'data.length=512 is longer than model.max_positions=128'),
    ({'batch_size': 12}, 'batch_size=12, 8 replicas'),
    ({'steps': 14}, r'num_train_steps=20 leaves no steps for stages\[0\]'),
  ],
)
def test_a_stage_that_cannot_be_trained_is_refused_before_the_run(
  config, tmp_path, changes, message
):
  config.stages[1].update(changes)
  with pytest.raises(ValueError, match=message):
    pretrain.run(config, workdir=str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_a_batch_that_accumulation_cannot_split_is_refused_in_any_stage(config, tmp_path):
  config.gradient_accumulation_steps = 2  # 16 rows, then 8, on 8 devices
  with pytest.raises(ValueError, match=r'batch_size=8, 8 replicas .* accumulation=2; try 16'):
    pretrain.run(config, workdir=str(tmp_path / 'run'))


@pytest.mark.parametrize(
  ('number', 'changes', 'message'),
  [
    (2, {'steps': 4}, r'stages\[1\]\.start: 8 there, 10 here'),
    (2, {'mask_rate': 0.2}, r'stages\[2\]\.mask_rate: 0\.1 there, 0\.2 here'),
    (
      1,
      {'schedule': 'linear', 'end_factor': 0.5},
      r'stages\[1\]\.schedule: constant there, linear here',
    ),
  ],
)
def test_other_stages_are_another_run(whole, config, number, changes, message):
  config.stages[number].update(changes)
  with pytest.raises(ValueError, match=message):
    pretrain.run(config, workdir=str(whole[0]))


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(config, tmp_path, capsys):
  before = {'config': {'stage2': {'fraction': 0.1}}, 'identity': {}}
  (tmp_path / 'run.json').write_text(json.dumps(before))
  with pytest.raises(ValueError, match=r'earlier version, with stage2\.fraction; start it again'):
    pretrain.run(config, workdir=str(tmp_path))
  assert main(['evaluate', f'--workdir={tmp_path}']) == 2
  assert 'earlier version, with stage2.fraction' in capsys.readouterr().err


def test_the_word_three_stages_trains_at_smoke_size(corpus, vocab, tmp_path):
  words = 'smoke,three_stages'
  args = ['pretrain', f'--config=bert_mini:{words}', f'--workdir={tmp_path}/run',
          f'--input={corpus}', f'--vocab={vocab}', f'--config.data.cache_dir={tmp_path}/cache',
          '--config.batch_size=16', '--config.stages[1].batch_size=8',
          '--config.stages[2].batch_size=8', '--config.log_every=1',
          '--config.data.loader=threads']  # fmt: skip
  assert main(args) == 0
  assert logged(tmp_path / 'run', 'stage') == {n + 1: 1 + (n >= 16) + (n >= 18) for n in range(20)}
  begun = {r['stage']: r for r in read_metrics(tmp_path / 'run') if r['kind'] == 'stage'}
  assert (begun[1]['length'], begun[2]['length'], begun[3]['mask_rate']) == (64, 512, 0.15)
  assert logged(tmp_path / 'run', 'learning_rate')[20] < 1e-3 * 0.3
