"""How a model came to its outputs: attention, roll-out, layer-by-layer predictions, attributions.

Attention weights tell where a layer looked, not what the answer rests on; attributions are the
first-order share of each token in one output. The two may well disagree.
"""

import base64
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.inference.predictor import Predictor
from bertjax.model.config import POOLED_HEADS
from bertjax.model.heads import Bert, MlmHead

LONGEST = 128  # tokens that a page can show
_TARGETS = 8  # outputs attributed at most
_BEST = 3  # predictions told for each token and layer


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What happened to a text.

  Attributes:
    tokens: its L pieces, with the special ones.
    attention: probabilities [N, H, L, L], from the token of a row to that of a column.
    rollout: [L, L], what each token's last state draws from each input, if attention averaged over
      heads is half of a layer and the residual path the other (Abnar and Zuidema 2020).
    layers: for the embeddings and each layer, for each token, the best [piece, probability] if the
      masked-LM head read the layer; empty without such a head.
    attributions: (name of an output, gradient times word embedding [L]); of classes, or of the best
      piece at each [MASK]; empty if there are neither.
  """

  tokens: list[str]
  attention: np.ndarray
  rollout: np.ndarray
  layers: list[list[list[list]]]
  attributions: list[tuple[str, np.ndarray]]


def explain(predictor: Predictor, text: str, pair: str = '') -> Explanation:
  """Explains what a model makes of a text or pair of up to `LONGEST` tokens.

  Raises:
    ValueError: if there are more.
  """
  tokenizer, forward = predictor.tokenizer, predictor.forward
  batch = tokenizer([text], [pair] if pair else None)
  count = batch['input_ids'].shape[1]
  longest = min(LONGEST, predictor.config.max_positions)
  if count > longest:
    raise ValueError(f'an explanation shows at most {longest} tokens, the text has {count}.')
  padded = next(length for length in forward.lengths if length >= count)  # few programs
  batch = tokenizer([text], [pair] if pair else None, padded)
  out = jax.device_get(_capture(forward.params, batch, config=forward.config))
  attention = out['attention'][:, 0, :, :count, :count]
  return Explanation(
    [tokenizer.vocab[i] for i in batch['input_ids'][0, :count]], attention, rollout(attention),
    [layer[:count] for layer in _lens(predictor, out['all_hidden'][:, 0])],
    [(name, values[:count]) for name, values in _attributions(predictor, batch)],
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames='config')
def _capture(params, batch, *, config):
  bert = Bert(config, heads=(), pooler=False)
  return bert.apply({'params': params}, batch, capture=('hidden', 'attention'))


def rollout(attention: np.ndarray) -> np.ndarray:
  """Attention [N, H, L, L] multiplied through all layers: [L, L], rows sum to 1."""
  layers = 0.5 * attention.mean(1) + 0.5 * np.eye(attention.shape[-1])
  return functools.reduce(lambda below, layer: layer @ below, layers)


def _lens(predictor: Predictor, hidden: np.ndarray) -> list:
  """The best pieces if the masked-LM head read the states [N+1, L, D] of each layer."""
  params = predictor.forward.params
  if 'mlm' not in params:
    return []
  table = params['encoder']['embeddings']['word']['embedding']
  logits = MlmHead(predictor.config).apply({'params': params['mlm']}, hidden, table)
  logits = logits[..., : predictor.forward.pieces]
  values, ids = jax.device_get(jax.lax.top_k(jax.nn.softmax(logits), _BEST))
  vocab = predictor.tokenizer.vocab
  return [
    [
      [[vocab[i], round(float(p), 4)] for i, p in zip(*token, strict=True)]
      for token in zip(*layer, strict=True)
    ]
    for layer in zip(ids, values, strict=True)
  ]


def _attributions(predictor: Predictor, batch: dict) -> list[tuple[str, np.ndarray]]:
  """Gradient times input of the best outputs, by their names."""
  forward, vocab = predictor.forward, predictor.tokenizer.vocab
  head = next((name for name in ('classification', 'mlm') if name in forward.params), '')
  if not head:
    return []
  logits = np.asarray(forward.logits(forward.params, batch, head)[0])
  if head == 'classification':
    best = np.argsort(-logits, kind='stable')[:_TARGETS]
    targets = {predictor.labels[i]: (i,) for i in best}
  else:
    places = np.flatnonzero(batch['input_ids'][0] == predictor.tokenizer.mask_id)[:_TARGETS]
    best = [(place, logits[place, : forward.pieces].argmax()) for place in places]
    targets = {f'{vocab[i]} at token {place}': (place, i) for place, i in best}
  options = {'config': forward.config, 'head': head, 'labels': forward.num_labels.get(head, 2)}
  return [
    (name, np.asarray(_gradient_times_input(forward.params, batch, target, **options)))
    for name, target in targets.items()
  ]


@functools.partial(jax.jit, static_argnames=('config', 'head', 'labels'))
def _gradient_times_input(params, batch, target, *, config, head, labels) -> jax.Array:
  """Each token's gradient times word embedding [L], for one logit of a head by its index.

  To differentiate by places and not by pieces, each place gets a row of its own behind the word
  table, a copy of its piece's.
  """
  ids, size = batch['input_ids'][0], config.vocab_size
  config = dataclasses.replace(config, vocab_size=size + len(ids))
  bert = Bert(config, heads=(head,), pooler=head in POOLED_HEADS, num_labels=labels)
  tree = jax.tree.map(lambda x: x, params)  # new dicts, the same arrays
  word = tree['encoder']['embeddings']['word']
  table, own = word['embedding'], word['embedding'][ids]
  if 'mlm' in tree:
    tree['mlm']['bias'] = jnp.pad(tree['mlm']['bias'], (0, len(ids)))
  rows = batch | {'input_ids': size + jnp.arange(len(ids))[None]}

  def logit(own):
    word['embedding'] = jnp.concatenate([table, own])
    return bert.apply({'params': tree}, rows)[f'{head}_logits'][0][target]

  return (jax.grad(logit)(own) * own).sum(-1)


def to_html(explanation: Explanation, title: str) -> str:
  """One page with all of it, which loads nothing from elsewhere."""
  attention = (explanation.attention * 255).round().astype(np.uint8)
  data = {
    'title': title, 'tokens': explanation.tokens, 'shape': attention.shape[:2],
    'attention': base64.b64encode(attention.tobytes()).decode(),
    'rollout': explanation.rollout.round(4).tolist(), 'layers': explanation.layers,
    'attributions': [[name, values.tolist()] for name, values in explanation.attributions],
  }  # fmt: skip
  page = (pathlib.Path(__file__).parent / 'explain.html').read_text(encoding='utf-8')
  return page.replace('DATA', json.dumps(data).replace('<', '\\u003c'), 1)
