"""Predictions of a fine-tuned model for a split of its task, and their scores."""

import logging
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bertjax.data import loader
from bertjax.interop import loading
from bertjax.model import crf
from bertjax.training import loop, sweep
from bertjax.training import mesh as mesh_lib

_log = logging.getLogger(__name__)


def make_predict(
  model, task, mesh, batch_size: int, buckets: str = '', *, many: bool = False,
  complete: Callable = lambda params: params, frozen: dict | None = None,
) -> Callable:  # fmt: skip
  """Returns (params, encoded) -> (logits [K, N, ...] in the order of rows, mean losses [K]).

  K is the number of runs in `params`, 1 unless `many`. With a CRF the logits are its tags
  [K, N, L]. Every process gets all of them. `complete` makes the model's parameters of those of a
  run and `frozen` ones, which all runs share.
  """
  loss_fn, loss_weights = task.label.make_loss(model)

  def step(params, frozen, batch):
    params = complete(params | frozen)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask where they will run
      logits = task.label.select(model.apply({'params': params}, batch), batch)
      loss = loss_fn(params, batch, None)[0]['task']
    return logits, loss, loss_weights(batch)['task']

  everywhere = NamedSharding(mesh, PartitionSpec())
  sharding = everywhere if many else mesh_lib.batch_sharding(mesh)
  compiled = jax.jit(
    jax.vmap(step, (0, None, None)) if many else step, in_shardings=(None, None, sharding),
    out_shardings=everywhere,
  )  # fmt: skip

  def predict(params, encoded):
    local = None if many else mesh_lib.local_rows(sharding, batch_size)
    data = loader.task_batches(task.label, encoded.columns, batch_size, buckets, local=local)
    stream = map(data.in_order, range(data.steps))
    stream = stream if many else loop.to_device(stream, mesh)
    parts = jax.device_get([compiled(params, frozen or {}, batch) for batch in stream])
    if not many:
      parts = jax.tree.map(lambda x: np.asarray(x)[None], parts)
    logits = loader.gather_logits(data, [part for part, _, _ in parts])
    loss, weight = (sum(p[i].astype(np.float64) for p in parts) for i in (1, 2))
    if model.config.crf:
      tagging = params['tagging'] if many else jax.tree.map(lambda x: x[None], params['tagging'])
      tags = [
        crf.viterbi(sweep.take(tagging, k), row, encoded.alignment >= 0)
        for k, row in enumerate(logits)
      ]
      logits = np.stack(jax.device_get(tags))
    return logits, (loss / np.maximum(weight, 1e-9)).tolist()

  return predict


def decode_and_score(task, examples, encoded, logits, threshold: float | None = None):
  """(predictions, their scores) of logits [N, ...]. Without a threshold, a task that has one (SQuAD
  2.0) gets the best one for these examples."""
  predictions = task.decode(examples, encoded, logits, threshold or 0.0)
  scores = task.score(examples, predictions)
  tuned = scores.get('best_f1_threshold', 0.0)
  if threshold is None and tuned:
    predictions = task.decode(examples, encoded, logits, tuned)
    scores = task.score(examples, predictions)
  for width, part in task.label.shorter(logits).items():
    value = task.score(examples, task.decode(examples, encoded, part))[task.metric]
    scores[f'{task.metric}_{width}'] = value
  return predictions, scores


def score(task, examples, encoded, predict, params, threshold: float | None = None):
  """(predictions, scores, logits); see `decode_and_score`."""
  logits, loss = predict(params, encoded)
  predictions, scores = decode_and_score(task, examples, encoded, logits[0], threshold)
  return predictions, with_loss(task, scores, loss[0]), logits[0]


def with_loss(task, scores: dict[str, float], loss: float) -> dict[str, float]:
  """The scores and the loss, if the labels of the task have one."""
  return scores | ({'loss': loss} if task.label.unit else {})


def check_labels(source, params: dict, task) -> None:
  """Raises ValueError if a model's output layer is for other labels than the task's, or in another
  order.

  Without a name in common (`LABEL_0`) they cannot be compared: the labels are matched by index,
  which is logged.
  """
  theirs, count = loading.read_labels(source)[0], params[task.head]['bias'].size
  if count != task.num_labels:
    raise ValueError(f'{source} predicts {count} labels {theirs}, {task.name} has '
                     f'{task.num_labels}: {list(task.labels)}.')  # fmt: skip
  if not task.labels:
    return
  folded, ours = ([name.casefold() for name in names] for names in (theirs, task.labels))
  if folded != ours and set(folded) & set(ours):
    raise ValueError(
      f'the labels of {source} are {theirs}, those of {task.name} {list(task.labels)}; they must '
      'be the same in the same order.'
    )
  if folded != ours:
    pairs = zip(theirs or range(count), task.labels, strict=True)
    order = ', '.join(f'{name} is {label}' for name, label in pairs)
    _log.warning(
      "%s does not name the labels of %s; they are taken in the task's order: %s",
      source, task.name, order,
    )  # fmt: skip
