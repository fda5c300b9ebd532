"""Tasks: data in, head name, official metric. `TASKS[name](source, ...)` makes a `Task`."""

import functools
import inspect
from collections.abc import Mapping

from bertjax.tasks import (
  choice,
  classification,
  embedding,
  glue,
  question_answering,
  rerank,
  tagging,
)
from bertjax.tasks.task import Task, hold_out

TASKS = {
  **{name: functools.partial(glue.glue, name) for name in glue.SPECS},
  'squad1': functools.partial(question_answering.squad, version_2=False),
  'squad2': functools.partial(question_answering.squad, version_2=True),
  'conll2003': tagging.conll2003,
  'conll': tagging.conll,
  'swag': choice.swag,
  'codah': choice.codah,
  'choice': choice.choice,
  'sentence_order': functools.partial(classification.sentence_pairs, order=True),
  'next_sentence': functools.partial(classification.sentence_pairs, order=False),
  'table': classification.table,
  'embed': embedding.embed,
  'rerank': rerank.rerank,
}


def options(name: str) -> dict[str, inspect.Parameter]:
  """The options of a task, those of its function in `TASKS` without the data.

  >>> list(options('conll2003'))
  ['context']
  """
  make = TASKS[name]
  return {
    parameter.name: parameter for parameter in inspect.signature(make).parameters.values()
    if parameter.kind == parameter.KEYWORD_ONLY
    and parameter.name not in ('files', *getattr(make, 'keywords', {}))
  }  # fmt: skip


def make_task(
  name: str, source: str = '', *, files: Mapping[str, str] | None = None, dev_fraction: float = 0.0,
  **given,
) -> Task:  # fmt: skip
  """A task by name, with checked options.

  Args:
    name: a key of `TASKS`.
    source: folder of the data, or 'tfds:NAME'.
    files: split -> file, where they are not the official ones.
    dev_fraction: of the training examples held out where 'dev' has no file.
    **given: options of the task; those of other tasks may have their default value.

  Raises:
    ValueError: for an unknown task or option, a missing one, or no data.
  """
  if name not in TASKS:
    raise ValueError(f'unknown task {name!r}; known are {", ".join(TASKS)}.')
  if not (source or files):
    raise ValueError(
      f'{name} needs its data: --config.data.source=FOLDER, or --config.data.train_file=FILE.'
    )
  known = options(name)
  unknown = next(
    (o for o in given if o not in known and (given[o] or '') != (_default(o) or '')), None
  )
  missing = next((o for o, p in known.items() if p.default is p.empty and not given.get(o)), None)
  if unknown or missing:
    problem = f'has no option task.{unknown}' if unknown else f'needs --config.task.{missing}'
    listed = ', '.join(f'task.{option}' for option in known) or 'none'
    others = ', '.join(other for other in TASKS if unknown in options(other))
    others = f'; task.{unknown} is an option of {others}' if others else ''
    raise ValueError(f'{name} {problem}; its options are {listed}{others}.')
  given = {option: value for option, value in given.items() if option in known}
  task = TASKS[name](source, files=dict(files or {}), **given)
  return hold_out(task, dev_fraction) if dev_fraction else task


def _default(option: str):
  """The value of an option that a task does not have."""
  found = (options(name).get(option) for name in TASKS)
  default = next((p.default for p in found if p), None)
  return '' if default is inspect.Parameter.empty else default
