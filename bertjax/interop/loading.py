"""Weights of any kind: a model directory, a folder of Hugging Face's or Google's, a hub name.

A model directory is what Hugging Face reads: config, weights, vocabulary and tokenizer files.
"""

import logging

import flax.traverse_util
import numpy as np
from etils import epath

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import checkpoints, files, google, huggingface, sentences
from bertjax.model.config import HEAD_FIELDS, EncoderConfig

_log = logging.getLogger(__name__)

save_model = huggingface.save_hf

# Tables with a row for each piece of the vocabulary, and the one with a row for each position.
_BY_PIECE = ('vocab_size', (('encoder', 'embeddings', 'word', 'embedding'), ('mlm', 'bias')))
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
  found = checkpoints.find_checkpoint(folder)
  _log.info(
    '%s has no model/ yet; reading its newest checkpoint, %s (bertjax convert --from=%s '
    '--checkpoint=N --out=DIR makes a model of another)', folder, found.name, folder,
  )  # fmt: skip
  return found


def load_model(source, *, heads=None, gelu: str = 'erf') -> tuple[EncoderConfig, dict, Tokenizer]:
  """Reads a model of any kind: (config, params as NumPy float32, tokenizer).

  Args:
    source: a folder, a run's workdir, a prefix of Google's, or a hub name.
    heads: heads to load, see `load_hf`; None takes all there are.
    gelu: for Google's checkpoints, see `interop.google`.

  Raises:
    ValueError: if a file is missing, corrupt or of another architecture; names it.
  """
  source = find_model(source)
  config, params = load_weights(source, heads=heads, gelu=gelu)
  tokenizer = load_tokenizer(source)
  huggingface.check_vocabulary(config, tokenizer, source)
  return config, params, tokenizer


def load_weights(source, *, heads=None, gelu: str = 'erf') -> tuple[EncoderConfig, dict]:
  """The config and parameters of a model of any kind."""
  source = find_model(source)
  if checkpoints.is_checkpoint(source):
    return checkpoints.load_checkpoint(source, heads=heads)
  if google.is_google(source):
    return google.load_google(source, heads=heads, gelu=gelu)
  return huggingface.load_hf(source, heads=heads)


def load_tokenizer(source, lowercase: bool | None = None) -> Tokenizer:
  """The tokenizer beside the weights; `lowercase` overrides what the files say."""
  source = find_model(source)
  if checkpoints.is_checkpoint(source):
    source = epath.Path(source).parent.parent / 'tokenizer'
  if google.is_google(source):
    return google.load_tokenizer(source, lowercase)
  return Tokenizer.from_dir(huggingface.find_directory(source), lowercase=lowercase)


def read_labels(source) -> tuple[list[str], str]:
  """The labels by index ([] if not named) and Hugging Face's problem type ('' likewise)."""
  source = find_model(source)
  if checkpoints.is_checkpoint(source):
    model = checkpoints.read_model(source)
    return model['labels'], model['problem_type']
  if google.is_google(source):
    path = google.locate(source)[0] / 'bert_config.json'
  else:
    path = huggingface.find_directory(source) / 'config.json'
  return huggingface.labels_in(files.read_json(path), path)


def read_sentence_layers(source) -> sentences.SentenceLayers | None:
  """What sentence-transformers puts after the encoder; None for models of other libraries."""
  source = find_model(source)
  if not has_sentence_layers(source):
    return None
  return sentences.read_layers(huggingface.find_root(source))


def has_sentence_layers(source) -> bool:
  """Whether a model has sentence-transformers' list of modules."""
  if google.is_google(source) or checkpoints.is_checkpoint(source):
    return False
  return (huggingface.find_root(source) / 'modules.json').is_file()


def load_params(
  source,
  bert,
  *,
  initial: dict | None = None,
  fresh: tuple[str, ...] = (),
  redraw: tuple[str, ...] = (),
  tokenizer: Tokenizer | None = None,
  resize: bool = False,
  weights: tuple[EncoderConfig, dict] | None = None,
) -> dict:
  """The parameters of a model of any kind for `bert`, a `Bert` module.

  With `resize`, a piece that both vocabularies have keeps its rows (of the word table and the
  masked-LM bias) bit for bit, wherever it stands; so does a position below both lengths. All other
  rows are those of `initial`.

  Args:
    source: as for `load_model`.
    bert: the module.
    initial: freshly drawn parameters of `bert`; `fresh` and `resize` take from them.
    fresh: parts ('classification', 'pooler', ...) to take from `initial` if the source lacks them.
    redraw: parts to take from `initial` in any case.
    tokenizer: of this run; the source's must be the same but for `resize`.
    resize: may the vocabulary and the position table differ?
    weights: what `load_weights` read from the source, if it did already.

  Raises:
    ValueError: if anything else differs from the module's config, or a head is missing.
  """
  gelu = 'tanh' if bert.config.activation == 'gelu_tanh' else 'erf'
  config, params = weights or load_weights(source, gelu=gelu)
  resizable = ('vocab_size', 'max_positions') if resize else ()
  _check_sizes(config, bert.config, source, resizable)
  params = {name: part for name, part in params.items() if name not in redraw}
  _check_task_head(config, bert, params, source)
  params = _check_heads(params, bert, source, (*fresh, *redraw), initial)
  pieces = _match_pieces(source, config, bert.config, tokenizer, resize)
  count = min(config.max_positions, bert.config.max_positions)
  positions = None if config.max_positions == bert.config.max_positions else [np.arange(count)] * 2
  for rows, (name, paths) in ((pieces, _BY_PIECE), (positions, _BY_POSITION)):
    if rows is not None:
      _log.info('%s: %s rows kept of %s', source, len(rows[0]), name)
      _move_rows(params, initial, paths, *rows)
  return params


