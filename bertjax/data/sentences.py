"""Sentences of running text in any language, by one rule without models or language codes.

A sentence ends at a mark that Unicode calls Sentence_Terminal, with the closing quotes after it.
'.', '!', '?' and the ellipsis also occur inside words and sentences ('3.5', 'e.g.'), so they need
white space and a new start after them; 。！？； and the marks of other scripts need nothing.
"""

import functools
import itertools
import re

# Sentence_Terminal of Unicode 17 without . ! ?, and the fullwidth semicolon, which ends a clause
# that is a sentence elsewhere. Two Ethiopic word spaces are how '።' is often typed.
_STRONG = (
  '\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u104a\u104b'
  '\u1362\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab'
  '\u1b4e\u1b4f\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d-\u1b7f\u1c3b\u1c3c\u1c7e\u1c7f\u203c\u203d'
  '\u2047-\u2049\u2cf9-\u2cfb\u2e2e\u2e3c\u2e53\u2e54\u2e60\u2e61\u3002\ua4ff\ua60e\ua60f\ua6f3'
  '\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb\ufe12\ufe15'
  '\ufe16\ufe56\ufe57\uff01\uff1b\uff1f\uff61\U00010a56\U00010a57\U00010f55-\U00010f59'
  '\U00010f86-\U00010f89\U00011047\U00011048\U000110be-\U000110c1\U00011141-\U00011143\U000111c5'
  '\U000111c6\U000111cd\U000111de\U000111df\U00011238\U00011239\U0001123b\U0001123c\U000112a9'
  '\U000113d4\U000113d5\U0001144b\U0001144c\U000115c2\U000115c3\U000115c9-\U000115d7\U00011641'
  '\U00011642\U0001173c-\U0001173e\U00011944\U00011946\U00011a42\U00011a43\U00011a9b\U00011a9c'
  '\U00011c41\U00011c42\U00011ef7\U00011ef8\U00011f43\U00011f44\U00016a6e\U00016a6f\U00016af5'
  '\U00016b37\U00016b38\U00016b44\U00016d6e\U00016d6f\U00016e98\U0001bc9f\U0001da88'
)
_WEAK = '.!?…'
_CJK = '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff'
_CLOSE = r'"\'”’“)\]»«›」』】〉》）］｝＂＇'  # “ closes in German, « in Danish
_START = r'(?:["\'“‘(\[«»‹„‚¿¡「『【〈《（—―] ?)*([^\W_])'  # group: the first letter or digit
# The look-behind after the first mark keeps long runs of dots linear.
_SPACED = re.compile(
  rf'[{_WEAK}](?<![{_WEAK}].)[{_WEAK}]*(?:[{_CLOSE}]| [»›](?=\s))*\s+(?={_START})'
)
_NEEDS_ANY = re.compile(f'[{_STRONG}{_CJK}\u0370-\u03ff\u1f00-\u1fff፡]')
_ENDS = re.compile(f'[{_STRONG}」』]|፡፡')
_FIRST = re.compile(_START)
_CJK_FIRST = re.compile(f'[“‘「『【〈《（]*[{_CJK}]')
_CONTINUES = re.compile(r'[，、：､:,–—―]')
_PERIOD = re.compile(rf'\.(?<![{_WEAK}].)\s+(?={_START})')
_LETTER = re.compile(r'[^\W\d_]')
_BEFORE_SMALL = re.compile(rf'\.[{_CLOSE}]*|[!?;:]+')
_IS_THAI = re.compile('[ก-๎ກ-ໝ]')
_THAI = re.compile('[ก-๎ກ-ໝ](?=([ \n]+)[ก-ๅກ-ໆ])')

# Periods after these do not end a sentence.
_ABBREVIATIONS = frozenset([
  'mr', 'mrs', 'ms', 'dr', 'st', 'rev', 'hon', 'prof', 'sr', 'jr', 'gen', 'col', 'capt', 'lt',
  'sgt', 'messrs', 'mme', 'mlle', 'vs', 'etc', 'cf', 'al', 'fig', 'figs', 'eq', 'vol', 'vols',
  'ch', 'pp', 'ed', 'eds', 'viz', 'ca', 'approx', 'dept', 'est', 'inc', 'ltd', 'co', 'corp',
  'e.g', 'i.e', 'a.m', 'p.m',
  'sra', 'dra', 'srta', 'bzw', 'z.b', 'nr', 'hr', 'fr', 'usw',
  'т.е', 'им', 'ул', 'гл', 'рис', 'стр', 'см', 'проф', 'акад', 'тов', 'гр', 'обл',
])  # fmt: skip


