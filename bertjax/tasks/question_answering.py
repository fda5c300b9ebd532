"""SQuAD 1.1 and 2.0: answers as spans of a context (Devlin et al. 2018, sections 4.2 and 4.3).

A long context is read in overlapping windows, as in Google's run_squad.py. Answers are
slices of the original context by character offsets, so they are its text to the letter.
"""

import collections
import functools
import logging
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from bertjax import io
from bertjax.data import instances, tables
from bertjax.objectives.labels import Span
from bertjax.tasks import metrics
from bertjax.tasks.task import Encoded, Example, Task, gold_labels, known_split

_FILES = {
  False: {'train': 'train-v1.1.json', 'dev': 'dev-v1.1.json'},
  True: {'train': 'train-v2.0.json', 'dev': 'dev-v2.0.json'},
}
_TFDS = {'train': 'train', 'dev': 'validation'}

_log = logging.getLogger(__name__)

SCORERS = {  # (exact match, F1, normalisation)
  'squad': (metrics.answer_exact, metrics.answer_f1, metrics.normalize_answer),
  'cmrc2018': (metrics.cmrc_exact, metrics.cmrc_f1, metrics.normalize_cmrc),
}


class Window(NamedTuple):
  """Part of a context in a row."""

  offsets: np.ndarray  # character offsets of all tokens of the context [T, 2]
  first: int  # first token of the context in the row
  count: int  # number of its tokens in the row
  place: int  # their first position in the row


class Answer(NamedTuple):
  """The prediction for a question.

  Attributes:
    text: the answer; '' = no answer.
    best: the best non-empty text.
    null_odds: score of no answer minus that of `best`; above the threshold the answer is ''.
    nbest: candidates, best first, as in the official file.
  """

  text: str
  best: str
  null_odds: float
  nbest: list[dict]


def squad(
  source: str = '', *, version_2: bool, files: Mapping[str, str] | None = None, stride: int = 128,
  max_query: int = 64, nbest: int = 20, max_answer: int = 0, scorer: str = 'squad',
  loss_includes_padding: bool = False,
) -> Task:  # fmt: skip
  """SQuAD from JSON files, or from 'tfds:squad/v1.1' and 'tfds:squad/v2.0'.

  Args:
    source: folder of the files.
    version_2: whether questions may have no answer.
    files: split -> file, if it differs from the official one.
    stride: tokens from one window to the next.
    max_query: maximum tokens of a question.
    nbest: number of candidates.
    max_answer: maximum tokens of an answer; 0 = 30, or 50 with 'cmrc2018' (Han characters).
    scorer: 'squad' compares words without articles, 'cmrc2018' characters, for Chinese.
    loss_includes_padding: the softmax of the loss runs over padding too, as in run_squad.py.
  """
  if scorer not in SCORERS:
    raise ValueError(f'scorer must be one of {tuple(SCORERS)}, got {scorer!r}.')
  max_answer = max_answer or {'squad': 30, 'cmrc2018': 50}[scorer]
  known = (_TFDS if source.startswith('tfds:') else _FILES[version_2]) | dict(files or {})

  def read(split):
    file = known_split(split, known)
    if source.startswith('tfds:'):
      raw = _from_tfds(source.removeprefix('tfds:'), file)
    else:
      raw = _from_json(epath.Path(source) / file)
    found, moved = [], 0
    for where, entry in raw:
      found.append(_example(where, entry, version_2, split == 'test'))
      pairs = zip(found[-1].label or (), entry.get('answers') or (), strict=False)
      moved += any(0 <= start != answer.get('answer_start') for (_, start), answer in pairs)
    if not found:
      raise ValueError(f'{file} holds no questions.')
    if moved:
      _log.warning('%s: answers of %d questions were found beside their answer_start.', file, moved)
    _warn_about_ids(found, file)
    return found

  label = Span(
    metrics=('best_f1' if version_2 else 'f1',), includes_padding=loss_includes_padding,
    right=functools.partial(_measure(scorer, version_2), SCORERS[scorer][0]),
  )  # fmt: skip
  return Task(
    'squad2' if version_2 else 'squad1', label, read,
    encode=functools.partial(encode, stride=stride, max_query=max_query),
    decode=functools.partial(decode, version_2=version_2, size=nbest, max_answer=max_answer),
    score=functools.partial(score, version_2=version_2, scorer=scorer),
    write=functools.partial(write, version_2=version_2), splits=tuple(known),
    trainable=with_places,
  )  # fmt: skip


