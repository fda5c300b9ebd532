"""Targets of pre-training, re-sampled every epoch: masked tokens (BERT section 3.1), or the next
token for the left-to-right ablation (section 5.1).

The mask of a row depends only on (seed, epoch, row number), so it is the same on any host and for
any batch size. Epoch 0 has evaluation's static masks. NumPy on batches, no TensorFlow.
"""

import dataclasses
import logging

import numpy as np

from bertjax.data import words
from bertjax.data.prng import ACTION, MASK, REPLACEMENT, SPAN, hash_u64

_log = logging.getLogger(__name__)

UNITS = ('subword', 'whole_word', 'span')


@dataclasses.dataclass(frozen=True)
class Masking:
  """How tokens are masked; the defaults are the paper's.

  Attributes:
    rate: fraction of a row's tokens (special tokens counted, as Google counts) to predict.
    max_predictions: P, predictions in a row at most; Google uses 20 at length 128, 76 at 512.
    mask_prob: fraction of the selected tokens replaced by [MASK].
    random_prob: fraction replaced by a random token; the rest stays as it is.
    unit: what is chosen: 'subword' tokens, 'whole_word' (all tokens of a word; one that would
      exceed the count is skipped, as in Google's code) or 'span' of up to `max_span` words, its
      length n drawn with probability proportional to 1/n (ALBERT). Where no unit of a sequence
      fits, the first tokens of one are chosen. What a word is: `data.words`.
    max_span: words in the longest span.

  Raises:
    ValueError: if a field is out of range.
  """

  rate: float = 0.15
  max_predictions: int = 20
  mask_prob: float = 0.8
  random_prob: float = 0.1
  unit: str = 'subword'
  max_span: int = 3

  def __post_init__(self):
    for name, valid, rule, value in (
      ('unit', self.unit in UNITS, f'one of {UNITS}', repr(self.unit)),
      ('max_span', self.max_span >= 1, 'at least 1', self.max_span),
      ('rate', 0 < self.rate <= 1, 'in (0, 1]', self.rate),
      ('max_predictions', self.max_predictions >= 1, 'at least 1', self.max_predictions),
      ('mask_prob and masking.random_prob',
       min(self.mask_prob, self.random_prob) >= 0 and self.mask_prob + self.random_prob <= 1,
       'at least 0 and at most 1 together', f'{self.mask_prob} and {self.random_prob}'),
    ):  # fmt: skip
      if not valid:
        raise ValueError(f'masking.{name} must be {rule}, got {value}.')


