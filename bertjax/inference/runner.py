"""`Forward`: one way through the model for all predictions.

Rows of any length and number become batches of one size and a few lengths, so that only a handful
of programs is compiled, however many texts come: one for each kind of output and length, where more
than one batch comes two. More rows than a batch has are packed, several into one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.data import loader, packing
from bertjax.model import crf
from bertjax.model.config import LABELLED_HEADS, POOLED_HEADS, EncoderConfig, describe_heads
from bertjax.model.heads import Bert, cls_states

LENGTHS = (32, 64, 128, 256, 512)  # what rows are padded to, and the model's limit
POOLINGS = ('mean', 'cls', 'last_four')
_PACKED = 128  # tokens of a packed row at least, where the model has as many positions


class TextError(ValueError):
  """A text that cannot be answered; the others of its list can."""


class Forward:
  """The compiled model.

  Args:
    config: of the encoder.
    params: its parameters, with the heads that are asked for later.
    batch_size: B, rows of a batch, which is filled up; of 128 tokens where rows are packed, fewer
      rows if they are longer. A single row goes alone.
    pieces: size of the vocabulary, where the word table has more rows; 0 = all of them.
  """

  def __init__(self, config: EncoderConfig, params: dict, batch_size: int, pieces: int = 0):
    if batch_size < 1:
      raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
    self.config, self.params, self.batch_size = config, jax.device_put(params), batch_size
    self.pieces = pieces or config.vocab_size
    self.num_labels = {
      head: params[head]['kernel'].shape[-1] for head in LABELLED_HEADS if head in params
    }
    self.lengths = (*(n for n in LENGTHS if n < config.max_positions), config.max_positions)
    self._apply = jax.jit(self.read, static_argnames=('output', 'top_k'))

  def need(self, head: str) -> None:
    """Raises ValueError, which names the heads there are, if the model lacks a head."""
    if head not in self.params:
      raise ValueError(
        f'this needs a model with a {head} head; this one has {describe_heads(self.params)}.'
      )

  def check_length(self, tokens: int, limit: int = 0) -> None:
    """Raises TextError for more tokens than the model, or `limit`, takes."""
    limit = limit or self.config.max_positions
    if tokens > limit:
      raise TextError(
        f'the text has {tokens} tokens with its special ones, the model takes at most {limit}.'
      )

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
    alone = self.config.bilstm or self.config.crf  # they read a row as one sequence
    if len(sizes) > self.batch_size and not alone:
      yield from self._packed(batch, sizes)
      return
    bucket = np.searchsorted(self.lengths, sizes)
    size = 1 if len(sizes) == 1 else self.batch_size
    for number in np.unique(bucket):
      rows = np.flatnonzero(bucket == number)
      for start in range(0, len(rows), size):
        part = rows[start : start + size]
        places = packing.Places(part, np.arange(len(part)), [None] * len(part), [0] * len(part))
        yield self._pad(batch, part, size, self.lengths[number]), places

  def _packed(self, batch, sizes):
    """Rows of few lengths, the longest first; each length takes what no shorter one can hold and
    fills up with others. Batches have as many tokens as `batch_size` of the shortest, or a quarter.
    """
    lengths = [n for n in reversed(self.lengths) if n >= _PACKED] or self.lengths[-1:]
    left = np.arange(len(sizes))
    for length, shorter in zip(lengths, (*lengths[1:], 0), strict=True):
      rows = [left[row] for row in packing.plan(sizes[left], length, length // packing.SHORTEST)]
      rows = [row for row in rows if sizes[row].max() > shorter]
      left = np.setdiff1d(left, np.concatenate([left[:0], *rows]))
      size = max(1, self.batch_size * lengths[-1] // length)
      while rows:
        count = size if len(rows) >= size else -(-size // 4)
        yield self._pack(batch, rows[:count], count, length)
        rows = rows[count:]

  def _pack(self, batch, rows, count: int, length: int):
    packed, places = packing.pack(
      batch, rows, count=count, length=length, slots=length // packing.SHORTEST,
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
      found = target, *jax.lax.top_k(logs[..., : self.pieces], top_k)
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
      self.config, heads=(head,), pooler=head in POOLED_HEADS,
      num_labels=self.num_labels.get(head, 2),
    )  # fmt: skip
    return model.apply({'params': params}, batch)[f'{head}_logits']


def rows(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Columns of rows, as of `tasks.task.Encoded`, to what the model reads, [N, L] each."""
  batch = loader.expand({name: columns[name] for name in ('input_ids', 'ends')})
  return {name: batch[name] for name in ('input_ids', 'token_type_ids', 'segment_ids')}


def pool(out: dict, batch: dict, pooling: str) -> jax.Array:
  """One float32 vector for each sequence: the [CLS] state, or the mean over its tokens.

  'last_four' puts the last four layers' states side by side (Devlin et al. 2018, table 7).
  """
  if pooling == 'cls':
    return cls_states(out['hidden'], batch).astype(jnp.float32)
  states = out['hidden']
  if pooling == 'last_four':
    if len(out['all_hidden']) < 5:
      raise ValueError(
        f"'last_four' needs four layers, the model has {len(out['all_hidden']) - 1}."
      )
    states = jnp.concatenate(list(out['all_hidden'][-4:]), -1)
  slots = batch['cls_positions'].shape[1] if 'cls_positions' in batch else 1
  own = batch['segment_ids'][:, None] == jnp.arange(1, slots + 1)[:, None]  # [B, S, L]
  sums = jnp.einsum(
    'bsl,bld->bsd', own.astype(jnp.float32), states.astype(jnp.float32), precision='highest'
  )
  means = sums / jnp.maximum(own.sum(-1), 1)[..., None]
  return means if 'cls_positions' in batch else means[:, 0]
