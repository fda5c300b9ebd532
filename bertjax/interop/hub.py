"""Models on the Hugging Face hub, and in its local cache."""

import re

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from bertjax import io
from bertjax.interop import sentences
from bertjax.model.heads import Bert

_TEXT_FILES = (
  'config.json', 'vocab.txt', 'spiece.model', 'tokenizer.json', 'tokenizer_config.json',
  'vocab.json', 'merges.txt', 'special_tokens_map.json', 'added_tokens.json', 'modules.json',
  'adapter_config.json', 'sentence_*_config.json', '[0-9]_*/*',
)  # fmt: skip
_HUB_WEIGHTS = (  # the first kind that a repository has is downloaded
  ('model.safetensors', 'model.safetensors.index.json', 'model-*-of-*.safetensors',
   'adapter_model.safetensors'),
  ('pytorch_model.bin', 'pytorch_model.bin.index.json', 'pytorch_model-*-of-*.bin',
   'adapter_model.bin'),
  ('flax_model.msgpack',),
)  # fmt: skip


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


_CARD = """---
library_name: transformers
license: {license}
tags: [bert, bertjax]{pipeline}
---

# {title}

A BERT-style encoder in the format of Hugging Face's `transformers`, written by
[bertjax](https://github.com/bertjax/bertjax).

| | |
|---|---|
{facts}

```python
import bertjax

model, params, tokenizer = bertjax.load_model('{name}')
```
"""
_PIPELINES = {
  'mlm': 'fill-mask',
  'classification': 'text-classification',
  'span': 'question-answering',
  'tagging': 'token-classification',
  'choice': 'multiple-choice',
}


_FIELDS = (
  'init_from', 'task.name', 'data.input', 'data.prepared', 'data.source', 'data.train_file',
  'data.dev_file', 'objective', 'num_train_steps', 'num_train_epochs', 'batch_size',
  'learning_rate', 'schedule', 'warmup_steps', 'warmup_ratio', 'optimizer.name', 'masking.rate',
  'data.length', 'seed',
)  # fmt: skip


def model_card(
  name: str, model: Bert, params: dict, labels=(), scores: dict | None = None,
  run: dict | None = None,
) -> str:  # fmt: skip
  """The README.md of a model: sizes, and of a run its data, recipe, versions and scores.

  Args:
    name: what the example loads: a repository of the hub, 'owner/name', or 'RUN/model'.
    model: the module.
    params: its parameters.
    labels: class names, by index.
    scores: metric -> score of the run that trained the model.
    run: the content of its run.json; the field `license` of its config is that of the model.
  """
  config = model.config
  size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
  facts = {
    'Parameters': f'{size:,}',
    'Layers, hidden size, attention heads': f'{config.num_layers}, {config.hidden_size}, '
                                            f'{config.num_heads}',
    'Maximum length in tokens': config.max_positions,
    'Vocabulary': f'{config.vocab_size:,}',
    'Heads': ', '.join(model.heads) or 'none, the bare encoder',
  }  # fmt: skip
  if labels:
    facts['Labels'] = ', '.join(labels)
  facts |= {f'`{metric}`': f'{score:.4g}' for metric, score in (scores or {}).items()}
  fields = traverse_util.flatten_dict((run or {}).get('config', {}), sep='.')
  named = [field for field in _FIELDS if fields.get(field) not in (None, '')]
  facts |= {f'`{field}`': f'`{fields[field]}`' for field in named}
  if versions := (run or {}).get('versions'):
    facts['Versions'] = ', '.join(f'{package} {version}' for package, version in versions.items())
    facts['Command'] = f'`{" ".join(run["command"])}`'
    facts['Started'] = run['started']
  pipelines = [_PIPELINES[head] for head in model.heads if head in _PIPELINES]
  return _CARD.format(
    title=name.removesuffix('/model').rpartition('/')[2], name=name,
    license=fields.get('license') or 'unknown',
    pipeline=f'\npipeline_tag: {pipelines[-1]}' if pipelines else '',
    facts='\n'.join(f'| {fact} | {value} |' for fact, value in facts.items()),
  )  # fmt: skip


def check_name(name: str) -> None:
  """Raises ValueError unless a name is that of a repository, 'owner/name'."""
  if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name):
    raise ValueError(f'{name!r} is no repository of the hub; name one as OWNER/NAME.')


def push(folder, name: str) -> str:
  """Uploads a model directory as a private repository, or as a new commit; returns its address.

  Raises:
    ValueError: if the hub refuses or cannot be reached.
  """
  import huggingface_hub

  check_name(name)
  try:
    url = huggingface_hub.create_repo(name, private=True, exist_ok=True)
    huggingface_hub.upload_folder(
      repo_id=name, folder_path=str(folder), commit_message='Upload a model of bertjax'
    )
  except Exception as error:  # httpx's transport errors come as they are
    raise ValueError(
      f'{folder} could not be uploaded as {name}; check the connection and the login '
      f'(`hf auth login`, with a token that may write). The hub says: {io.first_line(error)}'
    ) from error
  return str(url)


def _hub_message(name, error: Exception) -> str:
  """What the hub's library says in its first line that is a sentence, and what to do."""
  from huggingface_hub import errors

  advice = {
    errors.GatedRepoError: 'ask for access on its page and log in with `hf auth login`',
    errors.RepositoryNotFoundError: 'check the name; a private model needs `hf auth login`',
    errors.RevisionNotFoundError: 'check the revision after the @',
    errors.HFValidationError: 'check the name',
    Exception: 'check the connection, or name a local folder',
  }
  advice = next(text for kind, text in advice.items() if isinstance(error, kind))
  return (
    f'{name} is no folder with a config.json, and no model of that name could be had from '
    f'huggingface.co or its cache; {advice}. The hub says: {io.first_line(error)}'
  )
