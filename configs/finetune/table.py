"""Your own texts or pairs: a table a split (.csv, .tsv, .jsonl, .parquet, .txt), columns by name.

  bertjax finetune --config=table --workdir=DIR --config.init_from=MODEL \\
      --config.data.source=FOLDER --config.data.files=train=a.csv,dev=b.csv \\
      --config.data.options=text=review,label=stars

Options: text, pair (the second text's column), label, kind (class, regression or multilabel),
labels (their names, joined by |; else found in the training split), separator (of several labels),
delimiter (between columns: a character, or tab, comma, semicolon, pipe, space), encoding,
on_bad_row (stop or skip, where a row has no text or no label). Without a header, columns are
numbers from 0.

`table:sentence_order` and `table:next_sentence` make pairs of neighbouring sentences out of plain
text, half of them swapped, or with a second sentence from elsewhere; the files are text then.
Options: format (of the text: prose, blocks, ... as for pre-training), seed (which pairs are wrong).
"""

from bertjax.config import finetuning


def get_config(arg=''):
  known = ('table', 'sentence_order', 'next_sentence')
  if arg and arg not in known:
    raise ValueError(f'after the colon stands one of {known}, got {arg!r}.')
  return finetuning(arg or 'table')
