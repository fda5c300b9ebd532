"""Files of other libraries: every format read, bad ones refused by name, no partial file."""

import dataclasses
import http.server
import json
import logging
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import threading
import types

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from bertjax import convert
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import files, hub, huggingface, mapping
from bertjax.interop.huggingface import load_hf, save_hf
from bertjax.interop.loading import load_model, load_params, read_labels, save_model
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert
from bertjax.scoring import check_labels


def tiny(vocab, **changes):
  tokenizer = Tokenizer.from_file(vocab)
  return EncoderConfig(tokenizer.vocab_size, 16, 2, 2, 24, 20, **changes), tokenizer


def random_params(config, heads=('mlm', 'nsp'), pooler=True, num_labels=3, seed=0):
  rng = np.random.default_rng(seed)
  shapes = mapping.shapes(config, heads, pooler, num_labels)
  flat = {path: rng.normal(0, 0.1, shape).astype(np.float32) for path, shape in shapes.items()}
  return flax.traverse_util.unflatten_dict(flat, sep='/')


@pytest.fixture(scope='module')
def saved(tmp_path_factory, vocab):
  """(folder, config, params) of a tiny model for pre-training."""
  config, tokenizer = tiny(vocab)
  params = random_params(config)
  save_hf(tmp_path_factory.mktemp('saved') / 'model', config, params, tokenizer)
  return tmp_path_factory.getbasetemp() / 'saved0' / 'model', config, params


@pytest.fixture
def folder(saved, tmp_path):
  """A copy of the saved model, to change."""
  return pathlib.Path(shutil.copytree(saved[0], tmp_path / 'model'))


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


def change_config(folder, **changes):
  content = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(content | changes))


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


def check_refused(folder, *words):
  with pytest.raises(ValueError) as raised:
    load_model(folder)
  text = str(raised.value)
  assert '\n' not in text
  for word in words:
    assert word in text


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'model_type': 'roberta'}, ['roberta', 'not a BERT']),
    ({'position_embedding_type': 'relative_key'}, ['relative_key']),
    ({'add_cross_attention': True}, ['add_cross_attention']),
    ({'hidden_act': 'relu'}, ['relu', 'gelu_new']),
    ({'hidden_size': '16'}, ['hidden_size', "'16'", 'int']),
    ({'num_attention_heads': 3}, ['num_heads=3']),
    ({'vocab_size': 601}, ['model.safetensors', 'word_embeddings', '(600, 16)', '(601, 16)']),
  ],
)
def test_a_config_that_does_not_fit_is_named(folder, changes, words):
  change_config(folder, **changes)
  check_refused(folder, *words)


@pytest.mark.parametrize('text', ['{"model_type": "bert",', '[1]', '\x80'])
def test_corrupt_json_is_named(folder, text):
  (folder / 'config.json').write_bytes(text.encode('latin-1'))
  check_refused(folder, 'config.json', 'corrupt')


def test_a_config_of_another_library_without_a_model_type_is_refused(folder):
  content = {'architectures': ['RobertaForMaskedLM'], 'hidden_size': 16}
  (folder / 'config.json').write_text(json.dumps(content))
  check_refused(folder, 'RobertaForMaskedLM')


def test_a_vocabulary_larger_than_the_word_table_is_refused(saved, folder, tmp_path):
  with (folder / 'vocab.txt').open('a') as file:
    file.write('[new1]\n[new2]\n')
  check_refused(folder, 'differ in 2 tokens', "'[new1]'")
  (folder / 'tokenizer.json').unlink()
  check_refused(folder, '602 entries', 'word_embeddings', '600 rows')
  tokenizer = Tokenizer.from_file(folder / 'vocab.txt')
  with pytest.raises(ValueError, match='602 entries'):
    save_hf(tmp_path / 'new', saved[1], saved[2], tokenizer)
  assert not (tmp_path / 'new').exists()


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


