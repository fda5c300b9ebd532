"""Ways to fine-tune: trials, length buckets, frozen and slower layers, early stop, own data."""

import dataclasses
import functools
import json
import logging
import re

import jax
import numpy as np
import pytest

from bertjax import build, evaluate, finetune
from bertjax.__main__ import main
from bertjax.config import load_recipe
from bertjax.data import loader
from bertjax.interop import loading
from bertjax.model.heads import init_params
from bertjax.training import layout as layout_lib
from bertjax.training import loop
from bertjax.training.metrics import read_metrics
from tests.e2e import test_distributed
from tests.test_finetune import TAGS, make, model, sentences  # noqa: F401 (fixtures)


def write_table(folder):
  """Reviews as JSONL, with one label and with several."""
  for split, count in (('train', 80), ('dev', 30)):
    lines = [
      json.dumps({'body': text, 'mood': ('good', 'bad')[label],
                  'words': sorted({w for w in text.split() if w in TAGS})})
      for text, label in sentences(count, count)
    ]  # fmt: skip
    (folder / f'{split}.jsonl').write_text('\n'.join(lines) + '\n')


@pytest.fixture
def own(model, tmp_path):  # noqa: F811
  """A short run on one's own data."""
  write_table(tmp_path)
  config = load_recipe('table')
  config.init_from, config.data.source = str(model), str(tmp_path)
  config.data.train_file, config.data.dev_file = 'train.jsonl', 'dev.jsonl'
  config.task.text, config.task.label = 'body', 'mood'
  config.data.length, config.data.loader, config.data.buckets = 32, 'threads', '12,20'
  config.batch_size, config.num_train_epochs, config.learning_rate, config.log_every = (
    8,
    3.0,
    2e-3,
    1,
  )
  return config


@pytest.mark.slow  # smaller version: the steps of trials, below
def test_trials_equal_single_runs(own, tmp_path):
  own.num_seeds, own.learning_rates, own.num_train_epochs, own.data.buckets = (
    2,
    '2e-3,1e-3',
    2.0,
    '',
  )
  scores = finetune.run(own, workdir=str(tmp_path / 'trials'))
  table = json.loads((tmp_path / 'trials' / 'trials.json').read_text())
  assert [(t['seed'], t['learning_rate']) for t in table['trials']] == [
    (0, 2e-3), (1, 2e-3), (0, 1e-3), (1, 1e-3)
  ]  # fmt: skip
  best = max(table['trials'], key=lambda t: t['best'])
  assert scores['accuracy'] == pytest.approx(best['best'])
  assert table['learning_rates']['0.002']['mean'] == pytest.approx(
    np.mean([t['best'] for t in table['trials'][:2]])
  )
  own.seed, own.num_seeds, own.learning_rate, own.learning_rates = 1, 1, 1e-3, ''
  single = tmp_path / 'single'
  finetune.run(own, workdir=str(single))
  found = [r['accuracy'] for r in read_metrics(single) if r['kind'] == 'eval']
  np.testing.assert_allclose(found, table['trials'][3]['values'], atol=0.04)
  page = (tmp_path / 'trials' / 'report.html').read_text()
  assert 'deviation' in page and page.count('<svg') == 6 and '<th>seed 1</th>' in page


def test_steps_of_trials_equal_steps_of_single_runs(own):
  own.num_seeds, own.learning_rates, own.data.buckets, own.data.packed_length = (
    5,
    '2e-3,1e-3,5e-4',
    '',
    0,
  )
  own.model.hidden_dropout = 0.1  # drawn by shape: a trial's own bucket might be shorter
  many = losses_of(own, 4)
  assert many.shape == (4, 15)
  own.seed, own.num_seeds, own.learning_rate, own.learning_rates = 3, 1, 1e-3, ''
  np.testing.assert_allclose(losses_of(own, 4), many[:, 8], rtol=2e-4)
  assert len(set(many[0].tolist())) == 5 and len(set(many[3].tolist())) == 15


def losses_of(config, steps):
  """The losses of the first steps [steps] or [steps, K], at a constant learning rate."""
  config.schedule, config.warmup_ratio = 'constant', 0.0
  setup = finetune.set_up(config)
  state, shardings, _ = layout_lib.restore_or_init(
    setup.objective, setup.optimizer, setup.layout, load=functools.partial(finetune.load, setup)
  )
  step = setup.layout.train_step(setup.objective, setup.optimizer, shardings)
  found = []
  for number in range(steps):
    state, metrics = step(state, setup.batches.training(number))
    found.append(np.asarray(metrics['loss']))
  return np.stack(found)


