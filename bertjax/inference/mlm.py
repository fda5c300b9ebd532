"""What the masked-LM head answers: fill masks, score and continue texts, propose corrections."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from bertjax.data import words
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.runner import Forward, TextError, rows
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
  """A text's log-likelihood, or pseudo-log-likelihood of a model that attends to both sides."""

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
  """Tokens of a text, the positions to mask, and the ids whose probability is wanted there."""

  ids: list[int]
  places: list[int]
  targets: list[int]


def fill(forward: Forward, tokenizer: Tokenizer, texts, top_k: int) -> list[list[list[Fill]]]:
  """See `Predictor.fill_mask`."""
  _need(forward)
  _check_top_k(forward, top_k)
  split = [text.split(tokenizer.vocab[tokenizer.mask_id]) for text in texts]
  known, questions = _encode(tokenizer, split), []
  for text, ids in zip(texts, known, strict=True):
    forward.check_length(len(ids) + 2)
    places = _masks(ids, tokenizer)
    if not places:
      raise TextError(f'the text has no {tokenizer.vocab[tokenizer.mask_id]}: {text!r}')
    questions += _questions(ids, places)
  answers = _ask(forward, tokenizer, questions, _PLACES, top_k)
  found = iter([(v, i) for _, values, best in answers for v, i in zip(values, best, strict=True)])
  return [
    [
      [_fill(tokenizer, parts, i, token, p) for p, token in zip(*next(found), strict=True)]
      for i in range(len(parts) - 1)
    ]
    for parts in split
  ]


def _fill(tokenizer, parts, number, token, log_probability) -> Fill:
  """The fill of one mask, the others left as they are."""
  pieces = [tokenizer.vocab[tokenizer.mask_id]] * (len(parts) - 1)
  pieces[number] = tokenizer.vocab[token]
  return Fill(pieces[number], float(np.exp(log_probability)), _put(tokenizer, parts, pieces))


def _put(tokenizer: Tokenizer, parts: list[str], pieces: list[str]) -> str:
  """The text whose masks stood between `parts`, with pieces in their places, as it is otherwise.

  White space before letters that continue a word is dropped; a blank is put between two words that
  would become one; neither in scripts without spaces.
  """
  text = parts[0]
  for piece, part in zip(pieces, parts[1:], strict=True):
    word, continues = tokenizer.word_of(piece)
    text = text.rstrip() + word if continues and _is_spaced(word[:1]) else _join(text, word)
    text = _join(text, part)
  return text


def _join(first: str, second: str) -> str:
  return first + ' ' * (_is_spaced(first[-1:]) and _is_spaced(second[:1])) + second


def _is_spaced(character: str) -> bool:
  return character.isalnum() and not words.is_unspaced(character)


def infill(forward: Forward, tokenizer: Tokenizer, texts) -> list[str]:
  """See `Predictor.infill`."""
  _need(forward)
  split = [text.split(tokenizer.vocab[tokenizer.mask_id]) for text in texts]
  known = _encode(tokenizer, split)
  places = [_masks(ids, tokenizer) for ids in known]
  for ids in known:
    forward.check_length(len(ids) + 2)
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
  return [
    _put(tokenizer, parts, [tokenizer.vocab[ids[place]] for place in masks])
    for parts, ids, masks in zip(split, known, places, strict=True)
  ]


def score(forward: Forward, tokenizer: Tokenizer, texts, *, window: bool) -> list[Score]:
  """See `Predictor.score`."""
  forward.need('mlm')
  known = tokenizer.encode(texts)
  for text, ids in zip(texts, known, strict=True):
    if not ids:
      raise TextError(f'the text has no tokens to score: {text!r}')
    if not window:
      forward.check_length(len(ids) + 2)
  if forward.config.causal:
    logs = _left_to_right(forward, tokenizer, known)
  else:
    pairs = ((ids, place) for ids in known for place in range(len(ids)))
    questions = (_shown(forward, _Question(ids, [place], [ids[place]])) for ids, place in pairs)
    logs = (float(target[0]) for target, _, _ in _ask(forward, tokenizer, questions, 1))
  scores = []
  for ids in known:
    tokens = [(tokenizer.vocab[token], next(logs)) for token in ids]
    total = sum(log for _, log in tokens)
    scores.append(Score(total, float(np.exp(-total / len(tokens))), tokens))
  return scores


