"""What a fine-tuned model predicts for a split of its task, and how well."""

import json
import logging
import pathlib

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from bertjax.finetuning.setup import check_labels
from bertjax.interop import loading
from bertjax.model import crf, heads
from bertjax.tasks import batches, report, rows
from bertjax.training import loop, trials
from bertjax.training import mesh as mesh_lib

_log = logging.getLogger(__name__)


def make_predict(config, bert, task, mesh, many: bool = False):
  """Returns (params, encoded) -> (logits [K, N, ...] in the order of rows, mean losses [K]).

  K is the number of trials, 1 without. With a CRF the logits are its tags [K, N, L]. Only the
  text's own positions are ranked as spans, unless `span_loss_includes_padding`. Every process gets all.
  """
  loss_fn, loss_weights = task.label.make_loss(bert)

  def step(params, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask where they will run
      logits = task.label.select(bert.apply({'params': params}, batch), batch)
      loss = loss_fn(params, batch, None)[0]['task']
    return logits, loss, loss_weights(batch)['task']

  everywhere = NamedSharding(mesh, PartitionSpec())
  rows_sharding = everywhere if many else mesh_lib.batch_sharding(mesh)
  compiled = jax.jit(
    jax.vmap(step, (0, None)) if many else step, in_shardings=(None, rows_sharding),
    out_shardings=everywhere,
  )  # fmt: skip

  def predict(params, encoded):
    local = None if many else mesh_lib.local_rows(mesh_lib.batch_sharding(mesh), config.batch_size)
    data = batches.make_batches(config, task, encoded.columns, local=local)
    stream = map(data.in_order, range(data.steps))
    if not many:
      stream = loop.to_device(stream, mesh)
    parts = jax.device_get([compiled(params, batch) for batch in stream])
    if not many:
      parts = jax.tree.map(lambda x: np.asarray(x)[None], parts)
    logits = batches.gather(data, [part for part, _, _ in parts])
    loss, weight = (sum(p[i].astype(np.float64) for p in parts) for i in (1, 2))
    if bert.config.crf:
      tagging = params['tagging'] if many else jax.tree.map(lambda x: x[None], params['tagging'])
      chosen = [
        crf.viterbi(trials.take(tagging, k), row, encoded.alignment >= 0)
        for k, row in enumerate(logits)
      ]
      logits = np.stack(jax.device_get(chosen))
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
  return predictions, scores


def score(task, examples, encoded, predict, params, threshold: float | None = None):
  """(predictions, scores, logits); see `decode_and_score`."""
  logits, loss = predict(params, encoded)
  predictions, scores = decode_and_score(task, examples, encoded, logits[0], threshold)
  return predictions, scores | {'loss': loss[0]}, logits[0]


def evaluate(config, model: str, split: str = '', out: str = '') -> dict[str, float]:
  """Scores a model directory on a split of the config's task; writes its predictions into `out`.

  A split without labels gets no scores ({}), so it needs `out`. Other splits than dev are answered
  with the threshold that the run tuned on dev (SQuAD 2.0), from the metrics.json beside the model.
  """
  task, tokenizer = rows.make_task(config), loading.load_tokenizer(model)
  mesh = mesh_lib.make_evaluation_mesh(config.batch_size)
  encoder_config, params = loading.load_weights(model)
  if task.head not in params:
    raise ValueError(f'{model} has no {task.head} head, it has {sorted(params)}.')
  check_labels(model, params, task)
  split = split or config.data.dev
  bert = heads.Bert(
    encoder_config, heads=(task.head,), pooler='pooler' in params, num_labels=task.num_labels
  )
  examples = task.read(split)
  encoded = rows.encode(task, examples, tokenizer, config.data.length, split)
  names = {'encoder', task.head, *({'pooler'} & set(params))}
  params = mesh_lib.replicate({name: params[name] for name in names}, mesh)
  predict = make_predict(config, bert, task, mesh)
  threshold = None if split == config.data.dev else tuned_threshold(model)
  if out and any(example.label is None for example in examples):
    logits, _ = predict(params, encoded)
    predictions, scores = task.decode(examples, encoded, logits[0], threshold or 0.0), {}
  else:
    predictions, scores, _ = score(task, examples, encoded, predict, params, threshold)
  report.remarks(task, split, examples, predictions, scores)
  if out and jax.process_index() == 0:
    folder = pathlib.Path(out)
    earlier = {*folder.glob('*'), *folder.glob(f'{split}/*')}
    paths = task.write(folder, split, examples, predictions)
    _log.info('predictions written to %s', ', '.join(map(str, paths)))
    if replaced := sorted(earlier & set(paths)):
      _log.warning('replaced existing files: %s', ', '.join(map(str, replaced)))
  return scores


def tuned_threshold(model) -> float:
  """The null odds above which a run's model refuses to answer, tuned on its dev split; else 0."""
  path = epath.Path(loading.find_model(model)).parent / 'metrics.json'
  return json.loads(path.read_text()).get('best_f1_threshold', 0.0) if path.exists() else 0.0
