"""What can be asked of a `Predictor` by name: texts in, plain JSON values out."""

import dataclasses
import inspect
from collections.abc import Sequence

import numpy as np

from bertjax.inference.predictor import Predictor
from bertjax.inference.runner import TextError

# Name -> (the head it needs, the least and the most texts of an item).
CALLS = {
  'fill_mask': ('mlm', 1, 1),
  'infill': ('mlm', 1, 1),
  'score': ('mlm', 1, 1),
  'continue': ('mlm', 1, 1),
  'correct': ('mlm', 1, 1),
  'classify': ('classification', 1, 2),
  'tag': ('tagging', 1, 1),
  'answer': ('span', 2, 2),
  'choose': ('choice', 3, 100),
  'next_sentence': ('nsp', 2, 2),
  'embed': ('', 1, 1),
  'nearest': ('', 1, 1),
  'summarise': ('', 1, 1),
}


def default(predictor: Predictor) -> str:
  """Returns the call for the model's only head, 'embed' without one.

  Raises:
    ValueError: for a model of several heads.
  """
  heads = sorted(set(predictor.runner.params) - {'encoder', 'pooler'})
  fitting = [do for do in available(predictor) if CALLS[do][0] in (heads or [''])]
  if len(heads) > 1:
    raise ValueError(f'the model has the heads {", ".join(heads)}; choose {", ".join(fitting)}.')
  return fitting[0]


def available(predictor: Predictor) -> list[str]:
  """What can be asked of a model without a corpus: it has the head, and reads in the direction."""
  causal = predictor.config.causal
  wrong = {'fill_mask', 'infill', 'correct'} if causal else {'continue'}
  heads = {'', *predictor.runner.params}
  return [do for do, (head, *_) in CALLS.items() if head in heads and do not in wrong]


def _method(do: str):
  """The method of `Predictor` behind a name."""
  return getattr(Predictor, 'continue_text' if do == 'continue' else do)


def check(predictor: Predictor, do: str, count: int, options: dict) -> None:
  """Raises ValueError if a call cannot be made with items of `count` texts and these options."""
  if do not in CALLS:
    raise ValueError(f'there is no {do!r}; choose from {", ".join(CALLS)}.')
  head, least, most = CALLS[do]
  if head:
    predictor.runner.need(head)
  if not least <= count <= most:
    many = {1: 'one text', 2: 'two texts'}[most] if least == most else f'{least} to {most} texts'
    raise ValueError(f'{do} takes {many} for each item, got {count}.')
  method = _method(do)
  known = [
    name for name in inspect.signature(method).parameters if name not in ('self', *method.items)
  ]
  unknown = next((name for name in options if name not in known), None)
  if unknown:
    raise ValueError(f'{do} has no option {unknown!r}; it has {", ".join(known) or "none"}.')


def call(predictor: Predictor, do: str, items: Sequence[Sequence[str]], options: dict) -> list:
  """Results of items, each a text or several (a text of 'tag' may be its words), as JSON values.

  Raises:
    TextError: if one cannot be answered.
  """
  if do == 'choose':
    columns = [[item[0] for item in items], [list(item[1:]) for item in items]]
  else:
    columns = [list(column) for column in zip(*items, strict=True)]
  texts = (text for item in items for text in item)
  if not all(text.strip() if isinstance(text, str) else text for text in texts):
    raise TextError('a text is empty.')
  return [plain(result) for result in _method(do)(predictor, *columns, **options)]


def call_each(predictor: Predictor, do: str, items: Sequence, options: dict) -> list[dict]:
  """{'result': value} for each item, or {'error': sentence} for those that have none."""
  if not items:
    return []
  counts = sorted({len(item) for item in items})
  if do != 'choose' and len(counts) > 1:  # single texts and pairs share no call
    alike = [[item for item in items if len(item) == count] for count in counts]
    found = {count: iter(call_each(predictor, do, part, options))
             for count, part in zip(counts, alike, strict=True)}  # fmt: skip
    return [next(found[len(item)]) for item in items]
  try:
    return [{'result': value} for value in call(predictor, do, items, options)]
  except TextError as error:
    if len(items) == 1:
      return [{'error': str(error)}]
  half = len(items) // 2  # find the bad ones without giving up batches
  parts = items[:half], items[half:]
  return [result for part in parts for result in call_each(predictor, do, part, options)]


def plain(value):
  """Lists, dicts, strings and numbers."""
  if dataclasses.is_dataclass(value):
    value = dataclasses.asdict(value)
  elif hasattr(value, '_asdict'):
    value = value._asdict()
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  if isinstance(value, dict):
    return {name: plain(item) for name, item in value.items()}
  return [plain(item) for item in value] if isinstance(value, list | tuple) else value
