"""Runs side by side, and against bands of reference runs."""

import json
import pathlib

import pytest

from bertjax import compare, pretrain, vocab
from bertjax import config as config_lib
from bertjax.__main__ import main
from bertjax.config import load_recipe

ROOT = pathlib.Path(__file__).parent.parent


def make_run(folder, seed=0, rate=1e-3, losses=((10, 3.0), (20, 2.0)), **config):
  """A workdir with what a run logs."""
  logs = folder / 'logs'
  logs.mkdir(parents=True)
  rows = [
    {'kind': kind, 'step': step, 'loss': loss, 'mlm_loss': loss, 'mlm_weight': 9.0,
     **({'tokens_per_second': 100.0 * step, 'learning_rate': rate} if kind == 'train' else
        {'mlm_accuracy': 1 / loss})}
    for step, loss in losses for kind in ('train', 'eval')
  ]  # fmt: skip
  (logs / 'metrics-1.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  about = {
    'config': {'seed': seed, 'learning_rate': rate, **config}, 'devices': ['cpu'],
    'versions': {'jax': '0.10.2'}, 'started': '2026-11-26',
  }  # fmt: skip
  (folder / 'run.json').write_text(json.dumps(about))
  return str(folder)


def test_runs_and_the_settings_that_differ_stand_side_by_side(tmp_path, capsys):
  runs = [make_run(tmp_path / 'a'), make_run(tmp_path / 'b', rate=3e-3, losses=[(10, 2.5)])]
  out = tmp_path / 'compare.html'
  assert main(['compare', *runs, f'--out={out}']) == 0
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert lines[0] == ['run', 'mlm_loss', 'mlm_accuracy', 'step', 'tokens/s', 'devices', 'jax',
                      'started']  # fmt: skip
  assert lines[1][:5] == ['a', '2.0000', '0.5000', '20', '1500']  # the median of both lines
  assert lines[2][:5] == ['b', '2.5000', '0.4000', '10', '1000']
  assert lines[4:] == [['setting', 'a', 'b'], ['learning_rate', '0.001', '0.003']]
  page = out.read_text()
  assert page.count('<svg') == 3 and '<td class="n">2.5000</td>' in page
  assert main(['compare', runs[0]]) == 0


def test_a_band_holds_its_runs_and_its_width_follows_from_them(tmp_path, capsys):
  values = ((3.0, 2.0), (3.2, 2.0))
  runs = [make_run(tmp_path / str(seed), seed, losses=list(zip((10, 20), v, strict=True)))
          for seed, v in enumerate(values)]  # fmt: skip
  band = tmp_path / 'band.json'
  assert main(['compare', *runs, f'--write_band={band}']) == 0
  content = json.loads(band.read_text())
  (first, second) = content['curves']['held-out mlm_loss']
  wide, pooled = 5 * 0.02**0.5, 5 * 0.01**0.5  # of step 10, and of both steps
  assert first == pytest.approx([10, 3.1 - wide, 3.1 + wide], 1e-5) and content['seeds'] == [0, 1]
  assert second == pytest.approx([20, 2.0 - pooled, 2.0 + pooled], 1e-5)
  assert main(['compare', *runs, f'--band={band}', f'--out={tmp_path / "c.html"}']) == 0
  assert capsys.readouterr().out.count('stays inside the band') == 2
  assert 'stays inside the band' in (tmp_path / 'c.html').read_text()


def test_a_run_that_leaves_a_band_is_named_with_step_and_bounds(tmp_path, capsys):
  runs = [make_run(tmp_path / str(seed), seed) for seed in range(2)]
  band = tmp_path / 'band.json'
  compare.run(runs, write_band=str(band))
  other = make_run(tmp_path / 'other', losses=[(5, 9.0), (15, 2.52), (20, 2.3), (30, 9.0)])
  with pytest.raises(SystemExit) as stop:
    compare.run([other], band=str(band))
  assert stop.value.code == 1
  assert (
    'other: held-out mlm_loss leaves the band at step 20: 2.3, not 1.98 to 2.02; outside at 1 of 2 '
    'steps'
  ) in capsys.readouterr().out  # 15 is interpolated, 5 and 30 are beyond the band


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'learning_rate': 3e-3}, 'these differ in learning_rate'),
    ({}, 'there is one'),
  ],
)
def test_a_band_needs_runs_that_differ_in_their_seed(tmp_path, change, words):
  runs = [make_run(tmp_path / 'a')]
  if change:
    runs.append(make_run(tmp_path / 'b', 1, change['learning_rate']))
  with pytest.raises(ValueError, match=words):
    compare.run(runs, write_band=str(tmp_path / 'band.json'))


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
  (tmp_path / 'empty').mkdir()
  assert main(['compare', str(tmp_path / 'empty')]) == 2
  assert 'holds no run' in capsys.readouterr().err
  assert main(['compare']) == 2
  assert 'compare needs the workdirs of runs' in capsys.readouterr().err
  run = make_run(tmp_path / 'a')
  assert main(['compare', run, f'--band={run}/run.json']) == 2
  assert 'run.json is no band' in capsys.readouterr().err
  assert main(['compare', run, run]) == 2
  assert 'given twice' in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.parametrize(
  ('rate', 'code'), [pytest.param(1e-3, 0, marks=pytest.mark.full), (1e-4, 1)]
)
def test_a_wrong_learning_rate_leaves_the_committed_band(rate, code, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('BERTJAX_CACHE', str(tmp_path))
  band = json.loads((ROOT / 'docs' / 'results' / 'smoke.json').read_text())
  assert band['seeds'] == [0, 1, 2, 3, 4]
  config = load_recipe('bert_mini:smoke,no_nsp')
  config.data.input, config.data.vocab = str(ROOT / 'LICENSE'), str(tmp_path / 'vocab.txt')
  config.data.format, config.data.heldout_fraction = 'google', 0.3
  config.num_train_steps, config.log_every = 40, 10
  ours, theirs = config_lib.flat(config), band['config']
  assert [name for name in ours if ours[name] != theirs[name]] == ['data.input', 'data.vocab']
  config.seed, config.learning_rate = 5, rate
  vocab.run(input=config.data.input, format='google', out=config.data.vocab, size=500, report=False)
  pretrain.run(config, workdir=str(tmp_path / 'run'))
  arguments = ['compare', str(tmp_path / 'run'), f'--band={ROOT}/docs/results/smoke.json']
  if code:
    with pytest.raises(SystemExit) as stop:
      main(arguments)
    assert stop.value.code == code
    assert 'training mlm_loss leaves the band at step 20' in capsys.readouterr().out
  else:
    assert main(arguments) == 0
    assert 'stays inside the band' in capsys.readouterr().out


BANDS = [path for path in (ROOT / 'docs' / 'results').iterdir() if '"curves"' in path.read_text()]


@pytest.mark.parametrize('path', BANDS, ids=lambda path: path.stem)
def test_a_committed_band_is_of_a_recipe_and_of_no_machine(path):
  band = json.loads(path.read_text())
  assert len(band['seeds']) >= 3 and compare.read_band(str(path))
  known = config_lib.PRETRAINING | config_lib.FINETUNING
  assert set(band['config']) <= set(known)
  assert not [value for value in band['config'].values() if str(value).startswith('/')]
  text = (ROOT / 'docs' / 'results.md').read_text()
  assert f'`{path.name}`' in text
