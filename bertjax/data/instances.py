"""Tokenised documents to training rows of fixed length.

A `Corpus` holds documents end to end in flat arrays. A builder yields sequences: spans of its
tokens. `packing.first_fit` puts several into a row, and `to_columns` lays rows out in the dataset's
columns, with the special tokens of a `Template`, S sequences a row (1 unless packed), `ends` 0 for
absent sequences:

  input_ids             [L]     [CLS] A [SEP] B [SEP], the next sequence, ..., padding
  ends                  [S, 2]  where token type 0 ends (after A's [SEP]), and the sequence
  next_sentence_labels  [S]     'nsp': 0 = B follows A, 1 = B is random; 'sop': 1 = swapped
"""

import bisect
import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bertjax.data.prng import EXAMPLES, hash_u64

PAIR_KINDS = ('nsp', 'sop')
KINDS = (*PAIR_KINDS, 'doc_sentences', 'full_sentences')


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents end to end; the arrays may be memory-mapped."""

  tokens: np.ndarray  # ids of all sentences [T]
  sentences: np.ndarray  # where each sentence starts in `tokens`, and T: int64 [N + 1]
  documents: np.ndarray  # where each document starts in `sentences`, and N: int64 [M + 1]

  def __len__(self) -> int:
    return len(self.documents) - 1

  def starts(self, document: int) -> list[int]:
    """Where the sentences of a document start in `tokens`, and where the last one ends."""
    first, last = self.documents[document], self.documents[document + 1]
    return self.sentences[first : last + 1].tolist()


class Instance(NamedTuple):
  """One sequence: spans (start, stop) of the corpus' tokens."""

  spans: tuple[tuple[int, int], ...]
  label: int = 0
  pair: bool = False  # the second span is B; otherwise all spans are A


class Template(NamedTuple):
  """The special tokens of a sequence: `first` A `last`, or `first` A `between` B `last`.

  Several spans without a pair have a `last` after each.

  Attributes:
    first: id of [CLS].
    last: id of [SEP].
    between: ids, one or more: [SEP] in BERT, </s></s> in RoBERTa.
    shared: how many of `between` have token type 0, as A has; the rest, B and its `last` have type
      1. None: every token has type 0.
  """

  first: int
  last: int
  between: tuple[int, ...]
  shared: int | None = 1

  def count(self, texts: int) -> int:
    """Special tokens of a sequence of one or two texts."""
    return 2 + (texts - 1) * len(self.between)

  def size(self, item: Instance) -> int:
    """Tokens of a sequence with its special ones."""
    special = self.count(2) if item.pair else 1 + len(item.spans)
    return special + sum(stop - start for start, stop in item.spans)


def columns(kind: str, length: int, vocab_size: int, sequences: int = 1) -> dict:
  """The columns of a kind of instance in a dataset: {name: (dtype, shape)}."""
  result = {
    'input_ids': ('uint16' if vocab_size <= 2**16 else 'int32', (length,)),
    'ends': ('uint16', (sequences, 2)),
  }
  return result | ({'next_sentence_labels': ('uint8', (sequences,))} if kind in PAIR_KINDS else {})


def build(
  corpus: Corpus, kind: str, *, length: int, short_seq_prob: float = 0.1,
  dupe_factor: int = 1, seed: int = 0, separators: int = 1,
) -> Iterator[Instance]:  # fmt: skip
  """Yields the sequences of all documents, `dupe_factor` times with other pairs each time.

  Args:
    corpus: of one shard; random second sentences are drawn from its documents.
    kind: 'nsp' (Google's pairs), 'sop' (ALBERT's), 'doc_sentences', 'full_sentences' (RoBERTa's).
    length: L, special tokens included.
    short_seq_prob: probability that a document ('full_sentences': a row) gets a random length.
    dupe_factor: times that each document is used.
    seed: every document of every pass has a separate random stream.
    separators: special tokens between the texts of a pair.

  Raises:
    ValueError: if 'nsp' is asked of fewer than two documents.
  """
  if kind == 'nsp' and len(corpus) < 2:
    raise ValueError(
      f'next-sentence prediction draws its wrong answers from other documents, got {len(corpus)} '
      'document(s); add text, use fewer shards (--config.data.num_shards), or train without it '
      '(--config.nsp=False).'
    )
  pair = 2 + separators
  special = {'nsp': pair, 'sop': pair, 'doc_sentences': 2, 'full_sentences': 1}[kind]
  for number in range(dupe_factor):
    if kind == 'full_sentences':
      rng = random.Random(int(hash_u64(seed, EXAMPLES, number)))
      yield from full_sentences(corpus, rng, length - special, short_seq_prob)
      continue
    keys = hash_u64(seed, EXAMPLES, number, np.arange(len(corpus))).tolist()
    for index, key in enumerate(keys):
      rng, limit = random.Random(key), length - special
      target = _randint(rng, 2, limit) if rng.random() < short_seq_prob else limit
      if kind == 'nsp':
        yield from nsp_pairs(corpus, index, rng, limit, target)
      elif kind == 'sop':
        yield from sop_pairs(corpus.starts(index), rng, limit, target)
      else:
        yield from doc_sentences(corpus.starts(index), target)


