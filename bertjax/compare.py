"""Compare: runs side by side, and against the band of reference runs.

  bertjax compare runs/a runs/b --out=compare.html
  bertjax compare runs/seed0 runs/seed1 runs/seed2 --write_band=band.json
  bertjax compare runs/mine --band=band.json

Prints a table of the runs' last scores and speeds and one of the settings in which they differ;
--out is a page with the curves beside it. A band has, for each metric and step of reference runs
that differ in their seed, their mean give or take five standard deviations, of this step or of all
steps, whichever is larger, and at least 1% of the mean. With --band the program says at which step
a run leaves it, and exits with code 1 if one does.
"""

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from bertjax import io, pages
from bertjax.config import flat
from bertjax.training import metrics

_log = logging.getLogger(__name__)

_NO_RESULT = ('learning_rate', 'stage')  # logged numbers that are no result
# Of a band on each side. With 3 deviations, half of all runs with another seed left the bands of
# three runs at some step; with 5, one of twelve did, and all with a third of the learning rate.
DEVIATIONS = 5.0
LEAST_WIDTH = 0.01  # as a fraction of the mean

Curves = dict[str, dict[int, float]]


class Run(NamedTuple):
  """What a workdir says of its run.

  Attributes:
    name: the shortest end of its path that no other run shares.
    config: flat {field: value}.
    facts: steps, speed, versions: {name: value}.
    curves: {'held-out NAME' or 'training NAME': {step: value}}.
  """

  name: str
  config: dict
  facts: dict
  curves: Curves


def run(runs: Sequence[str], out: str = '', band: str = '', write_band: str = '') -> dict:
  """Prints how runs differ in settings and results; returns {run: deviations from the band}.

  Raises:
    ValueError: if a folder holds no run, or runs of a new band differ in more than their seed.
    SystemExit: with code 1, if a run leaves the band.
  """
  if not runs:
    raise ValueError('compare needs the workdirs of runs: bertjax compare RUN [RUN ...].')
  names = short_names(runs)
  found = [read_run(path, name) for path, name in zip(runs, names, strict=True)]
  print(as_text(*results(found)))
  if len(found) > 1:
    head, rows = differences(found)
    print('\n' + (as_text(head, rows) if rows else 'All settings are the same.'))
  if write_band:
    io.write_json(write_band, make_band(found))
    _log.info('band of %d runs written to %s', len(found), write_band)
  bands = read_band(band) if band else {}
  outside = {each.name: leaves(each.curves, bands) for each in found if band}
  verdicts = [(name, sentence) for name, sentences in outside.items()
              for sentence in sentences or ['stays inside the band']]  # fmt: skip
  for name, sentence in verdicts:
    print(f'{name}: {sentence}')
  if out:
    io.write_text(out, page(found, bands, verdicts))
    _log.info('written to %s', out)
  if any(outside.values()):
    raise SystemExit(1)
  return outside


def read_run(workdir, name: str) -> Run:
  """Reads the logs and `run.json` of a workdir.

  Raises:
    ValueError: if there are none.
  """
  path = epath.Path(workdir)
  rows = metrics.read_metrics(path)
  if not rows or not (path / 'run.json').exists():
    raise ValueError(
      f'{path} holds no run: there is no run.json or nothing in logs/; give the --workdir of '
      '`bertjax pretrain` or `bertjax finetune`.'
    )
  about = io.read_json(path / 'run.json')
  curves: Curves = {}
  for row in rows:
    for key, value in row.items():
      kind = {'train': 'training', 'eval': 'held-out'}.get(row['kind'])
      if kind and is_result(key, kind, value):
        curves.setdefault(f'{kind} {key}', {})[row['step']] = value
  for total in ('training loss', 'held-out loss'):  # of one term, it is the same curve
    kind = total.removesuffix('loss')
    if curves.get(total) in [c for n, c in curves.items() if n != total and n.startswith(kind)]:
      del curves[total]
  speed, mfu = ([r[key] for r in rows if r['kind'] == 'train' and key in r]
                for key in ('tokens_per_second', 'mfu'))  # fmt: skip
  facts = {
    'step': max(row['step'] for row in rows),
    'tokens/s': round(statistics.median(speed)) if speed else '',
    'MFU': f'{statistics.median(mfu):.1%}' if mfu else '',
    'devices': f'{len(about["devices"])} x {about["devices"][0]}',
    'jax': about['versions'].get('jax', ''),
    'started': about['started'],
  }  # fmt: skip
  return Run(name, flat(about['config']), facts, curves)


def is_result(key: str, kind: str, value) -> bool:
  """Whether a logged number says how well a run does: of training, the losses only."""
  if not isinstance(value, int | float) or key in _NO_RESULT or key.endswith('_weight'):
    return False
  return (kind == 'held-out' and key != 'step') or key == 'loss' or key.endswith('_loss')


def short_names(paths: Sequence) -> list[str]:
  """The shortest ends of paths that differ.

  >>> short_names(['runs/a/seed0', 'runs/b/seed0', 'runs/b/seed1'])
  ['a/seed0', 'b/seed0', 'b/seed1']
  """
  parts = [epath.Path(path).absolute().parts for path in paths]
  if len(set(parts)) < len(parts):
    raise ValueError('compare needs different runs; one is given twice.')
  count = 1
  while len({part[-count:] for part in parts}) < len(parts):
    count += 1
  return ['/'.join(part[-count:]) for part in parts]


