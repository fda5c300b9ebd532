"""What the methods of `Predictor` return: plain dataclasses."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Classification:
  """Classes of a text.

  Attributes:
    labels: the most probable class; of a multi-label model all above 1/2; empty for a regression.
    scores: label -> probability; for a regression, label -> predicted number.
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
  """The chosen ending, its index, and the probability of each ending."""

  number: int
  text: str
  probabilities: list[float]


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A document, its number among the candidates of the query, and its score."""

  number: int
  text: str
  score: float


@dataclasses.dataclass(frozen=True)
class Fill:
  """A token proposed for one mask, its probability, and the text with the token inserted."""

  token: str
  probability: float
  text: str


@dataclasses.dataclass(frozen=True)
class Score:
  """The pseudo-log-likelihood of a text; the log-likelihood under a causal model.

  Attributes:
    log_likelihood: sum over the tokens, in nats.
    perplexity: exp of minus the mean over the tokens.
    tokens: each token and its log-probability.
  """

  log_likelihood: float
  perplexity: float
  tokens: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Correction:
  """An improbable word, `text[start:end]`, its probability, and more probable replacements."""

  word: str
  start: int
  end: int
  probability: float
  replacements: list[Fill]
