"""From a config's task and data to encoded rows, made at the start of a run or prepared before."""

import numpy as np

from bertjax import tasks
from bertjax.data import dataset
from bertjax.tasks import task as task_lib
from bertjax.tasks.task import Task, columns
from bertjax.tasks.task import encode_split as encode

_LISTS = ('labels', 'endings', 'types')  # fields of several names, joined by |


def make_task(config) -> Task:
  """The task that a config describes in `task` and `data`.

  Raises:
    ValueError: if a part is missing, unknown or not an option of the task.
  """
  data, name = config.data, config.task.name
  given = config.task.to_dict()
  del given['name']
  for option in _LISTS:
    given[option] = tuple(part for part in given[option].split('|') if part)
  if config.span_loss_includes_padding:
    if not name.startswith('squad'):
      raise ValueError(f'span_loss_includes_padding is for SQuAD, got {name!r}; leave it False.')
    given['loss_includes_padding'] = True
  files = {split: data[f'{split}_file'] for split in ('train', 'dev', 'test')}
  files = {split: file for split, file in files.items() if file}
  return tasks.make_task(name, data.source, files=files, dev_fraction=data.dev_fraction, **given)


def training_examples(config, task: Task) -> list:
  """The labelled examples to train on, a random subset of `data.max_train_examples`."""
  data = config.data
  return task_lib.training_examples(task, data.train, data.max_train_examples, config.seed)


def training_columns(config, task: Task, tokenizer) -> dict[str, np.ndarray]:
  """The rows to train on: encoded now, or read from `data.prepared`.

  Raises:
    ValueError: if the prepared rows are not those that this config would make.
  """
  if not config.data.prepared:
    examples = training_examples(config, task)
    return encode(task, examples, tokenizer, config.data.length, config.data.train).columns
  rows = dataset.Dataset(config.data.prepared, 'train')
  wanted = _settings(config, task, tokenizer)
  found = {name: rows.manifest.get(name) for name in wanted}
  if found != wanted:
    raise ValueError(
      f'{config.data.prepared} was prepared with {found}, this run wants {wanted}; prepare again.'
    )
  return rows[np.arange(len(rows))]


def prepare(config, task: Task, tokenizer, out: str) -> dict:
  """Writes the training rows of a task for `data.prepared`; returns the manifest."""
  settings = _settings(config, task, tokenizer)
  layout = columns(task, config.data.length, tokenizer.vocab_size)
  found = training_columns(config, task, tokenizer)
  writer = dataset.Writer(out, settings, layout)
  tokenizer.save(writer.folder)
  writer.add_shard('train', 0, [found])
  writer.finish({'train': 1, 'heldout': 0}, **settings)
  return dataset.read_manifest(out)


def _settings(config, task, tokenizer) -> dict:
  named = ('length', 'train', 'max_train_examples', 'train_file', 'dev_file', 'dev_fraction')
  chosen = {name: config.data[name] for name in named} | {'labels': list(task.labels)}
  if config.data.max_train_examples:
    chosen['seed'] = config.seed  # of the sample
  return {'task': config.task.to_dict(), 'tokenizer': tokenizer.fingerprint, 'settings': chosen}
