"""Named experiments: what is run, resumed, shown and claimed; and bands of reference runs."""

import doctest
import json
import math

import pytest

from bertjax import compare, evaluate, experiments, finetune, pretrain, reproduce, vocab
from bertjax import config as config_lib
from bertjax.__main__ import main
from bertjax.experiments import EXPERIMENTS, Experiment, Order, Task, Value, Variant
from tests import test_finetune

TINY = Experiment(
  'two recipes of seconds',
  {
    'pairs': Variant('bert_mini:smoke', paper={'SST-2': 0.927}),
    'no pairs': Variant('bert_mini:smoke,no_nsp'),
    'frozen': Variant('bert_mini:smoke', {'num_trainable_layers': 0}),
  },
  (Order('SST-2', ('pairs', 'no pairs')), Value('frozen', 'mlm_loss', 6.0, 1.0)),
  minutes=1,
  needs=('input', 'glue'),
  tasks={
    'SST-2': Task(
      'glue:sst2', 'glue', 'SST-2', 'accuracy', {'num_train_epochs': 1.0, 'data.length': 32}
    )
  },
  scores=('mlm_loss',),
  fields={'data.heldout_fraction': 0.2},
)


@pytest.fixture
def experiment(monkeypatch):
  """The command for the tiny experiment."""
  monkeypatch.setitem(EXPERIMENTS, 'tiny', TINY)

  def run(folder, *flags):
    return main(['reproduce', 'tiny', f'--workdir={folder}/runs', '--input=TEXTS', '--glue=GLUE',
                 *flags])  # fmt: skip

  return run


@pytest.fixture
def trained(monkeypatch):
  """Programs that train nothing; the list gets their runs, and `fails` stops one of them."""
  runs, fails = [], set()

  def train(config, workdir):
    name = workdir.rpartition('/')[2]
    if name in fails:
      raise KeyboardInterrupt('stopped')
    runs.append((name, config))
    return {'accuracy': 0.7 + 0.1 * config.seed - 0.01 * len(runs)}

  monkeypatch.setattr(pretrain, 'run', train)
  monkeypatch.setattr(finetune, 'run', train)
  monkeypatch.setattr(vocab, 'run', lambda **_: None)
  monkeypatch.setattr(evaluate, 'run_config', lambda path: None)
  monkeypatch.setattr(
    evaluate, 'evaluate_text',
    lambda *_: {'mlm_loss': 6.5, 'unigram_cross_entropy': 7.0},
  )  # fmt: skip
  return runs, fails


def test_variants_are_trained_with_each_seed_and_shown_beside_claims(
  experiment, trained, tmp_path, capsys
):
  assert experiment(tmp_path, '--seeds=2', f'--out={tmp_path}/table.json') == 0
  runs = dict(trained[0])
  assert list(runs)[:5] == [
    'bert_mini-smoke-seed0', 'pairs-sst-2-seed0', 'bert_mini-smoke-no_nsp-seed0',
    'no-pairs-sst-2-seed0', 'frozen-sst-2-seed0',
  ]  # fmt: skip
  assert len(trained[0]) == 10  # variants of one recipe share its run
  config = runs['frozen-sst-2-seed1']
  assert (config.seed, config.num_trainable_layers, config.num_train_epochs) == (1, 0, 1.0)
  assert config.init_from == f'{tmp_path}/runs/bert_mini-smoke-seed1/model'
  assert config.data.source == 'GLUE/SST-2' and config.save_model == 'last'
  config = runs['bert_mini-smoke-no_nsp-seed0']
  assert not config.nsp and config.data.heldout_fraction == 0.2 and config.data.input == 'TEXTS'
  out = capsys.readouterr().out
  lines = [line.split('  ') for line in out.splitlines()]
  head = next(line for line in lines if line[0] == 'variant')
  assert [cell.strip() for cell in head if cell] == [
    'variant', 'score', 'seed 0', 'seed 1', 'mean', 'deviation', 'claim', 'paper',
  ]  # fmt: skip
  assert 'SST-2: pairs 0.705 > no pairs 0.685: the order holds' in out
  assert 'mlm_loss of frozen is 6.500, within 6.0 ± 1.0: the claim holds.' in out
  content = json.loads((tmp_path / 'table.json').read_text())
  assert content['scores']['pairs']['SST-2'] == pytest.approx([0.68, 0.73])
  assert content['rows'][1][-1] == '0.927' and all(c['holds'] for c in content['claims'])


