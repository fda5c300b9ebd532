"""LoRA with any objective: adapters and heads are trained, the rest of the model is frozen."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from bertjax.model.lora import Adapters
from bertjax.objectives import Objective

__all__ = ['Adapters', 'adapt']


def adapt(
  objective: Objective, adapters: Adapters, trained: Sequence[str], base: dict
) -> Objective:
  """The objective of a model's adapters, {'lora': adapters}, and of the parts trained beside them.

  Gradients and moments are those of the adapters and of these parts only. `base` is frozen: a run
  passes it to the train step, and several runs share it.

  Args:
    objective: of the model.
    adapters: of its matrices.
    trained: parts of the parameters that are trained completely, such as a new head.
    base: the other parts, device arrays.

  Example:
    >>> import bertjax, jax
    >>> from bertjax.interop.mapping import matrices
    >>> model = bertjax.Bert(bertjax.bert_tiny(vocab_size=100), heads=('mlm',), pooler=False)
    >>> objective = bertjax.objectives.mlm.pretraining(model)
    >>> base = objective.init(jax.random.key(0))
    >>> query, _ = matrices(model.config, False)['encoder/layers/attention/query']
    >>> adapters = bertjax.objectives.lora.Adapters({'query': query}, rank=8, scale=2.0)
    >>> objective = bertjax.objectives.lora.adapt(objective, adapters, (), base)
    >>> jax.tree.map(jax.numpy.shape, objective.init(jax.random.key(1)))
    {'lora': {'query': {'a': (2, 128, 8), 'b': (2, 8, 128)}}}
  """

  def init(rng: jax.Array) -> dict:
    fresh = objective.init(rng)
    new = adapters.init(jax.random.fold_in(rng, 1))
    return {'lora': new, **{name: fresh[name] for name in trained}}

  coupled = objective.coupled and (_of(adapters, objective.coupled[0]), objective.coupled[1])
  frozen = (objective.frozen or {}) | {'base': base}
  loss = _of(adapters, objective.loss)
  return objective._replace(init=init, loss=loss, coupled=coupled, frozen=frozen)


def _of(adapters: Adapters, function: Callable) -> Callable:
  """A function of the model's parameters as one of the run's."""

  def changed(params: dict, *rest) -> Any:
    return function(adapters.complete(params), *rest)

  return changed
