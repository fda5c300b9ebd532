"""`Predictor`: a trained model ready for texts. Needs no TensorFlow."""

import dataclasses

import jax
import numpy as np

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import directory
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert

_LENGTHS = (32, 64, 128, 256, 512)  # rows are padded to one of these, so few programs are compiled


@dataclasses.dataclass(frozen=True)
class Fill:
  """A proposal for one mask: the piece, its probability, and the whole text with it filled in."""

  token: str
  probability: float
  text: str


class Predictor:
  """Predictions of one model.

  Args:
    config: of the encoder.
    params: its parameters, with the heads that the predictions need.
    tokenizer: its tokenizer.
  """

  def __init__(self, config: EncoderConfig, params: dict, tokenizer: Tokenizer):
    self.config, self.params, self.tokenizer = config, jax.device_put(params), tokenizer
    heads = tuple(name for name in ('mlm', 'nsp') if name in params)
    model = Bert(config, heads=heads, pooler='pooler' in params)
    self._apply = jax.jit(lambda params, batch: model.apply({'params': params}, batch))

  @classmethod
  def from_dir(cls, path) -> 'Predictor':
    """Loads a model directory."""
    return cls(*directory.load_model(path))

  def fill_mask(self, text: str, top_k: int = 5) -> list[list[Fill]]:
    """Proposes tokens for every [MASK] in a text, each by itself, most probable first.

    Returns:
      A list for each mask, in the order of the text, of `top_k` proposals.

    Raises:
      ValueError: if the model has no masked-LM head, or the text no [MASK] or too many tokens.
    """
    if 'mlm' not in self.params:
      raise ValueError(f'fill_mask needs an mlm head; this model has {sorted(self.params)}.')
    if self.config.causal:
      raise ValueError('fill_mask needs a model that sees both sides; this one is causal.')
    batch = self.tokenizer([text])
    ids = batch['input_ids'][0]
    places = np.flatnonzero(ids == self.tokenizer.mask_id)
    if not len(places):
      raise ValueError(f'the text has no [MASK]: {text!r}')
    logits = self._run(batch)['mlm_logits'][0, places]  # [masks, V]
    probs = np.asarray(jax.nn.softmax(logits, axis=-1))
    return [
      [self._fill(ids, place, token, probs[i, token]) for token in _best(probs[i], top_k)]
      for i, place in enumerate(places)
    ]

  def _fill(self, ids, place, token, probability) -> Fill:
    filled = ids.copy()
    filled[place] = token
    text = self.tokenizer.decode(filled[1:-1].tolist())  # without [CLS] and [SEP]
    return Fill(self.tokenizer.vocab[token], float(probability), text)

  def _run(self, batch: dict) -> dict:
    """Pads a batch to one of a few lengths and applies the model."""
    longest = batch['input_ids'].shape[1]
    limit = self.config.max_positions
    if longest > limit:
      raise ValueError(f'the text has {longest} tokens, the model takes at most {limit}.')
    length = min(next((n for n in _LENGTHS if n >= longest), limit), limit)
    fill = {'input_ids': self.tokenizer.pad_id}
    padded = {
      name: np.pad(a, ((0, 0), (0, length - longest)), constant_values=fill.get(name, 0))
      for name, a in batch.items()
    }
    return self._apply(self.params, padded)


def _best(probs: np.ndarray, k: int) -> np.ndarray:
  """Indices of the k largest values, largest first; equal ones by index."""
  return np.argsort(-probs, kind='stable')[:k]
