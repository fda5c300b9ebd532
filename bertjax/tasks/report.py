"""HTML report of a fine-tuned model: scores, baseline, curves, calibration and mistakes."""

import html
import logging
from collections.abc import Sequence

import numpy as np

from bertjax import pages
from bertjax.tasks import metrics
from bertjax.tasks.task import Example, Task

_log = logging.getLogger(__name__)

_MISTAKES = 20


def page(
  task: Task, items: Sequence[Example], predictions, logits: np.ndarray, scores: dict[str, float],
  rows: list[dict], facts: dict, trials: dict, notes: Sequence[str] = (), *, name: str = '',
  run: dict | None = None,
) -> str:  # fmt: skip
  """Returns a self-contained HTML page.

  Args:
    task: the task.
    items: labelled examples of the dev split.
    predictions: one per example, as from `task.decode`.
    logits: those that were decoded.
    scores: as from `task.score`.
    rows: logged lines, {'kind': 'train' or 'eval', 'step': ..., metric: value}.
    facts: further facts of the run, by name.
    trials: the content of trials.json, {} for one run.
    notes: warnings at the top of the page, see `remarks`.
    name: of the run.
    run: the content of run.json.
  """
  import matplotlib

  labels, run = [item.label for item in items], run or {}
  baseline = majority_score(task, items)
  confidence = task.label.confidence(predictions, logits)
  facts = {**facts, 'dev labels': ', '.join(task.label.describe(labels)), **_origin(run)}
  with matplotlib.rc_context({'text.parse_math': False}):  # a label may have dollar signs
    sections = {
      'Run': pages.table(facts.items()) + _settings(run.get('config', {})),
      'Scores': pages.table((name, f'{value:.4f}') for name, value in scores.items()),
      'Curves': _curves(task, rows, baseline),
      'Sweep': _sweep(trials) if trials else '',
      'Predictions': _picture(task, labels, predictions) + _precision_recall(task, labels, logits),
      'Calibration': _calibration(task, items, predictions, confidence),
      'Mistakes': _mistakes(task, items, predictions, confidence),
    }
  summary = f'{task.name}: {task.metric} {scores[task.metric]:.4f} on {len(items):,} dev examples'
  if baseline:
    summary += f'; {baseline[1]:.4f} by always predicting {baseline[0]!r}'
  return pages.report(name or task.name, 'report', sections, summary, notes)


def majority_score(task: Task, items: Sequence[Example]) -> tuple[str, float] | None:
  """Returns the most frequent class and the main metric of always predicting it; None for labels
  that have no such class."""
  number = task.label.most_frequent([item.label for item in items])
  if number is None:
    return None
  score = task.score(items, np.full(len(items), number))[task.metric]
  return task.label.text(number), score


def remarks(task: Task, split: str, items: Sequence[Example], predictions, scores) -> list[str]:
  """Returns (and logs) why a model may not have learnt: all predictions alike, none at all, or a
  score that is not above the most frequent class's.

  Args:
    task: the task.
    split: name of the examples' split.
    items: examples, with labels if there are `scores`.
    predictions: one per example.
    scores: as from `task.score`; {} if the examples have no labels.
  """
  problem = task.label.collapsed(predictions)
  found = [f'{split}: {problem}'] if problem else []
  baseline = majority_score(task, items) if scores else None
  if baseline and len({item.label for item in items}) > 1:
    name, floor = baseline
    if scores[task.metric] <= floor:
      found.append(
        f'{split}: {task.metric} {scores[task.metric]:.4f} is not above {floor:.4f}, that of '
        f'always predicting {name!r}, the most frequent class'
      )
  elif scores and found:
    found[0] += f' ({task.metric} {scores[task.metric]:.4f})'
  for sentence in found:
    _log.warning(
      '%s; the model may not have learnt the task: train longer, with a higher learning_rate or '
      'head_lr_multiplier, or choose the best of several seeds (num_seeds).', sentence,
    )  # fmt: skip
  return found


