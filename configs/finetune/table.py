"""Your own texts or pairs: a TSV, CSV or JSONL file a split, columns by name.

  bertjax finetune --config=table --workdir=DIR --config.init_from=MODEL \\
      --config.data.source=FOLDER --config.data.files=train=a.csv,dev=b.csv \\
      --config.data.options=text=review,label=stars

Options: text, pair (the second text's column), label, kind (class, regression or multilabel),
labels (their names, joined by |; else found in the training split), separator (of several labels).
"""

from bertjax import finetune


def get_config(arg=''):
  config = finetune.default_config('table')
  if arg:
    raise ValueError(f'the recipe takes nothing after its colon, got {arg!r}.')
  return config
