"""WordPiece and byte-level BPE training, and statistics of a corpus under a vocabulary.

The trainers count words, then merge the most frequent pair of tokens. Equal counts are decided by
spelling, so two trainings on the same text give the same file (Hugging Face's trainer iterates over
hash maps and does not). `describe` measures lengths, [UNK] rate and duplicates.
"""

import collections
import functools
import hashlib
import heapq
import itertools
import logging
import re
from collections.abc import Iterable

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from bertjax.data import instances, tokenizer_json, words
from bertjax.data import text as text_lib
from bertjax.data import workers as worker_lib
from bertjax.data.normalization import word_splitter
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer

# Google's ids: [PAD] is 0, 99 unused rows for domain words, then the other four.
UNUSED = 99
_HEADER = ('[PAD]', *(f'[unused{i}]' for i in range(UNUSED)), *SPECIAL_TOKENS[1:])
_ALPHABET = 1000  # characters that are kept however rare, the most frequent ones
_LONG = 10_000  # longer chunks are split, which bounds the normaliser's memory

# Lengths in tokens up to which sentences and documents are counted; the last bucket is open.
EDGES = (16, 64, 128, 512, 2048, 8192)
ROW = 128  # tokens of a row, for the fraction of random labels
_MEMO = 2**20  # chunks whose token counts a process remembers

_log = logging.getLogger(__name__)


