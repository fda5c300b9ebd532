"""Fine-tuning: a tiny model learns small tasks in official layouts, resumes, and leaves files."""

import functools
import json
import pathlib
import random

import jax
import numpy as np
import pytest

from bertjax import evaluate, finetune, prepare
from bertjax.__main__ import main
from bertjax.config import load_recipe
from bertjax.data.loader import TaskBatches
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import loading
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.objectives.labels import Choice
from bertjax.training.metrics import RunLog, read_metrics
from tests.test_scoring import evaluate_squad

TAGS = {'value': 'I-PER', 'object': 'I-LOC', 'error': 'I-ORG', 'raises': 'I-MISC'}
GOOD, BAD = ('value', 'object', 'returns'), ('error', 'raises', 'exception')


@pytest.fixture(scope='module')
def model(tmp_path_factory, vocab) -> pathlib.Path:
  """A tiny random model with both heads of pre-training."""
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=2, mlp_size=64,
    max_positions=128, initializer_range=0.1, hidden_dropout=0.0, attention_dropout=0.0,
  )  # fmt: skip
  path = tmp_path_factory.mktemp('model') / 'model'
  bert = Bert(config)
  params = jax.device_get(jax.jit(init_params, static_argnums=0)(bert, jax.random.key(0)))
  loading.save_model(path, bert, params, tokenizer)
  return path


def sentences(count, seed):
  """(text, 0 or 1): which of two kinds of words it holds."""
  rng = random.Random(seed)
  for _ in range(count):
    label = rng.randrange(2)
    words = [rng.choice((GOOD, BAD)[label]) for _ in range(2)] + ['the', 'of', 'in', 'a']
    rng.shuffle(words)
    yield ' '.join(words), label


def write_sst2(folder):
  for split, count in (('train', 120), ('dev', 40)):
    rows = '\n'.join(f'{text}\t{label}' for text, label in sentences(count, count))
    (folder / f'{split}.tsv').write_text(f'sentence\tlabel\n{rows}\n')
  rows = '\n'.join(f'{i}\t{text}' for i, (text, _) in enumerate(sentences(10, 3)))
  (folder / 'test.tsv').write_text(f'index\tsentence\n{rows}\n')


def write_stsb(folder):
  head = '\t'.join(['index', 'genre', 'filename', 'year', 'old_index', 'source1', 'source2',
                    'sentence1', 'sentence2', 'score'])  # fmt: skip
  for split, count in (('train', 120), ('dev', 40)):
    rows = [f'{i}\tg\tf\ty\to\ts\ts\t{text}\tthe of\t{5.0 * label}'
            for i, (text, label) in enumerate(sentences(count, count))]  # fmt: skip
    (folder / f'{split}.tsv').write_text('\n'.join([head, *rows, '']))


def write_conll2003(folder):
  for split, count in (('eng.train', 60), ('eng.testa', 20)):
    rows = []
    for text, _ in sentences(count, count):
      rows += [f'{word} X Y {TAGS.get(word, "O")}' for word in text.split()] + ['']
    (folder / split).write_text('\n'.join(rows))


def write_squad1(folder, version='1.1'):
  for split, count in (('train', 60), ('dev', 20)):
    questions = []
    for i, (text, label) in enumerate(sentences(count, count)):
      answer = next(w for w in text.split() if w in (*GOOD, *BAD))
      start = text.index(answer)
      item = {'id': f'{split}{i}', 'question': 'the ?',
              'answers': [{'text': answer, 'answer_start': start}]}  # fmt: skip
      if version == '2.0' and not label:  # only bad words are asked for
        item |= {'answers': [], 'is_impossible': True}
      questions.append({'context': text, 'qas': [item]})
    content = {'version': version, 'data': [{'title': 't', 'paragraphs': questions}]}
    (folder / f'{split}-v{version}.json').write_text(json.dumps(content))


write_squad2 = functools.partial(write_squad1, version='2.0')


def write_codah(folder):
  rng = random.Random(0)
  for split, count in (('train', 60), ('dev', 20), ('test', 4)):
    rows = []
    for text, _ in sentences(count, count):
      right = rng.randrange(4)
      ends = [rng.choice(GOOD if i == right else BAD) for i in range(4)]
      rows.append('\t'.join(['o', text.replace('\t', ' '), *ends, str(right)]))
    (folder / f'{split}.tsv').write_text('\n'.join(rows) + '\n')


@pytest.fixture
def make(model, tmp_path):
  """make(task) -> (config of a short run on it, with its data written)."""

  def make(task, recipe='glue'):
    source = tmp_path / task
    source.mkdir()
    globals()[f'write_{task}'](source)
    config = load_recipe(f'{recipe}:{task}')
    config.init_from, config.data.source = str(model), str(source)
    config.data.length = 96 if recipe == 'squad' else 32
    config.data.loader = 'threads'
    config.batch_size, config.num_train_epochs, config.learning_rate = 8, 6.0, 2e-3
    config.log_every = 1
    return config

  return make


