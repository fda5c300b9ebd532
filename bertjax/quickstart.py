"""Quickstart: from text to a model in minutes, on text bundled with Python, without a download.

  bertjax quickstart

Trains a vocabulary of 4,096 entries and a 2-layer BERT on the language reference and the standard
library's docstrings, evaluates it on held-out documents beside the unigram cross-entropy, fills
masks in some sentences, and writes a model directory that Hugging Face's transformers loads.
"""

import logging
import time

from bertjax import evaluate, pretrain, vocab
from bertjax.inference.predictor import Predictor
from bertjax.training import checkpoint

_log = logging.getLogger(__name__)


SENTENCES = (
  'The [MASK] statement is used to raise an exception.',
  'Return a new [MASK] object with the same elements.',
  'This module provides classes for reading and [MASK] files.',
)


def run(config, *, workdir: str) -> dict[str, float]:
  """Runs it all; returns the evaluation."""
  begin = time.perf_counter()
  if not workdir:
    raise ValueError('quickstart needs --workdir=DIR, the folder to write.')
  folder = checkpoint.check_path(workdir)
  vocabulary = folder / 'vocab.txt'
  if not vocabulary.exists():
    vocab.run(input='embedded', out=str(vocabulary), size=4096, report=False)
  config.data.vocab = str(vocabulary)
  pretrain.run(config, workdir=workdir)
  print('\nHeld-out documents:')
  scores = evaluate.run(workdir=workdir, checkpoint='newest')
  gain = scores['unigram_cross_entropy'] - scores['mlm_loss']
  print(f'masked-LM loss is {gain:.2f} nats below the unigram cross-entropy of the same tokens.')
  predictor = Predictor.from_dir(folder / 'model')
  for sentence in SENTENCES:
    print(f'\n{sentence}')
    for fill in predictor.fill_mask(sentence)[0]:
      print(f'  {fill.probability:6.1%}  {fill.token}')
  print(_NEXT.format(dir=workdir, minutes=(time.perf_counter() - begin) / 60))
  return scores


_NEXT = """
Done in {minutes:.1f} minutes. Loss curves: {dir}/loss.png; model: {dir}/model. What to run next:

  bertjax vocab    --input=YOUR_TEXTS --size=8192 --out=vocab.txt
  bertjax pretrain --config=bert_mini --workdir=runs/mini \\
      --config.data.input=YOUR_TEXTS --config.data.vocab=vocab.txt
  python -c "import bertjax; p = bertjax.Predictor.from_dir('{dir}/model'); \\
      print(p.fill_mask('Raises an [MASK] if the file is missing.'))"
"""
