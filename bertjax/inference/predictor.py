"""`Predictor`: a trained model ready for texts. Needs no TensorFlow.

Every method takes one text and gives one result, or a list and gives a list. A text that is longer
than the model's limit is refused, or with `long='window'` read in parts; it is never cut.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from bertjax.data import words as words_lib
from bertjax.data.sentences import split_prose
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference import mlm
from bertjax.inference.runner import POOLINGS, Forward, TextError, rows
from bertjax.inference.search import Index
from bertjax.interop import loading, sentences
from bertjax.model.config import LABELLED_HEADS, EncoderConfig
from bertjax.model.heads import Bert
from bertjax.tasks import metrics, question_answering, tagging
from bertjax.tasks.task import Example


@dataclasses.dataclass(frozen=True)
class Classification:
  """Classes of a text.

  Attributes:
    labels: the most probable one; of a multi-label model those above 1/2; none of a regression.
    scores: label -> probability; of a regression, the number itself.
  """

  labels: list[str]
  scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Span:
  """A tagged span, `text[start:end]`; its probability is the mean over its words."""

  label: str
  text: str
  start: int
  end: int
  probability: float


@dataclasses.dataclass(frozen=True)
class Choice:
  """The chosen ending, its number, and the probability of each ending."""

  number: int
  text: str
  probabilities: list[float]


def _each(count: int):
  """Lets a method whose first `count` arguments are lists also take, and give, single items."""

  def decorate(method):
    @functools.wraps(method)
    def call(self, *arguments, **options):
      if not isinstance(arguments[0], str):
        if any(isinstance(item, str) for item in arguments[1:count]):
          raise ValueError(
            f'{method.__name__} takes one text with one, or a list with a list of as many; got a '
            'list and one text.'
          )
        return method(self, *arguments, **options) if len(arguments[0]) else []
      items = [None if item is None else [item] for item in arguments[:count]]
      return method(self, *items, *arguments[count:], **options)[0]

    return call

  return decorate


class Predictor:
  """Predictions of one model.

  Args:
    model: the module, as `load_model` returns it.
    params: its parameters, with the heads that the predictions need.
    tokenizer: its tokenizer.
    labels: names of the classes or tags; default: LABEL_0, LABEL_1, ...
    problem_type: 'multi_label_classification', 'regression' or anything else. A single label
      without one is a yes or no, as in transformers' pipeline.
    batch_size: rows of a batch.
    long: 'refuse' texts beyond the model's limit, or 'window': read them in parts. Pairs, choices
      and texts with masks are refused in any case, texts of `tag` and contexts of `answer` never.
    layers: pooling and further layers of a sentence-transformers model, for `embed`.
  """

  def __init__(
    self, model: Bert, params: dict, tokenizer: Tokenizer, *, labels: Sequence[str] = (),
    problem_type: str = '', batch_size: int = 32, long: str = 'refuse',
    layers: sentences.SentenceLayers | ValueError | None = None,
  ):  # fmt: skip
    if long not in ('refuse', 'window'):
      raise ValueError(f"long must be 'refuse' or 'window', got {long!r}.")
    self.model, self.tokenizer, self.long, self._layers = model, tokenizer, long, layers
    self.forward = Forward(model.config, params, batch_size, pieces=len(tokenizer.vocab))
    self.problem_type = problem_type
    count = max(self.forward.num_labels.values(), default=0)
    self.labels = tuple(labels) or tuple(f'LABEL_{i}' for i in range(count))
    if count and len(self.labels) != count:
      raise ValueError(f'the model has {count} labels, got the names {list(self.labels)}.')
    if len(set(self.labels)) < len(self.labels):
      raise ValueError(f'labels must have different names, got {list(self.labels)}.')
    one = not problem_type and self.forward.num_labels.get('classification') == 1
    self.multi_label = one or problem_type == 'multi_label_classification'

  @classmethod
  def from_dir(cls, path, **options) -> 'Predictor':
    """Loads a model directory, or a model of any kind that `load_model` reads."""
    path = loading.find_model(path)  # once: a run in progress may save another checkpoint
    labels, problem_type = loading.read_labels(path)
    model, params, tokenizer = loading.load_model(path)
    tasks = set(LABELLED_HEADS) & set(params)
    names = {'labels': labels if tasks else (), 'problem_type': problem_type}
    try:
      layers = loading.read_sentence_layers(path)
    except ValueError as error:  # raised where the layers are needed
      layers = error
    return cls(model, params, tokenizer, **names, **{'layers': layers} | options)

  @property
  def config(self) -> EncoderConfig:
    return self.model.config

  @property
  def layers(self) -> sentences.SentenceLayers:
    """What turns states into embeddings: the model's own layers, else a mean of length 1.

    Raises:
      ValueError: if the model has layers that are not supported.
    """
    if isinstance(self._layers, ValueError):
      raise self._layers
    return self._layers or sentences.SentenceLayers(steps=(sentences.normalise,))

  @_each(1)
  def fill_mask(self, texts, /, top_k: int = 5) -> list[list[list[mlm.Fill]]]:
    """Proposes tokens for every [MASK], each by itself, most probable first.

    Returns:
      For each text a list for each mask, in the order of the text, of `top_k` proposals.

    Raises:
      ValueError: if the model has no masked-LM head, or a text no [MASK] or too many tokens.
    """
    return mlm.fill(self.forward, self.tokenizer, texts, top_k)

  @_each(1)
  def infill(self, texts, /) -> list[str]:
    """Fills all masks one after another, the surest one first, and returns the texts."""
    return mlm.infill(self.forward, self.tokenizer, texts)

  @_each(1)
  def score(self, texts, /) -> list[mlm.Score]:
    """Pseudo-log-likelihoods, natural logarithm: each token masked by itself (Salazar et al. 2020).

    Of a left-to-right model, log-likelihoods: each token given those before it, in one pass. In a
    text beyond the limit, a token is scored amid the tokens nearest to it (`long='window'`).
    """
    return mlm.score(self.forward, self.tokenizer, texts, window=self.long == 'window')

  @_each(1)
  def continue_text(
    self, texts, /, *, max_new_tokens: int = 32, top_k: int = 1, temperature: float = 1.0,
    seed: int = 0,
  ) -> list[str]:  # fmt: skip
    """Texts continued by a left-to-right model until it ends them with [SEP].

    Args:
      texts: N texts.
      max_new_tokens: tokens added at most; they and the text must fit in the model.
      top_k: the most probable tokens that are sampled from; 1 is greedy.
      temperature: divides the log-probabilities that are sampled from.
      seed: of the samples; a text's do not depend on the others.
    """
    return mlm.continue_text(
      self.forward, self.tokenizer, texts, max_new_tokens, top_k, temperature, seed
    )

  @_each(1)
  def correct(self, texts, /, top_k: int = 5, ratio: float = 100.0) -> list[list[mlm.Correction]]:
    """Proposes other words where one is at least `ratio` times as probable as the text's own."""
    window = self.long == 'window'
    return mlm.correct(self.forward, self.tokenizer, texts, top_k, ratio, window=window)

  @_each(2)
  def classify(self, texts, pairs=None, /) -> list[Classification]:
    """Classes of texts or pairs; of a long text read in parts, the mean over its parts."""
    self.forward.need('classification')
    logits, owners, weights = self._logits('classification', texts, pairs)
    if self.problem_type == 'regression':
      values = logits
    elif self.multi_label:
      values = 1 / (1 + np.exp(-logits))
    else:
      values = _softmax(logits)
    return [self._classification(row) for row in _means(values, owners, weights, len(texts))]

  def _classification(self, values) -> Classification:
    scores = dict(zip(self.labels, map(float, values), strict=True))
    if self.problem_type == 'regression':
      return Classification([], scores)
    if self.multi_label:
      return Classification([label for label, p in scores.items() if p > 0.5], scores)
    return Classification([max(scores, key=scores.get)], scores)

  @_each(2)
  def next_sentence(self, first, second, /) -> list[float]:
    """The probability that the second text follows the first."""
    self.forward.need('nsp')
    logits, _, _ = self._logits('nsp', first, second)
    return _softmax(logits)[:, 0].tolist()  # in Google's data 0 is the actual next sentence

  @_each(1)
  def embed(self, texts, /, pooling: str = '', normalise: bool | None = None) -> np.ndarray:
    """Vectors [N, D] of texts; of a long text read in parts, the mean over its tokens.

    Args:
      texts: N texts.
      pooling: 'mean' over the tokens, 'cls', or 'last_four' layers side by side [N, 4D]; '' = as
        the model's sentence-transformers files say, with their dense layers, limit of tokens and
        scaling; 'mean' for a model without such files.
      normalise: True scales to length 1; None = as those files say, True without them.

    Raises:
      ValueError: if a text is too long, or the model has layers that are not supported.
    """
    if pooling and pooling not in POOLINGS:
      raise ValueError(f'pooling must be one of {POOLINGS}, got {pooling!r}.')
    layers = sentences.SentenceLayers(pooling) if pooling else self.layers
    vectors = _means(*self._logits(layers.pooling, texts, limit=layers.max_length), len(texts))
    steps = list(layers.steps)
    if normalise is False and steps[-1:] == [sentences.normalise]:
      steps.pop()
    for step in steps:
      vectors = step(vectors)
    return sentences.normalise(vectors) if normalise or (pooling and normalise is None) else vectors

  def index(self, texts: Sequence[str], pooling: str = '') -> Index:
    """Embeds texts, questions of an FAQ for instance, to be searched by `nearest`."""
    if isinstance(texts, str):
      raise ValueError('a corpus is a list of texts, got one text.')
    return Index(texts, self.embed(list(texts), pooling, normalise=True), pooling)

  def load_index(self, path) -> Index:
    """Reads an index that `Index.save` wrote.

    Raises:
      ValueError: if it is none, or another model's: its first text has another embedding here.
    """
    index = Index.load(path)
    if index.texts:
      vector = self.embed(index.texts[0], index.pooling, normalise=True)
      if vector.shape != index.vectors[0].shape or not vector @ index.vectors[0] > 0.99:
        raise ValueError(f'{path} was made with another model; delete it and make it again.')
    return index

  @_each(1)
  def nearest(self, texts, /, corpus, top_k: int = 5, pooling: str = '') -> list[list]:
    """The `search.Hit`s of each text in a corpus: a list of texts, or an `index`, whose pooling is
    used."""
    if not isinstance(corpus, Index):
      corpus = self.index(corpus, pooling)
    return corpus.nearest(self.embed(texts, corpus.pooling, normalise=True), top_k)

  @_each(1)
  def summarise(self, texts, /, sentences: int = 3, pooling: str = '') -> list[list[str]]:
    """The sentences, in their order, that stand for a text and not for one another."""
    split = [split_prose(text) for text in texts]
    flat = list(itertools.chain.from_iterable(split))
    ends = np.cumsum([0, *map(len, split)])
    index = self.index(flat, pooling)
    return [index.gist(a, b, sentences) for a, b in itertools.pairwise(ends)]

  @_each(2)
  def choose(self, prompts, endings, /) -> list[Choice]:
    """Which of its endings (a list of texts) goes with each prompt."""
    self.forward.need('choice')
    if any(isinstance(options, str) for options in endings):
      raise ValueError('the endings of a prompt are a list of texts, got one text.')
    counts = [len(options) for options in endings]
    if 0 in counts:
      raise TextError(f'question {counts.index(0)} has no endings.')
    firsts = [p for p, count in zip(prompts, counts, strict=True) for _ in range(count)]
    seconds = list(itertools.chain.from_iterable(endings))
    logits, _, _ = self._logits('choice', firsts, seconds)
    found = np.split(logits, np.cumsum(counts)[:-1])
    return [
      Choice(int(row.argmax()), options[row.argmax()], _softmax(row).tolist())
      for row, options in zip(found, endings, strict=True)
    ]

  @_each(2)
  def answer(
    self, questions, contexts, /, *, no_answer: bool = False, threshold: float = 0.0,
    top_k: int = 20, stride: int = 128, max_answer: int = 30,
  ) -> list[question_answering.Answer]:  # fmt: skip
    """Answers cut out of contexts of any length, which are read in overlapping windows.

    Args:
      questions: N questions; nothing of them is cut.
      contexts: N contexts.
      no_answer: whether '' is among the answers (SQuAD 2.0).
      threshold: of the null odds; above it the answer is ''.
      top_k: candidates kept.
      stride: tokens from one window to the next.
      max_answer: tokens of the longest answer.
    """
    self.forward.need('span')
    if min(top_k, max_answer) < 1:
      raise ValueError(f'top_k and max_answer must be at least 1, got {top_k} and {max_answer}.')
    items = [Example('', pair, None) for pair in zip(questions, contexts, strict=True)]
    longest = max(map(len, self.tokenizer.encode(list(questions))), default=0)
    limit = self.config.max_positions
    if longest > limit // 2:
      raise TextError(f'a question has {longest} tokens, more than half of the limit {limit}.')
    encoded = question_answering.encode(
      items, self.tokenizer, limit, stride=stride, max_query=longest
    )
    found = self.forward.run(rows(encoded.columns), 'span')
    logits = np.full((len(found), limit, 2), -1e9)  # padding is never chosen
    for row, values in zip(logits, found, strict=True):
      row[: len(values)] = values
    return question_answering.decode(
      items, encoded, logits, threshold, version_2=no_answer, size=top_k, max_answer=max_answer
    )

  @_each(1)
  def tag(self, texts, /, *, words: str = 'text') -> list[list[Span]]:
    """Typed spans of texts, in characters.

    A word's probability is the softmax of its logits, also where a CRF has chosen among them.

    Args:
      texts: N texts. A text given as a list of words keeps these, and its spans count characters of
        the words joined by blanks, or by nothing in scripts without spaces.
      words: what a word of another text is; it should be what it was in training. 'text' suits
        files like CoNLL's: white space separates words, punctuation around a word is apart, 'U.S.'
        stays, and each character of Chinese, Japanese or Thai is a word. 'spaces': white space
        alone separates words. 'tokens': the tokenizer's words, which end at every punctuation mark.
    """
    self.forward.need('tagging')
    if words not in words_lib.RULES:
      raise ValueError(f'words must be one of {words_lib.RULES}, got {words!r}.')
    texts, places = zip(*(self._words(text, words) for text in texts), strict=True)
    items = [
      Example('', tuple(text[a:b] for a, b in words))
      for text, words in zip(texts, places, strict=True)
    ]
    limit = self.config.max_positions
    encoded = tagging.encode(items, self.tokenizer, limit, labels=self.labels, context=False)
    if encoded.counts['cut_words']:
      raise TextError(f'a word has more tokens than the model takes, {limit}.')
    batch = rows(encoded.columns) | {'labels': encoded.alignment}
    tags = [[('O', 0.0)] * len(words) for words in places]
    found = zip(self.forward.run(batch, 'tagging'), encoded.columns['example_ids'], strict=True)
    for ((logits, chosen), owner), place in zip(found, encoded.alignment, strict=True):
      for i in np.flatnonzero(place >= 0):
        probability = float(_softmax(logits[i])[chosen[i]])
        tags[owner][place[i]] = self.labels[chosen[i]], probability
    return [self._spans(*item) for item in zip(texts, places, tags, strict=True)]

  def _words(self, text, rule: str) -> tuple[str, list[tuple[int, int]]]:
    """A text, or words joined to one, and first character and end of each word."""
    if not isinstance(text, str):
      return words_lib.join(text)
    if rule != 'tokens':
      return text, words_lib.split(text, rule)
    [ids], [offsets] = self.tokenizer.encode_offsets([text])
    words = mlm.words_of(self.tokenizer, ids)
    spans = [(offsets[first][0], offsets[end - 1][1]) for first, end in words]
    return text, [(start, end) for start, end in spans if start < end]

  def _spans(self, text, words, tags) -> list[Span]:
    spans = []
    for label, first, last in metrics.entities([tagging.to_tag(tag) for tag, _ in tags]):
      start, end = words[first][0], words[last - 1][1]
      probability = float(np.mean([p for _, p in tags[first:last]]))
      spans.append(Span(label, text[start:end], start, end, probability))
    return spans

  def _logits(self, output: str, texts, pairs=None, limit: int = 0) -> tuple:
    """Outputs of all rows, which text each row is of, and how many tokens of it.

    `limit` is the most tokens of a row, with its special ones; 0 = the model's positions.
    """
    limit = min(limit or self.config.max_positions, self.config.max_positions)
    columns = [list(texts)] if pairs is None else [list(texts), list(pairs)]
    if not all(isinstance(text, str) for column in columns for text in column):
      raise ValueError('texts are strings; the second of one text is one text, not a list.')
    if len({len(column) for column in columns}) > 1:
      raise ValueError(f'texts and pairs must be as many, got {[len(c) for c in columns]}.')
    items = list(zip(*map(self.tokenizer.encode, columns), strict=True))
    owners, weights = list(range(len(items))), [1] * len(items)
    if pairs is None and self.long == 'window':
      parts = [(i, part) for i, (ids,) in enumerate(items) for part in self._parts(ids, limit)]
      owners, weights = [i for i, _ in parts], [len(part) + 2 for _, part in parts]
      items = [(part,) for _, part in parts]
    for item in items:
      self.forward.check_length(sum(map(len, item)) + len(item) + 1, limit)
    found = self.forward.run(mlm.lay_out(self.forward, self.tokenizer, items), output)
    return np.array(found, np.float32), owners, weights

  def _parts(self, ids, limit: int = 0) -> list[list[int]]:
    """Parts of about the same length that fit, so that none is a mere rest."""
    limit = limit or self.config.max_positions
    count = max(1, -(-len(ids) // (limit - 2)))
    bounds = np.linspace(0, len(ids), count + 1).round().astype(int)
    return [ids[a:b] for a, b in itertools.pairwise(bounds)]


def _softmax(logits: np.ndarray) -> np.ndarray:
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def _means(values: np.ndarray, owners, weights, count: int) -> np.ndarray:
  """Weighted means of the rows [N, C] of each text, [count, C]."""
  sums = np.zeros((count, *values.shape[1:]), np.float32)
  totals = np.zeros((count, 1), np.float32)
  np.add.at(sums, owners, values * np.array(weights, np.float32)[:, None])
  np.add.at(totals, owners, np.array(weights, np.float32)[:, None])
  return sums / totals
