"""Fine-tuning steps on texts of many lengths: packed, in length buckets, padded, and transformers.

  python -m benchmarks finetune_step --config=glue:sst2 --source=GLUE/SST-2 --model=MODEL

All do the same steps on the same examples, with dropout. Tokens are those of the texts, without
padding. Transformers' batches are padded to their longest example.
"""

import functools

import jax
import numpy as np

from benchmarks import measure, report
from benchmarks.finetune import transformers_twin
from bertjax import finetune
from bertjax.config import load_recipe
from bertjax.training import layout as layout_lib

FLAGS = {
  'config': ('glue:sst2', 'a recipe of configs/finetune'),
  'source': ('', 'data.source'),
  'model': ('', 'init_from'),
  'batch_size': (32, 'examples'),
  'length': (128, 'tokens a row'),
  'pack': (128, 'tokens of a packed row'),
  'steps': (10, 'in a measured run'),
  'repeats': (5, 'measured runs after one warm-up'),
  'out': ('', 'JSON file to write'),
}


def run(config, source, model, batch_size, length, pack, steps, repeats, out):
  name, config = config, load_recipe(config)
  setups = make_setups(config, source, model, batch_size, length, pack, steps)
  single = next(reversed(setups.values()))
  batches = [single.batches.training(step) for step in range(steps)]
  texts = sum(int((batch['segment_ids'] > 0).sum()) for batch in batches)
  contenders = {way: ours(setup, steps, texts) for way, setup in setups.items()}
  contenders['transformers, eager'] = theirs(single, batches, texts)
  shapes = {
    way: sorted({setup.batches.training(step)['input_ids'].shape for step in range(steps)})
    for way, setup in setups.items()
  }
  rates = measure(contenders, repeats=repeats)
  title = f'finetune_step {name}, batch {batch_size}'
  facts = {'shapes': shapes, 'buckets': load_recipe(name).data.buckets,
           'tokens_of_an_example': texts / steps / batch_size}  # fmt: skip
  return report(title, rates, 'tokens of text/s', out, **facts)


def make_setups(config, source, model, batch_size, length, pack, steps) -> dict:
  """{what is done about lengths: a `finetune.Setup`}: packed, in length buckets, padded."""
  config.update({'init_from': model, 'batch_size': batch_size})
  config.data.update(
    {'source': source, 'length': length, 'max_train_examples': 20 * batch_size * steps}
  )
  config.optimizer.name = 'adamw'
  ways = {f'bertjax, packed into {pack}': {'data.packed_length': pack},
          'bertjax, length buckets': {'data.packed_length': 0},
          f'bertjax, padded to {length}': {'data.buckets': ''}}  # fmt: skip
  setups = {}
  for way, changes in ways.items():
    config.update_from_flattened_dict(changes)
    setups[way] = finetune.set_up(config.copy_and_resolve_references())
  return setups


def ours(setup, steps: int, texts: int):
  """A contender: the first steps of a run, in tokens of text."""
  state, shardings, _ = layout_lib.restore_or_init(
    setup.objective, setup.optimizer, setup.layout, load=functools.partial(finetune.load, setup)
  )
  step = setup.layout.train_step(setup.objective, setup.optimizer, shardings)

  def once():
    nonlocal state
    for number in range(steps):
      state, metrics = step(state, setup.batches.training(number))
    assert np.isfinite(jax.device_get(metrics['loss']))
    return texts

  return once


def theirs(setup, batches, texts: int):
  """A contender: the same steps by a plain loop, each batch padded to its longest example."""
  peer = transformers_twin(setup, train_padding=False)
  cut = []
  for batch in batches:
    longest = int((batch['segment_ids'] > 0).sum(1).max())
    per_token = ('input_ids', 'token_type_ids', 'segment_ids')
    cut.append(batch | {name: batch[name][:, :longest] for name in per_token})

  def once():
    for batch in cut:
      assert np.isfinite(peer.step(batch, 1e-5))
    return texts

  return once