@pytest.mark.e2e
@pytest.mark.stack
def test_a_sentence_task_is_learnt_scored_written_and_saved(make, tmp_path, caplog):
  scores = finetune.run(make('sst2'), workdir=str(tmp_path / 'run'))
  assert scores['accuracy'] > 0.9
  assert json.loads((tmp_path / 'run' / 'metrics.json').read_text()) == scores
  _, params, _ = loading.load_model(tmp_path / 'run' / 'model')
  assert set(params) == {'encoder', 'pooler', 'classification'}
  assert loading.read_labels(tmp_path / 'run' / 'model')[0] == ['0', '1']
  test = (tmp_path / 'run' / 'predictions' / 'SST-2.tsv').read_text().splitlines()
  assert test[0] == 'index\tprediction' and len(test) == 11
  found = [line.split('\t')[1] for line in test[1:]]
  wanted = [str(label) for _, label in sentences(10, 3)]
  assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 9
  flags = [f'--workdir={tmp_path}/run', '--split=test', f'--out={tmp_path}/again']
  assert main(['evaluate', *flags]) == 0  # no labels, so only predictions
  assert 'replaced' not in caplog.text
  assert main(['evaluate', *flags]) == 0
  assert f'replaced existing files: {tmp_path}/again/SST-2.tsv' in caplog.text
  assert (tmp_path / 'again' / 'SST-2.tsv').read_text().splitlines() == test
  config = load_recipe('table')
  config.data.source, config.task.text = str(tmp_path / 'sst2'), 'sentence'
  config.data.train_file, config.data.dev_file = 'train.tsv', 'dev.tsv'
  trained = str(tmp_path / 'run' / 'model')
  for labels, message in (('1|0', r"are \['0', '1'\], those of table \['1', '0'\]; they must be"),
                          ('0|1|2', r"predicts 2 labels \['0', '1'\], table has 3")):  # fmt: skip
    config.task.labels = labels
    with pytest.raises(ValueError, match=message):
      evaluate.evaluate_task(config, trained)
    config.init_from, config.reinit_head = trained, False
    with pytest.raises(ValueError, match=message):
      finetune.set_up(config)


@pytest.mark.full
def test_the_last_step_or_any_other_becomes_the_model(make, tmp_path):
  config, run = make('sst2'), tmp_path / 'run'
  config.num_train_epochs, config.max_to_keep, config.save_model, config.data.test = (
    2.0,
    5,
    'last',
    '',
  )
  finetune.run(config, workdir=str(run))
  _, last = loading.load_weights(run / 'model')
  folders = [loading.find_checkpoint(run, step) for step in (15, 30)]
  for folder, same in zip(folders, (False, True), strict=True):
    _, params, tokenizer = loading.load_model(folder)
    arrays = zip(jax.tree.leaves(params), jax.tree.leaves(last), strict=True)
    assert all(np.array_equal(a, b) for a, b in arrays) == same
    assert loading.read_labels(folder) == (['0', '1'], 'single_label_classification')
    assert tokenizer.fingerprint == loading.load_tokenizer(run).fingerprint
  with pytest.raises(ValueError, match=r'no checkpoint of step 7; those kept are \[15, 30\]'):
    loading.find_checkpoint(run, 7)
  (run / 'model').rename(tmp_path / 'model')  # a run that has not ended is read as its newest step
  config.init_from, config.reinit_head = str(run), False
  config.num_train_epochs, config.learning_rate = 0.1, 1e-9
  finetune.run(config, workdir=str(tmp_path / 'second'))
  near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-7)
  jax.tree.map(near, loading.load_weights(tmp_path / 'second')[1], last)
  config.save_model = 'first'
  with pytest.raises(
    ValueError, match=r"save_model must be one of \('last', 'best'\), got 'first'"
  ):
    finetune.set_up(config)


def test_the_tuned_threshold_of_a_run_is_that_of_its_model(tmp_path):
  (tmp_path / 'run' / 'model').mkdir(parents=True)
  for name in ('run.json', 'model/config.json'):
    (tmp_path / 'run' / name).write_text('{}')
  (tmp_path / 'run' / 'metrics.json').write_text('{"best_f1_threshold": 1.5}')
  (tmp_path / 'metrics.json').write_text('{"best_f1_threshold": 7}')
  assert evaluate.tuned_threshold(tmp_path / 'run') == 1.5
  assert evaluate.tuned_threshold(tmp_path / 'run' / 'model') == 1.5