def _measure(scorer: str, version_2: bool):
  """The best of a measure over all reference answers: (measure, answer, answers) -> value."""
  if version_2:
    return functools.partial(metrics.best_answer_v2, normalize=SCORERS[scorer][2])
  return metrics.best_answer


def _from_json(path) -> Iterator[tuple[str, dict]]:
  """Yields (where, question with its context) of an official file."""
  content = tables.read_json(path)
  try:
    for article in content['data']:
      for paragraph in article['paragraphs']:
        for entry in paragraph['qas']:
          yield f'{path}, question {entry["id"]}', entry | {'context': paragraph['context']}
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is not in SQuAD's format (data, paragraphs, qas, id, context): {error}."
    ) from error


def _from_tfds(name: str, split: str) -> Iterator[tuple[str, dict]]:
  for where, row, _ in tables.read_tfds(name, split, ('id', 'question', 'context', 'answers')):
    answers = row['answers']
    pairs = zip(answers['text'], answers['answer_start'], strict=True)
    yield where, row | {'answers': [{'text': t, 'answer_start': start} for t, start in pairs]}


def _example(where: str, entry: dict, version_2: bool, optional: bool) -> Example:
  question, context = entry.get('question'), entry['context']
  for name, text in (('question', question), ('context', context)):
    if not isinstance(text, str) or not text.strip():
      raise ValueError(f'{where}: the {name} is empty.')
  answers = [] if entry.get('is_impossible') else entry.get('answers')
  if optional and (answers is None or not (answers or version_2)):
    return Example(str(entry['id']), (question, context))
  if not isinstance(answers, list):
    raise ValueError(f'{where} has no list of answers; only the split test may lack them.')
  if not answers and not version_2:
    raise ValueError(f'{where} has no answer; that is for squad2.')
  fields = [answer if isinstance(answer, dict) else {} for answer in answers]
  if not all(isinstance(f.get('text'), str) and f['text'].strip() for f in fields):
    raise ValueError(f"{where}: an answer must have a text; no answer is written 'answers': [].")
  label = tuple(_locate(context, f['text'], f.get('answer_start')) for f in fields)
  return Example(str(entry['id']), (question, context), label)


def _locate(context: str, text: str, start) -> tuple[str, int]:
  """(text, first character) of an answer; -1 if its `answer_start` is missing or wrong.

  As in run_squad.py, an answer that is not exactly at `start` is accepted if the words from `start`
  to its end contain it, up to white space. The text is then that of the context.
  """
  if not isinstance(start, int) or not 0 <= start < len(context):
    return text, -1
  if context.startswith(text, start):
    return text, start
  last = min(start + len(text), len(context)) - 1
  begin = len(re.sub(r'\S+\s*$', '', context[: start + 1]))  # of the word at or before `start`
  stop = len(context[: last + 1].rstrip())
  stop += re.match(r'\S*', context[stop:]).end()
  words = re.compile(r'\s+'.join(map(re.escape, text.split())))
  found = min(words.finditer(context, begin, stop), key=lambda m: abs(m.start() - start), default=0)
  return (found.group(), found.start()) if found else (text, -1)


def _warn_about_ids(items: Sequence[Example], file: str) -> None:
  """Warns about duplicate ids: predictions.json has one answer per id."""
  counts = collections.Counter(item.id for item in items)
  twice = [name for name, count in counts.items() if count > 1]
  if twice:
    _log.warning(
      '%s: %d ids belong to several questions (the first is %r); as in the official scorer, each '
      'of these questions is scored with the answer to the last one.', file, len(twice), twice[0],
    )  # fmt: skip


def with_places(items: Sequence[Example]) -> list[Example]:
  """The questions without an answer, or with an answer that was found in the context.

  Others cannot be trained on and are skipped with a warning, as in run_squad.py.
  """
  kept = [item for item in items if not item.label or item.label[0][1] >= 0]
  if len(kept) < len(items):
    first = next(item for item in items if item.label and item.label[0][1] < 0)
    _log.warning(
      '%d of %d questions are skipped in training: their answer is not at its answer_start, or has '
      'none (the first is question %s, answer %r).',
      len(items) - len(kept), len(items), first.id, first.label[0][0][:60],
    )  # fmt: skip
  if not kept:
    raise ValueError('no training question has an answer that is at its answer_start.')
  return kept


