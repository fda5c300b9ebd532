"""Worker processes start from any program: a script without a main guard, stdin, a notebook."""

import itertools
import os
import signal
import subprocess
import sys
import threading

import pytest

from bertjax.data import workers as worker_lib

POOL = """
from bertjax.data import workers
with workers.processes(2) as in_order:
  print(list(in_order(len, ['a', 'bb', 'ccc'])))
"""


def run(arguments, **options):
  return subprocess.run(
    [sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options
  )


@pytest.mark.parametrize('way', ['script', 'stdin', 'command'])
def test_workers_start_from_a_program_without_a_main_guard(way, tmp_path):
  path = tmp_path / 'script.py'
  path.write_text(POOL)
  done = {
    'script': lambda: run([str(path)]),
    'stdin': lambda: run(['-'], input=POOL),
    'command': lambda: run(['-c', POOL]),
  }[way]()
  assert done.stdout == '[1, 2, 3]\n', done.stderr


def test_a_notebooks_main_module_is_left_as_it_was(monkeypatch):
  from bertjax.data import workers

  main = sys.modules['__main__']
  monkeypatch.setattr(main, '__file__', '<ipython-input-1>', raising=False)
  monkeypatch.setattr(main, '__spec__', None)
  with workers.processes(1) as in_order:
    assert list(in_order(len, ['four'])) == [4]
  assert (main.__file__, main.__spec__) == ('<ipython-input-1>', None)


def test_a_script_without_a_main_guard_trains_a_vocabulary_and_prepares(corpus, tmp_path):
  # Without TensorFlow, which takes each worker seconds to import.
  (tmp_path / 'sitecustomize.py').write_text("import sys; sys.modules['tensorflow_text'] = None")
  path = tmp_path / 'script.py'
  path.write_text(
    'from bertjax import prepare, vocab\n'
    'from bertjax.config import load_recipe\n'
    "config = load_recipe('bert_mini:smoke')\n"
    f"config.data.input, config.data.vocab = '{corpus}', '{tmp_path}/vocab.txt'\n"
    'vocab.run(input=config.data.input, out=config.data.vocab, size=600, workers=2)\n'
    f"prepare.run(config, out='{tmp_path}/rows', workers=2)\n"
  )
  done = run([str(path)], env=os.environ | {'PYTHONPATH': str(tmp_path)})
  assert done.returncode == 0, done.stderr[-3000:]
  assert (tmp_path / 'rows' / 'manifest.json').exists()


def test_ctrl_c_ends_a_script_whose_workers_are_busy(tmp_path):
  path = tmp_path / 'script.py'
  path.write_text(
    'from bertjax.data import workers\n'
    'with workers.processes(2) as in_order:\n'
    """  busy = 'print("busy", flush=True); import time; time.sleep(1)'\n"""
    '  for _ in in_order(exec, [busy] * 600): pass\n'
  )
  process = subprocess.Popen(
    [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  while process.stdout.readline() != 'busy\n':
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=30)
  assert process.returncode in (1, 130, -signal.SIGINT)


def test_units_without_workers_are_made_one_after_another_in_this_thread(monkeypatch):
  monkeypatch.setattr(worker_lib, '_UNIT', 10)
  units = worker_lib.map_units(lambda unit: (threading.get_ident(), len(unit)), ['text ' * 3] * 5)
  assert list(units) == [(threading.get_ident(), 1)] * 5


def test_an_iterator_left_open_closes_when_modules_are_gone(monkeypatch):
  """At exit Python deletes modules before iterators that nobody closed."""
  with worker_lib.threads_in_order(1) as in_order:
    made = in_order(abs, itertools.count())
    assert next(made) == 0
    monkeypatch.setattr(worker_lib, 'concurrent', None)
    made.close()
