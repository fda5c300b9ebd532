"""What import contracts cannot say: what an import loads, public names, words of a folder."""

import ast
import configparser
import pathlib
import re
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'bertjax'

# Libraries that every module may import. `lint-imports` checks the others, and the directions.
FREE = {'bertjax', 'etils', 'numpy'}


def imported(path: pathlib.Path) -> set[str]:
  """Dotted names of all imports, also those inside functions."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def test_every_library_has_a_contract():
  """Contracts name what they forbid, so a new library needs a line in one."""
  config = configparser.ConfigParser()
  config.read(PACKAGE.parent / 'setup.cfg')
  contracts = [config[name] for name in config.sections() if name.startswith('importlinter:')]
  names = {word for section in contracts for text in section.values() for word in text.split()}
  for path in PACKAGE.rglob('*.py'):
    libraries = {name.split('.')[0] for name in imported(path)}
    assert not libraries - sys.stdlib_module_names - FREE - names, path


def test_the_training_folder_knows_no_task():
  for path in (PACKAGE / 'training').glob('*.py'):
    code = ast.unparse(_without_docstrings(ast.parse(path.read_text()))).lower()
    assert not {'mlm', 'nsp'} & set(re.findall('[a-z]+', code)), path


def _without_docstrings(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
      node.value.value = ''
  return tree


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
