"""One process of several for test_distributed.py: pre-trains and notes the batches it brings.

  python -m tests.e2e.worker FOLDER FIELDS.json COORDINATOR PROCESSES --process_id=I

FAULT="ACTION PROCESSES STEP" in the environment lets those processes term, kill, stall or fail when
they make the batch of a step, kill right after they begin to save (`save`) at or after it, or fail
to read a checkpoint at or after it (`unread`).
"""

import contextlib
import json
import logging
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np

from bertjax import config as config_lib
from bertjax import pretrain
from bertjax.data import loader, streaming
from bertjax.training import checkpoint


def main(folder, fields, coordinator, processes, process):
  process = int(process.removeprefix('--process_id='))
  logging.basicConfig(level=logging.INFO, format='%(message)s', force=True)
  seen, real = {}, loader.iterate

  action, who, when = os.environ.get('FAULT', 'none - 0').split()
  who = str(process) in who.split(',')

  def fault(now, step):
    if now == action and who and step >= int(when):
      if now == 'fail':
        raise ValueError('a.jsonl can no longer be read.')
      if now == 'stall':
        time.sleep(1000)
      os.kill(os.getpid(), signal.SIGTERM if now == 'term' else signal.SIGKILL)

  save = checkpoint.Checkpoints.save

  def saving(self, step, *rest):
    save(self, step, *rest)
    fault('save', step)

  checkpoint.Checkpoints.save = saving
  read = checkpoint.Checkpoints._read

  def reading(self, step, **items):
    if action == 'unread' and who and 'state' in items and step >= int(when):
      raise checkpoint.UnreadableError(f'step {step} is unreadable.')
    return read(self, step, **items)

  checkpoint.Checkpoints._read = reading

  def note(step, batch, rows):
    """A batch of training."""
    seen[f'step{step}'] = np.concatenate(
      [x.reshape(len(x), -1) for _, x in sorted(batch.items())], 1
    )
    seen['rows'] = rows
    for now in ('term', 'kill', 'stall', 'fail'):
      fault(now, step)

  def iterate(make, start, stop=None, **kwargs):
    def noted(step):
      batch = make(step)
      if stop is None:  # training
        note(step, batch, make.__self__.local)
      return batch

    return real(noted, start, stop, **kwargs)

  loader.iterate = iterate
  read_text = streaming.Stream.batches

  def streamed(self, number=0, position=None):
    with contextlib.closing(read_text(self, number, position)) as batches:
      for step, batch in enumerate(batches, number):
        note(step, batch, self._local)
        yield batch

  streaming.Stream.batches = streamed
  config = config_lib.pretraining('tiny')
  config.update_from_flattened_dict(
    config_lib.SMOKE | json.loads(pathlib.Path(fields).read_text()) | {'data.loader': 'threads'}
  )
  peers = {
    'coordinator_address': coordinator,
    'num_processes': int(processes),
    'process_id': process,
  }
  folder = pathlib.Path(folder)
  try:
    pretrain.run(config, workdir=str(folder / 'run'), **peers)
  finally:
    np.savez(folder / f'batches-{jax.process_index()}.npz', **seen)


if __name__ == '__main__':
  main(*sys.argv[1:])
