"""Targets of pre-training, drawn anew in every epoch: masked tokens (BERT section 3.1), or the next
token for the left-to-right ablation (section 5.1).

The mask of a row depends only on (seed, epoch, row number), so it is the same on any host and for
any batch size. Epoch 0 holds evaluation's frozen masks. NumPy on whole batches, no TensorFlow.
"""

import dataclasses

import numpy as np

from bertjax.data.order import ACTION, MASK, REPLACEMENT, mix


@dataclasses.dataclass(frozen=True)
class Masking:
  """How tokens are masked; the defaults are the paper's.

  Attributes:
    rate: share of a row's tokens (special tokens counted, as Google counts) to predict.
    max_predictions: P, slots for predictions in a row; Google uses 20 at length 128, 76 at 512.
    mask_share: share of the chosen tokens replaced by [MASK].
    random_share: share replaced by a random token; the rest stays as it is.

  Raises:
    ValueError: if a field is out of range.
  """

  rate: float = 0.15
  max_predictions: int = 20
  mask_share: float = 0.8
  random_share: float = 0.1

  def __post_init__(self):
    if not 0 < self.rate <= 1:
      raise ValueError(f'masking.rate must be in (0, 1], got {self.rate}.')
    if self.max_predictions < 1:
      raise ValueError(f'masking.max_predictions must be at least 1, got {self.max_predictions}.')
    shares = (self.mask_share, self.random_share)
    if min(shares) < 0 or sum(shares) > 1:
      raise ValueError(
        'masking.mask_share and masking.random_share must be at least 0 and at most 1 together, '
        f'got {self.mask_share} and {self.random_share}.'
      )


def mask_tokens(
  batch: dict, epoch: np.ndarray, row: np.ndarray, seed: int, masking: Masking,
  *, vocab_size: int, mask_id: int, never: tuple[int, ...],
) -> dict:  # fmt: skip
  """Chooses and replaces tokens of a batch.

  A row of n tokens gets min(max_predictions, max(1, round(rate * n))) predictions, Python's
  round-half-even, at positions drawn uniformly from its maskable ones. A random replacement is any
  entry of the vocabulary, special tokens and the original included (create_pretraining_data.py).

  Args:
    batch: 'input_ids' and 'segment_ids' (0 = padding), int32 [B, L].
    epoch: int64 [B], 0 in evaluation.
    row: int64 [B], the row's number in the prepared data.
    seed: the run's seed.
    masking: rates.
    vocab_size: V.
    mask_id: the id of [MASK].
    never: ids that are never chosen: [CLS], [SEP] (and [PAD]).

  Returns:
    The batch with new 'input_ids' and 'masked_lm_positions', 'masked_lm_ids' (int32 [B, P], sorted
    by position, 0 in unused slots), 'masked_lm_weights' (float32 [B, P]).
  """
  ids = batch['input_ids']
  length = (batch['segment_ids'] > 0).sum(1)
  maskable = (batch['segment_ids'] > 0) & ~np.isin(ids, never)
  slots = min(masking.max_predictions, ids.shape[1])
  wanted = np.maximum(1, np.rint(masking.rate * length))
  count = np.minimum(np.minimum(wanted, slots), maskable.sum(1)).astype(np.int64)

  position = np.arange(ids.shape[1])
  rank = mix(mix(seed, MASK, epoch, row)[:, None], position)
  # The lowest ranks win. Ranks of unmaskable positions come last; the top bit makes room for them.
  rank = np.where(maskable, rank >> np.uint64(1), np.uint64(2**64 - 1))
  chosen = np.argpartition(rank, slots - 1, axis=1)[:, :slots]
  by_rank = np.argsort(np.take_along_axis(rank, chosen, 1), axis=1)
  chosen = np.take_along_axis(chosen, by_rank, 1)
  used = np.arange(slots) < count[:, None]
  positions = np.sort(np.where(used, chosen, ids.shape[1]), axis=1)  # unused slots go to the end
  positions = np.where(used, positions, 0)

  originals = np.take_along_axis(ids, positions, 1)
  key = mix(seed, ACTION, epoch, row)[:, None]
  action = mix(key, positions) / np.float64(2**64)  # uniform in [0, 1)
  random_ids = mix(key, positions, REPLACEMENT) % np.uint64(vocab_size)
  replaced = np.where(
    action < masking.mask_share,
    mask_id,
    np.where(action < masking.mask_share + masking.random_share, random_ids, originals),
  )
  masked = ids.copy()
  rows, slot = np.nonzero(used)
  masked[rows, positions[rows, slot]] = replaced[rows, slot]
  return batch | {
    'input_ids': masked,
    'masked_lm_positions': positions.astype(np.int32),
    'masked_lm_ids': np.where(used, originals, 0).astype(np.int32),
    'masked_lm_weights': used.astype(np.float32),
  }


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
