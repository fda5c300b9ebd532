"""Tokenised documents to training rows of fixed length.

`nsp_pairs` follows create_pretraining_data.py (google-research/bert); `full_sentences` fills rows
with consecutive sentences of one document, for models without next-sentence prediction. A row is
(ids of A, ids of B, label); `to_columns` turns rows into the store's columns:

  input_ids             [L]  [CLS] A [SEP] B [SEP] and padding; without B [CLS] A [SEP]
  ends                  [2]  where A with its [SEP] ends, and where the text ends
  next_sentence_labels  []   0 = B follows A, 1 = B is random
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bertjax.data.order import EXAMPLES, mix

KINDS = ('nsp', 'full_sentences')

Document = Sequence[Sequence[int]]  # sentences of token ids, none empty
Row = tuple[list[int], list[int], int]


def columns(kind: str, length: int, vocab_size: int) -> dict:
  """The store's columns of a kind of example: {name: (dtype, shape)}."""
  result = {
    'input_ids': ('uint16' if vocab_size <= 2**16 else 'int32', (length,)),
    'ends': ('uint16', (2,)),
  }
  return result | ({'next_sentence_labels': ('uint8', ())} if kind == 'nsp' else {})


def build_rows(
  documents: Sequence[Document], kind: str, *, length: int, short_probability: float = 0.1,
  passes: int = 1, seed: int = 0,
) -> Iterator[Row]:  # fmt: skip
  """Yields the rows of all documents, `passes` times with other pairs each time.

  Args:
    documents: of one shard; random second sentences are drawn from these.
    kind: 'nsp' or 'full_sentences'.
    length: L, special tokens included.
    short_probability: share of passes over a document that use a random shorter length ('nsp').
    passes: Google's dupe_factor.
    seed: every document of every pass has a random stream of its own.

  Raises:
    ValueError: if 'nsp' is asked of fewer than two documents.
  """
  if kind == 'full_sentences':
    for document in documents:
      yield from full_sentences(document, length - 2)
    return
  if len(documents) < 2:
    raise ValueError(
      f'next-sentence prediction draws its wrong answers from other documents, got '
      f'{len(documents)} document(s); add text or train without it (--config.nsp=False).'
    )
  for number in range(passes):
    for index in range(len(documents)):
      rng = random.Random(int(mix(seed, EXAMPLES, number, index)))
      yield from nsp_pairs(documents, index, rng, length - 3, short_probability)


def nsp_pairs(
  documents: Sequence[Document], index: int, rng: random.Random, max_tokens: int, short: float
) -> Iterator[Row]:
  """Sentence pairs of one document by Google's rule; about half have a random second part.

  Sentences are gathered up to a target length, which is drawn once for the document, and cut in
  two at random. A random second part comes from another document (ten tries), and the sentences
  it displaces are used again.
  """
  document = documents[index]
  target = max_tokens
  if rng.random() < short:
    target = _randint(rng, 2, max_tokens)
  chunk, size, i = [], 0, 0
  while i < len(document):
    chunk.append(document[i])
    size += len(document[i])
    if i == len(document) - 1 or size >= target:
      cut = _randint(rng, 1, len(chunk) - 1) if len(chunk) >= 2 else 1
      a = [token for sentence in chunk[:cut] for token in sentence]
      is_random = len(chunk) == 1 or rng.random() < 0.5
      if is_random:
        b = _random_part(documents, index, rng, target - len(a))
        i -= len(chunk) - cut  # put the displaced sentences back
      else:
        b = [token for sentence in chunk[cut:] for token in sentence]
      _truncate(a, b, max_tokens, rng)
      yield a, b, int(is_random)
      chunk, size = [], 0
    i += 1


def _random_part(documents, index, rng, wanted) -> list[int]:
  for _ in range(10):  # may still end at the same document, as in Google's code
    other = _randint(rng, 0, len(documents) - 1)
    if other != index:
      break
  document, b = documents[other], []
  for sentence in document[_randint(rng, 0, len(document) - 1) :]:
    b.extend(sentence)
    if len(b) >= wanted:
      break
  return b


def _truncate(a: list[int], b: list[int], max_tokens: int, rng: random.Random) -> None:
  """Drops tokens of the longer part, at its front or back with equal chance, until both fit."""
  front = {id(a): 0, id(b): 0}
  sizes = {id(a): len(a), id(b): len(b)}
  while sum(sizes.values()) > max_tokens:
    longer = id(a) if sizes[id(a)] > sizes[id(b)] else id(b)
    sizes[longer] -= 1
    front[longer] += rng.random() < 0.5
  for part in (a, b):
    part[:] = part[front[id(part)] : front[id(part)] + sizes[id(part)]]


def _randint(rng: random.Random, low: int, high: int) -> int:
  """A uniform integer in [low, high]; only `random()` is the same in every Python version."""
  return low + int(rng.random() * (high - low + 1))


def full_sentences(document: Document, max_tokens: int) -> Iterator[Row]:
  """Consecutive sentences, as many as fit in a row; a longer sentence goes on in the next row."""
  row = []
  for sentence in document:
    if row and len(row) + len(sentence) > max_tokens:
      yield row, [], 0
      row = []
    row = [*row, *sentence]
    while len(row) > max_tokens:
      yield row[:max_tokens], [], 0
      row = row[max_tokens:]
  if row:
    yield row, [], 0


def to_columns(
  rows: Iterable[Row], length: int, *, cls_id: int, sep_id: int, pad_id: int, size: int = 4096
) -> Iterator[dict[str, np.ndarray]]:
  """Lays rows out in the store's columns, `size` rows at a time."""
  rows = iter(rows)
  while batch := list(itertools.islice(rows, size)):
    ids = np.full((len(batch), length), pad_id, np.int32)
    ends = np.empty((len(batch), 2), np.int32)
    for i, (a, b, _) in enumerate(batch):
      tokens = [cls_id, *a, sep_id]
      ends[i, 0] = len(tokens)
      if b:
        tokens += [*b, sep_id]
      ends[i, 1] = len(tokens)
      ids[i, : len(tokens)] = tokens
    labels = np.array([label for _, _, label in batch], np.uint8)
    yield {'input_ids': ids, 'ends': ends, 'next_sentence_labels': labels}
