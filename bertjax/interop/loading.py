"""Weights of any kind: a model directory, a folder of Hugging Face's or Google's, a hub name.

A model directory is what Hugging Face reads: config, weights, vocabulary and tokenizer files. A
checkpoint is WORKDIR/checkpoints/STEP of a run, written by `training.checkpoint`: its parameters
are read without the moments, its `meta` carries the model's config and labels, and the tokenizer is
WORKDIR/tokenizer. A folder of PEFT's has adapters, which are merged with the base model that it
names; so are those in a checkpoint of a run with LoRA.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import re
from collections.abc import Sequence

import flax.traverse_util
import jax
import numpy as np
from etils import epath

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import files, google, hub, huggingface, mapping, peft, sentences
from bertjax.model.config import HEAD_FIELDS, HEADS, LABELLED_HEADS, TASK_HEADS, EncoderConfig
from bertjax.model.heads import Bert, generator_params
from bertjax.model.lora import Adapters

_log = logging.getLogger(__name__)

_TOKENIZERS = ('tokenizer.json', 'vocab.txt', 'spiece.model', 'vocab.json')  # one is in a folder

# What a model's weights depend on.
_SIZES = ('vocab_size', 'hidden_size', 'num_layers', 'num_heads', 'mlp_size', 'max_positions',
          'position_offset', 'relative_buckets', 'type_vocab_size', 'embedding_size',
          'shared_layers', 'activation', 'classifier_hidden', 'classifier_norm',
          'classifier_pooling', 'tied_embeddings', 'mlm_transform', 'mlm_bias', 'layer_norm_eps',
          'num_kv_heads', 'positions', 'local_window', 'global_every', 'norm', 'norm_bias',
          'norm_position', 'embedding_norm', 'linear_bias', 'gated_mlp', 'rope_theta',
          'local_rope_theta')  # fmt: skip
# Tables with a row for each token of the vocabulary, and the one with a row for each position.
_BY_TOKEN = ('vocab_size', (('encoder', 'embeddings', 'word', 'embedding'), ('mlm', 'bias'),
                            ('mlm', 'output', 'embedding')))  # fmt: skip
_BY_POSITION = ('max_positions', (('encoder', 'embeddings', 'position', 'embedding'),))


def find_model(source):
  """Returns the model of a source: WORKDIR/model of a run's workdir, or its newest checkpoint where
  that is not written yet; else the source.

  `load_model`, `load_weights`, `load_tokenizer` and `read_labels` call it, so every program accepts
  a workdir, or a checkpoint WORKDIR/checkpoints/STEP, where it accepts a model.

  Raises:
    ValueError: if the name is empty, or the run has neither.
  """
  if not str(source):
    raise ValueError("no model is named: give a folder, a run's workdir or a hub name.")
  folder = epath.Path(source)
  if not (folder / 'run.json').is_file() or (folder / 'config.json').is_file():
    return source
  if (folder / 'model' / 'config.json').is_file():
    return folder / 'model'
  found = find_checkpoint(folder)
  _log.info(
    '%s has no model/ yet; reading its newest checkpoint, %s (bertjax convert --from=%s '
    '--checkpoint=N --out=DIR makes a model of another)', folder, found.name, folder,
  )  # fmt: skip
  return found


def load_model(
  source, *, heads: Sequence[str] | None = None, gelu: str = 'erf', lowercase: bool | None = None,
  base: str = '',
) -> tuple[Bert, dict, Tokenizer]:  # fmt: skip
  """Loads a model of any kind: (module, parameters, tokenizer).

  The module has the heads and the pooler that the files have. Parameters are float32 NumPy arrays,
  a nested dict; narrower ones are widened (logged).

  >>> import bertjax
  >>> model, params, tokenizer = bertjax.load_model(folder)
  >>> model.heads
  ('mlm', 'nsp')
  >>> out = model.apply({'params': params}, tokenizer(['A sentence.', 'Another one.']))
  >>> out['pooled'].shape == (2, model.config.hidden_size)
  True

  Args:
    source: a model directory, a run's workdir, a checkpoint WORKDIR/checkpoints/STEP, a folder of
      Hugging Face's or Google's, a prefix of Google's, or a hub name ('bert-base-uncased',
      'name@revision'; `HF_HUB_OFFLINE=1` reads the local cache only). A folder of PEFT's gives the
      merged model.
    heads: heads to load, names out of `model.config.HEADS`; None loads all. Required where the file
      has a `classifier.weight` and `config.json` does not say which head it is.
    gelu: 'erf' or 'tanh', the form that 'gelu' means in Google's files; see `interop.google`.
    lowercase: overrides the case of the tokenizer's files.
    base: base model of PEFT's adapters; '' = the one that they name.

  Raises:
    ValueError: if a file is missing, corrupt or of another architecture, or a head is missing;
      names the file, and the heads that it has.
  """
  source = find_model(source)
  config, params = load_weights(source, heads=heads, gelu=gelu, base=base)
  tokenizer = load_tokenizer(source, lowercase, base)
  huggingface.check_vocabulary(config, tokenizer, source)
  counts = {head: params[head]['bias'].size for head in LABELLED_HEADS if head in params}
  if len(set(counts.values())) > 1:
    raise ValueError(f'{source} has heads with {counts} labels; load one of them by heads=(NAME,).')
  found = tuple(head for head in HEADS if head in params)
  model = Bert(config, found, pooler='pooler' in params, num_labels=max(counts.values(), default=2))
  return model, params, tokenizer


def save_model(
  directory, model: Bert, params: dict, tokenizer: Tokenizer, *, labels: Sequence[str] = (),
  problem_type: str = '', format: str = 'hf', sentence: dict | None = None, card: str = '',
) -> None:  # fmt: skip
  """Writes a model directory, which `load_model` and transformers' `from_pretrained` read.

  An older model in the same directory is replaced once the new one is complete.

  >>> import bertjax
  >>> bertjax.save_model(new_folder, *bertjax.load_model(folder))

  Args:
    directory: directory to write.
    model: the module; its `config` is saved.
    params: its parameters, host or device arrays.
    tokenizer: its tokenizer.
    labels: class names of the 'classification' or 'tagging' head, by index.
    problem_type: transformers' 'regression', 'single_label_classification' or
      'multi_label_classification'; '' leaves it out.
    format: 'hf' (config.json, model.safetensors, tokenizer files) or 'google' (bert_config.json,
      bert_model.ckpt.*, vocab.txt; needs TensorFlow).
    sentence: {'pooling': 'mean', 'cls' or 'last', 'prompts': {name: text}, 'max_length': tokens} of
      an embedding model, or {'activation': 'sigmoid' or 'identity'} of a reranker; format 'hf' then
      writes what sentence-transformers reads too.
    card: text of README.md, such as `interop.hub.model_card` makes; '' writes none.

  Raises:
    ValueError: if the directory holds something else, the parameters are not those of the model,
      or the format has no such model.
  """
  savers = {'hf': huggingface.save_hf, 'google': google.save_google}
  if format not in savers:
    raise ValueError(f"format must be 'hf' or 'google', got {format!r}.")
  if not isinstance(model, Bert):
    raise TypeError(f'save_model takes a bertjax.Bert, got a {type(model).__name__}.')
  parts = {'encoder', *model.heads, *(['pooler'] if model.pooler else [])}
  if params.keys() != parts:
    raise ValueError(
      f'params has the parts {sorted(params)}, but the model consists of {sorted(parts)}; a model '
      'directory has no place for others.'
    )
  if (sentence or card) and format != 'hf':
    raise ValueError(
      f"pooling, prompts, activation and cards are written in format 'hf' only, got {format!r}."
    )
  extra = {'sentence': sentence, 'card': card} if format == 'hf' else {}
  savers[format](
    directory, model.config, params, tokenizer, labels=labels, problem_type=problem_type, **extra
  )


def load_weights(
  source, *, heads=None, gelu: str = 'erf', base: str = ''
) -> tuple[EncoderConfig, dict]:
  """The config and parameters of a model of any kind."""
  source = find_model(source)
  adapted = 'lora' in _read_model(source) if is_checkpoint(source) else is_peft(source)
  if base and not adapted:
    raise ValueError(f'{source} is a complete model, not adapters of the base model {base}.')
  if is_checkpoint(source):
    return load_checkpoint(source, heads=heads, base=base)
  if google.is_google(source):
    return google.load_google(source, heads=heads, gelu=gelu)
  if is_peft(source):
    return load_peft(source, base, heads)
  return huggingface.load_hf(source, heads=heads)


def load_peft(source, base: str = '', heads=None) -> tuple[EncoderConfig, dict]:
  """The config and parameters of PEFT's adapters, merged with their base model.

  Args:
    source: PEFT's folder, or a hub name.
    base: the base model, of any kind; '' = the one that the folder names.
    heads: as for `load_model`.

  Raises:
    ValueError: if the base model cannot be read or is another one, or the adapters are of a kind
      that is not supported.
  """
  folder = hub.find_directory(source)
  base = _base_of(folder, base)
  return peft.merge(folder, *_read_base(folder, base), heads)


def _read_base(source, base: str) -> tuple[EncoderConfig, dict]:
  """The base model of adapters."""
  _log.info('%s: adapters of the base model %s', source, base)
  try:
    return load_weights(base)
  except ValueError as error:
    raise ValueError(
      f'{source} has adapters, and their base model {base!r} cannot be read ({error}) Name it: '
      'bertjax convert --from=ADAPTERS --base=MODEL --out=DIR.'
    ) from error


def _base_of(folder, base: str = '') -> str:
  """The base model of PEFT's folder."""
  if named := base or peft.read_settings(folder)[0].base:
    return named
  raise ValueError(
    f'{folder / peft.CONFIG} names no base model; name it: bertjax convert --from=ADAPTERS '
    '--base=MODEL --out=DIR.'
  )


