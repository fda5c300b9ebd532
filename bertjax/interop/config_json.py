"""`config.json`: our config, heads and labels in Hugging Face's words, both directions."""

import logging
from collections.abc import Mapping

import numpy as np

from bertjax.model.config import HEAD_FIELDS, HEADS, LABELLED_HEADS, EncoderConfig

_log = logging.getLogger(__name__)

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
  'classifier_dropout': 'classifier_dropout',
  'layer_norm_eps': 'layer_norm_eps',
  'initializer_range': 'initializer_range',
  'causal': 'is_decoder',
}
_OWN_FIELDS = {name: f'bertjax_{name}' for name in HEAD_FIELDS}  # of heads that they do not have
_ACTIVATIONS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_new'}
_THEIR_ACTIVATIONS = {'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh',
                      'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh'}  # fmt: skip
# Heads -> their class. The same tensor `classifier.weight` stands for three heads.
_ARCHITECTURES = {
  (): 'BertModel',
  ('mlm', 'nsp'): 'BertForPreTraining',
  ('mlm',): 'BertForMaskedLM',
  ('nsp',): 'BertForNextSentencePrediction',
  ('classification',): 'BertForSequenceClassification',
  ('tagging',): 'BertForTokenClassification',
  ('span',): 'BertForQuestionAnswering',
  ('choice',): 'BertForMultipleChoice',
}
CLASSIFIERS = ('classification', 'tagging', 'choice')
_POOLERLESS = (('mlm',), ('tagging',), ('span',))  # their classes have no place for a pooler


def config_to_json(
  config: EncoderConfig, params: Mapping, pad_id: int, labels=(), problem_type: str = ''
) -> dict:
  """The content of `config.json` for a model with these parameters.

  Raises:
    ValueError: if two heads would get the same name, or labels and head differ in number.
  """
  heads = tuple(head for head in HEADS if head in params)
  own = own_heads(config, params)
  theirs_too = tuple(head for head in heads if head not in own)
  clashing = [head for head in theirs_too if head in CLASSIFIERS]
  if len(clashing) > 1:
    raise ValueError(f'the heads {clashing} would both be called classifier; save one of them.')
  if own:
    _log.warning(
      'transformers cannot load the %s head with %s, only the rest of this model',
      own[0], head_settings(config),
    )  # fmt: skip
  fields = _FIELDS | _OWN_FIELDS if own else _FIELDS
  result = {theirs: getattr(config, ours) for ours, theirs in fields.items()}
  if config.classifier_dropout < 0:
    result['classifier_dropout'] = None
  result |= {
    'model_type': 'bert',
    'architectures': [_architecture(theirs_too, 'pooler' in params)],
    'hidden_act': _ACTIVATIONS[config.activation],
    'pad_token_id': pad_id,
    'tie_word_embeddings': True,
  }
  for head in set(LABELLED_HEADS) & set(heads):
    count = np.shape(params[head]['bias'])[0]
    names = list(labels) or [f'LABEL_{i}' for i in range(count)]
    if len(names) != count or len(set(names)) != count:
      raise ValueError(f'the {head} head has {count} classes, got the labels {names}.')
    result['id2label'] = {str(i): name for i, name in enumerate(names)}
    result['label2id'] = {name: i for i, name in enumerate(names)}
  return result | ({'problem_type': problem_type} if problem_type else {})


def own_heads(config: EncoderConfig, params: Mapping) -> list[str]:
  """The heads that are more than the linear layer which other libraries know."""
  tasks = set(HEADS) - {'mlm', 'nsp'}
  return [] if config.linear_head else sorted(tasks & set(params))


def head_settings(config: EncoderConfig) -> str:
  return ', '.join(f'{name}={getattr(config, name)!r}' for name in HEAD_FIELDS)


def config_from_json(content: dict, source: str) -> EncoderConfig:
  """Reads `config.json`.

  Raises:
    ValueError: if it describes no BERT, or one with switches that we do not have.
  """
  architectures = content.get('architectures') or ['Bert']
  kind = content.get('model_type', 'bert' if architectures[0].startswith('Bert') else '')
  if kind != 'bert':
    raise ValueError(f'{source} describes a {kind or architectures[0]!r} model, not a BERT.')
  for name, value in (('position_embedding_type', 'absolute'), ('add_cross_attention', False)):
    if content.get(name, value) != value:
      raise ValueError(f'{source}: {name}={content[name]!r} is not supported.')
  activation = content.get('hidden_act', 'gelu')
  if activation not in _THEIR_ACTIVATIONS:
    raise ValueError(
      f'{source}: hidden_act={activation!r}; supported are {sorted(_THEIR_ACTIVATIONS)}.'
    )
  known = _FIELDS | _OWN_FIELDS
  fields = {ours: content[theirs] for ours, theirs in known.items() if theirs in content}
  if fields.get('classifier_dropout', 0) is None:
    del fields['classifier_dropout']
  for name, value in fields.items():
    wanted = type(getattr(EncoderConfig, name))
    if type(value) is not wanted and (wanted, type(value)) != (float, int):
      raise ValueError(f'{source}: {known[name]}={value!r} must be {wanted.__name__}.')
  try:
    return EncoderConfig(**fields, activation=_THEIR_ACTIVATIONS[activation])
  except ValueError as error:
    raise ValueError(f'{source}: {error}') from error


def classifier_head(content: dict) -> str:
  """The head that the tensor `classifier` of the named architecture is; '' if none is named."""
  named = (content.get('architectures') or [''])[0]
  return next((head for head in CLASSIFIERS if _ARCHITECTURES[(head,)] == named), '')


def labels_in(content: dict, source) -> tuple[list[str], str]:
  """The labels by index ([] if not named) and the problem type ('' likewise) of a config."""
  try:
    named = {int(i): str(name) for i, name in (content.get('id2label') or {}).items()}
    return [named[i] for i in range(len(named))], content.get('problem_type') or ''
  except (KeyError, ValueError, AttributeError) as error:
    raise ValueError(f'{source}: id2label must name 0..C-1, got {content["id2label"]}.') from error


def _architecture(heads, pooler):
  """Their class for a model with these heads; says so where none has exactly these parts."""
  name = _ARCHITECTURES.get(heads)
  if name is None:
    task = tuple(head for head in heads if head not in ('mlm', 'nsp'))[:1]
    name = _ARCHITECTURES[task or heads]
    _log.warning('transformers has no class with the heads %s; saved as %s', heads, name)
  elif pooler and heads in _POOLERLESS:
    _log.warning("%s has no pooler: transformers will not read this model's", name)
  return name
