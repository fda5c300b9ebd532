"""The pre-training program from end to end: runs, resumption, refusals, command line."""

import contextlib
import functools
import importlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from bertjax import prepare, pretrain
from bertjax.__main__ import main, parse
from bertjax.config import load_recipe, recipe_names
from bertjax.data import dataset
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from bertjax.inference.predictor import Predictor
from bertjax.interop import loading
from bertjax.training.metrics import read_metrics
from tests.flags import QUICK
from tests.waiting import until

ONE_DEVICE = {'XLA_FLAGS': QUICK}
QUIET = ['--config.log_every=1', '--config.eval_every=0', '--config.save_every=20']


def arguments(rows, workdir, *more):
  return [
    'pretrain', '--config=bert_mini:smoke', f'--workdir={workdir}',
    f'--config.data.prepared={rows}', '--config.learning_rate=3e-3', *more,
  ]  # fmt: skip


def start(args, **environment):
  """Starts the command as a separate process, on one device."""
  env = os.environ | ONE_DEVICE | environment
  return subprocess.Popen(
    [sys.executable, '-m', 'bertjax', *args], env=env, stderr=subprocess.PIPE, text=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
  )  # fmt: skip


def finish(process, code=0):
  _, errors = process.communicate(timeout=1800)
  assert process.returncode == code, errors[-3000:]
  return errors


def wait_for_step(process, workdir, step, seconds=600):
  """Waits until the log has a step, then returns."""

  def logged():
    if process.poll() is not None:
      raise AssertionError(process.communicate()[1][-3000:])
    return any(row['step'] >= step for row in read_metrics(workdir))

  until(logged, f'step {step}', seconds)


def losses(workdir):
  rows = read_metrics(workdir)
  return {r['step']: (r['loss'], r['grad_norm']) for r in rows if r['kind'] == 'train'}


def weights(workdir):
  return (pathlib.Path(workdir) / 'model' / 'model.safetensors').read_bytes()


@pytest.fixture(scope='module')
def uninterrupted(tiny_rows, tmp_path_factory):
  """120 steps in one go, fed by tf.data."""
  folder = tmp_path_factory.mktemp('uninterrupted')
  more = ['--config.num_train_steps=120', *QUIET, '--config.data.loader=tfdata']
  finish(start(arguments(tiny_rows, folder, *more)))
  return folder


@pytest.mark.e2e
def test_the_loss_falls(uninterrupted):
  values = [loss for _, (loss, _) in sorted(losses(uninterrupted).items())]
  assert np.mean(values[-10:]) < np.mean(values[:10]) - 0.5


@pytest.mark.parametrize(
  ('kill', 'code'),
  [
    pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.full),
    pytest.param(signal.SIGTERM, 75, marks=pytest.mark.stack),
    # Smaller version: the loop stops and saves, in tests/training/test_loop.py.
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
  ],
)
def test_a_killed_and_resumed_run_is_bitwise_the_uninterrupted_one(
  kill, code, uninterrupted, tiny_rows, tmp_path
):
  args = arguments(
    tiny_rows, tmp_path, '--config.num_train_steps=120', *QUIET, '--config.data.loader=threads'
  )
  process = start(args)
  wait_for_step(process, tmp_path, random.randint(21, 60))
  process.send_signal(kill)
  errors = finish(process, code)
  assert kill == signal.SIGKILL or 'saved; the same command resumes the run.' in errors
  assert not (tmp_path / 'model').exists()
  finish(start(args))
  assert losses(tmp_path) == losses(uninterrupted)
  assert weights(tmp_path) == weights(uninterrupted)


