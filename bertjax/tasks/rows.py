"""From a config's task and data to encoded rows, made at the start of a run or prepared before."""

import inspect
import logging

import numpy as np

from bertjax.data import dataset
from bertjax.tasks import TASKS
from bertjax.tasks.task import Encoded, Task, columns, golds

_log = logging.getLogger(__name__)


def make_task(config) -> Task:
  """The task that a config names, with `data.source`, `data.files` and `data.options`.

  Raises:
    ValueError: if a part is missing, unknown or not written as it must be.
  """
  if config.task not in TASKS:
    raise ValueError(f'unknown task {config.task!r}; known are {", ".join(TASKS)}.')
  if not (config.data.source or config.data.files):
    raise ValueError(f'{config.task} needs its data: --config.data.source=FOLDER.')
  make = TASKS[config.task]
  options = _options(config.task, make, _pairs('data.options', config.data.options))
  if config.span_loss_includes_padding:
    if 'loss_includes_padding' not in inspect.signature(make).parameters:
      raise ValueError(
        f'span_loss_includes_padding is for SQuAD, got task={config.task!r}; leave it False.'
      )
    options['loss_includes_padding'] = True
  return make(config.data.source, files=_pairs('data.files', config.data.files), **options)


def _pairs(field: str, text: str) -> dict[str, str]:
  """'a=b,c=d' as a dict."""
  named = [part.partition('=') for part in text.split(',') if part]
  if not all(name and value for name, _, value in named):
    raise ValueError(f"{field} is written 'split=file,split=file', got {text!r}."
                     if field == 'data.files' else
                     f"{field} is written 'name=value,name=value', got {text!r}.")  # fmt: skip
  return {name.strip(): value.strip() for name, _, value in named}


def _options(name: str, make, given: dict[str, str]) -> dict:
  """Options as the task's function takes them: numbers, True and False, lists joined by |."""
  known = {
    p.name: p for p in inspect.signature(make).parameters.values() if p.kind == p.KEYWORD_ONLY
  }
  for fixed in ('files', *getattr(make, 'keywords', {})):
    known.pop(fixed, None)
  unknown = [option for option in given if option not in known]
  missing = [o for o, p in known.items() if p.default is p.empty and o not in given]
  if unknown or missing:
    problem = f'needs {missing[0]!r}' if missing else f'has no option {unknown[0]!r}'
    raise ValueError(
      f'{name} {problem}; write --config.data.options=name=value,name=value with '
      f'{", ".join(known) or "none"}.'
    )
  return {option: _typed(value, known[option]) for option, value in given.items()}


def _typed(value: str, parameter: inspect.Parameter):
  kind = str(parameter.annotation)
  if value.lstrip('-').isdecimal() and 'int' in kind:
    return int(value)
  if 'Sequence' in kind:
    return tuple(int(v) if v.isdecimal() and 'int' in kind else v for v in value.split('|'))
  if parameter.annotation is bool and value.lower() in ('true', 'false'):
    return value.lower() == 'true'
  wanted = {bool: 'True or False', int: 'a whole number'}.get(parameter.annotation)
  if wanted:
    raise ValueError(f'data.options: {parameter.name} must be {wanted}, got {value!r}.')
  return value


def sample(examples: list, most: int, seed: int) -> list:
  """The first `most` of a shuffle; all, in their order, for 0."""
  if not most or most >= len(examples):
    return examples
  return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:most]]


def encode(task: Task, examples, tokenizer, length: int, split: str) -> Encoded:
  """Encodes examples; logs their labels and what was cut."""
  _log.info('%s: labels  %s', split, describe_labels(task, examples))
  encoded = task.encode(examples, tokenizer, length)
  told = '  '.join(f'{name} {count:,}' for name, count in encoded.counts.items())
  _log.info('%s: examples %s  rows %s  %s', split, f'{len(examples):,}',
            f'{len(encoded.columns["input_ids"]):,}', told)  # fmt: skip
  return encoded


def describe_labels(task: Task, examples) -> str:
  """The labels of examples with their counts, the most frequent first; numbers by their range."""
  labels = [e.label for e in examples if e.label is not None]
  none = len(examples) - len(labels)
  return '  '.join([*task.label.describe(labels), *([f'(none) {none:,}'] if none else [])])


def training_examples(config, task: Task) -> list:
  """The labelled examples to train on, the first `data.max_train_examples` of a shuffle."""
  examples = task.read(config.data.train)
  golds(examples)
  examples = task.trainable(examples)
  return sample(examples, config.data.max_train_examples, config.seed)


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
  named = ('length', 'train', 'max_train_examples', 'options', 'files')
  chosen = {name: config.data[name] for name in named} | {'labels': list(task.labels)}
  if config.data.max_train_examples:
    chosen['seed'] = config.seed  # of the sample
  return {'task': config.task, 'tokenizer': tokenizer.fingerprint, 'settings': chosen}
