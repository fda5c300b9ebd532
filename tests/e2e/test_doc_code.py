"""The code of the pages on extending runs as written, from public names only."""

import ast
import pathlib
import re

import numpy as np
import pytest

import bertjax
from tests.models import model

DOCS = pathlib.Path(__file__).parents[2] / 'docs'


def blocks(page: str) -> str:
  return '\n'.join(re.findall(r'^```python\n(.*?)^```$', (DOCS / page).read_text(), re.M | re.S))


@pytest.fixture
def home(vocab, documents, tmp_path, monkeypatch):
  """A folder with the files that the pages name: vocab.txt, texts.txt, MODEL."""
  (tmp_path / 'vocab.txt').write_bytes(vocab.read_bytes())
  (tmp_path / 'texts.txt').write_text('\n'.join(documents))
  bertjax.save_model(tmp_path / 'MODEL', *model(vocab, 'mlm', 'nsp', std=0.05))
  monkeypatch.chdir(tmp_path)
  return tmp_path


def run(page: str) -> dict:
  names: dict = {'__name__': page}
  exec(compile(blocks(page), page, 'exec'), names)
  return names


def test_a_custom_loop_lowers_the_loss_and_saves_a_model(home):
  names = run('custom_loop.md')
  assert int(names['state'].step) == names['STEPS']
  assert float(names['metrics']['loss']) < np.log(names['tokenizer'].vocab_size) - 0.3
  loaded, params, _ = bertjax.load_model(home / 'my-model')
  assert loaded == names['model'] and params.keys() == {'encoder', 'mlm'}


def test_a_custom_head_learns_and_its_encoder_is_saved(home):
  names = run('custom_head.md')
  assert float(names['metrics']['loss']) < 0.6
  loaded, _, _ = bertjax.load_model(home / 'scorer')
  assert loaded == names['encoder']
  assert (home / 'scorer-head.msgpack').exists()


@pytest.mark.parametrize('page', ['custom_loop.md', 'custom_head.md'])
def test_a_page_imports_public_names_only(page):
  for node in ast.walk(ast.parse(blocks(page))):
    if isinstance(node, ast.ImportFrom):
      assert not node.module.startswith('bertjax')
    if isinstance(node, ast.Attribute) and getattr(node.value, 'id', '') == 'bertjax':
      assert node.attr in bertjax.__all__
