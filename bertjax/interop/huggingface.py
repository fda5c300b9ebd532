"""Hugging Face's models: `config.json` and weights, from a folder or the hub, both directions.

`save_hf` writes what `transformers` loads with `from_pretrained`; `load_hf` also reads what it
wrote in earlier years: pickles, former Flax files, LayerNorms of gamma and beta, no 'bert.' prefix.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence

import flax.traverse_util
import numpy as np
from safetensors.numpy import save as tensors_to_bytes

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import families, files, sentences
from bertjax.interop.family import Family
from bertjax.interop.hub import find_directory
from bertjax.interop.mapping import entries, head_entries, shapes
from bertjax.model.config import (
  HEAD_FIELDS,
  HEADS,
  LABELLED_HEADS,
  TASK_HEADS,
  EncoderConfig,
  describe_heads,
)

_log = logging.getLogger(__name__)

_OWN_FIELDS = {name: f'bertjax_{name}' for name in HEAD_FIELDS}  # of heads that they do not have
_ACTIVATIONS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_new', 'silu': 'silu', 'relu': 'relu'}
_THEIR_ACTIVATIONS = {'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh',
                      'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh', 'silu': 'silu',
                      'swish': 'silu', 'relu': 'relu'}  # fmt: skip
# Heads whose module is often called `classifier`; that of 'span' is in some families.
CLASSIFIERS = ('classification', 'tagging', 'choice', 'span')
_BUFFERS = ('.embeddings.position_ids', '.embeddings.token_type_ids')
_FLOATS = ('float16', 'bfloat16', 'float32', 'float64')


def load_hf(path_or_name, *, heads: Sequence[str] | None = None) -> tuple[EncoderConfig, dict]:
  """Loads a BERT of Hugging Face's: (config, params as NumPy float32).

  Args:
    path_or_name: a folder, or a name on the hub ('bert-base-uncased', 'name@revision').
    heads: heads to load; None takes all that can be read. Needed where the file has a
      `classifier.weight` and `config.json` does not say whose it is.

  Raises:
    ValueError: if a file is missing, corrupt or of another architecture, or a tensor is missing or
      of a wrong shape; names file and tensor.
  """
  directory = find_directory(path_or_name)
  content = files.read_json(directory / 'config.json')
  config = config_from_json(content, str(directory / 'config.json'))
  path = files.find_weights(directory)
  _log.info('reading %s', path)
  style = 'flax' if path.suffix == '.msgpack' else 'huggingface'
  family = families.family_of(config)
  tensors, untied = canonical(files.read_tensors(path), style, config)
  found = find_heads(config, tensors, style, content, path, heads)
  if untied and 'mlm' in found:
    original = family.expand(family.tied[untied])
    reason = f'{path}: {untied} differs from {original}, and here the two are one'
    if heads is not None:
      raise ValueError(f'{reason}; take other heads than mlm.')
    _log.warning('%s; the masked-LM head is not read', reason)
    found = tuple(head for head in found if head != 'mlm')
  params = from_tensors(config, tensors, found, path, style)
  labels, _ = labels_in(content, directory / 'config.json')
  for head in set(LABELLED_HEADS) & set(params):
    count = params[head]['bias'].size
    if labels and len(labels) != count:
      raise ValueError(
        f'{directory / "config.json"} names {len(labels)} labels, the {head} head in {path.name} '
        f'has {count} (classifier.bias).'
      )
  return config, params


def save_hf(
  directory,
  config: EncoderConfig,
  params: dict,
  tokenizer: Tokenizer,
  *,
  labels: Sequence[str] = (),
  problem_type: str = '',
  sentence: dict | None = None,
  card: str = '',
) -> None:
  """Writes a model directory; an older one at the same path is replaced when this is complete.

  Args:
    directory: where to.
    config: of the encoder.
    params: parameters as host or device arrays; their heads decide the architecture's name.
    tokenizer: its vocabulary and settings are saved beside.
    labels: names of the classes of a 'classification' or 'tagging' head, by index.
    problem_type: Hugging Face's 'regression', 'single_label_classification' or
      'multi_label_classification', or '' to say nothing.
    sentence: arguments of `sentences.write_layers` or of `sentences.config_fields`, to write
      what sentence-transformers reads too.
    card: text of README.md; '' writes none.

  Raises:
    ValueError: if the folder holds something else, which would be lost, or the parts do not fit
      each other.
  """
  content = model_json(config, params, tokenizer, labels, problem_type, sentence)
  with files.new_directory(directory, 'model.safetensors') as folder:
    tensors = to_tensors(config, params)
    (folder / 'model.safetensors').write_bytes(tensors_to_bytes(tensors, {'format': 'pt'}))
    write_rest(folder, content, config, tokenizer, sentence, card)


def model_json(
  config: EncoderConfig, params: Mapping, tokenizer: Tokenizer, labels=(), kind='', sentence=None
) -> dict:
  """The content of `config.json` beside a tokenizer; see `config_to_json`."""
  check_vocabulary(config, tokenizer, 'the tokenizer')
  tokens, special = families.family_of(config).tokens, tokenizer.special
  ids = {theirs: special[role] for theirs, role in tokens.items() if role in special}
  content = config_to_json(config, params, tokenizer.pad_id, labels, kind) | ids
  return content | sentences.config_fields(sentence)


def write_rest(
  folder, content: dict, config: EncoderConfig, tokenizer: Tokenizer, sentence: dict | None,
  card: str,
) -> None:  # fmt: skip
  """Writes all but the weights: `config.json` with this content, the tokenizer, and the
  layers and the card if there are any."""
  (folder / 'config.json').write_text(json.dumps(content, indent=2) + '\n')
  tokenizer.save(folder, max_length=config.max_positions, token_types=config.type_vocab_size > 1)
  if sentence and 'pooling' in sentence:
    sentences.write_layers(folder, config.hidden_size, **sentence)
  if card:
    (folder / 'README.md').write_text(card, encoding='utf-8')


def check_vocabulary(config: EncoderConfig, tokenizer: Tokenizer, source) -> None:
  """Raises ValueError if the vocabulary is larger than the word table; logs a smaller one."""
  rows, size = config.vocab_size, tokenizer.vocab_size
  if size > rows:
    raise ValueError(
      f'{source} has a vocabulary of {size} entries, and the word table (word_embeddings.weight) '
      f'only {rows} rows.'
    )
  if size < rows:
    _log.info('%s: %d of the %d rows of the word table have no entry', source, rows - size, rows)


def find_heads(config, tensors, style: str, content: dict, source, asked=None) -> tuple[str, ...]:
  """The heads whose tensors are there, or those that were asked for.

  Raises:
    ValueError: for an unknown head, or a classifier whose head nothing names.
  """
  if asked is not None:
    unknown = [head for head in asked if head not in HEADS]
    if unknown:
      raise ValueError(f'unknown head {unknown[0]!r}; choose from {HEADS}.')
  found = [head for head in HEADS if _has_head(head, config, tensors, style)]
  if asked is not None:
    check_heads(asked, found, source)
    return tuple(asked)
  family, by_module = families.family_of(config), {}
  for head in set(found) & set(CLASSIFIERS):
    by_module.setdefault(family.module(head), []).append(head)
  classifiers = max(by_module.values(), key=len, default=[])
  if len(classifiers) > 1 and config.linear_head:
    head = classifier_head(content)
    if not head and style != 'google':  # Google's own code writes classification only
      raise ValueError(
        f'{source} has a classifier, and config.json does not say of which kind; '
        f'give heads, one of {tuple(sorted(classifiers))}.'
      )
    kept = head or 'classification'
    found = [head for head in found if head not in classifiers or head == kept]
  return tuple(found)


def _has_head(head: str, config, tensors, style: str) -> bool:
  """Whether a head's output layer is there; what is below may belong to another head too."""
  layers = (head, f'{head}/output') if head == 'mlm' else (head,)
  outputs = [
    entry.name(style) for entry in head_entries(head, config)
    if entry.path.rpartition('/')[0] in layers or not config.linear_head
  ]  # fmt: skip
  return any(name in tensors for name in outputs)


