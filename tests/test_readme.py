"""Every command of the README, at small settings, in the order in which it stands there."""

import json
import pathlib
import re
import shlex

import jax
import pyarrow
import pytest
from pyarrow import parquet

from bertjax.__main__ import main
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import google, loading
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from tests import test_finetune

README = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()

# What of a command is changed, by regular expressions.
SMALLER = (
  (r'--config=(bert_\w+):(\w+)', r'--config=\1:\2,smoke --config.data.heldout_fraction=0.2'),
  (r'--config=(bert_\w+)(?![:\w])', r'--config=\1:smoke --config.data.heldout_fraction=0.2'),
  (r'(--config=(?:glue|table)\S*)', r'\1 --config.data.length=32 '
   '--config.num_train_epochs=1.0 --config.batch_size=8'),
  (r'(bertjax quickstart)', r'\1 --config=quickstart:smoke'),
  (r'--size=8192', '--size=700'),
  (r'--topology=v\w+:\w+', '--topology=v5e:2x2'),
  (r'--config.batch_size=\d{4}', '--config.batch_size=16'),
  (r'--sweep=\S+', '--sweep="model.remat=none,dots"'),
  (r'=bert-base-uncased', '=MODEL'),
)  # fmt: skip

# These need what a test in this process cannot give them; others run their twins.
ELSEWHERE = {
  '--coordinator_address=': 'test_distributed.py',
  'bertjax serve': 'test_serve.py',
  'gs://': 'test_prepare.py',
}


def printed():
  """The `bertjax VERB ...` lines of code blocks, and those within sentences that have two flags."""
  text = re.sub(r'\\\n\s*', ' ', README)
  for language, block in re.findall(r'^```(\w*)\n(.*?)^```$', text, re.M | re.S):
    if not language:
      yield from re.findall(r'^(?:pip install .* && )?(bertjax .*)$', block, re.M)
  prose = re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)
  for line in re.findall(r'`(bertjax [^`]*? --[^`]*? [-"][^`]*)`', prose):
    yield ' '.join(line.split())


@pytest.fixture
def home(tmp_path, monkeypatch, corpus, vocab):
  """The working folder, with the files that the README's commands name."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('BERTJAX_CACHE', str(tmp_path / 'cache'))
  pathlib.Path('TEXTS').symlink_to(corpus)
  pathlib.Path('GLUE/SST-2').mkdir(parents=True)
  test_finetune.write_sst2(pathlib.Path('GLUE/SST-2'))
  for name, count in (('a.csv', 60), ('b.csv', 20)):
    rows = [f'{text},{label}' for text, label in test_finetune.sentences(count, count)]
    pathlib.Path(name).write_text('\n'.join(['review,stars', *rows, '']))
  pathlib.Path('texts.csv').write_text('body\nthe name\nof a class\n')
  pathlib.Path('faq.txt').write_text('the name of a class\nraises an exception\n')
  asked = {'question': ['the name?'], 'context': ['the name of a class']}
  parquet.write_table(pyarrow.table(asked), 'q.parquet')
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2,
                         num_heads=2, mlp_size=64, max_positions=64)  # fmt: skip
  params = jax.device_get(init_params(Bert(config), jax.random.key(0)))
  loading.save_model('MODEL', config, params, tokenizer)
  google.save_google('uncased_L-12_H-768_A-12', config, params, tokenizer)
  heads = Bert(config, heads=('mlm', 'classification', 'span'), num_labels=2)
  params = jax.device_get(init_params(heads, jax.random.key(0)))
  loading.save_model('DIR', config, params, tokenizer)
  return tmp_path


def test_every_command_of_the_readme_does_what_it_says(home, capsys):
  lines = list(printed())
  assert len(lines) > 25, lines
  for line in lines:
    if any(part in line for part in ELSEWHERE):
      continue
    for pattern, smaller in SMALLER:
      line = re.sub(pattern, smaller, line)
    _, *arguments = shlex.split(line)
    code = main(arguments)
    assert code == 0, f'{line}\n{capsys.readouterr().err}'
  assert json.loads(pathlib.Path('runs/sst2/metrics.json').read_text())
