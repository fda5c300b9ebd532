"""Spans of texts: answers out of contexts, and tagged words."""

from collections.abc import Sequence

import numpy as np

from bertjax.data import words as words_lib
from bertjax.data.loader import model_inputs
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.mlm import words_of
from bertjax.inference.results import Span
from bertjax.inference.runner import Runner, TextError
from bertjax.tasks import metrics, question_answering, tagging
from bertjax.tasks.task import Example


def answer(
  runner: Runner, questions: Sequence[str], contexts: Sequence[str], *, no_answer: bool,
  threshold: float, top_k: int, stride: int, max_answer: int,
) -> list[question_answering.Answer]:  # fmt: skip
  """See `Predictor.answer`."""
  if min(top_k, max_answer) < 1:
    raise ValueError(f'top_k and max_answer must be at least 1, got {top_k} and {max_answer}.')
  items = [Example('', pair, None) for pair in zip(questions, contexts, strict=True)]
  longest = max(map(len, runner.tokenizer.encode(list(questions))), default=0)
  limit = runner.config.max_positions
  if longest > limit // 2:
    raise TextError(f'a question has {longest} tokens, more than half of the limit {limit}.')
  encoded = question_answering.encode(
    items, runner.tokenizer, limit, stride=stride, max_query=longest
  )
  outputs = runner.run(model_inputs(encoded.columns), 'span')
  logits = np.full((len(outputs), limit, 2), -1e9)  # padding is never chosen
  for row, values in zip(logits, outputs, strict=True):
    row[: len(values)] = values
  return question_answering.decode(
    items, encoded, logits, threshold, version_2=no_answer, size=top_k, max_answer=max_answer
  )


def tag(
  runner: Runner, texts: Sequence[str | Sequence[str]], labels: Sequence[str], words: str
) -> list[list[Span]]:
  """See `Predictor.tag`."""
  if words not in words_lib.RULES:
    raise ValueError(f'words must be one of {words_lib.RULES}, got {words!r}.')
  split = [_split_words(runner.tokenizer, text, words) for text in texts]
  items = [Example('', tuple(text[a:b] for a, b in bounds)) for text, bounds in split]
  limit = runner.config.max_positions
  encoded = tagging.encode(items, runner.tokenizer, limit, labels=labels, context=False)
  if encoded.counts['truncated_words']:
    raise TextError(f'a word has more tokens than the model takes, {limit}.')
  batch = model_inputs(encoded.columns) | {'labels': encoded.alignment}
  tags = [[('O', 0.0)] * len(bounds) for _, bounds in split]
  outputs = zip(runner.run(batch, 'tagging'), encoded.columns['example_ids'], strict=True)
  for ((logits, chosen), owner), word in zip(outputs, encoded.alignment, strict=True):
    for i in np.flatnonzero(word >= 0):
      weights = np.exp(logits[i] - logits[i].max())
      tags[owner][word[i]] = labels[chosen[i]], float(weights[chosen[i]] / weights.sum())
  return [_spans(text, bounds, found) for (text, bounds), found in zip(split, tags, strict=True)]


def _split_words(tokenizer: Tokenizer, text, rule: str) -> tuple[str, list[tuple[int, int]]]:
  """A text, or words joined to one, and first character and end of each word."""
  if not isinstance(text, str):
    return words_lib.join(text)
  if rule != 'tokens':
    return text, words_lib.split(text, rule)
  [ids], [offsets] = tokenizer.encode_offsets([text], trim=True)
  bounds = [(offsets[first][0], offsets[end - 1][1]) for first, end in words_of(tokenizer, ids)]
  return text, [(start, end) for start, end in bounds if start < end]


def _spans(text: str, bounds, tags) -> list[Span]:
  spans = []
  for label, first, last in metrics.entities([tagging.to_tag(tag) for tag, _ in tags]):
    start, end = bounds[first][0], bounds[last - 1][1]
    probability = float(np.mean([p for _, p in tags[first:last]]))
    spans.append(Span(label, text[start:end], start, end, probability))
  return spans