def encode(
  items: Sequence[Example], tokenizer, length: int, *, stride: int = 128, max_query: int = 64
) -> Encoded:
  """Windows [CLS] question [SEP] context [SEP], or the tokenizer's template; the label is the first
  answer's.

  If a window does not contain the complete answer, its label is [CLS], as in run_squad.py.
  `alignment` has a `Window` for each row.
  """
  special = tokenizer.template.count(2)
  if length <= max_query + special or stride < 1:
    raise ValueError(
      f'windows need length > max_query + {special} and stride >= 1, got length={length}, '
      f'max_query={max_query}, stride={stride}.'
    )
  queries = tokenizer.encode([item.texts[0] for item in items])
  contexts = list(dict.fromkeys(item.texts[1] for item in items))
  ids, offsets = tokenizer.encode_offsets(contexts, trim=True)
  arrays = [np.array(pairs, np.int32).reshape(-1, 2) for pairs in offsets]
  known = dict(zip(contexts, zip(ids, arrays, strict=True), strict=True))
  counts = {'features': 0, 'truncated_questions': sum(len(query) > max_query for query in queries),
            'answers_outside': 0}  # fmt: skip
  rows, windows, labels, owners = [], [], [], []
  for number, (item, query) in enumerate(zip(items, queries, strict=True)):
    query, (tokens, places) = query[:max_query], known[item.texts[1]]
    span, inside = _token_span(item.label, places), False
    for first, count in _windows(len(tokens), length - len(query) - special, stride):
      window = Window(places, first, count, len(query) + special - 1)
      rows.append((query, tokens[first : first + count]))
      windows.append(window)
      labels.append(_label(span, window))
      owners.append(number)
      inside |= labels[-1][0] > 0
    counts['answers_outside'] += bool(item.label) and item.label[0][1] >= 0 and not inside
  columns = instances.lay_out(rows, tokenizer, length)
  columns |= {'labels': np.array(labels, np.int32).reshape(-1, 2),
              'example_ids': np.array(owners, np.int32)}  # fmt: skip
  return Encoded(columns, counts | {'features': len(rows)}, windows)


def _windows(tokens: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
  """Yields the first token and the number of tokens of each window."""
  first = 0
  while True:
    count = min(tokens - first, room)
    yield first, count
    if first + count == tokens:
      return
    first += min(count, stride)


def _token_span(label, offsets: np.ndarray) -> tuple[int, int] | None:
  """First and last token that share a character with the first answer; (-1, -1) if none does, or
  there is no answer, and None if it is not known.

  That is what `_improve_answer_span` of run_squad.py finds by tokenising the answer again, 1895 in
  (1895-1943). Where an answer starts or ends within a token, it uses complete words, though
  (23 of the 10,539 answers that the test compares).
  """
  text, start = label[0] if label else ('', 0 if label is not None else -1)
  if start < 0:
    return None
  touched = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < start + len(text)))
  return (int(touched[0]), int(touched[-1])) if len(touched) else (-1, -1)


def _label(span: tuple[int, int] | None, window: Window) -> tuple[int, int]:
  if span is None:
    return -1, -1
  if span[0] < window.first or span[1] >= window.first + window.count:
    return 0, 0
  shift = window.place - window.first
  return span[0] + shift, span[1] + shift


def decode(
  items: Sequence[Example], encoded: Encoded, logits, threshold: float = 0.0, *, version_2: bool,
  size: int = 20, max_answer: int = 30,
) -> list[Answer]:  # fmt: skip
  """Best answers over all windows; a start counts in the window with most context around it."""
  logits = np.asarray(logits, np.float64)
  owners = encoded.columns['example_ids']
  bounds = np.searchsorted(owners, np.arange(len(items) + 1))
  answers = []
  for number, item in enumerate(items):
    rows = range(bounds[number], bounds[number + 1])
    windows = [encoded.alignment[row] for row in rows]
    seen = _max_context(windows)
    found = [
      candidate
      for place, (row, window) in enumerate(zip(rows, windows, strict=True))
      for candidate in _candidates(logits[row], window, seen == place, size, max_answer)
    ]
    null = min((tuple(logits[row, 0]) for row in rows), key=sum)
    answers.append(_answer(item.texts[1], found, null, size, version_2, threshold))
  return answers


def _max_context(windows: Sequence[Window]) -> np.ndarray:
  """Index of the window [T] in which each token of the context has the most context around it."""
  best = np.full(len(windows[0].offsets), -np.inf)
  seen = np.zeros(len(best), int)
  for place, window in enumerate(windows):
    shown = slice(window.first, window.first + window.count)
    left = np.arange(window.count)
    score = np.minimum(left, left[::-1]) + 0.01 * window.count
    better = score > best[shown]
    best[shown] = np.where(better, score, best[shown])
    seen[shown] = np.where(better, place, seen[shown])
  return seen


