"""`bertjax convert` from every format to every format, and pre-training that starts from each."""

import base64
import functools
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from typing import ClassVar

import flax.traverse_util
import jax
import numpy as np
import pytest

from bertjax import build, pretrain
from bertjax.__main__ import main
from bertjax.config import load_recipe
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import mapping
from bertjax.interop.loading import load_model, read_labels, save_model
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert
from bertjax.objectives import mlm
from bertjax.training import layout as layout_lib


def random_params(config, heads=('mlm', 'nsp')):
  rng = np.random.default_rng(0)
  flat = {
    path: rng.normal(0, 0.1, shape).astype(np.float32)
    for path, shape in mapping.shapes(config, heads, True).items()
  }
  return flax.traverse_util.unflatten_dict(flat, sep='/')


@pytest.fixture(scope='module')
def model(vocab):
  """A model of the size of a smoke run, with its tokenizer."""
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(tokenizer.vocab_size, 32, 2, 2, 64, 64)
  return Bert(config), random_params(config), tokenizer


def check_model(folder, model):
  bert, params, tokenizer = load_model(folder)
  assert bert == model[0] and tokenizer.fingerprint == model[2].fingerprint
  jax.tree.map(np.testing.assert_array_equal, params, model[1])


def test_a_model_goes_round_by_the_command_bit_for_bit(model, tmp_path, capsys):
  save_model(tmp_path / 'a', *model)
  ways = (('a', 'b', 'google'), ('b', 'c', 'google'), ('c', 'd', 'hf'), ('d', 'e', 'hf'))
  for source, target, form in ways:
    flags = [f'--from={tmp_path}/{source}', f'--out={tmp_path}/{target}', f'--format={form}']
    assert main(['convert', *flags]) == 0
    check_model(tmp_path / target, model)
  for name in ('config.json', 'model.safetensors', 'vocab.txt'):
    assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'e' / name).read_bytes()
  assert (tmp_path / 'b' / 'bert_model.ckpt.index').exists()
  assert not list(tmp_path.glob('*.incomplete'))


def test_labels_go_along(model, tmp_path):
  bert, _, tokenizer = model
  bert = bert.clone(heads=('classification',))
  params = random_params(bert.config, ('classification',))
  labels = ['no', 'yes']
  save_model(tmp_path / 'a', bert, params, tokenizer, labels=labels, problem_type='regression')
  assert main(['convert', f'--from={tmp_path}/a', f'--out={tmp_path}/b']) == 0
  assert read_labels(tmp_path / 'b') == (labels, 'regression')
  assert main(['convert', f'--from={tmp_path}/b', f'--out={tmp_path}/c', '--format=google']) == 0
  assert read_labels(tmp_path / 'c') == (labels, 'regression')


def test_the_gelu_and_the_case_of_googles_files_can_be_set(model, tmp_path):
  save_model(tmp_path / 'a', *model, format='google')
  flags = [f'--from={tmp_path}/a', f'--out={tmp_path}/b', '--gelu=tanh', '--lowercase=false']
  assert main(['convert', *flags]) == 0
  bert, _, tokenizer = load_model(tmp_path / 'b')
  assert bert.config.activation == 'gelu_tanh' and not tokenizer.lowercase
  assert json.loads((tmp_path / 'b' / 'config.json').read_text())['hidden_act'] == 'gelu_new'


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    ([], '--from'),
    (['--from={tmp}/a'], '--out'),
    (['--from={tmp}/a', '--out={tmp}/b', '--format=onnx'], 'onnx'),
    (['--from={tmp}/a', '--out={tmp}/b', '--heads=span'], 'has no span head; it has'),
    (['--from={tmp}/a', '--out={tmp}/b', '--heads=spam'], 'spam'),
    (['--from={tmp}/a', '--out={tmp}/b', '--lowercase=upper'], 'upper'),
    (['--from={tmp}/none', '--out={tmp}/b'], 'none'),
    (['--from={tmp}/a', '--out={tmp}/mine'], 'mine'),
    (['--from={tmp}/a', '--out={tmp}/mine', '--format=google'], 'mine'),
    (['--from={tmp}/a', '--out={tmp}/g'], 'g exists already'),
    (['--from={tmp}/a', '--out={tmp}/g', '--format=google'], 'g exists already'),
    (['--from={tmp}/a', '--out={tmp}/a'], 'a exists already'),
    (['--from={tmp}/a', '--out={tmp}/mine/thesis.txt'], 'thesis.txt exists already'),
    (['--from={tmp}/g', '--out={tmp}/b', '--gelu=exact'], 'exact'),
  ],
)
def test_a_mistake_gets_one_sentence_and_writes_nothing(model, tmp_path, capsys, flags, words):
  save_model(tmp_path / 'a', *model)
  save_model(tmp_path / 'g', *model, format='google')
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.txt').write_text('years')
  before = sorted(tmp_path.rglob('*'))
  capsys.readouterr()
  assert main(['convert', *(flag.format(tmp=tmp_path) for flag in flags)]) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('bertjax')]
  assert len(lines) == 1 and words in lines[0]
  assert sorted(tmp_path.rglob('*')) == before


