"""The example in the docstring of every public name runs as written."""

import doctest

import pytest

import bertjax
from tests.models import model

CONSTANTS = {'TASKS'}  # a dict has no own docstring


@pytest.fixture(scope='module')
def names(vocab, tmp_path_factory):
  """Names that the examples use: `folder` is a model directory, `new_folder` a free path."""
  folder = tmp_path_factory.mktemp('doctests')
  bertjax.save_model(folder / 'model', *model(vocab, 'mlm', 'nsp'))
  return {'folder': str(folder / 'model'), 'new_folder': str(folder / 'new')}


@pytest.mark.parametrize('name', sorted(set(bertjax.__all__) - CONSTANTS))
@pytest.mark.e2e
@pytest.mark.stack
def test_an_example_runs(name, names):
  value = getattr(bertjax, name)
  tests = [test for test in doctest.DocTestFinder().find(value, name, globs=names) if test.examples]
  assert any(test.name == name for test in tests), f'{name} has no example'
  runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
  for test in tests:
    assert not runner.run(test).failed, test.name