class WordCounts(collections.Counter):
  """Counts by word.

  Attributes:
    error: at most so many occurrences of any word were lost to pruning; 0 = the counts are exact.
  """

  error = 0

  def prune(self, most: int) -> None:
    """If there are more than `most` words, keeps at most half as many: the more frequent ones."""
    if len(self) > most:
      floor = sorted(self.values(), reverse=True)[most // 2]
      for word in [word for word, count in self.items() if count <= floor]:
        del self[word]
      self.error += floor


def count_words(
  texts: Iterable[str], *, lowercase: bool = True, max_words: int = 1_000_000, workers: int = 1,
  byte_level: bool = False,
) -> WordCounts:  # fmt: skip
  """Counts words as BERT's normaliser and pre-tokenizer see them.

  Args:
    texts: documents.
    lowercase: lower and strip accents.
    byte_level: counts words as RoBERTa's pre-tokenizer splits them: bytes, with the space before
      all but the first word of a line; the case is kept.
    max_words: when more distinct words than this are held, the rare half is dropped, which bounds
      the memory (lossy counting, Manku and Motwani 2002).
    workers: spawned processes; the result does not depend on it.
  """
  counts = WordCounts()
  count = _count_bytes if byte_level else functools.partial(_count, lowercase=lowercase)
  for part in worker_lib.map_units(count, texts, workers):
    counts.update(part)
    counts.prune(max_words)
  return counts


def _count(texts: list[str], lowercase: bool) -> collections.Counter:
  """Counts the words of one unit; each distinct chunk between white space is split once."""
  normalizer, splitter = word_splitter(lowercase)
  seen = collections.Counter()
  for text in texts:
    seen.update(words.chunks(text))
  counts = collections.Counter()
  for chunk, count in seen.items():
    if chunk.isascii() and chunk.isprintable():  # what is no letter or digit is punctuation
      for word in re.findall('[A-Za-z0-9]+|[^A-Za-z0-9]', chunk.lower() if lowercase else chunk):
        counts[word] += count
      continue
    for start in range(0, len(chunk), _LONG):
      piece = normalizer.normalize_str(chunk[start : start + _LONG])
      for word, _ in splitter.pre_tokenize_str(piece):
        counts[word] += count
  return counts


def _count_bytes(texts: list[str]) -> collections.Counter:
  """Counts the words of one unit for byte-level BPE, each as the letters of its bytes."""
  seen = collections.Counter()
  for text in texts:
    for line in text.splitlines():
      first, *others = line.split() or ['']
      seen[first] += 1
      seen.update(' ' + word for word in others)
  counts, splitter = collections.Counter(), pre_tokenizers.ByteLevel(add_prefix_space=False)
  for chunk, count in seen.items():
    for start in range(0, len(chunk), _LONG):
      for word, _ in splitter.pre_tokenize_str(chunk[start : start + _LONG]):
        counts[word] += count
  return counts


def train_bpe(counts: dict[str, int], size: int, *, min_count: int = 2) -> tokenizers.Tokenizer:
  """Trains byte-level BPE of exactly `size` entries, with RoBERTa's special tokens and template.

  Args:
    counts: words and how often each occurs, by `count_words(byte_level=True)`.
    size: entries: five special tokens, 256 bytes, then merges in order of frequency.
    min_count: pairs must occur this often to be merged.

  Raises:
    ValueError: if the text does not yield that many entries, or size is below 261.
  """
  header, alphabet = tokenizer_json.ROBERTA, sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab, merges = dict.fromkeys([*header.values(), *alphabet]), []
  if size < len(vocab):
    raise ValueError(f'byte-level BPE needs a size of at least {len(vocab)}, got {size}.')
  words = [(w, n) for w, n in sorted(counts.items()) if len(w) <= 100]
  for pair, piece in _merges([list(w) for w, _ in words], [n for _, n in words], min_count, ''):
    if len(vocab) == size:
      break
    vocab.setdefault(piece)
    merges.append(pair)
  if len(vocab) < size:
    raise ValueError(
      f'this text yields only {len(vocab)} entries, {size} were asked for; choose a size of at '
      f'most {len(vocab)} or bring more text.'
    )
  fast = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
  tokenizer_json.make_byte_level(fast, header)
  return fast


def train_wordpiece(
  counts: dict[str, int], size: int, *, alphabet: int | None = None, min_count: int = 2
) -> list[str]:
  """Trains a vocabulary of exactly `size` entries.

  Args:
    counts: words and how often each occurs.
    size: entries, special and unused ones included.
    alphabet: how many characters to keep, the most frequent; words with others are skipped. None:
      1,000 and every other one that occurs `min_count` times, as far as the size allows. Where
      they would take over half of it, the rarest are dropped that make up 1 in 100,000 characters.
    min_count: pairs must occur this often to be merged.

  Returns:
    The entries by id: Google's header, single characters, then merges in order of frequency.

  Raises:
    ValueError: if the text does not yield that many entries, or size is too small to hold the
      alphabet; the message says which size would do.
  """
  kept, rare = choose_alphabet(counts, size, len(_HEADER), alphabet, min_count)
  words = [(w, n) for w, n in sorted(counts.items()) if len(w) <= 100 and kept.issuperset(w)]
  inner = {letter: '##' + letter for letter in kept}  # one object each
  pieces = [[w[0], *map(inner.__getitem__, w[1:])] for w, _ in words]
  initial = sorted({piece for word in pieces for piece in word})
  vocab = dict.fromkeys([*_HEADER, *initial])
  if size < len(vocab):
    raise ValueError(
      f'a vocabulary of {size} cannot hold {len(_HEADER)} special entries and {len(initial)} '
      f'single characters; choose a size of at least {len(vocab)}.'
    )
  merges = _merges(pieces, [n for _, n in words], min_count, '##')
  for _, piece in merges:
    if len(vocab) == size:
      break
    vocab.setdefault(piece)
  if len(vocab) < size:
    raise ValueError(
      f'this text yields only {len(vocab)} entries, {size} were asked for: {len(_HEADER)} special '
      f'ones, {len(initial)} for its {len(kept)} characters ({rare} more are too rare), and '
      f'{len(vocab) - len(_HEADER) - len(initial)} merged tokens that occur {min_count} times or '
      f'more; choose a size of at most {len(vocab)} or bring more text.'
    )
  return list(vocab)


def choose_alphabet(
  counts: dict[str, int], size: int, reserved: int, most: int | None = None, min_count: int = 2
) -> tuple[set[str], int]:
  """The characters that a vocabulary of `size` entries keeps, and how many are too rare for it.

  Args:
    counts: words and how often each occurs.
    size: entries of the vocabulary.
    reserved: how many of them are no characters.
    most: see `train_wordpiece`.
    min_count: likewise.
  """
  room = size - reserved
  letters, entries = collections.Counter(), collections.defaultdict(set)
  for word, count in counts.items():
    for place, letter in enumerate(word):
      letters[letter] += count
      entries[letter].add(place > 0)  # it begins a word, or continues one
  order = sorted(letters, key=lambda c: (-letters[c], c))
  if most is not None:
    return set(order[:most]), len(order[most:])
  often = [c for i, c in enumerate(order) if i < _ALPHABET or letters[c] >= min_count]
  total, used, rest, kept = letters.total(), 0, letters.total(), set()
  for place, letter in enumerate(often):
    used += len(entries[letter])
    if place >= _ALPHABET and used > size / 2 and rest < 1e-5 * total:
      break
    if used > room:
      if rest < 0.01 * total:
        _log.warning(
          'the vocabulary holds the %d most frequent characters of the text; %d others, %.2g%% of '
          'its characters, do not fit and become [UNK].',
          place, len(order) - place, 100 * rest / total,
        )  # fmt: skip
        break
      return set(often), len(order) - len(often)  # which does not fit: refused with the least size
    rest -= letters[letter]
    kept.add(letter)
  return kept, len(order) - len(kept)


def _merges(
  words: list[list[str]], counts: list[int], min_count: int, prefix: str
) -> Iterable[tuple[tuple[str, str], str]]:
  """Yields pairs and the tokens that they become, the most frequent pair first, and applies each
  merge to all words; `prefix` marks tokens that continue a word."""
  pair_counts, where = collections.Counter(), collections.defaultdict(set)
  for i, word in enumerate(words):
    for pair in itertools.pairwise(word):
      pair_counts[pair] += counts[i]
      where[pair].add(i)
  heap = [(-count, pair) for pair, count in pair_counts.items()]
  heapq.heapify(heap)
  while heap:
    negative, pair = heapq.heappop(heap)
    if pair_counts[pair] != -negative:
      continue  # out of date: the pair was pushed again with its present count
    if -negative < min_count:
      return
    merged = pair[0] + pair[1].removeprefix(prefix)
    changed = set()
    for i in where.pop(pair):
      changed |= _merge_word(words[i], pair, merged, counts[i], pair_counts, where, i)
    pair_counts[pair] = 0
    for other in changed - {pair}:
      if pair_counts[other] >= min_count:
        heapq.heappush(heap, (-pair_counts[other], other))
    yield pair, merged


def _merge_word(word, pair, merged, count, pair_counts, where, index) -> set:
  """Merges a pair in one word, in place; returns the neighbouring pairs whose counts changed."""
  changed = set()

  def add(left, right, amount):
    pair_counts[left, right] += amount
    changed.add((left, right))
    if amount > 0:
      where[left, right].add(index)

  i = 0
  while i < len(word) - 1:
    if (word[i], word[i + 1]) != pair:
      i += 1
      continue
    if i:
      add(word[i - 1], pair[0], -count)
      add(word[i - 1], merged, count)
    if i + 2 < len(word):
      add(pair[1], word[i + 2], -count)
      add(merged, word[i + 2], count)
    word[i : i + 2] = [merged]
    i += 1
  return changed


def describe(
  texts: Iterable[str], vocab, *, format: str = 'prose', lowercase: bool = True, workers: int = 1
) -> dict:
  """Measures a corpus in tokens of a vocabulary.

  Args:
    texts: documents of `text.read_documents`.
    vocab: a `vocab.txt`, `spiece.model` or `tokenizer.json`.
    format: how documents are split into sentences, see `data.text`.
    lowercase: as for `Tokenizer.from_file`.
    workers: spawned processes; the result does not depend on it.

  Returns:
    Counts by name (tokens without special ones; whitespace-delimited words, where each Han
    character and kana is a word; `duplicates`: documents whose text occurred before), two
    histograms over `EDGES`, `random_labels`: the fraction of next-sentence labels that would be
    random in rows of 128 tokens, and `nsp`: whether to train with them.

  Raises:
    ValueError: if the vocabulary cannot be read or there is no text.
  """
  vocab = str(vocab)
  _tokenizer(vocab, lowercase)  # raises here, not in a worker
  measure = functools.partial(_measure, vocab=vocab, format=format, lowercase=lowercase)
  total, hashes = None, []
  for counts, digests in worker_lib.map_units(measure, texts, workers):
    total = counts if total is None else {name: total[name] + n for name, n in counts.items()}
    hashes.append(digests)
  if total is None:
    raise ValueError('the input has no text once blank documents are dropped.')
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
    seen.update(words.chunks(sentence))
  tokens, unknown = _token_counts(seen, vocab, lowercase)
  count = tokens.__getitem__
  lengths = [[sum(map(count, words.chunks(s))) for s in document] for document in documents]
  counts = {
    'documents': len(texts),
    'sentences': sum(map(len, lengths)),
    'words': sum(n * words.count_words(chunk) for chunk, n in seen.items()),
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
  """Token counts of chunks: every distinct one is tokenized once, as no token spans two."""
  tokenizer, tokens, unknown = _tokenizer(vocab, lowercase)
  if len(tokens) > _MEMO:
    tokens.clear(), unknown.clear()
  new = (chunk for chunk in seen if chunk not in tokens)
  while batch := list(itertools.islice(new, 10_000)):
    for chunk, ids in zip(batch, tokenizer.encode_words(batch), strict=True):
      tokens[chunk] = len(ids)
      if count := ids.count(tokenizer.special.get('unk')):
        unknown[chunk] = count
  return tokens, unknown


def count_cased(tokenizer: Tokenizer) -> tuple[int, int]:
  """How many entries of a vocabulary have capitals, and how many have letters with a case; of a
  tokenizer.json, which decides its case, none."""
  if not tokenizer.standard:
    return 0, 0
  own = [entry for entry in tokenizer.vocab if not entry.startswith(('[', '<'))]
  cased = sum(entry != entry.lower() for entry in own)
  return cased, cased + sum(entry != entry.upper() for entry in own if entry == entry.lower())