@pytest.mark.full
@pytest.mark.stack
def test_training_fine_tuning_and_prediction_need_no_tensorflow(tiny_rows, tmp_path):
  block = tmp_path / 'block'
  block.mkdir()
  for name in ('tensorflow', 'tensorflow_text', 'tensorflow_datasets', 'torch', 'transformers'):
    (block / f'{name}.py').write_text(f'raise ImportError("{name} is blocked")')
  code = (
    'import sys, bertjax\n'
    'from bertjax.__main__ import main\n'
    'for module in ("tensorflow", "torch"):\n'
    '  try: __import__(module)\n'
    '  except ImportError: pass\n'
    '  else: raise SystemExit("not blocked")\n'
    'run = sys.argv[1]\n'
    'assert main(sys.argv[2:]) == 0\n'
    'assert main(["evaluate", "--workdir=" + run]) == 0\n'
    'fills = bertjax.Predictor.from_dir(run + "/model").fill_mask("a [MASK] b", 3)\n'
    'assert len(fills[0]) == 3\n'
    'data = ["--config=table", "--config.init_from=" + run + "/model",\n'
    '        "--config.num_train_epochs=2.0",\n'
    '        "--config.data.source=" + run, "--config.data.train_file=a.csv",\n'
    '        "--config.data.dev_file=a.csv",\n'
    '        "--config.task.text=x", "--config.task.label=y", "--config.data.length=16",\n'
    '        "--config.data.loader=threads"]\n'
    'assert main(["prepare", "--out=" + run + "/rows", *data]) == 0\n'
    'assert main(["finetune", "--workdir=" + run + "/task", *data,\n'
    '             "--config.data.prepared=" + run + "/rows"]) == 0\n'
    'assert main(["evaluate", "--workdir=" + run + "/task"]) == 0\n'
  )
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'a.csv').write_text('x,y\n' + 'a value,0\nan error,1\n' * 20)
  args = arguments(tiny_rows, run, '--config.data.loader=threads')
  env = os.environ | ONE_DEVICE | {'PYTHONPATH': str(block)}
  done = subprocess.run(
    [sys.executable, '-c', code, str(run), *args], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert json.loads((run / 'metrics.json').read_text())['mlm_loss'] < 7
  assert json.loads((run / 'task' / 'metrics.json').read_text())['accuracy'] >= 0.5


@pytest.fixture(scope='module')
def finished(tiny_rows, tmp_path_factory):
  """A finished smoke run on 8 devices."""
  folder = tmp_path_factory.mktemp('finished') / 'run'
  assert main(arguments(tiny_rows, folder)) == 0
  return folder


@pytest.mark.e2e
def test_a_run_leaves_what_the_manual_says(finished):
  names = {path.name for path in finished.iterdir()}
  assert names == {
    'checkpoints', 'logs', 'loss.png', 'run.json', 'metrics.json', 'model', 'tokenizer'
  }  # fmt: skip
  info = json.loads((finished / 'run.json').read_text())
  assert 3 < info['losses']['mlm_loss']['baseline'] < np.log(600)  # of the unigram
  assert {'command', 'versions', 'commit', 'config', 'identity', 'devices'} <= set(info)
  assert list((finished / 'logs').glob('tensorboard/events*'))
  assert {p.name for p in (finished / 'model').iterdir()} == {
    'README.md', 'config.json', 'model.safetensors', 'vocab.txt', 'tokenizer.json',
    'tokenizer_config.json',
  }  # fmt: skip


def test_a_finished_run_started_again_changes_nothing(finished, tiny_rows):
  before, mtime = weights(finished), (finished / 'checkpoints').stat().st_mtime
  assert main(arguments(tiny_rows, finished)) == 0
  assert weights(finished) == before and (finished / 'checkpoints').stat().st_mtime == mtime


@pytest.mark.e2e
def test_a_relative_workdir_will_do(tiny_rows, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert main(arguments(tiny_rows, 'runs/here')) == 0
  assert (tmp_path / 'runs' / 'here' / 'model' / 'config.json').exists()


@pytest.mark.full
def test_more_steps_resume_from_the_last(finished, tiny_rows, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  assert main(arguments(tiny_rows, tmp_path / 'run', '--config.num_train_steps=30')) == 0
  assert sorted(losses(tmp_path / 'run'))[-1] == 30


def test_fewer_steps_than_the_newest_checkpoint_has_are_refused(finished, tiny_rows, capsys):
  before = sorted(finished.rglob('*'))
  check_refused(
    arguments(tiny_rows, finished, '--config.num_train_steps=15'),
    capsys,
    'steps=15',
    'step 20',
    '--workdir',
  )
  assert sorted(finished.rglob('*')) == before


@pytest.mark.full
def test_a_checkpoint_is_read_as_the_average_of_its_parameters(tiny_rows, tmp_path, capsys):
  """With `optimizer.average`, as the model that the run writes, by each reader of checkpoints."""
  more = ('--config.optimizer.average=0.9', '--config.num_train_steps=6', '--config.log_every=6')
  assert main(arguments(tiny_rows, tmp_path, *more)) == 0
  (_, model), (_, checkpoint) = (
    loading.load_weights(folder) for folder in (tmp_path / 'model', tmp_path / 'checkpoints/6')
  )
  jax.tree.map(np.testing.assert_array_equal, checkpoint, model)
  capsys.readouterr()
  assert main(['evaluate', f'--workdir={tmp_path}', '--checkpoint=6']) == 0
  found, saved = (
    json.loads(capsys.readouterr().out),
    json.loads((tmp_path / 'metrics.json').read_text()),
  )
  assert found['mlm_loss'] == pytest.approx(saved['mlm_loss'], rel=1e-6)


def test_the_card_of_a_model_says_from_what_and_how_it_was_trained(finished):
  card, scores = (finished / 'model' / 'README.md').read_text(), json.loads(
    (finished / 'metrics.json').read_text())  # fmt: skip
  config = json.loads((finished / 'run.json').read_text())['config']
  assert f'| `mlm_loss` | {scores["mlm_loss"]:.4g} |' in card and 'license: unknown' in card
  for field, value in (('num_train_steps', config['num_train_steps']), ('seed', config['seed'])):
    assert f'| `{field}` | `{value}` |' in card
  assert f'jax {jax.__version__}' in card


def test_evaluate_prints_what_the_run_wrote_and_the_unigram_figure(finished, capsys):
  assert main(['evaluate', f'--workdir={finished}', '--checkpoint=newest']) == 0
  printed = json.loads(capsys.readouterr().out)
  written = json.loads((finished / 'metrics.json').read_text())
  assert printed['mlm_loss'] == pytest.approx(written['mlm_loss'], rel=1e-6)
  assert printed['mlm_perplexity'] == pytest.approx(np.exp(printed['mlm_loss']))
  assert 3 < printed['unigram_cross_entropy'] < np.log(600)


@pytest.mark.parametrize(
  'flags', [[], ['--workdir=a', '--model=b'], ['--workdir=a', '--config=bert_mini'], ['--model=b']]
)
def test_evaluate_takes_a_run_or_a_model_with_a_config(flags, capsys):
  check_refused(['evaluate', *flags], capsys, '--workdir=DIR', '--config=RECIPE')


def test_what_prepared_rows_decide_is_recorded_as_it_is(tiny_rows, vocab, caplog):
  config = load_recipe('bert_mini:smoke')
  config.data.update(prepared=str(tiny_rows), dupe_factor=3, heldout_fraction=0.5, vocab=str(vocab))
  config.masking.update(max_predictions=-1, rate=0.3)
  setup = pretrain.set_up(config)
  assert (setup.config.data.dupe_factor, setup.config.data.heldout_fraction) == (1, 0.2)
  assert setup.config.masking.max_predictions == 19  # of 64 tokens
  assert (config.data.dupe_factor, config.masking.max_predictions) == (3, -1)  # the caller's stay
  assert (
    'was prepared with data.dupe_factor=1; the value of the config, 3, is replaced' in caplog.text
  )


def test_predictions_are_derived_for_the_sequences_of_prepared_rows(corpus, vocab, tmp_path):
  settings = prepare.Settings(length=64, max_sequences_per_row=8, heldout_fraction=0.2)
  prepare.prepare(str(corpus), Tokenizer.from_file(vocab), settings, tmp_path / 'rows')
  config = load_recipe('bert_mini:smoke')
  config.data.prepared, config.masking.max_predictions = str(tmp_path / 'rows'), -1
  assert pretrain.set_up(config).config.masking.max_predictions == 10 + 4


def test_any_step_of_a_run_becomes_a_model(finished, tiny_rows, tmp_path, capsys):
  for step in (10, 20):
    assert (
      main(['convert', f'--from={finished}', f'--checkpoint={step}', f'--out={tmp_path}/{step}'])
      == 0
    )
  newest, model = tmp_path / '20', finished / 'model'
  for path in {*model.iterdir()} - {model / 'README.md'}:  # which a run writes
    assert path.read_bytes() == (newest / path.name).read_bytes(), path.name
  capsys.readouterr()
  assert main(['evaluate', f'--workdir={finished}', '--checkpoint=10']) == 0
  expected = json.loads(capsys.readouterr().out)['mlm_loss']
  args = ['--config=bert_mini:smoke', f'--config.data.prepared={tiny_rows}']
  assert main(['evaluate', *args, f'--model={tmp_path}/10']) == 0
  assert json.loads(capsys.readouterr().out)['mlm_loss'] == pytest.approx(expected, rel=1e-6)
  check_refused(
    ['convert', f'--from={finished}', '--checkpoint=15', f'--out={tmp_path}/15'], capsys, 'step 15',
    '[10, 20]',
  )  # fmt: skip


@pytest.mark.e2e
def test_a_run_without_a_model_yet_is_its_newest_checkpoint(finished, tiny_rows, tmp_path, caplog):
  run = tmp_path / 'run'
  shutil.copytree(finished, run, ignore=shutil.ignore_patterns('model'))
  bert, params, tokenizer = loading.load_model(run)
  expected = loading.load_model(finished)
  assert bert == expected[0] and tokenizer.fingerprint == expected[2].fingerprint
  jax.tree.map(np.testing.assert_array_equal, params, expected[1])
  assert loading.load_weights(run, heads=('mlm',))[1].keys() == {'encoder', 'pooler', 'mlm'}
  assert f'{run} has no model/ yet; reading its newest checkpoint, 20' in caplog.text
  with pytest.raises(ValueError, match=r'no tagging head'):
    loading.load_weights(run, heads=('tagging',))
  small = ['--config.learning_rate=1e-9', '--config.num_train_steps=1', '--config.warmup_steps=0']
  second = tmp_path / 'second'
  assert main(arguments(tiny_rows, second, f'--config.init_from={run}', *small)) == 0
  near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-7)
  jax.tree.map(near, loading.load_model(second)[1], params)
  for path in (run / 'checkpoints/20/state/ocdbt.process_0/d').iterdir():
    data = np.fromfile(path, np.uint8)
    data[::500] ^= 1  # at many offsets: which arrays a file holds, and where, differs between runs
    data.tofile(path)
  with pytest.raises(ValueError, match=r'checkpoints/20 (is corrupt|cannot be read)'):
    loading.load_model(run)


@pytest.mark.e2e
def test_patience_ends_a_run_and_the_best_step_becomes_the_model(tiny_rows, tmp_path, capsys):
  args = arguments(
    tiny_rows, tmp_path, '--config.learning_rate=0.2', '--config.warmup_steps=1',
    '--config.eval_every=2', '--config.patience=2', '--config.save_model=best',
  )  # fmt: skip
  assert main(args) == 0

  def found():
    losses = {r['step']: r['loss'] for r in read_metrics(tmp_path) if r['kind'] == 'eval'}
    return losses, json.loads((tmp_path / 'metrics.json').read_text())['loss'], weights(tmp_path)

  losses, score, model = found()
  best = min(losses, key=losses.get)
  assert max(losses) == best + 4 < 20  # two evaluations without a better one
  assert score == pytest.approx(losses[best], rel=1e-6)
  assert main(args) == 0 and found() == (losses, score, model)  # it has ended
  capsys.readouterr()
  check_refused([*args, '--config.save_model=first'], capsys, 'save_model', 'first')


def test_evaluate_of_a_folder_without_a_run_says_so(tmp_path, capsys):
  check_refused(['evaluate', f'--workdir={tmp_path}'], capsys, tmp_path, 'run.json')


def test_a_config_field_without_a_recipe_is_refused(capsys):
  check_refused(
    ['evaluate', '--workdir=a', '--config.max_eval_examples=3'], capsys, 'config.max_eval_examples'
  )


def test_evaluate_reads_a_model_directory(finished, tiny_rows, capsys):
  args = ['evaluate', '--config=bert_mini:smoke', f'--model={finished}/model']
  assert main([*args, f'--config.data.prepared={tiny_rows}']) == 0
  printed = json.loads(capsys.readouterr().out)
  written = json.loads((finished / 'metrics.json').read_text())
  assert printed['mlm_loss'] == pytest.approx(written['mlm_loss'], rel=1e-5)


@pytest.mark.e2e
def test_evaluate_scores_a_complete_text_with_the_unigram_of_another(
  finished, corpus, vocab, tmp_path, monkeypatch, capsys
):  # fmt: skip
  monkeypatch.setenv('BERTJAX_CACHE', str(tmp_path))
  args = [
    'evaluate', '--config=bert_mini:smoke', f'--model={finished}/model',
    '--max_eval_examples=100000',
    f'--config.data.input={corpus}', f'--config.data.vocab={vocab}',
    '--config.data.heldout_fraction=1.0',
  ]  # fmt: skip
  assert main([*args, f'--unigram={corpus}/0*.txt']) == 0
  printed = json.loads(capsys.readouterr().out)
  [manifest] = [json.loads(path.read_text()) for path in tmp_path.glob('*/manifest.json')]
  counts = manifest['counts']
  assert (counts['train_documents'], counts['heldout_documents']) == (0, 40)
  assert printed['nsp_weight'] == counts['heldout_rows'] > 100
  assert manifest['report']['documents'] == 40
  texts = [path.read_text() for path in sorted(corpus.glob('0*.txt'))]
  ids = Tokenizer.from_file(vocab).encode_flat(texts)[0]
  nats = np.log((len(ids) + 600) / (np.bincount(ids, minlength=600) + 1))
  assert nats.min() < printed['unigram_cross_entropy'] < nats.max()
  # 12 rows do not divide by 8 devices: 6 are used, and the same rows are scored.
  assert main([*args, '--config.batch_size=12']) == 0
  again = json.loads(capsys.readouterr().out)
  assert 'unigram_cross_entropy' not in again
  for name in ('mlm_loss', 'nsp_loss', 'nsp_weight'):
    assert again[name] == pytest.approx(printed[name], rel=1e-5)
  check_refused(
    ['pretrain', *args[1:2], *args[4:], f'--workdir={tmp_path}/run'], capsys,
    'data.heldout_fraction=1',
    'no document to train on',
  )  # fmt: skip


def test_the_unigram_figure_is_the_cross_entropy_of_the_same_tokens(tiny_rows):
  from bertjax.data import unigram

  train = dataset.Dataset(tiny_rows, 'train')
  ids = train[np.arange(len(train))]['input_ids']
  counts = np.bincount(ids.ravel(), minlength=600).astype(float)
  assert counts.tolist() == unigram.count_rows(train, 600).tolist()
  given = counts.copy()
  counts[[0, 101, 102]] = 0
  tokens = np.array([[150, 160, 0]])
  batch = {'masked_lm_ids': tokens, 'masked_lm_weights': np.array([[1.0, 1.0, 0.0]])}
  expected = -np.log((counts[[150, 160]] + 1) / (counts.sum() + 600)).mean()
  got = unigram.cross_entropy(given, [batch], exclude=(0, 101, 102))
  assert got == pytest.approx(expected)


def test_fill_mask_gives_probabilities_in_order(finished):
  first, second = Predictor.from_dir(finished / 'model').fill_mask('the [MASK] of [MASK].', top_k=4)
  for fills in (first, second):
    values = [fill.probability for fill in fills]
    assert len(fills) == 4 and values == sorted(values, reverse=True) and sum(values) <= 1
  assert first[0].text.startswith('the ') and first[0].text.count('[MASK]') == 1


@pytest.mark.parametrize(
  ('text', 'words'), [('no mask', 'no \\[MASK\\]'), ('[MASK] ' * 90, 'at most 64')]
)
def test_fill_mask_says_what_is_wrong_with_a_text(finished, text, words):
  with pytest.raises(ValueError, match=words):
    Predictor.from_dir(finished / 'model').fill_mask(text)


@pytest.mark.full
def test_a_new_run_starts_from_a_model_directory(finished, tiny_rows, tmp_path, capsys):
  more = [f'--config.init_from={finished}/model', '--config.warmup_steps=20']
  assert main(arguments(tiny_rows, tmp_path / 'run', *more)) == 0
  first = read_metrics(tmp_path / 'run')[-4:]
  scratch = [r for r in read_metrics(finished) if r['kind'] == 'train']
  assert next(r for r in first if r['kind'] == 'train')['loss'] < scratch[0]['loss'] - 0.3
  check_refused(arguments(tiny_rows, tmp_path / 'run', more[1]), capsys, 'init_from', 'another')


@pytest.mark.full
@pytest.mark.parametrize('words', ['no_nsp', 'ltr', 'mask_0_100', 'size_1_64_2'])
def test_every_ablation_trains(words, corpus, vocab, tmp_path, monkeypatch):
  monkeypatch.setenv('BERTJAX_CACHE', str(tmp_path / 'cache'))
  args = ['pretrain', f'--config=bert_base:smoke,{words}', f'--workdir={tmp_path}/run',
          f'--config.data.input={corpus}', f'--config.data.vocab={vocab}']  # fmt: skip
  assert main([*args, '--config.num_train_steps=6']) == 0
  scores = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
  assert np.isfinite(scores['mlm_loss']) and ('nsp_loss' in scores) == (
    words[:4] in ('mask', 'size')
  )


@pytest.mark.parametrize('recipe', recipe_names('pretrain'))
def test_every_recipe_has_a_smoke_form_and_a_runbook(recipe):
  path = pathlib.Path(__file__).parent.parent / 'configs' / 'pretrain' / f'{recipe}.py'
  assert 'bertjax ' in path.read_text().split('"""')[1]
  assert (
    load_recipe(f'{path}:smoke').num_train_steps
    == load_recipe(f'{recipe}:smoke').num_train_steps
    == 20
  )


def test_recipes_are_installed_with_the_package():
  module = importlib.import_module('bertjax.configs.pretrain.bert_base')
  assert module.get_config('smoke').num_train_steps == 20


def test_the_paper_recipes_have_the_papers_numbers():
  base, large = load_recipe('bert_base'), load_recipe('bert_large')
  for config in (base, large):
    assert (config.batch_size, config.num_train_steps, config.warmup_steps) == (
      256,
      1_000_000,
      10_000,
    )
    assert (config.learning_rate, config.optimizer.weight_decay) == (1e-4, 0.01)
    assert (config.data.length, config.masking.max_predictions) == (128, 20)
  assert (base.model.num_layers, base.model.hidden_size) == (12, 768)
  assert (large.model.num_layers, large.model.hidden_size, large.model.num_heads) == (24, 1024, 16)


def check_refused(args, capsys, *words):
  """Runs the command; it must end with code 2 and one sentence that holds the words."""
  capsys.readouterr()
  assert main(args) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('bertjax')]
  assert len(lines) == 1
  for word in words:
    assert str(word) in lines[0], lines[0]


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config.batch_size=12'], ['batch_size=12', '8 replicas', 'try 8']),
    (['--config.mesh.tensor=3'], ['8 devices']),
    (['--config.num_train_stesp=3'], ['num_train_steps']),
    (['--config.num_train_steps=1e3'], ['int', '1e3']),
    (['--config.masking.rate=1.5'], ['masking.rate', '1.5']),
    (['--config.optimizer.name=adam'], ['adamw']),
    (['--config.model.hidden_size=33'], ['multiple of num_heads']),
    (['--config.model.vocab_size=100'], ['model.vocab_size=100', '600']),
    (['--config.data.length=32'], ['--config.data.length=64']),
    (['--config.nsp=False'], ['--config.nsp=True']),
    (['--config.objective=next_token'], ['causal']),
    (['--config.data.loader=torch'], ['tfdata']),
    (['--config.schedule=cosin'], ['google']),
    (['--config.warmup_steps=21'], ['warmup_steps=21']),
    (
      ['--config.gradient_accumulation_steps=0'],
      ['gradient_accumulation_steps must be at least 1, got 0'],
    ),
    ([f'--config.seed={2**63}'], ['seed', 'below 2**63', str(2**63)]),
    (['--config.seed=-1'], ['seed', 'at least 0', '-1']),
    ([f'--config.num_train_steps={2**31}'], ['steps', 'below 2**31']),
    ([f'--config.model.hidden_size={2**63}'], ['model.hidden_size', 'below 2**31']),
    (['--config.log_every=0'], ['log_every', 'at least 1']),
    (['--config.stall_seconds=-1'], ['stall_seconds', 'at least 0']),
    (['--config.loss_spike_threshold=nan'], ['spike', 'nan']),
    (['--config.learning_rate=-1e-4'], ['learning_rate', 'above 0']),
    (['--config.optimizer.eps=0.0'], ['optimizer.eps', 'above 0']),
    (['--config.optimizer.weight_decay=nan'], ['optimizer.weight_decay']),
    (['--config.masking.mask_prob=nan'], ['masking.mask_prob', 'nan']),
    (['--config.model.hidden_dropout=0.9999'], ['hidden_dropout', '0.99']),
    (['--config.model.type_vocab_size=1'], ['type_vocab_size of 2', '--config.nsp=False']),
    (
      ['--config.objective=next'],
      ["objective must be one of ('mlm', 'electra', 'distill', 'next_token')"],
    ),
    (['--config.max_eval_examples=0'], ['max_eval_examples', 'at least 1']),
    (['--config.init_from=nowhere'], ['nowhere', 'config.json']),
    (['--workdri=x'], ['workdir']),
    (['--config=bert_mni'], ['bert_mini']),
    (['--config=bert_mini:smok'], ['smoke']),
    (['extra'], ['extra']),
    (['--config.data.prepared='], ['--config.data.input=PATH']),
    (['--config.data.prepared=nowhere'], ['nowhere', 'manifest.json']),
    (['--config.data.lowercase=False'], ['prepared with data.lowercase=True', 'wants False']),
    (['--config.data.rules=google'], ['prepared with data.rules=huggingface', 'wants google']),
    (['--config.data.vocab=OTHER'], ['another vocabulary than data.vocab=', 'leave data.vocab']),
  ],
)
def test_a_mistake_gets_one_sentence_before_anything_is_written(
  flags, words, tiny_rows, tmp_path, capsys
):
  workdir, other = tmp_path / 'run', tmp_path / 'other.txt'
  other.write_text('\n'.join([*SPECIAL_TOKENS, 'a', 'b']))
  flags = [flag.replace('OTHER', str(other)) for flag in flags]
  check_refused(arguments(tiny_rows, workdir, *flags), capsys, *words)
  assert not (workdir / 'logs').exists() and not list(workdir.glob('checkpoints/*'))


