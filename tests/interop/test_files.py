"""Weights of other libraries: every format read, bad files refused by name."""

import logging
import pathlib
import pickle
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from bertjax.interop.huggingface import load_hf
from tests.interop.models import (
  check_refused,
  check_same,
  older_names,
  tensors_of,
  write,
)


@pytest.mark.parametrize('form', ['safetensors', 'shards', 'torch', 'flax'])
def test_every_format_gives_the_same_bits(saved, folder, caplog, form):
  caplog.set_level(logging.INFO, 'bertjax')
  write(folder, tensors_of(saved), form)
  config, params = load_hf(folder)
  assert config == saved[1]
  check_same(params, saved[2])
  assert 'not read' not in caplog.text


@pytest.mark.parametrize('form', ['safetensors', 'torch'])
def test_names_of_earlier_years_are_read(saved, folder, caplog, form):
  caplog.set_level(logging.INFO, 'bertjax')
  write(folder, older_names(tensors_of(saved)), form)
  check_same(load_hf(folder)[1], saved[2])
  assert 'not read' not in caplog.text


def test_a_bare_model_without_prefix_is_read(saved, folder):
  bare = {k.removeprefix('bert.'): v for k, v in tensors_of(saved).items() if k[:5] == 'bert.'}
  for form in ('safetensors', 'flax'):
    (folder / 'model.safetensors').touch()
    write(folder, bare, form)
    params = load_hf(folder)[1]
    check_same(params, {name: saved[2][name] for name in ('encoder', 'pooler')})
    (folder / 'flax_model.msgpack').unlink(missing_ok=True)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('form', ['safetensors', 'torch', 'flax'])
def test_bf16_and_fp16_weights_are_loaded_as_float32_and_logged(saved, folder, caplog, dtype, form):
  caplog.set_level(logging.INFO, 'bertjax')
  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  narrow = {name: tensor.astype(kind) for name, tensor in tensors_of(saved).items()}
  if form == 'torch':
    torch = pytest.importorskip('torch')
    content = {k: torch.tensor(v.astype('f')).to(getattr(torch, dtype)) for k, v in narrow.items()}
    torch.save(content, folder / 'pytorch_model.bin')
    (folder / 'model.safetensors').unlink()
  else:
    write(folder, narrow, form)
  params = load_hf(folder)[1]
  check_same(params, jax.tree.map(lambda x: x.astype(kind).astype(np.float32), saved[2]))
  assert f'tensors of {dtype} are read as float32' in caplog.text


def test_a_tensor_that_no_one_asked_for_is_named(saved, folder, caplog):
  caplog.set_level(logging.INFO, 'bertjax')
  write(folder, tensors_of(saved) | {'bert.extra.weight': np.ones(3, 'f')}, 'safetensors')
  check_same(load_hf(folder, heads=('mlm',))[1].keys(), {'encoder', 'pooler', 'mlm'})
  assert 'not read: bert.extra.weight, cls.seq_relationship.bias' in caplog.text


@pytest.mark.parametrize('part', ['weight', 'bias'])
def test_a_decoder_that_differs_is_refused_only_where_it_is_read(saved, folder, caplog, part):
  tensors = tensors_of(saved)
  original = {'weight': 'bert.embeddings.word_embeddings.weight', 'bias': 'cls.predictions.bias'}
  tensors[f'cls.predictions.decoder.{part}'] = tensors[original[part]] + 1
  write(folder, tensors, 'safetensors')
  expected = {name: saved[2][name] for name in ('encoder', 'pooler', 'nsp')}
  check_same(load_hf(folder)[1], expected)
  assert f'decoder.{part} differs' in caplog.text and 'masked-LM head is not read' in caplog.text
  check_same(load_hf(folder, heads=('nsp',))[1], expected)
  with pytest.raises(ValueError, match=f'decoder.{part} differs from {original[part]}'):
    load_hf(folder, heads=('mlm',))


