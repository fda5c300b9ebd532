"""A model directory, as Hugging Face reads it: config, weights, vocabulary and tokenizer files.

It is written under a temporary name and renamed when whole.
"""

import json

from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as tensors_to_bytes

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import huggingface
from bertjax.model.config import EncoderConfig


def save_model(directory, config: EncoderConfig, params: dict, tokenizer: Tokenizer) -> None:
  """Writes a model directory; an older one at the same place is replaced once this is whole.

  Args:
    directory: where to.
    config: of the encoder.
    params: parameters as host or device arrays; their heads decide the architecture's name.
    tokenizer: its vocabulary and settings are saved beside.

  Raises:
    ValueError: if the folder holds something else, which would be lost.
  """
  target = epath.Path(directory)
  if target.exists() and any(target.iterdir()) and not (target / 'model.safetensors').exists():
    raise ValueError(f'{target} exists and is no model directory; choose another.')
  temporary = target.parent / (target.name + '.incomplete')
  if temporary.exists():
    temporary.rmtree()
  temporary.mkdir(parents=True)
  heads = tuple(name for name in ('mlm', 'nsp') if name in params)
  content = huggingface.config_to_json(config, heads, tokenizer.pad_id)
  (temporary / 'config.json').write_text(json.dumps(content, indent=2) + '\n')
  tensors = huggingface.to_tensors(config, params)
  (temporary / 'model.safetensors').write_bytes(tensors_to_bytes(tensors, {'format': 'pt'}))
  tokenizer.save(temporary)
  if target.exists():
    target.rmtree()
  temporary.rename(target)


def load_model(directory) -> tuple[EncoderConfig, dict, Tokenizer]:
  """Reads a model directory: (config, params as NumPy float32, tokenizer).

  Raises:
    ValueError: if a file is missing, damaged or of another architecture; names it.
  """
  directory = epath.Path(directory)
  config, params = load_weights(directory)
  return config, params, Tokenizer.from_dir(directory)


def load_weights(directory) -> tuple[EncoderConfig, dict]:
  """Reads the config and all parameters that a model directory holds."""
  directory = epath.Path(directory)
  for name in ('config.json', 'model.safetensors'):
    if not (directory / name).is_file():
      raise ValueError(f'{directory} is not a model directory: it has no {name}.')
  path = directory / 'model.safetensors'
  content = json.loads((directory / 'config.json').read_text())
  config = huggingface.config_from_json(content, str(directory / 'config.json'))
  try:
    tensors = load_tensors(path.read_bytes())
  except SafetensorError as error:
    raise ValueError(f'{path} is damaged: {error}.') from error
  heads = []
  if 'cls.predictions.bias' in tensors:
    heads.append('mlm')
  if 'cls.seq_relationship.weight' in tensors:
    heads.append('nsp')
  pooler = 'bert.pooler.dense.weight' in tensors
  return config, huggingface.from_tensors(config, tensors, heads, pooler, str(path))


def load_params(directory, bert) -> dict:
  """The parameters in a model directory for `bert`, a `Bert` module.

  Raises:
    ValueError: if the sizes differ from the module's config, or a head is missing.
  """
  config, params = load_weights(directory)
  sizes = ('vocab_size', 'hidden_size', 'num_layers', 'num_heads', 'mlp_size', 'max_positions',
           'type_vocab_size')  # fmt: skip
  for name in sizes:
    if getattr(config, name) != getattr(bert.config, name):
      raise ValueError(
        f'{directory} has {name}={getattr(config, name)}, this run wants '
        f'{getattr(bert.config, name)}; set --config.model.{name}={getattr(config, name)}.'
      )
  wanted = {'encoder', *bert.heads, *(['pooler'] if bert.pooler else [])}
  missing = sorted(wanted - set(params))
  if missing:
    raise ValueError(f'{directory} has no {missing}; it has {sorted(params)}.')
  return {name: params[name] for name in params if name in wanted}