def results(runs: Sequence[Run]) -> tuple[list[str], list[list]]:
  """(head, rows) of a table of the last scores and facts of each run."""
  names = list(dict.fromkeys(name for each in runs for name in each.curves))
  names = [name for name in names if name.startswith('held-out')] or names
  facts = [name for name in runs[0].facts if any(each.facts[name] for each in runs)]
  rows = []
  for each in runs:
    last = [list(each.curves[name].values())[-1] if name in each.curves else '' for name in names]
    cells = [f'{value:.4f}' if isinstance(value, float) else value for value in last]
    rows.append([each.name, *cells, *(each.facts[name] for name in facts)])
  return ['run', *(name.removeprefix('held-out ') for name in names), *facts], rows


def differences(runs: Sequence[Run]) -> tuple[list[str], list[list]]:
  """(head, rows) of a table of the fields in which the runs' configs differ."""
  fields = sorted({name for each in runs for name in each.config})
  rows = [[name, *(each.config.get(name, '') for each in runs)] for name in fields]
  rows = [row for row in rows if any(value != row[1] for value in row[2:])]
  return ['setting', *(each.name for each in runs)], rows


def make_band(runs: Sequence[Run]) -> dict:
  """The band of reference runs: {'curves': {name: [[step, low, high], ...]}} and where it is from.

  Raises:
    ValueError: if there are fewer than two runs, or they differ in more than their seed.
  """
  others = [row[0] for row in differences(runs)[1] if row[0] != 'seed']
  if len(runs) < 2 or others:
    reason = f'these differ in {", ".join(others)}' if others else 'there is one'
    raise ValueError(f'a band needs at least two runs that differ in their seed only; {reason}.')
  curves = {}
  for name in runs[0].curves:
    steps = sorted(set.intersection(*({*each.curves.get(name, {})} for each in runs)))
    if steps:
      values = np.array([[each.curves[name][step] for each in runs] for step in steps])
      mean, deviation = values.mean(1), values.std(1, ddof=1)
      width = DEVIATIONS * np.maximum(deviation, np.sqrt((deviation**2).mean()))
      width = np.maximum(width, LEAST_WIDTH * abs(mean))
      bounds = zip(steps, (mean - width).tolist(), (mean + width).tolist(), strict=True)
      curves[name] = [[step, *map(_rounded, pair)] for step, *pair in bounds]
  seeds = [each.config.get('seed', '') for each in runs]
  return {'seeds': seeds, 'facts': runs[0].facts, 'config': runs[0].config, 'curves': curves}


def _rounded(value: float) -> float:
  return float(f'{value:.6g}')


def read_band(path) -> dict[str, list]:
  """The curves of a file that `make_band` has filled.

  Raises:
    ValueError: if it is another file.
  """
  content = io.read_json(path)
  if 'curves' not in content:
    raise ValueError(f'{path} is no band; make one with bertjax compare RUN RUN --write_band=FILE.')
  return content['curves']


def leaves(curves: Curves, bands: Mapping[str, list]) -> list[str]:
  """A sentence for each curve that leaves its band; between two steps of a band, bounds are
  interpolated, and beyond its steps nothing is compared.

  >>> leaves({'held-out loss': {10: 3.0, 20: 3.2}}, {'held-out loss': [[10, 2, 4], [30, 1, 2]]})
  ['held-out loss leaves the band at step 20: 3.2, not 1.5 to 3; outside at 1 of 2 steps']
  """
  found, compared = [], 0
  for name, points in bands.items():
    steps, lows, highs = (np.array(column, float) for column in zip(*points, strict=True))
    ours = {s: v for s, v in curves.get(name, {}).items() if steps[0] <= s <= steps[-1]}
    compared += len(ours)
    bounds = {s: (np.interp(s, steps, lows), np.interp(s, steps, highs)) for s in ours}
    outside = [s for s in sorted(ours) if not bounds[s][0] <= ours[s] <= bounds[s][1]]
    if outside:
      first, (low, high) = outside[0], bounds[outside[0]]
      found.append(
        f'{name} leaves the band at step {first}: {ours[first]:.4g}, not {low:.4g} to {high:.4g}; '
        f'outside at {len(outside)} of {len(ours)} steps'
      )
  return found if compared else ['nothing to compare: the run has no metric of the band']


def as_text(head: Sequence, rows: Sequence[Sequence]) -> str:
  """A table in columns for a terminal; texts over 40 characters lose their middle."""
  cells = [[_short(cell) for cell in row] for row in (head, *rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                   .rstrip() for row in cells)  # fmt: skip


def _short(cell) -> str:
  text = f'{cell:,}' if type(cell) is int and abs(cell) >= 10_000 else str(cell)
  return text if len(text) <= 40 else f'{text[:18]}...{text[-19:]}'


def page(runs: Sequence[Run], bands: Mapping[str, list], verdicts: Sequence[tuple]) -> str:
  """A page with the tables and a figure for each metric, its band in grey."""
  names = dict.fromkeys(name for each in runs for name in each.curves)
  figures = []
  for name in sorted(names, key=lambda name: name.startswith('training')):
    axes = pages.axes(xlabel='step', title=name.replace('_', ' '))
    if points := bands.get(name):
      axes.fill_between(*zip(*points, strict=True), color='gray', alpha=0.25, label='band')
    for number, each in enumerate(runs):
      if curve := each.curves.get(name):
        marker = '.' if name.startswith('held-out') else ''
        axes.plot(*zip(*sorted(curve.items()), strict=True), label=each.name, color=f'C{number}',
                  marker=marker)  # fmt: skip
    figures.append(pages.svg(axes))
  head, rows = differences(runs)
  sections = {
    'Results': pages.table(*reversed(results(runs))),
    'Band': pages.table(verdicts, ('run', 'result')) if verdicts else '',
    'Settings that differ': pages.table(rows, head) if rows else '',
    'Curves': ''.join(figures),
  }
  title = ', '.join(each.name for each in runs)
  return pages.report(title, 'comparison', sections)
