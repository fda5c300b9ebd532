"""Google's TF1 checkpoints, against a reimplementation of Google's graph."""

import json
import logging
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import huggingface, loading, mapping
from bertjax.interop.google import load_google, load_tokenizer, save_google
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert
from bertjax.objectives import mlm

SIZES = {'hidden_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4,
         'intermediate_size': 80, 'max_position_embeddings': 40, 'type_vocab_size': 2,
         'hidden_act': 'gelu', 'hidden_dropout_prob': 0.1, 'attention_probs_dropout_prob': 0.1,
         'initializer_range': 0.02}  # fmt: skip
GELU = {
  'erf': lambda x: x * 0.5 * (1.0 + tf.math.erf(x / np.sqrt(2.0))),
  'tanh': lambda x: x * 0.5 * (1.0 + tf.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@pytest.fixture(scope='module', autouse=True)
def modules():
  """TensorFlow is imported for the tests that run, not where they are only collected."""
  global tf, v1
  tf = pytest.importorskip('tensorflow')
  v1 = tf.compat.v1


class GoogleBert:
  """modeling.py, run_pretraining.py and the task heads of run_classifier.py and run_squad.py.

  A TF1 graph without dropout. Variables have Google's names; every one is drawn at random, biases
  and LayerNorms too, so that none can be mixed up.
  """

  def __init__(self, vocab_size, gelu='erf', heads=('pretraining',), num_labels=3):
    self.sizes, self.vocab_size, self.gelu = SIZES, vocab_size, GELU[gelu]
    self.num_labels = num_labels
    self.graph = tf.Graph()
    with self.graph.as_default():
      v1.set_random_seed(1)
      ints = {'input_ids': [4, 17], 'token_type_ids': [4, 17], 'segment_ids': [4, 17],
              'masked_lm_positions': [4, 4], 'masked_lm_ids': [4, 4],
              'next_sentence_labels': [4]}  # fmt: skip
      self.inputs = {name: v1.placeholder(tf.int32, shape) for name, shape in ints.items()}
      self.inputs['masked_lm_weights'] = v1.placeholder(tf.float32, [4, 4])
      self.out = {}
      self._build(heads)
      variables = v1.global_variables()
      self.slots = [  # training adds its own: moments and a counter
        v1.get_variable(f'{v.op.name}/{slot}', v.shape, initializer=v1.zeros_initializer())
        for v in variables for slot in ('adam_m', 'adam_v')
      ] + [v1.get_variable('global_step', [], tf.int64, v1.zeros_initializer())]  # fmt: skip
      self.variables = {v.op.name: v for v in variables}
      self.saver, self.model_saver = v1.train.Saver(), v1.train.Saver(self.variables)
      self.session = v1.Session()
      self.session.run(v1.global_variables_initializer())

  def run(self, batch):
    return self.session.run(self.out, {self.inputs[k]: batch[k] for k in self.inputs})

  def write(self, folder, vocab, prefix='bert_model.ckpt'):
    folder.mkdir(exist_ok=True)
    with self.graph.as_default():
      self.saver.save(self.session, str(folder / prefix), write_state=prefix != 'bert_model.ckpt')
    content = self.sizes | {'vocab_size': self.vocab_size}
    (folder / 'bert_config.json').write_text(json.dumps(content))
    (folder / 'vocab.txt').write_bytes(vocab.read_bytes())

  def _variable(self, name, shape, mean=0.0):
    return v1.get_variable(name, shape, initializer=v1.random_normal_initializer(mean, 0.1))

  def _dense(self, x, size, name):
    kernel = self._variable(f'{name}/kernel', [x.shape[-1], size])
    return tf.einsum('...i,io->...o', x, kernel) + self._variable(f'{name}/bias', [size])

  def _norm(self, x, name):
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    size = [x.shape[-1]]
    beta = self._variable(f'{name}/LayerNorm/beta', size)
    gamma = self._variable(f'{name}/LayerNorm/gamma', size, mean=1.0)
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-12)

  def _output(self, x, size, name):
    """Weights [size, D] and a bias, as every output layer of Google's has them."""
    weights = self._variable(f'{name}output_weights', [size, self.sizes['hidden_size']])
    bias = self._variable(f'{name}output_bias', [size])
    return tf.einsum('...d,vd->...v', x, weights) + bias

  def _build(self, heads):
    d, out = self.sizes['hidden_size'], self.out
    ids, types = self.inputs['input_ids'], self.inputs['token_type_ids']
    e = 'bert/embeddings/'
    table = self._variable(e + 'word_embeddings', [self.vocab_size, d])
    x = tf.gather(table, ids)
    x += tf.einsum(
      'blt,td->bld', tf.one_hot(types, 2), self._variable(e + 'token_type_embeddings', [2, d])
    )
    x += self._variable(e + 'position_embeddings', [40, d])[: ids.shape[1]]
    x = self._norm(x, 'bert/embeddings')
    states, probs = [x], []
    for layer in range(self.sizes['num_hidden_layers']):
      x, p = self._layer(x, f'bert/encoder/layer_{layer}/')
      states.append(x)
      probs.append(p)
    out['all_hidden'], out['attention'] = tf.stack(states), tf.stack(probs)
    out['pooled'] = pooled = tf.tanh(self._dense(x[:, 0], d, 'bert/pooler/dense'))
    if 'pretraining' in heads:
      self._pretraining(x, pooled, table)
    if 'classification' in heads:
      out['classification_logits'] = self._output(pooled, self.num_labels, '')
    if 'span' in heads:
      out['span_logits'] = self._output(x, 2, 'cls/squad/')

  def _layer(self, x, name):
    d, heads = self.sizes['hidden_size'], self.sizes['num_attention_heads']
    shape = [4, 17, heads, d // heads]
    q, k, v = (
      tf.reshape(self._dense(x, d, f'{name}attention/self/{part}'), shape)
      for part in ('query', 'key', 'value')
    )
    scores = tf.einsum('bqhk,bshk->bhqs', q, k) / np.sqrt(d // heads)
    mask = tf.cast(self.inputs['segment_ids'], tf.float32)[:, None, None]
    probs = tf.nn.softmax(scores + (1.0 - mask) * -10000.0)
    context = tf.reshape(tf.einsum('bhqs,bshk->bqhk', probs, v), [4, 17, d])
    attended = self._dense(context, d, f'{name}attention/output/dense')
    x = self._norm(x + attended, f'{name}attention/output')
    y = self.gelu(self._dense(x, self.sizes['intermediate_size'], f'{name}intermediate/dense'))
    return self._norm(x + self._dense(y, d, f'{name}output/dense'), f'{name}output'), probs

  def _pretraining(self, x, pooled, table):
    out, weights = self.out, self.inputs['masked_lm_weights']
    y = tf.gather(x, self.inputs['masked_lm_positions'], batch_dims=1)
    p = 'cls/predictions/'
    y = self.gelu(self._dense(y, y.shape[-1], p + 'transform/dense'))
    y = self._norm(y, p + 'transform')
    bias = self._variable(p + 'output_bias', [self.vocab_size])
    out['mlm_logits'] = tf.einsum('bpd,vd->bpv', y, table) + bias
    out['nsp_logits'] = self._output(pooled, 2, 'cls/seq_relationship/')
    nll = tf.nn.sparse_softmax_cross_entropy_with_logits
    mlm = nll(self.inputs['masked_lm_ids'], out['mlm_logits'])
    out['mlm_loss'] = tf.reduce_sum(mlm * weights) / (tf.reduce_sum(weights) + 1e-5)
    out['nsp_loss'] = tf.reduce_mean(nll(self.inputs['next_sentence_labels'], out['nsp_logits']))


def random_params(config, heads, num_labels=3):
  """Parameters as NumPy arrays, from the name table."""
  rng = np.random.default_rng(0)
  shapes = mapping.shapes(config, heads, True, num_labels)
  flat = {path: rng.normal(0, 0.1, shape).astype(np.float32) for path, shape in shapes.items()}
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def batch_of(vocab_size):
  """Four pairs of an odd length, the second one padded, with masked positions."""
  rng = np.random.default_rng(0)
  segments, types = np.ones((2, 4, 17), np.int32)
  segments[1, 11:] = 0
  types[:, :7] = 0
  return {
    'input_ids': rng.integers(0, vocab_size, (4, 17), dtype=np.int32),
    'token_type_ids': types,
    'segment_ids': segments,
    'masked_lm_positions': np.stack([rng.permutation(11)[:4] for _ in range(4)]).astype(np.int32),
    'masked_lm_ids': rng.integers(0, vocab_size, (4, 4), dtype=np.int32),
    'masked_lm_weights': np.array([[1, 1, 1, 0]] * 4, np.float32),
    'next_sentence_labels': np.array([0, 1, 1, 0], np.int32),
  }


def check_equal(config, params, batch, expected):
  """All of Google's outputs, states and probabilities at real tokens."""
  heads = tuple(params.keys() - {'encoder', 'pooler'})
  bert = Bert(config, heads=heads, num_labels=3)
  run = jax.jit(lambda p: bert.apply({'params': p}, batch, capture=('hidden', 'attention')))
  out = jax.device_get(run(params))
  if 'mlm' in heads:
    sums, _ = mlm.pretraining_sums(out, batch)
    weights = mlm.pretraining_weights(batch)
    out |= {f'{term}_loss': np.asarray(sums[term] / weights[term]) for term in sums}
  real = batch['segment_ids'] > 0
  for name, theirs in expected.items():
    ours = out[name]
    if name == 'attention':
      ours, theirs = ours.swapaxes(2, 3), theirs.swapaxes(2, 3)  # [N, B, L, H, L]
    if name in ('all_hidden', 'attention'):
      ours, theirs = ours[:, real], theirs[:, real]
    if name == 'span_logits':
      ours, theirs = ours[real], theirs[real]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max()), name


@pytest.mark.parametrize('gelu', ['erf', 'tanh'])
@pytest.mark.e2e
def test_a_google_checkpoint_gives_googles_outputs_and_returns(tmp_path, vocab, caplog, gelu):
  caplog.set_level(logging.INFO, 'bertjax')
  tokenizer = Tokenizer.from_file(vocab)
  google = GoogleBert(tokenizer.vocab_size, gelu)
  google.write(tmp_path / 'theirs', vocab)
  config, params = load_google(tmp_path / 'theirs', gelu=gelu)
  assert f"skipped {len(google.slots)} of the optimizer's tensors" in caplog.text
  assert 'not read' not in caplog.text
  batch = batch_of(tokenizer.vocab_size)
  check_equal(config, params, batch, google.run(batch))

  save_google(tmp_path / 'ours', config, params, tokenizer)
  before = tf.train.load_checkpoint(str(tmp_path / 'theirs' / 'bert_model.ckpt'))
  after = tf.train.load_checkpoint(str(tmp_path / 'ours' / 'bert_model.ckpt'))
  assert set(after.get_variable_to_shape_map()) == set(google.variables)
  for name in google.variables:
    np.testing.assert_array_equal(after.get_tensor(name), before.get_tensor(name), err_msg=name)
  assert json.loads((tmp_path / 'ours' / 'bert_config.json').read_text())['hidden_act'] == 'gelu'
  assert ("gelu='tanh'" in caplog.text) == (gelu == 'tanh')


@pytest.mark.e2e
def test_what_we_save_runs_in_googles_graph(tmp_path, vocab):
  tokenizer = Tokenizer.from_file(vocab)
  google = GoogleBert(tokenizer.vocab_size)
  config = EncoderConfig(tokenizer.vocab_size, 48, 3, 4, 80, 40)
  params = random_params(config, ('mlm', 'nsp'))
  save_google(tmp_path / 'ours', config, params, tokenizer)
  with google.graph.as_default():
    google.model_saver.restore(google.session, str(tmp_path / 'ours' / 'bert_model.ckpt'))
  batch = batch_of(tokenizer.vocab_size)
  check_equal(config, params, batch, google.run(batch))
  again_config, again = load_google(tmp_path / 'ours')
  assert again_config == config
  jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize('head', ['classification', 'span'])
@pytest.mark.e2e
def test_googles_task_heads_load_from_the_newest_checkpoint(tmp_path, vocab, head):
  size = Tokenizer.from_file(vocab).vocab_size
  google = GoogleBert(size, heads=(head,))
  google.write(tmp_path / 'run', vocab, prefix='model.ckpt-343')
  config, params = load_google(tmp_path / 'run')
  assert set(params) == {'encoder', 'pooler', head}
  batch = batch_of(size)
  check_equal(config, params, batch, google.run(batch))
  again_config, again = load_google(tmp_path / 'run' / 'model.ckpt-343', heads=(head,))
  assert again_config == config
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_google_model_goes_to_hugging_face_and_back_bit_for_bit(tmp_path, vocab):
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(tokenizer.vocab_size, 48, 2, 4, 80, 40)
  params = random_params(config, ('tagging',))
  save_google(tmp_path / 'a', config, params, tokenizer, labels=['O', 'B-X', 'I-X'])
  loading.save_model(
    tmp_path / 'b', *loading.load_model(tmp_path / 'a'),
    labels=loading.read_labels(tmp_path / 'a')[0],
  )  # fmt: skip
  bert, again, _ = loading.load_model(tmp_path / 'b')
  assert bert.config == config
  assert loading.read_labels(tmp_path / 'b') == (['O', 'B-X', 'I-X'], '')
  jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize(
  ('pieces', 'lowercase'), [(['the', '##s'], True), (['the', 'The', '##s'], False)]
)
def test_the_case_of_a_vocabulary_is_inferred_from_its_entries(tmp_path, pieces, lowercase):
  (tmp_path / 'bert_config.json').write_text('{}')
  (tmp_path / 'bert_model.ckpt.index').write_text('')
  special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '[unused1]']
  (tmp_path / 'vocab.txt').write_text('\n'.join(special + pieces) + '\n')
  assert load_tokenizer(tmp_path).lowercase == lowercase
  assert load_tokenizer(tmp_path, lowercase=not lowercase).lowercase != lowercase


@pytest.fixture(scope='module')
def saved(tmp_path_factory, vocab):
  """A folder of Google's files, of our making."""
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(tokenizer.vocab_size, 16, 1, 2, 16, 16)
  folder = tmp_path_factory.mktemp('google') / 'model'
  save_google(folder, config, random_params(config, ('mlm', 'nsp')), tokenizer)
  return folder


def damage(folder, what):
  path = {
    'config': folder / 'bert_config.json', 'data': folder / 'bert_model.ckpt.data-00000-of-00001',
    'index': folder / 'bert_model.ckpt.index',
  }  # fmt: skip
  if what == 'truncated':
    path['data'].write_bytes(path['data'].read_bytes()[:999])
  elif what == 'index':
    path['index'].write_bytes(path['index'].read_bytes()[:50])
  elif what == 'no data':
    path['data'].unlink()
  elif what == 'no index':
    path['index'].unlink()
  elif what == 'no config':
    path['config'].unlink()
  elif what == 'json':
    path['config'].write_text('{"hidden_size": 16,')
  elif what == 'layers':
    content = json.loads(path['config'].read_text())
    path['config'].write_text(json.dumps(content | {'num_hidden_layers': 2}))
  elif what == 'width':
    content = json.loads(path['config'].read_text())
    path['config'].write_text(json.dumps(content | {'hidden_size': 32}))
  elif what == 'objects':
    tf.train.Checkpoint(x=tf.Variable(1.0)).write(str(folder / 'bert_model.ckpt'))


@pytest.mark.parametrize(
  ('what', 'words'),
  [
    ('truncated', ['bert_model.ckpt', 'corrupt at bert/']),
    ('index', ['bert_model.ckpt', 'corrupt']),
    ('no data', ['bert_model.ckpt', 'corrupt']),
    ('no index', ['bert_model.ckpt.index']),
    ('no config', ['config.json']),
    ('json', ['bert_config.json', 'corrupt']),
    ('layers', ['bert_model.ckpt', 'bert/encoder/layer_1/']),
    ('width', ['bert/embeddings/word_embeddings', '(600, 16)', '(600, 32)']),
    ('objects', ['TensorFlow 2 objects']),
  ],
)
def test_a_bad_google_checkpoint_gets_one_sentence(saved, tmp_path, what, words):
  folder = tmp_path / 'model'
  shutil.copytree(saved, folder)
  damage(folder, what)
  with pytest.raises(ValueError) as raised:
    loading.load_weights(folder)
  for word in words:
    assert word in str(raised.value)


def rename(folder, name):
  """Gives the checkpoint in a folder another name."""
  for path in folder.glob('bert_model.ckpt.*'):
    path.rename(folder / path.name.replace('bert_model.ckpt', name))


def test_a_checkpoint_is_found_by_its_files_and_without_a_checkpoint_file(saved, tmp_path):
  folder = tmp_path / 'model'
  shutil.copytree(saved, folder)
  expected = loading.load_weights(folder)
  rename(folder, 'model.ckpt-343')
  (folder / 'model.ckpt-343.meta').touch()
  endings = ('', '.index', '.meta', '.data-00000-of-00001')
  for path in (folder, *(f'{folder}/model.ckpt-343{ending}' for ending in endings)):
    config, params = loading.load_weights(path)
    assert config == expected[0] and loading.load_tokenizer(path).vocab_size == config.vocab_size
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
  shutil.copy(folder / 'model.ckpt-343.index', folder / 'model.ckpt-200.index')
  with pytest.raises(ValueError, match=r'name one of .*model.ckpt-200, .*model.ckpt-343\.'):
    loading.load_weights(folder)
  for path in folder.glob('*.index'):
    path.unlink()
  with pytest.raises(ValueError, match=r'it holds bert_config.json, model.ckpt-343.data-0'):
    loading.load_weights(folder)
  (folder / 'bert_config.json').unlink()
  with pytest.raises(ValueError, match=r'no config.json. It has model.ckpt-343.data-0'):
    loading.load_weights(folder)


@pytest.mark.parametrize('change', [{'causal': True}, {'layer_norm_eps': 1e-5}])
def test_what_googles_code_cannot_compute_is_refused_before_writing(tmp_path, vocab, change):
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(tokenizer.vocab_size, 16, 1, 2, 16, 16, **change)
  with pytest.raises(ValueError, match="Google's code"):
    save_google(tmp_path / 'x', config, random_params(config, ('mlm', 'nsp')), tokenizer)
  assert not list(tmp_path.iterdir())


def test_the_table_has_every_head_under_each_format():
  config = EncoderConfig(50, 16, 2, 2, 16, 16)
  heads = ('mlm', 'nsp', 'span', 'choice')
  params = random_params(config, heads)
  for style in ('huggingface', 'google', 'flax'):
    tensors = huggingface.to_tensors(config, params, style)
    again = huggingface.from_tensors(config, tensors, heads, 'memory', style)
    jax.tree.map(np.testing.assert_array_equal, params, again)
