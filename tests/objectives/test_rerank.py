"""Losses and gradients of rerankers equal sentence-transformers' on the same weights; microbatches
and devices do not change them."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bertjax.data import loader as loader_lib
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import huggingface, loading
from bertjax.model.heads import Bert, init_params
from bertjax.objectives import Objective
from bertjax.objectives.labels import NEVER, Choice
from bertjax.objectives.rerank import Candidates, Listwise, MarginMse, Relevance
from bertjax.tasks import classification, rerank
from bertjax.tasks.task import Example
from tests.model.test_encoder import TINY
from tests.models import steps_of

KINDS = {'pairs': Relevance(), 'binary': Candidates(rows=3), 'listwise': Listwise(rows=3),
         'margin_mse': MarginMse(rows=3)}  # fmt: skip
N = math.nan
LABELS = {  # of lists with two, one and two negatives
  'binary': [(1.0, 0.0, 0.0), (1.0, 0.0), (1.0, N, 0.0)],
  'margin_mse': [(4.0, -1.5, 0.25), (-2.0, 1.0), (0.5, 0.125, 3.0)],
}  # fmt: skip
LABELS['listwise'] = LABELS['binary']


@pytest.fixture(scope='module')
def tokenizer(vocab):
  return Tokenizer.from_file(vocab)


@pytest.fixture(scope='module')
def bert(tokenizer):
  """A model without dropout and its parameters, large enough that scores differ."""
  config = dataclasses.replace(
    TINY, vocab_size=tokenizer.vocab_size, hidden_dropout=0.0, attention_dropout=0.0,
    max_positions=64,
  )  # fmt: skip
  model = Bert(config, heads=('classification',), num_labels=1)
  params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, init_params(model, jax.random.key(0)))
  return model, params


def examples(kind: str, documents) -> list[Example]:
  texts = [' '.join(text.split()[a : a + 4]) for text in documents for a in (0, 6, 12, 18)]
  if kind == 'pairs':
    pairs = zip(texts[:12:2], texts[1:12:2], strict=True)
    return [Example(str(i), pair, i / 5) for i, pair in enumerate(pairs)]
  lists = (tuple(texts[i : i + 4]) for i in itertools.count(step=4))
  return [
    Example(str(i), next(lists)[: 1 + len(label)], label) for i, label in enumerate(LABELS[kind])
  ]


def make_batch(label, items, tokenizer, length: int = 64) -> dict:
  encode = classification.encode if isinstance(label, Relevance) else rerank.encode
  return loader_lib.make_batch(encode(items, tokenizer, length, label=label).columns)


def theirs(kind: str, folder, items) -> tuple[float, dict]:
  """The loss and the gradient of each weight, by sentence-transformers or plain PyTorch."""
  library = pytest.importorskip('sentence_transformers')
  import torch

  model = library.CrossEncoder(str(folder), device='cpu')
  losses = library.cross_encoder.losses

  def scores(pairs):
    return model(model.preprocess(pairs))['scores'].reshape(-1)

  if kind == 'pairs':
    queries, documents = zip(*(item.texts for item in items), strict=True)
    loss = losses.BinaryCrossEntropyLoss(model)
    value = loss([list(queries), list(documents)], torch.tensor([item.label for item in items]))
  elif kind == 'binary':
    rows = [
      (item.texts[0], text, label) for item in items
      for text, label in zip(item.texts[1:], item.label, strict=True) if label == label
    ]  # fmt: skip
    queries, documents, labels = map(list, zip(*rows, strict=True))
    value = losses.BinaryCrossEntropyLoss(model)([queries, documents], torch.tensor(labels))
  elif kind == 'listwise':
    each = [
      torch.nn.functional.cross_entropy(
        scores([(item.texts[0], text) for text, label in
                zip(item.texts[1:], item.label, strict=True) if label == label])[None],
        torch.tensor([0]),
      ) for item in items
    ]  # fmt: skip
    value = sum(each) / len(each)
  else:  # its lists have one length, so the mean over negatives is that of lists of one negative
    triplets = [(query, positive, negative, label[0] - target) for item in items
                for (query, positive, *negatives), label in [(item.texts, item.label)]
                for negative, target in zip(negatives, label[1:], strict=True)]  # fmt: skip
    *texts, margins = map(list, zip(*triplets, strict=True))
    value = losses.MarginMSELoss(model)(texts, torch.tensor(margins))
  value.backward()
  named = model.model.named_parameters()
  return value.item(), {name: p.grad.numpy() for name, p in named if p.grad is not None}


@pytest.mark.full
@pytest.mark.parametrize('kind', KINDS)
def test_losses_and_gradients_equal_sentence_transformers(
  kind, bert, tokenizer, documents, tmp_path
):
  (model, params), label, items = bert, KINDS[kind], examples(kind, documents)
  loading.save_model(tmp_path / 'model', model, params, tokenizer)
  batch = make_batch(label, items, tokenizer)
  loss, weights = label.make_loss(model)

  def mean(params):
    return loss(params, batch, None)[0]['task'] / weights(batch)['task']

  with jax.default_matmul_precision('highest'):
    value, gradient = jax.value_and_grad(mean)(params)
  expected, gradients = theirs(kind, tmp_path / 'model', items)
  assert float(value) == pytest.approx(expected, abs=1e-5)
  ours = huggingface.to_tensors(model.config, gradient)
  assert len(gradients) == len(ours)
  for name, found in gradients.items():
    np.testing.assert_allclose(ours[name], found, atol=1e-5, err_msg=name)


def test_what_fills_up_a_list_or_a_batch_has_no_loss(tokenizer, documents):
  for kind, label in KINDS.items():
    items = examples(kind, documents)
    batch = make_batch(label, items, tokenizer)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(batch['labels']), 1)).astype(np.float32)
    other = np.where(np.isnan(batch['labels'])[:, None], 7.0, logits)
    losses = [label.losses(x, batch) * label.weights(batch) for x in (logits, other)]
    np.testing.assert_array_equal(*losses)
    assert np.isfinite(losses[0]).all() and np.count_nonzero(losses[0]) == {
      'pairs': 6, 'binary': 7, 'listwise': 3, 'margin_mse': 5
    }[kind]  # fmt: skip
    batch['example_weights'][: label.rows] = 0
    assert not label.weights(batch).reshape(len(items), -1)[0].any()


def test_soft_targets_of_a_teacher_are_lowest_for_its_own_scores(tokenizer, documents):
  rng = np.random.default_rng(1)
  for kind, label in KINDS.items():
    batch = make_batch(label, examples(kind, documents), tokenizer)
    logits = jnp.asarray(rng.normal(size=(len(batch['labels']), 1)), jnp.float32)

    def total(x, label=label, batch=batch, logits=logits):
      return (label.soft_losses(x, logits, batch, 2.0) * label.weights(batch)).sum()

    np.testing.assert_allclose(jax.grad(total)(logits), 0, atol=1e-6)
    assert total(logits) == pytest.approx(0, abs=1e-6) and total(1.5 * logits) > 1e-3
  assert NEVER < -1e8


@functools.cache
def train(kind: str, devices: int, accumulation: int, steps: int = 3):
  """Losses, and the last parameters, of steps on batches of 8 examples."""
  label = Choice(rows=3) if kind == 'choice' else KINDS[kind]
  config = dataclasses.replace(TINY, hidden_dropout=0.0, attention_dropout=0.0, vocab_size=96)
  model = Bert(config, heads=(label.head,), num_labels=1)
  loss, weights = label.make_loss(model)
  objective = Objective(functools.partial(init_params, model), loss, weights, group=label.rows)
  batches = map(functools.partial(batch_at, label), range(steps))
  return steps_of(objective, optax.sgd(0.3), batches, devices, accumulation)


def batch_at(label, number: int) -> dict:
  rng, rows = np.random.default_rng(number), 8 * label.rows
  labels = rng.uniform(size=(8, label.rows)).astype(np.float32)
  labels[::3, -1] = np.nan if label.rows > 1 else 1
  if isinstance(label, Choice):
    labels = np.repeat(rng.integers(0, label.rows, 8, np.int32), label.rows)
  weights = np.repeat(np.arange(8) != 5, label.rows)  # the last batch of an epoch is not full
  return {
    'input_ids': rng.integers(0, 96, (rows, 10), np.int32),
    'segment_ids': (np.arange(10) < rng.integers(4, 11, (rows, 1))).astype(np.int32),
    'labels': labels.ravel(), 'example_weights': weights.astype(np.float32),
  }  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize('kind', ['binary', 'listwise', 'margin_mse', 'choice'])
@pytest.mark.parametrize(('devices', 'accumulation'), [(8, 1), (1, 8), (2, 2)])
def test_microbatches_and_devices_have_the_gradient_of_one_batch(kind, devices, accumulation):
  losses, params = train(kind, devices, accumulation)
  expected, wanted = train(kind, 1, 1)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert losses[0] != losses[-1]
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), params, wanted)
