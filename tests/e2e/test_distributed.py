"""Several processes of one run on loopback: the same batches and losses, one stop, faults named."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from bertjax import prepare
from bertjax.__main__ import main
from bertjax.data import dataset
from bertjax.data.tokenizer import Tokenizer
from bertjax.training.metrics import read_metrics
from tests.flags import QUICK

STEPS, DEVICES = 20, 4
FIELDS = {
  'num_train_steps': STEPS,
  'log_every': 1,
  'eval_every': 0,
  'save_every': 6,
  'learning_rate': 3e-3,
}


def free_port():
  with socket.create_server(('localhost', 0)) as server:
    return server.getsockname()[1]


def launch(folder, rows, processes, *, fault='none - 0', devices=DEVICES, **fields):
  """Starts the processes of one run in `folder`; `devices` in all."""
  folder.mkdir(exist_ok=True)
  (folder / 'fields.json').write_text(json.dumps(FIELDS | {'data.prepared': str(rows)} | fields))
  coordinator = f'localhost:{free_port()}' if processes > 1 else ''
  flags = f'--xla_force_host_platform_device_count={devices // processes} {QUICK}'
  environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'FAULT': fault}
  command = [sys.executable, '-m', 'tests.e2e.worker', folder, folder / 'fields.json', coordinator]
  return [
    subprocess.Popen(
      [*command, str(processes), f'--process_id={i}'], env=environment, stderr=subprocess.PIPE,
      text=True, cwd=pathlib.Path(__file__).parents[2],
    )
    for i in range(processes)
  ]  # fmt: skip


def finish(processes):
  """Waits for all; returns their exit codes and what they wrote to stderr."""
  errors = [p.communicate(timeout=900)[1] for p in processes]
  return [p.returncode for p in processes], errors


def run(folder, rows, processes, **fields):
  codes, errors = finish(launch(folder, rows, processes, **fields))
  assert codes == [0] * processes, '\n'.join(e[-2000:] for e in errors)
  return folder


def batches(folder, processes):
  """Step -> the global batch, assembled from the parts of all processes."""
  parts = [np.load(folder / f'batches-{i}.npz') for i in range(processes)]
  steps = sorted(int(name[4:]) for name in parts[0] if name != 'rows')
  whole = {}
  for step in steps:
    rows = {}
    for part in parts:
      rows |= dict(zip(part['rows'].tolist(), part[f'step{step}'], strict=True))
    whole[step] = np.stack([rows[row] for row in sorted(rows)])
  return whole


def losses(folder):
  return {r['step']: r['loss'] for r in read_metrics(folder / 'run') if r['kind'] == 'train'}


@pytest.fixture(scope='module')
def tiny_rows(tmp_path_factory, corpus, vocab):
  """Sentence pairs of 64 tokens, of which batches of 8 leave a rest in both splits."""
  for seed in range(20):  # the texts, and so the numbers of rows, are those of this Python
    folder = tmp_path_factory.mktemp('rows') / 'rows'
    settings = prepare.Settings(length=64, heldout_fraction=0.2, seed=seed)
    prepare.prepare(str(corpus), Tokenizer.from_file(vocab), settings, folder)
    if all(len(dataset.Dataset(folder, split)) % 8 for split in dataset.SPLITS):
      return folder
  raise AssertionError('no seed leaves a rest')


@pytest.fixture(scope='module')
def single(tmp_path_factory, tiny_rows):
  """The run of one process on four devices."""
  return run(tmp_path_factory.mktemp('single') / 'run', tiny_rows, 1)


SHARDED = {'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.tensor': 2}
MESHES = [
  (2, {}),
  pytest.param(2, SHARDED, marks=pytest.mark.slow),
  pytest.param(2, {'mesh.fsdp': 4, 'mesh.data': 1}, marks=pytest.mark.slow),
  pytest.param(2, {'mesh.tensor': 4, 'mesh.data': 1}, marks=pytest.mark.slow),  # across processes
  pytest.param(4, {}, marks=pytest.mark.slow),  # 8 devices
  pytest.param(4, {'mesh.fsdp': 4}, marks=pytest.mark.slow),
  pytest.param(4, SHARDED | {'mesh.data': 2}, marks=pytest.mark.slow),
]


@pytest.mark.full
@pytest.mark.stack
@pytest.mark.parametrize(('processes', 'mesh'), MESHES)
def test_processes_bring_the_same_batches_to_the_same_losses(
  single, tmp_path, tiny_rows, processes, mesh
):
  folder = run(tmp_path / 'run', tiny_rows, processes, devices=2 * processes, **mesh)
  one, many = batches(single, 1), batches(folder, processes)
  for step in range(STEPS):
    np.testing.assert_array_equal(many[step], one[step])
  expected = losses(single)
  assert list(expected) == list(range(1, STEPS + 1))
  assert losses(folder) == pytest.approx(expected, rel=2e-4)
  scores, wanted = (json.loads((f / 'run/metrics.json').read_text()) for f in (folder, single))
  assert scores == pytest.approx(wanted, rel=2e-3)  # uneven held-out rows, each counted once
  assert scores['mlm_weight'] == wanted['mlm_weight']


def command(words, devices=DEVICES):
  """Runs a `bertjax` command as two processes; returns what process 0 wrote to stdout."""
  shared = [*words, f'--coordinator_address=localhost:{free_port()}', '--num_processes=2']
  flags = f'--xla_force_host_platform_device_count={devices // 2} {QUICK}'
  processes = [
    subprocess.Popen(
      [sys.executable, '-m', 'bertjax', *shared, f'--process_id={i}'], text=True,
      env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for i in range(2)
  ]  # fmt: skip
  written = [process.communicate(timeout=600) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], written[0][1][-2000:]
  (first, _), (second, _) = written
  assert not second
  return first


@pytest.mark.full
def test_two_processes_evaluate_as_one_does(single, capsys):
  words = ['evaluate', f'--workdir={single}/run']
  found = json.loads(command(words))
  assert main(words) == 0
  assert found == pytest.approx(json.loads(capsys.readouterr().out), rel=1e-5)


def checkpoint_steps(folder):
  return sorted(int(p.name) for p in (folder / 'run/checkpoints').iterdir() if p.name.isdigit())


@pytest.mark.full
def test_sigterm_to_one_stops_all_at_one_step_and_fewer_resume(single, tmp_path, tiny_rows):
  folder = tmp_path / 'run'
  codes, errors = finish(launch(folder, tiny_rows, 2, fault='term 1 9', **SHARDED))
  assert codes == [75, 75], '\n'.join(e[-2000:] for e in errors)
  stopped = checkpoint_steps(folder)[-1]
  assert 0 < stopped < STEPS and 'stopped by SIGTERM' in errors[0]
  run(folder, tiny_rows, 1, devices=2)
  assert min(batches(folder, 1)) == stopped  # no batch twice, none skipped
  assert losses(folder) == pytest.approx(losses(single), rel=2e-4)


FAULTS = [  # action, whom it hits, at which step
  ('kill 1 18', (1,)),
  ('kill 0 18', (0,)),
  ('kill 0,1 18', (0, 1)),
  ('save 1 12', (1,)),
  ('save 0,1 12', (0, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize(('fault', 'hit'), FAULTS)
def test_after_a_kill_the_same_command_continues_bitwise(tmp_path, tiny_rows, fault, hit):
  whole, folder = run(tmp_path / 'whole', tiny_rows, 2), tmp_path / 'run'
  codes, errors = finish(launch(folder, tiny_rows, 2, fault=fault))
  assert all(codes[i] == -signal.SIGKILL for i in hit) and 0 not in codes, errors
  kept = checkpoint_steps(folder)[-1]
  # At most the save interval is lost, or two if the newest was still being written.
  assert max(losses(folder)) - kept <= 2 * FIELDS['save_every']
  run(folder, tiny_rows, 2)
  assert min(batches(folder, 2)) == kept
  assert losses(folder) == losses(whole)
  model = 'run/model/model.safetensors'
  assert (folder / model).read_bytes() == (whole / model).read_bytes()


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_set_aside(tmp_path, tiny_rows):
  folder = run(tmp_path / 'run', tiny_rows, 2, num_train_steps=12)
  codes, errors = finish(launch(folder, tiny_rows, 2, fault='unread 1 12'))
  assert codes[1] == 75 and codes[0] != 0, errors
  assert 'step 12 is unreadable' in errors[1] and (folder / 'run/checkpoints/12.corrupt').exists()
  run(folder, tiny_rows, 2)
  assert min(batches(folder, 2)) == 6 and checkpoint_steps(folder)[-1] == STEPS


@pytest.mark.slow
def test_a_stalled_process_is_named_and_all_end(tmp_path, tiny_rows):
  codes, errors = finish(
    launch(tmp_path / 'run', tiny_rows, 2, fault='stall 1 9', stall_seconds=40.0)
  )
  assert 75 in codes and 0 not in codes
  assert any('process 1 on' in e and 'reading a batch' in e for e in errors), errors
