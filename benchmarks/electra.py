"""ELECTRA and a masked LM of the same encoder, pre-trained with the same FLOPs, then fine-tuned.

  python -m benchmarks electra --input=TEXTS --vocab=vocab.txt --glue=GLUE --steps=4000

Pre-trains a discriminator (with its generator) for `steps` steps and a masked LM for as many as
have the same model FLOPs, on the same rows, and fine-tunes both with each seed: dev scores side by
side.
"""

import json
import pathlib

import numpy as np

from benchmarks import machine
from bertjax import build, build_objective, finetune, pretrain
from bertjax.config import load_recipe

FLAGS = {
  'input': ('', 'data.input of pre-training'),
  'vocab': ('', 'data.vocab'),
  'glue': ('', 'folder of the GLUE tasks'),
  'workdir': ('runs/electra-benchmark', 'folder of the runs, which resume'),
  'steps': (4000, 'pre-training steps of ELECTRA'),
  'layers': (4, 'layers of the encoder'),
  'width': (128, 'width of the encoder, with heads of 64 units'),
  'generator_size': (0.5, "width of ELECTRA's generator as a fraction of the encoder's"),
  'batch_size': (32, 'rows of pre-training'),
  'length': (64, 'tokens of a row'),
  'learning_rate': (1e-3, 'peak of pre-training'),
  'tasks': ('sst2,mrpc', 'GLUE tasks, separated by commas'),
  'seeds': (3, 'fine-tuning runs of each task'),
  'max_train': (4000, 'training examples of a task'),
  'epochs': (3.0, 'epochs of fine-tuning'),
  'finetuning_rate': (2e-4, 'peak of fine-tuning'),
  'out': ('', 'JSON file to write'),
}
FOLDERS = {'sst2': 'SST-2', 'mrpc': 'MRPC', 'cola': 'CoLA', 'rte': 'RTE', 'stsb': 'STS-B'}


def run(input, vocab, glue, workdir, steps, layers, width, generator_size, batch_size, length,
        learning_rate, tasks, seeds, max_train, epochs, finetuning_rate, out):  # fmt: skip
  config = load_recipe('electra_small')
  config.update({'batch_size': batch_size, 'learning_rate': learning_rate, 'log_every': 100,
                 'generator_size': generator_size, 'max_eval_examples': 1024,
                 'eval_every': 1000, 'save_every': 500})  # fmt: skip
  config.model.update({
    'num_layers': layers, 'hidden_size': width, 'num_heads': max(1, width // 64),
    'mlp_size': 4 * width, 'max_positions': 128, 'dtype': 'float32',
  })  # fmt: skip
  config.data.update({'input': input, 'vocab': vocab, 'length': length})
  config.masking.max_predictions = round(0.15 * length)
  costs, result = {}, {'config': config.to_dict()}
  for objective in ('electra', 'mlm'):
    config.objective = objective
    model = build.make_model(config, len(pathlib.Path(vocab).read_text('utf-8').splitlines()))
    predictions = config.masking.max_predictions
    costs[objective] = batch_size * build_objective.train_flops(config, model, predictions)
  for objective in ('electra', 'mlm'):
    config.objective = objective
    if objective == 'mlm':  # BERT's own rates
      config.masking.mask_prob, config.masking.random_prob = 0.8, 0.1
    config.num_train_steps = round(steps * costs['electra'] / costs[objective])
    config.warmup_steps = config.num_train_steps // 10
    folder = pathlib.Path(workdir) / objective
    scores = pretrain.run(config, workdir=str(folder))
    result[objective] = {
      'steps': config.num_train_steps, 'flops': config.num_train_steps * costs[objective],
      'pretraining': scores,
      'tasks': {
        task: finetuned(folder, task, pathlib.Path(glue) / FOLDERS[task], seeds, max_train, epochs,
                        finetuning_rate)
        for task in tasks.split(',')
      },
    }  # fmt: skip
  result |= machine()
  for task in tasks.split(','):
    print(task, *(f'{name} {result[name]["tasks"][task]["summary"]}' for name in costs))
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result


def finetuned(folder, task, source, seeds, max_train, epochs, rate) -> dict:
  """The dev metric of the last step with each seed."""
  config = load_recipe(f'glue:{task}')
  config.update({'init_from': str(folder / 'model'), 'learning_rate': rate, 'batch_size': 32,
                 'num_train_epochs': epochs, 'save_model': 'last'})  # fmt: skip
  config.data.update({'source': str(source), 'length': 64, 'max_train_examples': max_train,
                      'test': ''})  # fmt: skip
  values = []
  for seed in range(seeds):
    config.seed = seed
    scores = finetune.run(config, workdir=str(folder / f'{task}-{seed}'))
    values.append(scores)
  main = 'accuracy'
  numbers = [scores[main] for scores in values]
  deviation = np.std(numbers, ddof=1) if seeds > 1 else 0.0
  return {'scores': values, 'summary': f'{np.mean(numbers):.4f} +- {deviation:.4f}'}