def test_a_failed_save_leaves_the_old_model_and_no_half(saved, folder, vocab):
  before = {path.name: path.read_bytes() for path in folder.iterdir()}

  class FullDisk(Tokenizer):
    def save(self, directory, **options):
      raise OSError('No space left on device')

  with pytest.raises(OSError, match='space'):
    save_hf(folder, saved[1], saved[2], FullDisk(Tokenizer.from_file(vocab).vocab))
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  assert [path.name for path in folder.parent.iterdir()] == ['model']


def test_a_folder_with_more_than_a_model_is_not_replaced(saved, folder, vocab):
  (folder / 'thesis.txt').write_text('years')
  with pytest.raises(ValueError, match='thesis'):
    save_hf(folder, saved[1], saved[2], Tokenizer.from_file(vocab))
  assert (folder / 'thesis.txt').read_text() == 'years'


def test_labels_and_the_classifiers_dropout_come_back(vocab, tmp_path):
  config, tokenizer = tiny(vocab, classifier_dropout=0.3)
  params = random_params(config, ('classification',))
  save_hf(tmp_path / 'a', config, params, tokenizer, labels=['bad', 'so so', 'good'],
          problem_type='single_label_classification')  # fmt: skip
  assert load_hf(tmp_path / 'a')[0] == config
  assert read_labels(tmp_path / 'a') == (['bad', 'so so', 'good'], 'single_label_classification')
  save_hf(tmp_path / 'b', config, params, tokenizer)
  assert read_labels(tmp_path / 'b') == (['LABEL_0', 'LABEL_1', 'LABEL_2'], '')
  with pytest.raises(ValueError, match='3 classes'):
    save_hf(tmp_path / 'c', config, params, tokenizer, labels=['bad', 'good'])
  change_config(tmp_path / 'a', id2label={'0': 'bad', '1': 'good'})
  check_refused(tmp_path / 'a', 'config.json', '2 labels', 'has 3')


@pytest.mark.parametrize('named', [(), ('neg', 'pos'), ('bad', 'good'), ('good', 'bad')])
def test_labels_that_are_taken_by_their_number_are_logged(vocab, tmp_path, caplog, named):
  config, tokenizer = tiny(vocab)
  params = random_params(config, ('classification',), num_labels=2)
  save_hf(tmp_path / 'a', config, params, tokenizer, labels=named)
  task = types.SimpleNamespace(
    head='classification', name='reviews', num_labels=2, labels=('bad', 'good')
  )
  if named == ('good', 'bad'):
    with pytest.raises(ValueError, match='must be the same in the same order'):
      check_labels(tmp_path / 'a', params, task)
    return
  caplog.clear()
  check_labels(tmp_path / 'a', params, task)
  expected = {(): 'LABEL_0 is bad, LABEL_1 is good', ('neg', 'pos'): 'neg is bad, pos is good'}
  found = [record.getMessage() for record in caplog.records]
  assert [text.split("task's order: ")[1] for text in found] == [
    text for names, text in expected.items() if names == named
  ]


def test_the_layout_of_a_classifier_must_be_stated(vocab, tmp_path):
  config, tokenizer = tiny(vocab)
  params = random_params(config, ('tagging',))
  save_hf(tmp_path / 'a', config, params, tokenizer)
  assert 'tagging' in load_hf(tmp_path / 'a')[1]
  change_config(tmp_path / 'a', architectures=None)
  check_refused(tmp_path / 'a', 'classifier', 'heads')
  check_same(load_hf(tmp_path / 'a', heads=('tagging',))[1], params)
  with pytest.raises(ValueError, match='both be called classifier'):
    save_hf(tmp_path / 'b', config, random_params(config, ('tagging', 'choice')), tokenizer)


def test_a_missing_part_is_initialised_only_on_request(saved, caplog):
  caplog.set_level(logging.INFO, 'bertjax')
  folder, config, params = saved
  bert = Bert(config, heads=('classification',), num_labels=3)
  initial = random_params(config, ('classification',), seed=1)
  with pytest.raises(ValueError, match='classification'):
    load_params(folder, bert, initial=initial)
  result = load_params(folder, bert, initial=initial, fresh=('classification',))
  assert list(result) == ['encoder', 'pooler', 'classification']
  check_same(result['classification'], initial['classification'])
  check_same(result['encoder'], params['encoder'])
  assert 're-initialised: classification' in caplog.text