def _origin(run: dict) -> dict:
  """Date, versions, devices and command out of run.json."""
  if not run:
    return {}
  versions = ', '.join(f'{name} {version}' for name, version in run['versions'].items())
  return {
    'started': run['started'], 'versions': f'{versions}; commit {run["commit"]}',
    'devices': f'{len(run["devices"])} x {run["devices"][0]}, {run["machine"]}',
    'command': ' '.join(run['command']),
  }  # fmt: skip


def _settings(config: dict) -> str:
  """Data files and hyperparameters: all fields of a config that are set."""

  def flat(tree, prefix=''):
    for name, value in tree.items():
      if isinstance(value, dict):
        yield from flat(value, f'{prefix}{name}.')
      elif value != '':
        yield prefix + name, value

  if not config:
    return ''
  rows = pages.table(flat(config))
  return f'<details><summary>Data and hyperparameters</summary>{rows}</details>'


def _curves(task: Task, rows, baseline) -> str:
  """Training and dev loss in one figure, the metric in another; '' where there is one point."""
  shown = ''
  for name, kinds in (('loss', ('train', 'eval')), (task.metric, ('eval',))):
    axes, longest = pages.axes(xlabel='step', title=name), 0
    for kind in kinds:
      points = [(r['step'], r[name]) for r in rows if r['kind'] == kind and name in r]
      longest = max(longest, len(points))
      if points:
        label, marker = ('dev', 'o') if kind == 'eval' else ('training', '')
        axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    if baseline and name == task.metric:
      axes.axhline(baseline[1], color='gray', ls=':', label=f'always {baseline[0]}')
    shown += pages.svg(axes) if longest > 1 else ''
  return shown


def _sweep(trials: dict) -> str:
  """The best value of each trial, learning rates by seeds, and its curve."""
  each = {(f'{t["learning_rate"]:g}', t['seed']): t for t in trials['trials']}
  seeds = list(dict.fromkeys(seed for _, seed in each))
  rows = [
    (rate, *(f'{each[rate, s]["best"]:.4f}{" (failed)" * each[rate, s]["failed"]}' for s in seeds),
     f'{row["mean"]:.4f}', f'{row["deviation"]:.4f}', row['failed'])
    for rate, row in trials['learning_rates'].items()
  ]  # fmt: skip
  head = ('learning rate', *(f'seed {seed}' for seed in seeds), 'mean', 'deviation', 'failed')
  axes = pages.axes(xlabel='step', title=f'{trials["metric"]} of each trial')
  colors = {rate: f'C{i}' for i, rate in enumerate(trials['learning_rates'])}
  for (rate, seed), trial in each.items():
    label = f'rate {rate}' if seed == seeds[0] else None
    axes.plot(trials['steps'], trial['values'], color=colors[rate], marker='.', label=label)
  sentence = html.escape(f'Best {trials["metric"]} of each trial; the report is of the best one.')
  return f'<p>{sentence}</p>{pages.table(rows, head)}{pages.svg(axes)}'


def _picture(task: Task, labels, predictions) -> str:
  """A confusion matrix, or numbers against numbers."""
  if task.label.numeric:
    axes = pages.axes(4.5, 4, xlabel='gold', ylabel='predicted')
    axes.scatter(labels, predictions, s=8, alpha=0.5)
    return pages.svg(axes)
  counted = task.label.confusion(labels, predictions)
  if counted is None:
    return ''
  gold, predicted, names = counted
  return _confusion(metrics.confusion(predicted, gold, len(names)), names)


