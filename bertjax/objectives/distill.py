"""Distillation: a student learns from the outputs and states of a frozen teacher.

`task` has soft targets for any task (Hinton et al. 2015), `pretraining` the losses of DistilBERT
(Sanh et al. 2019) and MiniLM (Wang et al. 2020). The loss finds the teacher's parameters in
params['teacher']; a run passes them as `Objective.frozen`, outside of what is trained and saved.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bertjax.model.attention import float32_einsum
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.objectives import Objective
from bertjax.objectives.labels import Label
from bertjax.objectives.mlm import (
  pretraining_sums,
  pretraining_weights,
  soft_cross_entropy,
  token_weights,
)

DISTILBERT = {'mlm': 2.0, 'soft': 5.0, 'cosine': 1.0}
MINILM = {'attention': 1.0, 'value': 1.0}
_RELATIONS = ('attention', 'value')


def task(
  label: Label, model: Bert, teacher: Bert, *, temperature: float = 2.0, soft_weight: float = 0.5,
  class_weights: Sequence[float] = (), frozen: dict | None = None,
) -> Objective:  # fmt: skip
  """The objective of a task: (1 - soft_weight) * the task's loss + soft_weight * soft targets.

  The soft loss is the label kind's `soft_losses`, such as temperature^2 * KL(teacher || student).

  Args:
    label: kind of label.
    model: the student, with the label's head.
    teacher: as the student, of any size.
    temperature: divides the logits of both.
    soft_weight: weight of the soft loss, in [0, 1].
    class_weights: of the task's loss, as for `Label.make_loss`.
    frozen: {'teacher': params} on the devices of a run; None where the caller passes them.

  Raises:
    ValueError: if the temperature or weight is out of range, or the model has a CRF.
  """
  check_temperature(temperature)
  if not 0 <= soft_weight <= 1:
    raise ValueError(f'distill.soft_weight must be in [0, 1] for a task, got {soft_weight}.')
  label.make_loss(model, class_weights)  # raises for what this kind does not take
  if model.config.crf or teacher.config.crf:
    raise ValueError('soft targets need scores of each token, and a CRF has none; set crf=False.')

  def loss(params, batch, rng):
    out, theirs = _outputs(model, teacher, params, batch, rng)
    name = f'{label.head}_logits'
    hard = label.losses(out[name], batch) * label.weights(batch, class_weights)
    soft = label.soft_losses(out[name], theirs[name], batch, temperature) * label.weights(batch)
    return {'task': hard.sum(), 'soft': soft.sum()}, {}

  def weights(batch):
    return {'task': label.weights(batch, class_weights).sum(), 'soft': label.weights(batch).sum()}

  scale = {'task': 1 - soft_weight, 'soft': soft_weight}
  init = functools.partial(init_params, model)
  return Objective(init, loss, weights, scale=scale, frozen=frozen)


def pretraining(
  model: Bert, teacher: Bert, scale: Mapping[str, float] = DISTILBERT, *,
  temperature: float = 2.0, layer: int = -1, frozen: dict | None = None,
) -> Objective:  # fmt: skip
  """The objective of a student on text: a weighted sum of the terms that `scale` names.

  'mlm': masked LM. 'soft': temperature^2 * KL(teacher || student) of the masked-LM logits at the
  masked positions. 'cosine': 1 - cosine of the last states of each token. 'attention': KL of the
  attention probabilities of one layer, the mean over heads and queries; 'value': the same of
  softmax(V V^T / sqrt(K)), K the size of a head (MiniLM). Padding counts in none.

  Args:
    model: the student; has the head 'mlm' for the terms 'mlm' and 'soft'.
    teacher: the teacher; has the head 'mlm' for the term 'soft'.
    scale: {term: its weight}, `DISTILBERT`, `MINILM` or others.
    temperature: divides the logits of 'soft'.
    layer: the teacher's layer whose relations the student's last layer learns; -1 is the last.
    frozen: {'teacher': params} on the devices of a run; None where the caller passes them.

  Raises:
    ValueError: if the two do not fit for a term, or a setting is out of range.

  Example:
    >>> import bertjax, jax
    >>> tiny = bertjax.bert_tiny(vocab_size=50, hidden_size=32, num_heads=2)
    >>> student, teacher = bertjax.Bert(tiny, ('mlm',), False), bertjax.Bert(tiny, ('mlm',), False)
    >>> objective = bertjax.objectives.distill.pretraining(student, teacher)
    >>> params = objective.init(jax.random.key(0))
    >>> batch = {'input_ids': jax.numpy.ones((1, 4), int),
    ...          'masked_lm_positions': jax.numpy.ones((1, 1), int),
    ...          'masked_lm_ids': jax.numpy.ones((1, 1), int),
    ...          'masked_lm_weights': jax.numpy.ones((1, 1))}
    >>> losses, _ = objective.loss(params | {'teacher': params}, batch, None)
    >>> abs(round(float(losses['soft']), 5)), abs(round(float(losses['cosine']), 5))
    (0.0, 0.0)
  """
  scale = {term: weight for term, weight in scale.items() if weight}
  _check(model, teacher, scale, temperature, layer)
  relations = [term for term in _RELATIONS if term in scale]
  capture = ('hidden',) if relations else ()

  def loss(params, batch, rng):
    out, theirs = _outputs(model, teacher, params, batch, rng, capture)
    losses: dict = {}
    metrics: dict = {}
    if 'mlm' in scale:
      losses, metrics = pretraining_sums(out, batch, ('mlm',))
    if 'soft' in scale:
      nats = soft_cross_entropy(out['mlm_logits'], theirs['mlm_logits'], temperature)
      losses['soft'] = (nats * batch['masked_lm_weights']).sum()
    if 'cosine' in scale:
      apart = 1 - _cosine(out['hidden'], theirs['hidden'])
      losses['cosine'] = (apart * token_weights(batch)).sum()
    for term in relations:
      ours = relation(model.config, params, out['all_hidden'], batch, term)
      other = relation(teacher.config, params['teacher'], theirs['all_hidden'], batch, term, layer)
      nats = (jnp.exp(other) * (other - ours)).sum(-1).mean(1)  # [B, H, L, L] -> [B, L]
      losses[term] = (nats * token_weights(batch)).sum()
    return losses, metrics

  def weights(batch):
    masked = pretraining_weights(batch, ('mlm',))['mlm']
    return {t: masked if t in ('mlm', 'soft') else token_weights(batch).sum() for t in scale}

  init = functools.partial(init_params, model)
  return Objective(init, loss, weights, scale=scale, frozen=frozen)


def _outputs(model: Bert, teacher: Bert, params, batch, rng, capture=()) -> tuple[Any, Any]:
  """What student and teacher return, the teacher without dropout and gradient."""
  own = {name: part for name, part in params.items() if name != 'teacher'}
  rngs = None if rng is None else {'dropout': rng}
  out = model.apply({'params': own}, batch, train=rng is not None, rngs=rngs, capture=capture)
  theirs = teacher.apply({'params': params['teacher']}, batch, capture=capture)
  return out, jax.lax.stop_gradient(theirs)


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
  """Cosines of states [..., D], float32 [...]."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  norms = jnp.sqrt(jnp.square(x).sum(-1) * jnp.square(y).sum(-1))
  return (x * y).sum(-1) / jnp.maximum(norms, 1e-12)


