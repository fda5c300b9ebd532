"""The unigram baseline of a masked-LM loss: what token frequencies predict."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from bertjax.data import masking
from bertjax.data.dataset import Arrays, Dataset
from bertjax.data.loader import Batches
from bertjax.data.mixture import heldout_each
from bertjax.data.tokenizer import Tokenizer


def count_rows(rows: Dataset | Arrays, vocab_size: int, most: int = sys.maxsize) -> np.ndarray:
  """How often each id occurs in the first `most` prepared rows, int64 [V]."""
  counts = np.zeros(vocab_size, np.int64)
  for start in range(0, min(len(rows), most), 65_536):
    part = rows[np.arange(start, min(start + 65_536, len(rows)))]
    ids = masking.unmasked(part) if 'masked_lm_ids' in part else part['input_ids']
    counts += np.bincount(ids.ravel(), minlength=vocab_size)[:vocab_size]
  return counts


def heldout(batches: Mapping[str, Batches], most: int) -> Iterator[dict]:
  """Yields the evaluation batches of about `most` held-out rows, equally many of each source."""
  for part in batches.values():
    yield from map(part.evaluation, range(part.steps_for(heldout_each(most, batches))))


def never_predicted(tokenizer: Tokenizer, objective: str) -> list[int]:
  """Ids that no masked or next token has."""
  sep = [tokenizer.sep_id] if objective != 'next_token' else []
  return [tokenizer.pad_id, tokenizer.cls_id, *sep]


def cross_entropy(
  counts: np.ndarray, heldout: Iterable[dict], *, exclude: list[int], total: Callable = np.asarray
) -> float:
  """Nats per masked held-out token under add-one-smoothed token frequencies.

  Args:
    counts: how often each id occurs elsewhere, int64 [V].
    heldout: evaluation batches with 'masked_lm_ids' and 'masked_lm_weights' [B, P], this process's
      rows of them.
    exclude: ids that are never predicted.
    total: sums an array over the processes (`training.distributed.total`).
  """
  counts = counts.copy()
  counts[list(exclude)] = 0
  nats = -np.log((counts + 1) / (counts.sum() + len(counts)))
  sums = np.zeros(2)
  for batch in heldout:
    weights = batch['masked_lm_weights']
    sums += (nats[batch['masked_lm_ids']] * weights).sum(), weights.sum()
  loss, weight = total(sums)
  return float(loss / weight)
