"""What the masked-LM head answers: fill masks, score texts, propose corrections."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.forward import Forward, TextError, rows
from bertjax.tasks import task

_PLACES = 8  # masks asked about in one row; more make more rows, not more programs
_ROWS = 1024  # laid out at a time


@dataclasses.dataclass(frozen=True)
class Fill:
  """A proposal for one place: the piece, its probability, and the whole text with it put in."""

  token: str
  probability: float
  text: str


@dataclasses.dataclass(frozen=True)
class Score:
  """A text's pseudo-log-likelihood."""

  log_likelihood: float  # the sum over its tokens, in nats
  perplexity: float  # exp of minus their mean
  tokens: list[tuple[str, float]]  # each piece and its log-probability


@dataclasses.dataclass(frozen=True)
class Correction:
  """An unlikely word, `text[start:end]`, and what the model would rather see there."""

  word: str
  start: int
  end: int
  probability: float
  replacements: list[Fill]


class _Question(NamedTuple):
  """Tokens of a text, the places among them to be masked, and the ids whose probability to tell."""

  ids: list[int]
  places: list[int]
  targets: list[int]


def fill(forward: Forward, tokenizer: Tokenizer, texts, top_k: int) -> list[list[list[Fill]]]:
  """See `Predictor.fill_mask`."""
  _need(forward)
  _check_top_k(forward, top_k)
  known, questions = _encode(tokenizer, texts), []
  for text, ids in zip(texts, known, strict=True):
    _check_length(forward, ids)
    places = _masks(ids, tokenizer)
    if not places:
      raise TextError(f'the text has no {tokenizer.vocab[tokenizer.mask_id]}: {text!r}')
    questions += _questions(ids, places)
  answers = _ask(forward, tokenizer, questions, _PLACES, top_k)
  found = iter([(v, i) for _, values, best in answers for v, i in zip(values, best, strict=True)])
  return [
    [
      [_fill(tokenizer, ids, place, token, p) for p, token in zip(*next(found), strict=True)]
      for place in _masks(ids, tokenizer)
    ]
    for ids in known
  ]


def _fill(tokenizer, ids, place, token, log_probability) -> Fill:
  filled = [*ids[:place], int(token), *ids[place + 1 :]]
  probability = float(np.exp(log_probability))
  return Fill(tokenizer.vocab[token], probability, tokenizer.decode(filled))


def infill(forward: Forward, tokenizer: Tokenizer, texts) -> list[str]:
  """See `Predictor.infill`."""
  _need(forward)
  known = _encode(tokenizer, texts)
  for ids in known:
    _check_length(forward, ids)
  while open_texts := [ids for ids in known if tokenizer.mask_id in ids]:
    questions = [(ids, q) for ids in open_texts for q in _questions(ids, _masks(ids, tokenizer))]
    answers = _ask(forward, tokenizer, [q for _, q in questions], _PLACES)
    best = {}  # row -> (log-probability, place, id) of its surest mask
    for (ids, question), (_, values, tokens) in zip(questions, answers, strict=True):
      i = int(values[:, 0].argmax())
      sure = (values[i, 0], question.places[i], int(tokens[i, 0]))
      best[id(ids)] = max(best.get(id(ids), sure), sure)
    for ids in open_texts:
      _, place, token = best[id(ids)]
      if token == tokenizer.mask_id:
        raise ValueError('the model fills a mask with [MASK]; it was not trained for this.')
      ids[place] = token
  return [tokenizer.decode(ids) for ids in known]


def score(forward: Forward, tokenizer: Tokenizer, texts, *, window: bool) -> list[Score]:
  """See `Predictor.score`."""
  _need(forward)
  known = tokenizer.encode(texts)
  for text, ids in zip(texts, known, strict=True):
    if not ids:
      raise TextError(f'the text has no tokens to score: {text!r}')
    _check_length(forward, ids, window)
  pairs = ((ids, place) for ids in known for place in range(len(ids)))
  questions = (_shown(forward, _Question(ids, [place], [ids[place]])) for ids, place in pairs)
  logs = (float(target[0]) for target, _, _ in _ask(forward, tokenizer, questions, 1))
  scores = []
  for ids in known:
    tokens = [(tokenizer.vocab[token], next(logs)) for token in ids]
    total = sum(log for _, log in tokens)
    scores.append(Score(total, float(np.exp(-total / len(tokens))), tokens))
  return scores


