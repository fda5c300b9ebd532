"""Explanations of one text: attributions, layer-by-layer predictions, attention, roll-out.

Attributions are integrated gradients (Sundararajan, Taly and Yan 2017): gradients averaged on the
way from a text of [MASK] to the text, times the way. They add up to what the words change in the
log-odds of an output. Attention weights show where a layer looked, not what the output rests on.
"""

import base64
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bertjax import pages
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference import mlm
from bertjax.inference.predictor import Predictor
from bertjax.model.heads import Bert, MlmHead

LONGEST = 128  # tokens that a page can show
STEPS = 32  # points of the integral: Gauss-Legendre
_CLASSES = 3  # most probable classes attributed
_TARGETS = 8  # masks, tagged words and labels attributed
_MAX_ANSWER = 30  # tokens of the longest answer
_BEST = 3  # predictions reported for each token and layer


@dataclasses.dataclass(frozen=True)
class Attribution:
  """Integrated gradients of one output.

  Attributes:
    name: of the output.
    probability: of the output; None for a regression.
    logit: log-odds of the probability, log p - log(1 - p); of an answer the sum for its start and
      its end; of a regression the prediction.
    baseline: the same where [MASK] is in the place of every token but [CLS] and [SEP].
    values: each token's share [L] of logit - baseline, which is their sum up to the error of the
      integral; 0 for [CLS] and [SEP].
    predicted: False for a class shown beside the predicted one.
  """

  name: str
  probability: float | None
  logit: float
  baseline: float
  values: np.ndarray
  predicted: bool = True


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What a model makes of a text.

  Attributes:
    tokens: its L tokens, with the special ones.
    types: token type ids [L], 1 for the second text.
    words: (text, first token, end) of each word by the tokenizer's word rule.
    attention: probabilities [N, H, L, L], from the token of a row to that of a column.
    rollout: [L, L], how much of each input is in each token's last state, if attention averaged
      over heads is half of a layer and the residual path the other (Abnar and Zuidema 2020).
    layers: for the embeddings and each layer, for each token, the best [token, probability] if the
      masked-LM head read the layer; empty without such a head.
    attributions: of the predicted outputs of every head that the text has the inputs for.
  """

  tokens: list[str]
  types: list[int]
  words: list[tuple[str, int, int]]
  attention: np.ndarray
  rollout: np.ndarray
  layers: list[list[list[list]]]
  attributions: list[Attribution]


def explain(predictor: Predictor, text: str, pair: str = '') -> Explanation:
  """Explains what a model makes of a text or pair of up to `LONGEST` tokens.

  Args:
    predictor: the model.
    text: the text, the question of an answer, or the beginning of a choice.
    pair: the second text; for a model with a choice head its endings, one a line: the chosen one
      is explained.

  Raises:
    ValueError: if the text is empty or has more tokens.
  """
  tokenizer, runner = predictor.tokenizer, predictor.runner
  if not text.strip():
    raise ValueError('there is no text to explain, it is empty.')
  lines = pair.split('\n') if 'choice' in runner.params else []
  endings = [line for line in lines if line.strip()]
  texts = [[text, ending] for ending in endings] or [[text, pair] if pair else [text]]
  columns = [list(column) for column in zip(*texts, strict=True)]
  count = tokenizer(*columns)['input_ids'].shape[1]
  longest = min(LONGEST, predictor.config.max_positions)
  if count > longest:
    raise ValueError(f'an explanation shows at most {longest} tokens, the text has {count}.')
  padded = next(length for length in runner.lengths if length >= count)  # few programs
  batch = tokenizer(*columns, length=padded)
  scores = np.array(runner.run(batch, 'choice') if len(endings) > 1 else [0.0])
  chosen = int(scores.argmax())
  batch = {name: array[chosen : chosen + 1] for name, array in batch.items()}
  count = int(batch['segment_ids'].sum())
  words = _words(predictor, texts[chosen])
  targets = _targets(predictor, batch, words, texts[chosen])
  if len(scores) > 1:
    others = float(jax.nn.logsumexp(np.delete(scores, chosen)))
    targets.append(_Target('choice', f'ending: {endings[chosen]}', (0, 0), others))
  out = jax.device_get(_capture(runner.params, batch, config=runner.config))
  attention = out['attention'][:, 0, :, :count, :count]
  return Explanation(
    [tokenizer.vocab[i] for i in batch['input_ids'][0, :count]],
    _segments(tokenizer, texts[chosen], count), words, attention,
    rollout(attention), [layer[:count] for layer in _lens(predictor, out['all_hidden'][:, 0])],
    [_attribute(predictor, batch, target) for target in targets],
  )  # fmt: skip


def _words(predictor: Predictor, texts) -> list[tuple[str, int, int]]:
  """(text, first token, end) of the words and special tokens of a row."""
  tokenizer = predictor.tokenizer
  words, (_, last, between, _) = [(tokenizer.vocab[tokenizer.cls_id], 0, 1)], tokenizer.template
  for number, text in enumerate(texts, 1):
    start = words[-1][2]
    [ids], [offsets] = tokenizer.encode_offsets([text], trim=True)
    for first, end in mlm.words_of(tokenizer, ids) if ids else ():
      words.append((text[offsets[first][0] : offsets[end - 1][1]], start + first, start + end))
    for token in (last,) if number == len(texts) else between:
      at = max(words[-1][2], start + len(ids))
      words.append((tokenizer.vocab[token], at, at + 1))
  return words


@functools.partial(jax.jit, static_argnames='config')
def _capture(params, batch, *, config):
  bert = Bert(config, heads=(), pooler=False)
  return bert.apply({'params': params}, batch, capture=('hidden', 'attention'))


def rollout(attention: np.ndarray) -> np.ndarray:
  """Attention [N, H, L, L] multiplied through all layers: [L, L], rows sum to 1."""
  layers = 0.5 * attention.mean(1) + 0.5 * np.eye(attention.shape[-1])
  return functools.reduce(lambda below, layer: layer @ below, layers)


def _lens(predictor: Predictor, hidden: np.ndarray) -> list:
  """The best tokens if the masked-LM head read the states [N+1, L, D] of each layer."""
  params = predictor.runner.params
  if 'mlm' not in params:
    return []
  table = params['encoder']['embeddings']['word']['embedding']
  logits = MlmHead(predictor.config).apply({'params': params['mlm']}, hidden, table)
  logits = logits[..., : predictor.runner.tokenizer.vocab_size]
  values, ids = jax.device_get(jax.lax.top_k(jax.nn.softmax(logits), _BEST))
  vocab = predictor.tokenizer.vocab
  return [
    [
      [[vocab[i], round(float(p), 4)] for i, p in zip(*token, strict=True)]
      for token in zip(*layer, strict=True)
    ]
    for layer in zip(ids, values, strict=True)
  ]


class _Target(NamedTuple):
  """An output to attribute: its head, name, place among the logits, and competitors elsewhere."""

  head: str
  name: str
  index: tuple[int, int]  # (0, class), (token, class), or (first, last) token of an answer
  others: float = 0.0  # of a choice: log-sum-exp of the other endings' logits
  predicted: bool = True


def _segments(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> list[int]:
  """0 for each of a row's `count` tokens, and 1 from the second text on."""
  first, *second = tokenizer.encode(texts)
  start = 1 + len(first) + len(tokenizer.template.between) if second else count
  return [int(place >= start) for place in range(count)]