def _check_sizes(config, wanted, source, resizable):
  sizes = ('vocab_size', 'hidden_size', 'num_layers', 'num_heads', 'mlp_size', 'max_positions',
           'type_vocab_size', 'activation', 'layer_norm_eps')  # fmt: skip
  for name in sizes:
    ours, theirs = getattr(wanted, name), getattr(config, name)
    if ours != theirs and name not in resizable:
      request = ' (or --config.init_resize=True)' if name in ('vocab_size', 'max_positions') else ''
      raise ValueError(
        f'{source} has {name}={theirs}, this run wants {ours}; set '
        f'--config.model.{name}={theirs}{request}.'
      )


def _check_task_head(config, bert, params, source):
  for name in HEAD_FIELDS:
    ours, theirs = getattr(bert.config, name), getattr(config, name)
    if ours != theirs and set(bert.heads) & set(params) - {'mlm', 'nsp'}:
      raise ValueError(
        f"{source} has a head with {name}={theirs!r}, this run's has {ours!r}; set "
        f'--config.model.{name}={theirs}, or --config.reinit_head=True for a new head.'
      )


def _check_heads(params, bert, source, fresh, initial):
  wanted = ['encoder', *(['pooler'] if bert.pooler else []), *bert.heads]
  missing = [name for name in wanted if name not in params]
  refused = [name for name in missing if name not in fresh]
  if refused:
    raise ValueError(f'{source} has no {refused}; it has {sorted(params)}.')
  if missing:
    _log.info('not in %s, re-initialised: %s', source, ', '.join(missing))
  return {name: initial[name] if name in missing else params[name] for name in wanted}


def _match_pieces(source, config, wanted, tokenizer, resize):
  """(rows of theirs, rows of ours) that hold the same pieces; None if the tables are the same."""
  if tokenizer is None:
    if config.vocab_size != wanted.vocab_size:
      raise ValueError(f'{source} has vocab_size={config.vocab_size}; give a tokenizer to resize.')
    return None
  theirs = load_tokenizer(source)
  if theirs.lowercase != tokenizer.lowercase:
    raise ValueError(
      f'{source} has a tokenizer with lowercase={theirs.lowercase}, this run one with '
      f'{tokenizer.lowercase}; set --config.data.lowercase={theirs.lowercase}.'
    )
  own_rules = not (theirs.standard and tokenizer.standard)
  if own_rules and not resize and theirs.fingerprint != tokenizer.fingerprint:
    raise ValueError(
      f'the tokenizer of {source} has added tokens or rules of its own; take it whole by '
      '--config.data.vocab=FOLDER, the folder of the model.'
    )
  if theirs.vocab == tokenizer.vocab and config.vocab_size == wanted.vocab_size:
    return None
  if not resize:
    raise ValueError(
      f'{source} has another vocabulary than this run; take its own for --config.data.vocab, or '
      'set --config.init_resize=True to keep the rows of the pieces they share.'
    )
  places = {piece: row for row, piece in enumerate(theirs.vocab) if piece}
  pairs = [(places[p], row) for row, p in enumerate(tokenizer.vocab) if p in places]
  return np.array(pairs, int).reshape(-1, 2).T


def _move_rows(params, initial, paths, theirs, ours):
  """Replaces tables of theirs by those of `initial` with the shared rows put in."""
  for *parents, leaf in paths:
    if parents[0] not in params:
      continue
    old, new = params, initial
    for name in parents:
      old, new = old[name], new[name]
    table = np.array(new[leaf])
    table[ours] = old[leaf][theirs]
    old[leaf] = table


def reinit_top_layers(params: dict, drawn: dict, count: int) -> dict:
  """The parameters with the top `count` layers of `drawn` in place of their own."""
  if not count:
    return params
  flat, new = (flax.traverse_util.flatten_dict(tree) for tree in (params, drawn))
  for path in flat:
    if path[:2] == ('encoder', 'layers'):
      flat[path] = np.concatenate([flat[path][:-count], new[path][-count:]])
  return flax.traverse_util.unflatten_dict(flat)
