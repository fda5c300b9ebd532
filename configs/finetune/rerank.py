"""Rerankers: a cross-encoder scores pairs of a query and a document; one table per split.

  bertjax finetune --config=rerank --workdir=DIR --config.init_from=MODEL \\
      --config.data.train_file=triplets.jsonl --config.task.text=query --config.task.pair=answer \\
      --config.task.negatives=negatives --config.task.num_negatives=4

A record has a query, a positive and hard negatives, or is a labelled pair where `task.negatives` is
empty (`task.label`, from 0 to 1). The loss is the binary cross-entropy of each pair;
`rerank:listwise` takes the softmax over the positive and its negatives, `rerank:margin_mse` fits
the margins between the scores that a teacher gave them (`task.label`, a list or several columns).
Without `data.dev_file`, a fraction of the queries is held out, and their candidates are ranked
(nDCG@10). `--config.task.evaluation=beir --config.task.candidates=FILE` ranks the candidates that a
first search found in a folder of BEIR's format; `similarity` correlates scores with labels. Further
fields of `--config.task.*`: `num_candidates`; `delimiter`, `encoding` and `on_bad_row` as in
`table`. A model that is a reranker already keeps its output layer with
`--config.reinit_head=False`.

After the colon also `smoke`: one epoch of batches of 8 with 32 tokens.
"""

from bertjax.config import finetuning


def get_config(arg=''):
  config = finetuning('rerank')
  config.num_train_epochs, config.data.length, config.data.test = 1.0, 256, ''
  config.task.loss = 'binary'
  for word in filter(None, arg.split(',')):
    if word in ('listwise', 'margin_mse'):
      config.task.loss = word
    elif word == 'smoke':
      config.batch_size, config.data.length, config.log_every = 8, 32, 5
    else:
      raise ValueError(
        f"the words after the colon are 'listwise', 'margin_mse' and 'smoke', got {word!r}."
      )
  return config
