"""The nine tasks of GLUE and its diagnostic set (Wang et al. 2018).

Data comes from the directories of the official download or from `tfds:glue/...`; scores are the
benchmark's metrics; predictions are written in the format of the leaderboard.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bertjax.objectives.labels import Class, Regression
from bertjax.tasks import classification, metrics
from bertjax.tasks.classification import Layout
from bertjax.tasks.task import Task, known_split, write_predictions

_MNLI = ('entailment', 'neutral', 'contradiction')
_BINARY = ('0', '1')
_RTE = ('entailment', 'not_entailment')
_PAIR = ('sentence1', 'sentence2')


class _Spec(NamedTuple):
  """A task: name of its leaderboard file, metrics, label names and columns."""

  upload: str
  metrics: tuple[str, ...]
  labels: tuple[str, ...]
  texts: tuple[str, ...]
  label: str
  tfds: tuple[str, ...] = ()  # text columns, if others


# Class numbers are those of TFDS and Hugging Face.
SPECS = {
  'cola': _Spec('CoLA', ('matthews', 'accuracy'), _BINARY, ('sentence',), 'label'),
  'sst2': _Spec('SST-2', ('accuracy',), _BINARY, ('sentence',), 'label'),
  'mrpc': _Spec('MRPC', ('f1', 'accuracy'), _BINARY, ('#1 String', '#2 String'), 'Quality', _PAIR),
  'stsb': _Spec('STS-B', ('spearman', 'pearson'), (), _PAIR, 'score'),
  'qqp': _Spec('QQP', ('f1', 'accuracy'), _BINARY, ('question1', 'question2'), 'is_duplicate'),
  'mnli': _Spec('MNLI', ('accuracy',), _MNLI, _PAIR, 'gold_label', ('premise', 'hypothesis')),
  'qnli': _Spec('QNLI', ('accuracy',), _RTE, ('question', 'sentence'), 'label'),
  'rte': _Spec('RTE', ('accuracy',), _RTE, _PAIR, 'label'),
  'wnli': _Spec('WNLI', ('accuracy',), _BINARY, _PAIR, 'label'),
  'ax': _Spec('AX', ('matthews', 'accuracy'), _MNLI, _PAIR, 'Label', ('premise', 'hypothesis')),
}  # fmt: skip


def glue(name: str, source: str = '', *, files: Mapping[str, str] | None = None) -> Task:
  """A task of GLUE by name.

  Args:
    name: 'cola', 'sst2', 'mrpc', 'stsb', 'qqp', 'mnli', 'qnli', 'rte', 'wnli', or 'ax', the
      diagnostic set, which an MNLI model predicts.
    source: the task's directory in the official layout, or 'tfds:glue/NAME'.
    files: split -> file name, if it differs from the official one.
  """
  spec = SPECS[name]
  layouts = _layouts(name, spec, source.startswith('tfds:'))
  for split, file in (files or {}).items():
    layouts[split] = known_split(split, layouts)._replace(file=file)
  make, measure = (Class, metrics.of_classes) if spec.labels else (Regression, metrics.correlations)
  label = make(spec.labels, spec.metrics)
  read = functools.partial(classification.read_texts, source=source, layouts=layouts, label=label)
  write = functools.partial(_write, spec)
  task = classification.text_task(name, label, measure, read, layouts, write)
  return task if spec.labels else dataclasses.replace(task, decode=_decode_similarity)


def _decode_similarity(items, encoded, logits, threshold: float = 0.0) -> np.ndarray:
  """STS-B's predictions [N] as the leaderboard takes them: from 0 to 5, with 3 decimals."""
  return np.clip(np.asarray(logits, np.float64).reshape(len(items)), 0, 5).round(3)


def _layouts(name: str, spec: _Spec, tfds: bool) -> dict[str, Layout]:
  """The splits in the official files, or in TFDS."""
  labelled = Layout('', spec.texts, spec.label)
  if name == 'qqp':
    labelled = labelled._replace(on_bad_row='skip')  # its train.tsv has malformed rows
  if tfds:
    named = spec.labels[:1] != ('0',)
    labelled = labelled._replace(texts=spec.tfds or spec.texts, label='label', named=named)
  unlabelled = labelled._replace(label='')
  if name == 'ax' and tfds:
    return {'test': unlabelled._replace(file='test')}
  if name == 'ax':  # the labels were published later, in a file with other columns
    full = Layout('diagnostic-full.tsv', ('Premise', 'Hypothesis'), 'Label')
    return {'dev': full, 'test': unlabelled._replace(file='diagnostic.tsv')}
  if name == 'cola' and not tfds:
    labelled = labelled._replace(texts=(3,), label=1)  # without a header
  end = '' if tfds else '.tsv'
  layouts = {'train': labelled._replace(file=f'train{end}')}
  variants = {'': '_matched', '_mismatched': '_mismatched'} if name == 'mnli' else {'': ''}
  for split, file, columns in (('dev', 'validation' if tfds else 'dev', labelled),
                               ('test', 'test', unlabelled)):  # fmt: skip
    for ours, theirs in variants.items():
      layouts[split + ours] = columns._replace(file=f'{file}{theirs}{end}')
  return layouts


def _write(spec: _Spec, folder, split, items, predictions):
  """Class names (0 and 1 where the files have them), similarities with 3 decimals."""
  lines = [spec.labels[p] if spec.labels else f'{p:.3f}' for p in predictions]
  name = spec.upload
  if name == 'MNLI':
    name += '-mm' if split.endswith('mismatched') else '-m'
  name += '' if split.startswith('test') else f'-{split}'
  return write_predictions(folder, name, items, lines)