def _candidates(logits, window: Window, mine, size: int, max_answer: int) -> Iterator[tuple]:
  """Yields (start logit, end logit, first character, end) of spans between the best positions."""
  starts, ends = (np.argsort(-column, kind='stable')[:size] for column in logits.T)
  shift, stop = window.first - window.place, window.place + window.count
  starts = starts[(starts >= window.place) & (starts < stop)]
  starts = starts[mine[starts + shift]][:, None]
  allowed = (ends >= starts) & (ends < starts + max_answer) & (ends < stop)
  for i, j in zip(*np.nonzero(allowed), strict=True):
    start, end = starts[i, 0], ends[j]
    first, last = window.offsets[start + shift, 0], window.offsets[end + shift, 1]
    yield logits[start, 0], logits[end, 1], int(first), int(last)


def _answer(context, found, null, size, version_2: bool, threshold: float) -> Answer:
  """Google's n-best list: distinct texts, with the null answer in 2.0, and probabilities."""
  nothing = [(*null, 0, 0)] if version_2 else []
  found = sorted([*found, *nothing], key=lambda c: -(c[0] + c[1]))
  kept = {}
  for start, end, begin, stop in found:
    if len(kept) == size:
      break
    kept.setdefault(context[begin:stop].rstrip(), (start, end))  # a last token may be a space
  best, scores = next((entry for entry in kept.items() if entry[0]), ('', null))
  if version_2 or not kept:
    kept.setdefault('', null)  # beyond the list's size, as in run_squad.py
  ranked = list(kept.items())
  weights = np.exp([sum(pair) - sum(ranked[0][1]) for _, pair in ranked])
  nbest = [
    {'text': text, 'probability': float(p), 'start_logit': float(s), 'end_logit': float(e)}
    for (text, (s, e)), p in zip(ranked, weights / weights.sum(), strict=True)
  ]
  odds = float(sum(null) - sum(scores))
  return Answer('' if version_2 and odds > threshold else best, best, odds, nbest)


def score(
  items: Sequence[Example], predictions: Sequence[Answer], *, version_2: bool, scorer: str = 'squad'
) -> dict[str, float]:
  """Exact match and F1 as in the official scripts of SQuAD or CMRC 2018.

  2.0 adds both for questions with an answer ('has_answer_f1') and without one ('no_answer_f1'),
  their maxima over all thresholds of the null odds ('best_f1', 'best_exact') and these thresholds
  ('best_f1_threshold' is the argument of `decode`).
  """
  by_id = {item.id: p for item, p in zip(items, predictions, strict=True)}
  predictions = [by_id[item.id] for item in items]  # what is written where questions share an id
  labels = [[text for text, _ in label] for label in gold_labels(items)]
  pick = _measure(scorer, version_2)
  answerable = np.array([bool(label) for label in labels])
  odds, scores = [p.null_odds for p in predictions], {}

  def rate(measure, texts) -> np.ndarray:
    return np.array([pick(measure, text, gold) for text, gold in zip(texts, labels, strict=True)])

  for name, measure in zip(('exact', 'f1'), SCORERS[scorer], strict=False):
    each = rate(measure, [p.text for p in predictions])
    scores[name] = float(each.mean())
    if not version_2:
      continue
    for part, where in (('has_answer', answerable), ('no_answer', ~answerable)):
      if where.any():
        scores[f'{part}_{name}'] = float(each[where].mean())
    best = rate(measure, [p.best for p in predictions])
    scores[f'best_{name}'], scores[f'best_{name}_threshold'] = metrics.best_threshold(
      best, odds, answerable
    )
  return scores


def write(folder, split: str, items, predictions, *, version_2: bool) -> list[pathlib.Path]:
  """Writes predictions.json, nbest_predictions.json and, for 2.0, null_odds.json."""
  contents = {'predictions': [p.text for p in predictions],
              'nbest_predictions': [p.nbest for p in predictions]}  # fmt: skip
  if version_2:
    contents['null_odds'] = [p.null_odds for p in predictions]
  paths = []
  for name, values in contents.items():
    paths.append(pathlib.Path(folder) / split / f'{name}.json')
    io.write_json(paths[-1], dict(zip((item.id for item in items), values, strict=True)))
  return paths