def test_a_changed_vocabulary_keeps_the_embeddings_of_shared_tokens_on_request(saved):
  folder, config, params = saved
  old = Tokenizer.from_dir(folder)
  pieces = old.vocab[:300] + ['newword', '##new'] + old.vocab[400:][::-1]
  tokenizer = Tokenizer(pieces)
  wanted = dataclasses.replace(config, vocab_size=len(pieces), max_positions=32)
  bert, initial = Bert(wanted), random_params(wanted, seed=1)
  with pytest.raises(ValueError, match='init_resize'):
    load_params(folder, bert, initial=initial, tokenizer=tokenizer)
  result = load_params(folder, bert, initial=initial, tokenizer=tokenizer, resize=True)
  for *path, leaf in (('encoder', 'embeddings', 'word', 'embedding'), ('mlm', 'bias')):
    table, before, drawn = result, params, initial
    for name in (*path, leaf):
      table, before, drawn = table[name], before[name], drawn[name]
    np.testing.assert_array_equal(table[:300], before[:300])
    np.testing.assert_array_equal(table[300:302], drawn[300:302])
    np.testing.assert_array_equal(table[302:], before[400:][::-1])
  positions = result['encoder']['embeddings']['position']['embedding']
  np.testing.assert_array_equal(
    positions[:20], params['encoder']['embeddings']['position']['embedding']
  )
  np.testing.assert_array_equal(
    positions[20:], initial['encoder']['embeddings']['position']['embedding'][20:]
  )
  check_same(result['encoder']['layers'], params['encoder']['layers'])


@pytest.mark.parametrize('change', [{'activation': 'gelu_tanh'}, {'mlp_size': 32}])
def test_a_model_of_another_shape_is_refused_even_with_resizing(saved, change):
  (name,) = change
  bert = Bert(dataclasses.replace(saved[1], **change))
  with pytest.raises(ValueError, match=f'--config.model.{name}='):
    load_params(saved[0], bert, resize=True, initial=saved[2])


def test_another_vocabulary_of_the_same_size_is_noticed(saved):
  pieces = Tokenizer.from_dir(saved[0]).vocab
  bert = Bert(saved[1])
  with pytest.raises(ValueError, match='another vocabulary'):
    load_params(saved[0], bert, tokenizer=Tokenizer(pieces[::-1]))
  with pytest.raises(ValueError, match='lowercase=True'):
    load_params(saved[0], bert, tokenizer=Tokenizer(pieces, lowercase=False))
  check_same(load_params(saved[0], bert, tokenizer=Tokenizer(pieces)), saved[2])


def in_cache(home, folder, revision, commit):
  """Puts a folder where huggingface_hub keeps what it downloaded."""
  repository = home / 'hub' / 'models--someone--some-bert'
  shutil.copytree(folder, repository / 'snapshots' / commit)
  (repository / 'refs').mkdir(exist_ok=True)
  (repository / 'refs' / revision).write_text(commit)


def run_python(code, **environment):
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True,
    env=os.environ | environment, check=False,
  )  # fmt: skip
  return out.stdout + out.stderr


def test_a_hub_name_is_read_from_the_cache_by_revision(saved, folder, tmp_path):
  change_config(folder, layer_norm_eps=1e-5)
  in_cache(tmp_path, saved[0], 'main', '1' * 40)
  in_cache(tmp_path, folder, 'v2', '2' * 40)
  code = (
    'import bertjax\n'
    "a = bertjax.load_model('someone/some-bert')[0].config.layer_norm_eps\n"
    "b = bertjax.load_model('someone/some-bert@v2')[0].config.layer_norm_eps\n"
    "print('read', a, b)\n"
    'try:\n'
    "  bertjax.load_model('someone/other-bert')\n"
    'except ValueError as error:\n'
    '  print(error)\n'
  )
  for offline, endpoint in (('1', 'https://huggingface.co'), ('0', 'http://127.0.0.1:9')):
    out = run_python(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE=offline, HF_ENDPOINT=endpoint)
    assert 'read 1e-12 1e-05' in out, out
    assert 'someone/other-bert is no folder with a config.json' in out, out