def test_a_workdir_with_brackets_is_refused_before_the_text_is_prepared(
  corpus, vocab, tmp_path, capsys
):
  args = raw(corpus, vocab, tmp_path)
  check_refused([*args, f'--workdir={tmp_path}/lr=[1e-4]'], capsys, '[1e-4]', 'contains [ ]')
  assert not list(tmp_path.iterdir())


def test_a_path_that_begins_with_a_tilde_is_in_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  got = parse(
    'pretrain', ['--workdir=~/run', '--config.data.input=~/a,b~,~/c', '--config=bert_mini']
  )
  assert got['workdir'] == f'{tmp_path}/run'
  assert got['config'].data.input == f'{tmp_path}/a,b~,{tmp_path}/c'
  texts = parse('predict', ['--text=~/a is a path', '--input=~/in.txt'])
  assert (texts['text'], texts['input']) == ('~/a is a path', f'{tmp_path}/in.txt')
  args = ['--config=table', '--config.task.delimiter=~', '--config.init_from=~/m']
  config = parse('finetune', args)['config']
  assert (config.task.delimiter, config.init_from) == ('~', f'{tmp_path}/m')
  assert parse('predict', ['--delimiter=~'])['delimiter'] == '~'


def test_a_user_without_a_home_directory_needs_one_only_without_a_cache(tmp_path, monkeypatch):
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  monkeypatch.delenv('BERTJAX_CACHE', raising=False)
  assert prepare.cache_folder(str(tmp_path)) == tmp_path
  with pytest.raises(ValueError, match=r'no home directory.*data\.cache_dir'):
    prepare.cache_folder()
  with pytest.raises(ValueError, match='no home directory for ~'):
    parse('pretrain', ['--workdir=~/run'])


