"""Tokens/s of our train step against one size at a time: length, rows, layers.

  python -m benchmarks scaling

The first line is where the others start from.
"""

import dataclasses

from benchmarks import measure, report
from benchmarks._pretraining import make_batch, ours
from bertjax.model import config as config_lib

FLAGS = {
  'preset': ('mini', 'sizes to start from'),
  'rows': (8, 'of a batch, to start from'),
  'lengths': ('64,256,512', 'tokens a row; it starts from 128'),
  'batches': ('16,32', 'rows'),
  'layers': ('2,8,16', 'depths'),
  'steps': (2, 'in a measured run'),
  'repeats': (3, 'measured runs after one warm-up'),
  'out': ('', 'JSON file to write'),
}


def run(preset, rows, lengths, batches, layers, steps, repeats, out):
  sizes = config_lib.PRESETS[preset]()
  start = {'layers': sizes.num_layers, 'rows': rows, 'length': 128}
  settings = [start]
  for name, values in (('length', lengths), ('rows', batches), ('layers', layers)):
    settings += [start | {name: int(value)} for value in values.split(',') if value]
  rates = {}
  for setting in settings:  # one at a time: their states need not fit together
    config = dataclasses.replace(sizes, num_layers=setting['layers'])
    length = setting['length']
    batch = make_batch(config, setting['rows'], length, max(1, length * 3 // 20))
    name = ', '.join(f'{key} {value}' for key, value in setting.items())
    rates |= measure({name: ours(config, batch, steps)}, repeats=repeats)
  return report(f'scaling {preset}', rates, 'tokens/s', out)
