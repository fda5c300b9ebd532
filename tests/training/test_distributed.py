"""The handshake of processes, who they are, and the watch over a run."""

import json
import os
import subprocess
import sys
import threading
import time
import types

import pytest

from bertjax.training import distributed
from tests.e2e.test_distributed import free_port
from tests.waiting import until


def test_processes_that_do_not_come_are_named():
  port = free_port()
  with pytest.raises(TimeoutError, match=r'2 of 3 processes did not join: \[1, 2\]'):
    distributed.handshake(f'localhost:{port}', 3, 0, 1)
  with pytest.raises(TimeoutError, match=f'process 0 is not reachable at localhost:{port}'):
    distributed.handshake(f'localhost:{port}', 3, 1, 1)


def test_a_start_without_the_others_ends_with_the_code_to_start_again(monkeypatch, caplog):
  monkeypatch.setattr(distributed, 'START_SECONDS', 0.5)
  with pytest.raises(SystemExit) as ended:
    distributed.start(f'localhost:{free_port()}', 2, 0)
  assert ended.value.code == 75 and '[1]' in caplog.text


def meet(monkeypatch, words):
  """The handshake of two processes in threads; what each of them raised."""
  raised, port, real = [None, None], free_port(), json.dumps

  def one(process):
    try:
      distributed.handshake(f'localhost:{port}', 2, process, 20)
    except Exception as error:
      raised[process] = error

  def dumps(value, **kwargs):  # what process 1 says of itself
    return real(value | words if 'words' in value else value, **kwargs)

  monkeypatch.setattr(distributed.json, 'dumps', dumps)
  threads = [threading.Thread(target=one, args=(i,)) for i in (1, 0)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return raised


def test_processes_continue_after_the_handshake(monkeypatch):
  assert meet(monkeypatch, {}) == [None, None]


def test_a_process_with_other_flags_is_named_to_all(monkeypatch):
  for error in meet(monkeypatch, {'words': ['--config.seed=7']}):
    assert isinstance(error, ValueError) and 'process 1 on' in str(error)
    assert '--config.seed=7' in str(error)


@pytest.mark.full
@pytest.mark.stack
@pytest.mark.parametrize('blocked', ['', 'jax._src.clusters', 'jax._src.distributed'])
def test_slurm_identifies_the_processes(blocked):
  """Also with a jax that has moved the private names of its detection and its store."""
  code = (
    f'import jax, sys; sys.modules[{blocked!r}] = None; '
    'from bertjax.training import distributed as d; d.start(); d.agree("x", 1); d.Watch(0.0); '
    'print(jax.process_index(), jax.process_count(), d.all_true(True), '
    'd.all_true(jax.process_index() == 0))'
  )
  job = {'SLURM_JOB_ID': str(free_port()), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}
  job |= {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', code], stdout=subprocess.PIPE, text=True,
      env=os.environ | job | {'SLURM_PROCID': str(i), 'SLURM_LOCALID': '0'},
    )
    for i in range(2)
  ]  # fmt: skip
  out = [p.communicate(timeout=300)[0].strip().splitlines()[-1] for p in processes]
  assert out == ['0 2 True False', '1 2 True False']


@pytest.mark.full
def test_an_error_in_one_process_ends_all_of_them_soon():
  """By the command; process 0 waits for process 1."""
  program = f"""
import jax, sys, bertjax.__main__ as command
from bertjax.training import distributed as d

def main():
  try:
    d.start('localhost:{free_port()}', 2, int(sys.argv[1].removeprefix('--process_id=')))
    if jax.process_index():
      raise ValueError('the disk is gone')
    d.all_true(True)
  except ValueError as error:
    print(error, file=sys.stderr)
    return 2
command.main = main
command.entry()
"""
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', program, f'--process_id={i}'], stderr=subprocess.PIPE, text=True,
      env=os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
    )
    for i in range(2)
  ]  # fmt: skip
  assert any('the disk is gone' in line for line in processes[1].stderr)
  start = time.monotonic()
  codes = [p.wait(timeout=250) for p in processes]  # jax's own end takes 300 s
  assert codes[0] != 0 and codes[1] == 2
  assert time.monotonic() - start < 200


def test_flags_that_contradict_are_one_sentence():
  with pytest.raises(ValueError, match='needs --num_processes=N'):
    distributed.start('localhost:1', 2, 2)


def test_a_watch_names_what_has_stopped_and_ends_the_process(monkeypatch, caplog):
  ended = threading.Event()
  monkeypatch.setattr(os, '_exit', lambda code: ended.set() if code == 75 else None)
  with distributed.Watch(0.4) as watch:
    watch.at(3, 'reading a batch')
    assert ended.wait(10)
  assert 'is reading a batch at step 3' in caplog.text


def test_a_watch_ignores_a_process_that_progresses(monkeypatch):
  ended = threading.Event()
  monkeypatch.setattr(os, '_exit', lambda code: ended.set())
  clock = types.SimpleNamespace(now=0.0, read=0)

  def monotonic():
    clock.read += 1
    return clock.now

  monkeypatch.setattr(distributed, 'time', types.SimpleNamespace(monotonic=monotonic))
  with distributed.Watch(0.1) as watch:
    for step in range(10):
      watch.at(step, 'running')
      clock.now, clock.read = clock.now + 0.09, 0
      until(lambda: clock.read > 1, 'two looks at the clock')
  assert not ended.is_set()