def raw(corpus, vocab, tmp_path, *more):
  return [
    'pretrain', '--config=bert_mini:smoke', f'--workdir={tmp_path}/run',
    f'--config.data.input={corpus}', f'--config.data.vocab={vocab}',
    f'--config.data.cache_dir={tmp_path}/cache', *more,
  ]  # fmt: skip


def test_bad_text_gets_one_sentence(corpus, vocab, tmp_path, capsys):
  empty, blank, binary, one = (tmp_path / name for name in ('empty', 'blank', 'binary', 'one'))
  for folder in (empty, blank, binary, one):
    folder.mkdir()
  (blank / 'a.txt').write_text(' \n\n ')
  (binary / 'a.txt').write_bytes(b'\0\1\2\3')
  (one / 'a.txt').write_text('One document. It has two sentences.')
  for folder, words in (
    (tmp_path / 'missing', ['missing', 'no such file']),
    (empty, ['holds no files']),
    (blank, ['has no text']),
    (binary, ['a.txt', 'binary', 'skip']),
    (one, ['one document', 'nsp=False']),
  ):
    check_refused(raw(folder, vocab, tmp_path), capsys, *words)
  assert not (tmp_path / 'run').exists() and not list((tmp_path / 'cache').glob('*'))


def test_a_bad_vocabulary_gets_one_sentence(corpus, tmp_path, capsys):
  path = tmp_path / 'vocab.txt'
  check_refused(raw(corpus, path, tmp_path), capsys, 'no vocabulary file', path)
  path.write_bytes(b'[PAD]\n\xff\xfe')
  check_refused(raw(corpus, path, tmp_path), capsys, 'not UTF-8', path)
  path.write_text('[PAD]\n[UNK]\n[CLS]\nthe\n')
  check_refused(raw(corpus, path, tmp_path), capsys, '[SEP]', '[MASK]')
  check_refused(raw(corpus, '', tmp_path), capsys, 'bertjax vocab')