@pytest.fixture
def begin(tiny_rows, tmp_path):
  """Starts a run and returns its parameters before the first step."""

  def parameters(*, vocab=tiny_rows, recipe='bert_base:smoke', **fields):
    config = load_recipe(recipe)
    config.update_from_flattened_dict(fields)
    tokenizer = Tokenizer.from_dir(vocab)
    model = build.make_model(config, tokenizer.vocab_size)
    objective, optimizer = mlm.pretraining(model), build.make_optimizer(config, lambda step: 1.0)
    layout = build.make_layout(config, jax.devices()[:1])
    setup = pretrain.Setup(config, [], tokenizer, [model], optimizer, layout, '', {})
    load = functools.partial(pretrain.load, setup) if config.init_from else None
    state, _, _ = layout_lib.restore_or_init(objective, optimizer, layout, load=load)
    return jax.device_get(state.params)

  return parameters


@pytest.mark.e2e
def test_a_run_starts_from_hugging_faces_and_from_googles_files(model, tmp_path, begin):
  save_model(tmp_path / 'hf', *model)
  save_model(tmp_path / 'google', *model, format='google')
  for kind in ('hf', 'google'):
    params = begin(init_from=str(tmp_path / kind))
    jax.tree.map(np.testing.assert_array_equal, params, model[1])
  begin(init_from=str(tmp_path / 'google'), **{'model.activation': 'gelu_tanh'})
  with pytest.raises(ValueError, match='activation=gelu'):
    begin(init_from=str(tmp_path / 'hf'), **{'model.activation': 'gelu_tanh'})


@pytest.mark.e2e
def test_a_run_takes_a_longer_table_and_another_vocabulary_on_request(
  model, tmp_path, begin, tiny_rows
):
  save_model(tmp_path / 'hf', *model)
  new = pathlib.Path(shutil.copytree(tiny_rows, tmp_path / 'rows'))
  Tokenizer(model[2].vocab[:500] + ['domain', 'words']).save(new)
  fields = {'init_from': str(tmp_path / 'hf'), 'vocab': new, 'model.max_positions': 96}
  with pytest.raises(ValueError, match='init_resize=True'):
    begin(**fields)
  params, drawn = begin(**fields, init_resize=True), begin(vocab=new, **{'model.max_positions': 96})
  for name, kept in (('word', 500), ('position', 64)):
    table, old, fresh = (
      tree['encoder']['embeddings'][name]['embedding'] for tree in (params, model[1], drawn)
    )
    np.testing.assert_array_equal(table[:kept], old[:kept])
    np.testing.assert_array_equal(table[kept:], fresh[kept:])


@pytest.mark.e2e
def test_the_recipe_for_ones_own_domain_starts_from_googles_files(model, tmp_path, begin):
  config = load_recipe('bert_base:continued')
  assert (config.learning_rate, config.num_train_steps, config.model.num_layers) == (
    2e-5,
    20_000,
    12,
  )
  save_model(tmp_path / 'google', *model, format='google')
  params = begin(recipe='bert_base:continued,smoke', init_from=str(tmp_path / 'google'))
  jax.tree.map(np.testing.assert_array_equal, params, model[1])


def test_a_head_with_dropout_varies_and_a_span_head_does_not(model):
  config = EncoderConfig(50, 16, 1, 2, 16, 16, hidden_dropout=0.0, attention_dropout=0.0,
                         classifier_dropout=0.5)  # fmt: skip
  heads = ('classification', 'tagging', 'span', 'choice')
  bert, params = Bert(config, heads=heads), random_params(config, heads)
  batch = {'input_ids': np.ones((4, 6), np.int32)}
  run = jax.jit(
    lambda key: bert.apply({'params': params}, batch, train=True, rngs={'dropout': key})
  )
  a, b = run(jax.random.key(0)), run(jax.random.key(1))
  assert a['choice_logits'].shape == (4,) and a['span_logits'].shape == (4, 6, 2)
  for head in heads:
    same = np.allclose(a[f'{head}_logits'], b[f'{head}_logits'])
    assert same == (head == 'span'), head