def test_buckets_change_no_loss_and_compile_few_programs(own):
  own.data.packed_length = 0
  short = losses_of(own, 6)
  own.data.buckets = ''
  np.testing.assert_allclose(short, losses_of(own, 6), rtol=1e-5)
  own.data.buckets = '12,20'
  batches = finetune.set_up(own).batches
  lengths = {batches.training(step)['input_ids'].shape[1] for step in range(20)}
  assert lengths <= {12, 20, 32} and 32 not in lengths and len(lengths) > 1
  for step, batch in enumerate(loader.iterate(batches.training, 0, 20, loader='tfdata')):
    jax.tree.map(np.testing.assert_array_equal, batch, batches.training(step))
  seen = np.concatenate([batches.in_order(s)['example_ids'] for s in range(batches.steps)])
  weights = np.concatenate([batches.in_order(s)['example_weights'] for s in range(batches.steps)])
  assert sorted(seen[weights > 0]) == list(range(80))


def make_sums(objective):
  """Returns (params, batch) -> the loss, weight and gradient of a task."""

  @jax.jit
  def sums(params, batch):
    loss = lambda params: objective.loss(params, batch, None)[0]['task']  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(params)
    return {'loss': value, 'weight': objective.weights(batch)['task'], 'gradient': gradient}

  return sums


@pytest.mark.parametrize(
  ('task', 'recipe', 'changes'),
  [
    ('sst2', 'glue', {'class_weights': '1.0,3.0'}),
    ('stsb', 'glue', {}),
    ('squad1', 'squad', {'data.packed_length': 128}),
    ('conll2003', 'tagging', {}),
    ('codah', 'choice', {'data.length': 24}),
    ('own', 'table', {'task.label': 'words', 'task.kind': 'multilabel'}),
  ],
)
def test_packed_examples_have_the_losses_and_gradients_of_single_ones(
  task, recipe, changes, make, model, own  # noqa: F811
):  # fmt: skip
  config = own if task == 'own' else make(task, recipe)
  config.update_from_flattened_dict({'batch_size': 32, 'data.packed_length': 96} | changes)
  packed = finetune.set_up(config)
  config.data.packed_length = 0
  single = finetune.set_up(config)
  params = finetune.load(single, lambda: init_params(single.model, jax.random.key(0)))
  sums = make_sums(single.objective)
  for step in range(2):
    batch, other = packed.batches.training(step), single.batches.training(step)
    used = batch['example_ids'][batch['example_weights'] > 0]
    assert sorted(used) == sorted(other['example_ids'])
    assert len(batch['input_ids']) < 0.8 * len(other['input_ids'])
    one, two = sums(params, batch), sums(params, other)
    floor = 1e-5 * max(np.abs(x).max() for x in jax.tree.leaves(two['gradient']))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=floor)


def test_a_packed_run_learns_on_many_devices(make, tmp_path):  # noqa: F811
  config = make('sst2')
  config.data.packed_length, config.batch_size, config.eval_every = 64, 32, 20
  assert finetune.run(config, workdir=str(tmp_path / 'run'))['accuracy'] > 0.9


def test_processes_share_packed_rows(own):
  own.batch_size, own.data.packed_length = 16, 64
  setup = finetune.set_up(own)
  whole = dataclasses.replace(setup.batches, local=None, replicas=2)
  halves = [dataclasses.replace(whole, local=local) for local in np.split(np.arange(16), 2)]
  for step in range(3):
    parts = [half.training(step) for half in halves]
    for name, array in whole.training(step).items():
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'data.packed_length': 20}, '0 or from 32, the longest example, to 128'),
    ({'data.packed_length': 256}, 'to 128, the positions'),
    ({'data.packed_length': 64, 'model.bilstm': 1}, 'bilstm reads a row as one example'),
  ],
)
def test_what_cannot_be_packed_is_refused(own, changes, words):
  own.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=words):
    finetune.set_up(own)


def test_only_top_layers_are_trained_and_reinitialised(own, model, tmp_path):  # noqa: F811
  own.num_trainable_layers, own.reinit_top_layers, own.num_train_epochs = 1, 1, 1.0
  finetune.run(own, workdir=str(tmp_path / 'run'))
  _, before = loading.load_weights(model)
  _, after = loading.load_weights(tmp_path / 'run' / 'model')
  for kind in ('attention', 'mlp'):
    for name in before['encoder']['layers'][kind]:
      old, new = (p['encoder']['layers'][kind][name]['kernel'] for p in (before, after))
      np.testing.assert_array_equal(old[0], new[0])
      assert not np.allclose(old[1], new[1], atol=0.02)
  np.testing.assert_array_equal(
    *(p['encoder']['embeddings']['word']['embedding'] for p in (before, after))
  )


