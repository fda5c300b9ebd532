"""Your own texts or sentence pairs with labels: one table per split, columns by name.

  bertjax finetune --config=table --workdir=DIR --config.init_from=MODEL \\
      --config.data.train_file=a.csv --config.data.dev_file=b.csv \\
      --config.task.text=review --config.task.label=stars

Tables are .csv, .tsv, .jsonl, .parquet, or .txt with a delimiter. Without `data.dev_file`, a
fraction `data.dev_fraction` of the training examples is held out, by a hash of their texts.

Fields of `--config.task.*`: `text`, `pair` (column of the second text), `label`, `kind` (class,
regression or multilabel), `labels` (their names, joined by '|'; default: those of the training
split), `separator` (between several labels), `delimiter` (between columns: a character, or tab,
comma, semicolon, pipe, space), `encoding`, `on_bad_row` (stop or skip, for a record without a text
or a label). Columns of a file without a header are numbers from 0.

`table:sentence_order` and `table:next_sentence` make pairs of neighbouring sentences from plain
text, half of them swapped, or with a second sentence from elsewhere; the files are text. Fields:
`format` (of the text: prose, blocks, ... as for pre-training) and `seed` (which pairs are wrong).
"""

from bertjax.config import finetuning


def get_config(arg=''):
  known = ('table', 'sentence_order', 'next_sentence')
  if arg and arg not in known:
    raise ValueError(f'the word after the colon must be one of {known}, got {arg!r}.')
  return finetuning(arg or 'table')
