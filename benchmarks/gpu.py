"""BERT on one GPU beside transformers on the same card, then a real pre-training run.

  python -m benchmarks gpu --out=gpu.json
  python -m benchmarks gpu --prepared=DIR --workdir=RUN --minutes=8 --out=gpu.json

Needs `jax[cuda13]` and no TensorFlow; transformers takes part if torch finds the card. bfloat16;
the median of the measured runs. MFU counts `model.flops` against the data sheet in
`training.hardware`, each side's own FLOPs: transformers' logits at all positions are work too.
A size that does not fit is reported. `--prepared` is a folder of `bertjax prepare` with
rows of 128 tokens; the run's curve is in the workdir.
"""

import gc
import importlib.util
import json
import os
import pathlib
import statistics

# JAX would take three quarters of the memory at once, and torch is to have its share.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax

from benchmarks import machine, measure
from benchmarks._pretraining import make_batch, ours, theirs
from bertjax import pretrain
from bertjax.config import load_recipe
from bertjax.model import config as config_lib
from bertjax.model.flops import train_flops
from bertjax.training import hardware, metrics

FLAGS = {
  'presets': ('base,large', 'sizes'),
  'lengths': ('128,512', 'tokens a row'),
  'tokens': ('8192,32768,131072', 'of a batch, swept'),
  'dropouts': ('0.1,0.0', 'of states and attention'),
  'bits': ('threefry2x32,rbg', 'prng_impl of ours, swept where there is dropout'),
  'steps': (10, 'in a measured run'),
  'repeats': (3, 'measured runs after one warm-up'),
  'prepared': ('', 'rows to pre-train on; none: no run'),
  'workdir': ('', 'of that run'),
  'recipe': ('bert_base', 'of that run'),
  'batch_size': (256, 'of that run'),
  'minutes': (8.0, 'of that run'),
  'out': ('', 'JSON file to write'),
}


def run(presets, lengths, tokens, dropouts, bits, steps, repeats, prepared, workdir, recipe,
        batch_size, minutes, out):  # fmt: skip
  if prepared and not workdir:
    raise ValueError('the run on --prepared needs a --workdir.')
  device = jax.devices()[0]
  sheet = hardware.chip(device.device_kind)
  result = {'benchmark': 'gpu', 'device': device.device_kind, 'cells': [], **machine()}

  def write():
    if out:
      pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')

  print(
    '| model | rows x length | dropout | who | tokens/s | min..max | MFU |\n' + '|---' * 7 + '|'
  )
  for preset in _list(presets):
    for length in map(int, _list(lengths)):
      for rows in [int(n) // length for n in _list(tokens)]:
        for dropout in map(float, _list(dropouts)):
          for cell in measure_cell(preset, rows, length, dropout, _list(bits), steps, repeats):
            _finish(cell, sheet)
            result['cells'].append(cell)
            write()
  if prepared:
    result['run'] = pretrain_for(recipe, prepared, workdir, batch_size, minutes)
    write()
  return result


def measure_cell(preset, rows, length, dropout, bits, steps, repeats):
  """Yields what each contender did at one size, one at a time, so that all may fill the card."""
  config = config_lib.PRESETS[preset](
    dtype='bfloat16', hidden_dropout=dropout, attention_dropout=dropout
  )
  predictions = 20 if length <= 128 else 76
  batch = make_batch(config, rows, length, predictions)
  contenders = {}
  for kind in bits if dropout else bits[:1]:
    contenders[f'bertjax, {kind}'] = lambda kind=kind: ours(config, batch, steps, kind)
  if torch_sees_gpu():
    for compiled in (False, True):
      name = f'transformers, {"torch.compile" if compiled else "eager"}'
      contenders[name] = lambda compiled=compiled: theirs(
        config, batch, steps, compiled=compiled, device='cuda'
      )
  for who, make in contenders.items():
    slots = predictions if who.startswith('bertjax') else length
    cell = {'model': preset, 'rows': rows, 'length': length, 'dropout': dropout, 'who': who,
            'flops_per_token': train_flops(config, length, slots) / length}  # fmt: skip
    try:
      cell['tokens_per_second'] = measure({who: make()}, repeats=repeats)[who]
    except RuntimeError as error:  # jax's and torch's, both of this type
      if 'RESOURCE_EXHAUSTED' not in str(error) and 'out of memory' not in str(error):
        raise
      cell['failed'] = 'out of memory'
    _free()
    yield cell


def torch_sees_gpu() -> bool:
  if not (importlib.util.find_spec('torch') and importlib.util.find_spec('transformers')):
    return False
  import torch

  return torch.cuda.is_available()


def pretrain_for(recipe, prepared, workdir, batch_size, minutes) -> dict:
  """Pre-trains for about so many minutes, compilation and evaluation apart; returns the curve."""
  config = load_recipe(recipe)
  config.data.prepared, config.batch_size = prepared, batch_size
  model = config_lib.EncoderConfig(**(config.model.to_dict() | {'vocab_size': 30522}))
  batch = make_batch(model, batch_size, config.data.length, config.masking.max_predictions)
  rates = measure({'ours': ours(model, batch, 5)}, repeats=3)['ours']
  _free()
  config.num_train_steps = round(60 * minutes * statistics.median(rates) / batch['input_ids'].size)
  config.warmup_steps = config.num_train_steps // 10
  config.log_every = max(1, config.num_train_steps // 50)
  config.eval_every = max(1, config.num_train_steps // 4)
  print(f'pre-training {config.num_train_steps} steps of {batch_size} rows')
  scores = pretrain.run(config, workdir=workdir)
  rows = metrics.read_metrics(workdir)
  return {
    'steps': config.num_train_steps,
    'batch_size': batch_size,
    'scores': scores,
    'curve': rows,
  }


def _finish(cell, sheet):
  rates = cell.get('tokens_per_second')
  rate, span, mfu = '', cell.get('failed'), ''
  if rates:
    middle = statistics.median(rates)
    rate, span = f'{middle:,.0f}', f'{min(rates):,.0f}..{max(rates):,.0f}'
    if sheet:
      cell['mfu'] = middle * cell['flops_per_token'] / sheet.flops
      mfu = f'{cell["mfu"]:.1%}'
  row = [cell['model'], f'{cell["rows"]}x{cell["length"]}', cell['dropout'], cell['who']]
  print('| ' + ' | '.join(map(str, [*row, rate, span, mfu])) + ' |', flush=True)


def _free():
  """Drops the arrays and programs of a contender, and what torch keeps for later."""
  gc.collect()
  jax.clear_caches()
  if torch_sees_gpu():
    import torch

    torch.cuda.empty_cache()
    torch._dynamo.reset()


def _list(text: str) -> list[str]:
  return [item for item in text.split(',') if item]
