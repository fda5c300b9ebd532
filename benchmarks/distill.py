"""A student with and without a teacher on a GLUE task, from the same weights, with several seeds.

  python -m benchmarks distill --model=MODEL --source=GLUE/SST-2

Fine-tunes all layers of MODEL (the teacher), then students that start from some of its layers: on
the labels only, and on the labels and the teacher's soft targets.
"""

import json
import pathlib

import numpy as np

from benchmarks import machine
from bertjax import finetune
from bertjax.config import load_recipe

FLAGS = {
  'model': ('', 'init_from of the teacher and the students'),
  'source': ('', 'data.source'),
  'task': ('sst2', 'a GLUE task with accuracy'),
  'layers': ('0,5', 'init_layers of the students'),
  'workdir': ('runs/distill-benchmark', 'folder of the runs, which resume'),
  'seeds': (3, 'runs of each student'),
  'max_train': (2000, 'training examples'),
  'teacher_train': (4000, 'training examples of the teacher'),
  'epochs': (3.0, 'epochs of the teacher'),
  'student_epochs': (6.0, 'epochs of the students'),
  'learning_rate': (1e-4, 'peak'),
  'temperature': (2.0, 'distill.temperature'),
  'soft_weight': (0.9, 'distill.soft_weight'),
  'length': (48, 'tokens of a row'),
  'out': ('', 'JSON file to write'),
}


def run(model, source, task, layers, workdir, seeds, max_train, teacher_train, epochs,
        student_epochs, learning_rate, temperature, soft_weight, length, out):  # fmt: skip
  config = load_recipe(f'glue:{task}')
  config.update({'init_from': model, 'learning_rate': learning_rate, 'num_train_epochs': epochs,
                 'save_model': 'last', 'schedule': 'linear'})  # fmt: skip
  config.data.update({'source': source, 'length': length, 'max_train_examples': teacher_train,
                      'test': ''})  # fmt: skip
  config.optimizer.name, folder = 'adamw', pathlib.Path(workdir)
  result: dict = {'teacher': finetune.run(config, workdir=str(folder / 'teacher'))}
  config.data.max_train_examples, config.num_train_epochs = max_train, student_epochs
  config.init_layers = layers
  for name, teacher in (('alone', ''), ('distilled', str(folder / 'teacher' / 'model'))):
    config.distill.update({'teacher': teacher, 'temperature': temperature,
                           'soft_weight': soft_weight})  # fmt: skip
    scores = []
    for seed in range(seeds):
      config.seed = seed
      scores.append(finetune.run(config, workdir=str(folder / f'{name}-{seed}'))['accuracy'])
    spread = float(np.std(scores, ddof=1)) if seeds > 1 else 0.0
    result[name] = {'accuracy': scores, 'mean': float(np.mean(scores)), 'deviation': spread}
  result |= machine()
  print(json.dumps(result, indent=1))
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result
