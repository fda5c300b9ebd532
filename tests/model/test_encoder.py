"""The encoder and its heads against numbers of fidelity: counts, initialisers, masks, dtypes."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax import export

from bertjax.interop import mapping
from bertjax.model import attention as attention_lib
from bertjax.model import config as config_lib
from bertjax.model import encoder
from bertjax.model import flops as flops_lib
from bertjax.model.attention import attention
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.training import hlo
from bertjax.training.mesh import path_name

TINY = EncoderConfig(
  vocab_size=97, hidden_size=32, num_layers=3, num_heads=4, mlp_size=64, max_positions=24
)

# Layer 0, two groups of (local, global), layer 5; and layers that are all alike.
PRE_NORM = {
  'modernbert': config_lib.modernbert_base(
    vocab_size=97, hidden_size=32, num_layers=6, num_heads=4, mlp_size=48, max_positions=40,
    local_window=8, global_every=2, hidden_dropout=0.1, attention_dropout=0.1,
  ),
  'eurobert': EncoderConfig(
    vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48,
    max_positions=40, positions='rotary', type_vocab_size=0, norm='rms', norm_position='pre',
    embedding_norm=False, linear_bias=False, gated_mlp=True, activation='silu',
  ),
}  # fmt: skip


@pytest.fixture(scope='module')
def params():
  return jax.jit(lambda key: init_params(Bert(TINY), key))(jax.random.key(0))


@pytest.fixture(scope='module')
def gradient(params):
  """gradient(config): that of a loss of both heads with dropout; made once for each config."""
  batch = batch_of(np.random.default_rng(3))

  @functools.cache
  def gradient(config):
    def value(params):
      out = run(config, params, batch, train=True, rngs={'dropout': jax.random.key(7)})
      return (out['mlm_logits'] ** 2).mean() + (out['nsp_logits'] ** 2).mean()

    return jax.jit(jax.grad(value))(params)

  return gradient


def batch_of(rng, rows=4, length=16, vocab=97):
  return {
    'input_ids': rng.integers(0, vocab, (rows, length), dtype=np.int32),
    'token_type_ids': rng.integers(0, 2, (rows, length), dtype=np.int32),
  }


@functools.cache
def compiled(config, heads, train, capture):
  bert = Bert(config, heads=heads)
  return jax.jit(
    lambda params, batch, rngs: bert.apply(
      {'params': params}, batch, train=train, rngs=rngs, capture=capture
    )
  )


def run(config, params, batch, heads=('mlm', 'nsp'), *, train=False, rngs=None, capture=()):
  return compiled(config, heads, train, capture)(params, batch, rngs)


# Parameters: encoder and embeddings, with pooler, with MLM head, all of pre-training. Derived from
# the sizes in Devlin et al. (2018) and Turc et al. (2019); base with pooler is Hugging Face's
# 109,482,240.
COUNTS = {
  'tiny': (4_369_408, 4_385_920, 4_433_210, 4_433_468),
  'mini': (11_104_768, 11_170_560, 11_267_386, 11_267_900),
  'small': (28_500_992, 28_763_648, 29_057_850, 29_058_876),
  'medium': (41_110_528, 41_373_184, 41_667_386, 41_668_412),
  'base': (108_891_648, 109_482_240, 110_104_890, 110_106_428),
  'large': (334_092_288, 335_141_888, 336_224_058, 336_226_108),
}
VARIANTS = (((), False), ((), True), (('mlm',), True), (('mlm', 'nsp'), True))


def count(config, heads, pooler):
  shapes = jax.eval_shape(
    lambda: init_params(Bert(config, heads=heads, pooler=pooler), jax.random.key(0))
  )
  return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize('field', dataclasses.fields(EncoderConfig), ids=lambda field: field.name)
def test_every_field_of_a_preset_can_be_changed(field):
  values = {'hidden_size': 320, 'features': '1', 'activation': 'gelu_tanh', 'dtype': 'bfloat16',
            'attention': 'xla', 'remat': 'full', 'positions': 'rotary', 'norm': 'rms',
            'norm_position': 'pre', 'classifier_pooling': 'mean', 'num_kv_heads': 1,
            'relative_buckets': 32,
            'classifier_hidden': 'tanh'}  # fmt: skip
  value = values.get(
    field.name, {int: 4, float: 0.5, bool: not field.default}.get(type(field.default))
  )
  needed = {
    'rope_theta': {'positions': 'rotary'}, 'classifier_norm': {'classifier_hidden': 'gelu'},
    'classifier_pooling': {'classifier_hidden': 'gelu'},
  }.get(field.name, {})  # fmt: skip
  for preset in COUNTS:
    config = config_lib.PRESETS[preset](**{field.name: value}, **needed)
    plain = config_lib.PRESETS[preset](**needed)
    assert getattr(config, field.name) == value != field.default, preset
    changed = {f.name for f in dataclasses.fields(config)
               if getattr(config, f.name) != getattr(plain, f.name)}  # fmt: skip
    follow = {'num_heads', 'mlp_size'} if field.name == 'hidden_size' else set()
    assert changed - {field.name} <= follow, preset


def test_heads_and_mlp_follow_the_width_of_a_preset():
  config = config_lib.bert_base(hidden_size=320)
  assert (config.num_layers, config.num_heads, config.mlp_size) == (12, 5, 1280)
  config = config_lib.bert_base(num_layers=6, hidden_size=312, num_heads=12, mlp_size=1200)
  assert (config.num_layers, config.num_heads, config.mlp_size) == (6, 12, 1200)
  assert config_lib.bert_tiny(hidden_size=200).num_heads == 2  # 3 heads of 64 do not fit
  with pytest.raises(ValueError, match='num_heads=2 fits'):
    EncoderConfig(hidden_size=200)


@pytest.mark.parametrize('preset', COUNTS)
def test_parameter_counts_are_those_of_the_paper(preset):
  config = config_lib.PRESETS[preset]()
  assert tuple(count(config, *variant) for variant in VARIANTS) == COUNTS[preset]


@pytest.mark.parametrize(
  ('vocab', 'counts'),
  [
    (28_996, (107_719_680, 108_310_272, 108_931_396, 108_932_934)),
    (119_547, (177_262_848, 177_853_440, 178_565_115, 178_566_653)),
  ],
)
def test_parameter_counts_of_other_vocabularies(vocab, counts):
  config = config_lib.bert_base(vocab_size=vocab)
  assert tuple(count(config, *variant) for variant in VARIANTS) == counts


@pytest.mark.parametrize(('heads', 'pooler'), VARIANTS)
def test_the_name_table_names_every_parameter_of_the_model(heads, pooler):
  shapes = jax.eval_shape(
    lambda: init_params(Bert(TINY, heads=heads, pooler=pooler), jax.random.key(0))
  )
  own = {path_name(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  assert mapping.shapes(TINY, heads, pooler) == own
  assert {entry.path for entry in mapping.entries(TINY, heads, pooler)} == own.keys()


def test_kernels_and_tables_are_truncated_normals_and_the_rest_zeros_and_ones():
  config = dataclasses.replace(TINY, vocab_size=2000, hidden_size=256, mlp_size=1024)
  params = jax.jit(lambda key: init_params(Bert(config), key))(jax.random.key(1))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = path_name(path)
    if name.endswith('scale'):
      assert (leaf == 1).all(), name
    elif name.endswith('bias'):
      assert (leaf == 0).all(), name
    else:
      assert abs(leaf).max() <= 0.04, name  # two deviations of 0.02
      if leaf.size > 20_000:
        # A normal truncated at two deviations keeps 0.8796 of its deviation.
        assert np.std(leaf) == pytest.approx(0.8796 * 0.02, rel=0.02), name
        assert abs(np.mean(leaf)) < 4e-4, name


def test_layers_start_different(params):
  kernel = params['encoder']['layers']['mlp']['in']['kernel']
  assert not np.allclose(kernel[0], kernel[1])


def test_padding_does_not_change_real_tokens(params):
  batch = batch_of(np.random.default_rng(0))
  segments = np.ones((4, 16), np.int32)
  segments[:, 11:] = 0
  short = {k: v[:, :11] for k, v in batch.items()}
  a = run(TINY, params, batch | {'segment_ids': segments})
  b = run(TINY, params, short)
  np.testing.assert_allclose(a['hidden'][:, :11], b['hidden'], atol=1e-5)
  np.testing.assert_allclose(a['pooled'], b['pooled'], atol=1e-5)


def test_packed_sequences_do_not_attend_to_each_other(params):
  rng = np.random.default_rng(1)
  one, two = batch_of(rng, length=7), batch_of(rng, length=9)
  packed = {k: np.concatenate([one[k], two[k]], 1) for k in one}
  packed['segment_ids'] = np.repeat([[1] * 7 + [2] * 9], 4, 0).astype(np.int32)
  packed['position_ids'] = np.repeat([[*range(7), *range(9)]], 4, 0).astype(np.int32)
  packed['cls_positions'] = np.repeat([[0, 7]], 4, 0).astype(np.int32)
  out, a, b = (run(TINY, params, x) for x in (packed, one, two))
  np.testing.assert_allclose(out['hidden'][:, :7], a['hidden'], atol=1e-5)
  np.testing.assert_allclose(out['hidden'][:, 7:], b['hidden'], atol=1e-5)
  np.testing.assert_allclose(out['nsp_logits'][:, 1], b['nsp_logits'], atol=1e-5)


def test_a_causal_encoder_attends_to_no_later_token(params):
  config = dataclasses.replace(TINY, causal=True)
  batch = batch_of(np.random.default_rng(2))
  other = batch | {'input_ids': batch['input_ids'].copy()}
  other['input_ids'][:, 9:] = 5
  a, b = run(config, params, batch), run(config, params, other)
  np.testing.assert_array_equal(a['hidden'][:, :9], b['hidden'][:, :9])
  assert not np.allclose(a['hidden'][:, 9:], b['hidden'][:, 9:])


def test_a_bidirectional_encoder_attends_to_later_tokens(params):
  batch = batch_of(np.random.default_rng(2))
  other = batch | {'input_ids': batch['input_ids'].copy()}
  other['input_ids'][:, -1] += 1
  assert not np.allclose(
    run(TINY, params, batch)['hidden'][:, 0], run(TINY, params, other)['hidden'][:, 0]
  )


@pytest.mark.parametrize(
  'changes', [{'unroll': 3}, {'unroll': 2}, {'remat': 'full'}, {'remat': 'dots'}]
)
@pytest.mark.e2e
def test_unrolling_and_rematerialising_change_no_gradient(gradient, changes):
  other = gradient(dataclasses.replace(TINY, **changes))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient(TINY), other)


@pytest.mark.full
@pytest.mark.parametrize('config', [TINY, PRE_NORM['modernbert']], ids=['bert', 'modernbert'])
def test_dots_computes_nothing_of_attention_again_but_the_scores(config):
  config = dataclasses.replace(config, hidden_dropout=0.0, attention_dropout=0.0)
  rows, length = 2, 40
  batch = {'input_ids': np.ones((rows, length), np.int32)}

  def flops(remat):
    bert = Bert(dataclasses.replace(config, remat=remat, max_positions=length), ('mlm',))
    params = jax.eval_shape(lambda: init_params(bert, jax.random.key(0)))
    loss = jax.grad(lambda p: (bert.apply({'params': p}, batch)['mlm_logits'] ** 2).mean())
    return hlo.costs(jax.jit(loss).lower(params).compile().as_text()).product_flops

  scores = 2 * rows * length**2 * config.hidden_size
  # A local layer has blocks of 4 queries with 12 keys.
  local = flops_lib.local_layers(config)
  again = (config.num_layers - local) * scores + local * scores * 12 / length
  assert flops('dots') - flops('none') == again


def test_a_flash_kernel_is_not_used_to_initialise():
  for config in (TINY, PRE_NORM['modernbert']):
    splash, xla = (
      jax.eval_shape(functools.partial(init_params, Bert(kind, ('mlm',))), jax.random.key(0))
      for kind in (dataclasses.replace(config, attention=name) for name in ('splash', 'xla'))
    )
    assert splash == xla


@pytest.fixture(scope='module')
def pre_norm_params():
  @functools.cache
  def params(name):
    bert = Bert(PRE_NORM[name], ('mlm', 'nsp'))
    params = jax.jit(lambda key: init_params(bert, key))(jax.random.key(0))
    return jax.tree.map(lambda x: x * 3, params)  # far from uniform attention

  return params


@pytest.mark.parametrize('name', PRE_NORM)
@pytest.mark.e2e
def test_packed_rows_of_pre_norm_encoders_equal_the_unpacked_ones(pre_norm_params, name):
  config, rng = PRE_NORM[name], np.random.default_rng(1)
  one, two = (rng.integers(0, 97, (2, length), dtype=np.int32) for length in (21, 13))
  packed = {
    'input_ids': np.concatenate([one, two, np.zeros((2, 3), np.int32)], 1),
    'segment_ids': np.array([[1] * 21 + [2] * 13 + [0] * 3] * 2, np.int32),
    'position_ids': np.array([[*range(21), *range(13), 0, 0, 0]] * 2, np.int32),
  }
  apply = jax.jit(functools.partial(run, config, pre_norm_params(name)))
  out = apply(packed)['mlm_logits']
  for ids, got in ((one, out[:, :21]), (two, out[:, 21:34])):
    want = apply({'input_ids': ids})['mlm_logits']
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.e2e
@pytest.mark.parametrize(
  ('length', 'window'), [(192, 16), pytest.param(8192, 128, marks=pytest.mark.slow)]
)
def test_packed_rows_with_local_windows_have_the_results_and_gradients_of_full_masks(
  length, window
):
  """Sequences of many lengths, shorter and longer than the window; the last one is padding."""
  config = config_lib.modernbert_base(
    vocab_size=97, hidden_size=16, num_layers=3, num_heads=1, mlp_size=16, max_positions=length,
    local_window=window, global_every=2,
  )  # fmt: skip
  rng = np.random.default_rng(4)
  cuts = np.sort(rng.choice(np.arange(1, length - window), 6, replace=False))
  lengths = np.diff([0, window // 4, *(cuts + window // 4), length])
  segments = np.repeat([1, 2, 3, 4, 5, 6, 7, 0], lengths)[None].astype(np.int32)
  batch = {
    'input_ids': rng.integers(0, 97, (1, length), dtype=np.int32), 'segment_ids': segments,
    'position_ids': np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32),
  }  # fmt: skip
  bert = Bert(config, ('mlm',))
  params = jax.jit(lambda key: init_params(bert, key))(jax.random.key(0))
  params = jax.tree.map(lambda x: x * 3, params)  # far from uniform attention
  targets = rng.normal(size=(1, length, 16)).astype(np.float32)

  @functools.partial(jax.jit, static_argnames='capture')
  def value(params, capture):  # the probabilities need the mask of all pairs
    def loss(params):
      out = bert.apply({'params': params}, batch, capture=capture)
      states = jnp.where(segments[..., None] > 0, out['hidden'], 0)
      return (states * targets).sum(), states

    (_, states), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return states, gradient['encoder']

  blocks, full = (value(params, capture) for capture in ((), ('attention',)))
  for one, other in zip(jax.tree.leaves(blocks), jax.tree.leaves(full), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())
  wider = dataclasses.replace(config, local_window=2 * length)  # the same layers attend to all
  assert np.abs(run(wider, params, batch, ('mlm',))['hidden'] - full[0]).max() > 0.1


@pytest.mark.parametrize('changes', [{'unroll': 6, 'remat': 'full'}, {'remat': 'dots'}])
@pytest.mark.e2e
def test_groups_of_layers_unrolled_or_rematerialised_change_no_gradient(pre_norm_params, changes):
  ids = np.random.default_rng(1).integers(0, 97, (2, 29), dtype=np.int32)

  def gradient(config):
    def loss(params):
      out = run(config, params, {'input_ids': ids}, train=True, rngs={'dropout': jax.random.key(7)})
      return (out['mlm_logits'] ** 2).mean()

    return jax.jit(jax.grad(loss))(pre_norm_params('modernbert'))

  one, other = (
    gradient(PRE_NORM['modernbert']),
    gradient(dataclasses.replace(PRE_NORM['modernbert'], **changes)),
  )
  scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(one))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), one, other)


def test_captured_layers_of_groups_are_in_order(pre_norm_params):
  config, params = PRE_NORM['modernbert'], pre_norm_params('modernbert')
  ids = np.random.default_rng(1).integers(0, 97, (2, 29), dtype=np.int32)
  apply = jax.jit(functools.partial(run, config), static_argnames='capture')
  out = apply(params, {'input_ids': ids}, capture=('hidden', 'attention'))
  assert out['all_hidden'].shape == (7, 2, 29, 32) and out['attention'].shape == (6, 2, 4, 29, 29)
  np.testing.assert_array_equal(out['all_hidden'][-1], out['hidden'])
  far = np.asarray(out['attention'][..., 0, 5:]).max((1, 2, 3)) > 0  # beyond half a window
  np.testing.assert_array_equal(far, np.arange(6) % 2 == 0)
  np.testing.assert_allclose(out['hidden'], apply(params, {'input_ids': ids})['hidden'], atol=1e-4)


def test_scaled_initialisation_starts_output_projections_smaller():
  config = dataclasses.replace(PRE_NORM['modernbert'], hidden_size=128, mlp_size=256)
  bert, small = Bert(config, ('mlm',), pooler=False), 0.02 / 12**0.5
  layers = jax.jit(lambda key: init_params(bert, key))(jax.random.key(1))['encoder']['layers']
  for name, part, std in (('attention', 'qkv', 0.02), ('attention', 'out', small),
                          ('mlp', 'gated_in', 0.02), ('mlp', 'out', small)):  # fmt: skip
    assert np.std(layers[name][part]['kernel']) == pytest.approx(0.8796 * std, rel=0.02), part
  assert layers['attention_layer_norm']['scale'].shape == (5, 128)  # none in the first layer


@pytest.mark.parametrize(
  ('preset', 'parameters'), [('modernbert_base', 149_655_232), ('modernbert_large', 395_881_664)]
)
def test_parameter_counts_of_modernbert_are_those_of_the_releases(preset, parameters):
  assert count(config_lib.PRESETS[preset](), ('mlm',), False) == parameters


def test_logits_at_masked_positions_are_those_of_all_positions(params):
  batch = batch_of(np.random.default_rng(4))
  places = np.array([[1, 5, 9]] * 4, np.int32)
  full = run(TINY, params, batch)['mlm_logits']
  some = run(TINY, params, batch | {'masked_lm_positions': places})['mlm_logits']
  assert full.shape == (4, 16, 97) and full.dtype == jnp.float32
  np.testing.assert_allclose(some, np.take_along_axis(full, places[..., None], 1), atol=1e-5)


def test_absent_keys_take_their_defaults(params):
  ids = batch_of(np.random.default_rng(5))['input_ids']
  explicit = {
    'input_ids': ids,
    'token_type_ids': np.zeros_like(ids),
    'segment_ids': np.ones_like(ids),
    'position_ids': np.broadcast_to(np.arange(16, dtype=np.int32), ids.shape),
  }
  a, b = run(TINY, params, {'input_ids': ids}), run(TINY, params, explicit)
  np.testing.assert_array_equal(a['hidden'], b['hidden'])


def test_input_embeddings_take_the_place_of_ids(params):
  batch = batch_of(np.random.default_rng(1))
  table = params['encoder']['embeddings']['word']['embedding']
  embedded = {'input_embeddings': table[batch['input_ids']]}
  embedded['token_type_ids'] = batch['token_type_ids']
  expected, out = run(TINY, params, batch), run(TINY, params, embedded)
  jax.tree.map(np.testing.assert_array_equal, out, expected)

  def first(embeddings):  # every position of a row has its own gradient
    return run(TINY, params, embedded | {'input_embeddings': embeddings})['nsp_logits'][0, 0]

  gradient = jax.jit(jax.grad(first))(embedded['input_embeddings'])
  assert (np.abs(gradient[0]).max(-1) > 0).all() and not gradient[1:].any()


def test_capture_adds_states_and_probabilities_of_every_layer(params):
  batch = batch_of(np.random.default_rng(6))
  out = run(TINY, params, batch, capture=('hidden', 'attention'))
  assert out['all_hidden'].shape == (4, 4, 16, 32)
  assert out['attention'].shape == (3, 4, 4, 16, 16)
  np.testing.assert_allclose(out['attention'].sum(-1), 1, atol=1e-5)
  np.testing.assert_array_equal(out['all_hidden'][-1], out['hidden'])


def test_dropout_needs_train_and_differs_by_key(params):
  batch = batch_of(np.random.default_rng(7))
  still = run(TINY, params, batch)['hidden']
  np.testing.assert_array_equal(still, run(TINY, params, batch)['hidden'])
  a, b = (
    run(TINY, params, batch, train=True, rngs={'dropout': jax.random.key(k)})['hidden']
    for k in (0, 1)
  )
  assert not np.allclose(a, b) and not np.allclose(a, still)


def test_attention_dropout_drops_single_probabilities():
  ones = jnp.ones((2, 64, 2, 1))  # uniform attention: each context is the mean of kept values
  segments = jnp.ones((2, 64), jnp.int32)
  context, probs = attention(
    ones, ones, ones, segments, dropout_rate=0.25, dropout_rng=jax.random.key(0), return_probs=True
  )
  np.testing.assert_allclose(probs, 1 / 64, rtol=1e-6)
  kept = np.asarray(context)[..., 0] * 64 * 0.75  # how many of 64 keys each query kept
  assert abs(kept.mean() - 48) < 1 and kept.std() == pytest.approx(
    (64 * 0.25 * 0.75) ** 0.5, rel=0.2
  )


@pytest.mark.parametrize('packed', [False, True])
def test_the_gradient_of_a_word_of_thousands_of_tokens_is_summed_in_float32(packed):
  """In bfloat16 the sum of 4,096 gradients of about 1 ends at 512."""
  config = dataclasses.replace(TINY, dtype='bfloat16', embedding_norm=False, hidden_dropout=0.0)
  embed, shape = encoder.Embeddings(config), (4096, 2)
  batch = {'input_ids': jnp.full(shape, 7)}
  if packed:
    batch['position_ids'] = jnp.broadcast_to(jnp.arange(2), shape)
  params = embed.init(jax.random.key(0), batch, False)
  weights = jax.random.uniform(jax.random.key(1), (*shape, 1), jnp.bfloat16, 0.5, 1.5)
  gradient = jax.jit(
    jax.grad(lambda params: (embed.apply(params, batch, False)[0] * weights).sum())
  )
  tables, each = gradient(params)['params'], np.asarray(weights, np.float64).sum((0, 2))
  for name, row, want in (
    ('word', 7, each.sum()),
    ('position', 0, each[0]),
    ('position', 1, each[1]),
  ):
    np.testing.assert_allclose(tables[name]['embedding'][row], want, rtol=0.001)


@pytest.mark.parametrize(
  ('backend', 'train', 'changes', 'loop'),
  [
    ('gpu', True, {}, False),
    ('gpu', False, {}, True),
    ('gpu', True, {'unroll': 1}, True),
    ('gpu', True, {'frozen': True}, True),
    ('tpu', True, {}, True),
    ('cpu', True, {}, True),
  ],
)
def test_training_steps_on_a_gpu_have_no_loop_over_layers(
  params, monkeypatch, backend, train, changes, loop
):
  monkeypatch.setattr(encoder, 'backend_of_step', lambda: backend)
  bert, batch = Bert(dataclasses.replace(TINY, **changes)), batch_of(np.random.default_rng(8))
  rngs = {'dropout': jax.random.key(0)} if train else None
  text = str(jax.make_jaxpr(
    lambda p: bert.apply({'params': p}, batch, train=train, rngs=rngs)['hidden']
  )(params))  # fmt: skip
  assert (f'length={TINY.num_layers}' in text and f'unroll={TINY.num_layers}' not in text) == loop


def test_groups_of_layers_are_unrolled_on_a_gpu_too(pre_norm_params, monkeypatch):
  bert, ids = Bert(PRE_NORM['modernbert'], heads=('mlm',), pooler=False), np.ones((2, 16), np.int32)

  def loops(backend):
    monkeypatch.setattr(encoder, 'backend_of_step', lambda: backend)
    apply = functools.partial(bert.apply, train=True, rngs={'dropout': jax.random.key(0)})
    params = pre_norm_params('modernbert')
    text = str(jax.make_jaxpr(lambda p: apply({'params': p}, {'input_ids': ids})['hidden'])(params))
    return 'length=2' in text and 'unroll=2' not in text

  assert loops('cpu') and not loops('gpu')


@pytest.mark.parametrize('features', [32, (3, 2, 16)])
def test_the_gradient_of_a_bias_is_summed_in_float32(features):
  layer = encoder.dense(dataclasses.replace(TINY, dtype='bfloat16'), features, 'layer')
  x = jax.random.normal(jax.random.key(0), (256, 128, 32), jnp.bfloat16)
  params = layer.init(jax.random.key(1), x[:1])
  assert layer.apply(params, x).dtype == jnp.bfloat16
  weights = jax.random.uniform(jax.random.key(1), (256, 128, 1), jnp.bfloat16, 0.5, 1.5)
  weights = weights.reshape(256, 128, *(1 for _ in np.atleast_1d(features)))
  gradient = jax.jit(jax.grad(lambda params: (layer.apply(params, x) * weights).sum()))
  got = gradient(params)['params']['bias']
  want = np.broadcast_to(np.asarray(weights, np.float64), (256, 128, *got.shape)).sum((0, 1))
  np.testing.assert_allclose(got, want, rtol=0.001)


def test_softmax_and_layer_norm_stay_float32_in_bfloat16(params):
  config = dataclasses.replace(TINY, dtype='bfloat16')
  batch = batch_of(np.random.default_rng(8))
  out = run(config, params, batch, capture=('attention',))
  assert out['hidden'].dtype == jnp.bfloat16
  assert out['attention'].dtype == out['mlm_logits'].dtype == jnp.float32
  np.testing.assert_allclose(
    out['hidden'].astype(np.float32), run(TINY, params, batch)['hidden'], atol=0.05
  )
  text = jax.jit(lambda p: run(config, p, batch)).lower(params).as_text()
  assert 'rsqrt' in text
  assert not [x for x in text.split('\n') if 'rsqrt' in x and 'bf16' in x]
  assert not [x for x in text.split('\n') if 'stablehlo.exponential' in x and 'bf16' in x]


def test_layer_norm_with_eps_1e_12_survives_a_constant_row():
  config = dataclasses.replace(TINY, dtype='bfloat16')
  norm = encoder.Norm(config)
  x = jnp.full((2, 32), 3.0, jnp.bfloat16)
  out = norm.apply(norm.init(jax.random.key(0), x), x)
  assert np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize(('name', 'value'), [('gelu', 0.8413447), ('gelu_tanh', 0.8411920)])
def test_both_forms_of_gelu(name, value):
  # x * Phi(x) at 1, exact by erf, and by the tanh approximation (Hendrycks and Gimpel 2016).
  from bertjax.model.encoder import ACTIVATION

  assert float(ACTIVATION[name](jnp.float32(1.0))) == pytest.approx(value, abs=1e-6)


def test_a_foreign_batch_key_names_ours(params):
  with pytest.raises(ValueError, match='segment_ids'):
    run(TINY, params, {'input_ids': np.zeros((1, 4), np.int32), 'input_mask': np.ones((1, 4))})


@pytest.mark.parametrize(
  ('batch', 'options', 'words'),
  [
    ({'tokens': np.zeros((1, 4))}, {}, 'input_ids'),
    ({'input_ids': np.zeros((1, 25), np.int32)}, {}, 'max_positions=24'),
    ({'input_embeddings': np.zeros((1, 25, 32))}, {}, 'max_positions=24'),
    ({'input_embeddings': np.zeros((1, 4, 16))}, {}, 'hidden_size=32'),
    (
      {'input_ids': np.zeros((1, 4), np.int32), 'input_embeddings': np.zeros((1, 4, 32))},
      {},
      'and not both',
    ),
    ({'input_ids': np.zeros((1, 4), np.int32)}, {'heads': ('squad',)}, 'unknown head'),
    ({'input_ids': np.zeros((1, 4), np.int32)}, {'capture': ('logits',)}, 'unknown capture'),
  ],
)
def test_a_wrong_call_says_the_rule(params, batch, options, words):
  with pytest.raises(ValueError, match=words):
    run(TINY, params, batch, **options)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'hidden_size': 100, 'num_heads': 12}, 'num_heads=1'),
    ({'hidden_dropout': 1.0}, 'hidden_dropout'),
    ({'activation': 'tanh'}, 'gelu_tanh'),
    ({'local_window': 7}, 'even number of tokens'),
    ({'local_window': 8, 'global_every': 1}, 'global_every=3'),
    ({'rope_theta': 160_000.0}, "needs positions='rotary', got 'learned'"),
    ({'positions': 'rotary', 'hidden_size': 36}, 'heads of an even size'),
    ({'num_kv_heads': 5}, 'divide num_heads=12'),
    ({'classifier_norm': True}, "set classifier_hidden='gelu'"),
    ({'mlm_transform': False, 'mlm_bias': False}, 'without parameters'),
    ({'norm_position': 'both'}, "'post' or 'pre'"),
    ({'num_layers': 0}, 'num_layers'),
    ({'remat': 'some'}, 'remat'),
    ({'dtype': 'float16'}, 'dtype'),
  ],
)
def test_a_wrong_config_says_what_it_got(fields, words):
  with pytest.raises(ValueError, match=words):
    EncoderConfig(**fields)


def test_auto_attention_logs_its_choice(caplog):
  attention_lib._log_choice.cache_clear()
  x = jnp.zeros((1, 2, 1, 4))
  with caplog.at_level(logging.INFO, logger='bertjax.model.attention'):
    attention(x, x, x, jnp.ones((1, 2), jnp.int32))
  assert "chose 'xla'" in caplog.text


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'impl': 'cudnn'}, 'needs an NVIDIA GPU'),
    ({'impl': 'splash'}, 'needs a TPU'),
    ({'impl': 'flash'}, "'splash', got 'flash'"),
    ({'dropout_rate': 0.1}, 'dropout_rng'),
  ],
)
def test_a_named_attention_that_cannot_raises(options, words):
  x = jnp.zeros((1, 2, 1, 4))
  with pytest.raises(ValueError, match=words):
    attention(x, x, x, jnp.ones((1, 2), jnp.int32), **options)


@pytest.mark.parametrize('dtype, error', [('float32', 1e-6), ('bfloat16', 0.004)])
def test_all_forms_of_gelu_are_the_exact_one(dtype, error):
  """On TPUs it is computed by erf, elsewhere by erfc, in exported programs by neither."""
  plain = functools.partial(encoder._gelu_by_erf, erf=encoder._plain_erf)
  x = jnp.linspace(-12.0, 12.0, 4801).astype(dtype)
  wide = np.asarray(x, np.float64)
  cumulative = scipy.special.ndtr(wide)
  slope = cumulative + wide * np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)
  for gelu in (encoder._gelu_by_erf, encoder._gelu, plain):
    np.testing.assert_allclose(np.float64(gelu(x)), wide * cumulative, rtol=error, atol=error)
  gradient = jax.vmap(jax.grad(encoder._gelu_by_erf))(x)
  np.testing.assert_allclose(np.float64(gradient), slope, rtol=error, atol=error)
  lowered = jax.jit(encoder._gelu).trace(x).lower(lowering_platforms=('tpu',)).as_text()
  assert 'chlo.erf ' in lowered and 'erfc' not in lowered
  exported = export.export(jax.jit(encoder._gelu))(
    jax.ShapeDtypeStruct(export.symbolic_shape('b'), dtype)
  )
  assert 'chlo' not in exported.mlir_module()