def test_a_workdir_of_another_run_is_refused_and_the_fields_are_listed(finished, tiny_rows, capsys):
  before = weights(finished)
  more = ['--config.seed=7', '--config.model.num_layers=1', '--config.batch_size=16']
  check_refused(
    arguments(tiny_rows, finished, *more), capsys,
    '--config.seed: 0 there, 7 here', '--config.model.num_layers: 2 there, 1 here',
    '--config.batch_size: 8 there, 16 here',
  )  # fmt: skip
  assert weights(finished) == before


@pytest.mark.full
def test_a_kernel_and_a_remat_policy_may_change_on_resumption(finished, tiny_rows, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  more = ['--config.model.remat=dots', '--config.model.unroll=2', '--config.num_train_steps=24']
  assert main(arguments(tiny_rows, tmp_path / 'run', *more)) == 0
  info = json.loads((tmp_path / 'run' / 'run.json').read_text())
  before = json.loads((finished / 'run.json').read_text())
  assert len(info['earlier']) == len(before.get('earlier', [])) + 1
  assert info['config']['model']['remat'] == 'dots'


def test_evaluate_refuses_rows_that_are_not_the_runs(finished, tiny_rows, tmp_path, capsys):
  run = tmp_path / 'run'
  shutil.copytree(finished, run)
  info = json.loads((run / 'run.json').read_text())
  info['identity']['rows'] = 'other'
  (run / 'run.json').write_text(json.dumps(info))
  check_refused(['evaluate', f'--workdir={run}'], capsys, 'has changed')


def test_a_model_never_replaces_a_folder_of_something_else(finished, tmp_path):
  from bertjax.interop.loading import load_model, save_model

  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.txt').write_text('years')
  with pytest.raises(ValueError, match='no model directory'):
    save_model(tmp_path / 'mine', *load_model(finished / 'model'))
  assert (tmp_path / 'mine' / 'thesis.txt').read_text() == 'years'


def test_a_corrupt_shard_is_named(tiny_rows, tmp_path, capsys):
  rows = tmp_path / 'rows'
  shutil.copytree(tiny_rows, rows)
  path = rows / 'train' / '00000.input_ids.bin'
  data = bytearray(path.read_bytes())
  data[99] ^= 1
  path.write_bytes(data)
  check_refused(arguments(rows, tmp_path / 'run'), capsys, path, 'checksum')


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 8 MB."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(folder)], capture_output=True, text=True
  )
  if mounted.returncode:
    pytest.skip(f'may not mount a small disk: {mounted.stderr.strip()}')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.full
