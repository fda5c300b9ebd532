"""Faithfulness of attributions: do they rank words as masking each word does?

  bertjax finetune --config=glue:sst2 --workdir=RUN --config.init_from=MODEL \\
      --config.data.source=GLUE/SST-2
  python -m benchmarks attributions --model=RUN --texts=GLUE/SST-2/dev.tsv

Masking replaces all tokens of one word by [MASK]; its effect is the fall of the log-odds of the
predicted class. Reported for each method: the mean over texts of the Pearson correlation between a
text's attributions and these effects, and in how many texts both name the same word first.
"""

import functools
import json
import pathlib

import jax
import numpy as np

from benchmarks import machine
from bertjax.inference import inspect
from bertjax.inference.predictor import Predictor
from bertjax.model.heads import Bert
from bertjax.predict import read_items

FLAGS = {
  'model': ('', 'a classifier: a model directory or the workdir of a run'),
  'texts': ('', 'a table of texts'),
  'column': ('sentence', 'column of the texts'),
  'count': (30, 'texts, spread evenly over those of eight words and more'),
  'out': ('', 'JSON file to write'),
}


def run(model, texts, column, count, out):
  items = [item for item, error, _ in read_items(texts, [column]) if not error]
  found = [text for (text,) in items if len(text.split()) >= 8]
  found = found[:: max(1, len(found) // count)][:count]
  rows = [
    {'name': name, 'texts': len(found)} | scores
    for name, scores in agreement(Predictor.from_dir(model), found).items()
  ]
  print('| attributions | correlation with masking words | same top word |\n|---|---|---|')
  for row in rows:
    top = f'{row["same_top_word"]} of {row["texts"]}'
    print(f'| {row["name"]} | {row["correlation"]:.2f} | {top} |')
  result = {'benchmark': 'attributions', 'rows': rows, **machine()}
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result


def agreement(predictor: Predictor, texts) -> dict[str, dict[str, float]]:
  """Agreement of each method with masking words, on the texts' most probable classes."""
  methods = {'integrated gradients': [], 'gradient x input': []}
  for text in texts:
    explanation = inspect.explain(predictor, text)
    best, words = explanation.attributions[0], explanation.words[1:-1]
    index = predictor.labels.index(best.name)
    lengths = predictor.runner.lengths  # a program for each, not for each text
    length = next(n for n in lengths if n >= len(explanation.tokens))
    batch = predictor.tokenizer([text], length=length)
    effects = best.logit - masked_log_odds(predictor, batch, words, index)
    values = {
      'integrated gradients': best.values,
      'gradient x input': gradient_times_input(predictor, batch, index),
    }
    for name, by_token in values.items():
      by_word = np.array([by_token[first:end].sum() for _, first, end in words])
      correlation = np.corrcoef(by_word, effects)[0, 1]
      methods[name].append((correlation, by_word.argmax() == effects.argmax()))
  return {
    name: {'correlation': float(np.mean([c for c, _ in rows])), 'same_top_word': sum(
      int(same) for _, same in rows)}
    for name, rows in methods.items()
  }  # fmt: skip


def masked_log_odds(predictor: Predictor, batch: dict, words, index: int) -> np.ndarray:
  """Log-odds of a class [W] with each word masked."""
  rows = {name: np.repeat(array, len(words), 0) for name, array in batch.items()}
  for row, (_, first, end) in zip(rows['input_ids'], words, strict=True):
    row[first:end] = predictor.tokenizer.mask_id
  logits = np.stack(predictor.runner.run(rows, 'classification')).astype(np.float64)
  others = np.delete(logits, index, 1)
  return logits[:, index] - np.log(np.exp(others).sum(1))


def gradient_times_input(predictor: Predictor, batch: dict, index: int) -> np.ndarray:
  """Gradient of a class's logit times the word embedding, summed over its width [L]."""
  runner = predictor.runner
  return np.asarray(_gradient_times_input(
    runner.params, batch, index, config=runner.config, labels=len(predictor.labels)
  ))  # fmt: skip


@functools.partial(jax.jit, static_argnames=('config', 'labels'))
def _gradient_times_input(params, batch, index, *, config, labels):
  bert = Bert(config, heads=('classification',), num_labels=labels)
  embedded = params['encoder']['embeddings']['word']['embedding'][batch['input_ids']]
  rest = {name: batch[name] for name in ('token_type_ids', 'segment_ids')}

  def logit(x):
    out = bert.apply({'params': params}, rest | {'input_embeddings': x})
    return out['classification_logits'][0, index]

  return (jax.grad(logit)(embedded) * embedded).sum(-1)[0]
