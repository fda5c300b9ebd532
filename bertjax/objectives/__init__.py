"""Objectives: what a run minimises, as sums and weights that are exact however a batch is split.

`mlm.pretraining` has the losses of BERT's pre-training, `labels` those of tasks.

>>> import bertjax, jax
>>> model = bertjax.Bert(bertjax.bert_tiny(vocab_size=100), heads=('mlm',), pooler=False)
>>> objective = bertjax.objectives.mlm.pretraining(model)
>>> sorted(objective.init(jax.random.key(0)))
['encoder', 'mlm']
"""

import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Objective(NamedTuple):
  """What a run minimises: the sum over terms of scale * loss sum / total weight.

  Sums and weights are added over microbatches, devices and evaluation batches before they are
  divided, so the loss is the same number however a batch is split.

  Attributes:
    init: rng -> params, a nested dict of float32 arrays.
    loss: (params, batch, rng) -> ({term: weighted sum}, {metric: weighted sum}); rng None runs
      without dropout. A metric is named after the term whose weight divides it: 'mlm_accuracy'.
    weights: batch -> {term: total weight}.
    scale: {term: its factor in the total}, 1.0 if missing.
    coupled: the loss couples rows of a batch (in-batch negatives), so a batch cannot be split into
      microbatches.
  """

  init: Callable
  loss: Callable
  weights: Callable
  scale: Mapping[str, float] = {}
  coupled: bool = False


def __getattr__(name: str):
  if name in ('labels', 'mlm'):  # on first use: they import the model, whose users may need neither
    return importlib.import_module(f'bertjax.objectives.{name}')
  raise AttributeError(f'bertjax.objectives has no {name!r}.')