def test_a_disk_that_fills_loses_no_checkpoint(tiny_rows, small_disk):
  run = small_disk / 'run'
  args = arguments(tiny_rows, run, '--config.num_train_steps=300', *QUIET)
  process = start(args)
  wait_for_step(process, run, 25)
  until((run / 'checkpoints' / '20').exists, 'checkpoint 20')  # its files are complete
  filler = small_disk / 'filler'
  with contextlib.suppress(OSError), filler.open('wb', buffering=0) as file:
    while True:
      file.write(bytes(4096))
  errors = finish(process, code=2)
  assert 'Traceback' not in errors
  (line,) = [line for line in errors.splitlines() if line.startswith('bertjax pretrain:')]
  assert re.search('No space left|MB are free', line)
  filler.unlink()
  errors = finish(start([*args, '--config.num_train_steps=42']))
  assert re.search('resuming from step (20|40) ', errors)
  assert sorted(losses(run))[-1] == 42


def test_an_unknown_verb_names_the_nearest(capsys):
  assert main(['pretran']) == 2
  assert "'pretrain'" in capsys.readouterr().err


def test_flags_reach_the_config():
  got = parse('pretrain', ['--config=bert_mini', '--config.model.num_layers=3', '--noconfig.nsp'])
  assert got['config'].model.num_layers == 3 and got['config'].nsp is False


