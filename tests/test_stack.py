"""The supported stacks: bounds, private names of jax, and machines without TensorFlow."""

import pathlib
import re
import subprocess
import sys

from setuptools.config.setupcfg import read_configuration

ROOT = pathlib.Path(__file__).parent.parent
OPTIONS = read_configuration(ROOT / 'setup.cfg', ignore_option_errors=True)['options']


def test_lower_bounds_are_the_versions_that_the_gate_tests():
  lines = (ROOT / '.ci' / 'constraints-oldest.txt').read_text().splitlines()
  tested = dict(line.split('==') for line in lines if not line.startswith('#'))
  needed = [*OPTIONS['install_requires'], *OPTIONS['extras_require']['serve']]
  for requirement in needed:
    name, bound = re.match(r'([\w-]+)(?:\[\w+\])? ?>= ?([\w.]+)', requirement).groups()
    assert tested[name] == bound, requirement


def test_tensorflow_is_asked_for_where_it_has_wheels():
  names = [r for r in OPTIONS['install_requires'] if r.startswith(('tensorflow', 'importlib'))]
  assert len(names) == 4 and all('; python_version < "3.14"' in r for r in names)


def test_private_names_of_jax_are_in_one_guarded_place():
  used = [p.name for p in ROOT.glob('bertjax/**/*.py') if 'jax._src' in p.read_text()]
  assert used == ['distributed.py']
  text = (ROOT / 'bertjax' / 'training' / 'distributed.py').read_text()
  assert re.search(r'\ntry:\n(  .*\n|\n)+except \(ImportError', text)
  assert text.count('jax._src') == 2


WITHOUT = """
import sys
for name in ('tensorflow', 'tensorflow_text', 'tensorflow_datasets'):
  sys.modules[name] = None
from bertjax.data import loader
assert loader.choose_loader('auto') == 'threads'
"""


NEEDS = [
  ('loader.choose_loader("tfdata")', "needs tensorflow; 'threads' makes the same batches"),
  ('import bertjax.data.tokenizer_tf', 'are for Python 3.11 to 3.13'),
  (
    'from bertjax import export; export.save_savedmodel(None, None, "", 0)',
    '--format=stablehlo to export',
  ),
  (
    'from bertjax.data import text; next(text.read_documents("tfds:c4/en"))',
    'tfds:c4/en: TensorFlow cannot be imported (.*), or write the data as .jsonl or .parquet',
  ),
  (
    'from bertjax.data import tables; next(tables.read_tfds("glue/rte", "train", ["idx"]))',
    'tfds:glue/rte: TensorFlow cannot be imported',
  ),
  (
    'from bertjax.data import tfrecords; next(tfrecords._read("a.tfrecord", 1))',
    r'a.tfrecord: .*, or prepare its rows \(`bertjax prepare`\) where it is installed',
  ),
  (
    'from bertjax import config, prepare\n'
    'prepare.run(config.pretraining("tiny"), out="rows", format="google")',
    '--format=google: TensorFlow cannot be imported',
  ),
  (
    'from bertjax.interop import google; google._tensorflow()',
    r"Google's checkpoints need TensorFlow: .*, or convert them \(bertjax convert\) where",
  ),
]


def test_what_needs_tensorflow_says_so():
  """In one process, which prints what each line of code raised."""
  code = WITHOUT + f'for code in {[code for code, _ in NEEDS]!r}:\n' + (
    '  try:\n'
    '    exec(code)\n'
    '  except Exception as error:\n'
    '    print("raised", type(error).__name__, *str(error).split())\n'
  )  # fmt: skip
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  raised = [line for line in done.stdout.splitlines() if line.startswith('raised ')]
  for line, (code, words) in zip(raised, NEEDS, strict=True):
    assert re.search(words, line) and 'ModuleNotFoundError' not in line, code


def test_everything_is_imported_without_tensorflow():
  needs = ('tokenizer_tf', '__main__')
  modules = [
    '.'.join(p.relative_to(ROOT).with_suffix('').parts)
    for p in ROOT.glob('bertjax/**/*.py') if p.stem not in needs
  ]  # fmt: skip
  code = WITHOUT + 'import importlib\n' + f'for m in {modules!r}: importlib.import_module(m)'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
