"""One page about a fine-tuned model: its scores, curves, mistakes, and what it confuses."""

import html
import io
import logging
import warnings
from collections.abc import Sequence

import numpy as np

from bertjax.tasks import metrics
from bertjax.tasks.task import Example, Task

_log = logging.getLogger(__name__)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
       color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .25rem .8rem .25rem 0; text-align: left;
       border-bottom: 1px solid #e3e6ea; vertical-align: top } td.n { text-align: right;
       font-variant-numeric: tabular-nums } svg { max-width: 100%; height: auto }
"""
_MISTAKES = 20


def page(
  task: Task, items: Sequence[Example], predictions, logits: np.ndarray, scores: dict[str, float],
  rows: list[dict], facts: dict, trials: dict, notes: Sequence[str] = (),
) -> str:  # fmt: skip
  """A self-contained HTML page.

  Args:
    task: the task.
    items: labelled examples.
    predictions: one for each, as from `task.decode`.
    logits: what they were made from.
    scores: as from `task.score`.
    rows: logged lines, {'kind': 'train' or 'eval', 'step': ..., metric: value}.
    facts: more facts of the run, by name.
    trials: the content of trials.json, {} for one run.
    notes: sentences for the top of the page, see `remarks`.
  """
  import matplotlib

  with matplotlib.rc_context({'text.parse_math': False}):  # a label may have dollar signs
    curves = _curves(task, rows)
    pictures = _picture(task, items, predictions), _precision_recall(task, items, logits)
  parts = [
    f'<h1>{html.escape(task.name)}: {task.metric} {scores[task.metric]:.4f}</h1>',
    *(f'<p><strong>{html.escape(note)}.</strong></p>' for note in notes),
    _table((name, _text(value)) for name, value in facts.items()),
    '<h2>Scores</h2>', _table((name, f'{value:.4f}') for name, value in scores.items()),
    '<h2>Curves</h2>', curves,
  ]  # fmt: skip
  if trials:
    parts += ['<h2>Trials</h2>', _trials_table(trials)]
  if any(pictures):
    parts += ['<h2>Predictions</h2>', *pictures]
  parts += ['<h2>Mistakes</h2>', _mistakes(task, items, predictions)]
  title = html.escape(f'bertjax: {task.name}')
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    f'<style>{_STYLE}</style><body>{"".join(parts)}</body></html>\n'
  )


def majority_score(task: Task, items: Sequence[Example]) -> tuple[str, float] | None:
  """The most frequent class of examples, and the main metric of always predicting it; None for
  labels that have no such class."""
  number = task.label.most_frequent([item.label for item in items])
  if number is None:
    return None
  score = task.score(items, np.full(len(items), number))[task.metric]
  return task.label.text(number), score


def remarks(task: Task, split: str, items: Sequence[Example], predictions, scores) -> list[str]:
  """What a low score may hide: all predictions alike, none at all, or no better than one class.

  Args:
    task: the task.
    split: name of the examples' split.
    items: examples, with labels if there are `scores`.
    predictions: one for each.
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
    _log.warning('%s; the model may not have learnt the task.', sentence)
  return found


def _text(value) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _table(rows, head: Sequence[str] = ()) -> str:
  lines = ['<tr>' + ''.join(f'<th>{html.escape(cell)}</th>' for cell in head) + '</tr>'] * bool(
    head
  )
  for row in rows:
    cells = ''.join(
      f'<td class="n">{cell}</td>' if _is_number(cell) else f'<td>{html.escape(cell)}</td>'
      for cell in row
    )
    lines.append(f'<tr>{cells}</tr>')
  return f'<table>{"".join(lines)}</table>'


def _is_number(cell: str) -> bool:
  return cell.replace('.', '', 1).lstrip('-').isdecimal()


def _figure(width: float, height: float):
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout='constrained')


def _svg(figure) -> str:
  """Text stays text, so that the reader's fonts show labels of any language."""
  import matplotlib

  out = io.StringIO()
  with matplotlib.rc_context({'svg.fonttype': 'none'}), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing from font')
    figure.savefig(out, format='svg')
  return out.getvalue().partition('?>')[2].partition('>')[2]  # without the XML head and doctype