def is_peft(source) -> bool:
  """Whether a model is a folder of PEFT's, adapters without their base model."""
  if is_checkpoint(source) or google.is_google(source):
    return False
  return (hub.find_directory(source) / peft.CONFIG).is_file()


def load_tokenizer(source, lowercase: bool | None = None, base: str = '') -> Tokenizer:
  """The tokenizer beside the weights, or that of a base model, see `load_peft`; `lowercase`
  overrides what the files say."""
  source = find_model(source)
  if is_checkpoint(source):
    source = epath.Path(source).parent.parent / 'tokenizer'
  if google.is_google(source):
    return google.load_tokenizer(source, lowercase)
  folder = hub.find_directory(source)
  if is_peft(source) and not any((folder / name).exists() for name in _TOKENIZERS):
    return load_tokenizer(base or _base_of(folder), lowercase)
  return Tokenizer.from_dir(folder, lowercase=lowercase)


def read_labels(source) -> tuple[list[str], str]:
  """The labels by index ([] if not named) and Hugging Face's problem type ('' likewise)."""
  source = find_model(source)
  if is_checkpoint(source):
    model = _read_model(source)
    return model['labels'], model['problem_type']
  if google.is_google(source):
    path = google.config_file(google.locate(source)[0])
  else:
    path = hub.find_directory(source) / 'config.json'
  if not path.exists() and is_peft(source):
    return [], ''  # PEFT writes none
  return huggingface.labels_in(files.read_json(path), path)