def check_heads(asked: Sequence[str], found, source) -> None:
  """Raises ValueError if a head that was asked for is not among the model's parts."""
  missing = [head for head in asked if head not in found]
  if missing:
    raise ValueError(f'{source} has no {missing[0]} head; it has {describe_heads(found)}.')


def to_tensors(config: EncoderConfig, params: dict, style: str = 'huggingface') -> dict:
  """Our parameters as their tensors, {name: array}."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  heads = tuple(head for head in HEADS if head in params)
  table = entries(config, heads, 'pooler' in params)
  return {entry.name(style): entry.write(np.asarray(flat[entry.path]), style) for entry in table}


def from_tensors(config: EncoderConfig, tensors: Mapping, heads, source, style: str) -> dict:
  """Their tensors as our parameters, float32.

  Tensors that no head asks for are named in the log; narrower floats are widened, which is too.

  Raises:
    ValueError: for a missing tensor, a wrong shape or a tensor of integers, named.
  """
  pooler = bool(set(heads) & set(config.pooled_heads)) or any(
    entry.name(style) in tensors for entry in head_entries('pooler', config)
  )
  table = list(entries(config, heads, pooler))
  missing = [entry.name(style) for entry in table if entry.name(style) not in tensors]
  if missing:
    more = f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''
    raise ValueError(f'{source} has no tensor {missing[0]}{more}.')
  count = [tensors[e.name(style)].size for e in table
           if e.path in ('classification/bias', 'tagging/bias')]  # fmt: skip
  own = shapes(config, heads, pooler, *count[:1])
  flat = {path: np.empty(shape, np.float32) for path, shape in own.items()}
  for entry in table:
    name, target = entry.name(style), flat[entry.path]
    tensor, expected = tensors[name], entry.write(target, style).shape
    if tensor.shape != expected:
      raise ValueError(
        f'{source}: {name} has shape {tensor.shape}, the config asks for {expected}.'
      )
    if tensor.dtype.name not in _FLOATS:
      raise ValueError(f'{source}: {name} has dtype {tensor.dtype}, not a float.')
    slot = target[entry.index]
    target[entry.index] = entry.read(tensor.astype(np.float32), slot.shape, style)
  _tell(tensors, {entry.name(style) for entry in table}, source)
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def _tell(tensors, read, source):
  """Logs what was not taken as it is."""
  widened = sorted({tensors[name].dtype.name for name in read} - {'float32'})
  if widened:
    _log.info('%s: tensors of %s are read as float32', source, ', '.join(widened))
  unread = sorted(name for name in set(tensors) - read if not name.endswith(_BUFFERS))
  if unread:
    _log.info('%s: not read: %s', source, ', '.join(unread))


def canonical(tensors: dict, style: str, config: EncoderConfig) -> tuple[dict, str]:
  """The tensors under today's names without copies of tied ones, and such a "copy" that differs."""
  dot, family = '/' if style == 'flax' else '.', families.family_of(config)
  tied = family.tied if config.tied_embeddings else {}
  result = {}
  for name, tensor in tensors.items():
    name = family.full_name(name, dot)
    name = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', name)
    result[re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', name)] = tensor
  untied = ''
  for copy, original in tied.items():
    if copy in result:
      tensor = result.pop(copy)
      if not np.array_equal(result.setdefault(family.expand(original), tensor), tensor):
        untied = untied or copy
  return result, untied


def config_to_json(
  config: EncoderConfig, params: Mapping, pad_id: int, labels=(), problem_type: str = ''
) -> dict:
  """The content of `config.json` for a model with these parameters.

  Raises:
    ValueError: if two heads would get the same name, or labels and head differ in number.
  """
  family = families.family_of(config)
  heads = tuple(head for head in HEADS if head in params)
  own = own_heads(config, params)
  theirs_too = tuple(head for head in heads if head not in own)
  owners = {}
  for head in heads:
    for entry in head_entries(head, config):
      other = owners.setdefault(entry.name('huggingface'), head)
      if other != head:
        raise ValueError(
          f'the heads {[other, head]} would both have the tensor {entry.name("huggingface")}; save '
          'one of them.'
        )
  if own:
    _log.warning(
      'transformers cannot load the %s head with %s, only the rest of this model',
      own[0], head_settings(config),
    )  # fmt: skip
  if config.causal and not own and {'classification', 'choice'} & set(heads):
    _log.warning(
      'this model is causal: its classes are read off the last token; transformers would read the '
      'first one, which attends to no other'
    )
  values = dataclasses.asdict(config)
  values['max_positions'] += config.position_offset
  values['activation'] = _ACTIVATIONS[config.activation]
  values['embedding_size'] = config.embedding_width
  if config.classifier_dropout < 0:
    nullable = family.fields.get('classifier_dropout') == 'classifier_dropout'
    nullable = nullable and 'classifier_dropout' not in family.defaults
    values['classifier_dropout'] = None if nullable else config.hidden_dropout
  check_padding(config, pad_id)
  values['mlp_size'] = int(config.mlp_size * family.mlp_scale)
  if family.mlp_size(values['mlp_size']) != config.mlp_size:
    raise ValueError(
      f'mlp_size must be a multiple of 8 in a {family.model_type}, got {config.mlp_size}.'
    )
  values['num_kv_heads'] = config.num_kv_heads or config.num_heads
  if not config.local_window:
    values['global_every'] = 1
  fields = family.fields | _OWN_FIELDS if own else family.fields
  renamed = {ours: {value: theirs for theirs, value in names.items()}
             for ours, names in family.values.items()}  # fmt: skip
  result = {
    theirs: renamed.get(ours, {}).get(values[ours], values[ours]) for ours, theirs in fields.items()
  }
  result |= {theirs: values[ours] for theirs, ours in family.same.items()}
  result |= {
    'model_type': family.model_type,
    'architectures': [family.name + _class(family, config, theirs_too, 'pooler' in params)],
    'pad_token_id': pad_id,
    'tie_word_embeddings': config.tied_embeddings,
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
  return [] if config.linear_head else sorted(set(TASK_HEADS) & set(params))


def head_settings(config: EncoderConfig) -> str:
  return ', '.join(f'{name}={getattr(config, name)!r}' for name in HEAD_FIELDS)


def config_from_json(content: dict, source: str) -> EncoderConfig:
  """Reads `config.json`.

  Raises:
    ValueError: if it describes a model, or has switches, that we do not have.
  """
  family = families.family_in(content, source)
  content = families.flatten(content, source)
  for name, value in family.constants.items():
    allowed = (value, None) if value is False or value == 'absolute' else (value,)
    if content.get(name, value) not in allowed:
      raise ValueError(f'{source}: {name}={content[name]!r} is not supported.')
  known = family.fields | _OWN_FIELDS
  fields = _read_fields(family, known, content, source)
  try:
    config = EncoderConfig(**fields)
  except ValueError as error:
    raise ValueError(f'{source}: {error}') from error
  for name, ours in family.same.items():
    value = getattr(config, ours)
    if content.get(name, value) != value:
      raise ValueError(f'{source}: {name}={content[name]!r} must be the {value} of {known[ours]}.')
  if wrong := family.differences(config):
    expected = family.fixed.get(wrong[0], family.choices.get(wrong[0]))
    raise ValueError(
      f'{source}: a {family.model_type} has {wrong[0]}={expected!r}, got '
      f'{getattr(config, wrong[0])!r}.'
    )
  return config


def _read_fields(family: Family, known: Mapping, content: Mapping, source: str) -> dict:
  """The fields of an `EncoderConfig` in `config.json`, whose names of them `known` has."""
  fields = family.defaults | {
    ours: content[theirs] for ours, theirs in known.items() if theirs in content
  }
  for name, names in family.values.items():
    if name in fields:
      fields[name] = names.get(fields[name], fields[name])
  if fields.get('num_kv_heads', 0) in (None, fields.get('num_heads')):
    fields.pop('num_kv_heads', None)  # as many as queries
  if fields.get('global_every') == 1:
    del fields['global_every']
    fields['local_window'] = 0
  elif fields.get('local_window', 1) == 0:
    raise ValueError(
      f'{source}: {known["local_window"]}=0 is no window for its local layers; set '
      f'{known["global_every"]}=1 if all layers are global.'
    )
  if 'mlp_size' in fields:
    fields['mlp_size'] = family.mlp_size(fields['mlp_size'])
  activation = fields.get('activation', family.fixed.get('activation', 'gelu'))
  if activation not in _THEIR_ACTIVATIONS:
    raise ValueError(
      f'{source}: hidden_act={activation!r}; supported are {sorted(_THEIR_ACTIVATIONS)}.'
    )
  fields['activation'] = _THEIR_ACTIVATIONS[activation]
  if fields.get('classifier_dropout', 0) is None:
    del fields['classifier_dropout']
  for name, value in fields.items():
    wanted = type(getattr(EncoderConfig, name))
    if type(value) is not wanted and (wanted, type(value)) != (float, int):
      raise ValueError(f'{source}: {known[name]}={value!r} must be {wanted.__name__}.')
  if family.pad_offset:
    pad_id = content.get('pad_token_id', 1)
    if type(pad_id) is not int or pad_id < 0:
      raise ValueError(
        f'{source}: pad_token_id={pad_id!r} must be the id of the padding token, as '
        'positions begin after it.'
      )
    fields['position_offset'] = pad_id + 1
  if not family.least.get('embedding_size') and fields.get('embedding_size') == fields.get(
    'hidden_size'
  ):
    fields.pop('embedding_size', None)
  fields = family.fixed | fields
  if offset := fields.get('position_offset'):  # tokens can have so many fewer
    fields['max_positions'] = fields.get('max_positions', 512) - offset
  return fields


def check_padding(config: EncoderConfig, pad_id: int) -> None:
  """Raises ValueError if transformers would number positions otherwise: from pad_id + 1 on."""
  if config.position_offset not in (0, pad_id + 1):
    raise ValueError(
      f"position_offset={config.position_offset} and the padding token's id {pad_id} do not fit: "
      f'transformers numbers positions from that id + 1 on; set position_offset={pad_id + 1}.'
    )


def classifier_head(content: dict) -> str:
  """The head that the tensor `classifier` of the named architecture is; '' if none is named."""
  named = (content.get('architectures') or [''])[0]
  classes = families.family_in(content, '').classes
  heads = [head for head in CLASSIFIERS if (head,) in classes]
  return next((head for head in heads if named.endswith(classes[(head,)])), '')


def labels_in(content: dict, source) -> tuple[list[str], str]:
  """The labels by index ([] if not named) and the problem type ('' likewise) of a config."""
  try:
    named = {int(i): str(name) for i, name in (content.get('id2label') or {}).items()}
    return [named[i] for i in range(len(named))], content.get('problem_type') or ''
  except (KeyError, ValueError, AttributeError) as error:
    raise ValueError(f'{source}: id2label must name 0..C-1, got {content["id2label"]}.') from error


def _class(family, config, heads, pooler):
  """Their class for a model with these heads; says so where none has exactly these parts."""
  name = family.classes.get(heads)
  if name is None:
    task = tuple(head for head in heads if head in TASK_HEADS)[:1]
    name = family.classes.get(task or heads[:1], family.classes[()])
    _log.warning(
      'transformers has no class with the heads %s; saved as %s', heads, family.name + name
    )
  elif pooler and heads and not set(heads) & set(config.pooled_heads):
    _log.warning("%s has no pooler: transformers will not read this model's", family.name + name)
  return name
