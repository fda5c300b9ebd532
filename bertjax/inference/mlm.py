"""Masked-LM inference: fill-mask, pseudo-log-likelihoods, continuations, corrections.

A query is a text with some tokens masked, and the ids whose probability is wanted there; all
predictions are queries, run in batches.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bertjax.data import words
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.results import Correction, Fill, Score
from bertjax.inference.runner import Runner, TextError

_MASKS = 8  # masks per row; a text with more takes more rows, not another program
_ROWS = 1024  # rows encoded at a time


class _Query(NamedTuple):
  """Ids of a text, the positions to mask, and the ids whose probability is wanted there."""

  ids: list[int]
  positions: list[int]
  targets: list[int]


def fill(runner: Runner, texts: Sequence[str], top_k: int) -> list[list[list[Fill]]]:
  """See `Predictor.fill_mask`."""
  _check_top_k(runner, top_k)
  tokenizer, mask = runner.tokenizer, runner.tokenizer.vocab[runner.tokenizer.mask_id]
  split = [text.split(mask) for text in texts]
  queries = []
  for text, ids in zip(texts, _encode(tokenizer, split), strict=True):
    runner.check_length(len(ids) + 2)
    positions = _masked(ids, tokenizer)
    if not positions:
      raise TextError(f'the text has no {mask}: {text!r}')
    queries += _queries(ids, positions)
  answers = _run(runner, queries, _MASKS, top_k)
  best = iter([pair for _, logs, ids in answers for pair in zip(logs, ids, strict=True)])

  def fills(parts: list[str], number: int) -> list[Fill]:
    results = []
    for log, token in zip(*next(best), strict=True):
      tokens = [mask] * (len(parts) - 1)  # the other masks stay
      tokens[number] = tokenizer.vocab[token]
      text = _insert(tokenizer, parts, tokens)
      results.append(Fill(tokens[number], float(np.exp(log)), text))
    return results

  return [[fills(parts, number) for number in range(len(parts) - 1)] for parts in split]


def infill(runner: Runner, texts: Sequence[str]) -> list[str]:
  """See `Predictor.infill`."""
  tokenizer = runner.tokenizer
  split = [text.split(tokenizer.vocab[tokenizer.mask_id]) for text in texts]
  encoded = _encode(tokenizer, split)
  positions = [_masked(ids, tokenizer) for ids in encoded]
  for ids in encoded:
    runner.check_length(len(ids) + 2)
  while unfinished := [ids for ids in encoded if tokenizer.mask_id in ids]:
    queries = [(ids, q) for ids in unfinished for q in _queries(ids, _masked(ids, tokenizer))]
    answers = _run(runner, [query for _, query in queries], _MASKS)
    best = {}  # text -> (log-probability, position, id) of its most confident mask
    for (ids, query), (_, logs, tokens) in zip(queries, answers, strict=True):
      i = int(logs[:, 0].argmax())
      candidate = (logs[i, 0], query.positions[i], int(tokens[i, 0]))
      best[id(ids)] = max(best.get(id(ids), candidate), candidate)
    for ids in unfinished:
      _, position, token = best[id(ids)]
      if token == tokenizer.mask_id:
        raise ValueError('the model predicts [MASK] for a mask; it was not trained to fill masks.')
      ids[position] = token
  return [
    _insert(tokenizer, parts, [tokenizer.vocab[ids[position]] for position in masks])
    for parts, ids, masks in zip(split, encoded, positions, strict=True)
  ]


def score(runner: Runner, texts: Sequence[str], *, window: bool) -> list[Score]:
  """See `Predictor.score`."""
  encoded = runner.tokenizer.encode(texts)
  for text, ids in zip(texts, encoded, strict=True):
    if not ids:
      raise TextError(f'the text has no tokens to score: {text!r}')
    if not window:
      runner.check_length(len(ids) + 2)
  if runner.config.causal:
    logs = _left_to_right(runner, encoded)
  else:
    pairs = ((ids, position) for ids in encoded for position in range(len(ids)))
    queries = (_in_window(runner, _Query(ids, [at], [ids[at]])) for ids, at in pairs)
    logs = (float(target[0]) for target, _, _ in _run(runner, queries, 1))
  scores = []
  for ids in encoded:
    tokens = [(runner.tokenizer.vocab[token], next(logs)) for token in ids]
    total = sum(log for _, log in tokens)
    scores.append(Score(total, float(np.exp(-total / len(tokens))), tokens))
  return scores


def _left_to_right(runner: Runner, encoded) -> Iterator[float]:
  """Yields each token's log-probability given the tokens before it, in one forward pass; in a text
  beyond the limit, given at least half of the tokens that fit."""
  size = runner.config.max_positions - 2
  windows, skips = [], []
  for ids in encoded:
    starts = range(0, max(1, len(ids) - size // 2), size // 2)
    windows += [(ids[start : start + size],) for start in starts]
    skips += [0 if start == 0 else size - size // 2 for start in starts]
  outputs = runner.run(runner.make_batch(windows), 'next_token')
  for (ids,), skip, logs in zip(windows, skips, outputs, strict=True):
    yield from map(float, logs[skip : len(ids)])  # position 0, [CLS], predicts the first token


def continue_text(
  runner: Runner, texts: Sequence[str], max_new_tokens: int, top_k: int, temperature: float,
  seed: int,
) -> list[str]:  # fmt: skip
  """See `Predictor.continue_text`."""
  _check_top_k(runner, top_k)
  if max_new_tokens < 1 or not 0 < temperature < np.inf:
    raise ValueError(
      'max_new_tokens must be at least 1 and temperature above 0, got '
      f'{max_new_tokens} and {temperature}.'
    )
  tokenizer = runner.tokenizer
  encoded, results = tokenizer.encode(texts), list(texts)
  for ids in encoded:
    runner.check_length(len(ids) + max_new_tokens + 2)
  special = set(tokenizer.special.values()) - {tokenizer.sep_id}
  rngs = [np.random.default_rng(seed) for _ in texts]
  unfinished = list(range(len(texts)))
  for _ in range(max_new_tokens):
    batch = runner.make_batch([(encoded[i],) for i in unfinished])
    last = np.array([[len(encoded[i])] for i in unfinished], np.int32)
    batch |= {'masked_lm_positions': last, 'masked_lm_ids': np.zeros_like(last)}
    answers = runner.run(batch, 'mlm', min(top_k + len(special), tokenizer.vocab_size))
    ended = set()
    for i, (_, [logs], [ids]) in zip(unfinished, answers, strict=True):
      allowed = [n for n, token in enumerate(ids) if token not in special][:top_k]
      weights = np.exp((logs[allowed] - logs[allowed].max()) / temperature).astype(np.float64)
      token = int(ids[rngs[i].choice(allowed, p=weights / weights.sum())])
      if token == tokenizer.sep_id:
        ended.add(i)
      else:
        encoded[i] = [*encoded[i], token]
        results[i] = _append(results[i], *tokenizer.word_of(tokenizer.vocab[token]))
    unfinished = [i for i in unfinished if i not in ended]
    if not unfinished:
      break
  return results


def correct(
  runner: Runner, texts: Sequence[str], top_k: int, ratio: float, *, window: bool
) -> list[list[Correction]]:
  """See `Predictor.correct`.

  A word's probability is the product over its tokens (at most eight), all masked at once;
  replacements are single tokens for one mask.
  """
  _check_top_k(runner, top_k)
  if not 0 < ratio < np.inf:
    raise ValueError(f'ratio must be above 0, got {ratio}.')
  tokenizer = runner.tokenizer
  plans = []
  for text, ids, offsets in zip(texts, *tokenizer.encode_offsets(texts, trim=True), strict=True):
    if not window:
      runner.check_length(len(ids) + 2)
    bounds = [
      (first, end) for first, end in words_of(tokenizer, ids)
      if text[offsets[first][0] : offsets[end - 1][1]][:1].isalpha()
    ]  # fmt: skip
    plans.append((text, ids, offsets, bounds))
  queries = (q for _, ids, _, at in plans for word in at for q in _word_queries(runner, ids, *word))
  answers = _run(runner, queries, _MASKS, top_k)
  results = []
  for text, _, offsets, bounds in plans:
    corrections = []
    for first, end in bounds:
      (target, _, _), (_, logs, best) = next(answers), next(answers)
      start, stop = offsets[first][0], offsets[end - 1][1]
      probability = float(np.exp(target.sum()))
      fills = [
        Fill(word, float(np.exp(log)), text[:start] + word + text[stop:])
        for log, token in zip(logs[0], best[0], strict=True)
        if np.exp(log) >= ratio * probability and (word := _word_of_id(tokenizer, token))
      ]
      if fills:
        corrections.append(Correction(text[start:stop], start, stop, probability, fills))
    results.append(corrections)
  return results


def _word_queries(runner: Runner, ids, first: int, end: int) -> tuple[_Query, _Query]:
  """Queries for a word's probability, all its tokens masked, and for one token in its place."""
  positions = list(range(first, min(end, first + _MASKS)))
  word = _Query(ids, positions, [ids[position] for position in positions])
  single = _Query([*ids[: first + 1], *ids[end:]], [first], [0])
  return _in_window(runner, word), _in_window(runner, single)


