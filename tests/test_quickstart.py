"""The quickstart, small and complete; and every command that the docstrings print."""

import pathlib
import re
import shlex

import pytest

from bertjax import prepare, quickstart
from bertjax.__main__ import main, parse
from bertjax.config import load_recipe
from bertjax.flags import VERBS
from bertjax.interop.loading import load_model

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.e2e
@pytest.mark.stack
def test_quickstart_trains_evaluates_fills_masks_and_saves(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('BERTJAX_CACHE', str(tmp_path / 'cache'))
  args = ['quickstart', f'--workdir={tmp_path}/run', '--config=quickstart:smoke']
  assert main(args) == 0
  out = capsys.readouterr().out
  assert 'unigram_cross_entropy' in out and 'nats below' in out and 'bertjax pretrain' in out
  for sentence in quickstart.SENTENCES:
    assert sentence in out
  bert, _, tokenizer = load_model(tmp_path / 'run' / 'model')
  assert bert.config.vocab_size == tokenizer.vocab_size == 4096
  assert (tmp_path / 'run' / 'loss.png').exists()


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_quickstart_beats_the_unigram_by_one_and_a_half_nats(seed, tmp_path):
  config = load_recipe('quickstart')
  config.seed = seed
  scores = quickstart.run(config, workdir=str(tmp_path / 'run'))
  assert scores['mlm_loss'] < scores['unigram_cross_entropy'] - 1.5


def commands():
  """All `bertjax VERB ...` lines of recipes and the programs' docstrings."""
  paths = [*ROOT.glob('configs/*/*.py'), *ROOT.glob('bertjax/*.py')]
  for path in paths:
    text = re.sub(r'\\+\n\s*', ' ', path.read_text())
    for line in re.findall(r'^\s*(?:pip install -e \. && )?bertjax ([a-z]+(?: .*)?)$', text, re.M):
      yield pytest.param(line, id=f'{path.name}: {line[:40]}')


@pytest.mark.parametrize('line', list(commands()))
def test_every_printed_command_has_flags_that_exist(line):
  verb, *arguments = shlex.split(re.sub(r'\s{2,}[a-z].*$', '', line.replace('...', 'bert_mini')))
  assert set(parse(verb, arguments)) == set(VERBS[verb].flags)


def test_a_vocabulary_and_rows_are_made_by_command(corpus, tmp_path, capsys):
  vocab, rows = tmp_path / 'vocab.txt', tmp_path / 'rows'
  assert main(['vocab', f'--input={corpus}', '--size=700', f'--out={vocab}']) == 0
  assert len(vocab.read_text().splitlines()) == 700
  args = ['prepare', '--config=bert_mini:smoke', f'--out={rows}', f'--config.data.input={corpus}']
  assert main([*args, f'--config.data.vocab={vocab}', '--config.data.heldout_fraction=0.2']) == 0
  assert 'train_rows' in capsys.readouterr().out
  assert prepare.dataset.read_manifest(rows)['settings']['length'] == 64
  assert main([*args, f'--config.data.vocab={vocab}']) == 2
  assert 'exists already' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--size=100000'], 'at most'),
    (['--size=10'], 'at least'),
    (['--lowercase=upper'], "'upper'"),
    (['--out='], '--out=FILE'),
    (['--input=nowhere'], 'no such file'),
    (['--size=many'], 'many'),
  ],
)
def test_vocab_says_what_is_wrong(flags, words, corpus, tmp_path, capsys):
  args = ['vocab', f'--input={corpus}', '--size=700', f'--out={tmp_path}/vocab.txt', *flags]
  assert main(args) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / 'vocab.txt').exists()