def read_sentence_layers(source) -> sentences.SentenceLayers | None:
  """What sentence-transformers puts after the encoder; None for models of other libraries."""
  source = find_model(source)
  if is_checkpoint(source):
    facts = _read_model(source).get('sentence') or {}
    steps = (sentences.normalise,)
    return sentences.SentenceLayers(steps=steps, **facts) if 'pooling' in facts else None
  return sentences.read_layers(hub.find_root(source)) if has_sentence_layers(source) else None


def has_sentence_layers(source) -> bool:
  """Whether a model has sentence-transformers' list of modules."""
  if is_checkpoint(source):
    return 'pooling' in _read_model(source).get('sentence', ())
  if google.is_google(source):
    return False
  root = hub.find_root(source)
  return (root / 'modules.json').is_file() and not sentences.is_cross_encoder(root)


def read_activation(source) -> str:
  """The activation of a reranker's scores, 'sigmoid' or 'identity'; '' if the files name none."""
  source = find_model(source)
  if is_checkpoint(source):
    return _read_model(source).get('sentence', {}).get('activation', '')
  return '' if google.is_google(source) else sentences.read_activation(hub.find_root(source))


def is_huggingface(source) -> bool:
  """Whether transformers can load a model: a folder with a complete model, or a hub name."""
  if is_checkpoint(source) or google.is_google(source) or is_peft(source):
    return False
  return (hub.find_directory(source) / 'config.json').is_file()