def predictions(masking, length: int, sequences: int = 1):
  """The `max_predictions` of a config's masking section: -1 becomes what rows of `length` tokens
  need, and a number that caps `rate` is warned about.

  A row of one sequence needs round(rate * length); each of several is rounded separately.
  """
  if not 0 < masking.rate <= 1:  # `Masking` refuses it
    return masking.max_predictions
  full = masking.rate * length
  wanted = max(1, round(full) + sequences // 2)
  if masking.max_predictions == -1:
    return wanted
  if 0 < masking.max_predictions < 0.95 * full:  # Google's 76 at length 512 is 1% below
    _log.warning(
      'masking.rate=%g asks for %.1f predictions in a row of %d tokens, but max_predictions=%d '
      'caps them at %.1f%% of the tokens; max_predictions=-1 derives it (%d).',
      masking.rate, full, length, masking.max_predictions,
      100 * masking.max_predictions / length, wanted,
    )  # fmt: skip
  return masking.max_predictions


def unmasked(rows: dict) -> np.ndarray:
  """The ids [B, L] of rows that bring their masks, with the originals put back."""
  ids, positions = rows['input_ids'].copy(), rows['masked_lm_positions'].astype(int)
  real = rows['masked_lm_weights'] > 0
  row = np.broadcast_to(np.arange(len(ids))[:, None], positions.shape)
  ids[row[real], positions[real]] = rows['masked_lm_ids'][real]
  return ids


def mask_tokens(
  batch: dict, epoch: np.ndarray, row: np.ndarray, seed: int, masking: Masking,
  *, vocab_size: int, mask_id: int, never: tuple[int, ...], word_flags: np.ndarray | None = None,
) -> dict:  # fmt: skip
  """Chooses and replaces tokens of a batch.

  A sequence of n tokens gets min(max_predictions, max(1, round(rate * n))) predictions, Python's
  round-half-even, at positions drawn uniformly from its maskable ones; sequences packed into a row
  are counted separately and share the row's P predictions, the first ones first. A random
  replacement is any entry of the vocabulary, special tokens and the original included
  (create_pretraining_data.py).

  Args:
    batch: 'input_ids' and 'segment_ids' (0 = padding, 1.. = sequences), int32 [B, L].
    epoch: int64 [B], 0 in evaluation.
    row: int64 [B], the row's number in the prepared data.
    seed: the run's seed.
    masking: rates and unit.
    vocab_size: V.
    mask_id: the id of [MASK].
    never: ids that are never chosen: [CLS], [SEP] (and [PAD]).
    word_flags: `Tokenizer.word_flags`, uint8 [V]; not needed for 'subword'.

  Returns:
    The batch with new 'input_ids' and 'masked_lm_positions', 'masked_lm_ids' (int32 [B, P], sorted
    by position, 0 where unused), 'masked_lm_weights' (float32 [B, P]).
  """
  ids, segments = batch['input_ids'], batch['segment_ids']
  maskable = segments > 0
  for token in never:
    maskable &= ids != token
  slots = min(masking.max_predictions, ids.shape[1])
  key = hash_u64(seed, MASK, epoch, row)[:, None]
  if masking.unit == 'subword' and segments.max(initial=0) <= 1:
    positions, used = _lowest_ranks(key, maskable, (segments > 0).sum(1), masking.rate, slots)
  else:
    first = _unit_starts(ids, segments, maskable, word_flags, masking, hash_u64(key, SPAN))
    chosen = _choose_units(key, segments, maskable, first, masking.rate, slots)
    positions = np.argsort(~chosen, axis=1, kind='stable')[:, :slots]
    used = np.arange(slots) < chosen.sum(1)[:, None]
  positions = np.where(used, positions, 0)

  originals = np.take_along_axis(ids, positions, 1)
  key = hash_u64(seed, ACTION, epoch, row)[:, None]
  action = hash_u64(key, positions) / np.float64(2**64)  # uniform in [0, 1)
  random_ids = hash_u64(key, positions, REPLACEMENT) % np.uint64(vocab_size)
  replaced = np.where(action < masking.mask_prob + masking.random_prob, random_ids, originals)
  replaced = np.where(action < masking.mask_prob, mask_id, replaced)
  masked = ids.copy()
  rows, slot = np.nonzero(used)
  masked[rows, positions[rows, slot]] = replaced[rows, slot]
  return batch | {
    'input_ids': masked,
    'masked_lm_positions': positions.astype(np.int32),
    'masked_lm_ids': np.where(used, originals, 0).astype(np.int32),
    'masked_lm_weights': used.astype(np.float32),
  }


def _lowest_ranks(key, maskable, length, rate, slots):
  """The fast path, one sequence a row and single tokens: (sorted positions, used) [B, P]."""
  wanted = np.maximum(1, np.rint(rate * length))
  count = np.minimum(np.minimum(wanted, slots), maskable.sum(1)).astype(np.int64)
  rank = hash_u64(key, np.arange(maskable.shape[1]))
  # The lowest ranks win. Ranks of unmaskable positions come last; the top bit makes room for them.
  rank = np.where(maskable, rank >> np.uint64(1), np.uint64(2**64 - 1))
  chosen = np.argpartition(rank, slots - 1, axis=1)[:, :slots]
  by_rank = np.argsort(np.take_along_axis(rank, chosen, 1), axis=1)
  chosen = np.take_along_axis(chosen, by_rank, 1)
  used = np.arange(slots) < count[:, None]
  return np.sort(np.where(used, chosen, maskable.shape[1]), axis=1), used  # unused ones at the end


def _unit_starts(ids, segments, maskable, word_flags, masking, key) -> np.ndarray:
  """Where units of tokens that are masked together begin, bool [B, L]; only maskable ones count."""
  first = maskable.copy()
  if masking.unit == 'subword':
    return first
  # A word also begins after what is never masked and at the front of a sequence.
  joined = maskable[:, :-1] & (segments[:, 1:] == segments[:, :-1])
  first[:, 1:] &= words.firsts(ids, word_flags)[:, 1:] | ~joined
  if masking.unit == 'whole_word' or masking.max_span == 1:
    return first
  share = 1 / np.arange(1, masking.max_span + 1)
  draw = hash_u64(key, np.arange(ids.shape[1])) / np.float64(2**64)
  count = 1 + np.searchsorted(np.cumsum(share / share.sum())[:-1], draw, side='right')
  begins, left = np.zeros_like(first), np.zeros(len(ids), np.int64)
  for p in range(ids.shape[1]):
    left = np.where(maskable[:, p], left, 0)  # a span ends at [SEP]
    begins[:, p] = first[:, p] & (left <= 0)
    left = np.where(begins[:, p], count[:, p], left) - first[:, p]
  return begins


def _choose_units(key, segments, maskable, first, rate, slots) -> np.ndarray:
  """Takes complete units in random order while they fit in their sequence's count: bool [B, L].

  A sequence of which no unit fits gives the first tokens of its first unit, so that no row is
  without predictions.
  """
  size, position = first.shape, np.arange(first.shape[1])
  sequence = np.arange(1, segments.max(initial=0) + 1)
  length = (segments[:, :, None] == sequence).sum(1)  # [B, S]
  wanted = np.where(length > 0, np.maximum(1, np.rint(rate * length)), 0).astype(np.int64)
  budget = np.diff(np.minimum(np.cumsum(wanted, 1), slots), axis=1, prepend=0)
  budget = np.pad(budget, ((0, 0), (1, 0)))  # segment 0 is padding
  start = np.maximum.accumulate(np.where(first, position, 0), axis=1)  # of each token's unit
  rank = hash_u64(key, start) >> np.uint64(9)  # 55 bits; segments (at most 126) go above them
  rank |= segments.astype(np.uint64) << np.uint64(56)
  rank = np.where(maskable, rank, np.uint64(2**64 - 1))
  order = np.argsort(rank, axis=1, kind='stable')  # units stay together, sequences too
  rows = np.arange(size[0])
  count = np.zeros(size, np.int64)  # tokens of the unit that starts here
  np.add.at(count, (rows[:, None], start), maskable)
  fits = np.zeros(budget.shape, bool)  # whether any unit of a sequence does
  of_token = rows[:, None], segments
  np.logical_or.at(fits, of_token, first & (count <= budget[of_token]))
  by_rank = [np.take_along_axis(a, order, 1) for a in (segments, maskable, first, count)]
  taken, take = np.zeros(size, bool), np.zeros(size[0], bool)
  used, before = np.zeros(size[0], np.int64), np.zeros(size[0], segments.dtype)
  for p in range(size[1]):
    segment, real, begins, tokens = (a[:, p] for a in by_rank)
    used = np.where(segment == before, used, 0)
    room = budget[rows, segment] - used
    take = real & np.where(fits[rows, segment], np.where(begins, tokens <= room, take), room > 0)
    used, before = used + take, segment
    taken[:, p] = take
  chosen = np.zeros(size, bool)
  np.put_along_axis(chosen, order, taken, 1)
  return chosen


def next_token_targets(batch: dict) -> dict:
  """Left-to-right targets in the same fields: position p predicts the token at p + 1.

  The prediction fields are [B, L - 1]; a target must belong to the predicting token's sequence.
  """
  ids, segments = batch['input_ids'], batch['segment_ids']
  real = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
  positions = np.arange(ids.shape[1] - 1, dtype=np.int32)
  return batch | {
    'masked_lm_positions': np.broadcast_to(positions, real.shape).copy(),
    'masked_lm_ids': np.where(real, ids[:, 1:], 0).astype(np.int32),
    'masked_lm_weights': real.astype(np.float32),
  }
