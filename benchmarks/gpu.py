"""Encoders on one GPU beside transformers on the same card, then a real pre-training run.

  python -m benchmarks gpu --out=gpu.json
  python -m benchmarks gpu --prepared=DIR --workdir=RUN --minutes=8 --out=gpu.json

Needs `jax[cuda13]` and no TensorFlow; transformers takes part if torch finds the card. bfloat16;
the median of the measured runs. MFU counts `model.flops` against the data sheet in
`training.hardware`, each side's own FLOPs: transformers' logits at all positions are work too.
transformers is measured first, since JAX keeps the memory that it once had. Ids are as frequent as
in a text. Rows of ModernBERT have no dropout; ours are packed with documents of 256 to 1,024
tokens, theirs are one document each, as they pack with another library only. A size that does not
fit is reported. `--prepared` is a folder of `bertjax prepare` with rows of 128 tokens; the run's
curve is in the workdir.
"""

import gc
import importlib.util
import itertools
import json
import os
import pathlib
import statistics

# JAX would take three quarters of the memory at once, and torch is to have its share.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import numpy as np

from benchmarks import machine, measure
from benchmarks._pretraining import is_modernbert, make_batch, ours
from benchmarks._pretraining import theirs as baseline
from bertjax import pretrain
from bertjax.config import load_recipe
from bertjax.model import config as config_lib
from bertjax.model.flops import train_flops
from bertjax.model.heads import Bert
from bertjax.training import hardware, metrics

FLAGS = {
  'sizes': (
    'base:128,base:512,large:128,large:512,modernbert_base:1024,modernbert_base:8192',
    'presets and tokens a row',
  ),
  'tokens': ('32768', 'of a batch, swept'),
  'dropouts': ('0.1,0.0', 'of states and attention, swept where the preset has dropout'),
  'bits': ('threefry2x32,rbg', 'prng_impl of ours, swept where there is dropout'),
  'unroll': (0, 'layers an iteration of ours; 0 = all'),
  'theirs': ('eager,torch.compile', 'ways to run transformers; none if empty'),
  'steps': (10, 'in a measured run'),
  'repeats': (3, 'measured runs after one warm-up'),
  'prepared': ('', 'rows to pre-train on; none: no run'),
  'workdir': ('', 'of that run'),
  'recipe': ('bert_base', 'of that run'),
  'batch_size': (256, 'of that run'),
  'learning_rate': (0.0, "of that run; 0 = the recipe's"),
  'minutes': (8.0, 'of that run'),
  'out': ('', 'JSON file to write'),
}


def run(sizes, tokens, dropouts, bits, unroll, theirs, steps, repeats, prepared, workdir, recipe,
        batch_size, learning_rate, minutes, out):  # fmt: skip
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
  sides = [{'bits': (), 'theirs': _list(theirs)}, {'bits': _list(bits), 'theirs': ()}]
  for side, size in itertools.product(sides, _list(sizes)):
    preset, length = size.split(':')
    dropout = config_lib.PRESETS[preset]().hidden_dropout > 0
    for count, rate in itertools.product(_list(tokens), _list(dropouts) if dropout else ['0']):
      config = config_lib.PRESETS[preset](
        dtype='bfloat16', hidden_dropout=float(rate), attention_dropout=float(rate),
        unroll=unroll,
      )  # fmt: skip
      rows = int(count) // int(length)
      for cell in measure_cell(config, rows, int(length), **side, steps=steps, repeats=repeats):
        cell = {'model': preset} | cell
        _finish(cell, sheet)
        result['cells'].append(cell)
        write()
  if prepared:
    result['run'] = pretrain_for(recipe, prepared, workdir, batch_size, learning_rate, minutes)
    write()
  return result


def measure_cell(config, rows, length, bits, theirs, steps, repeats):
  """Yields what each contender did at one size, one at a time, so that all may fill the card."""
  modern = is_modernbert(config)
  predictions = length * 3 // 10 if modern else 20 if length <= 128 else 76
  batch = make_batch(config, rows, length, predictions)
  packed = batch | packed_rows(rows, length) if modern else batch
  bert = Bert(config, heads=('mlm',), pooler=False) if modern else None
  contenders = {}
  for kind in bits if config.hidden_dropout else bits[:1]:
    contenders[f'bertjax, {kind}'] = lambda kind=kind: ours(config, packed, steps, kind, bert)
  for way in theirs if torch_sees_gpu() else ():
    contenders[f'transformers, {way}'] = lambda way=way: baseline(
      config, batch, steps, compiled=way == 'torch.compile', device='cuda'
    )
  for who, make in contenders.items():
    slots = predictions if who.startswith('bertjax') else length
    cell = {'rows': rows, 'length': length, 'dropout': config.hidden_dropout, 'who': who,
            'flops_per_token': train_flops(config, length, slots) / length}  # fmt: skip
    try:
      once = make()
      cell['tokens_per_second'] = measure({who: once}, repeats=repeats)[who]
    except RuntimeError as error:  # jax's and torch's, both of this type
      if 'RESOURCE_EXHAUSTED' not in str(error) and 'out of memory' not in str(error):
        raise
      cell['failed'] = 'out of memory'
    once = None
    _free()
    yield cell


def packed_rows(rows: int, length: int) -> dict:
  """Segments and positions of rows filled with documents of 256 to 1,024 tokens."""
  rng = np.random.default_rng(0)
  segments, positions = np.zeros((2, rows, length), np.int32)
  for row in range(rows):
    start, number = 0, 1
    while start < length:
      end = min(length, start + int(rng.integers(256, 1025)))
      segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
      start, number = end, number + 1
  return {'segment_ids': segments, 'position_ids': positions}


def torch_sees_gpu() -> bool:
  if not (importlib.util.find_spec('torch') and importlib.util.find_spec('transformers')):
    return False
  import torch

  return torch.cuda.is_available()


def pretrain_for(recipe, prepared, workdir, batch_size, learning_rate, minutes) -> dict:
  """Pre-trains for about so many minutes, compilation and evaluation apart; returns the curve."""
  config = load_recipe(recipe)
  config.data.prepared, config.batch_size = prepared, batch_size
  config.learning_rate = learning_rate or config.learning_rate
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