def is_checkpoint(source) -> bool:
  folder = epath.Path(source)
  return (folder / 'state').is_dir() and (folder / 'meta' / 'metadata').is_file()


def find_checkpoint(workdir, step: int | None = None) -> epath.Path:
  """The checkpoint of a step of a run; None takes the newest.

  Raises:
    ValueError: if there is none; lists the steps there are.
  """
  folder = epath.Path(workdir) / 'checkpoints'
  found = folder.iterdir() if folder.is_dir() else ()
  steps = sorted(int(p.name) for p in found if p.name.isdigit() and is_checkpoint(p))
  if not steps:
    raise ValueError(
      f'{workdir} has no complete checkpoint; once the run has saved one, `bertjax convert '
      f'--from={workdir} --checkpoint=N --out=DIR` makes a model of it.'
    )
  if step not in (None, *steps):
    raise ValueError(f'{workdir} has no checkpoint of step {step}; those kept are {steps}.')
  return folder / str(steps[-1] if step is None else step)


def _read_model(folder) -> dict:
  """What a checkpoint says of its model: 'config', 'labels', 'problem_type', 'trials'."""
  meta = _read_meta(folder)
  if 'model' not in meta:
    raise ValueError(f'{folder} does not name its model; it is of an earlier version.')
  return meta['model']


def load_checkpoint(folder, heads=None, base: str = '') -> tuple[EncoderConfig, dict]:
  """The config and parameters (NumPy) of a checkpoint, each array compared with its checksum.

  They are the average of the parameters if the optimizer keeps one, as in the model of the run.

  Args:
    folder: WORKDIR/checkpoints/STEP.
    heads: heads to keep; None keeps all there are.
    base: base model of adapters; '' = that of the run.

  Raises:
    ValueError: if an array is corrupt, a head is missing, or the checkpoint is of several trials.
  """
  model, folder = _read_model(folder), epath.Path(folder).resolve()
  if model['trials'] > 1:
    raise ValueError(
      f'{folder} holds {model["trials"]} trials; only the best one is a model, in the model/ that '
      'the run writes.'
    )
  import orbax.checkpoint as ocp  # here: most readers of models need none

  _log.info('reading %s', folder)
  reader, sums = ocp.PyTreeCheckpointHandler(), _read_meta(folder)['checksums']
  averages = (re.match(r'opt_state/\d+/average/', path) for path in sums)
  root = next((found[0] for found in averages if found), 'params/')
  name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  try:
    tree = reader.metadata(folder / 'state').tree
    item = jax.tree.map_with_path(
      lambda path, _: 0 if name(path).startswith(root) else ocp.PLACEHOLDER, tree
    )
    arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    args = ocp.args.PyTreeRestore(item=item, restore_args=arrays)
    state = reader.restore(folder / 'state', args=args)
  except Exception as error:  # orbax, tensorstore and json each raise their own
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    raise ValueError(f'{folder} cannot be read ({reason[:200]}).') from error
  found = {name(path): array for path, array in jax.tree_util.tree_leaves_with_path(state)}
  found = {path: array for path, array in found.items() if path.startswith(root)}
  for path, array in found.items():
    if sums.get(path) != _checksum(array):
      raise ValueError(f'{folder} is corrupt: {path} differs from its checksum.')
  params = flax.traverse_util.unflatten_dict(
    {path.removeprefix(root): array for path, array in found.items()}, sep='/'
  )
  if 'generator' in params:  # of ELECTRA: the model with the masked-LM head
    if 'mlm' in (heads or ()):
      model, params = model['generator'], generator_params(params)
    params.pop('generator', None)
  config = EncoderConfig(**model['config'])
  if 'lora' in model:
    params = _with_base(params, config, model['lora'] | ({'base': base} if base else {}), folder)
  huggingface.check_heads(heads or (), params, folder)
  kept = params.keys() if heads is None else {'encoder', 'pooler', *heads}
  return config, {k: v for k, v in params.items() if k in kept}


