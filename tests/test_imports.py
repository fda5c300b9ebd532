"""The import directions of the house plan, read from the sources' syntax trees."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'bertjax'

# Folder -> what its modules may import, besides the standard library and themselves.
ALLOWED = {
  'model': {'jax', 'flax', 'optax', 'numpy'},
  'objectives': {'jax', 'optax', 'numpy', 'bertjax.model'},
  'training': {
    'jax', 'flax', 'optax', 'orbax', 'numpy', 'etils', 'tqdm', 'tensorboardX', 'matplotlib'
  },
  'data': {'numpy', 'etils', 'tokenizers', 'sentencepiece'},
  'interop': {
    'numpy', 'ml_dtypes', 'etils', 'jax', 'flax', 'orbax', 'safetensors', 'huggingface_hub',
    'bertjax.model', 'bertjax.data.tokenizer',
  },
  'inference': {
    'jax', 'numpy', 'etils', 'pyarrow', 'tqdm',
    'bertjax.model', 'bertjax.data', 'bertjax.interop', 'bertjax.tasks', 'bertjax.pages',
  },
  'pages': set(),
  'tasks': {'numpy', 'scipy', 'etils', 'matplotlib', 'bertjax.data', 'bertjax.objectives',
            'bertjax.pages'},
}  # fmt: skip
TENSORFLOW = {'data/tokenizer_tf.py'}
PROGRAMS = {path.stem for path in PACKAGE.glob('*.py')} - {
  '__init__', '__main__', 'config', 'io', 'scoring'
}  # fmt: skip


def imported(path: pathlib.Path) -> set[str]:
  """Dotted names of all imports, also those inside functions."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def outside(names: set[str], allowed: set[str]) -> list[str]:
  def fine(name):
    top = name.split('.')[0]
    return top in sys.stdlib_module_names or any(
      name == rule or name.startswith(rule + '.') for rule in allowed
    )

  return sorted(name for name in names if not fine(name))


@pytest.mark.parametrize('folder', ALLOWED)
def test_a_folder_imports_only_what_the_plan_allows(folder):
  for path in sorted((PACKAGE / folder).glob('*.py')):
    allowed = ALLOWED[folder] | {f'bertjax.{folder}', 'bertjax.io'}
    if f'{folder}/{path.name}' in TENSORFLOW:
      allowed |= {'tensorflow', 'tensorflow_text'}
    if f'{folder}/{path.name}' == 'data/tfrecords.py':
      allowed |= {'tensorflow'}
    if f'{folder}/{path.name}' == 'data/text.py':
      allowed |= {'tensorflow'}
    if f'{folder}/{path.name}' in ('data/files.py', 'data/tables.py'):
      allowed |= {'pyarrow', 'huggingface_hub'}
    if f'{folder}/{path.name}' == 'interop/files.py':
      allowed |= {'torch'}
    assert not outside(imported(path), allowed), path


def test_every_folder_has_a_rule():
  folders = {path.parent.name for path in PACKAGE.glob('*/*.py')}
  assert folders - {'configs'} == set(ALLOWED)


def test_the_training_folder_knows_no_task():
  for path in (PACKAGE / 'training').glob('*.py'):
    code = ast.unparse(_without_docstrings(ast.parse(path.read_text()))).lower()
    assert not {'mlm', 'nsp'} & set(re.findall('[a-z]+', code)), path
    assert 'bertjax.model' not in code, path


def _without_docstrings(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
      node.value.value = ''
  return tree


def test_no_folder_imports_a_program():
  for path in PACKAGE.glob('*/*.py'):
    assert not imported(path) & {f'bertjax.{name}' for name in PROGRAMS}, path


def test_importing_bertjax_loads_no_heavy_library():
  code = (
    'import sys, bertjax; bertjax.Tokenizer; '
    "print([m for m in ('tensorflow', 'torch', 'jax') if m in sys.modules])"
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == '[]'


def test_every_public_name_loads():
  import bertjax

  for name in bertjax.__all__:
    assert getattr(bertjax, name) is not None


def test_an_unknown_public_name_lists_the_known_ones():
  import bertjax

  with pytest.raises(AttributeError, match='EncoderConfig'):
    bertjax.BertModel  # noqa: B018


def test_only_label_kinds_know_what_their_labels_are():
  """A kind is one class in `objectives.labels`; other code calls its methods and never branches."""
  kinds = {'class', 'regression', 'multilabel', 'tags', 'span', 'choice'}
  names = '|'.join(kind.capitalize() for kind in kinds)
  for path in [*PACKAGE.rglob('*.py'), *(PACKAGE.parent / 'benchmarks').glob('*.py')]:
    tree = ast.parse(path.read_text())
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    found = [text for text in compared if re.search(r'\bkind\b', text) and kinds & quoted(text)]
    called = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found += [text for text in called if re.match(rf'(isinstance|type)\(.*\b({names})\b', text)]
    assert not found, path


def quoted(text: str) -> set[str]:
  return set(re.findall(r"'(\w+)'", text))
