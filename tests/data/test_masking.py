"""Masks: Google's rates and counts, and nothing but (seed, epoch, row) decides them."""

import collections
import re
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data import masking as masking_lib
from bertjax.data.masking import UNITS, Masking, _unit_starts, mask_tokens, next_token_targets
from bertjax.data.prng import hash_u64
from bertjax.data.sentencepiece import train_sentencepiece
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from bertjax.data.words import BEGINS
from tests import chinese

PAD, CLS, SEP, MASK_ID, V = 0, 2, 3, 4, 30_000
STARTS = (np.arange(V) < 18_000).astype(np.uint8) * BEGINS  # four in ten ids continue a word
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


def make_packed(size, length=128, seed=0):
  """Rows of one to four sequences, each [CLS] ... [SEP], and padding."""
  rng = np.random.default_rng(seed)
  ids, segments = np.full((size, length), PAD, np.int32), np.zeros((size, length), np.int32)
  for row in range(size):
    end = 0
    for segment in range(1, rng.integers(1, 5) + 1):
      start, end = end, end + rng.integers(3, length // 4 + 1)
      ids[row, start:end] = [CLS, *rng.integers(100, V, end - start - 2), SEP]
      segments[row, start:end] = segment
  return {'input_ids': ids, 'segment_ids': segments}


def words(ids, segments):
  """The positions of each word, by sequence."""
  found, before = collections.defaultdict(list), 0
  for position, (token, segment) in enumerate(zip(ids, segments, strict=True)):
    if token in (PAD, CLS, SEP):
      before = 0
    elif segment == before and not STARTS[token]:
      found[segment][-1].append(position)
    else:
      before = segment
      found[segment].append([position])
  return found


def mask(batch, *, epoch=1, row=None, seed=0, vocab_size=V, word_flags=STARTS, **rates):
  size = len(batch['input_ids'])
  epoch, row = np.full(size, epoch), np.arange(size) if row is None else np.asarray(row)
  fixed = {
    'vocab_size': vocab_size, 'mask_id': MASK_ID, 'never': (PAD, CLS, SEP),
    'word_flags': word_flags,
  }  # fmt: skip
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
  out = mask(batch, vocab_size=50, mask_prob=0.0, random_prob=1.0)
  counts = np.bincount(out['input_ids'][chosen(out)], minlength=50)
  assert len(counts) == 50 and all(within(count, 1 / 50, counts.sum()) for count in counts)


@given(st.integers(0, 2**63), st.floats(0.01, 1.0), st.integers(1, 70))
@settings(deadline=None, max_examples=60)
def test_predictions_are_sorted_distinct_maskable_tokens_and_padded_with_zeros(seed, rate, slots):
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


@given(
  st.lists(st.integers(0, 29), min_size=1, max_size=40), st.integers(0, 2**40),
  st.sampled_from(UNITS), st.sampled_from([make_batch, make_packed]),
)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_a_row_s_mask_depends_neither_on_the_rows_beside_it_nor_on_padding(
  rows, offset, unit, make
):
  batch = make(30, 64)
  whole = mask(batch, row=np.arange(30) + offset, unit=unit)
  part = {name: np.pad(array[rows], ((0, 0), (0, 64))) for name, array in batch.items()}
  out = mask(part, row=np.array(rows) + offset, unit=unit)
  np.testing.assert_array_equal(out['input_ids'][:, :64], whole['input_ids'][rows])
  for name in PREDICTIONS:
    np.testing.assert_array_equal(out[name], whole[name][rows])


def test_single_tokens_are_chosen_alike_with_and_without_packed_rows_beside_them():
  batch, packed = make_batch(300), make_packed(1)
  assert packed['segment_ids'].max() > 1  # or the fast path would be compared with itself
  alone = mask(batch)
  beside = mask({name: np.concatenate([batch[name], packed[name]]) for name in batch})
  for name in ('input_ids', *PREDICTIONS):
    np.testing.assert_array_equal(beside[name][:300], alone[name])


@given(
  st.integers(0, 2**32), st.sampled_from(UNITS), st.sampled_from([0.05, 0.15, 0.3, 1.0]),
  st.integers(1, 40),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_each_sequence_has_its_count_of_complete_units_within_the_prediction_budget(
  seed, unit, rate, slots
):
  batch = make_packed(20, 64, seed)
  out = mask(batch, seed=seed, unit=unit, rate=rate, max_predictions=slots)
  for ids, segments, positions, weights in zip(
    batch['input_ids'], batch['segment_ids'], *(out[PREDICTIONS[i]] for i in (0, 2)), strict=True
  ):
    chosen, left = set(positions[weights > 0].tolist()), slots
    for sequence, parts in words(ids, segments).items():
      budget = min(left, max(1, round(int((segments == sequence).sum()) * rate)))
      left -= budget
      if unit == 'subword':
        parts = [[position] for part in parts for position in part]
      taken = [part for part in parts if chosen & set(part)]
      if not all(set(part) <= chosen for part in taken):  # no unit fits: the head of one
        own = sorted(position for part in parts for position in part if position in chosen)
        assert own == list(range(own[0], own[0] + budget)) and own[0] in [p[0] for p in parts]
        assert unit == 'span' or min(map(len, parts)) > budget
        continue
      used = sum(map(len, taken))
      assert used <= budget
      if unit != 'span':  # one that fits is never left: those that do not are skipped
        assert all(len(part) > budget - used for part in parts if part not in taken)


def test_a_span_has_one_to_three_whole_words_and_shorter_ones_are_likelier():
  batch = make_batch(1000, full=True)
  ids, segments = batch['input_ids'], batch['segment_ids']
  maskable = ~np.isin(ids, (PAD, CLS, SEP))
  key = hash_u64(7, np.arange(1000))[:, None]
  begins = _unit_starts(ids, segments, maskable, STARTS, Masking(unit='span'), key)
  sizes = []
  for row in range(1000):
    starts = np.array([word[0] for word in words(ids[row], segments[row])[1]])
    assert begins[row].sum() == begins[row, starts].sum()
    for run in (starts[starts < 64], starts[starts > 64]):  # on both sides of the first [SEP]
      assert begins[row, run[0]]
      span = np.bincount(np.cumsum(begins[row, run]))[1:]
      assert span.max() <= 3
      sizes += span[:5].tolist()  # a run of words may truncate its last span
  counts = np.bincount(sizes)
  for words_, share in ((1, 6 / 11), (2, 3 / 11), (3, 2 / 11)):  # proportional to 1, 1/2, 1/3
    assert within(counts[words_], share, len(sizes))


@pytest.fixture(scope='module', params=['sentencepiece', 'wordpiece'])
def chinese_rows(request):
  """Chinese prose, which has no white space, in rows of 126 tokens; and the tokenizer."""
  texts = chinese.documents(150)
  if request.param == 'wordpiece':
    tokenizer = Tokenizer([*SPECIAL_TOKENS, *sorted(set(''.join(texts).replace('\n', '')))])
  else:
    tokenizer = Tokenizer(train_sentencepiece(texts, 600))
  flat, _ = tokenizer.encode_flat(texts)
  rows = flat[: len(flat) // 126 * 126].reshape(-1, 126)
  ids = np.pad(rows, ((0, 0), (1, 1)), constant_values=tokenizer.cls_id)
  ids[:, -1] = tokenizer.sep_id
  return tokenizer, {'input_ids': ids, 'segment_ids': np.ones_like(ids)}


@pytest.mark.parametrize('unit', UNITS)
def test_15_percent_of_chinese_tokens_are_predicted_and_no_row_has_none(chinese_rows, unit):
  tokenizer, batch = chinese_rows
  size = len(batch['input_ids'])
  special = tokenizer.special
  out = mask_tokens(
    batch, np.ones(size, int), np.arange(size), 0, Masking(unit=unit),
    vocab_size=tokenizer.vocab_size, mask_id=special['mask'],
    never=(special['pad'], special['cls'], special['sep']), word_flags=tokenizer.word_flags,
  )  # fmt: skip
  counts = out['masked_lm_weights'].sum(1)
  assert size > 80 and counts.min() >= 17
  assert counts.mean() == pytest.approx(19, abs=0.1)  # round(.15 * 128)


def test_a_sequence_of_one_long_word_gets_its_first_tokens():
  ids = np.array([[CLS, 100, *[20_000] * 17, SEP]], np.int32)  # one word of 18 tokens, 3 wanted
  for unit in ('whole_word', 'span'):
    out = mask({'input_ids': ids, 'segment_ids': np.ones_like(ids)}, unit=unit)
    assert out['masked_lm_positions'][0, :4].tolist() == [1, 2, 3, 0]
    assert out['masked_lm_weights'].sum() == 3


def test_spans_put_predictions_side_by_side():
  batch = make_batch(2000, 20, full=True)

  def neighbours(**unit):
    rows, positions = chosen(mask(batch, word_flags=np.ones(V, np.uint8), **unit))
    return ((np.diff(rows) == 0) & (np.diff(positions) == 1)).sum()

  assert neighbours(unit='span') > 2 * neighbours(unit='whole_word') > 0
  assert neighbours(unit='span', max_span=1) == neighbours(unit='whole_word')


@pytest.mark.parametrize('change', [{'epoch': 2}, {'seed': 1}, {'row': np.arange(300) + 300}])
def test_another_epoch_seed_or_row_number_draws_another_mask(change):
  batch = make_batch(300, full=True)
  one, other = (set(zip(*chosen(mask(batch, **c)), strict=True)) for c in ({}, change))
  assert within(len(one & other), 19 / 125, len(one))  # as many as chance has it


def test_a_mask_is_that_of_version_0_1():
  # Golden: a resumed run has the same masks.
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
    ({'mask_prob': 0.9, 'random_prob': 0.2}, 'got 0.9 and 0.2'),
    ({'random_prob': -0.1}, 'must be at least 0'),
    ({'unit': 'word'}, r"masking.unit must be one of .*'whole_word'.* got 'word'"),
    ({'max_span': 0}, 'masking.max_span must be at least 1, got 0'),
  ],
)
def test_wrong_rates_are_refused(rates, message):
  with pytest.raises(ValueError, match=message):
    Masking(**rates)


@pytest.mark.parametrize(
  'rate, length, most, sequences, expected, warned',
  [
    (0.15, 128, 20, 1, 20, None),
    (0.15, 512, 76, 1, 76, None),  # Google's, 1% below 76.8
    (0.15, 512, 20, 1, 20, 'asks for 76.8 predictions in a row of 512 tokens.* at 3.9%.*-1.*77'),
    (0.4, 128, 20, 1, 20, 'masking.rate=0.4 asks for 51.2 .* max_predictions=20 .*15.6%.*51'),
    (0.15, 128, -1, 1, 19, None),
    (0.4, 512, -1, 1, 205, None),
    (0.15, 128, -1, 4, 21, None),
    (0.01, 16, -1, 1, 1, None),
  ],
)
def test_predictions_are_derived_from_the_rate_or_a_cap_is_warned_about(
  rate, length, most, sequences, expected, warned, caplog
):
  config = types.SimpleNamespace(rate=rate, max_predictions=most)
  assert masking_lib.predictions(config, length, sequences) == expected
  assert re.search(warned, caplog.text) if warned else not caplog.records
