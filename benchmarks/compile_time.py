"""Seconds to trace and compile a train step against depth: the layer loop, and unrolled.

  python -m benchmarks compile_time

The persistent compilation cache is off.
"""

import dataclasses
import json
import pathlib
import time

import jax

from benchmarks import machine
from benchmarks._pretraining import make_batch, our_program
from bertjax.model import config as config_lib

FLAGS = {
  'preset': ('mini', 'width of the layers'),
  'layers': ('2,6,12,24,48', 'depths'),
  'unrolled_to': (12, 'deepest that is also compiled unrolled'),
  'rows': (8, 'of a batch'),
  'length': (128, 'tokens a row'),
  'out': ('', 'JSON file to write'),
}


def run(preset, layers, unrolled_to, rows, length, out):
  jax.config.update('jax_enable_compilation_cache', False)
  results = []
  seconds(preset, rows, length, 1, 1)  # what only the first compilation of a process needs
  print('| layers | loop, s | unrolled, s |\n|---|---|---|')
  for depth in map(int, layers.split(',')):
    row = {'layers': depth, 'loop': seconds(preset, rows, length, depth, 1)}
    if depth <= unrolled_to:
      row['unrolled'] = seconds(preset, rows, length, depth, depth)
    print(f'| {depth} | {row["loop"]:.1f} | {row.get("unrolled", float("nan")):.1f} |', flush=True)
    results.append(row)
  result = {'benchmark': 'compile_time', 'preset': preset, 'rows': results, **machine()}
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result


def seconds(preset, rows, length, depth, unroll) -> float:
  config = dataclasses.replace(config_lib.PRESETS[preset](), num_layers=depth, unroll=unroll)
  step, state, batch = our_program(config, make_batch(config, rows, length, 20))
  start = time.perf_counter()
  step.lower(state, batch).compile()
  return time.perf_counter() - start