@pytest.mark.parametrize(
  ('verb', 'advice'),
  [('pretrain', '--config.gradient_accumulation_steps=2'),
   ('finetune', '--config.model.remat=full'),
   ('evaluate', '--config.batch_size'), ('predict', '--batch_size'), ('explain', 'smaller')],
)  # fmt: skip
def test_out_of_memory_is_one_sentence_with_what_to_change(verb, advice, monkeypatch, capsys):
  program = importlib.import_module(f'bertjax.{verb}')

  def allocate(**_):
    jax.jit(lambda: jax.numpy.ones((1 << 30, 1 << 14)) + 1)().block_until_ready()

  monkeypatch.setattr(program, 'run', allocate)
  check_refused([verb], capsys, f'bertjax {verb}: out of memory', advice)
  monkeypatch.setattr(program, 'run', lambda **_: np.ones(1 << 60, np.int8))
  check_refused([verb], capsys, f'bertjax {verb}: out of memory', advice)
  with pytest.raises(RuntimeError, match='INVALID'):
    monkeypatch.setattr(program, 'run', lambda **_: raise_jax('INVALID_ARGUMENT: a bug'))
    main([verb])


def raise_jax(message):
  raise jax.errors.JaxRuntimeError(message)


def test_a_traceback_means_a_bug(monkeypatch):
  def broken(**_):
    {}['a bug']

  monkeypatch.setattr(pretrain, 'run', broken)
  with pytest.raises(KeyError):
    main(['pretrain', '--workdir=x'])


