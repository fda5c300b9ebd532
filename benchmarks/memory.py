"""Memory of train steps, beside transformers': peak of the process, each measured separately.

  python -m benchmarks memory

Each contender runs three steps in a separate process on the CPU. What counts is the peak of the
resident memory over that before the first step, when model, moments and batch are there already.
"""

import dataclasses
import json
import pathlib
import resource
import subprocess
import sys

from benchmarks import machine
from benchmarks._pretraining import make_batch, ours, theirs
from bertjax.model import config as config_lib

FLAGS = {
  'preset': ('mini', 'sizes'),
  'rows': (32, 'of a batch'),
  'length': (128, 'tokens a row'),
  'dropout': (0.1, 'of states and attention'),
  'only': ('', 'measure this one here: what each process does'),
  'out': ('', 'JSON file to write'),
}

CONTENDERS = ('bertjax', 'bertjax, remat dots', 'bertjax, remat full', 'transformers, eager')


def run(preset, rows, length, dropout, only, out):
  if only:
    config = config_lib.PRESETS[preset](hidden_dropout=dropout, attention_dropout=dropout)
    print(json.dumps(grown(only, config, rows, length)))
    return None
  found = {}
  for name in CONTENDERS:
    command = [sys.executable, '-m', 'benchmarks', *sys.argv[1:], f'--only={name}']
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found[name] = json.loads(done.stdout.splitlines()[-1])
  print(f'| memory of a step, {preset} {rows}x{length} | MB | of ours |\n|---|---|---|')
  for name, size in found.items():
    print(f'| {name} | {size / 1e6:,.0f} | {size / found["bertjax"]:.2f} |')
  result = {'benchmark': 'memory', 'bytes': found, **machine()}
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result


def grown(name: str, config, rows: int, length: int) -> int:
  """Bytes by which the peak grows."""
  batch = make_batch(config, rows, length, 20)
  if name.startswith('bertjax'):
    remat = name.rpartition('remat ')[2] if 'remat' in name else 'none'
    once = ours(dataclasses.replace(config, remat=remat), batch, 3)
  else:
    once = theirs(config, batch, 3)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  once()
  return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