def _word_of_id(tokenizer: Tokenizer, token: int) -> str:
  """The word that a token is on its own, or ''."""
  text, _ = tokenizer.word_of(tokenizer.vocab[token])
  return text if tokenizer.word_flags[token] & words.BEGINS and text.isalpha() else ''


def words_of(tokenizer: Tokenizer, ids) -> list[tuple[int, int]]:
  """First token and end of each word."""
  firsts = np.flatnonzero(words.firsts(np.array(ids, int), tokenizer.word_flags))
  return list(itertools.pairwise([*firsts.tolist(), len(ids)]))


def _insert(tokenizer: Tokenizer, parts: list[str], tokens: list[str]) -> str:
  """Joins the parts around the masks of a text with tokens in place of the masks.

  White space before a token that continues a word is dropped; a space is inserted between two words
  that would become one; neither in scripts without spaces.
  """
  text = parts[0]
  for token, part in zip(tokens, parts[1:], strict=True):
    word, continues = tokenizer.word_of(token)
    text = text.rstrip() + word if continues and _is_spaced(word[:1]) else _join(text, word)
    text = _join(text, part)
  return text


def _append(text: str, word: str, continues: bool) -> str:
  """Appends a token to a text, with a space where one belongs."""
  if continues or not text or text[-1].isspace():
    return text + word
  edges = text[-1] + (word[:1] or ' ')
  tight = any(map(words.is_unspaced, edges)) or edges[0] in '([{' or edges[1] in '.,;:!?)]}%'
  return text + ' ' * (not tight) + word


