"""What a word is, in every script: among the tokens of a row, and in a text.

White space separates words, and each punctuation mark is a word. Scripts that are written
without spaces (Han, kana, Thai, Khmer, ...) have no words that a rule could find: there each
character is a word, or each token where a token has several characters. Among tokens the rule is a
table by id, so that rows of ids can be masked without their text.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

BEGINS, ENDS, BLANK = 1, 2, 4  # flags of a token
RULES = ('text', 'spaces', 'tokens')

HAN = (  # and Bopomofo, kana and Yi
  '\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff'
  '\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\uf900-\ufaff\uff66-\uff9f'
  '\U0001b000-\U0001b16f\U00020000-\U0003ffff'
)
_UNSPACED = HAN + (  # Thai, Lao, Tibetan, Myanmar, Khmer, Tai and Javanese
  '\u0e00-\u0e7f\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf'
  '\ua980-\ua9ff\uaa60-\uaadf'
)
_WIDE = '\u3000-\u3004\u3008-\u3020\u3030\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65'
_unspaced = re.compile(f'[{_UNSPACED}]').match
_tight = re.compile(f'[{_UNSPACED}{_WIDE}]').search
_MARKS = ''.join(chr(c) for c in range(0x300, 0xFE30) if unicodedata.category(chr(c))[0] == 'M')
_parts = re.compile(f'[{_UNSPACED}{_WIDE}][{_MARKS}]*|[^{_UNSPACED}{_WIDE}]+').finditer
# Marks that stay with a word, or together: U.S. J. 's +44 .500 US$ -- ...
_whole = re.compile(
  r"(?:[^\W\d_]\.)+|(?:\w+\.)+\w\.|['’]\w+|[-+.]\d(?:.*\w)?|[A-Z]{1,3}\$|([-.*=_#~])\1+"
).fullmatch
# Ends of English words that are separate words: England's did n't
_clitic = re.compile(r"(?<=[\w.])(?:n['’]t|['’](?:s|re|ve|ll|d|m))$", re.IGNORECASE).search


def flags(token: str, continues: bool) -> int:
  """BEGINS: a word begins with this token, whatever comes before; ENDS: one ends with it; BLANK: it
  is only white space, and belongs to the token that follows.

  Args:
    token: its text, without the tokenizer's mark for a boundary of words.
    continues: whether that mark says that the token continues a word.
  """
  if not token:
    return BEGINS | BLANK
  mark = unicodedata.category(token[0])[0] == 'M'
  begins = not continues or (_alone(token[0]) and not mark)
  return BEGINS * begins | ENDS * _alone(token[-1])


def firsts(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Which tokens begin a word: bool, the shape of `ids` [..., L].

  Args:
    ids: of running text.
    table: `Tokenizer.word_flags`, uint8 [V].
  """
  own = table[ids]
  before = np.concatenate([np.full_like(own[..., :1], ENDS), own[..., :-1]], -1)
  return (((own & BEGINS) | (before & ENDS)) > 0) & ~((before & BLANK) > 0)


def is_unspaced(character: str) -> bool:
  """Whether the character is of a script that is written without spaces between words."""
  return bool(_unspaced(character))


def split(text: str, rule: str = 'text') -> list[tuple[int, int]]:
  """First character and end of each word of a text.

  Args:
    text: a text.
    rule: 'spaces', nothing but white space separates words; or 'text', punctuation at the edges of
      a word, clitics of English such as 's and each character of an unspaced script are words too,
      as in CoNLL's files.
  """
  runs = [match.span() for match in re.finditer(r'\S+', text)]
  if rule == 'spaces':
    return runs
  return [span for a, b in runs for part in _parts(text, a, b) for span in _word(text, part.span())]


def join(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
  """Words as a text, and first character and end of each.

  A blank separates two words, unless one has a character of an unspaced script, or its punctuation,
  beside the other.
  """
  text, spans = '', []
  for word in words:
    text += ' ' * (bool(spans) and needs_blank(text, word))
    spans.append((len(text), len(text) + len(word)))
    text += word
  return text, spans


def needs_blank(before: str, after: str) -> bool:
  """Whether a blank separates two words or sentences, by the script of the characters there."""
  return not _tight(before[-1:] + after[:1])


def chunks(text: str) -> Iterator[str]:
  """Yields whitespace-delimited chunks, which no token crosses; holds a slice of them at a time."""
  for space in '\t\n\r':
    text = text.replace(space, ' ')
  start = 0
  while start < len(text):
    end = text.find(' ', start + 2**20)
    end = len(text) if end < 0 else end
    yield from filter(None, text[start:end].split(' '))
    start = end


_WORDS = re.compile(f'[{HAN}]|[^{HAN}]*?\\w[^{HAN}]*')


def count_words(chunk: str) -> int:
  """Words of a text without white space: one, or each Han character and kana and what is between
  them, punctuation aside. Thai, Lao, Khmer and Burmese, which need a dictionary, count as one."""
  return 1 if chunk.isascii() else len(_WORDS.findall(chunk)) or 1


def _word(text: str, span: tuple[int, int]) -> Iterator[tuple[int, int]]:
  """Yields the punctuation before a word, mark by mark, the word, and the punctuation after it."""
  start, end = span
  while start < end and _is_punctuation(text[start]) and not _whole(text[start:end]):
    yield start, start + 1
    start += 1
  last = end
  while start < last and _is_punctuation(text[last - 1]) and not _whole(text[start:last]):
    last -= 1
  if start < last:
    clitic = _clitic(text[start:last])
    middle = start + clitic.start() if clitic else last
    yield from ((a, b) for a, b in ((start, middle), (middle, last)) if a < b)
  yield from ((i, i + 1) for i in range(last, end))


def _alone(character: str) -> bool:
  return is_unspaced(character) or _is_punctuation(character)


def _is_punctuation(character: str) -> bool:
  """As in BERT: also the symbols of ASCII, '$' and '+' for instance."""
  if character.isascii():
    return character.isprintable() and not character.isalnum() and character != ' '
  return unicodedata.category(character)[0] == 'P'
