"""Every command and Python block of README and the documentation, at small settings, a test each.

They run in the order of the pages, in one folder: later commands use what earlier ones wrote.
"""

import ast
import itertools
import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from bertjax.__main__ import main
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import google, loading
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from tests import test_compare, test_finetune
from tests.test_docs import printed

ROOT = pathlib.Path(__file__).parents[2]
_GUIDES = ('quickstart', 'pretraining', 'objectives', 'data', 'runs', 'results', 'finetuning',
           'embeddings', 'reranking', 'inference', 'interop', 'serving', 'scaling')  # fmt: skip
PAGES = (ROOT / 'README.md', *(ROOT / 'docs' / f'{name}.md' for name in _GUIDES))

# What makes a command small, by regular expressions.
SMALLER = (
  (r'--config=(bert_\w+):([\w,]+)', r'--config=\1:\2,smoke --config.data.heldout_fraction=0.2'),
  (r'--config=(bert_\w+|electra_small|distil_base|minilm)(?![:\w])',
   r'--config=\1:smoke --config.data.heldout_fraction=0.2'),
  (r'(--config=(?:glue|table)\S*)', r'\1 --config.data.length=32 '
   '--config.num_train_epochs=1.0 --config.batch_size=8'),
  (r'--config=(embed|rerank)(?=[ :])(:?)', r'--config=\1:smoke,'),
  (r'--size=8192', '--size=700'),
  (r'(length_512,smoke)', r'\1 --config.data.length=256'),  # four times the length of smoke
  (r'warmup_steps=30000', 'warmup_steps=6 --config.batch_size=64'),
  (r'--checkpoint=\d+', '--checkpoint=20'),
  (r'--topology=v\w+:\w+', '--topology=v5e:2x2'),
  (r'--config.batch_size=\d{4}', '--config.batch_size=16'),
  (r'--sweep=\S+', '--sweep="model.remat=none,dots"'),
  (r'=bert-base-uncased', '=MODEL'),
)  # fmt: skip

# These need other processes, a bucket or many devices, or are long; the test files named run them.
ELSEWHERE = {
  '--coordinator_address=': 'tests/e2e/test_distributed.py',
  '=hf:': 'tests/data/test_remote.py',
  'bertjax quickstart': 'tests/test_quickstart.py',
  'bertjax reproduce': 'tests/test_reproduce.py',
  'bertjax serve': 'tests/test_serve.py',
  ':three_stages': 'tests/e2e/test_stages.py',
  'gs://': 'tests/test_prepare.py',
}


def commands():
  """Each command once, named after its page."""
  lines = {}
  for page in PAGES:
    for line in printed(page):
      lines.setdefault(' '.join(line.split()), page.stem)
  assert len(lines) > 25, lines
  for line, page in lines.items():
    if not any(part in line for part in ELSEWHERE):
      # Two TPU programs, test_compile.py; four sizes of batches, test_stages.py.
      long = '--sweep' in line or 'batch_size_warmup_steps' in line
      marks = [pytest.mark.slow] if long else []
      yield pytest.param(line, id=f'{page}: {line[8:60]}', marks=marks)


@pytest.fixture(scope='module')
def home(tmp_path_factory, corpus, vocab):
  """The working folder, with the files that the commands name."""
  folder = tmp_path_factory.mktemp('home')
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setenv('BERTJAX_CACHE', str(folder / 'cache'))
    for name in ('TEXTS', 'MORE'):
      pathlib.Path(name).symlink_to(corpus)
    pathlib.Path('LICENSE').symlink_to(ROOT / 'LICENSE')
    pathlib.Path('docs').symlink_to(ROOT / 'docs')
    pathlib.Path('GLUE/SST-2').mkdir(parents=True)
    test_finetune.write_sst2(pathlib.Path('GLUE/SST-2'))
    for name, count in (('a.csv', 60), ('b.csv', 20)):
      records = [f'{text},{label}' for text, label in test_finetune.sentences(count, count)]
      pathlib.Path(name).write_text('\n'.join(['review,stars', *records, '']))
    pathlib.Path('texts.csv').write_text('body\nthe name\nof a class\n')
    words = [text for text, _ in test_finetune.sentences(60, 60)]
    pairs = [{'query': a, 'answer': b} for a, b in itertools.pairwise(words)]
    pathlib.Path('pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
    triplets = [row | {'negatives': words[3:5]} for row in pairs[6:]]
    pathlib.Path('triplets.jsonl').write_text('\n'.join(map(json.dumps, triplets)))
    asked = {'query': 'the name', 'documents': ['of a class', 'raises an exception']}
    pathlib.Path('candidates.jsonl').write_text(json.dumps(asked) + '\n')
    scored = [f'{a}\t{b}\t{n % 6}' for n, (a, b) in enumerate(itertools.pairwise(words))]
    pathlib.Path('scored.tsv').write_text('\n'.join(['sentence1\tsentence2\tscore', *scored]))
    pathlib.Path('scifact/qrels').mkdir(parents=True)
    for name in ('corpus', 'queries'):
      records = [{'_id': str(n), 'text': text} for n, text in enumerate(words)]
      pathlib.Path(f'scifact/{name}.jsonl').write_text('\n'.join(map(json.dumps, records)))
    pathlib.Path('scifact/qrels/test.tsv').write_text('query-id\tcorpus-id\tscore\n1\t2\t1\n')
    pathlib.Path('faq.txt').write_text('the name of a class\nraises an exception\n')
    asked = {'question': ['the name?'], 'context': ['the name of a class']}
    parquet.write_table(pyarrow.table(asked), 'q.parquet')
    for seed, name in enumerate(('seed0', 'seed1', 'mine', 'mini-rate3e-3')):
      test_compare.make_run(folder / 'runs' / name, seed)
    tokenizer = Tokenizer.from_file(vocab)
    config = EncoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2,
                           num_heads=2, mlp_size=64, max_positions=64)  # fmt: skip
    params = jax.device_get(jax.jit(init_params, static_argnums=0)(Bert(config), jax.random.key(0)))
    for name in ('MODEL', 'bertjax-quickstart/model'):
      loading.save_model(name, Bert(config), params, tokenizer)
    google.save_google('uncased_L-12_H-768_A-12', config, params, tokenizer)
    heads = Bert(config, heads=('mlm', 'nsp', 'classification', 'span'), num_labels=2)
    params = jax.device_get(jax.jit(init_params, static_argnums=0)(heads, jax.random.key(0)))
    loading.save_model('DIR', heads, params, tokenizer)
    heads = Bert(config, heads=('classification',), num_labels=1)
    params = jax.device_get(init_params(heads, jax.random.key(0)))
    loading.save_model('RERANKER', heads, params, tokenizer)
    yield folder


