"""Masks: Google's rates and counts, and nothing but (seed, epoch, row) decides them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data.masking import Masking, mask_tokens, next_token_targets

PAD, CLS, SEP, MASK_ID, V = 0, 2, 3, 4, 30_000
PREDICTIONS = ('masked_lm_positions', 'masked_lm_ids', 'masked_lm_weights')


def make_batch(size, length=128, seed=0, full=False):
  """Rows of ids from 100 on, with [CLS], two [SEP] and random padding."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(100, V, (size, length), dtype=np.int32)
  ends = np.full(size, length) if full else rng.integers(6, length + 1, size)
  position = np.arange(length)
  ids[:, 0] = CLS
  ids[(position == ends[:, None] // 2) | (position == ends[:, None] - 1)] = SEP
  real = position < ends[:, None]
  return {'input_ids': np.where(real, ids, PAD), 'segment_ids': real.astype(np.int32)}


def mask(batch, *, epoch=1, row=None, seed=0, vocab_size=V, **rates):
  size = len(batch['input_ids'])
  epoch, row = np.full(size, epoch), np.arange(size) if row is None else np.asarray(row)
  fixed = {'vocab_size': vocab_size, 'mask_id': MASK_ID, 'never': (PAD, CLS, SEP)}
  return mask_tokens(batch, epoch, row, seed, Masking(**rates), **fixed)


def chosen(out):
  """Row and position of every prediction."""
  rows, slots = np.nonzero(out['masked_lm_weights'])
  return rows, out['masked_lm_positions'][rows, slots]


def within(count, share, trials):
  """Is a binomial count within 5 standard deviations (one failure in 2 million)?"""
  return abs(count - share * trials) < 5 * np.sqrt(trials * share * (1 - share))


@pytest.fixture(scope='module')
def many():
  batch = make_batch(5000, full=True)
  return batch, mask(batch)


def test_15_percent_of_the_tokens_are_predicted(many):
  _, out = many
  np.testing.assert_array_equal(out['masked_lm_weights'].sum(1), 19)  # round(.15 * 128)


def test_80_percent_become_mask_10_percent_random_10_percent_stay(many):
  batch, out = many
  before, after = batch['input_ids'][chosen(out)], out['input_ids'][chosen(out)]
  stay, masks = (after == before).sum(), (after == MASK_ID).sum()
  assert within(masks, 0.8, len(after)) and within(stay, 0.1, len(after))
  assert within(len(after) - masks - stay, 0.1, len(after))


def test_every_position_is_chosen_as_often_as_any_other(many):
  counts = np.bincount(chosen(many[1])[1], minlength=128)
  assert not counts[[0, 64, 127]].any()  # [CLS] and [SEP]
  assert all(within(count, 19 / 125, 5000) for count in np.delete(counts, [0, 64, 127]))


def test_a_random_replacement_is_any_entry_equally_often():
  batch = make_batch(3000, full=True)
  out = mask(batch, vocab_size=50, mask_share=0.0, random_share=1.0)
  counts = np.bincount(out['input_ids'][chosen(out)], minlength=50)
  assert len(counts) == 50 and all(within(count, 1 / 50, counts.sum()) for count in counts)


@given(st.integers(0, 2**63), st.floats(0.01, 1.0), st.integers(1, 70))
@settings(deadline=None, max_examples=60)
def test_predictions_are_sorted_distinct_maskable_tokens_and_unused_slots_zero(seed, rate, slots):
  batch = make_batch(20, 64, seed)
  out = mask(batch, seed=seed, rate=rate, max_predictions=slots)
  assert {out[name].shape for name in PREDICTIONS} == {(20, min(slots, 64))}
  for positions, ids, weights, tokens in zip(
    *(out[name] for name in PREDICTIONS), batch['input_ids'], strict=True
  ):
    count = int(weights.sum())
    assert (weights == (np.arange(len(weights)) < count)).all()
    assert (np.diff(positions[:count]) > 0).all()
    assert not positions[count:].any() and not ids[count:].any()
    np.testing.assert_array_equal(ids[:count], tokens[positions[:count]])
    assert not np.isin(ids[:count], (PAD, CLS, SEP)).any()


@given(st.integers(0, 2**32), st.sampled_from([0.01, 0.15, 0.3, 0.5, 1.0]), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_the_count_is_google_s_with_python_s_rounding(seed, rate, slots):
  batch = make_batch(20, 64, seed)
  counts = mask(batch, rate=rate, max_predictions=slots)['masked_lm_weights'].sum(1)
  for count, ids, segments in zip(counts, batch['input_ids'], batch['segment_ids'], strict=True):
    wanted = min(slots, max(1, round(int(segments.sum()) * rate)))
    assert count == min(wanted, (~np.isin(ids, (PAD, CLS, SEP))).sum())


def test_tokens_that_were_not_chosen_stay_and_the_batch_given_is_not_changed(many):
  batch, out = many
  np.testing.assert_array_equal(batch['input_ids'], make_batch(5000, full=True)['input_ids'])
  same = np.ones((5000, 128), bool)
  same[chosen(out)] = False
  np.testing.assert_array_equal(out['input_ids'][same], batch['input_ids'][same])


def test_a_row_without_maskable_tokens_gets_no_prediction():
  batch = {'input_ids': np.array([[CLS, SEP, PAD]]), 'segment_ids': np.array([[1, 1, 0]])}
  out = mask(batch)
  assert not out['masked_lm_weights'].any()
  np.testing.assert_array_equal(out['input_ids'], batch['input_ids'])


@given(st.lists(st.integers(0, 29), min_size=1, max_size=40), st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_a_row_s_mask_depends_neither_on_the_rows_beside_it_nor_on_padding(rows, offset):
  batch = make_batch(30, 64)
  whole = mask(batch, row=np.arange(30) + offset)
  part = {name: np.pad(array[rows], ((0, 0), (0, 64))) for name, array in batch.items()}
  out = mask(part, row=np.array(rows) + offset)
  np.testing.assert_array_equal(out['input_ids'][:, :64], whole['input_ids'][rows])
  for name in PREDICTIONS:
    np.testing.assert_array_equal(out[name], whole[name][rows])


@pytest.mark.parametrize('change', [{'epoch': 2}, {'seed': 1}, {'row': np.arange(300) + 300}])
def test_another_epoch_seed_or_row_number_draws_another_mask(change):
  batch = make_batch(300, full=True)
  one, other = (set(zip(*chosen(mask(batch, **c)), strict=True)) for c in ({}, change))
  assert within(len(one & other), 19 / 125, len(one))  # as many as chance has it


def test_a_mask_is_that_of_version_0_1():
  # Golden: a resumed run goes on with the same masks.
  ids = np.array([[CLS, *range(101, 119), SEP]], np.int32)
  batch = {'input_ids': ids, 'segment_ids': np.ones_like(ids)}
  out = mask(batch, row=[5], seed=42, vocab_size=600, rate=0.3, max_predictions=8)
  assert out['masked_lm_positions'].tolist() == [[3, 4, 10, 12, 13, 18, 0, 0]]
  assert out['masked_lm_ids'].tolist() == [[103, 104, 110, 112, 113, 118, 0, 0]]
  assert out['input_ids'][0, [3, 4, 10, 12, 13, 18]].tolist() == [4, 4, 4, 385, 113, 4]


def test_next_token_targets_stay_within_their_sequence():
  ids, segments = np.array([[2, 7, 3, 9, 3, 0, 0]]), np.array([[1, 1, 1, 2, 2, 0, 0]])
  out = next_token_targets({'input_ids': ids, 'segment_ids': segments})
  assert out['input_ids'] is ids
  assert out['masked_lm_positions'].tolist() == [[0, 1, 2, 3, 4, 5]]
  assert out['masked_lm_ids'].tolist() == [[7, 3, 0, 3, 0, 0]]
  assert out['masked_lm_weights'].tolist() == [[1, 1, 0, 1, 0, 0]]


@pytest.mark.parametrize(
  'rates, message',
  [
    ({'rate': 0.0}, r'masking.rate must be in \(0, 1\], got 0.0'),
    ({'rate': 1.5}, 'masking.rate'),
    ({'max_predictions': 0}, 'max_predictions must be at least 1, got 0'),
    ({'mask_share': 0.9, 'random_share': 0.2}, 'got 0.9 and 0.2'),
    ({'random_share': -0.1}, 'must be at least 0'),
  ],
)
def test_wrong_rates_are_refused(rates, message):
  with pytest.raises(ValueError, match=message):
    Masking(**rates)
