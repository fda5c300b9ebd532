"""AOT-compiles BERT-base and -large for TPU slices: memory, FLOPs and the roofline bound of a step.

  python -m benchmarks compile_table --out=benchmarks/results/compile.json

Needs libtpu and no TPU. 4,096 tokens a chip for base, 2,048 for large, bfloat16, data parallel;
without dropout and with 0.1. Cells that the JSON already holds are not compiled again; each takes
half a minute to a minute and a half.
"""

import json
import pathlib

from benchmarks import machine
from bertjax import compile as compile_lib
from bertjax import plan
from bertjax.config import load_recipe

FLAGS = {
  'out': ('benchmarks/results/compile.json', 'JSON file; cells in it are kept'),
  'topologies': ('v5e:2x4,v5e:16x16,v5p:4x4x8,v6e:16x16', 'slices'),
}


def run(out: str, topologies: str) -> None:
  path = pathlib.Path(out)
  cells = json.loads(path.read_text())['cells'] if path.exists() else {}
  for dropout in (0.0, 0.1):
    for topology in topologies.split(','):
      devices = compile_lib.slice_devices(topology)
      for size, tokens in (('base', 4096), ('large', 2048)):
        for length, predictions in ((128, 20), (512, 76)):
          name = f'{size} {length} {topology} {dropout}'
          if name in cells:
            continue
          config = load_recipe(f'bert_{size}')
          config.model.attention = 'xla'  # the FLOPs of kernels are not in the program's text
          config.data.length, config.masking.max_predictions = length, predictions
          config.model.hidden_dropout = config.model.attention_dropout = dropout
          config.batch_size = tokens // length * len(devices)
          (stage,) = plan.stages(config)
          report = compile_lib.report_of(stage, devices)
          print(compile_lib.describe({'topology': topology} | report), flush=True)
          cells[name] = {'topology': topology} | report
          path.write_text(json.dumps({'cells': cells, **machine()}, indent=1) + '\n')
  print(table(cells))


def table(cells: dict) -> str:
  """One row for each model and slice; without dropout unless said."""
  rows = [
    '| model | slice | HBM, GB, dropout 0.0; 0.1 | compiled / model FLOPs, 0.0; 0.1 | '
    'bound, ms per step | tokens/s | MFU | bound by |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for name, cell in cells.items():
    size, length, topology, dropout = name.split()
    if float(dropout):
      continue
    both = [cell, cells.get(f'{size} {length} {topology} 0.1', {})]
    hbm = '; '.join(f'{c["peak_bytes"] / 1e9:.1f}' if 'flops' in c else '-' for c in both)
    flops = '; '.join(f'{c["flops"] / c["model_flops"]:.3f}' if 'flops' in c else '-' for c in both)
    row = f'| {size} {length} | {topology} |'
    if 'flops' in cell:
      row += (
        f' {hbm} of {cell["hbm_bytes"] / 1e9:.0f} | {flops} | {cell["step_seconds"] * 1e3:.1f} | '
        f'{cell["tokens_per_second"]:,.0f} | {cell["mfu"]:.2f} | '
        f'{max(cell["bound_seconds"], key=cell["bound_seconds"].get)} |'
      )
    rows.append(row if 'flops' in cell else f'{row} {cell["does_not_fit"]} |')
  return '\n'.join(rows)