def test_a_run_ends_when_it_gets_no_better(own, tmp_path):
  own.patience, own.learning_rate, own.num_train_epochs = 2, 1e-30, 10.0
  finetune.run(own, workdir=str(tmp_path / 'run'))
  steps = [r['step'] for r in read_metrics(tmp_path / 'run') if r['kind'] == 'eval']
  assert steps == [10, 20, 30]
  page = (tmp_path / 'run' / 'report.html').read_text()
  assert '<h1>run</h1>' in page and 'dev.jsonl' in page
  assert re.search('<td>training labels</td><td>(good|bad) [0-9]+, (good|bad) [0-9]+</td>', page)
  assert 'Data and hyperparameters' in page and f'jax {jax.__version__}' in page
  finetune.run(own, workdir=str(tmp_path / 'run'))  # has ended: only its files are written again
  again = [r['step'] for r in read_metrics(tmp_path / 'run') if r['kind'] == 'eval']
  assert again == steps


def test_a_frozen_encoder_feeds_a_bilstm_that_reads_the_document(make, model, tmp_path):  # noqa: F811
  config = make('conll2003', 'tagging')
  config.task.context, config.num_train_epochs, config.head_lr_multiplier = (
    True,
    10.0,
    5.0,
  )
  config.num_trainable_layers, config.model.features = 0, 'weighted_sum'
  config.model.bilstm, config.model.bilstm_size, config.data.buckets = 1, 16, ''
  scores = finetune.run(config, workdir=str(tmp_path / 'run'))
  assert scores['f1'] > 0.7
  before, after = (loading.load_model(d)[1] for d in (model, tmp_path / 'run' / 'model'))
  jax.tree.map(np.testing.assert_array_equal, before['encoder'], after['encoder'])


def test_the_order_of_sentences_of_a_book_is_a_task(model, data_dir, tmp_path):  # noqa: F811
  books = sorted((data_dir / 'books').glob('*.md'))[:2]
  config = load_recipe('table:sentence_order')
  config.init_from, config.batch_size, config.num_train_epochs = str(model), 32, 1.0
  config.data.train_file, config.data.dev_file = map(str, books)
  config.data.length, config.data.max_train_examples = 64, 300
  scores = finetune.run(config, workdir=str(tmp_path / 'run'))
  lines = (tmp_path / 'run' / 'predictions' / 'dev.tsv').read_text().splitlines()[1:]
  golds = [item.label for item in build.make_task(config).read('dev')]
  right = np.array([line.split('\t')[1] == 'swapped' for line in lines]) == np.array(golds, bool)
  assert scores['accuracy'] == pytest.approx(right.mean()) and 0.4 < np.mean(golds) < 0.6


def test_balanced_weights_and_their_mistakes(own):
  task = build.make_task(own)
  column = np.array([0, 0, 0, 1])
  assert task.label.parse_class_weights('balanced', column) == pytest.approx((4 / 6, 2.0))
  with pytest.raises(ValueError, match=r"'balanced' or 2 numbers, of bad, good; got '1\.0'"):
    task.label.parse_class_weights('1.0', column)


def test_several_labels_are_learnt_and_evaluated_by_the_command(own, tmp_path, capsys):
  own.task.label, own.task.kind = 'words', 'multilabel'
  own.num_train_epochs, own.learning_rate, own.data.buckets = 8.0, 1.5e-3, ''
  scores = finetune.run(own, workdir=str(tmp_path / 'run'))
  assert scores['micro_f1'] > 0.85
  capsys.readouterr()
  assert main(['evaluate', f'--workdir={tmp_path}/run']) == 0
  told = json.loads(capsys.readouterr().out)
  assert told == pytest.approx(scores, abs=1e-6)
  assert main(['evaluate', f'--workdir={tmp_path}/run', '--split=tset']) == 2
  assert "no split 'tset'" in capsys.readouterr().err


def test_tags_are_chosen_by_a_crf(make, tmp_path):  # noqa: F811
  config = make('conll2003', 'tagging')
  config.model.crf, config.num_train_epochs = True, 10.0
  scores = finetune.run(config, workdir=str(tmp_path / 'run'))
  assert scores['f1'] > 0.8
  again = evaluate.evaluate_task(config, str(tmp_path / 'run' / 'model'))
  assert again['f1'] == pytest.approx(scores['f1'])


