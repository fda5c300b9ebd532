"""A run of two lengths: rows of 64 tokens, then of 128, one optimizer, one schedule."""

import pytest

from bertjax import prepare, pretrain
from bertjax.__main__ import main
from bertjax.config import load_recipe
from bertjax.data.tokenizer import Tokenizer
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
  config = load_recipe('bert_mini:smoke,two_lengths')
  config.data.prepared, config.stage2.prepared = str(tiny_rows), str(long_rows)
  config.stage2.fraction, config.stage2.batch_size, config.stage2.max_predictions = 0.5, 16, 20
  config.model.max_positions, config.stage2.length = 128, 128
  config.log_every, config.eval_every, config.save_every = 1, 0, 3
  return config


@pytest.fixture(scope='module')
def whole(tmp_path_factory, tiny_rows, long_rows):
  """The workdir of a run in one go, ten steps of either length."""
  folder = tmp_path_factory.mktemp('whole')
  pretrain.run(make_config(tiny_rows, long_rows), workdir=str(folder))
  return folder


def logged(workdir, name='loss', kind='train'):
  return {r['step']: r[name] for r in read_metrics(workdir) if r['kind'] == kind}


def weights(workdir):
  return (workdir / 'model' / 'model.safetensors').read_bytes()


def test_the_second_stage_continues_with_longer_sequences(whole, config, tmp_path):
  masked = logged(whole, 'mlm_weight', 'eval')
  assert list(masked) == [10, 20] and masked[20] > masked[10]
  config.stage2.fraction, config.stage2.prepared = 0.0, ''
  pretrain.run(config, workdir=str(tmp_path))
  two, one = logged(whole), logged(tmp_path)
  assert [two[step] == one[step] for step in range(1, 21)] == [True] * 10 + [False] * 10
  assert logged(whole, 'learning_rate') == logged(tmp_path, 'learning_rate')


def test_a_run_killed_in_either_phase_resumes_bitwise(whole, config, tmp_path, monkeypatch, capsys):
  train = RunLog.train
  for step in (5, 17):  # the newest checkpoints are those of steps 3 and 15

    def killed(self, now, *rest, at=step):
      if now == at:
        raise KeyboardInterrupt
      train(self, now, *rest)

    monkeypatch.setattr(RunLog, 'train', killed)
    with pytest.raises(KeyboardInterrupt):
      pretrain.run(config, workdir=str(tmp_path))
    assert main(['evaluate', f'--workdir={tmp_path}']) == 0
    masked = logged(whole, 'mlm_weight', 'eval')[10 if step < 10 else 20]
    assert f'"mlm_weight": {masked}' in capsys.readouterr().out  # of the phase it is in
  monkeypatch.setattr(RunLog, 'train', train)
  pretrain.run(config, workdir=str(tmp_path))
  assert logged(tmp_path) == logged(whole)
  assert weights(tmp_path) == weights(whole)


def test_evaluate_reads_the_rows_the_run_ended_with(whole, capsys):
  assert main(['evaluate', f'--workdir={whole}']) == 0  # the best is one of the last phase
  masked = logged(whole, 'mlm_weight', 'eval')[20]
  assert f'"mlm_weight": {masked}' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'stage2.fraction': 1.0}, r'stage2.fraction .* together below 1, got 1.0'),
    ({'stage2.prepared': ''}, 'every stage needs prepared rows of its length'),
    ({'stage2.length': 512}, r'data.length=512 is longer than model.max_positions=128'),
    ({'stage2.batch_size': 12}, 'batch'),
  ],
)
def test_a_phase_that_cannot_be_trained_is_refused_before_the_run(
  config, tmp_path, changes, message
):
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    pretrain.run(config, workdir=str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_another_point_of_change_is_another_run(whole, config):
  config.stage2.fraction = 0.25
  with pytest.raises(ValueError, match=r'stage2\.start: 10 there, 15 here'):
    pretrain.run(config, workdir=str(whole))