def outputs(verb: str, flags: dict[str, str]) -> list[str]:
  """The files that a command promises."""
  workdir, out = flags.get('workdir', 'bertjax-quickstart'), flags.get('out')
  weights = 'adapter_model' if 'config.lora.save' in flags else 'model'
  files = {
    'quickstart': [f'{workdir}/model/model.safetensors', f'{workdir}/loss.png'],
    'pretrain': [f'{workdir}/model/model.safetensors', f'{workdir}/metrics.json'],
    'finetune': [f'{workdir}/model/{weights}.safetensors', f'{workdir}/report.html'],
    'vocab': [out],
    'prepare': [f'{out}/manifest.json'],
    'predict': [out, flags.get('index')],
    'explain': [out or 'explain.html'],
    'export': [f'{out}/model.stablehlo' if 'format' in flags else f'{out}/saved_model.pb'],
    'compare': [out, flags.get('write_band')],
    'convert': [f'{out}/bert_config.json' if 'format' in flags else f'{out}/model.safetensors'],
  }
  return [name for name in files.get(verb, []) if name]


@pytest.mark.parametrize('line', list(commands()))
def test_command_writes_or_prints_what_it_promises(line, home, capsys):
  for pattern, smaller in SMALLER:
    line = re.sub(pattern, smaller, line)
  _, verb, *arguments = shlex.split(line)
  code = main([verb, *arguments])
  said = capsys.readouterr()
  assert code == 0, f'{line}\n{said.err}'
  flags = dict(a[2:].partition('=')[::2] for a in arguments if a.startswith('--'))
  for name in outputs(verb, flags):
    assert pathlib.Path(name).stat().st_size, name
  if verb == 'evaluate':
    assert re.search(r'"?(mlm_loss|accuracy|ndcg)', said.out)
  elif verb == 'vocab':
    assert 'unknown' in said.out or '[UNK]' in said.out
  elif verb == 'compile':
    assert 'FLOPs' in said.out
  elif verb == 'predict':
    text = pathlib.Path(flags['out']).read_text() if 'out' in flags else said.out
    assert text.strip()
    if flags.get('out', '').endswith('.jsonl'):
      assert all('result' in json.loads(line) for line in text.splitlines())


def promised(block: str):
  """(expression, its shape, rest of the comment) for each value whose shape a comment gives."""
  for line in block.splitlines():
    code, _, comment = line.partition('  # ')
    shapes = re.findall(r'\[([\w, ]+)\]', comment)
    if not shapes:
      continue
    [node] = ast.parse(code).body
    value = node.targets[0] if isinstance(node, ast.Assign) else node.value
    values = getattr(value, 'args', None) or getattr(value, 'elts', None) or [value]
    for value, shape in zip(values, shapes, strict=True):
      yield ast.unparse(value).removesuffix('.shape'), shape.split(', '), comment


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_and_give_the_shapes_of_their_comments(page, home):
  names = {}
  for block in re.findall(r'^```python\n(.*?)^```$', page.read_text(), re.M | re.S):
    exec(block, names)
    for expression, shape, comment in promised(block):
      value = np.asarray(eval(expression, names))
      config = (names['model'] if 'model' in names else names['predictor']).config
      sizes = {'D': config.hidden_size, 'V': config.vocab_size, 'B': 1}  # L: any
      assert value.ndim == len(shape), expression
      for size, letter in zip(value.shape, shape, strict=True):
        assert size == sizes.get(letter, int(letter) if letter.isdigit() else size), expression
      if 'unit length' in comment:
        np.testing.assert_allclose(np.linalg.norm(value, axis=-1), 1, atol=1e-5)


def test_shapes_are_read_from_the_comments_of_readme():
  [block] = re.findall(r'^```python\n(.*?)^```$', PAGES[0].read_text(), re.M | re.S)
  found = [(e, s) for e, s, _ in promised(block)]
  assert found == [("out['hidden']", ['B', 'L', 'D']), ("out['mlm_logits']", ['B', 'L', 'V'])]