def test_trials_that_predict_no_entity_say_so_and_have_failed(make, tmp_path, caplog):  # noqa: F811
  config = make('conll2003', 'tagging')
  config.num_seeds, config.num_train_epochs = 2, 2.0
  config.class_weights = ','.join(['1', *'00000000'])  # only O is learnt
  with caplog.at_level(logging.INFO):
    scores = finetune.run(config, workdir=str(tmp_path / 'run'))
  assert scores['f1'] == 0.0
  trials = json.loads((tmp_path / 'run' / 'trials.json').read_text())['trials']
  assert [trial['failed'] for trial in trials] == [True, True]
  for seed in (0, 1):
    which = f'(trial {seed}, seed {seed})'
    assert f'dev: no entity is predicted in 20 sentences {which}' in caplog.text
  advice = [r.getMessage() for r in caplog.records if 'head_lr_multiplier' in r.getMessage()]
  assert len(advice) == 1 and advice[0].startswith('dev: no entity is predicted in 20 sentences')


def test_resumed_trials_equal_uninterrupted_ones(own, tmp_path, monkeypatch):
  own.num_seeds, own.num_train_epochs, own.data.buckets = 2, 2.0, ''
  finetune.run(own, workdir=str(tmp_path / 'whole'))
  real = loop.fit

  def cut(state, *args, steps, **kwargs):
    real(state, *args, steps=10, **kwargs)
    raise KeyboardInterrupt

  monkeypatch.setattr(loop, 'fit', cut)
  with pytest.raises(KeyboardInterrupt):
    finetune.run(own, workdir=str(tmp_path / 'cut'))
  monkeypatch.setattr(loop, 'fit', real)
  finetune.run(own, workdir=str(tmp_path / 'cut'))
  for name in ('trials.json', 'metrics.json'):
    one, two = (json.loads((tmp_path / d / name).read_text()) for d in ('whole', 'cut'))
    assert one == two


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'task.stride': 9}, 'table has no option task.stride; its options are task.text, task.pair'),
    ({'task.text': ''}, 'table needs --config.task.text'),
    ({'data.train_file': '', 'data.source': '', 'data.dev_file': ''}, 'table needs its data'),
    ({'data.buckets': '12,x'}, "data.buckets are written '32,64'"),
    ({'learning_rates': '1e-3;2e-3'}, "learning_rates are written '2e-5,3e-5'"),
    ({'num_seeds': 0}, 'num_seeds must be at least 1'),
    (
      {'num_trainable_layers': 3},
      r'num_trainable_layers must be in -1\.\.2, the layers of .*, got 3',
    ),
    ({'layerwise_lr_decay': 0.0}, 'layerwise_lr_decay must be above 0'),
    ({'model.crf': True}, 'crf=True is for tags'),
  ],
)
def test_a_mistake_gets_one_sentence(own, tmp_path, changes, message):
  own.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    finetune.run(own, workdir=str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow  # smaller version: pre-training by two processes, in test_distributed.py
def test_two_processes_fine_tune_as_one_does(own, tmp_path):
  own.num_train_epochs = 1.0
  finetune.run(own, workdir=str(tmp_path / 'one'))
  flags = [
    f'--config.{name}={value}'
    for name, value in {
      'init_from': own.init_from, 'data.source': own.data.source, 'data.train_file': 'train.jsonl',
      'data.dev_file': 'dev.jsonl', 'task.text': 'body', 'task.label': 'mood',
      'data.length': 32, 'data.loader': 'threads',
      'data.buckets': '12,20', 'batch_size': 8, 'num_train_epochs': 1.0, 'learning_rate': 2e-3,
      'log_every': 1,
    }.items()
  ]  # fmt: skip
  test_distributed.command(['finetune', '--config=table', *flags, f'--workdir={tmp_path}/two'])
  one, two = ([r for r in read_metrics(tmp_path / d) if 'loss' in r] for d in ('one', 'two'))
  assert [r['loss'] for r in two] == pytest.approx([r['loss'] for r in one], rel=1e-4)
  assert (tmp_path / 'two' / 'predictions').exists() and (tmp_path / 'two' / 'model').exists()
  out = tmp_path / 'out'
  words = ['evaluate', f'--workdir={tmp_path}/two', f'--out={out}', '--split=dev']
  found = json.loads(test_distributed.command(words))
  wanted = json.loads((tmp_path / 'two' / 'metrics.json').read_text())
  assert found == pytest.approx({name: wanted[name] for name in found}, abs=1e-5)
  names = [sorted(path.name for path in d.iterdir()) for d in (out, tmp_path / 'two/predictions')]
  assert names[0] == names[1]
