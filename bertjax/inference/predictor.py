"""`Predictor`: a trained model that answers texts. Needs no TensorFlow.

Every method takes one text and returns one result, or a list of texts and returns a list. A text
beyond the model's limit raises `TextError`, or is processed in windows with `long='window'`;
nothing is truncated.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec

import numpy as np

from bertjax.data.sentences import split_prose
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference import mlm, spans
from bertjax.inference.results import (
  Choice,
  Classification,
  Correction,
  Fill,
  Ranked,
  Score,
  Span,
)
from bertjax.inference.runner import POOLINGS, Runner, TextError
from bertjax.inference.search import Hit, Index
from bertjax.interop import loading, sentences
from bertjax.model.config import LABELLED_HEADS, EncoderConfig
from bertjax.model.heads import Bert
from bertjax.tasks.question_answering import Answer

P = ParamSpec('P')
_UNIT = (sentences.normalise,)  # the last step of a model with vectors of length 1


class Call(NamedTuple):
  """A prediction that can be asked for by name, a method of `Predictor`."""

  method: Callable
  head: str  # the head it needs, or ''
  least: int  # texts of an item
  most: int
  causal: bool | None  # the direction of the model that it needs; None = either
  options: list[str]  # the method's parameters that are no texts
  outputs: int  # of the head; 0 = any number


CALLS: dict[str, Call] = {}


def _call(
  head: str = '', least: int = 1, most: int = 1, *, causal: bool | None = None, name: str = '',
  outputs: int = 0,
) -> Callable[[Callable[P, Any]], Callable[P, Any]]:  # fmt: skip
  """Enters a method in `CALLS`. Its first parameter is a list, the second, too, if an item may have
  several texts; decorated, it also takes, and returns, single items."""

  def decorate(method: Callable[P, Any]) -> Callable[P, Any]:
    signature = inspect.signature(method)
    _, *parameters = signature.parameters
    items, options = parameters[: min(most, 2)], parameters[min(most, 2) :]

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs):
      bound = signature.bind(*args, **kwargs)
      first, *others = (bound.arguments.get(item, ()) for item in items)
      single = isinstance(first, str)
      if not single and any(isinstance(texts, str) for texts in others):
        raise ValueError(
          f'{method.__name__} takes one text with one, or a list with a list of as many; got a '
          'list and one text.'
        )
      if not (single or len(first)):
        return []
      bound.arguments['self'].runner.need(head, causal, outputs)
      for item in items if single else ():
        if bound.arguments.get(item) is not None:
          bound.arguments[item] = [bound.arguments[item]]
      results = method(*bound.args, **bound.kwargs)
      return results[0] if single else results

    CALLS[name or method.__name__] = Call(call, head, least, most, causal, options, outputs)
    return call

  return decorate


class Predictor:
  """Predictions of one model.

  >>> import bertjax
  >>> predictor = bertjax.Predictor.from_dir(folder)
  >>> [fills] = predictor.fill_mask('The [MASK] is open.', top_k=3)
  >>> len(fills)
  3
  >>> predictor.embed(['A sentence.', 'Another one.']).shape == (2, predictor.config.hidden_size)
  True

  Args:
    model: the module, as `load_model` returns it.
    params: its parameters, with the heads that the predictions need.
    tokenizer: its tokenizer.
    labels: names of the classes or tags; default: LABEL_0, LABEL_1, ...
    problem_type: 'multi_label_classification', 'regression', or anything else for one class of
      several. A single label without a problem type is a yes or no, as in transformers' pipeline.
    batch_size: rows of a batch.
    long: 'refuse' raises `TextError` for texts beyond the model's limit, 'window' splits them, and
      documents of `rerank`, into windows. Pairs, choices and texts with masks are refused in either
      case; texts of `tag` and contexts of `answer` are always processed in windows.
    layers: pooling and further layers of a sentence-transformers model, for `embed`.
    activation: of the scores of `rerank`, 'sigmoid' or 'identity'.

  Raises:
    ValueError: if the number of labels is not that of the head's outputs, or a setting is unknown.
  """

  def __init__(
    self, model: Bert, params: dict, tokenizer: Tokenizer, *, labels: Sequence[str] = (),
    problem_type: str = '', batch_size: int = 32, long: str = 'refuse',
    layers: sentences.SentenceLayers | ValueError | None = None,
    activation: str | ValueError = 'sigmoid',
  ):  # fmt: skip
    if long not in ('refuse', 'window'):
      raise ValueError(f"long must be 'refuse' or 'window', got {long!r}.")
    self.model, self.tokenizer, self.long, self._layers = model, tokenizer, long, layers
    self.runner = Runner(model, params, tokenizer, batch_size)
    self._activation = activation
    self.problem_type = problem_type
    count = max(self.runner.num_labels.values(), default=0)
    self.labels = tuple(labels) or tuple(f'LABEL_{i}' for i in range(count))
    if count and len(self.labels) != count:
      raise ValueError(f'the model has {count} labels, got the names {list(self.labels)}.')
    if len(set(self.labels)) < len(self.labels):
      raise ValueError(f'labels must have different names, got {list(self.labels)}.')
    single = not problem_type and self.runner.num_labels.get('classification') == 1
    self.multi_label = single or problem_type == 'multi_label_classification'
    self._corpus: tuple[tuple, Index] | None = None

  @classmethod
  def from_dir(cls, path, **options) -> 'Predictor':
    """Loads a model of any kind that `load_model` reads, with its labels and sentence layers.

    Args:
      path: the source, see `load_model`.
      **options: arguments of `Predictor`.
    """
    path = loading.find_model(path)  # once: a run in progress may save another checkpoint
    labels, problem_type = loading.read_labels(path)
    model, params, tokenizer = loading.load_model(path)
    try:
      layers: sentences.SentenceLayers | ValueError | None = loading.read_sentence_layers(path)
    except ValueError as error:  # raised where the layers are needed
      layers = error
    try:
      activation: str | ValueError = loading.read_activation(path) or 'sigmoid'
    except ValueError as error:
      activation = error
    names = labels if set(LABELLED_HEADS) & set(params) else ()
    defaults = {'labels': names, 'problem_type': problem_type, 'layers': layers,
                'activation': activation}  # fmt: skip
    return cls(model, params, tokenizer, **defaults | options)

  @property
  def config(self) -> EncoderConfig:
    return self.model.config

  def calls(self) -> list[str]:
    """Returns the names out of `CALLS` that the model can answer: it has the head, and the
    direction."""
    return [
      name for name, call in CALLS.items()
      if call.head in ('', *self.runner.params) and call.causal in (None, self.config.causal)
      and call.outputs in (0, self.runner.num_labels.get(call.head))
    ]  # fmt: skip

  def default_call(self) -> str:
    """Returns the call for the model's only head, 'embed' without one.

    Raises:
      ValueError: for a model of several heads.
    """
    heads = sorted(set(self.runner.params) - {'encoder', 'pooler'})
    fitting = [name for name in self.calls() if CALLS[name].head in (heads or [''])]
    if len(heads) > 1:
      raise ValueError(f'the model has the heads {", ".join(heads)}; choose {", ".join(fitting)}.')
    return fitting[0]

  def check_call(self, name: str, count: int, options: dict) -> None:
    """Raises ValueError if a call cannot be made with items of `count` texts and these options."""
    if name not in CALLS:
      raise ValueError(f'there is no {name!r}; choose from {", ".join(CALLS)}.')
    call = CALLS[name]
    self.runner.need(call.head, call.causal, call.outputs)
    if not call.least <= count <= call.most:
      several = f'{call.least} to {call.most} texts'
      many = {1: 'one text', 2: 'two texts'}[call.most] if call.least == call.most else several
      raise ValueError(f'{name} takes {many} for each item, got {count}.')
    unknown = next((option for option in options if option not in call.options), None)
    if unknown:
      listed = ', '.join(call.options) or 'none'
      raise ValueError(f'{name} has no option {unknown!r}; it has {listed}.')

  def call(self, name: str, items: Sequence[Sequence], options: dict) -> list:
    """Results of items, each a text or several (a text of 'tag' may be its words), as JSON values.

    Raises:
      TextError: if one cannot be answered.
    """
    for text in itertools.chain.from_iterable(items):
      if not (text.strip() if isinstance(text, str) else text):
        raise TextError('a text is empty.')
    if CALLS[name].most > 2:  # the others are a list
      items = [(first, list(others)) for first, *others in items]
    columns = map(list, zip(*items, strict=True))
    return [plain(result) for result in CALLS[name].method(self, *columns, **options)]

  def call_each(self, name: str, items: Sequence, options: dict) -> list[dict]:
    """Returns {'result': value} for each item, or {'error': sentence} for those that have none."""
    counts = sorted({len(item) for item in items})
    if len(counts) > 1 and CALLS[name].most == 2:  # single texts and pairs share no call
      results = {
        count: iter(self.call_each(name, [i for i in items if len(i) == count], options))
        for count in counts
      }
      return [next(results[len(item)]) for item in items]
    try:
      return [{'result': value} for value in self.call(name, items, options)] if items else []
    except TextError as error:
      if len(items) == 1:
        return [{'error': str(error)}]
    half = len(items) // 2  # find the bad ones without giving up batches
    parts = items[:half], items[half:]
    return [result for part in parts for result in self.call_each(name, part, options)]

  @property
  def layers(self) -> sentences.SentenceLayers:
    """Layers from states to embeddings: the model's own, else a mean scaled to length 1.

    Raises:
      ValueError: if the model has layers that are not supported.
    """
    if isinstance(self._layers, ValueError):
      raise self._layers
    return self._layers or sentences.SentenceLayers(steps=(sentences.normalise,))

  @_call('mlm', causal=False)
  def fill_mask(self, texts, top_k: int = 5) -> list[list[list[Fill]]]:
    """Proposes tokens for every [MASK], the other masks kept, most probable first.

    Returns:
      For each text a list for each mask, in the order of the text, of `top_k` proposals.

    Raises:
      ValueError: if the model has no masked-LM head, or a text no [MASK] or too many tokens.
    """
    return mlm.fill(self.runner, texts, top_k)

  @_call('mlm', causal=False)
  def infill(self, texts) -> list[str]:
    """Fills all masks of each text, the most confident one first (easy-first decoding)."""
    return mlm.infill(self.runner, texts)

  @_call('mlm')
  def score(self, texts) -> list[Score]:
    """Pseudo-log-likelihoods in nats: each token masked separately (Salazar et al. 2020).

    For a causal model, log-likelihoods: each token given those before it, in one forward pass. In a
    text beyond the limit, a token is scored given the tokens nearest to it (`long='window'`).
    """
    return mlm.score(self.runner, texts, window=self.long == 'window')

  @_call('mlm', causal=True, name='continue')
  def continue_text(
    self, texts, *, max_new_tokens: int = 32, top_k: int = 1, temperature: float = 1.0,
    seed: int = 0,
  ) -> list[str]:  # fmt: skip
    """Texts continued by a causal model until it predicts [SEP].

    Args:
      texts: N texts.
      max_new_tokens: maximum number of tokens added; they and the text must fit in the model.
      top_k: number of most probable tokens that are sampled from; 1 is greedy decoding.
      temperature: divides the log-probabilities that are sampled from.
      seed: seed of the samples; those of a text do not depend on the other texts.
    """
    return mlm.continue_text(self.runner, texts, max_new_tokens, top_k, temperature, seed)

  @_call('mlm', causal=False)
  def correct(self, texts, top_k: int = 5, ratio: float = 100.0) -> list[list[Correction]]:
    """Proposes replacements at least `ratio` times as probable as the original word."""
    return mlm.correct(self.runner, texts, top_k, ratio, window=self.long == 'window')

  @_call('classification', 1, 2)
  def classify(self, texts, pairs=None) -> list[Classification]:
    """Classes of texts or pairs; for a text in windows, the mean of their probabilities."""
    activation: Callable = _sigmoid if self.multi_label else _softmax
    if self.problem_type == 'regression':
      activation = np.asarray
    scores = self.runner.mean_outputs(
      'classification', texts, pairs, window=self.long == 'window', activation=activation
    )
    return [self._classification(row) for row in scores]

  def _classification(self, values: np.ndarray) -> Classification:
    scores = dict(zip(self.labels, map(float, values), strict=True))
    if self.problem_type == 'regression':
      return Classification([], scores)
    if self.multi_label:
      return Classification([label for label, p in scores.items() if p > 0.5], scores)
    return Classification([max(scores, key=lambda label: scores[label])], scores)

  @_call('tagging')
  def tag(self, texts, *, words: str = 'text') -> list[list[Span]]:
    """Typed spans of texts, in characters.

    A word's probability is the softmax of its logits, also where a CRF chooses the tags.

    Args:
      texts: N texts. A text given as a list of words keeps these, and its spans count characters of
        the words joined by spaces, or by nothing in scripts without spaces.
      words: how other texts are split into words; it should be as in training. 'text' suits files
        like CoNLL's: white space separates words, punctuation around a word is a word, 'U.S.' is
        kept, and each character of Chinese, Japanese or Thai is a word. 'spaces': only white space
        separates words. 'tokens': the tokenizer's words, which end at every punctuation mark.
    """
    return spans.tag(self.runner, texts, self.labels, words)

  @_call('span', 2, 2)
  def answer(
    self, questions, contexts, *, no_answer: bool = False, threshold: float = 0.0,
    top_k: int = 20, stride: int = 128, max_answer: int = 30,
  ) -> list[Answer]:  # fmt: skip
    """Answers extracted from contexts of any length, by overlapping windows.

    Args:
      questions: N questions, at most half as long as the model's limit.
      contexts: N contexts.
      no_answer: whether '' is a possible answer (SQuAD 2.0).
      threshold: of the null odds; above it the answer is ''.
      top_k: number of candidates kept.
      stride: tokens from the start of one window to the next.
      max_answer: maximum tokens of an answer.
    """
    return spans.answer(
      self.runner, questions, contexts, no_answer=no_answer, threshold=threshold, top_k=top_k,
      stride=stride, max_answer=max_answer,
    )  # fmt: skip

  @_call('choice', 3, 100)
  def choose(self, prompts, endings) -> list[Choice]:
    """The most probable of the endings (a list of texts) of each prompt."""
    if any(isinstance(options, str) for options in endings):
      raise ValueError('the endings of a prompt are a list of texts, got one text.')
    counts = [len(options) for options in endings]
    if 0 in counts:
      raise TextError(f'question {counts.index(0)} has no endings.')
    firsts = [p for p, count in zip(prompts, counts, strict=True) for _ in range(count)]
    seconds = list(itertools.chain.from_iterable(endings))
    logits = self.runner.mean_outputs('choice', firsts, seconds)
    rows = np.split(logits, np.cumsum(counts)[:-1])
    return [
      Choice(int(row.argmax()), options[row.argmax()], _softmax(row).tolist())
      for row, options in zip(rows, endings, strict=True)
    ]

  @_call('classification', 2, 1000, outputs=1)
  def rerank(self, queries, documents, *, top_k: int = 0) -> list[list[Ranked]]:
    """The documents (a list of texts) of each query by a cross-encoder's score, best first.

    With `long='window'`, the score of a document beyond the limit is that of its best window.

    Args:
      queries: N queries.
      documents: N lists of texts.
      top_k: number of documents to return; 0 = all.
    """
    if isinstance(self._activation, ValueError):
      raise self._activation
    if any(isinstance(texts, str) for texts in documents):
      raise ValueError('the documents of a query are a list of texts, got one text.')
    counts = [len(texts) for texts in documents]
    if 0 in counts:
      raise TextError(f'query {counts.index(0)} has no documents.')
    if top_k < 0:
      raise ValueError(f'top_k must be at least 1, or 0 for all documents, got {top_k}.')
    firsts = [query for query, count in zip(queries, counts, strict=True) for _ in range(count)]
    logits = self.runner.mean_outputs(
      'classification', firsts, list(itertools.chain.from_iterable(documents)),
      best_window=self.long == 'window',
    )[:, 0]  # fmt: skip
    scores = _sigmoid(logits) if self._activation == 'sigmoid' else logits
    ranked = []
    for texts, row in zip(documents, np.split(scores, np.cumsum(counts)[:-1]), strict=True):
      order = np.argsort(-row, kind='stable')[: top_k or None].tolist()
      ranked.append([Ranked(i, texts[i], float(row[i])) for i in order])
    return ranked

  @_call('nsp', 2, 2)
  def next_sentence(self, first, second) -> list[float]:
    """Probabilities that the second text follows the first."""
    logits = self.runner.mean_outputs('nsp', first, second)
    return _softmax(logits)[:, 0].tolist()  # in Google's data 0 is the actual next sentence

  @_call()
  def embed(
    self, texts, pooling: str = '', normalise: bool | None = None, prompt: str = '', width: int = 0
  ) -> np.ndarray:  # fmt: skip
    """Embeddings [N, D] of texts; for a text in windows, the mean over its tokens.

    Args:
      texts: N texts.
      pooling: 'mean' over the tokens, 'cls', the 'last' token, or 'last_four' layers concatenated
        [N, 4D]; '' = that of the model's sentence-transformers files, with their dense layers,
        token limit and scaling; 'mean' for a model without such files.
      normalise: True scales to length 1; None = as those files say, True without them.
      prompt: name of a prompt of those files, 'query' or 'document' for instance, which is put in
        front of each text; '' = their default, if there is one.
      width: first components to keep of a Matryoshka model; 0 = all.

    Raises:
      ValueError: if a text is too long, the model has layers that are not supported, or no such
        prompt or width.
    """
    if pooling and pooling not in POOLINGS:
      raise ValueError(f'pooling must be one of {POOLINGS}, got {pooling!r}.')
    layers = sentences.SentenceLayers(pooling) if pooling else self.layers
    name = prompt or layers.default_prompt
    if name and name not in layers.prompts:
      raise ValueError(f'the model has no prompt {name!r}; it has {sorted(layers.prompts)}.')
    if name:
      texts = [layers.prompts[name] + text for text in texts]
    vectors = self.runner.mean_outputs(
      layers.pooling, texts, limit=layers.max_length, window=self.long == 'window'
    )
    raw = normalise is False and layers.steps[-1:] == _UNIT
    for step in layers.steps[:-1] if raw else layers.steps:
      vectors = step(vectors)
    if not 0 <= width <= vectors.shape[-1]:
      raise ValueError(f'width must be in 0..{vectors.shape[-1]}, got {width}.')
    scaled = pooling or (width and layers.steps[-1:] == _UNIT)
    vectors = vectors[..., : width or None]
    return sentences.normalise(vectors) if normalise or (scaled and normalise is None) else vectors

  def index(self, texts: Sequence[str], pooling: str = '') -> Index:
    """Embeds a corpus, the questions of an FAQ for instance, for `nearest`."""
    if isinstance(texts, str):
      raise ValueError('a corpus is a list of texts, got one text.')
    vectors = self.embed(list(texts), pooling, True, self._prompt('document', pooling))
    return Index(texts, vectors, pooling)

  def _prompt(self, name: str, pooling: str) -> str:
    """The name of a prompt if the model has it, else '', as in sentence-transformers."""
    return name if not pooling and name in self.layers.prompts else ''

  def load_index(self, path) -> Index:
    """Reads an index that `Index.save` wrote.

    Raises:
      ValueError: if it is none, or another model's: its first text has another embedding here.
    """
    index = Index.load(path)
    if index.texts:
      prompt = self._prompt('document', index.pooling)
      vector = self.embed(index.texts[0], index.pooling, True, prompt)
      if vector.shape != index.vectors[0].shape or not vector @ index.vectors[0] > 0.99:
        raise ValueError(f'{path} was made with another model; delete it and make it again.')
    return index

  @_call()
  def nearest(self, texts, corpus, top_k: int = 5, pooling: str = '') -> list[list[Hit]]:
    """The nearest texts of a corpus by cosine similarity.

    Args:
      texts: N queries.
      corpus: an `index`, or a list of texts, which is embedded once: the next call with the same
        list reuses its embeddings.
      top_k: number of hits of each query.
      pooling: see `embed`; an index has its own.
    """
    if not isinstance(corpus, Index):
      key = (corpus if isinstance(corpus, str) else tuple(corpus), pooling)
      if self._corpus is None or self._corpus[0] != key:
        self._corpus = key, self.index(corpus, pooling)
      corpus = self._corpus[1]
    prompt = self._prompt('query', corpus.pooling)
    return corpus.nearest(self.embed(texts, corpus.pooling, True, prompt), top_k)

  @_call()
  def summarise(self, texts, sentences: int = 3, pooling: str = '') -> list[list[str]]:
    """Extractive summaries by maximal marginal relevance: sentences in the order of the text."""
    split = [split_prose(text) for text in texts]
    flat = list(itertools.chain.from_iterable(split))
    ends = np.cumsum([0, *map(len, split)])
    index = self.index(flat, pooling)
    return [index.summarise(a, b, sentences) for a, b in itertools.pairwise(ends)]


def plain(value):
  """A result as lists, dicts, strings and numbers."""
  if dataclasses.is_dataclass(value):
    value = vars(value)
  elif hasattr(value, '_asdict'):
    value = value._asdict()
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  if isinstance(value, dict):
    return {name: plain(item) for name, item in value.items()}
  return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _sigmoid(logits: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-logits))


def _softmax(logits: np.ndarray) -> np.ndarray:
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)