def _with_base(params: dict, config: EncoderConfig, facts: dict, folder) -> dict:
  """The parameters of a checkpoint of adapters, merged with those of its base model."""
  _, base = _read_base(folder, facts['base'])
  base = {name: base[name] for name in facts['frozen'] if name in base}
  if digest_of(base) != facts['digest']:
    raise ValueError(
      f'{folder} has adapters of the base model {facts["base"]}, which has changed since; put the '
      'model of the run there.'
    )
  known = mapping.matrices(config, 'pooler' in base)
  matrices = {name: known[name][0] for name in facts['matrices']}
  adapters = Adapters(matrices, facts['rank'], facts['scale'])
  return jax.tree.map(np.asarray, adapters.complete(params | {'base': base}))


def digest_of(params: dict) -> str:
  """A hash of parameters, by which a base model is known again."""
  digest, flat = hashlib.sha256(), flax.traverse_util.flatten_dict(params, sep='/')
  for path in sorted(flat):
    digest.update(path.encode() + np.ascontiguousarray(flat[path]).tobytes())
  return digest.hexdigest()[:16]


def _read_meta(folder) -> dict:
  return json.loads((epath.Path(folder) / 'meta' / 'metadata').read_text())


def _checksum(array: np.ndarray) -> int:
  """As `training.checkpoint.checksums` of an array."""
  bits = array.view(f'uint{8 * array.dtype.itemsize}').astype(np.uint32).reshape(-1)
  odd = 2 * np.arange(bits.size, dtype=np.uint32) + 1
  return int((bits * odd).sum(dtype=np.uint32))


def load_params(
  source, bert: Bert, *, initial: dict | None = None, fresh: tuple[str, ...] = (),
  reinit: tuple[str, ...] = (), tokenizer: Tokenizer | None = None, resize: bool = False,
  weights: tuple[EncoderConfig, dict] | None = None,
) -> dict:  # fmt: skip
  """The parameters of a model of any kind for `bert`, a `Bert` module.

  With `resize`, a token of both vocabularies keeps its rows (of the word table and the masked-LM
  bias) bit for bit, whatever its index; so does a position below both lengths. All other
  rows are those of `initial`.

  Args:
    source: as for `load_model`.
    bert: the module.
    initial: newly initialised parameters of `bert`; `fresh` and `resize` take from them.
    fresh: parts ('classification', 'pooler', ...) to take from `initial` if the source lacks them.
    reinit: parts to take from `initial` in all cases.
    tokenizer: of this run; the source's must be the same but for `resize`.
    resize: may the vocabulary and the position table differ?
    weights: what `load_weights` read from the source, if it did already.

  Raises:
    ValueError: if anything else differs from the module's config, or a head is missing.
  """
  gelu = 'tanh' if bert.config.activation == 'gelu_tanh' else 'erf'
  config, params = weights or load_weights(source, gelu=gelu)
  _check_config(config, bert, params, source, resize, reinit)
  wanted = ['encoder', *(['pooler'] if bert.pooler else []), *bert.heads]
  missing = [name for name in wanted if name not in params or name in reinit]
  if refused := [name for name in missing if name not in (*fresh, *reinit)]:
    raise ValueError(f'{source} has no {refused}; it has {sorted(params)}.')
  if missing:
    _log.info('not in %s, re-initialised: %s', source, ', '.join(missing))
  params = {name: initial[name] if name in missing else params[name] for name in wanted}
  tokens = _match_tokens(source, config, bert.config, tokenizer, resize)
  count = bert.config.position_offset + min(config.max_positions, bert.config.max_positions)
  positions = None if config.max_positions == bert.config.max_positions else [np.arange(count)] * 2
  for rows, (name, paths) in ((tokens, _BY_TOKEN), (positions, _BY_POSITION)):
    if rows is not None:
      _log.info('%s: %s rows kept of %s', source, len(rows[0]), name)
      params = _move_rows(params, initial, paths, *rows)
  return params