def _curves(task: Task, rows) -> str:
  figure = _figure(9, 3)
  for place, (kind, name) in enumerate(
    (('train', 'loss'), ('eval', 'loss'), ('eval', task.metric))
  ):
    points = [(r['step'], r[name]) for r in rows if r['kind'] == kind and name in r]
    axes = figure.add_subplot(1, 3, place + 1)
    if points:
      axes.plot(*zip(*points, strict=True), lw=1.5, marker='' if kind == 'train' else 'o')
    title = {'train': 'training', 'eval': 'dev'}[kind]
    axes.set(xlabel='step', title=f'{title} {name}')
    axes.grid(alpha=0.3)
  return _svg(figure)


def _trials_table(trials: dict) -> str:
  rates = [
    (rate, *(f'{t[name]:.4f}' for name in ('mean', 'deviation', 'best')), str(t['failed']))
    for rate, t in trials['learning_rates'].items()
  ]
  each = [
    (str(t['seed']), f'{t["learning_rate"]:g}', f'{t["best"]:.4f}', f'{t["last"]:.4f}',
     'failed' if t['failed'] else '')
    for t in trials['trials']
  ]  # fmt: skip
  metric = trials['metric']
  return (
    _table(rates, ('learning rate', f'mean {metric}', 'deviation', 'best', 'failed'))
    + '<br>' + _table(each, ('seed', 'learning rate', f'best {metric}', 'at the end', ''))
  )  # fmt: skip


def _picture(task: Task, items, predictions) -> str:
  """A confusion matrix, or numbers against numbers."""
  labels = [item.label for item in items]
  if task.label.numeric:
    figure = _figure(4.5, 4)
    axes = figure.add_subplot()
    axes.scatter(labels, predictions, s=8, alpha=0.5)
    axes.set(xlabel='gold', ylabel='predicted')
    return _svg(figure)
  counted = task.label.confusion(labels, predictions)
  if counted is None:
    return ''
  gold, predicted, names = counted
  return _confusion(metrics.confusion(predicted, gold, len(names)), names)


def _confusion(counts: np.ndarray, names: Sequence[str]) -> str:
  size = min(3 + 0.55 * len(names), 12)
  figure = _figure(size + 0.8, size)
  axes = figure.add_subplot()
  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
  for i, j in np.ndindex(*counts.shape):
    color = 'white' if shares[i, j] > 0.5 else 'black'
    axes.text(j, i, f'{counts[i, j]:,}', ha='center', va='center', color=color, fontsize=9)
  axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 3 else 0)
  axes.set_yticks(range(len(names)), names)
  axes.set(xlabel='predicted', ylabel='gold')
  return _svg(figure)


def _precision_recall(task: Task, items, logits: np.ndarray) -> str:
  """Precision against recall of each label, over all thresholds of its logit or probability."""
  ranking = task.label.ranking([item.label for item in items], logits)
  if ranking is None:
    return ''
  gold, logits = ranking
  labels = list(enumerate(task.labels))[len(task.labels) == 2 :]  # of two, the second tells all
  figure = _figure(5.5, 4)
  axes = figure.add_subplot()
  for number, name in labels:
    if gold[:, number].any():
      precision, recall, mean = metrics.precision_recall(gold[:, number], logits[:, number])
      axes.plot(recall, precision, lw=1.5, label=f'{name} (mean {mean:.3f})')
  axes.set(xlabel='recall', ylabel='precision', xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
  axes.grid(alpha=0.3)
  if len(labels) <= 12:
    axes.legend(fontsize=8)
  return _svg(figure)


def _mistakes(task: Task, items, predictions) -> str:
  found = []
  for item, prediction in zip(items, predictions, strict=True):
    gold, said = task.label.compare(item.texts, item.label, prediction)
    if gold != said:
      texts = ' | '.join(map(_shorten, task.label.readable(item.texts)))
      found.append((item.id, texts, gold, said))
  if task.label.numeric:  # the furthest off
    found.sort(key=lambda row: -abs(float(row[2]) - float(row[3])))
  count = f'<p>{len(found):,} of {len(items):,} examples differ; {_MISTAKES} of them:</p>'
  return count + _table(found[:_MISTAKES], ('example', 'text', 'gold', 'predicted'))


def _shorten(text: str, most: int = 240) -> str:
  return text if len(text) <= most else text[:most] + ' …'
