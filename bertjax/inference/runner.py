"""`Runner`: bucketing, packing and compiled forward passes for all predictions.

Rows of any number and length become batches of one size and a few lengths, so that the number of
compiled programs does not grow with the texts: one for each kind of output and length, and a second
one where rows are packed. More rows than one batch holds are packed, several into one.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.data import instances, loader, packing
from bertjax.data.tokenizer import Tokenizer
from bertjax.model import crf
from bertjax.model.config import LABELLED_HEADS, describe_heads
from bertjax.model.heads import Bert
from bertjax.model.similarity import pool

LENGTHS = (16, 32, 64, 128, 256, 512)  # what rows are padded to, and the model's limit
POOLINGS = ('mean', 'cls', 'last', 'last_four')
_PACKED = 128  # tokens of a packed row at least, where the model has as many positions
_CPU_TOKENS = 1024  # of a packed batch on a CPU, where larger arrays leave the cache


class TextError(ValueError):
  """A text that cannot be answered; the others of its list can."""


class Runner:
  """A compiled model and its tokenizer.

  Args:
    model: the module; its `config` is used, and the heads of `params`.
    params: its parameters.
    tokenizer: its tokenizer.
    batch_size: B, rows of a batch. The last one is filled up to B rows or, if it has no more than
      these, to a quarter of B or one row. Where rows are packed, B rows of 128 tokens, or fewer and
      longer ones, on a CPU at most 1,024 tokens.

  Attributes:
    lengths: lengths that rows are padded to, the last one is the model's limit.
    sizes: rows that batches are filled up to.
    num_labels: number of outputs of the 'classification' and 'tagging' heads.
  """

  def __init__(self, model: Bert, params: dict, tokenizer: Tokenizer, batch_size: int):
    if batch_size < 1:
      raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
    self.config, self.params, self.batch_size = model.config, jax.device_put(params), batch_size
    self.tokenizer = tokenizer
    self.num_labels = {
      head: params[head]['kernel'].shape[-1] for head in LABELLED_HEADS if head in params
    }
    limit = self.config.max_positions
    self.lengths = (*(n for n in LENGTHS if n < limit), limit)
    self.sizes = tuple(sorted({1, -(-batch_size // 4), batch_size}))
    self._apply = jax.jit(self.read, static_argnames=('output', 'top_k'))

  def need(self, head: str, causal: bool | None = None, outputs: int = 0) -> None:
    """Raises ValueError if the model lacks a head ('' = none), the head has another number of
    outputs (0 = any), or the model has the other direction."""
    if head and head not in self.params:
      raise ValueError(
        f'this needs a model with a {head} head; this one has {describe_heads(self.params)}.'
      )
    if outputs not in (0, self.num_labels.get(head)):
      raise ValueError(
        f'this needs a {head} head with {outputs} output; the head of this model has '
        f'{self.num_labels[head]}.'
      )
    if causal is False and self.config.causal:
      raise ValueError('masks are filled by a bidirectional model; this one is causal.')
    if causal and not self.config.causal:
      raise ValueError('this model is bidirectional; only a causal model continues texts.')

  def check_length(self, tokens: int, limit: int = 0) -> None:
    """Raises TextError for more tokens than the model, or `limit`, takes."""
    limit = limit or self.config.max_positions
    if tokens > limit:
      raise TextError(
        f'the text has {tokens} tokens with its special ones, the model takes at most {limit}.'
      )

  def size(self, item: Sequence[list[int]]) -> int:
    """Tokens of a row of (A,) or (A, B), lists of ids, with its special tokens."""
    return sum(map(len, item)) + self.tokenizer.template.count(len(item))

  def make_batch(self, items: Sequence[Sequence[list[int]]]) -> dict[str, np.ndarray]:
    """Rows of the tokenizer's template of items (A,) or (A, B), lists of ids.

    Raises:
      TextError: if one has more tokens than the model takes.
    """
    length = max(map(self.size, items), default=3)
    self.check_length(length)  # before memory is allocated for it
    return loader.model_inputs(instances.lay_out(items, self.tokenizer, length))

  def split(self, item: Sequence[list[int]], limit: int = 0) -> list[tuple]:
    """Splits (A,) or (A, B), lists of ids, into the fewest rows that fit and have a part of the
    last text each, all of about the same length."""
    *first, ids = item
    limit = limit or self.config.max_positions
    room = limit - self.size((*first, []))
    self.check_length(limit - room + 1, limit)
    count = max(1, -(-len(ids) // room))
    bounds = np.linspace(0, len(ids), count + 1).round().astype(int)
    return [(*first, ids[a:b]) for a, b in itertools.pairwise(bounds)]

  def mean_outputs(
    self, output: str, texts: Sequence[str], pairs: Sequence[str] | None = None, *,
    limit: int = 0, window: bool = False, best_window: bool = False,
    activation: Callable = lambda logits: logits,
  ) -> np.ndarray:  # fmt: skip
    """One output [C] for each text or pair, float32 [N, C].

    Args:
      output: see `read`.
      texts: N texts.
      pairs: N second texts, or None.
      limit: maximum tokens of a row, with its special tokens; 0 = the model's positions.
      window: splits a single text beyond the limit into windows; its output is the mean over them,
        weighted by their tokens.
      best_window: likewise for pairs, by their second text; the output is the largest one.
      activation: applied to the output of each window.

    Raises:
      TextError: if a text or pair has more tokens than the limit.
      ValueError: if something is not a text, or texts and pairs differ in number.
    """
    limit = min(limit or self.config.max_positions, self.config.max_positions)
    columns = [list(texts)] if pairs is None else [list(texts), list(pairs)]
    if not all(isinstance(text, str) for column in columns for text in column):
      raise ValueError('texts are strings; the second of one text is one text, not a list.')
    if len({len(column) for column in columns}) > 1:
      raise ValueError(f'texts and pairs must be as many, got {[len(c) for c in columns]}.')
    items = list(zip(*map(self.tokenizer.encode, columns), strict=True))
    parts = [[item] for item in items]
    if best_window or (pairs is None and window):
      parts = [self.split(item, limit) for item in items]
    rows = list(itertools.chain.from_iterable(parts))
    sizes = np.array([self.size(row) for row in rows], np.int32)
    self.check_length(sizes.max(initial=0), limit)
    values = activation(np.array(self.run(self.make_batch(rows), output), np.float32))
    if len(rows) == len(items):
      return values
    firsts = np.cumsum([0, *map(len, parts)])[:-1]
    if best_window:
      return np.maximum.reduceat(values, firsts)
    weights = sizes.astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    return np.add.reduceat(values * weights, firsts) / np.add.reduceat(weights, firsts)

  def run(self, batch: dict, output: str, top_k: int = 1) -> list:
    """Runs rows of any number through the model.

    Args:
      batch: `rows`; for 'mlm' also 'masked_lm_positions' and 'masked_lm_ids' [N, P], for 'tagging'
        'labels' [N, L], >= 0 where a word begins.
      output: see `read`.
      top_k: see `read`.

    Returns:
      The output of each row, in order, as NumPy arrays; states of tokens [l, ...] without padding.
    """
    sizes = batch['segment_ids'].sum(1)
    self.check_length(sizes.max(initial=0))
    found, results = [], [None] * len(sizes)
    for padded, places in self._batches(batch, sizes):
      found.append((places, self._apply(self.params, padded, output=output, top_k=top_k)))
    per_token = output in ('tagging', 'span', 'next_token')
    for places, values in found:
      values = jax.device_get(values)
      for item, row, slot, start in zip(*places, strict=True):
        if per_token:
          where = row, slice(start, start + sizes[item])
        else:
          where = row if slot is None else (row, slot)
        results[item] = jax.tree.map(lambda a, where=where: a[where], values)
    return results

  def _batches(self, batch, sizes):
    """Yields (batch of the model, which rows it holds and where)."""
    sequential = self.config.bilstm or self.config.crf  # they read a row as one sequence
    if len(sizes) > self.batch_size and not sequential:
      yield from self._packed(batch, sizes)
      return
    bucket = np.searchsorted(self.lengths, sizes)
    for number in np.unique(bucket):
      rows = np.flatnonzero(bucket == number)
      for start in range(0, len(rows), self.batch_size):
        part = rows[start : start + self.batch_size]
        size = next(size for size in self.sizes if size >= len(part))
        places = packing.Places(part, np.arange(len(part)), [None] * len(part), [0] * len(part))
        yield self._pad(batch, part, size, self.lengths[number]), places

  def _packed(self, batch, sizes):
    """Rows of few lengths, the longest first; each length takes what no shorter one can hold and
    fills up with others. Batches have as many tokens as `batch_size` of the shortest, on a CPU at
    most `_CPU_TOKENS`; or a quarter.
    """
    lengths = [n for n in reversed(self.lengths) if n >= _PACKED] or self.lengths[-1:]
    left = np.arange(len(sizes))
    for length, shorter in zip(lengths, (*lengths[1:], 0), strict=True):
      rows = [left[row] for row in packing.plan(sizes[left], length, length // packing.SHORTEST)]
      rows = [row for row in rows if sizes[row].max() > shorter]
      left = np.setdiff1d(left, np.concatenate([left[:0], *rows]))
      size = max(1, self.batch_size * lengths[-1] // length)
      if jax.default_backend() == 'cpu':
        size = min(size, max(1, _CPU_TOKENS // length))
      while rows:
        count = size if len(rows) >= size else -(-size // 4)
        yield self._pack(batch, rows[:count], count, length)
        rows = rows[count:]

  def _pack(self, batch, rows, count: int, length: int):
    packed, places = packing.pack(
      batch, rows, count=count, length=length, max_sequences=length // packing.SHORTEST,
      per_token=('labels',) if 'labels' in batch else (),
    )  # fmt: skip
    if 'masked_lm_positions' in packed:
      packed['masked_lm_positions'][places.row, places.slot] += places.start[:, None]
      packed |= {n: packed[n].reshape(count, -1) for n in batch if n.startswith('masked_lm')}
    return packed, places

  def _pad(self, batch, rows, size: int, length: int) -> dict:
    """The rows as a batch of one size; those that fill it up are copies of the last one."""
    rows = np.append(rows, np.repeat(rows[-1:], size - len(rows)))
    padded = {}
    for name, array in batch.items():
      padded[name] = array[rows]
      if not name.startswith('masked_lm'):  # [N, L]
        room = ((0, 0), (0, max(0, length - array.shape[1])))
        padded[name] = np.pad(array[rows, :length], room)
    return padded

  def read(self, params: dict, batch: dict, *, output: str, top_k: int = 1):
    """What is read off the model, a pure function of arrays.

    Args:
      params: of the model.
      batch: a batch.
      output: a head ('classification', 'span', 'choice', 'nsp') for its logits; 'tagging' for
        (logits [B, L, C], numbers of the tags [B, L]); 'mlm' for (log-probability of
        'masked_lm_ids' [B, P], the best log-probabilities [B, P, k] and their ids); 'next_token'
        for the log-probability [B, L] that a causal model gives to the token after each; or one of
        `POOLINGS` for vectors [B, D], [B, 4D] for 'last_four'. Of packed rows [B, S] in the place
        of [B].
      top_k: k.
    """
    if output in POOLINGS:
      model = Bert(self.config, heads=(), pooler=False)
      capture = ('hidden',) if output == 'last_four' else ()
      return pool(model.apply({'params': params}, batch, capture=capture), batch, output)
    if output == 'next_token':  # few rows at a time: their logits are [b, L, V]
      one = functools.partial(self._next_token, params)
      return jax.lax.map(one, batch, batch_size=max(1, 1024 // batch['input_ids'].shape[1]))
    logits = self.logits(params, batch, output)
    if output == 'mlm':
      logs = jax.nn.log_softmax(logits)
      target = jnp.take_along_axis(logs, batch['masked_lm_ids'][..., None], -1)[..., 0]
      found = target, *jax.lax.top_k(logs[..., : self.tokenizer.vocab_size], top_k)
      if 'cls_positions' in batch:
        shape = batch['cls_positions'].shape
        found = [a.reshape(*shape, -1, *a.shape[2:]) for a in found]
      return tuple(found)
    if output == 'tagging' and self.config.crf:
      starts = (batch['labels'] >= 0) & (batch['segment_ids'] > 0)
      return logits, crf.viterbi(params['tagging'], logits, starts)
    return (logits, logits.argmax(-1)) if output == 'tagging' else logits

  def _next_token(self, params, row: dict) -> jax.Array:
    """Of one row: the log-probability [L] of the token after each."""
    [logits] = self.logits(params, {name: array[None] for name, array in row.items()}, 'mlm')
    targets = jnp.roll(row['input_ids'], -1)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], -1)[:, 0]

  def logits(self, params: dict, batch: dict, head: str) -> jax.Array:
    """The logits of one head, as `Bert` has them."""
    model = Bert(
      self.config, heads=(head,), pooler=head in self.config.pooled_heads,
      num_labels=self.num_labels.get(head, 2),
    )  # fmt: skip
    return model.apply({'params': params}, batch)[f'{head}_logits']