def _confusion(counts: np.ndarray, names: Sequence[str]) -> str:
  size = min(3 + 0.55 * len(names), 12)
  axes = pages.axes(size + 0.8, size, xlabel='predicted', ylabel='gold')
  axes.grid(False)
  fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  axes.imshow(fractions, cmap='Blues', vmin=0, vmax=1)
  for i, j in np.ndindex(*counts.shape):
    color = 'white' if fractions[i, j] > 0.5 else 'black'
    axes.text(j, i, f'{counts[i, j]:,}', ha='center', va='center', color=color, fontsize=9)
  axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 3 else 0)
  axes.set_yticks(range(len(names)), names)
  return pages.svg(axes)


def _precision_recall(task: Task, labels, logits: np.ndarray) -> str:
  """Precision against recall of each label, over all thresholds of its logit or probability."""
  columns = task.label.one_vs_rest(labels, logits)
  if columns is None:
    return ''
  gold, logits = columns
  axes = pages.axes(xlabel='recall', ylabel='precision', xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
  names = list(enumerate(task.labels))[len(task.labels) == 2 :]  # of two, the second is enough
  for number, name in names:
    if gold[:, number].any():
      precision, recall, mean = metrics.precision_recall(gold[:, number], logits[:, number])
      axes.plot(recall, precision, label=f'{name} (mean {mean:.3f})')
  return pages.svg(axes) if axes.lines else ''


def _calibration(task: Task, items, predictions, confidence) -> str:
  """How often predictions are right, by their probability in tenths."""
  if confidence is None:
    return ''
  right = np.array([gold == predicted for gold, predicted in _compared(task, items, predictions)])
  tenth = np.minimum((confidence * 10).astype(int), 9)
  bins = np.array([(confidence[tenth == i].mean(), right[tenth == i].mean(), (tenth == i).sum())
                   for i in np.unique(tenth)])  # fmt: skip
  error = np.average(np.abs(bins[:, 0] - bins[:, 1]), weights=bins[:, 2])
  axes = pages.axes(xlabel='probability of the prediction', ylabel='fraction that is right',
               title=f'expected calibration error {error:.3f}')  # fmt: skip
  axes.plot([0, 1], [0, 1], color='gray', ls=':', label='calibrated')
  axes.plot(bins[:, 0], bins[:, 1], marker='o', label='dev, with the number of examples')
  for p, fraction, count in bins:
    axes.annotate(f'{count:,.0f}', (p, fraction), (5, -10), textcoords='offset points', fontsize=8)
  return pages.svg(axes)


def _compared(task: Task, items, predictions) -> list[tuple[str, str]]:
  """(gold, predicted) in words, equal where the metric counts the prediction as right."""
  return [task.label.compare(item.texts, item.label, prediction)
          for item, prediction in zip(items, predictions, strict=True)]  # fmt: skip


def _mistakes(task: Task, items, predictions, confidence=None) -> str:
  """Wrong predictions, the most confident first; of numbers the furthest off."""
  compared, order = _compared(task, items, predictions), ''
  wrong = [i for i, (gold, predicted) in enumerate(compared) if gold != predicted]
  if not wrong:
    return f'<p>All {len(items):,} predictions are right.</p>'
  if confidence is not None:
    order = ', the most confident first'
    wrong.sort(key=lambda i: -confidence[i])
  elif task.label.numeric:
    order = ', the furthest off first'
    wrong.sort(key=lambda i: -abs(float(compared[i][0]) - float(compared[i][1])))
  rows = [
    (items[i].id, ' | '.join(map(_shorten, task.label.readable(items[i].texts))), *compared[i],
     *([] if confidence is None else [f'{confidence[i]:.3f}']))
    for i in wrong[:_MISTAKES]
  ]  # fmt: skip
  cut = f' ({_MISTAKES} are shown)' if len(wrong) > _MISTAKES else ''
  sentence = f'{len(wrong):,} of {len(items):,} examples differ{order}{cut}:'
  head = ('example', 'text', 'gold', 'predicted', *([] if confidence is None else ['probability']))
  return f'<p>{sentence}</p>{pages.table(rows, head)}'


def _shorten(text: str, most: int = 240) -> str:
  return text if len(text) <= most else text[:most] + ' …'