def _join(first: str, second: str) -> str:
  return first + ' ' * (_is_spaced(first[-1:]) and _is_spaced(second[:1])) + second


def _is_spaced(character: str) -> bool:
  return character.isalnum() and not words.is_unspaced(character)


def _check_top_k(runner: Runner, top_k: int) -> None:
  if not 1 <= top_k <= runner.tokenizer.vocab_size:
    raise ValueError(f'top_k must be in 1..{runner.tokenizer.vocab_size}, got {top_k}.')


def _encode(tokenizer: Tokenizer, split: list[list[str]]) -> list[list[int]]:
  """Ids of texts, with [MASK] between the parts of each."""
  if not tokenizer.standard:  # its mask may take the space before it, which only the text shows
    mask = tokenizer.vocab[tokenizer.mask_id]
    return tokenizer.encode([mask.join(parts) for parts in split])
  ids = iter(tokenizer.encode(list(itertools.chain.from_iterable(split))))
  joined = ([[tokenizer.mask_id, *next(ids)] for _ in parts] for parts in split)
  return [list(itertools.chain.from_iterable(text))[1:] for text in joined]


def _masked(ids, tokenizer) -> list[int]:
  return [position for position, token in enumerate(ids) if token == tokenizer.mask_id]


def _queries(ids, positions) -> list[_Query]:
  groups = [positions[i : i + _MASKS] for i in range(0, len(positions), _MASKS)]
  return [_Query(ids, group, [0] * len(group)) for group in groups]


def _in_window(runner: Runner, query: _Query) -> _Query:
  """Limits a query to the tokens nearest to its masks that fit, as many on either side."""
  size, (ids, positions, targets) = runner.config.max_positions - 2, query
  first = max(0, min(positions[0] - size // 2, len(ids) - size))
  return _Query(ids[first : first + size], [at - first for at in positions], targets)


def _run(
  runner: Runner, queries: Iterable[_Query], width: int, top_k: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields for each query, in order: the log-probability of each target [M], and the `top_k` best
  log-probabilities [M, k] with their ids [M, k], for its M <= width masks."""
  queries = iter(queries)
  while chunk := list(itertools.islice(queries, _ROWS)):
    batch = runner.make_batch([(query.ids,) for query in chunk])
    positions, targets = np.zeros((2, len(chunk), width), np.int32)
    for row, query in enumerate(chunk):
      count = len(query.positions)
      positions[row, :count] = np.array(query.positions) + 1  # after [CLS]
      targets[row, :count] = query.targets
      batch['input_ids'][row, positions[row, :count]] = runner.tokenizer.mask_id
    batch |= {'masked_lm_positions': positions, 'masked_lm_ids': targets}
    for query, (target, logs, ids) in zip(chunk, runner.run(batch, 'mlm', top_k), strict=True):
      count = len(query.positions)
      yield target[:count], logs[:count], ids[:count]
