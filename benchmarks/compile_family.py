"""AOT-compiles RoBERTa-base and ModernBERT-base for TPU slices: memory, FLOPs, largest batch.

  python -m benchmarks compile_family --out=benchmarks/results/compile_family.json

Needs libtpu and no TPU. The recipes as they are, data parallel, with the row lengths and kernels
below: each with some rows per chip, with twice as many, and with the most that should fit by the
line through these two, which must then compile. Cells that the JSON already holds are kept.
"""

import json
import pathlib

from benchmarks import machine
from bertjax import compile as compile_lib
from bertjax import plan
from bertjax.config import load_recipe

FLAGS = {
  'out': ('benchmarks/results/compile_family.json', 'JSON file; cells in it are kept'),
  'topologies': ('v6e:2x4,v5e:2x4', 'slices'),
  'largest': (1, 'also twice the rows and the largest batch'),
}
# Recipe, tokens per row, rows per chip, sequences per row, kernel, rematerialisation, slices.
CELLS = (
  ('roberta_base', 512, 8, 1, 'auto', 'none', 'v5e v6e'),
  ('modernbert_base', 1024, 4, 8, 'auto', 'none', 'v5e v6e'),
  ('modernbert_base', 8192, 1, 16, 'auto', 'none', 'v5e v6e'),
  ('modernbert_base', 1024, 4, 8, 'xla', 'none', 'v5e v6e'),
  ('modernbert_base', 8192, 1, 16, 'xla', 'dots', 'v6e'),
)
VOCAB_SIZES = {'roberta_base': 50265, 'modernbert_base': 50368}


def run(out: str, topologies: str, largest: int) -> None:
  path = pathlib.Path(out)
  cells = json.loads(path.read_text())['cells'] if path.exists() else {}

  def report(topology, cell, rows) -> dict:
    """That of so many rows per chip, compiled unless it is known."""
    name = f'{topology} {" ".join(map(str, cell[:2]))} {cell[4]} {cell[5]} {rows}'
    if name not in cells:
      found = compiled(topology, *cell[:2], rows, *cell[3:6])
      print(compile_lib.describe({'topology': topology} | found), flush=True)
      cells[name] = {'topology': topology, 'rows_per_chip': rows} | found
      path.write_text(json.dumps({'cells': cells, **machine()}, indent=1) + '\n')
    return cells[name]

  lines = ['| model, tokens per row | slice | kernel, remat | rows per chip | HBM, GB | compiled / '
           'model FLOPs | with kernels | largest batch per chip |', '|---' * 8 + '|']  # fmt: skip
  for largest_too in range(1 + largest):  # the table first, what takes longer afterwards
    for cell in CELLS:
      for topology in topologies.split(','):
        if topology[:3] in cell[6]:
          one = report(topology, cell, cell[2])
          if largest_too == largest:
            most = largest and largest_of(lambda n: report(topology, cell, n), one)  # noqa: B023
            lines.append(row(one, most or None))
  print('\n'.join(lines))


def compiled(topology, recipe, length, rows, sequences, attention, remat) -> dict:
  devices = compile_lib.slice_devices(topology)
  config = load_recipe(recipe)
  config.update_from_flattened_dict({
    'model.vocab_size': VOCAB_SIZES[recipe], 'model.attention': attention, 'model.remat': remat,
    'data.length': length, 'data.max_sequences_per_row': sequences,
    'batch_size': rows * len(devices),
  })  # fmt: skip
  (stage,) = plan.stages(config)
  return compile_lib.report_of(stage, devices)


def largest_of(report, one: dict) -> dict | None:
  """The report of the most rows per chip that compile, one at a time from the line's estimate."""
  if 'flops' not in one:
    return None
  rows, two = one['rows_per_chip'], report(2 * one['rows_per_chip'])
  if 'flops' not in two:
    return one
  each = (two['peak_bytes'] - one['peak_bytes']) / rows
  most = int(2 * rows + (one['hbm_bytes'] - two['peak_bytes']) / each)
  for rows in range(most, 0, -max(1, most // 20)):
    if 'flops' in (found := report(rows)):
      return found
  return one


def row(cell: dict, most: dict | None) -> str:
  model = cell['model']
  start = (
    f'| {cell["parameters"] / 1e6:.0f} M, {cell["length"]:,} | {cell["topology"]} | '
    f'{model["attention"]}, {model["remat"]} | {cell["rows_per_chip"]} |'
  )
  if 'flops' not in cell:
    return f'{start} {cell["does_not_fit"]} |'
  kernels = cell['product_flops'] + cell['kernel_flops']
  largest = f'{most["rows_per_chip"]} ({most["peak_bytes"] / 1e9:.1f} GB)' if most else ''
  return (
    f'{start} {cell["peak_bytes"] / 1e9:.1f} of {cell["hbm_bytes"] / 1e9:.0f} | '
    f'{cell["flops"] / cell["model_flops"]:.3f} | {kernels / cell["model_flops"]:.3f} | '
    f'{largest} |'
  )
