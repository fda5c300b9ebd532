"""Kinds of labels: one class each, with everything that depends on what a label is.

A kind names its head, computes loss sums and weights, reads a label from a table's field, decodes
logits and writes predictions. Other modules call these methods and never ask for the kind, so a new
kind is one class here. A batch's `segment_ids` number the sequences packed in a row, 0 = padding;
BERT's segments A and B are its `token_type_ids`. `encoded` is a `tasks.task.Encoded`.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.model import crf
from bertjax.objectives.entities import entities
from bertjax.objectives.mlm import cross_entropy, soft_cross_entropy, token_weights

NEVER = -1e9  # the logit of what cannot be chosen
_MOST_NAMES = 30  # that a log line counts


@dataclasses.dataclass(frozen=True)
class Label:
  """Base of all kinds: one integer for each example.

  Attributes:
    names: of the classes, by number; () where the outputs are no named classes.
    metrics: names of the official metrics, the main one first.
    head: of `bertjax.Bert`; '' = none, the output is a vector.
    problem_type: Hugging Face's name of the kind, '' if it has none.
    dtype: of the column 'labels' in an encoded batch.
    rows: batch rows of an example.
    per_token: labels are [B, L] and truncated, padded and packed with the tokens.
    includes_padding: the loss depends on the padded length of a row, as in run_squad.py.
    numeric: labels are numbers on a scale, not classes.
    takes_class_weights: `make_loss` accepts a weight for each class.
    takes_crf: a conditional random field may choose the labels of a row together.
    fill: logit at positions beyond the length of a batch.
    unit: of the loss; '' = there is none.
  """

  names: tuple[str, ...] = ()
  metrics: tuple[str, ...] = ('accuracy',)

  head: ClassVar[str] = 'classification'
  problem_type: ClassVar[str] = ''
  dtype: ClassVar[str] = 'int32'
  rows: ClassVar[Any] = 1
  per_token: ClassVar[bool] = False
  includes_padding: ClassVar[Any] = False
  numeric: ClassVar[bool] = False
  takes_class_weights: ClassVar[bool] = False
  takes_crf: ClassVar[bool] = False
  fill: ClassVar[Any] = 0.0
  unit: ClassVar[str] = 'nats'

  @property
  def num_outputs(self) -> int:
    """C, logits of the head."""
    return max(len(self.names), 1)

  def sentence(self, max_length: int) -> dict:
    """What sentence-transformers reads in the model's files, see `interop.sentences`; {} = nothing.

    Args:
      max_length: tokens of a text in training.
    """
    return {}

  def shorter(self, logits: np.ndarray) -> dict[int, np.ndarray]:
    """{width: the outputs of that width} which are scored beside the complete ones."""
    return {}

  # The loss.

  def make_loss(self, model, class_weights: Sequence[float] = ()) -> tuple[Callable, Callable]:
    """Returns `loss` and `weights` of an `objectives.Objective` with the one term 'task'.

    'labels' are [B, ...], or [B, S, ...] where S sequences are packed in a row, and
    'example_weights' [B] or [B, S].

    Args:
      model: `Bert` with this kind's head.
      class_weights: [C], how much an example of each class (a token of each tag) counts.

    Raises:
      ValueError: if the model has a CRF or class weights are given, and this kind takes none.
    """
    kind = type(self).__name__.lower()
    if class_weights and (not self.takes_class_weights or model.config.crf):
      raise ValueError(f'class_weights are for classes and tags without a CRF, not for {kind!r}.')
    if model.config.crf and not self.takes_crf:
      raise ValueError(f'crf=True is for tags, the labels are of the kind {kind!r}; set crf=False.')

    def loss_fn(params, batch, rng):
      rngs = None if rng is None else {'dropout': rng}
      out = model.apply({'params': params}, batch, train=rng is not None, rngs=rngs)
      logits = out[f'{self.head}_logits']
      if model.config.crf:
        nats = crf.negative_log_likelihood(params[self.head], logits, batch['labels'])
        return {'task': (nats * batch['example_weights']).sum()}, {}
      return {'task': (self.losses(logits, batch) * self.weights(batch, class_weights)).sum()}, {}

    return loss_fn, lambda batch: {'task': self.weights(batch, class_weights).sum()}

  def make_coupled(self, model) -> tuple[Callable, Callable] | None:
    """`Objective.coupled` of a loss that couples the examples of a batch."""
    return None

  def check_batch_size(self, batch_size: int) -> None:
    """Raises ValueError if batches of so few examples have no loss."""

  def losses(self, logits: jax.Array, batch: dict) -> jax.Array:
    """The unweighted losses, in the shape of `weights`."""
    return cross_entropy(logits, jnp.maximum(batch['labels'], 0))

  def soft_losses(self, logits, targets, batch: dict, temperature: float) -> jax.Array:
    """Losses in the shape of `losses` whose targets are a teacher's logits, of the same shape."""
    return soft_cross_entropy(logits, targets, temperature)

  def weights(self, batch: dict, class_weights: Sequence[float] = ()) -> jax.Array:
    """How much each of `losses` counts."""
    weights = batch['example_weights']
    if class_weights:
      table = jnp.asarray(class_weights, jnp.float32)
      weights = weights * table[jnp.maximum(batch['labels'], 0)]
    return weights

  def parse_class_weights(self, text: str, column: np.ndarray) -> tuple[float, ...]:
    """The weight of each class: () for '', 'balanced' (N / (C * examples of the class)) or numbers.

    Args:
      text: the setting, as '1.0,2.5'.
      column: the training labels.
    """
    count = len(self.names)
    if not text:
      return ()
    if text == 'balanced' and self.takes_class_weights:
      found = np.bincount(column[column >= 0].astype(int), minlength=count)
      return tuple((found.sum() / (count * np.maximum(found, 1))).tolist())
    numbers = [float(part) for part in text.split(',') if part.replace('.', '', 1).isdecimal()]
    if len(numbers) != count or len(numbers) != len(text.split(',')):
      raise ValueError(
        f"class_weights must be 'balanced' or {count} numbers, of {', '.join(self.names)}; got "
        f'{text!r}.'
      )
    return tuple(numbers)

  # Columns of encoded examples.

  def shape(self, length: int) -> tuple[int, ...]:
    """Shape of a row's label, where rows have `length` tokens."""
    return ()

  def column(self, labels: Sequence) -> np.ndarray:
    """Labels [N] as the column of a batch; a missing one is -1, or NaN among numbers."""
    return np.array([-1 if label is None else label for label in labels], np.int32)

  def references(self, labels: Sequence) -> np.ndarray:
    """Labels as the metrics compare them with predictions."""
    return np.asarray(labels)

  def shift(self, labels: np.ndarray, places) -> None:
    """Adjusts labels [B, S, ...] in place to where `packing.pack` put their sequences."""

  # Predictions.

  def select(self, out: dict, batch: dict) -> jax.Array:
    """This kind's logits out of what `Bert` returns; what cannot be chosen is -1e9."""
    return out[f'{self.head}_logits']

  def decode(self, items, encoded, logits, threshold: float = 0.0):
    """Predictions, one for each example, from logits [N, ...]."""
    return np.asarray(logits).argmax(-1)

  def text(self, prediction) -> str:
    """A prediction as it is written to a file."""
    return self.names[prediction] if self.names else str(prediction)

  def collapsed(self, predictions: Sequence) -> str:
    """What is suspicious about predictions: all alike, or nothing predicted; '' if neither."""
    shown = [str(p) if self.numeric else self.text(p) for p in predictions]
    alike = len(shown) > 1 and len(set(shown)) == 1
    return f'all {len(shown):,} predictions are {shown[0]!r}' if alike else ''

  def most_frequent(self, labels: Sequence) -> int | None:
    """The class that a constant baseline predicts; None where there is no such baseline."""
    return None

  def compare(self, texts: Sequence[str], label, prediction) -> tuple[str, str]:
    """Label and prediction in words, equal where the metric counts the prediction as right."""
    return self.text(label), self.text(int(prediction))

  def describe(self, labels: Sequence) -> list[str]:
    """How often each class occurs, most frequent first."""
    counts = collections.Counter(name for label in labels for name in self.counted(label))
    common = [f'{name} {count:,}' for name, count in counts.most_common(_MOST_NAMES)]
    rest = len(counts) - _MOST_NAMES
    return [*common, *([f'and {rest} more'] if rest > 0 else [])]

  def counted(self, label) -> list[str]:
    """The classes of a label, for `describe`."""
    return [self.text(label)]

  def classes(self, items) -> set[int]:
    """The classes that occur in labelled examples; none where labels are not parsed by name."""
    return {number for item in items for number in self.unpack(item.label)}

  def unpack(self, label) -> tuple[int, ...]:
    """The classes of a label."""
    return ()

  def confusion(self, labels: Sequence, predictions) -> tuple | None:
    """(reference numbers, predicted numbers, their names) for a confusion matrix, or None."""
    return None

  def one_vs_rest(self, labels: Sequence, logits: np.ndarray) -> tuple | None:
    """(gold, score) [N, C] each, for precision-recall curves; None without them."""
    return None

  def confidence(self, predictions: Sequence, logits: np.ndarray) -> np.ndarray | None:
    """The probability of each prediction [N]; None where logits [N, ...] do not give it."""
    return np.exp(_log_softmax(np.asarray(logits).reshape(len(predictions), -1))).max(1)

  def readable(self, texts: Sequence[str]) -> Sequence[str]:
    """The texts of an example as they are shown."""
    return texts