BOOKS = [
  '--config=bert_mini', '--config.log_every=1', '--config.save_every=20', '--config.eval_every=0',
  '--config.max_eval_examples=256', '--config.warmup_steps=20',
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.data
def test_the_mini_recipe_on_books_killed_and_resumed_is_bitwise_the_same(data_dir, tmp_path):
  """The complete recipe on 131 books; about 20 minutes on two cores; smaller versions are above."""
  vocab = tmp_path / 'vocab.txt'
  assert main(['vocab', f'--input={data_dir}/books', '--size=8192', f'--out={vocab}']) == 0
  common = [
    'pretrain', *BOOKS, '--config.num_train_steps=120', f'--config.data.input={data_dir}/books',
    f'--config.data.vocab={vocab}', f'--config.data.cache_dir={tmp_path}/cache',
  ]  # fmt: skip
  finish(start([*common, f'--workdir={tmp_path}/whole']))
  for kill, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
    run = tmp_path / kill.name
    process = start([*common, f'--workdir={run}'])
    wait_for_step(process, run, random.randint(21, 100))
    process.send_signal(kill)
    finish(process, code)
    finish(start([*common, f'--workdir={run}']))
    assert losses(run) == losses(tmp_path / 'whole')
    assert weights(run) == weights(tmp_path / 'whole')
  values = [loss for _, (loss, _) in sorted(losses(tmp_path / 'whole').items())]
  assert np.mean(values[-10:]) < np.mean(values[:10]) - 1
