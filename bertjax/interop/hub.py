"""Models on the Hugging Face hub, and in its local cache."""

import re

from etils import epath

from bertjax.interop import sentences

_TEXT_FILES = (
  'config.json', 'vocab.txt', 'spiece.model', 'tokenizer.json', 'tokenizer_config.json',
  'special_tokens_map.json', 'added_tokens.json', 'modules.json', 'sentence_*_config.json',
  '[0-9]_*/*',
)  # fmt: skip
_HUB_WEIGHTS = (  # the first kind that a repository has is downloaded
  ('model.safetensors', 'model.safetensors.index.json', 'model-*-of-*.safetensors'),
  ('pytorch_model.bin', 'pytorch_model.bin.index.json', 'pytorch_model-*-of-*.bin'),
  ('flax_model.msgpack',),
)


def find_directory(path_or_name) -> epath.Path:
  """The folder of the encoder in `find_root`."""
  return sentences.encoder_folder(find_root(path_or_name))


def find_root(path_or_name) -> epath.Path:
  """A local folder, or the hub's repository of that name in the local cache, downloaded if it must.

  Raises:
    ValueError: if there is neither, or the hub cannot be reached.
  """
  directory = epath.Path(path_or_name)
  name, _, pinned = str(path_or_name).partition('@')
  if directory.exists() or not re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?', name):
    if not directory.is_dir():
      raise ValueError(f'no folder {path_or_name}: a model directory has a config.json.')
    return directory
  import huggingface_hub

  for weights in _HUB_WEIGHTS:
    try:
      path = huggingface_hub.snapshot_download(
        name, revision=pinned or None, allow_patterns=[*_TEXT_FILES, *weights]
      )
    except Exception as error:  # httpx's transport errors come as they are
      raise ValueError(_hub_message(path_or_name, error)) from error
    if any((epath.Path(path) / file).exists() for file in weights):
      return epath.Path(path)
  raise ValueError(f'{path_or_name} on huggingface.co has no weights in a format known here.')


def _hub_message(name, error: Exception) -> str:
  """What the hub's library says in its first line that is a sentence, and what to do."""
  from huggingface_hub import errors

  lines = re.sub(r' *\(Request ID[^)]*\)', '', str(error)).splitlines()
  lines = [line for line in lines if line and not re.fullmatch(r'\d+ Client Error\.', line)]
  advice = 'check the connection, or name a local folder'
  for kind, text in (
    (errors.GatedRepoError, 'ask for access on its page and log in with `hf auth login`'),
    (errors.RepositoryNotFoundError, 'check the name; a private model needs `hf auth login`'),
    (errors.RevisionNotFoundError, 'check the revision after the @'),
    (errors.HFValidationError, 'check the name'),
  ):
    if isinstance(error, kind):
      advice = text
      break
  return (
    f'{name} is no folder with a config.json, and no model of that name could be had from '
    f'huggingface.co or its cache; {advice}. The hub says: {lines[0] if lines else repr(error)}'
  )