def correct(
  forward: Forward, tokenizer: Tokenizer, texts, top_k: int, ratio: float, *, window: bool
) -> list[list[Correction]]:
  """See `Predictor.correct`.

  A word's probability is that of all its pieces behind masks of their own (its first eight); what
  is proposed are single pieces behind one mask.
  """
  _need(forward)
  _check_top_k(forward, top_k)
  if not 0 < ratio < np.inf:
    raise ValueError(f'ratio must be above 0, got {ratio}.')
  plans = []
  for text, ids, offsets in zip(texts, *tokenizer.encode_offsets(texts), strict=True):
    _check_length(forward, ids, window)
    words = [w for w in words_of(tokenizer, ids) if text[offsets[w[0]][0]].isalpha()]
    plans.append((text, ids, offsets, words))
  questions = (q for _, ids, _, words in plans for word in words for q in _two(forward, ids, *word))
  answers, word_at = _ask(forward, tokenizer, questions, _PLACES, top_k), _word(tokenizer)
  results = []
  for text, _, offsets, words in plans:
    found = []
    for first, end in words:
      (target, _, _), (_, values, best) = next(answers), next(answers)
      start, stop, own = offsets[first][0], offsets[end - 1][1], float(np.exp(target.sum()))
      likely = [
        (word, float(np.exp(log)))
        for log, word in zip(values[0], map(word_at, best[0]), strict=True)
        if word and np.exp(log) >= ratio * own
      ]
      fills = [Fill(word, p, text[:start] + word + text[stop:]) for word, p in likely]
      if fills:
        found.append(Correction(text[start:stop], start, stop, own, fills))
    results.append(found)
  return results


def _two(forward: Forward, ids, first: int, end: int) -> tuple[_Question, _Question]:
  """How probable is a word behind masks of its pieces; what stands behind one mask for them all?"""
  places = list(range(first, min(end, first + _PLACES)))
  whole = _Question(ids, places, [ids[place] for place in places])
  single = _Question([*ids[: first + 1], *ids[end:]], [first], [0])
  return _shown(forward, whole), _shown(forward, single)


def _word(tokenizer):
  """Id -> the word that a piece is by itself, or ''."""
  starts = tokenizer.word_starts

  def word(token):
    piece = tokenizer.vocab[token].removeprefix('\u2581')
    return piece if starts[token] and piece.isalpha() else ''

  return word


def words_of(tokenizer: Tokenizer, ids) -> list[tuple[int, int]]:
  """First piece and end of each word."""
  starts = tokenizer.word_starts
  firsts = [i for i, token in enumerate(ids) if starts[token] or i == 0]
  return list(itertools.pairwise([*firsts, len(ids)]))


def lay_out(forward: Forward, tokenizer: Tokenizer, items) -> dict[str, np.ndarray]:
  """Rows [CLS] A [SEP] or [CLS] A [SEP] B [SEP] of tuples of ids, if the model takes as many."""
  length = max((sum(map(len, item)) + len(item) + 1 for item in items), default=3)
  forward.check_length(length)  # before room is made for it
  return rows(task.lay_out(items, tokenizer, length))


def _need(forward: Forward) -> None:
  forward.need('mlm')
  if forward.config.causal:
    raise ValueError('masks are filled by a model that sees both sides; this one is causal.')


def _check_top_k(forward: Forward, top_k: int) -> None:
  if not 1 <= top_k <= forward.pieces:
    raise ValueError(f'top_k must be in 1..{forward.pieces}, got {top_k}.')


def _check_length(forward: Forward, ids, window: bool = False) -> None:
  if not window:
    forward.check_length(len(ids) + 2)


def _encode(tokenizer: Tokenizer, texts) -> list[list[int]]:
  """Ids of texts, a [MASK] in them as one piece; Google's rules would part it."""
  if tokenizer.rules != 'google':
    return tokenizer.encode(texts)
  mask = tokenizer.vocab[tokenizer.mask_id]
  parts = [text.split(mask) for text in texts]
  ids = iter(tokenizer.encode(list(itertools.chain.from_iterable(parts))))
  joined = ([[tokenizer.mask_id, *next(ids)] for _ in text] for text in parts)
  return [list(itertools.chain.from_iterable(text))[1:] for text in joined]


def _masks(ids, tokenizer) -> list[int]:
  return [place for place, token in enumerate(ids) if token == tokenizer.mask_id]


def _questions(ids, places) -> list[_Question]:
  groups = [places[i : i + _PLACES] for i in range(0, len(places), _PLACES)]
  return [_Question(ids, group, [0] * len(group)) for group in groups]


def _shown(forward: Forward, question: _Question) -> _Question:
  """The question amid as many tokens as fit, as many before as after where there are."""
  room, (ids, places, targets) = forward.config.max_positions - 2, question
  first = max(0, min(places[0] - room // 2, len(ids) - room))
  return _Question(ids[first : first + room], [place - first for place in places], targets)


def _ask(
  forward: Forward, tokenizer: Tokenizer, questions: Iterable[_Question], width: int, top_k: int = 1
) -> Iterator[tuple]:
  """Yields (log-probability of each target, the best log-probabilities, their ids), in order."""
  questions = iter(questions)
  while chunk := list(itertools.islice(questions, _ROWS)):
    batch = lay_out(forward, tokenizer, [(question.ids,) for question in chunk])
    places, targets = np.zeros((2, len(chunk), width), np.int32)
    for row, question in enumerate(chunk):
      count = len(question.places)
      places[row, :count] = np.array(question.places) + 1  # behind [CLS]
      targets[row, :count] = question.targets
      batch['input_ids'][row, places[row, :count]] = tokenizer.mask_id
    batch |= {'masked_lm_positions': places, 'masked_lm_ids': targets}
    for question, values in zip(chunk, forward.run(batch, 'mlm', top_k), strict=True):
      yield tuple(value[: len(question.places)] for value in values)
