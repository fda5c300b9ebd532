"""A kind of encoder as transformers names its parts: how `config.json` spells our fields, which of
them are always the same, and what its modules and classes are called. `families` has the records.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from bertjax.model.config import EncoderConfig

FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'mlp_size': 'intermediate_size',
  'max_positions': 'max_position_embeddings',
  'type_vocab_size': 'type_vocab_size',
  'activation': 'hidden_act',
  'hidden_dropout': 'hidden_dropout_prob',
  'attention_dropout': 'attention_probs_dropout_prob',
  'classifier_dropout': 'classifier_dropout',
  'layer_norm_eps': 'layer_norm_eps',
  'initializer_range': 'initializer_range',
  'causal': 'is_decoder',
}
# What `is_decoder=True` and other switches would add, and we do not have.
CONSTANTS = {'position_embedding_type': 'absolute', 'add_cross_attention': False}
# The fields of `EncoderConfig` before 'features' are the model.
_MODEL_FIELDS = tuple(itertools.takewhile(
  lambda field: field.name != 'features', dataclasses.fields(EncoderConfig)
))  # fmt: skip
# Fields that only training reads: a family need not have them in its config.json.
_FREE = ('hidden_dropout', 'attention_dropout', 'classifier_dropout', 'initializer_range',
         'scaled_init')  # fmt: skip

CLASSES = {
  (): 'Model',
  ('mlm',): 'ForMaskedLM',
  ('classification',): 'ForSequenceClassification',
  ('tagging',): 'ForTokenClassification',
  ('span',): 'ForQuestionAnswering',
  ('choice',): 'ForMultipleChoice',
}


class Family(NamedTuple):
  """One kind of encoder as transformers names its parts.

  In names of modules a leading '.' stands for `prefix`.

  Attributes:
    model_type: in `config.json`.
    name: start of its classes, 'Bert'.
    prefix: module of the encoder within a model with heads.
    modules: our module -> theirs; '{}' stands for the number of a layer.
    aliases: other model types that are this model under another name -> start of their classes.
    fields: our field -> theirs in `config.json`.
    fixed: our field -> the value that it has in every model of the family.
    least: our field -> the least value that it has in the family.
    choices: our field -> the values that it may have, where that are not all of ours.
    defaults: our field -> its value where `config.json` lacks it, other than ours.
    constants: their field -> the only value of it that we have.
    same: their second field for one of ours -> ours.
    classes: heads -> end of the class that has exactly these.
    tied: copies of tied tensors in some files -> the original.
    values: our field -> {their value: ours} where the two differ.
    tokens: their field -> role of the token whose id it holds, beside `pad_token_id`.
    mlp_scale: `intermediate_size` by our `mlp_size`, which is a multiple of 8 where this is not 1.
    interleaved: a matrix of queries, keys and values has the three of each head side by side, and
      each rotary pair too.
    pad_offset: positions begin at `pad_token_id` + 1.
  """

  model_type: str
  name: str
  prefix: str
  modules: Mapping[str, str]
  aliases: Mapping[str, str] = {}
  fields: Mapping[str, str] = FIELDS
  fixed: Mapping[str, Any] = {}
  least: Mapping[str, int] = {}
  choices: Mapping[str, tuple] = {}
  defaults: Mapping[str, Any] = {}
  constants: Mapping[str, Any] = CONSTANTS
  same: Mapping[str, str] = {}
  classes: Mapping[tuple[str, ...], str] = CLASSES
  tied: Mapping[str, str] = {}
  values: Mapping[str, Mapping[str, Any]] = {}
  tokens: Mapping[str, str] = {}
  mlp_scale: float = 1.0
  interleaved: bool = False
  pad_offset: bool = False

  def mlp_size(self, theirs: int) -> int:
    """Our `mlp_size` of an `intermediate_size`."""
    return theirs if self.mlp_scale == 1 else 8 * -(-int(theirs / self.mlp_scale) // 8)

  def expand(self, name: str) -> str:
    """A name with the prefix for a leading '.'."""
    return self.prefix + name if name.startswith('.') else name

  def module(self, ours: str) -> str | None:
    """Their name of one of our modules; None if the family has no such part."""
    name = self.modules.get(ours)
    return name and self.expand(name)

  @property
  def roots(self) -> set[str]:
    """First names of modules in a file of a bare encoder, which lacks the prefix."""
    return {name.split('.')[1] for name in self.modules.values() if name.startswith('.')}

  def full_name(self, name: str, dot: str = '.') -> str:
    """A name with the prefix, which a file of a bare encoder lacks."""
    return f'{self.prefix}{dot}{name}' if name.split(dot)[0] in self.roots else name

  def differences(self, config: EncoderConfig) -> list[str]:
    """Fields of a config in which it is no model of this family."""
    wrong = []
    for field in _MODEL_FIELDS:
      name, value = field.name, getattr(config, field.name)
      if name in self.fixed or (name not in self.fields and name not in (*self.least, *_FREE)):
        if value != self.fixed.get(name, field.default):
          wrong.append(name)
      elif value < self.least.get(name, value) or value not in self.choices.get(name, (value,)):
        wrong.append(name)
    return wrong