@pytest.mark.full
def test_other_splits_are_answered_with_the_threshold_tuned_on_dev(make, tmp_path):
  config = make('squad2', 'squad')
  config.num_train_epochs, config.data.test = 10.0, 'test'
  config.data.test_file = 'dev-v2.0.json'  # the same questions, as if they had no labels
  scores = finetune.run(config, workdir=str(tmp_path / 'run'))
  assert scores['best_f1'] > 0.6 and scores['best_f1_threshold'] != 0
  files = [
    tmp_path / 'run' / 'predictions' / split / 'predictions.json' for split in ('dev', 'test')
  ]
  assert files[0].read_text() == files[1].read_text()
  again = evaluate.evaluate_task(
    config, str(tmp_path / 'run' / 'model'), 'test', str(tmp_path / 'again')
  )
  assert (tmp_path / 'again' / 'test' / 'predictions.json').read_text() == files[1].read_text()
  assert again['f1'] == pytest.approx(scores['best_f1'])  # at the threshold of dev
  content = json.loads((tmp_path / 'squad2' / 'dev-v2.0.json').read_text())
  official = evaluate_squad(content, json.loads(files[0].read_text()), True)
  assert {name: scores[name] for name in official} == pytest.approx(official)
  logged = [r for r in read_metrics(tmp_path / 'run') if r['kind'] == 'eval']
  assert [r['f1'] for r in logged] == pytest.approx([r['best_f1'] for r in logged])


@pytest.mark.full
@pytest.mark.parametrize(
  ('task', 'recipe', 'metric', 'least'),
  [
    ('stsb', 'glue', 'spearman', 0.7),
    ('conll2003', 'tagging', 'f1', 0.8),
    ('squad1', 'squad', 'f1', 0.6),
    ('codah', 'choice', 'accuracy', 0.6),
  ],
)
def test_every_kind_of_task_is_learnt(make, tmp_path, task, recipe, metric, least):
  config = make(task, recipe)
  config.num_train_epochs = 10.0
  scores = finetune.run(config, workdir=str(tmp_path / 'run'))
  assert scores[metric] > least, scores
  assert list((tmp_path / 'run' / 'predictions').iterdir())
  assert (tmp_path / 'run' / 'model' / 'model.safetensors').exists()


@pytest.mark.full
def test_prepared_rows_train_as_raw_ones_do(make, tmp_path):
  config = make('sst2')
  config.num_train_epochs, config.data.max_train_examples = 1.0, 50
  finetune.run(config, workdir=str(tmp_path / 'raw'))
  manifest = prepare.run(config, out=str(tmp_path / 'rows'))
  assert manifest['counts']['train_rows'] == 50
  config.data.prepared = str(tmp_path / 'rows')
  finetune.run(config, workdir=str(tmp_path / 'prepared'))
  assert logged(tmp_path / 'prepared') == logged(tmp_path / 'raw')
  config.data.length = 48
  with pytest.raises(
    ValueError, match=r'was prepared with length=32, this run has length=48; prepare'
  ):
    finetune.run(config, workdir=str(tmp_path / 'other'))


def logged(workdir):
  return {r['step']: r['loss'] for r in read_metrics(workdir) if r['kind'] == 'train'}


@pytest.mark.full
def test_a_killed_run_resumes_bitwise(make, tmp_path, monkeypatch):
  config = make('sst2')
  config.save_every, config.num_train_epochs = 4, 2.0
  finetune.run(config, workdir=str(tmp_path / 'whole'))
  train = RunLog.train

  def killed(self, now, *rest):
    if now == 21:
      raise KeyboardInterrupt
    train(self, now, *rest)

  monkeypatch.setattr(RunLog, 'train', killed)
  with pytest.raises(KeyboardInterrupt):
    finetune.run(config, workdir=str(tmp_path / 'cut'))
  monkeypatch.setattr(RunLog, 'train', train)
  config.data.packed_length = 0  # other rows would draw other dropout
  with pytest.raises(ValueError, match=r'another config \(data.packed_length: -1 there, 0 here\)'):
    finetune.run(config, workdir=str(tmp_path / 'cut'))
  config.data.packed_length = -1
  finetune.run(config, workdir=str(tmp_path / 'cut'))
  assert logged(tmp_path / 'cut') == logged(tmp_path / 'whole')
  one, two = ((tmp_path / n / 'model' / 'model.safetensors').read_bytes() for n in ('cut', 'whole'))
  assert one == two


@pytest.mark.full
def test_an_intermediate_task_gives_its_encoder_or_its_head_too(make, tmp_path):
  config = make('sst2')
  finetune.run(config, workdir=str(tmp_path / 'first'))
  config.init_from, config.num_train_epochs = str(tmp_path / 'first' / 'model'), 1.0
  config.learning_rate = 1e-30  # changes nothing
  config.warmup_ratio = 0.0
  kept = dict(config.items())
  fresh = finetune.run(config, workdir=str(tmp_path / 'fresh'))
  config.reinit_head = False
  same = finetune.run(config, workdir=str(tmp_path / 'same'))
  assert kept['task'].name == 'sst2' and same['accuracy'] > 0.9 and same['loss'] < fresh['loss']