@dataclasses.dataclass(frozen=True)
class FieldLabel(Label):
  """Base of the kinds that are read from a field of a table.

  Attributes:
    separator: between the names in a field that may have several.
    least: how many classes there must be.
  """

  separator: str = '|'
  least: ClassVar[int] = 0

  def split(self, value) -> list[str | None]:
    """The names in a table's field, None for a missing one; blanks around them do not count."""
    missing = value is None or value != value  # NaN
    return [None if missing else str(value).strip() or None]

  def parse(self, value) -> tuple[Any, str]:
    """(a table's field as a label, '') or (None, why it is none)."""
    names = self.split(value)
    if None in names:
      return None, 'the label is missing'
    unknown = next((name for name in names if name not in self.names), None)
    if unknown is not None:
      return None, f'unknown label {unknown!r}; the labels are {list(self.names)}'
    return self.pack(tuple(self.names.index(name) for name in names)), ''

  def pack(self, numbers: tuple[int, ...]):
    """The label that has these classes."""
    return numbers[0]

  def are_placeholders(self, labels: Sequence) -> bool:
    """Whether the labels of a test split only fill their column."""
    return False


@dataclasses.dataclass(frozen=True)
class Class(FieldLabel):
  """One of C classes. Label: its number; labels [B], logits [B, C]."""

  metrics: tuple[str, ...] = ('accuracy', 'macro_f1', 'matthews')
  problem_type = 'single_label_classification'
  least = 2
  takes_class_weights = True

  def unpack(self, label):
    return () if label is None else (label,)

  def most_frequent(self, labels):
    return int(np.bincount(labels).argmax())

  def confusion(self, labels, predictions):
    return labels, predictions, list(self.names)

  def one_vs_rest(self, labels, logits):
    return np.asarray(labels)[:, None] == np.arange(logits.shape[1]), _log_softmax(logits)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits - logits.max(1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Multilabel(FieldLabel):
  """Any number of C classes. Label: a tuple of numbers; labels [B, C] of 0 and 1, logits [B, C].

  The loss is the mean of C binary cross-entropies; a class whose logit is above the threshold is
  predicted.
  """

  metrics: tuple[str, ...] = ('micro_f1', 'macro_f1', 'exact')
  least = 1
  problem_type = 'multi_label_classification'
  dtype = 'float32'

  def losses(self, logits, batch):
    return binary_losses(logits, batch['labels']).mean(-1)

  def soft_losses(self, logits, targets, batch, temperature):
    return soft_binary_losses(logits, targets, temperature).mean(-1)

  def shape(self, length):
    return (self.num_outputs,)

  def column(self, labels):
    column = np.zeros((len(labels), len(self.names)), np.float32)
    for row, label in zip(column, labels, strict=True):
      row[slice(None) if label is None else list(label)] = math.nan if label is None else 1
    return column

  def references(self, labels):
    return self.column(labels) > 0

  def decode(self, items, encoded, logits, threshold=0.0):
    return np.asarray(logits) > threshold

  def split(self, value):
    if isinstance(value, str):
      value = [part for part in value.split(self.separator) if part.strip()]
    parts = value if isinstance(value, list) else [value]
    return [name for part in parts for name in FieldLabel.split(self, part)]

  def pack(self, numbers):
    return numbers

  def unpack(self, label):
    return label or ()

  def text(self, prediction):
    return self.separator.join(self.names[number] for number in np.flatnonzero(prediction))

  def collapsed(self, predictions):
    nothing = f'no label is predicted for any of {len(predictions):,} examples'
    return '' if np.any(predictions) else nothing

  def compare(self, texts, label, prediction):
    both = sorted(label), np.flatnonzero(prediction)
    return tuple(', '.join(self.names[number] for number in numbers) for numbers in both)

  def counted(self, label):
    return [self.names[number] for number in label]

  def one_vs_rest(self, labels, logits):
    return self.references(labels), logits

  def confidence(self, predictions, logits):
    yes = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    return np.where(predictions, yes, 1 - yes).prod(1)


def binary_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross-entropies of yes and no, whose logits are those of yes, of any shape."""
  import optax  # here: predictions need none

  return optax.losses.sigmoid_binary_cross_entropy(logits, labels)


def soft_binary_losses(logits: jax.Array, targets: jax.Array, temperature: float) -> jax.Array:
  """`soft_cross_entropy` of yes and no, whose logits are those of yes, of any shape."""
  ours, theirs = (jnp.stack([x, jnp.zeros_like(x)], -1) for x in (logits, targets))
  return soft_cross_entropy(ours, theirs, temperature)


@dataclasses.dataclass(frozen=True)
class Regression(FieldLabel):
  """A number, learnt by its squared error. Label: a float; labels [B], logits [B, 1]."""

  metrics: tuple[str, ...] = ('spearman', 'pearson')
  problem_type = 'regression'
  unit = 'squared error'
  dtype = 'float32'
  numeric = True

  def losses(self, logits, batch):
    return jnp.square(logits[..., 0] - batch['labels'])

  def soft_losses(self, logits, targets, batch, temperature):
    return jnp.square(logits[..., 0] - targets[..., 0])

  def column(self, labels):
    return np.array([math.nan if label is None else label for label in labels], np.float32)

  def decode(self, items, encoded, logits, threshold=0.0):
    return np.asarray(logits).reshape(len(items))

  def parse(self, value):
    try:
      number = float(value)
    except (TypeError, ValueError):
      number = math.nan
    if not math.isfinite(number):
      return None, f'the label must be a finite number, got {value!r}'
    return number, ''

  def are_placeholders(self, labels):
    return len(labels) > 1 and len(set(labels)) == 1 and labels[0] is not None

  def text(self, prediction):
    return f'{prediction:.9g}'  # float32 to the last bit

  def compare(self, texts, label, prediction):
    return f'{label:.2f}', f'{prediction:.2f}'

  def describe(self, labels):
    if not labels:
      return []
    return [f'from {min(labels):g} to {max(labels):g}, mean {np.mean(labels):g}']

  def confidence(self, predictions, logits):
    return None


@dataclasses.dataclass(frozen=True)
class Tags(Label):
  """A BIO tag for each word. Label: the tags; labels [B, L] at first tokens of words, -1 elsewhere.

  A CRF's loss, a sum over sentences, is divided by their tokens, so it too is in nats per token.
  `join` makes a text of words.
  """

  metrics: tuple[str, ...] = ('f1',)
  join: Callable[[Sequence[str]], str] = ' '.join
  head = 'tagging'
  unit = 'nats per token'
  per_token = True
  takes_class_weights = takes_crf = True

  def weights(self, batch, class_weights=()):
    labels = batch['labels']
    weights = token_weights(batch) * (labels >= 0)
    return super().weights({'labels': labels, 'example_weights': weights}, class_weights)

  def shape(self, length):
    return (length,)

  def decode(self, items, encoded, logits, threshold=0.0):
    """A tag for each word, from logits [N, L, C] or the tags [N, L] that a CRF has chosen."""
    logits = np.asarray(logits)
    chosen = logits if logits.ndim == 2 else logits.argmax(-1)
    tags = [['O'] * len(item.texts) for item in items]
    owners = encoded.columns['example_ids']
    for row, place in zip(*np.nonzero(encoded.alignment >= 0), strict=True):
      tags[owners[row]][encoded.alignment[row, place]] = self.names[chosen[row, place]]
    return tags

  def collapsed(self, predictions):
    nothing = f'no entity is predicted in {len(predictions):,} sentences'
    return '' if any(entities(tags) for tags in predictions) else nothing

  def compare(self, texts, label, prediction):
    gold, said = set(entities(label)), set(entities(prediction))
    return tuple(
      ', '.join(f'{self.join(texts[first:last])} [{name}]'
                for name, first, last in sorted(spans, key=lambda span: span[1:])) or '(none)'
      for spans in (gold - said, said - gold)
    )  # fmt: skip

  def counted(self, label):
    return [f'{name} spans' for name, _, _ in entities(label)]

  def confusion(self, labels, predictions):
    names = ['O', *dict.fromkeys(name[2:] for name in self.names if name != 'O')]
    number = {name: i for i, name in enumerate(names)}
    both = ([number[tag[2:] or 'O'] for tags in side for tag in tags]
            for side in (labels, predictions))  # fmt: skip
    return *both, names

  def confidence(self, predictions, logits):
    return None

  def readable(self, texts):
    return [self.join(texts)]


@dataclasses.dataclass(frozen=True)
class Span(Label):
  """An answer in a context. Label: answers (text, first character), () = no answer.

  Labels [B, 2] are the first and last token, both 0 ([CLS]) for no answer and -1 where the answer
  is not known; logits [B, L, 2]. The loss is the mean of start and end.

  Attributes:
    includes_padding: the softmax runs over padding too, as in run_squad.py.
    right: (answer, reference answers) -> whether the metric counts it as right.
  """

  metrics: tuple[str, ...] = ('f1',)
  includes_padding: bool = False  # type: ignore[misc]
  right: Callable[[str, Sequence[str]], float] = lambda text, answers: text in (answers or [''])
  head = 'span'
  num_outputs = 2

  def losses(self, logits, batch):
    labels = batch['labels']
    pairs = jnp.maximum(labels, 0).reshape(len(labels), -1, 2).swapaxes(1, 2)  # [B, 2, S]
    return cross_entropy(self._allowed(logits, batch), pairs).mean(1).reshape(labels.shape[:-1])

  def soft_losses(self, logits, targets, batch, temperature):
    ours, theirs = self._allowed(logits, batch), self._allowed(targets, batch)
    nats = soft_cross_entropy(ours, theirs, temperature)  # [B, 2, S]
    return nats.mean(1).reshape(batch['labels'].shape[:-1])

  def _allowed(self, logits, batch):
    """The logits [B, L, 2] as [B, 2, S, L], -1e9 outside of each packed sequence."""
    slots = batch['labels'].reshape(len(logits), -1, 2).shape[1]
    own = batch['segment_ids'][:, None] == jnp.arange(1, slots + 1)[:, None]  # [B, S, L]
    allowed = own[:, None] | self.includes_padding
    return jnp.where(allowed, logits.swapaxes(1, 2)[:, :, None], NEVER)

  def weights(self, batch, class_weights=()):
    return batch['example_weights'] * (batch['labels'][..., 0] >= 0)

  @property
  def fill(self):
    return 0.0 if self.includes_padding else NEVER

  def shape(self, length):
    return (2,)

  def shift(self, labels, places):
    labels[places.row, places.slot] += places.start[:, None].astype(labels.dtype)

  def select(self, out, batch):
    logits = super().select(out, batch)
    if self.includes_padding:
      return logits
    return jnp.where(batch['segment_ids'][..., None] > 0, logits, NEVER)

  def text(self, prediction):
    return prediction.text

  def collapsed(self, predictions):
    nothing = f'none of {len(predictions):,} questions is answered'
    return super().collapsed(predictions) if any(p.text for p in predictions) else nothing

  def compare(self, texts, label, prediction):
    answers = [text for text, _ in label]
    gold = answers[0] if answers else '(no answer)'
    right = self.right(prediction.text, answers)
    return gold, gold if right else prediction.text or '(no answer)'

  def counted(self, label):
    return ['answer' if label else 'no answer']

  def confidence(self, predictions, logits):
    return np.array([
      next((best['probability'] for best in p.nbest if best['text'] == p.text), 0.0)
      for p in predictions
    ])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choice(Label):
  """One of several endings. Label: its number; each ending is a row, those of an example follow one
  another and repeat its label: labels [B], logits [B]."""

  rows: int = 2  # type: ignore[misc]
  head = 'choice'

  def losses(self, logits, batch):
    labels = batch['labels'].reshape(-1, self.rows)[:, 0]
    return cross_entropy(logits.reshape(-1, self.rows), labels)

  def soft_losses(self, logits, targets, batch, temperature):
    ours, theirs = (x.reshape(-1, self.rows) for x in (logits, targets))
    return soft_cross_entropy(ours, theirs, temperature)

  def weights(self, batch, class_weights=()):
    return batch['example_weights'].reshape(-1, self.rows)[:, 0]

  def decode(self, items, encoded, logits, threshold=0.0):
    return np.asarray(logits).reshape(len(items), -1).argmax(1)

  def confusion(self, labels, predictions):
    return labels, predictions, [str(number) for number in range(self.rows)]
