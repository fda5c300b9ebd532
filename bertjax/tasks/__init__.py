"""Tasks: data in, head name, official metric. `TASKS[name](source, ...)` makes a `Task`."""

import functools

from bertjax.tasks import choice, glue, squad, tagging, texts

TASKS = {
  **{name: functools.partial(glue.glue, name) for name in glue.SPECS},
  'squad1': functools.partial(squad.squad, version_2=False),
  'squad2': functools.partial(squad.squad, version_2=True),
  'conll2003': tagging.conll2003,
  'conll': tagging.conll,
  'swag': choice.swag,
  'codah': choice.codah,
  'choice': choice.choice,
  'sentence_order': functools.partial(texts.sentence_pairs, order=True),
  'next_sentence': functools.partial(texts.sentence_pairs, order=False),
  'table': texts.table,
}