def _targets(predictor: Predictor, batch: dict, words, texts: Sequence[str]) -> list[_Target]:
  """The predicted outputs of every head but 'choice' that the row [1, L] has the inputs for."""
  runner, tokenizer, found = predictor.runner, predictor.tokenizer, []
  heads, ids = runner.params, batch['input_ids'][0]
  paired = len(texts) > 1 and bool(tokenizer.encode(texts[1])[0])
  if 'classification' in heads:
    [logits] = runner.run(batch, 'classification')
    many = predictor.problem_type == 'regression' or predictor.multi_label
    shown = _TARGETS if many else {1: 0, 2: 1}.get(len(logits), _CLASSES)  # two are opposites
    best = np.argsort(-logits, kind='stable')[:shown]
    found += [
      _Target(
        'classification', predictor.labels[i], (0, int(i)),
        predicted=bool(logits[i] > 0) if predictor.multi_label else i == best[0],
      ) for i in best
    ]  # fmt: skip
  if 'tagging' in heads:
    found += _tagged(predictor, batch, words)
  if 'span' in heads and paired:
    [logits] = runner.run(batch, 'span')
    found.append(_answer(logits, tokenizer, texts[-1]))
  if 'mlm' in heads and not predictor.config.causal:
    places = np.flatnonzero(ids == tokenizer.mask_id)[:_TARGETS]
    if len(places):
      padded = np.pad(places, (0, _TARGETS - len(places)))[None].astype(np.int32)
      asked = batch | {'masked_lm_positions': padded, 'masked_lm_ids': padded * 0}
      [(_, _, best)] = runner.run(asked, 'mlm')
      for place, token in zip(places.tolist(), best[:, 0].tolist(), strict=False):
        found.append(_Target('mlm', f'{tokenizer.vocab[token]} at token {place}', (place, token)))
  if 'nsp' in heads and paired:
    best = int(runner.run(batch, 'nsp')[0].argmax())
    name = ('the second text follows', 'the second text does not follow')[best]
    found.append(_Target('nsp', name, (0, best)))
  return found