def _check_config(config, bert, params, source, resize, reinit):
  """Raises ValueError if a model of `config` and `params` is not one for `bert`."""
  has_head = set(bert.heads) & set(params) & set(TASK_HEADS) - set(reinit)
  for name in (*_SIZES, *(HEAD_FIELDS if has_head else ())):
    ours, theirs = getattr(bert.config, name), getattr(config, name)
    resizable = name in ('vocab_size', 'max_positions')
    if ours == theirs or (resizable and resize):
      continue
    if name in HEAD_FIELDS:
      raise ValueError(
        f"{source} has a head with {name}={theirs!r}, this run's has {ours!r}; set "
        f'--config.model.{name}={theirs}, or --config.reinit_head=True for a new head.'
      )
    request = ' (or --config.init_resize=True)' if resizable else ''
    raise ValueError(
      f'{source} has {name}={theirs}, this run wants {ours}; set '
      f'--config.model.{name}={theirs}{request}.'
    )


def _match_tokens(source, config, wanted, tokenizer, resize):
  """(rows of theirs, rows of ours) that hold the same tokens; None if the tables are the same."""
  if tokenizer is None:
    if config.vocab_size != wanted.vocab_size:
      raise ValueError(f'{source} has vocab_size={config.vocab_size}; give a tokenizer to resize.')
    return None
  theirs = load_tokenizer(source)
  huggingface.check_vocabulary(config, theirs, source)
  if theirs.lowercase != tokenizer.lowercase:
    raise ValueError(
      f'{source} has a tokenizer with lowercase={theirs.lowercase}, this run one with '
      f'{tokenizer.lowercase}; set --config.data.lowercase={theirs.lowercase}.'
    )
  own_rules = not (theirs.standard and tokenizer.standard)
  if own_rules and not resize and theirs.fingerprint != tokenizer.fingerprint:
    raise ValueError(
      f'the tokenizer of {source} has added tokens or special rules; use it with '
      '--config.data.vocab=FOLDER, the folder of the model.'
    )
  if theirs.vocab == tokenizer.vocab and config.vocab_size == wanted.vocab_size:
    return None
  if not resize:
    raise ValueError(
      f'{source} has another vocabulary than this run; use it with --config.data.vocab, or set '
      '--config.init_resize=True to keep the rows of the tokens in both.'
    )
  indices = {token: row for row, token in enumerate(theirs.vocab) if token}
  pairs = [(indices[t], row) for row, t in enumerate(tokenizer.vocab) if t in indices]
  return np.array(pairs, int).reshape(-1, 2).T


def _move_rows(params, initial, paths, theirs, ours):
  """The parameters with tables of `initial`, into which the shared rows are put."""
  flat, new = (flax.traverse_util.flatten_dict(tree) for tree in (params, initial))
  for path in set(paths) & set(flat):
    table = np.array(new[path])
    table[ours] = flat[path][theirs]
    flat[path] = table
  return flax.traverse_util.unflatten_dict(flat)


def take_layers(
  config: EncoderConfig, params: dict, layers: Sequence[int], source
) -> tuple[EncoderConfig, dict]:
  """A model with some of the layers of another, such as every second one, in the order given.

  Raises:
    ValueError: for a layer that is not there, or a model whose layers differ or share weights.
  """
  if wrong := [number for number in layers if not 0 <= number < config.num_layers]:
    raise ValueError(
      f'init_layers has {wrong[0]}, and the {config.num_layers} layers of {source} are numbered '
      f'from 0 to {config.num_layers - 1}.'
    )
  if config.shared_layers or config.patterned:
    raise ValueError(f'the layers of {source} are not all of one kind; leave init_layers out.')
  stacked = jax.tree.map(lambda x: x[np.array(layers)], params['encoder']['layers'])
  params = params | {'encoder': params['encoder'] | {'layers': stacked}}
  return dataclasses.replace(config, num_layers=len(layers)), params


def reinit_top_layers(params: dict, drawn: dict, count: int, shared: bool = False) -> dict:
  """The parameters with the top `count` layers replaced by those of `drawn`; shared ones all."""
  if not count:
    return params
  flat, new = (flax.traverse_util.flatten_dict(tree) for tree in (params, drawn))
  for path in flat:
    if path[:2] == ('encoder', 'layers'):
      top = new[path][-count:]
      flat[path] = new[path] if shared else np.concatenate([flat[path][:-count], top])
  return flax.traverse_util.unflatten_dict(flat)