def test_packed_rows_have_an_output_for_each_sequence(model):
  config = EncoderConfig(50, 16, 1, 2, 16, 16)
  heads = ('classification', 'choice')
  bert, params = Bert(config, heads=heads, num_labels=2), random_params(config, heads)
  ids = np.arange(24, dtype=np.int32).reshape(2, 12)
  places = np.array([[0, 5], [0, 7]], np.int32)
  segments = np.array([[1] * 5 + [2] * 7, [1] * 7 + [2] * 5], np.int32)
  positions = np.array([[*range(5), *range(7)], [*range(7), *range(5)]], np.int32)
  run = jax.jit(bert.apply)
  packed = run({'params': params}, {
    'input_ids': ids, 'segment_ids': segments, 'position_ids': positions, 'cls_positions': places,
  })  # fmt: skip
  alone = run({'params': params}, {'input_ids': ids[1:, 7:]})
  assert packed['classification_logits'].shape == (2, 2, 2)
  np.testing.assert_allclose(
    packed['classification_logits'][1, 1], alone['classification_logits'][0], atol=1e-5
  )
  np.testing.assert_allclose(packed['choice_logits'][1, 1], alone['choice_logits'][0], atol=1e-5)


class Hub(http.server.BaseHTTPRequestHandler):
  """Takes a commit as the hub does, every file inline; keeps what it got."""

  files: ClassVar[dict] = {}

  def do_POST(self):
    body = self.rfile.read(int(self.headers['content-length']))
    address = f'http://127.0.0.1:{self.server.server_port}/me/mine'
    if self.headers['authorization'] != 'Bearer hf_secret':
      return self.answer(401, {'error': 'Invalid credentials'})
    if self.path.endswith('/repos/create'):
      asked = json.loads(body)
      assert asked.get('private') is True or asked['visibility'] == 'private'
      return self.answer(200, {'url': address, 'name': 'me/mine', 'id': '1'})
    if '/preupload/' in self.path:
      paths = [file['path'] for file in json.loads(body)['files']]
      modes = [{'path': p, 'uploadMode': 'regular', 'shouldIgnore': False} for p in paths]
      return self.answer(200, {'files': modes})
    if '/commit/' in self.path:
      for line in map(json.loads, body.splitlines()):
        if line['key'] == 'file':
          Hub.files[line['value']['path']] = base64.b64decode(line['value']['content'])
      return self.answer(200, {'commitUrl': f'{address}/commit/1', 'commitOid': '1' * 40})
    return self.answer(200, {'errors': [], 'warnings': []})  # of the card's YAML

  def do_GET(self):
    self.answer(200, {'sha': '0' * 40, 'id': 'me/mine', 'siblings': []})

  def answer(self, code, content):
    text = json.dumps(content).encode()
    self.send_response(code)
    self.send_header('content-type', 'application/json')
    self.send_header('content-length', str(len(text)))
    self.end_headers()
    self.wfile.write(text)

  def log_message(self, *words):
    pass


@pytest.mark.e2e
def test_a_model_is_uploaded_to_the_hub_with_a_card(model, tmp_path):
  run = tmp_path / 'run'
  save_model(run / 'model', *model)
  about = {
    'config': {'seed': 3, 'license': 'mit', 'data': {'input': 'texts'}}, 'command': ['bertjax'],
    'versions': {'jax': '0.10.2'}, 'started': '2026-11-26',
  }  # fmt: skip
  (run / 'run.json').write_text(json.dumps(about))
  (run / 'metrics.json').write_text('{"mlm_loss": 1.2345678, "step": 7}')
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  hub = {
    'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HUB_OFFLINE': '0',
    'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1',
  }  # fmt: skip

  def convert(out, name, token):
    arguments = [f'--from={run}', f'--out={tmp_path / out}', f'--hub={name}']
    return subprocess.run(
      [sys.executable, '-m', 'bertjax', 'convert', *arguments], capture_output=True, text=True,
      env=os.environ | hub | {'HF_TOKEN': token},
    )  # fmt: skip

  done = convert('a', 'me/mine', 'hf_secret')
  assert done.returncode == 0 and 'uploaded to' in done.stderr, done.stderr
  assert {'config.json', 'model.safetensors', 'vocab.txt', 'README.md'} <= Hub.files.keys()
  for name, content in Hub.files.items():
    assert (tmp_path / 'a' / name).read_bytes() == content
  card = Hub.files['README.md'].decode()
  assert 'pipeline_tag: fill-mask' in card and "load_model('me/mine')" in card
  assert '\nlicense: mit\n' in card and '| `data.input` | `texts` |\n| `seed` | `3` |' in card
  assert '| Heads | mlm, nsp |' in card and '| `mlm_loss` | 1.235 |' in card
  for number, (name, token, message) in enumerate(
    (('mine', 'hf_secret', "'mine' is no repository of the hub; name one as OWNER/NAME"),
     ('me/mine', 'hf_wrong', 'could not be uploaded as me/mine; check the connection'))
  ):  # fmt: skip
    done = convert(f'b{number}', name, token)
    assert done.returncode == 2 and message in done.stderr, done.stderr
  server.shutdown()
