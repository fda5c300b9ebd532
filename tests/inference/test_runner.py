"""Texts to rows: windows, packed rows, few compiled programs."""

import jax
import numpy as np
import pytest

from bertjax.inference.predictor import Predictor
from bertjax.inference.runner import LENGTHS, Runner
from tests.models import LONG, applied, model


def test_the_number_of_programs_does_not_grow_with_the_texts(vocab):
  predictor = Predictor(*model(vocab), batch_size=4)
  rng = np.random.default_rng(0)
  for _ in range(6):
    predictor.embed([' '.join(['the'] * n) for n in rng.integers(1, 45, 9)])
  assert predictor.runner.lengths == (16, 32, 48)
  assert predictor.runner._apply._cache_size() == 2
  assert LENGTHS == (16, 32, 64, 128, 256, 512)


def test_packed_batches_are_small_on_a_cpu(vocab, monkeypatch):
  runner = Runner(*model(vocab), batch_size=64)
  batch = runner.make_batch([([7] * 30,)] * 130)
  assert _rows(runner, batch) == [(21, 48)] * 6 + [(6, 48)]
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert _rows(runner, batch) == [(64, 48)] * 2 + [(16, 48)]


@pytest.mark.parametrize(('texts', 'rows'), [(1, [1]), (2, [8]), (8, [8]), (9, [32]), (32, [32])])
def test_few_rows_do_not_cost_a_full_batch(vocab, texts, rows):
  runner = Runner(*model(vocab), batch_size=32)
  assert runner.sizes == (1, 8, 32)
  assert _rows(runner, runner.make_batch([([7] * 5,)] * texts)) == [(n, 16) for n in rows]


def _rows(runner, batch):
  batches = runner._batches(batch, batch['segment_ids'].sum(1))
  return [padded['input_ids'].shape for padded, _ in batches]


def test_a_window_counts_by_its_tokens_in_an_embedding(vocab):
  predictor = Predictor(*model(vocab), batch_size=4, long='window')
  tokenizer, text = predictor.tokenizer, LONG + ' the'
  parts = [part for (part,) in predictor.runner.split(tokenizer.encode([text]))]
  rows = [[tokenizer.cls_id, *part, tokenizer.sep_id] for part in parts]
  assert len(rows) > 2 and len(set(map(len, rows))) == 2
  apply, params = applied(predictor.config), predictor.runner.params
  states = [apply(params, {'input_ids': np.array([row])})['hidden'][0] for row in rows]
  expected = np.concatenate(states).mean(0)  # over all tokens
  found = predictor.embed(text, normalise=False)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert np.abs(expected - np.mean([state.mean(0) for state in states], 0)).max() > 1e-4


@pytest.mark.parametrize('output', ['mean', 'cls', 'last_four', 'classification', 'nsp', 'choice',
                                    'tagging', 'span', 'mlm'])  # fmt: skip
@pytest.mark.e2e
def test_packed_rows_give_what_single_ones_give(vocab, output):
  bert, params, tokenizer = model(
    vocab, 'mlm', 'nsp', 'classification', 'choice', 'tagging', 'span', labels=3
  )
  rng = np.random.default_rng(0)
  words = LONG.split()
  texts = [' '.join(rng.choice(words, n)) for n in rng.integers(1, 14, 60)]
  batch = tokenizer(texts)
  if output == 'tagging':
    batch['labels'] = np.where(batch['segment_ids'] > 0, 0, -1)
  if output == 'mlm':
    batch['masked_lm_positions'] = np.ones((60, 2), np.int32)
    batch['masked_lm_ids'] = np.full((60, 2), 7)
  few = Runner(bert, params, tokenizer, batch_size=4)
  packed = [b for b, _ in few._batches(batch, batch['segment_ids'].sum(1)) if 'cls_positions' in b]
  assert len(packed) > 2 and packed[0]['input_ids'].shape == (4, 48)
  found = few.run(batch, output, top_k=3)
  unpacked = Runner(bert, params, tokenizer, batch_size=1000)
  alone = unpacked.run(batch, output, top_k=3)
  for one, other in zip(found, alone, strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, other)