def test_an_interrupted_experiment_resumes_and_repeats_nothing(
  experiment, trained, tmp_path, capsys
):
  runs, fails = trained
  fails.add('no-pairs-sst-2-seed0')
  assert experiment(tmp_path, '--seeds=1') == 130
  assert [name for name, _ in runs] == [
    'bert_mini-smoke-seed0', 'pairs-sst-2-seed0', 'bert_mini-smoke-no_nsp-seed0'
  ]  # fmt: skip
  fails.clear()
  assert experiment(tmp_path, '--seeds=1') == 0
  assert [name for name, _ in runs[3:]] == ['no-pairs-sst-2-seed0', 'frozen-sst-2-seed0']
  assert experiment(tmp_path, '--seeds=1') == 0 and len(runs) == 5
  assert experiment(tmp_path, '--seeds=2') == 0 and len(runs) == 10
  capsys.readouterr()
  assert experiment(tmp_path, '--input=OTHER') == 2
  assert (
    'is a finished run with other values of data.input; name another --workdir'
    in capsys.readouterr().err
  )


def test_a_claim_that_does_not_hold_is_named_and_gives_exit_code_1(
  experiment, trained, tmp_path, monkeypatch, capsys
):
  claims = (Order('SST-2', ('frozen', 'no pairs', 'pairs')), Order('mlm_loss', ('frozen', 'pairs')))
  monkeypatch.setitem(EXPERIMENTS, 'tiny', TINY._replace(claims=claims))
  with pytest.raises(SystemExit) as stop:
    experiment(tmp_path, '--seeds=2')
  assert stop.value.code == 1
  first, second = capsys.readouterr().out.splitlines()[-2:]
  assert 'the order does not hold; no pairs - pairs is -0.020, standard error 0.000' in first
  assert 'the order does not hold; frozen - pairs is 0.000' in second  # equal is not better


@pytest.mark.parametrize('module', [compare, experiments])
def test_examples_of_verdicts_run(module):
  failed, count = doctest.testmod(module)
  assert count and not failed


def test_a_wrong_name_or_missing_data_is_one_sentence(trained, tmp_path, capsys):
  assert main(['reproduce', 'tabel5']) == 2
  assert "no experiment 'tabel5', did you mean 'table5': name one of" in capsys.readouterr().err
  assert main(['reproduce', 'table5', '--input=x', f'--workdir={tmp_path}']) == 2
  assert 'table5 needs --glue and --conll' in capsys.readouterr().err
  assert main(['reproduce', 'quickstart', '--seeds=-1']) == 2
  assert '--seeds must be at least 1' in capsys.readouterr().err


def test_the_list_has_claims_data_and_time_of_each_experiment(capsys):
  assert main(['reproduce']) == 0
  out = capsys.readouterr().out
  for name, each in EXPERIMENTS.items():
    assert f'{name}: {each.about}' in out and f'about {each.minutes} minutes' in out
    assert all(f'claim: {claim}' in out for claim in each.claims)


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_recipes_fields_and_claims_of_an_experiment_exist(name):
  each, flags = EXPERIMENTS[name], set()
  scores = {*each.tasks, *(each.scores if any(v.recipe for v in each.variants.values()) else ())}
  for variant in each.variants.values():
    if variant.recipe:
      config_lib.update(config_lib.load_recipe(variant.recipe), each.fields)
    else:
      flags.add('model')
    for task in each.tasks.values():
      config_lib.update(config_lib.load_recipe(task.recipe), {**task.fields, **variant.fields})
      flags.add(task.flag)
    assert set(variant.paper) <= scores
  assert flags <= set(each.needs)
  values = {variant: {score: [1.0, 2.0] for score in scores} for variant in each.variants}
  for claim in each.claims:
    assert len(claim.check(values)) == 2


@pytest.mark.full
def test_an_experiment_trains_on_text_and_a_task(experiment, tmp_path, corpus, monkeypatch, capsys):
  monkeypatch.setattr(reproduce, 'VOCAB_SIZE', 600)
  monkeypatch.setenv('BERTJAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'GLUE' / 'SST-2').mkdir(parents=True)
  test_finetune.write_sst2(tmp_path / 'GLUE' / 'SST-2')
  (tmp_path / 'TEXTS').symlink_to(corpus)
  claims = (Value('pairs', 'mlm_loss', 6.0, 0.6), Value('frozen', 'SST-2', 0.75, 0.3))
  variants = {name: TINY.variants[name] for name in ('pairs', 'frozen')}
  monkeypatch.setitem(EXPERIMENTS, 'tiny', TINY._replace(claims=claims, variants=variants))
  assert experiment(tmp_path, '--seeds=1') == 0
  assert capsys.readouterr().out.count('the claim holds.') == 2
  assert not (tmp_path / 'runs' / 'frozen-sst-2-seed0' / 'checkpoints').exists()
  run = compare.read_run(tmp_path / 'runs' / 'bert_mini-smoke-seed0', 'pairs')
  assert math.isfinite(run.curves['held-out mlm_loss'][20])