def tally(rows: Iterable[Instance], corpus: Corpus, counts: dict) -> Iterator[Instance]:
  """Passes sequences on; when they end, `counts` has the number of pairs, of pairs with label 1,
  and of tokens of the corpus that are in any sequence."""
  counts |= {'pairs': 0, 'label_1': 0}
  used = np.zeros(len(corpus.tokens), bool)
  for row in rows:
    counts['pairs'] += row.pair
    counts['label_1'] += row.label
    for start, stop in row.spans:
      used[start:stop] = True
    yield row
  counts['tokens_used'] = int(used.sum())


def count_chunks(starts: list[int], target: int) -> tuple[int, int]:
  """The chunks that `nsp_pairs` makes of a document if no label is random, and how many of them are
  one sentence, whose label is always random."""
  first, chunks, single = 0, 0, 0
  while first < len(starts) - 1:
    end = _gather(starts, first, target)
    chunks, single, first = chunks + 1, single + (end - first == 1), end
  return chunks, single


def nsp_pairs(
  corpus: Corpus, index: int, rng: random.Random, limit: int, target: int
) -> Iterator[Instance]:
  """Pairs of one document by Google's rule (create_pretraining_data.py); over half are random.

  Sentences are gathered up to a target length and split in two at random. A random second part
  comes from another document (ten tries), and the sentences it displaces are used again.
  """
  starts, first = corpus.starts(index), 0
  while first < len(starts) - 1:
    end = _gather(starts, first, target)
    cut = first + (_randint(rng, 1, end - first - 1) if end - first >= 2 else 1)
    a, b = (starts[first], starts[cut]), (starts[cut], starts[end])
    is_random = end - first == 1 or rng.random() < 0.5
    if is_random:
      b = _random_part(corpus, index, rng, target - (a[1] - a[0]))
    first = cut if is_random else end
    yield Instance(_truncate(a, b, limit, rng), int(is_random), True)


def sop_pairs(starts: list[int], rng: random.Random, limit: int, target: int) -> Iterator[Instance]:
  """Sentence-order pairs (Lan et al. 2019, section 3.1): half of them are swapped, label 1.

  A single sentence has no order and is skipped; ALBERT's code gives it a random partner instead.
  """
  first = 0
  while first < len(starts) - 1:
    end = _gather(starts, first, target)
    if end - first >= 2:
      cut = first + _randint(rng, 1, end - first - 1)
      swap = rng.random() < 0.5
      pair = _truncate((starts[first], starts[cut]), (starts[cut], starts[end]), limit, rng)
      yield Instance(pair[::-1] if swap else pair, int(swap), True)
    first = end


def doc_sentences(starts: list[int], limit: int) -> Iterator[Instance]:
  """As many consecutive sentences of a document as fit; a longer one continues in the next row."""
  position = starts[0]
  while position < starts[-1]:
    stop = _fit(starts, position, limit) or position + limit
    yield Instance(((position, stop),))
    position = stop


def full_sentences(
  corpus: Corpus, rng: random.Random, limit: int, short: float
) -> Iterator[Instance]:
  """Rows filled across documents with a [SEP] between them (Liu et al. 2019, section 4.2)."""

  def new_target():
    return _randint(rng, 2, limit) if rng.random() < short else limit

  spans, left = [], new_target()
  for document in range(len(corpus)):
    starts = corpus.starts(document)
    position = starts[0]
    while position < starts[-1]:
      stop = _fit(starts, position, left - 1)
      if stop is None and not spans:
        stop = position + left - 1  # a sentence longer than a row
      if stop is not None:
        spans.append((position, stop))
        left -= stop - position + 1
        position = stop
      if position < starts[-1] or left < 2:
        yield Instance(tuple(spans))
        spans, left = [], new_target()
  if spans:
    yield Instance(tuple(spans))


