"""Tiny models as files, and their parts."""

import json

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import huggingface, mapping
from bertjax.interop.loading import load_model
from bertjax.model.config import EncoderConfig


def tiny(vocab, **changes):
  tokenizer = Tokenizer.from_file(vocab)
  return EncoderConfig(tokenizer.vocab_size, 16, 2, 2, 24, 20, **changes), tokenizer


def random_params(config, heads=('mlm', 'nsp'), pooler=True, num_labels=3, seed=0):
  rng = np.random.default_rng(seed)
  shapes = mapping.shapes(config, heads, pooler, num_labels)
  flat = {path: rng.normal(0, 0.1, shape).astype(np.float32) for path, shape in shapes.items()}
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def check_same(params, expected):
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def tensors_of(saved):
  return huggingface.to_tensors(saved[1], saved[2])


def as_flax(tensors):
  """The tree that FlaxBertForPreTraining saved, by its own rules, not by our table."""
  flat = {}
  for name, tensor in tensors.items():
    *modules, leaf = name.split('.')
    if 'LayerNorm' in name:
      leaf = {'weight': 'scale'}.get(leaf, leaf)
    elif modules[-1].endswith('embeddings'):
      leaf = 'embedding'
    elif leaf == 'weight':
      leaf, tensor = 'kernel', np.ascontiguousarray(tensor.T)
    flat[(*modules, leaf)] = tensor
  return flax.traverse_util.unflatten_dict(flat)


def older_names(tensors):
  """As the first PyTorch files had it: gamma and beta, a copy of the tied table, a buffer."""
  renamed = {}
  for name, tensor in tensors.items():
    if 'LayerNorm' in name:
      name = name.replace('.weight', '.gamma').replace('.bias', '.beta')
    renamed[name] = tensor
  renamed['cls.predictions.decoder.weight'] = tensors['bert.embeddings.word_embeddings.weight']
  renamed['cls.predictions.decoder.bias'] = tensors['cls.predictions.bias']
  return renamed | {'bert.embeddings.position_ids': np.arange(20)[None]}


def write(folder, tensors, form):
  """Replaces the weights of a folder by a file of another form."""
  (folder / 'model.safetensors').unlink()
  if form == 'safetensors':
    save_file(tensors, folder / 'model.safetensors')
  elif form == 'shards':
    keys, index = sorted(tensors), {}
    for i, part in enumerate((keys[:9], keys[9:])):
      file = f'model-{i + 1:05d}-of-00002.safetensors'
      save_file({key: tensors[key] for key in part}, folder / file)
      index |= dict.fromkeys(part, file)
    text = json.dumps({'metadata': {}, 'weight_map': index})
    (folder / 'model.safetensors.index.json').write_text(text)
  elif form == 'torch':
    torch = pytest.importorskip('torch')
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, folder / 'pytorch_model.bin')
  elif form == 'flax':
    content = flax.serialization.msgpack_serialize(as_flax(tensors))
    (folder / 'flax_model.msgpack').write_bytes(content)


def change_config(folder, **changes):
  content = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(content | changes))


def check_refused(folder, *words):
  with pytest.raises(ValueError) as raised:
    load_model(folder)
  text = str(raised.value)
  assert '\n' not in text
  for word in words:
    assert word in text