def split_prose(text: str) -> list[str]:
  """Splits running text into sentences, none of them blank; a blank line always ends one.

  Before '.', '!', '?' and the ellipsis count as an end, white space and a capital, a digit or a
  letter of a script without capitals must follow; in text that begins its sentences with small
  letters, any letter. The period of a common abbreviation or of a single initial is none. Thai and
  Lao have no marks: a blank between two letters ends a sentence of at least 40 characters.
  """
  letters = '' if text.isascii() else ''.join(set(text))  # searched in place of the long text
  boundary, find_end, small = _SPACED, _spaced_end, _begins_small(text)
  if special := ''.join(sorted(_NEEDS_ANY.findall(letters))):
    boundary, find_end = _any_boundary(''.join(re.findall(f'[{_STRONG}]', special))), _any_end
  sentences = []
  for paragraph in re.split(r'\n\s*\n', text):
    paragraph = re.sub(r'[^\S ]\s*| \s+', ' ', paragraph).strip()  # holds no list of words
    start = 0
    for match in boundary.finditer(paragraph):
      if end := find_end(paragraph, start, match, small):
        sentences.append(paragraph[start:end].rstrip())
        start = end
    if paragraph[start:]:
      sentences.append(paragraph[start:])
  if _IS_THAI.search(letters):
    sentences = [part for sentence in sentences for part in _split_thai(sentence)]
  return sentences


def is_unmarked(text: str) -> bool:
  """Whether a text holds Thai or Lao, which have no sentence marks."""
  return not text.isascii() and bool(_IS_THAI.search(text))


@functools.lru_cache
def _any_boundary(strong: str) -> re.Pattern:
  """Finds the marks of `_WEAK` and of `strong`, those that a text has: sets of all are slow."""
  marks, close = f'{_WEAK}⋯．{strong}', re.sub('[“«]', '', _CLOSE)
  # ';' is the Greek question mark, ':' a common way to type the Armenian full stop.
  other = r'፡፡|[」』](?=\s)|(?<=[Ͱ-Ͽἀ-῿]);|(?<=[Ա-֏]):'
  return re.compile(rf'((?:[{marks}](?<![{marks}].)|{other})[{marks}{close}]*)(\s*)')


def _begins_small(text: str) -> bool:
  """Whether sentences begin with small letters, by the first 200 periods and the first letter."""
  first = _LETTER.search(text)
  letters = [match[1] for match in itertools.islice(_PERIOD.finditer(text), 200)]
  small = sum(map(str.islower, letters))
  return small > 10 * sum(map(str.isupper, [*letters, first[0] if first else '']))


def _spaced_end(paragraph: str, start: int, match: re.Match, small: bool) -> int:
  """Where the sentence that began at `start` ends, or 0: marks, white space, a letter or digit."""
  mark, letter = match.group().strip(), match[1]
  return match.end() if _is_end(paragraph, start, match, mark, letter, small) else 0


def _any_end(paragraph: str, start: int, match: re.Match, small: bool) -> int:
  """The same for marks that need no white space, and for the others between Han or kana."""
  mark, space, end = match[1], match[2], match.end()
  if _ENDS.search(mark) or (mark[0] != '.' and not space and _CJK_FIRST.match(paragraph, end)):
    last = paragraph[end - 1]
    if last in '"＂' and paragraph.count(last, max(start, end - 1000), end) % 2:
      end, last = end - 1, ''  # it opens the next sentence
    following = paragraph[end : end + 1]
    particle = last and last in '」』）)' and 'ぁ' <= following <= 'ゖ'  # 「はい。」と言った
    return 0 if particle or _CONTINUES.match(paragraph, end) else end
  first = space and _FIRST.match(paragraph, end)
  return end if first and _is_end(paragraph, start, match, mark, first[1], small) else 0


def _is_end(paragraph, start, match, mark: str, letter: str, small: bool) -> bool:
  """Whether a mark before white space and a letter or digit ends a sentence."""
  if letter.islower() and not (small and _BEFORE_SMALL.fullmatch(mark)):
    return False
  if mark != '.':
    return True
  last = max(start, paragraph.rfind(' ', start, match.start()) + 1)
  before = paragraph[last : match.start()].lstrip('"\'“‘([«').lower()
  initial = len(before) == 1 and before.isalpha() and before not in 'iя' and before < '\u2e80'
  number = before in ('no', 'nos') and paragraph[match.end()].isdigit()  # 'No. 7', not 'No. So'
  thai = 'ก' <= before[-1:] <= 'ໝ'  # there a period only abbreviates
  return not (before in _ABBREVIATIONS or initial or number or thai)


def _split_thai(sentence: str) -> list[str]:
  parts, start = [], 0
  for match in _THAI.finditer(sentence):
    if match.end() - start >= 40:
      parts.append(sentence[start : match.end()])
      start = match.end(1)
  return [*parts, sentence[start:]]
