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
  bert = Bert(predictor.config, heads=(), pooler=False)
  apply = functools.partial(bert.apply, capture=('hidden', 'attention'))
  out = jax.device_get(jax.jit(apply)({'params': forward.params}, batch))
  attention = out['attention'][:, 0]
  return Explanation(
    [tokenizer.vocab[i] for i in batch['input_ids'][0]], attention, rollout(attention),
    _lens(predictor, out['all_hidden'][:, 0]), _attributions(predictor, batch),
  )  # fmt: skip


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
  """Gradient times input of the best outputs."""
  forward, ids = predictor.forward, batch['input_ids'][0]
  if 'classification' in forward.params:
    logits = np.asarray(forward.logits(forward.params, batch, 'classification')[0])
    best = np.argsort(-logits, kind='stable')[:_TARGETS]
    named = [(predictor.labels[i], (0, int(i))) for i in best]
    head = 'classification'
  elif 'mlm' in forward.params:
    places = np.flatnonzero(ids == predictor.tokenizer.mask_id)[:_TARGETS]
    logits = np.asarray(forward.logits(forward.params, batch, 'mlm')[0])
    best = [(int(place), int(logits[place].argmax())) for place in places]
    vocab = predictor.tokenizer.vocab
    named = [(f'{vocab[i]} at token {place}', (0, place, i)) for place, i in best]
    head = 'mlm'
  else:
    return []
  return [(name, values) for (name, _), values in zip(
    named, gradient_times_input(predictor, batch, head, [at for _, at in named]), strict=True
  )]  # fmt: skip


def gradient_times_input(predictor: Predictor, batch: dict, head: str, targets) -> list[np.ndarray]:
  """For each logit of a head, by its index, each token's gradient times word embedding: [L].

  To differentiate by places and not by pieces, each place gets a row of its own behind the word
  table, a copy of its piece's.
  """
  forward, ids = predictor.forward, batch['input_ids'][0]
  size, count = forward.config.vocab_size, len(ids)
  bert = Bert(
    dataclasses.replace(forward.config, vocab_size=size + count), heads=(head,),
    pooler=head in POOLED_HEADS, num_labels=forward.num_labels.get(head, 2),
  )  # fmt: skip
  params = jax.tree.map(lambda x: x, forward.params)  # new dicts, the same arrays
  table = params['encoder']['embeddings']['word']['embedding']
  if 'mlm' in params:
    params['mlm']['bias'] = jnp.pad(params['mlm']['bias'], (0, count))
  rows = batch | {'input_ids': size + np.arange(count, dtype=np.int32)[None]}

  @jax.jit
  def logits(own):
    embeddings = params['encoder']['embeddings'] | {
      'word': {'embedding': jnp.concatenate([table, own])}
    }
    encoder = params['encoder'] | {'embeddings': embeddings}
    out = bert.apply({'params': params | {'encoder': encoder}}, rows)[f'{head}_logits']
    return jnp.stack([out[target] for target in targets])

  if not targets:
    return []
  own = table[ids]
  return list(np.asarray((jax.jacrev(logits)(own) * own).sum(-1)))


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
