"""Multiple choice (Devlin et al. 2018, section 4.4): SWAG, CODAH and your own tables.

Each ending is encoded with the prompt as a sentence pair; the rows of an example are consecutive.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from bertjax.objectives.labels import Choice, Class
from bertjax.tasks import classification
from bertjax.tasks.task import Encoded, Example, Task, gold_labels

_SWAG = tuple(f'ending{i}' for i in range(4))


def choice(
  source: str = '', name: str = 'choice', unlabelled: Sequence[str] = ('test',), *,
  files: Mapping[str, str], prompt: str | int, endings: Sequence[str | int],
  label: str | int = 'label', start: str | int = '', delimiter: str = '', encoding: str = 'utf-8',
  on_bad_row: str = 'stop',
) -> Task:  # fmt: skip
  """A table of prompts with a fixed number of endings, one of them correct.

  Args:
    source: folder of the files.
    name: of the task.
    unlabelled: splits that may lack the label.
    files: split -> a table that `data.tables.read_table` reads.
    prompt: column of the prompt; a number, from 0, in files without a header.
    endings: columns of the endings.
    label: column of the index of the correct ending, from 0.
    start: column of a text prepended to every ending (SWAG's sent2).
    delimiter: between columns, see `classification.table`.
    encoding: of the files.
    on_bad_row: 'stop' or 'skip', see `classification.table`.
  """
  layouts = classification.make_layouts(
    files, (prompt, *([] if start == '' else [start]), *endings), label, unlabelled,
    on_bad_row=on_bad_row, delimiter=delimiter, encoding=encoding,
  )  # fmt: skip
  numbers = Class(tuple(str(i) for i in range(len(endings))))
  made = Choice(rows=len(endings))

  def read(split):
    found = classification.read_texts(
      split, source=source, layouts=layouts, label=numbers, every_class=False
    )
    return [_pairs(item, len(endings)) for item in found]

  return Task(
    name, made, read, encode, made.decode, score,
    functools.partial(classification.write_texts, label=made), tuple(layouts),
  )  # fmt: skip


def swag(source: str = '', *, files: Mapping[str, str] | None = None) -> Task:
  """SWAG (Zellers et al. 2018): train.csv, val.csv, test.csv."""
  files = {'train': 'train.csv', 'dev': 'val.csv', 'test': 'test.csv'} | dict(files or {})
  return choice(
    source, files=files, prompt='sent1', start='sent2', endings=_SWAG, label='label', name='swag'
  )


def codah(source: str = '', *, files: Mapping[str, str] | None = None) -> Task:
  """CODAH (Chen et al. 2019): train.tsv, dev.tsv, test.tsv of one split, without headers."""
  files = {split: f'{split}.tsv' for split in ('train', 'dev', 'test')} | dict(files or {})
  return choice(
    source, files=files, prompt=1, endings=(2, 3, 4, 5), label=6, unlabelled=(), name='codah'
  )


def _pairs(item: Example, choices: int) -> Example:
  prompt, *rest = item.texts
  start = ' '.join([*rest[: len(rest) - choices], ''])
  return item._replace(texts=tuple(t for end in rest[-choices:] for t in (prompt, start + end)))


def encode(items: Sequence[Example], tokenizer, length: int) -> Encoded:
  """A row for each ending, truncated by Google's rule."""
  choices = len(items[0].texts) // 2 if items else 1
  rows = [item._replace(texts=item.texts[i : i + 2]) for item in items
          for i in range(0, 2 * choices, 2)]  # fmt: skip
  encoded = classification.encode(rows, tokenizer, length, label=Choice(rows=choices))
  encoded.columns['example_ids'] //= choices
  return encoded


def score(items: Sequence[Example], predictions) -> dict[str, float]:
  return {'accuracy': float(np.mean(np.asarray(predictions) == np.asarray(gold_labels(items))))}
