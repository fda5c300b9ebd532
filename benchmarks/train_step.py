"""Pre-training steps beside transformers on PyTorch: same sizes, rows, optimizer and dropout.

  python -m benchmarks train_step
  python -m benchmarks train_step --preset=base --rows=8 --compiled=0

Tokens are all positions of all rows. Transformers computes logits at all positions, ours only
at the masked ones, as Google's code does; `at equal FLOPs` is the ratio of FLOP/s, with each side's
model FLOPs. Our FLOP/s are also reported as a fraction of XLA's FLOP/s on one matmul of the MLP's
shape, which bounds them. With `--compiled=1` torch.compile runs as a third, which needs a C++
compiler.
"""

import dataclasses
import statistics

import jax
import jax.numpy as jnp

from benchmarks import measure, report
from benchmarks._pretraining import make_batch, ours, theirs
from bertjax.model import config as config_lib
from bertjax.model.flops import train_flops

FLAGS = {
  'preset': ('mini', 'sizes'),
  'rows': (32, 'of a batch'),
  'length': (128, 'tokens a row'),
  'predictions': (20, 'masked positions per sequence'),
  'dropout': (0.1, 'of states and attention'),
  'unroll': (1, 'layers of ours in an iteration of the loop'),
  'compiled': (1, 'also torch.compile'),
  'steps': (3, 'in a measured run'),
  'repeats': (5, 'measured runs after one warm-up'),
  'out': ('', 'JSON file to write'),
}


def run(preset, rows, length, predictions, dropout, unroll, compiled, steps, repeats, out):
  config = config_lib.PRESETS[preset](hidden_dropout=dropout, attention_dropout=dropout)
  batch = make_batch(config, rows, length, predictions)
  contenders = {
    'bertjax': ours(dataclasses.replace(config, unroll=unroll), batch, steps),
    'transformers, eager': theirs(config, batch, steps),
  }
  if compiled:
    contenders['transformers, torch.compile'] = theirs(config, batch, steps, compiled=True)
  rates = measure(contenders, repeats=repeats)
  share = train_flops(config, length, predictions) / train_flops(config, length, length)
  best = max(statistics.median(r) for who, r in rates.items() if who != 'bertjax')
  equal = statistics.median(rates['bertjax']) / best * share
  rate = statistics.median(rates['bertjax']) * train_flops(config, length, predictions) / length
  product = product_rate(rows * length, config.hidden_size, config.mlp_size)
  print(f'at equal FLOPs, against the faster: {equal:.2f}')
  print(f'{rate / 1e9:.0f} of {product / 1e9:.0f} GFLOP/s of one product: {rate / product:.2f}')
  name = f'train_step {preset} {rows}x{length}, dropout {dropout}, float32'
  facts = {'our_share_of_their_flops': share, 'ratio_at_equal_flops': equal,
           'flops_per_second': rate, 'product_flops_per_second': product}  # fmt: skip
  return report(name, rates, 'tokens/s', out, **facts)


def product_rate(m: int, k: int, n: int) -> float:
  """FLOP/s of [m, k] by [k, n] in float32, the median of ten."""
  a, b = jnp.ones((m, k)), jnp.ones((k, n))
  dot = jax.jit(jnp.dot)
  rates = measure({'product': lambda: dot(a, b).block_until_ready().size * 2 * k}, repeats=10)
  return statistics.median(rates['product'])