def _left_to_right(forward: Forward, tokenizer: Tokenizer, known) -> Iterator[float]:
  """Yields each token's log-probability after the tokens before it, one pass through the model; in
  a text beyond the limit, after at least half of the tokens that fit."""
  room = forward.config.max_positions - 2
  parts, skips = [], []
  for ids in known:
    starts = range(0, max(1, len(ids) - room // 2), room // 2)
    parts += [(ids[start : start + room],) for start in starts]
    skips += [0 if start == 0 else room - room // 2 for start in starts]
  found = forward.run(lay_out(forward, tokenizer, parts), 'next_token')
  for (part,), skip, logs in zip(parts, skips, found, strict=True):
    yield from map(float, logs[skip : len(part)])  # position 0, [CLS], predicts the first token


def continue_text(
  forward: Forward, tokenizer: Tokenizer, texts, max_new_tokens: int, top_k: int,
  temperature: float, seed: int,
) -> list[str]:  # fmt: skip
  """See `Predictor.continue_text`."""
  forward.need('mlm')
  if not forward.config.causal:
    raise ValueError('this model attends to both sides; a left-to-right one continues texts.')
  _check_top_k(forward, top_k)
  if max_new_tokens < 1 or not 0 < temperature < np.inf:
    raise ValueError(
      'max_new_tokens must be at least 1 and temperature above 0, got '
      f'{max_new_tokens} and {temperature}.'
    )
  known = tokenizer.encode(texts)
  for ids in known:
    forward.check_length(len(ids) + max_new_tokens + 2)
  special = set(tokenizer.special.values()) - {tokenizer.sep_id}
  draws = [np.random.default_rng(seed) for _ in texts]
  going, results = list(range(len(texts))), list(texts)
  for _ in range(max_new_tokens):
    batch = lay_out(forward, tokenizer, [(known[i],) for i in going])
    last = np.array([[len(known[i])] for i in going], np.int32)
    batch |= {'masked_lm_positions': last, 'masked_lm_ids': np.zeros_like(last)}
    answers = forward.run(batch, 'mlm', min(top_k + len(special), forward.pieces))
    ended = set()
    for i, (_, [logs], [ids]) in zip(going, answers, strict=True):
      kept = [n for n, token in enumerate(ids) if token not in special][:top_k]
      weights = np.exp((logs[kept] - logs[kept].max()) / temperature).astype(np.float64)
      token = int(ids[draws[i].choice(kept, p=weights / weights.sum())])
      if token == tokenizer.sep_id:
        ended.add(i)
      else:
        known[i] = [*known[i], token]
        results[i] = _append(results[i], *tokenizer.word_of(tokenizer.vocab[token]))
    going = [i for i in going if i not in ended]
    if not going:
      break
  return results


def _append(text: str, word: str, continues: bool) -> str:
  """The text and a piece, with a blank where one belongs."""
  if continues or not text or text[-1].isspace():
    return text + word
  edges = text[-1] + (word[:1] or ' ')
  tight = any(map(words.is_unspaced, edges)) or edges[0] in '([{' or edges[1] in '.,;:!?)]}%'
  return text + ' ' * (not tight) + word


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
    if not window:
      forward.check_length(len(ids) + 2)
    at = words_of(tokenizer, ids)
    at = [(a, b) for a, b in at if text[offsets[a][0] : offsets[b - 1][1]][:1].isalpha()]
    plans.append((text, ids, offsets, at))
  questions = (q for _, ids, _, at in plans for word in at for q in _two(forward, ids, *word))
  answers, word_at = _ask(forward, tokenizer, questions, _PLACES, top_k), _word(tokenizer)
  results = []
  for text, _, offsets, at in plans:
    found = []
    for first, end in at:
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
  """Questions for a word's probability, all its tokens masked, and for one token instead of it."""
  places = list(range(first, min(end, first + _PLACES)))
  whole = _Question(ids, places, [ids[place] for place in places])
  single = _Question([*ids[: first + 1], *ids[end:]], [first], [0])
  return _shown(forward, whole), _shown(forward, single)


def _word(tokenizer):
  """Id -> the word that a token is on its own, or ''."""
  flags = tokenizer.word_flags

  def word(token):
    piece, _ = tokenizer.word_of(tokenizer.vocab[token])
    return piece if flags[token] & words.BEGINS and piece.isalpha() else ''

  return word


def words_of(tokenizer: Tokenizer, ids) -> list[tuple[int, int]]:
  """First piece and end of each word."""
  firsts = np.flatnonzero(words.firsts(np.array(ids, int), tokenizer.word_flags))
  return list(itertools.pairwise([*firsts.tolist(), len(ids)]))


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


def _encode(tokenizer: Tokenizer, split: list[list[str]]) -> list[list[int]]:
  """Ids of texts, with [MASK] between the parts of each."""
  ids = iter(tokenizer.encode(list(itertools.chain.from_iterable(split))))
  joined = ([[tokenizer.mask_id, *next(ids)] for _ in parts] for parts in split)
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
