"""Sentence embeddings from pairs, hard negatives or scored pairs: one table per split, by columns.

  bertjax finetune --config=embed --workdir=DIR --config.init_from=MODEL \\
      --config.data.train_file=pairs.jsonl --config.task.text=query --config.task.pair=answer

Each text of a pair is the positive of the other. All other texts of the global batch are
negatives, so larger batches learn more; `--config.gradient_accumulation_steps` makes them fit in
memory. Without `data.dev_file`, a fraction of the pairs is held out, and retrieval among them is
scored (nDCG@10). `--config.task.evaluation=similarity` scores the pairs of `data.dev_file`
(Spearman) by `task.label` and `task.max_score`; `beir` takes a folder of BEIR's format. Further
fields of `--config.task.*`: `negatives`, `num_negatives`, `temperature`, `symmetric`, `widths`
(Matryoshka), `pooling`, `query_prompt`, `document_prompt`; `delimiter`, `encoding` and `on_bad_row`
as in `table`.

`embed:cosine` trains on scored pairs, as STS-B:

  bertjax finetune --config=embed:cosine --workdir=DIR --config.init_from=MODEL \\
      --config.data.source=STS-B --config.data.train_file=train.tsv \\
      --config.data.dev_file=dev.tsv \\
      --config.task.text=sentence1 --config.task.pair=sentence2 --config.task.label=score \\
      --config.task.max_score=5.0

After the colon also `smoke`: one epoch of batches of 8 with 32 tokens.
"""

from bertjax.config import finetuning


def get_config(arg=''):
  config = finetuning('embed')
  config.batch_size, config.num_train_epochs, config.data.test = 64, 1.0, ''
  for word in filter(None, arg.split(',')):
    if word not in ('cosine', 'smoke'):
      raise ValueError(f"the words after the colon are 'cosine' and 'smoke', got {word!r}.")
    if word == 'cosine':
      config.task.loss = 'cosine'
    else:
      config.batch_size, config.data.length, config.log_every = 8, 32, 5
  return config