@pytest.mark.full
def test_google_s_files_start_the_same_run_as_hugging_face_s(make, model, tmp_path):
  config = make('sst2')
  config.num_train_epochs = 0.2
  config.data.test = ''
  finetune.run(config, workdir=str(tmp_path / 'hf'))
  loading.save_model(tmp_path / 'google', *loading.load_model(model), format='google')
  config.init_from = str(tmp_path / 'google')
  finetune.run(config, workdir=str(tmp_path / 'run'))
  assert logged(tmp_path / 'run') == logged(tmp_path / 'hf')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'task.name': 'sst3'}, "unknown task 'sst3'; known are cola"),
    ({'data.source': ''}, 'sst2 needs its data'),
    ({'init_from': ''}, '--config.init_from=MODEL'),
    ({'data.length': 256}, 'data.length=256 is longer than the 128 positions'),
    ({'data.dev': 'dve'}, "no split 'dve'"),
    (
      {'task.stride': 9},
      'sst2 has no option task.stride; its options are none; '
      'task.stride is an option of squad1, squad2.',
    ),
    ({'task.name': 'squad1', 'task.context': True}, 'squad1 has no option task.context; .*stride'),
    ({'data.dev': 'test'}, 'need labels, example 0 has none'),
    ({'data.train': 'test'}, 'need labels, example 0 has none'),
    ({'data.max_train_examples': -5}, 'data.max_train_examples must be at least 0, got -5'),
    ({'data.length': -1}, 'data.length must be at least 4, .*, got -1'),
    ({'data.packed_length': -2}, 'data.packed_length=-2 must be -1, 0 or from 32'),
    ({'seed': -1}, r'seed must be at least 0 and below 2\*\*63, got -1'),
    ({'num_seeds': 2**31}, r'num_seeds must be below 2\*\*31, got 2147483648'),
    ({'reinit_top_layers': -1}, r'reinit_top_layers must be in 0\.\.2, the layers of .*, got -1'),
    (
      {'num_trainable_layers': 3},
      r'num_trainable_layers must be in -1\.\.2, the layers of .*, got 3',
    ),
    ({'model.bilstm': -1}, 'bilstm must be 0 .* or a number of layers, got -1'),
    ({'model.bilstm_size': -1}, 'bilstm_size must be at least 1, got -1'),
    ({'model.unroll': -1}, 'unroll must be at least 0, got -1'),
    ({'mesh.fsdp': 0}, 'mesh sizes must be positive'),
    ({'log_every': 0}, 'log_every must be at least 1, got 0'),
    ({'batch_size': 0, 'num_seeds': 2}, 'batch_size must be at least 1, got 0'),
    ({'mesh.fsdp': 2, 'num_seeds': 2}, 'trials are not sharded over devices'),
    ({'patience': -1}, 'patience must be at least 0, got -1'),
    ({'num_train_epochs': 0.0}, 'num_train_epochs must be above 0, got 0.0'),
    ({'batch_size': 7}, 'batch'),
  ],
)
def test_a_mistake_gets_one_sentence_and_no_workdir(make, tmp_path, changes, message):
  config = make('sst2')
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    finetune.run(config, workdir=str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_the_command_names_the_fields_of_fine_tuning(capsys):
  assert main(['finetune', '--help']) == 0
  text = capsys.readouterr().out
  assert (
    '--config.warmup_ratio=0.1' in text and 'fraction of the steps used for linear warm-up' in text
  )
  assert 'Recipes: choice, embed, glue, rerank, squad, table, tagging' in text
  fields = [line.split(None, 1) for line in text.splitlines() if line.startswith('  --config.')]
  assert [field for field in fields if len(field) < 2] == []
  assert main(['finetune', '--config.epoch=3.0']) == 2


def test_batches_have_complete_questions_and_every_example_once():
  rows = {
    'input_ids': np.arange(24)[:, None] + np.zeros((1, 8), int),
    'ends': np.full((24, 1, 2), 8, np.uint16),
    'labels': np.zeros(24, np.int32),
    'example_ids': np.arange(24, dtype=np.int32) // 4,
  }
  data = TaskBatches(rows, 4, Choice(rows=4))
  seen = []
  for step in range(3):
    ids = data.training(step)['input_ids'][:, 0].reshape(4, 4)
    assert (ids == ids[:, :1] + np.arange(4)).all() and not (ids[:, 0] % 4).any()
    seen += ids[:, 0].tolist()
  assert sorted(seen) == sorted([*range(0, 24, 4)] * 2)
  last = data.in_order(1)
  np.testing.assert_array_equal(last['example_weights'], [1] * 8 + [0] * 8)
