"""Tasks: data in, head name, official metric. `TASKS[name](source, ...)` makes a `Task`."""

import functools

from bertjax.tasks import choice, classification, glue, question_answering, tagging

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
}
