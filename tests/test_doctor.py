"""What would go wrong in a run, found before it starts."""

import csv

import jax
import pytest

from bertjax import doctor
from bertjax.__main__ import main
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import loading
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params


def find(capsys, *arguments, code=0):
  """{(mark, topic): sentences} of a call that ends with a code."""
  if code == 1:
    with pytest.raises(SystemExit) as stop:
      main(['doctor', *arguments])
    assert stop.value.code == 1
  else:
    assert main(['doctor', *arguments]) == code
  found = {}
  for line in capsys.readouterr().out.splitlines():
    found.setdefault((line[:3].strip(), line[3:15].strip()), []).append(line[15:])
  return found


@pytest.mark.e2e
@pytest.mark.e2e
def test_a_sound_run_is_described_with_its_cost(corpus, vocab, tmp_path, capsys):
  found = find(
    capsys, '--config=bert_mini:smoke', f'--input={corpus}', f'--vocab={vocab}',
    f'--workdir={tmp_path / "run"}', '--config.num_train_steps=20',
  )  # fmt: skip
  assert not {topic for mark, topic in found if mark == '!!'}
  assert '40 documents of' in found['', 'text'][1] and 'Latin' in found['', 'text'][0]
  assert found['', 'epochs'][0].startswith('20 steps read 10,240 tokens, the text about 0.')
  assert 'GB on each device' in found['', 'memory'][0] and 'tokens/s' in found['', 'time'][0]
  assert '4 checkpoints of' in found['', 'disk'][0] and str(tmp_path) in found['', 'disk'][0]
  assert not list(tmp_path.iterdir())


def test_only_the_named_megabytes_are_read(corpus, vocab, capsys):
  flags = ['--config=bert_mini:smoke', f'--vocab={vocab}', '--megabytes=0', '--noprobe']
  found = find(capsys, *flags, f'--input={corpus}', code=1)
  assert 'no text' in found['!!', 'run'][0]
  tokens = [
    find(capsys, *flags[:2], f'--input={corpus}', '--noprobe')['', 'epochs'],
    find(capsys, *flags[:2], f'--input={corpus},{corpus}', '--noprobe')['', 'epochs'],
  ]
  assert tokens[0] != tokens[1]  # twice the text, half the epochs


def test_text_that_the_vocabulary_does_not_fit_is_named(tmp_path, vocab, capsys):
  text = tmp_path / 'text.txt'
  text.write_text('\n\n'.join(['Привет, мир. Как дела?'] * 20), encoding='utf-8')
  found = find(
    capsys, '--config=bert_mini:smoke', f'--input={text}', f'--vocab={vocab}', '--noprobe',
    '--config.data.format=google', code=1,
  )  # fmt: skip
  (unknown, nsp) = found['!!', 'text']
  assert '[UNK]; train a vocabulary' in unknown and 'two sentences or more' in nsp
  assert '19 of 20 documents (95%) repeat an earlier one' in found['!', 'text'][0]
  assert found['', 'text'][0] == 'letters: 100% Cyrillic'


def test_a_run_with_a_teacher_is_sound_though_its_step_is_not_measured(corpus, vocab, capsys):
  flags = ['--config=minilm:smoke', f'--input={corpus}', f'--vocab={vocab}']
  found = find(capsys, *flags, '--config.distill.teacher=TEACHER')
  assert found['', 'time'][0].startswith('not measured')


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--vocab='], 'data.vocab is empty'),
    (['--input=/nowhere'], '/nowhere'),
    (['--config.model.num_heads=3'], 'num_heads'),
    (['--config.batch_size=0'], 'batch_size must be at least 1'),
  ],
)
def test_what_would_stop_a_run_is_a_finding(corpus, vocab, capsys, flags, words):
  arguments = ['--config=bert_mini:smoke', f'--input={corpus}', f'--vocab={vocab}', '--noprobe']
  found = find(capsys, *arguments, *flags, code=1)
  assert words in found['!!', 'run'][0]


def write(path, rows):
  with path.open('w', newline='') as file:
    csv.writer(file).writerows([('text', 'label'), *rows])
  return path


@pytest.fixture(scope='module')
def model(tmp_path_factory, vocab):
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, mlp_size=64,
    max_positions=64,
  )  # fmt: skip
  path, bert = tmp_path_factory.mktemp('model') / 'model', Bert(config)
  params = jax.device_get(init_params(bert, jax.random.key(0)))
  loading.save_model(path, bert, params, tokenizer)
  return path


@pytest.mark.e2e
@pytest.mark.e2e
def test_examples_in_both_splits_or_with_two_labels_are_named(tmp_path, model, capsys):
  rows = [(f'the value {i}', 'good') for i in range(20)] + [('an error', 'bad')] * 3
  train = write(tmp_path / 'train.csv', [*rows, ('the value 7', 'bad'), ('the ' * 99, 'bad')] * 2)
  dev = write(tmp_path / 'dev.csv', [('the value 3', 'good'), ('a new text', 'bad')])
  flags = ['--config=table', f'--train_file={train}', f'--dev_file={dev}', '--text=text',
           '--label=label', f'--model={model}']  # fmt: skip
  found = find(capsys, *flags, '--config.data.length=32', code=1)
  assert found['!!', 'examples'] == [
    '1 of 2 dev examples are in the training split too, so their scores say little; remove them '
    'from one.'
  ]
  repeated, both = found['!', 'examples'][:2]
  assert repeated.startswith('28 of 50 training examples repeat')
  assert both == 'Training texts with more than one label: 1.'
  assert 'good 40  bad 10' in found['', 'examples'][0]
  assert 'tokens/s' in found['', 'time'][0] and '3 checkpoints' in found['', 'disk'][0]


@pytest.mark.e2e
def test_a_disk_that_is_too_small_is_named(corpus, vocab, monkeypatch, capsys):
  usage = lambda folder: type('Usage', (), {'free': 1000})  # noqa: E731
  monkeypatch.setattr(doctor.shutil, 'disk_usage', usage)
  flags = ['--config=bert_mini:smoke', f'--input={corpus}', f'--vocab={vocab}']
  assert 'choose another --workdir' in find(capsys, *flags, code=1)['!!', 'disk'][0]