def relation(
  config: EncoderConfig, params: dict, hidden: jax.Array, batch: dict, kind: str, layer: int = -1
) -> jax.Array:
  """Log-probabilities [B, H, L, L] of the attention of a layer or of its values to one another.

  Computed again from the layer's input, so that no other layer's [L, L] arrays are stored.

  Args:
    config: of the model.
    params: its parameters.
    hidden: its states, [N + 1, B, L, D].
    batch: as for `pretraining`.
    kind: 'attention' or 'value'.
    layer: from 0; negative ones count from the last.
  """
  layer %= config.num_layers
  qkv = params['encoder']['layers']['attention']['qkv']
  kernel, bias = (x if config.shared_layers else x[layer] for x in (qkv['kernel'], qkv['bias']))
  x = hidden[layer]
  projected = jnp.einsum('bld,dchk->cblhk', x, kernel.astype(x.dtype))
  query, key, value = (projected + bias[:, None, None]).astype(x.dtype)  # as `encoder.Dense`
  pair = (query, key) if kind == 'attention' else (value, value)
  scores = float32_einsum('blhk,bmhk->bhlm', *pair) / config.head_size**0.5
  segments = batch.get('segment_ids', jnp.ones(x.shape[:2], jnp.int32))
  own = segments[:, None, :, None] == segments[:, None, None]
  return jax.nn.log_softmax(jnp.where(own, scores, -1e9))


def check_temperature(temperature: float) -> None:
  """Raises ValueError unless it is above 0 and finite."""
  if not 0 < temperature < float('inf'):
    raise ValueError(f'distill.temperature must be above 0, got {temperature}.')


def _check(model: Bert, teacher: Bert, scale, temperature, layer) -> None:
  """Raises ValueError unless a student can learn the terms of `scale` from the teacher."""
  check_temperature(temperature)
  known = (*DISTILBERT, *MINILM)
  for term, weight in scale.items():
    if term not in known or not 0 < weight < float('inf'):
      raise ValueError(
        f'distill.{term}_weight={weight}: the terms are {", ".join(known)}, and a weight is at '
        'least 0.'
      )
  if not scale.keys() - {'mlm'}:
    raise ValueError('all weights of the teacher are 0; set distill.soft_weight or another.')
  student, large = model.config, teacher.config
  for name, terms in (
    ('vocab_size', known),
    ('hidden_size', ('cosine',)),
    ('num_heads', _RELATIONS),
  ):
    ours, theirs = getattr(student, name), getattr(large, name)
    needing = [term for term in terms if term in scale]
    if needing and ours != theirs:
      raise ValueError(
        f'the teacher has {name}={theirs}, the student {ours}, and the loss {needing[0]!r} needs '
        f'the same; set model.{name}={theirs}, or distill.{needing[0]}_weight=0.'
      )
  if 'soft' in scale and 'mlm' not in teacher.heads:
    raise ValueError(
      'the teacher has no masked-LM head, which soft targets need; set distill.soft_weight=0.'
    )
  for who, config in (('student', student), ('teacher', large)):
    plain = config.positions == 'learned' and config.norm_position == 'post'
    fused = config.num_kv_heads in (0, config.num_heads) and config.linear_bias
    if scale.keys() & set(_RELATIONS) and not (plain and fused and not config.relative_buckets):
      raise ValueError(
        f'relations of attention and values are those of post-norm layers with learned positions, '
        f'which the {who} lacks; set distill.attention_weight=0 and distill.value_weight=0.'
      )
  if not -large.num_layers <= layer < large.num_layers:
    raise ValueError(
      f'distill.layer={layer} is no layer of the teacher, which has {large.num_layers}, numbered '
      'from 0; -1 is the last.'
    )
