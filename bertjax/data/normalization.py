"""Text normalization and pre-tokenization before WordPiece: CJK, case, accents, words.

Two references, and they disagree. 'huggingface' is what the `tokenizers` library does, with its
own Unicode tables; 'google' is tokenization.py of google-research/bert, with the tables of the
running Python. ('albert' is the normalization before SentencePiece.) `normalization_table` asks a
reference about every code point, so that a TensorFlow graph can look the answer up. Just two things
depend on the neighbours of a code point: Python's final sigma and the canonical order of combining
marks.
"""

import functools
import itertools
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tokenizers import normalizers, pre_tokenizers

RULES = ('huggingface', 'google')
QUOTES = ('``', "''")  # ALBERT turns both into "
SELF, BREAK = 0, 1  # in a table's rows: the code point itself; the rank of what ends a run of marks
RANK = 2**21  # an entry of a row is a code point + rank * RANK
# Private code points that stand for special tokens in a graph; Hugging Face's rules drop them.
MARKERS, MARKER_COUNT = 0xF0000, 5

# The blocks of Google's _is_chinese_char.
_CJK = (
  (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
  (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
_BETWEEN = '\u2ff0'  # no rule touches this symbol: it separates texts normalized in one call
_LATE, _EARLY = '\u302e', '\U0001d165'  # marks that all rules keep, of combining classes 224, 216


class NormalizationTable(NamedTuple):
  """What becomes of each code point.

  Attributes:
    pages: int32 [pages, 256], row numbers.
    page_of: int32 [0x1100], the page of each 256 code points.
    rows, row_splits: int32 and int64, the replacements, one after another, and where each starts.
      An entry is SELF or a code point, plus its rank * RANK: rank 0 is an ordinary character,
      1 a BREAK, and from 2 on a mark that is to be sorted within its run.
    cased: bounds of ranges [start, end), where a capital sigma can become final; else None.
    ignorable: the same, of the characters that this rule looks through.
  """

  pages: np.ndarray
  page_of: np.ndarray
  rows: np.ndarray
  row_splits: np.ndarray
  cased: np.ndarray | None
  ignorable: np.ndarray | None


def word_splitter(lowercase: bool):
  """Hugging Face's normaliser and pre-tokenizer of BERT: what comes before WordPiece."""
  normalizer = normalizers.BertNormalizer(
    clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
  )
  return normalizer, pre_tokenizers.BertPreTokenizer()


def albert_normalizer(lowercase: bool) -> normalizers.Normalizer:
  """Hugging Face's normaliser of ALBERT, before the model's own."""
  steps = [normalizers.Replace(quote, '"') for quote in QUOTES]
  steps.append(normalizers.Replace('\x85', ' '))  # the model knows all other white space
  if lowercase:
    steps += [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
  return normalizers.Sequence(steps)


def make_steps(rules: str, lowercase: bool) -> tuple[Callable[[str], str], Callable[[str], str]]:
  """Returns two functions: one normalizes a text, one puts spaces between the words of that."""
  if rules == 'google':
    return functools.partial(google_normalize, lowercase=lowercase), str
  if rules == 'albert':
    return albert_normalizer(lowercase).normalize_str, str
  normalizer, splitter = word_splitter(lowercase)
  return normalizer.normalize_str, lambda text: ' '.join(
    word for word, _ in splitter.pre_tokenize_str(text)
  )


def google_align(text: str, lowercase: bool) -> tuple[str, list[int]]:
  """Normalizes by Google's rules; also returns the index in `text` of each resulting character."""
  clean, split = _google_tables(lowercase)
  text, origins = _expand(text, range(len(text)), lambda c: c.translate(clean))
  if lowercase:
    lowered = text.lower()  # not letter by letter: a final sigma needs its neighbours
    _, origins = _expand(text, origins, str.lower)
    text, origins = _expand(lowered, origins, lambda c: unicodedata.normalize('NFD', c))
    classes = [unicodedata.combining(c) for c in text]
    runs = list(itertools.accumulate(c == 0 for c in classes))
    order = sorted(range(len(text)), key=lambda i: (runs[i], classes[i]))
    text, origins = ''.join(text[i] for i in order), [origins[i] for i in order]
  return _expand(text, origins, lambda c: c.translate(split))


def _expand(text, origins, change):
  parts = [change(c) for c in text]
  return ''.join(parts), [o for part, o in zip(parts, origins, strict=True) for _ in part]


def google_normalize(text: str, lowercase: bool) -> str:
  clean, split = _google_tables(lowercase)
  text = text.translate(clean)
  if lowercase:
    text = unicodedata.normalize('NFD', text.lower())
  return text.translate(split)


@functools.cache
def _google_tables(lowercase: bool) -> tuple[dict, dict]:
  """The steps before and after lower-casing, for str.translate."""
  clean, split = {0xFFFD: None}, {}
  for code in range(0x110000):
    letter, category = chr(code), unicodedata.category(chr(code))
    ascii_symbol = 33 <= code <= 126 and not letter.isalnum()
    if category in ('Cc', 'Cf') and letter not in '\t\n\r':
      clean[code] = None
    elif letter.isspace():  # Zs; and U+2028, U+2029, where str.split() splits afterwards
      clean[code] = ' '
    if ascii_symbol or category[0] == 'P':
      split[code] = f' {letter} '
    elif lowercase and category == 'Mn':
      split[code] = None
  for start, end in _CJK:
    clean.update({code: f' {chr(code)} ' for code in range(start, end + 1)})
  return clean, split


@functools.cache
def normalization_table(rules: str, lowercase: bool) -> NormalizationTable:
  """What the rules make of every code point, for `tokenizer_tf`; takes seconds."""
  normalize, split = make_steps(rules, lowercase)
  letters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c != ord(_BETWEEN)]
  # All marks and punctuation; Hugging Face's splitter is slow. A test asks about the rest.
  low = [c for c in letters if c < '\U00020000' or '\U000e0000' <= c < '\U000e1000']

  def ask(letters, before='', after='', split=split):
    text = _BETWEEN.join(f'{before}{c}{after}' for c in letters)
    return zip(letters, split(normalize(text)).split(_BETWEEN), strict=True)

  normalized = dict(ask(letters, split=str)) | dict(ask(low))
  moves = set()
  if lowercase:  # what is a mark, or dropped before the sorting, lets its neighbours swap
    moves = {c for c, text in ask(low, _LATE, _EARLY, str) if _EARLY in text.split(_LATE)[0]}
  ranks = _ranks(normalize, {c for c in moves if normalized[c] == c})
  numbers = {(): 0, (SELF,): 1, (32, SELF, 32): 2}
  row_of = np.ones(0x110000, np.int32)
  for c, text in normalized.items():
    if text != c or c in ranks:
      row = tuple(SELF if o == c != text else ord(o) + ranks.get(o, 0) * RANK for o in text)
      if ranks and not text and c not in moves:
        row = (BREAK * RANK,)
      row_of[ord(c)] = numbers.setdefault(row, len(numbers))
  if rules == 'huggingface':
    row_of[MARKERS : MARKERS + MARKER_COUNT] = 2
  pages, page_of = np.unique(row_of.reshape(-1, 256), axis=0, return_inverse=True)
  cased = ignorable = None
  if rules == 'google' and lowercase:
    cased = {c for c, text in ask(low, '', 'Σ') if text.endswith('ς')}
    ignorable = {c for c, text in ask(low, 'A', 'Σ') if text.endswith('ς')} - cased
    cased, ignorable = _bounds(cased), _bounds(ignorable)
  rows = np.fromiter(itertools.chain.from_iterable(numbers), np.int32)
  row_splits = np.cumsum([0, *map(len, numbers)], dtype=np.int64)
  page_of = page_of.astype(np.int32).ravel()
  return NormalizationTable(pages, page_of, rows, row_splits, cased, ignorable)


def _ranks(normalize, marks: set[str]) -> dict[str, int]:
  """Numbers marks from 2 on, in the order in which normalization sorts them."""

  def compare(a, b):
    return int(normalize(a + b) == b + a) - int(normalize(b + a) == a + b)

  ranks, last, number = {}, '', BREAK
  for mark in sorted(sorted(marks), key=functools.cmp_to_key(compare)):
    number += not last or compare(last, mark) != 0
    ranks[mark] = number
    last = mark
  return ranks


def _bounds(letters: set[str]) -> np.ndarray:
  """Turns characters into the sorted bounds of their ranges [start, end)."""
  member = np.zeros(0x110002, bool)
  member[[ord(c) + 1 for c in letters]] = True
  return np.flatnonzero(member[1:] != member[:-1]).astype(np.int32)
