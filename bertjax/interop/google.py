"""Google's TF1 checkpoints of BERT and ALBERT: bert_config.json or albert_config.json,
bert_model.ckpt.* or another checkpoint, vocab.txt or a SentencePiece model.

Which GELU: the checkpoints released in October and November 2018 were trained with the exact (erf)
form; Google's code has computed the tanh form since February 2019 (commit bee6030). The file says
'gelu' for both. The rule here: erf, unless `gelu='tanh'` is given; use that for models which the
later code trained. ALBERT's code has known the tanh form only.
"""

import json
import logging
import os
import re

from etils import epath

from bertjax import io
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import families, files, huggingface
from bertjax.model.config import EncoderConfig

_log = logging.getLogger(__name__)

_NAME = 'bert_model.ckpt'
_CONFIGS = {'bert': 'bert_config.json', 'albert': 'albert_config.json'}
_GELU = {'erf': 'gelu', 'tanh': 'gelu_new'}
# Endings of a checkpoint's files, which people take for the checkpoint.
_FILES = re.compile(r'\.(index|meta|data-\d{5}-of-\d{5})$')
# Moments of AdamWeightDecay and LAMB, of TensorFlow's own Adam, and counters.
_SLOTS = re.compile(r'(/(adam_[mv]|lamb_[mv]|Adam|Adam_1)|^(global_step|beta[12]_power))$')


def is_google(path) -> bool:
  """Is this a folder with Google's files, or the prefix of a checkpoint ('DIR/model.ckpt-343') or
  one of its files ('DIR/model.ckpt-343.index')?"""
  path = epath.Path(_FILES.sub('', str(path)))
  own = any((path / name).is_file() for name in _CONFIGS.values())
  return (own and not (path / 'config.json').is_file()) or _is_checkpoint(path)


def config_file(folder) -> epath.Path:
  """The config of a folder of Google's, `bert_config.json` or `albert_config.json`."""
  folder = epath.Path(folder)
  found = [folder / name for name in _CONFIGS.values() if (folder / name).is_file()]
  return found[0] if found else folder / _CONFIGS['bert']


def load_google(path, *, heads=None, gelu: str = 'erf') -> tuple[EncoderConfig, dict]:
  """Loads a BERT or ALBERT of Google's: (config, params as NumPy float32).

  Args:
    path: a folder with its config and `bert_model.ckpt.*` (or the newest checkpoint of its
      `checkpoint` file, or a single one), or a checkpoint's prefix or one of its files, with
      the config beside it.
    heads: heads to load; None takes all there are, and `output_weights` for 'classification'.
    gelu: 'erf' or 'tanh', what 'gelu' in `bert_config.json` stands for; see the module.

  Raises:
    ValueError: if a file is missing, corrupt or none of Google's, or a tensor is missing or of a
      wrong shape; names file and tensor.
  """
  folder, prefix = locate(path)
  _log.info("reading Google's %s", prefix)
  source = config_file(folder)
  content = files.read_json(source)
  config = _config(content, str(source), gelu)
  tensors = _read_checkpoint(prefix)
  found = huggingface.find_heads(config, tensors, 'google', content, prefix, heads)
  return config, huggingface.from_tensors(config, tensors, found, prefix, 'google')


def save_google(
  directory, config: EncoderConfig, params: dict, tokenizer: Tokenizer, *, labels=(),
  problem_type: str = '',
) -> None:  # fmt: skip
  """Writes a folder with Google's files; an older one is replaced when this is complete.

  The config says 'gelu' for both forms, since Google's code knows no other name.

  Args:
    directory: where to.
    config: of the encoder.
    params: parameters as host or device arrays.
    tokenizer: its vocabulary is saved beside.
    labels: names of the classes of a 'classification' or 'tagging' head, by index.
    problem_type: Hugging Face's, which `bert_config.json` keeps.

  Raises:
    ValueError: if the folder holds something else, the parts do not fit each other, or Google's
      code has no such model.
  """
  if config.causal or config.layer_norm_eps != 1e-12:
    raise ValueError(
      "Google's code is bidirectional and has a layer_norm_eps of 1e-12, got causal="
      f'{config.causal}, layer_norm_eps={config.layer_norm_eps}; save it for Hugging Face.'
    )
  kind = families.family_of(config).model_type
  if kind not in _CONFIGS or (kind == 'albert' and config.activation != 'gelu_tanh'):
    raise ValueError(
      f"Google's code has BERT, and ALBERT with activation='gelu_tanh', got model_type {kind!r} "
      f'with activation={config.activation!r}; save it for Hugging Face.'
    )
  if huggingface.own_heads(config, params):
    raise ValueError(
      f"Google's code has no head with {huggingface.head_settings(config)}; save this model as a "
      'model directory.'
    )
  huggingface.check_vocabulary(config, tokenizer, 'the tokenizer')
  content = huggingface.config_to_json(config, params, tokenizer.pad_id, labels, problem_type)
  tensors = huggingface.to_tensors(config, params, 'google')
  if config.activation == 'gelu_tanh' and kind == 'bert':
    _log.warning("bert_config.json will say 'gelu'; read this model with gelu='tanh'.")
  tf = _tensorflow()
  with files.new_directory(directory, f'{_NAME}.index') as folder:
    text = json.dumps(content | {'hidden_act': 'gelu'}, indent=2)
    (folder / _CONFIGS[kind]).write_text(text + '\n')
    tf.raw_ops.SaveV2(
      prefix=os.fspath(folder / _NAME), tensor_names=list(tensors),
      shape_and_slices=[''] * len(tensors), tensors=list(tensors.values()),
    )  # fmt: skip
    tokenizer.save(folder, max_length=config.max_positions)