def _tagged(predictor: Predictor, batch: dict, words) -> list[_Target]:
  """The first words with a tag; without any, the word whose 'O' is the least probable."""
  ids, special = batch['input_ids'][0], (predictor.tokenizer.cls_id, predictor.tokenizer.sep_id)
  inner = [word for word in words if ids[word[1]] not in special]
  labels = np.full(batch['input_ids'].shape, -1, np.int32)
  labels[0, [first for _, first, _ in inner]] = 0
  [(logits, tags)] = predictor.runner.run(batch | {'labels': labels}, 'tagging')
  margins = np.sort(logits, -1)[:, -1] - jax.nn.logsumexp(logits, -1)
  tagged = [word for word in inner if predictor.labels[tags[word[1]]] != 'O']
  tagged = tagged or sorted(inner, key=lambda word: margins[word[1]])[:1]
  return [
    _Target('tagging', f'{word}: {predictor.labels[tags[first]]}', (first, int(tags[first])))
    for word, first, _ in tagged[:_TARGETS]
  ]


def _answer(logits: np.ndarray, tokenizer: Tokenizer, context: str) -> _Target:
  """The best answer in the context, the second text, by start and end logits [l, 2]."""
  _, [offsets] = tokenizer.encode_offsets([context], trim=True)
  size, before = len(offsets), len(logits) - 1 - len(offsets)  # [SEP] follows
  scores = logits[before:-1, 0, None] + logits[None, before:-1, 1]
  inside = np.tri(size, k=_MAX_ANSWER - 1, dtype=bool) & ~np.tri(size, k=-1, dtype=bool)
  start, end = divmod(int(np.where(inside, scores, -np.inf).argmax()), size)
  text = context[offsets[start][0] : offsets[end][1]]
  return _Target('span', f'answer: {text}', (before + start, before + end))


