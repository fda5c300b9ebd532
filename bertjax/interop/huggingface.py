"""Hugging Face's layout: `config.json` fields and tensors, both directions."""

import flax.traverse_util
import numpy as np

from bertjax.interop.names import entries, shapes
from bertjax.model.config import EncoderConfig

# Our field -> theirs.
_FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'mlp_size': 'intermediate_size',
  'max_positions': 'max_position_embeddings',
  'type_vocab_size': 'type_vocab_size',
  'hidden_dropout': 'hidden_dropout_prob',
  'attention_dropout': 'attention_probs_dropout_prob',
  'layer_norm_eps': 'layer_norm_eps',
  'initializer_range': 'initializer_range',
  'causal': 'is_decoder',
}
_ACTIVATIONS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_new'}
_THEIR_ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}


def architecture(heads: tuple[str, ...]) -> str:
  """Their class for a model with these heads."""
  if 'nsp' in heads:
    return 'BertForPreTraining'
  return 'BertForMaskedLM' if 'mlm' in heads else 'BertModel'


def config_to_json(config: EncoderConfig, heads: tuple[str, ...], pad_id: int) -> dict:
  """The content of `config.json`."""
  result = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
  return result | {
    'model_type': 'bert',
    'architectures': [architecture(heads)],
    'hidden_act': _ACTIVATIONS[config.activation],
    'pad_token_id': pad_id,
    'tie_word_embeddings': True,
  }


def config_from_json(content: dict, source: str) -> EncoderConfig:
  """Reads `config.json`.

  Raises:
    ValueError: if it describes no BERT, or one with switches that we do not have.
  """
  if content.get('model_type', 'bert') != 'bert':
    raise ValueError(f'{source} describes a {content["model_type"]!r} model, not a BERT.')
  position = content.get('position_embedding_type', 'absolute')
  if position != 'absolute':
    raise ValueError(f'{source}: position_embedding_type={position!r} is not supported.')
  activation = content.get('hidden_act', 'gelu')
  if activation not in _THEIR_ACTIVATIONS:
    raise ValueError(
      f'{source}: hidden_act={activation!r}; supported are {sorted(_THEIR_ACTIVATIONS)}.'
    )
  fields = {ours: content[theirs] for ours, theirs in _FIELDS.items() if theirs in content}
  return EncoderConfig(**fields, activation=_THEIR_ACTIVATIONS[activation])


def to_tensors(config: EncoderConfig, params: dict) -> dict[str, np.ndarray]:
  """Our parameters as their tensors, {name: array}."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  heads = tuple(name for name in ('mlm', 'nsp') if name in params)
  table = entries(config.num_layers, heads, 'pooler' in params)
  return {entry.theirs: entry.write(np.asarray(flat[entry.path])) for entry in table}


def from_tensors(
  config: EncoderConfig, tensors: dict[str, np.ndarray], heads, pooler: bool, source: str
) -> dict:
  """Their tensors as our parameters, float32.

  Raises:
    ValueError: for a missing tensor or a wrong shape, named.
  """
  flat = {path: np.empty(s, np.float32) for path, s in shapes(config, heads, pooler).items()}
  for entry in entries(config.num_layers, heads, pooler):
    if entry.theirs not in tensors:
      raise ValueError(f'{source} has no tensor {entry.theirs}.')
    tensor = np.asarray(tensors[entry.theirs], np.float32)
    target = flat[entry.path][entry.index]
    expected = entry.write(flat[entry.path]).shape
    if tensor.shape != expected:
      raise ValueError(
        f'{source}: {entry.theirs} has shape {tensor.shape}, the config asks for {expected}.'
      )
    flat[entry.path][entry.index] = entry.read(tensor, target.shape)
  return flax.traverse_util.unflatten_dict(flat, sep='/')
