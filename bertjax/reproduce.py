"""Reproduce: a named experiment, and whether its claims hold on this machine.

  bertjax reproduce
  bertjax reproduce quickstart --seeds=1
  bertjax reproduce table5 --input=TEXTS --glue=GLUE --conll=CONLL2003 --out=table5.json

Without a name it lists the experiments (`bertjax/experiments.py`), what they claim, the data that
they need and the time that they take. With one it trains each variant with each seed, prints the
scores beside the claims and the paper's figures, and exits with code 1 if a claim does not hold.
The same command started again resumes the run that was interrupted and repeats none that is
finished; a higher --seeds adds runs. Each run has a folder in --workdir with all that
`bertjax pretrain` and `bertjax finetune` write, but without the checkpoints of fine-tuning.
"""

import logging
import re
import statistics
from collections.abc import Callable

from etils import epath

from bertjax import compare, evaluate, finetune, io, pretrain, vocab
from bertjax import config as config_lib
from bertjax.experiments import EXPERIMENTS, Experiment
from bertjax.flags import suggestion
from bertjax.training import checkpoint

_log = logging.getLogger(__name__)

VOCAB_SIZE = 4_096


def run(name: str = '', *, workdir: str = '', seeds: int = 0, out: str = '', **data: str) -> dict:
  """Prints the table of an experiment and its claims, and returns what --out gets.

  Args:
    name: of the experiment; '' lists all.
    workdir: of its runs; '' = runs/NAME.
    seeds: runs of each variant, from seed 0; 0 = 3.
    out: JSON file for the table.
    **data: {flag: folder, files or model} of what experiments need.

  Raises:
    ValueError: for an unknown name, missing data, or a finished run with other ones.
    SystemExit: with code 1, if a claim does not hold.
  """
  if not name:
    print('\n\n'.join(describe(name, each) for name, each in EXPERIMENTS.items()))
    return {}
  if name not in EXPERIMENTS:
    raise ValueError(
      f'no experiment {name!r}{suggestion(name, EXPERIMENTS)}: name one of '
      f'{", ".join(EXPERIMENTS)}.'
    )
  experiment = EXPERIMENTS[name]
  if missing := [f'--{flag}' for flag in experiment.needs if not data.get(flag)]:
    raise ValueError(f'{name} needs {" and ".join(missing)}; bertjax reproduce lists its data.')
  if seeds < 0:
    raise ValueError(f'--seeds must be at least 1, got {seeds}; omit it for 3.')
  runs = Runs(experiment, workdir or f'runs/{name}', data)
  scores = {variant: {} for variant in experiment.variants}
  for seed in range(seeds or 3):
    for variant in experiment.variants:
      for score, value in runs.scores_of(variant, seed).items():
        scores[variant].setdefault(score, []).append(value)
  head, rows = table(experiment, scores)
  print(f'\n{name}: {experiment.about}\n\n{compare.as_text(head, rows)}\n')
  verdicts = [(str(claim), *claim.check(scores)) for claim in experiment.claims]
  for _, _, sentence in verdicts:
    print(sentence)
  result = {
    'experiment': name, 'about': experiment.about, 'head': head, 'rows': rows, 'scores': scores,
    'claims': [{'claim': c, 'holds': h, 'result': s} for c, h, s in verdicts],
  }  # fmt: skip
  if out:
    io.write_json(out, result)
    _log.info('written to %s', out)
  if not all(holds for _, holds, _ in verdicts):
    raise SystemExit(1)
  return result


def describe(name: str, experiment: Experiment) -> str:
  """What an experiment compares, claims, needs and takes."""
  needs = ' '.join(f'--{flag}=' for flag in experiment.needs) or 'nothing'
  lines = [
    f'{name}: {experiment.about}',
    f'  needs {needs}; about {experiment.minutes} minutes for each seed on two cores',
    *(f'  claim: {claim}' for claim in experiment.claims),
  ]
  return '\n'.join(lines)


