"""Objectives: what a run minimises, as sums and weights that are exact however a batch is split.

`mlm.pretraining` has the losses of BERT's pre-training, `electra.pretraining` ELECTRA's, `labels`
those of tasks, `contrastive` those of sentence embeddings and `distill` those with a teacher;
`lora.adapt` turns any of them into that of adapters.

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
      without dropout. A metric is named after the term whose weight divides it, 'mlm_accuracy',
      or is a pair of sums whose quotient it is.
    weights: batch -> {term: total weight}.
    scale: {term: its factor in the total}, 1.0 if missing.
    coupled: (encode, couple) of a loss that couples the rows of a batch (in-batch negatives):
      encode(params, batch, rng) -> outputs [rows, ...], each of its row only;
      couple(outputs, batch) -> what `loss` returns, which is their composition. Microbatches then
      go through gradient caching. None = rows do not depend on each other.
    frozen: device arrays that the loss finds in `params` and that no optimizer trains, such as
      {'teacher': params}; they are in no checkpoint.
    group: consecutive rows of a batch that belong together, which no microbatch separates; of
      `coupled` rows, which are encoded separately, any may.
  """

  init: Callable
  loss: Callable
  weights: Callable
  scale: Mapping[str, float] = {}
  coupled: tuple[Callable, Callable] | None = None
  frozen: dict | None = None
  group: int = 1


def __getattr__(name: str):
  # On first use: they import the model, whose users may need none of them.
  if name in ('contrastive', 'distill', 'electra', 'labels', 'lora', 'mlm'):
    return importlib.import_module(f'bertjax.objectives.{name}')
  raise AttributeError(f'bertjax.objectives has no {name!r}.')