def load_tokenizer(path, lowercase: bool | None = None) -> Tokenizer:
  """The tokenizer of a folder of Google's.

  Args:
    path: as for `load_google`.
    lowercase: None takes it from `tokenizer_config.json`, or else from the vocabulary: without a
      token that has a capital letter A-Z, text is lower-cased (logged).
  """
  folder, _ = locate(path)
  if (folder / 'tokenizer_config.json').exists():
    return Tokenizer.from_dir(folder, lowercase=lowercase)
  models = sorted(folder.glob('*.model'))
  if models and not (folder / 'vocab.txt').is_file():  # ALBERT's English models are lower-cased
    return Tokenizer.from_file(models[0], lowercase=lowercase is not False)
  tokenizer = Tokenizer.from_file(folder / 'vocab.txt', lowercase=lowercase is not False)
  if lowercase is None:
    cased = any(re.search('[A-Z]', piece) for piece in tokenizer.vocab if piece[:1] != '[')
    _log.info('%s: %s, judging by its tokens', folder / 'vocab.txt', 'cased' if cased else 'lower')
    if cased:
      tokenizer = Tokenizer.from_file(folder / 'vocab.txt', lowercase=False)
  return tokenizer


def _config(content, source, gelu):
  if gelu not in _GELU:
    raise ValueError(f"gelu must be 'erf' or 'tanh', got {gelu!r}.")
  if 'hidden_size' not in content or 'vocab_size' not in content:
    raise ValueError(f'{source} is no BERT config: it has no hidden_size or no vocab_size.')
  if source.endswith(_CONFIGS['albert']):
    content, gelu = content | {'model_type': 'albert'}, 'tanh'
  content = {'type_vocab_size': 16} | content  # the default of Google's code
  if content.get('hidden_act', 'gelu') == 'gelu':
    content = content | {'hidden_act': _GELU[gelu]}
  return huggingface.config_from_json(content, source)


def _read_checkpoint(prefix) -> dict:
  """All variables but the optimizer's."""
  tf = _tensorflow()
  failures = (tf.errors.OpError, RuntimeError, IndexError)
  name = 'the index'
  try:
    reader = tf.train.load_checkpoint(os.fspath(prefix))
    names = sorted(reader.get_variable_to_shape_map())
    slots = {name for name in names if _SLOTS.search(name)}
    tensors = {}
    for name in names:
      if name not in slots:
        tensors[name] = reader.get_tensor(name)
  except failures as error:
    raise ValueError(f'{prefix} is corrupt at {name}: {str(error).splitlines()[0]}.') from error
  if '_CHECKPOINTABLE_OBJECT_GRAPH' in tensors:
    raise ValueError(f"{prefix} holds TensorFlow 2 objects, not the variables of Google's code.")
  if slots:
    _log.info("%s: skipped %d of the optimizer's tensors, %s ...", prefix, len(slots), min(slots))
  return tensors


def locate(path) -> tuple[epath.Path, epath.Path]:
  """The folder of a model of Google's and the prefix of its checkpoint.

  In a folder that is bert_model.ckpt, or the newest one that its `checkpoint` file names, or the
  only one.

  Raises:
    ValueError: if there is none, or several and nothing chooses among them; lists them.
  """
  path = epath.Path(_FILES.sub('', str(path)))
  if _is_checkpoint(path):
    return path.parent, path
  if _is_checkpoint(path / _NAME):
    return path, path / _NAME
  state = path / 'checkpoint'
  newest = state.is_file() and re.search(r'^model_checkpoint_path: "(.*)"', state.read_text(), re.M)
  if newest:
    return path, path / epath.Path(newest[1]).name
  found = sorted(file.name.removesuffix('.index') for file in path.glob('*.index'))
  if len(found) != 1:
    raise ValueError(
      f'{path} has no {_NAME}.index and no `checkpoint` file; '
      + (f'name one of {", ".join(str(path / name) for name in found)}.' if found else
         f'it holds {", ".join(sorted(file.name for file in path.iterdir()))}.')
    )  # fmt: skip
  return path, path / found[0]


def _is_checkpoint(prefix):
  return (prefix.parent / (prefix.name + '.index')).is_file()


def _tensorflow():
  return io.import_tensorflow(
    "Google's checkpoints need TensorFlow", 'convert them (bertjax convert)'
  )