@pytest.mark.parametrize('dtype', ['int64', 'int32', 'uint8', 'bool'])
def test_buffers_of_any_integer_type_are_skipped(saved, folder, caplog, dtype):
  caplog.set_level(logging.INFO, 'bertjax')
  buffers = {name: np.ones((1, 20), dtype) for name in ('position_ids', 'token_type_ids')}
  buffers = {f'bert.embeddings.{name}': value for name, value in buffers.items()}
  write(folder, tensors_of(saved) | buffers, 'safetensors')
  check_same(load_hf(folder)[1], saved[2])
  assert 'not read' not in caplog.text


class Bomb:
  """What a pickle may do when it is loaded."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def spoil(folder, saved, how):
  """Makes one thing wrong in a folder."""
  tensors, weights = tensors_of(saved), folder / 'model.safetensors'
  name = 'bert.encoder.layer.1.output.dense.weight'
  if how == 'truncated':
    weights.write_bytes(weights.read_bytes()[:-100])
  elif how == 'empty':
    weights.write_bytes(b'')
  elif how == 'no weights':
    weights.unlink()
  elif how == 'missing':
    del tensors[name]
  elif how == 'shape':
    tensors[name] = tensors[name].T
  elif how == 'integers':
    tensors[name] = tensors[name].astype(np.int64)
  elif how == 'bytes':
    tensors[name] = tensors[name].astype(np.int8)
  if how in ('missing', 'shape', 'integers', 'bytes'):
    write(folder, tensors, 'safetensors')
  if how in ('shard', 'index'):
    write(folder, tensors, 'shards')
    if how == 'shard':
      (folder / 'model-00002-of-00002.safetensors').unlink()
    else:
      (folder / 'model.safetensors.index.json').write_text('{"weight_map": ')
  if how == 'msgpack':
    write(folder, tensors, 'flax')
    path = folder / 'flax_model.msgpack'
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
  ('how', 'words'),
  [
    ('truncated', ['model.safetensors', 'corrupt']),
    ('empty', ['model.safetensors', 'corrupt']),
    ('no weights', ['no weights', 'pytorch_model.bin']),
    ('missing', ['model.safetensors', 'bert.encoder.layer.1.output.dense.weight']),
    ('shape', ['bert.encoder.layer.1.output.dense.weight', '(24, 16)', '(16, 24)']),
    ('integers', ['bert.encoder.layer.1.output.dense.weight', 'int64']),
    ('bytes', ['bert.encoder.layer.1.output.dense.weight', 'int8']),
    ('shard', ['index.json', 'model-00002-of-00002.safetensors']),
    ('index', ['index.json', 'corrupt']),
    ('msgpack', ['flax_model.msgpack', 'corrupt']),
  ],
)
def test_bad_weights_get_one_sentence_that_names_them(saved, folder, how, words):
  spoil(folder, saved, how)
  check_refused(folder, *words)


def test_a_pickle_that_runs_code_is_not_run(folder, tmp_path):
  pytest.importorskip('torch')
  (folder / 'model.safetensors').unlink()
  bomb = pickle.dumps(Bomb(tmp_path / 'ran'), protocol=2)  # torch's own
  (folder / 'pytorch_model.bin').write_bytes(bomb)
  check_refused(folder, 'pytorch_model.bin', 'any code')
  assert not (tmp_path / 'ran').exists()


def test_a_corrupt_torch_file_is_named(saved, folder):
  write(folder, tensors_of(saved), 'torch')
  path = folder / 'pytorch_model.bin'
  path.write_bytes(path.read_bytes()[:5000])
  check_refused(folder, 'pytorch_model.bin', 'corrupt')


def test_a_torch_file_without_torch_is_refused(saved, folder, monkeypatch):
  write(folder, tensors_of(saved), 'torch')
  monkeypatch.setitem(sys.modules, 'torch', None)
  check_refused(folder, 'pytorch_model.bin', 'install torch')
