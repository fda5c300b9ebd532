"""What a corpus holds, seen through a vocabulary: lengths, [UNK] rate, duplicates, NSP or not.

Also cuts any stream of texts into units for spawned worker processes. The units depend on the texts
alone, so what is computed from them does not depend on the number of processes.
"""

import collections
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from bertjax.data import instances, words
from bertjax.data import text as text_lib
from bertjax.data import workers as worker_lib
from bertjax.data.tokenizer import Tokenizer

# Lengths in tokens up to which sentences and documents are counted; the last bucket is open.
EDGES = (16, 64, 128, 512, 2048, 8192)

ROW = 128  # tokens of a row, for the share of random labels

_UNIT = 2**23  # characters
_MEMO = 2**20  # chunks whose token counts a process remembers


def map_units(function: Callable, texts: Iterable[str], workers: int = 1) -> Iterator:
  """Yields function(list of texts) for units of about 8 million characters, in order.

  Args:
    function: picklable; it runs in this process if there is but one unit or one worker.
    texts: documents; a longer one is a unit of its own.
    workers: processes, spawned.
  """
  units = worker_lib.batches(texts, _UNIT)
  first = list(itertools.islice(units, 2))
  count = workers if workers > 1 and len(first) > 1 else 0
  with worker_lib.processes(count, threads=False) as in_order:  # functions keep a memo
    yield from in_order(function, itertools.chain(first, units))


def chunks(text: str) -> Iterator[str]:
  """Yields what stands between white space; no tokenizer looks beyond. Holds a slice at a time."""
  for space in '\t\n\r':
    text = text.replace(space, ' ')
  start = 0
  while start < len(text):
    end = text.find(' ', start + 2**20)
    end = len(text) if end < 0 else end
    yield from filter(None, text[start:end].split(' '))
    start = end


_WORDS = re.compile(f'[{words.HAN}]|[^{words.HAN}]*?\\w[^{words.HAN}]*')


def count_words(chunk: str) -> int:
  """Words of a text without white space: one, or each Han character and kana and what is between
  them, punctuation aside. Thai, Lao, Khmer and Burmese, which need a dictionary, count as one."""
  return 1 if chunk.isascii() else len(_WORDS.findall(chunk)) or 1


def describe(
  texts: Iterable[str], vocab, *, format: str = 'prose', lowercase: bool = True, workers: int = 1
) -> dict:
  """Measures a corpus in tokens of a vocabulary.

  Args:
    texts: documents of `text_lib.read_documents`.
    vocab: a `vocab.txt` or `spiece.model`.
    format: how documents fall into sentences, see `sources`.
    lowercase: as for `Tokenizer.from_file`.
    workers: spawned processes; the result does not depend on it.

  Returns:
    Counts by name (tokens without special ones; words between white space, of which Han characters
    and kana are one each; `duplicates` = documents whose text occurred before), two histograms over
    `EDGES`, `random_labels` = the share of next-sentence labels that would be random in rows of 128
    tokens, and the advice for `--config.nsp`.

  Raises:
    ValueError: if the vocabulary cannot be read or there is no text.
  """
  vocab = str(vocab)
  _tokenizer(vocab, lowercase)  # a bad vocabulary is told here, not by a worker
  measure = functools.partial(_measure, vocab=vocab, format=format, lowercase=lowercase)
  total, hashes = None, []
  for counts, digests in map_units(measure, texts, workers):
    total = counts if total is None else {name: total[name] + n for name, n in counts.items()}
    hashes.append(digests)
  if total is None:
    raise ValueError('the input holds no text once blank documents are left out.')
  result = {name: n.tolist() if isinstance(n, np.ndarray) else n for name, n in total.items()}
  result['duplicates'] = result['documents'] - len(np.unique(np.concatenate(hashes)))
  chunks, single = result.pop('chunks'), result.pop('single_chunks')
  result['random_labels'] = (chunks + single) / max(2 * chunks, 1)
  result['nsp'] = 2 * result['documents_for_nsp'] >= max(4, result['documents'])
  return result


def _measure(texts: list[str], vocab: str, format: str, lowercase: bool) -> tuple[dict, np.ndarray]:
  """Counts of one unit, and a 64-bit hash of each document."""
  documents = [text_lib.split_document(text, format) for text in texts]
  seen = collections.Counter()
  for sentence in itertools.chain.from_iterable(documents):
    seen.update(chunks(sentence))
  tokens, unknown = _token_counts(seen, vocab, lowercase)
  lengths = [[sum(map(tokens.__getitem__, chunks(s))) for s in document] for document in documents]
  counts = {
    'documents': len(texts),
    'sentences': sum(map(len, lengths)),
    'words': sum(n * count_words(chunk) for chunk, n in seen.items()),
    'tokens': sum(map(sum, lengths)),
    'unknown': sum(n * unknown[chunk] for chunk, n in seen.items() if chunk in unknown),
    **_chunks(lengths),
    'documents_for_nsp': sum(len(document) >= 2 for document in lengths),
    'sentences_by_length': _histogram([n for document in lengths for n in document]),
    'documents_by_length': _histogram([sum(document) for document in lengths]),
  }
  digests = b''.join(hashlib.blake2b(t.encode(), digest_size=8).digest() for t in texts)
  return counts, np.frombuffer(digests, np.uint64)


def _chunks(lengths: list[list[int]]) -> dict[str, int]:
  """Next-sentence chunks of rows of 128 tokens, and how many of them are a single sentence."""
  counts = np.zeros(2, int)
  for document in lengths:
    starts = np.cumsum([0, *(n for n in document if n)]).tolist()
    counts += instances.count_chunks(starts, ROW - 3)
  return dict(zip(('chunks', 'single_chunks'), counts.tolist(), strict=True))


def _histogram(lengths: list[int]) -> np.ndarray:
  return np.bincount(np.searchsorted(EDGES, lengths), minlength=len(EDGES) + 1)


@functools.lru_cache(1)
def _tokenizer(vocab: str, lowercase: bool) -> tuple[Tokenizer, dict, dict]:
  """The tokenizer and what this process knows by chunk: its tokens, and how many are [UNK]."""
  return Tokenizer.from_file(vocab, lowercase=lowercase), {}, {}


def _token_counts(seen: Iterable[str], vocab: str, lowercase: bool) -> tuple[dict, dict]:
  """Token counts of chunks: every distinct one is tokenised once, for no piece spans two."""
  tokenizer, tokens, unknown = _tokenizer(vocab, lowercase)
  if len(tokens) > _MEMO:
    tokens.clear(), unknown.clear()
  new = (chunk for chunk in seen if chunk not in tokens)
  while batch := list(itertools.islice(new, 10_000)):
    for chunk, ids in zip(batch, tokenizer.encode(batch), strict=True):
      tokens[chunk] = len(ids)
      if tokenizer.unk_id in ids:
        unknown[chunk] = ids.count(tokenizer.unk_id)
  return tokens, unknown


def count_cased(tokenizer: Tokenizer) -> tuple[int, int]:
  """How many entries of a vocabulary have capitals, and how many have letters with a case."""
  own = [entry for entry in tokenizer.vocab if not entry.startswith(('[', '<'))]
  cased = sum(entry != entry.lower() for entry in own)
  return cased, cased + sum(entry != entry.upper() for entry in own if entry == entry.lower())