def test_an_error_of_the_hub_is_complete_and_says_what_to_do(tmp_path):
  answers = {
    'none': (404, 'RepoNotFound', 'Repository Not Found for url: ', 'check the name'),
    'gated': (403, 'GatedRepo', 'Cannot access gated repo for url ', 'ask for access'),
    'revision': (404, 'RevisionNotFound', 'Revision Not Found for url: ', 'check the revision'),
    'broken': (500, '', "Server error '500 Internal Server Error'", 'check the connection'),
  }

  class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      name = next((name for name in answers if f'/someone/{name}/' in self.path), 'broken')
      code, kind, *_ = answers[name]
      self.send_response(code)
      self.send_header('X-Error-Code', kind)
      self.send_header('X-Request-Id', 'abc')
      self.end_headers()

    def log_message(self, *words):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f'http://127.0.0.1:{server.server_port}'
  code = (
    'from bertjax.interop import hub\n'
    f'for name in {list(answers)}:\n'
    '  try:\n'
    "    hub.find_directory(f'someone/{name}')\n"
    '  except ValueError as error:\n'
    '    print(error)\n'
  )
  out = run_python(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE='0', HF_ENDPOINT=address)
  server.shutdown()
  lines = [line for line in out.splitlines() if line.startswith('someone/')]
  for line, (name, (_, _, says, advice)) in zip(lines, answers.items(), strict=True):
    assert line.startswith(f'someone/{name} is no folder with a config.json'), line
    assert advice in line, line
    answer = line.partition('The hub says: ')[2].removeprefix('Got: HfHubHTTPError: ')
    if answer.startswith('An error happened while trying to locate the files'):  # hub 1.5, complete
      assert name == 'broken' and answer.endswith('your internet connection and try again.'), line
    else:
      assert answer.startswith(says) and f'someone/{name}' in answer, line


@pytest.mark.parametrize('name', ['no/such/folder', 'gs-no//x', '../x'])
def test_what_is_no_hub_name_is_not_looked_up(name):
  with pytest.raises(ValueError, match='no folder'):
    hub.find_directory(name)


def test_added_tokens_go_through_every_form_of_a_model_with_the_same_ids(folder, tmp_path):
  """convert to Hugging Face's and Google's files and back; transformers reads the same ids."""
  transformers = pytest.importorskip('transformers')
  change_config(folder, vocab_size=602)
  tensors = files.read_tensors(folder / 'model.safetensors')
  for name in ('bert.embeddings.word_embeddings.weight', 'cls.predictions.bias'):
    tensors[name] = np.concatenate([tensors[name], np.ones_like(tensors[name][:2])])
  save_file(tensors, folder / 'model.safetensors')
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  theirs.add_tokens(['BRCA1', '[P1]'])
  theirs.save_pretrained(folder)
  (folder / 'vocab.txt').unlink()
  text = 'a BRCA1 [P1], brca1 a[P1]'
  ids = theirs(text).input_ids
  assert {600, 601} < set(ids)
  source = folder
  for name, form in (('hf', 'hf'), ('google', 'google'), ('back', 'hf')):
    convert.run(out=str(tmp_path / name), format=form, **{'from': str(source)})
    source = tmp_path / name
    bert, _, tokenizer = load_model(source)
    assert bert.config.vocab_size == tokenizer.vocab_size == 602
    assert tokenizer([text])['input_ids'][0].tolist() == ids
    assert transformers.AutoTokenizer.from_pretrained(source)(text).input_ids == ids
  plain = Tokenizer(Tokenizer.from_dir(source).vocab)
  with pytest.raises(ValueError, match='added tokens or special rules'):
    load_params(source, bert, tokenizer=plain)
  load_params(source, bert, tokenizer=Tokenizer.from_file(source))