def _attribute(predictor: Predictor, batch: dict, target: _Target) -> Attribution:
  runner, tokenizer = predictor.runner, predictor.tokenizer
  ids = batch['input_ids']
  kept = (ids == tokenizer.cls_id) | (ids == tokenizer.sep_id) | (batch['segment_ids'] == 0)
  classes = target.head == 'classification'
  regression = classes and predictor.problem_type == 'regression'
  values, logits, baseline = jax.device_get(_integrated_gradients(
    runner.params, batch, np.where(kept, ids, tokenizer.mask_id), target.index, target.others,
    config=runner.config, head=target.head, labels=runner.num_labels.get(target.head, 2),
    size=runner.tokenizer.vocab_size, linear=regression or (classes and predictor.multi_label),
  ))  # fmt: skip
  probability = None if regression else float(np.prod(1 / (1 + np.exp(-logits.astype(float)))))
  count = int(batch['segment_ids'].sum())
  return Attribution(
    target.name, probability, float(logits.sum()), float(baseline.sum()), values[:count],
    bool(target.predicted),
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=('config', 'head', 'labels', 'size', 'linear'))
def _integrated_gradients(
  params, batch, masked_ids, index, others, *, config, head, labels, size, linear
):  # fmt: skip
  """Integrated gradients of one output, summed over the width of the word embeddings.

  Args:
    params: of the model.
    batch: a row, [1, L] each.
    masked_ids: the baseline [1, L].
    index: of the output, see `_Target`; traced, so that all outputs of a head share a program.
    others: see `_Target`.
    config: of the encoder.
    head: of the output.
    labels: classes of the head.
    size: V, entries of the vocabulary.
    linear: the output is the logit itself (regression, several labels).

  Returns:
    values [L]; the log-odds of the text and of the baseline [1], of an answer's start and end [2].
  """
  bert = Bert(config, heads=(head,), pooler=head in config.pooled_heads, num_labels=labels)
  table = params['encoder']['embeddings']['word']['embedding']
  text, baseline = table[batch['input_ids']], table[masked_ids]
  rows = {name: batch[name] for name in ('token_type_ids', 'segment_ids')}
  if head == 'mlm':
    rows['masked_lm_positions'] = jnp.reshape(index[0], (1, 1))

  def log_odds(embeddings):
    out = bert.apply({'params': params}, rows | {'input_embeddings': embeddings})
    logits = out[f'{head}_logits'][0]
    if head == 'span':
      real = jnp.where(batch['segment_ids'][0, :, None] > 0, logits, -jnp.inf).T
      return jnp.stack([_log_odds(real[i], index[i]) for i in range(2)])
    if head == 'choice':
      return (logits - others)[None]
    logits = logits[0, :size] if head == 'mlm' else logits
    logits = logits[index[0]] if head == 'tagging' else logits
    return (logits[index[1]] if linear else _log_odds(logits, index[1]))[None]

  def step(total, point):
    where, weight = point
    gradient = jax.grad(lambda x: log_odds(x).sum())(baseline + where * (text - baseline))
    return total + weight * gradient, None

  points, weights = np.polynomial.legendre.leggauss(STEPS)
  points = np.stack([(points + 1) / 2, weights / 2], 1).astype(np.float32)
  total, _ = jax.lax.scan(step, jnp.zeros_like(text), points)
  return ((text - baseline) * total).sum(-1)[0], log_odds(text), log_odds(baseline)


def _log_odds(logits: jax.Array, index: jax.Array) -> jax.Array:
  """log p - log(1 - p) of an index under the softmax of logits [C]."""
  others = jnp.where(jnp.arange(len(logits)) == index, -jnp.inf, logits)
  return logits[index] - jax.nn.logsumexp(others)


def to_html(explanation: Explanation, title: str) -> str:
  """One page with all of it, which loads nothing from elsewhere."""
  attention = (explanation.attention * 255).round().astype(np.uint8)
  data = dataclasses.asdict(explanation) | {
    'title': title, 'shape': attention.shape[:2],
    'attention': base64.b64encode(attention.tobytes()).decode(),
    'rollout': explanation.rollout.round(4).tolist(),
  }  # fmt: skip
  for attribution in data['attributions']:
    attribution['values'] = attribution['values'].round(4).tolist()
  return pages.render(f'{title}: explanation', template='explain.html', data=data)