class Runs:
  """The runs of an experiment in a folder; `results.json` there has the scores of finished ones,
  and the recipe and fields of each."""

  def __init__(self, experiment: Experiment, workdir, data):
    self._experiment, self._data = experiment, data
    self._folder = checkpoint.check_path(workdir)
    self._file = self._folder / 'results.json'
    self._finished = io.read_json(self._file) if self._file.exists() else {}

  def scores_of(self, name: str, seed: int) -> dict[str, float]:
    """The scores of a variant with a seed, after the runs that are not finished.

    Raises:
      ValueError: if a finished run had other settings or data.
    """
    variant, scores = self._experiment.variants[name], {}
    model = self._data.get('model', '')
    if variant.recipe:
      fields = {
        **self._experiment.fields, 'seed': seed, 'data.vocab': str(self._folder / variant.vocab),
      }  # fmt: skip
      if 'input' in self._experiment.needs:
        fields['data.input'] = self._data['input']
      found, path = self._run(variant.recipe, seed, variant.recipe, fields, _pretrain)
      scores = {score: found[score] for score in self._experiment.scores}
      model = str(path / 'model')
    for score, task in self._experiment.tasks.items():
      fields = {
        **task.fields, **variant.fields, 'seed': seed, 'init_from': model, 'save_model': 'last',
        'data.source': '/'.join(filter(None, (self._data[task.flag], task.folder))),
        'data.test': '', 'eval_every': 10**9,
      }  # fmt: skip
      found, _ = self._run(f'{name} {score}', seed, task.recipe, fields, _finetune)
      scores[score] = found[task.metric]
    return scores

  def _run(self, name: str, seed: int, recipe: str, fields: dict, train: Callable):
    """(scores, folder) of a run, which is trained unless it is finished."""
    words = re.sub(r'\W+', '-', name).strip('-').lower()
    path = self._folder / f'{words}-seed{seed}'
    settings = {'recipe': recipe, **fields}
    if path.name not in self._finished:
      _log.info('%s', path)
      config = config_lib.load_recipe(recipe)
      config_lib.update(config, fields)
      self._finished[path.name] = {'of': settings, 'scores': train(config, path)}
      io.write_json(self._file, self._finished)
    run = self._finished[path.name]
    if others := sorted(dict(settings.items() ^ run['of'].items())):
      raise ValueError(
        f'{path} is a finished run with other values of {", ".join(others)}; name another '
        '--workdir.'
      )
    return run['scores'], path


def _pretrain(config, path) -> dict:
  vocabulary = epath.Path(config.data.vocab)
  if not vocabulary.exists():
    kind = 'bpe' if vocabulary.suffix == '.json' else 'wordpiece'
    vocab.run(
      input=config.data.input, out=str(vocabulary), kind=kind, size=VOCAB_SIZE, report=False
    )
  pretrain.run(config, workdir=str(path))
  scores = evaluate.evaluate_text(evaluate.run_config(path), str(path), '', 'newest', 0, '')
  return scores | {'below_unigram': scores['unigram_cross_entropy'] - scores['mlm_loss']}


def _finetune(config, path) -> dict:
  scores = finetune.run(config, workdir=str(path))
  io.remove(path / 'checkpoints')
  return scores


def table(experiment: Experiment, scores: dict) -> tuple[list[str], list[list[str]]]:
  """(head, rows): of each variant and score the seeds, mean, deviation, claim and paper."""
  values = {(v, s): x for v, each in scores.items() for s, x in each.items()}
  stated = {(c.variant, c.score): f'{c.value} ± {c.tolerance}' for c in experiment.claims
            if hasattr(c, 'tolerance')}  # fmt: skip
  paper = {(name, score): str(value) for name, variant in experiment.variants.items()
           for score, value in variant.paper.items()}  # fmt: skip
  count = len(next(iter(values.values())))
  rows = [
    [variant, score, *(f'{value:.4f}' for value in found), f'{statistics.mean(found):.4f}',
     f'{statistics.stdev(found):.4f}' if count > 1 else '',
     *(extra.get((variant, score), '') for extra in (stated, paper) if extra)]
    for (variant, score), found in values.items()
  ]  # fmt: skip
  extra = [name for name, column in (('claim', stated), ('paper', paper)) if column]
  seeds = [f'seed {seed}' for seed in range(count)]
  return ['variant', 'score', *seeds, 'mean', 'deviation', *extra], rows