def test_transformers_pipelines_truncate_long_texts_of_a_saved_model(vocab, tmp_path):
  """They truncate to model_max_length; without it the model crashes on its position table."""
  transformers = pytest.importorskip('transformers')
  config, tokenizer = tiny(vocab)
  params = random_params(config, ('classification',))
  save_hf(tmp_path / 'a', config, params, tokenizer)
  tokenizer.settings = {'model_max_length': 12}
  save_hf(tmp_path / 'b', config, params, tokenizer)
  for name, length in (('a', 20), ('b', 12)):
    pipeline = transformers.pipeline('text-classification', str(tmp_path / name))
    assert pipeline.tokenizer.model_max_length == length
    assert pipeline('a b ' * 200, truncation=True)[0]['label'].startswith('LABEL_')


@pytest.mark.parametrize(
  ('heads', 'pooler'),
  [
    ((), True),
    (('mlm',), False),
    (('mlm', 'nsp'), True),
    (('tagging',), False),
    (('choice',), True),
  ],
)
def test_a_loaded_module_has_the_heads_of_its_files(vocab, tmp_path, heads, pooler):
  config, tokenizer = tiny(vocab)
  bert = Bert(config, heads, pooler, num_labels=3 if 'tagging' in heads else 2)
  save_model(tmp_path / 'm', bert, random_params(config, heads, pooler), tokenizer)
  model, params, tokenizer = load_model(tmp_path / 'm')
  assert model == bert
  out = model.apply(
    {'params': params}, tokenizer(['A sentence.', 'Another'], ['A pair.', 'Or two'])
  )
  assert {'hidden', *(f'{head}_logits' for head in heads)} <= out.keys()
  assert ('pooled' in out) == pooler


def test_an_absent_head_is_named_with_those_there_are(saved):
  with pytest.raises(ValueError, match='has no tagging head; it has the heads mlm, nsp'):
    load_model(saved[0], heads=('mlm', 'tagging'))
  model, params, tokenizer = load_model(saved[0], heads=('nsp',))
  assert model.heads == ('nsp',)
  with pytest.raises(ValueError, match='the parameters have no mlm head; they have the heads nsp'):
    model.clone(heads=('mlm',)).apply({'params': params}, tokenizer('the name'))
  with pytest.raises(ValueError, match='no pooler; they have no heads, only the bare encoder'):
    model.clone(heads=()).apply({'params': {'encoder': params['encoder']}}, tokenizer('the name'))


def test_a_save_without_its_parameters_or_format_is_refused(saved, tmp_path):
  model, params, tokenizer = load_model(saved[0])
  with pytest.raises(ValueError, match=r"has the parts \['encoder', .* consists of \['encoder',"):
    save_model(tmp_path / 'm', model, params | {'rtd': {}}, tokenizer)
  with pytest.raises(ValueError, match="format must be 'hf' or 'google', got 'tf'"):
    save_model(tmp_path / 'm', model, params, tokenizer, format='tf')
  with pytest.raises(TypeError, match='got a EncoderConfig'):
    save_model(tmp_path / 'm', model.config, params, tokenizer)
  assert not list(tmp_path.iterdir())


def test_load_model_and_load_hf_agree(saved):
  assert load_model(saved[0])[0].config == load_hf(saved[0])[0] == saved[1]


def test_a_model_that_a_kill_left_aside_comes_back(tmp_path):
  (tmp_path / 'model.replaced').mkdir()
  (tmp_path / 'model.replaced' / 'model.safetensors').write_bytes(b'the old one')
  with (
    pytest.raises(KeyboardInterrupt),
    files.new_directory(tmp_path / 'model', 'model.safetensors'),
  ):
    raise KeyboardInterrupt
  assert [path.name for path in tmp_path.iterdir()] == ['model']
  assert (tmp_path / 'model' / 'model.safetensors').read_bytes() == b'the old one'