def _gather(starts: list[int], first: int, target: int) -> int:
  """One past the last sentence of the chunk that starts at `first` and reaches the target."""
  return min(bisect.bisect_left(starts, starts[first] + target, first + 1), len(starts) - 1)


def _fit(starts: list[int], position: int, limit: int) -> int | None:
  """The last sentence end after `position` and at most `limit` tokens away, if there is one."""
  stop = starts[bisect.bisect_right(starts, position + limit) - 1]
  return stop if stop > position else None


def _random_part(corpus, index, rng, wanted) -> tuple[int, int]:
  for _ in range(10):  # may still end at the same document, as in Google's code
    other = _randint(rng, 0, len(corpus) - 1)
    if other != index:
      break
  begin, end = corpus.documents[other : other + 2].tolist()
  first = _randint(rng, begin, end - 1)
  start = int(corpus.sentences[first])
  ends = corpus.sentences[first + 1 : end + 1]
  last = min(int(ends.searchsorted(start + max(wanted, 1))), len(ends) - 1)
  return start, int(ends[last])


def _truncate(a, b, limit: int, rng: random.Random):
  """Drops tokens of the longer span, at its front or back with equal chance, until both fit."""
  (a_start, a_stop), (b_start, b_stop) = a, b
  a_size, b_size, draw = a_stop - a_start, b_stop - b_start, rng.random
  a_left, b_left, a_front, b_front = a_size, b_size, 0, 0
  for _ in range(a_size + b_size - limit):
    if a_left > b_left:
      a_left -= 1
      a_front += draw() < 0.5
    else:
      b_left -= 1
      b_front += draw() < 0.5
  a_start, b_start = a_start + a_front, b_start + b_front
  return (a_start, a_start + a_left), (b_start, b_start + b_left)


def _randint(rng: random.Random, low: int, high: int) -> int:
  """A uniform integer in [low, high]; only `random()` is the same in every Python version."""
  return low + int(rng.random() * (high - low + 1))


def to_columns(
  rows: Iterable[list[Instance]], tokens: np.ndarray, length: int, sequences: int = 1,
  *, template: Template, pad_id: int, size: int = 4096,
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
  """Lays rows out in the dataset's columns, `size` rows at a time."""
  first, last, between, shared = template
  rows, tokens = iter(rows), np.asarray(tokens)  # slices of a memory map itself are slow
  while batch := list(itertools.islice(rows, size)):
    ids = np.full((len(batch), length), pad_id, tokens.dtype)
    ends = np.zeros((len(batch), sequences, 2), 'uint16' if length < 2**16 else 'int32')
    labels = np.zeros((len(batch), sequences), np.uint8)
    for i, row in enumerate(batch):
      end = 0
      for j, item in enumerate(row):
        ids[i, end] = first
        end += 1
        type_1 = None
        for number, (start, stop) in enumerate(item.spans):
          ids[i, end : end + stop - start] = tokens[start:stop]
          end += stop - start
          closing = between if item.pair and number == 0 else (last,)
          ids[i, end : end + len(closing)] = closing
          if closing is between and shared is not None:
            type_1 = end + shared
          end += len(closing)
        ends[i, j] = end if type_1 is None else type_1, end
        labels[i, j] = item.label
    yield {'input_ids': ids, 'ends': ends, 'next_sentence_labels': labels}


def lay_out(rows: Sequence[Sequence[list[int]]], tokenizer, length: int) -> dict[str, np.ndarray]:
  """Columns of the tokenizer's template, from one or two lists of ids per row."""
  spec = columns('doc_sentences', length, tokenizer.vocab_size)
  parts = [part for row in rows for part in row]
  ends = itertools.accumulate(map(len, parts), initial=0)
  spans = itertools.pairwise(ends)
  items = [[Instance(tuple(next(spans) for _ in row), pair=len(row) == 2)] for row in rows]
  tokens = np.fromiter(itertools.chain.from_iterable(parts), spec['input_ids'][0])
  laid = to_columns(
    items, tokens, length, template=tokenizer.template, pad_id=tokenizer.pad_id, size=len(items)
  )
  empty = {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in spec.items()}
  batch = next(laid, empty)
  return {name: batch[name] for name in spec}
