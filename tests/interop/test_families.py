"""Each family equals transformers' models, in all outputs and gradients, and the way back.

All heads of a family share one encoder here, so one program has the outputs and gradients of all.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest

from bertjax import pretrain
from bertjax.config import load_recipe
from bertjax.data.sentencepiece import train_sentencepiece
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import families, huggingface, mapping
from bertjax.interop.google import save_google
from bertjax.interop.huggingface import config_from_json, load_hf, save_hf
from bertjax.interop.loading import load_model, load_params, reinit_top_layers, save_model
from bertjax.model import config as model_config
from bertjax.model.config import EncoderConfig, albert_base
from bertjax.model.encoder import PARAM_AXES, layer_factors, relative_position_buckets
from bertjax.model.flops import train_flops
from bertjax.model.heads import Bert, init_params
from bertjax.objectives import mlm
from bertjax.training import mesh as mesh_lib
from tests.data.test_tokenizer_json import CONFIG as TOKENIZERS
from tests.data.test_tokenizer_json import train as train_tokenizer
from tests.interop.models import check_same

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')

V, LABELS, LENGTH = 60, 3, 17
BERT_LIKE = {'hidden_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4,
             'intermediate_size': 80, 'max_position_embeddings': 40}  # fmt: skip
ROBERTA_LIKE = BERT_LIKE | {'max_position_embeddings': 42, 'pad_token_id': 1,
                            'layer_norm_eps': 1e-5}  # fmt: skip
PRE_NORM_LIKE = BERT_LIKE | {'pad_token_id': 0, 'bos_token_id': 2, 'eos_token_id': 3}
# Global layers 0, 3 and 6; a window that reaches from the last padding to a token.
MODERNBERT = PRE_NORM_LIKE | {
  'cls_token_id': 2, 'sep_token_id': 3, 'num_hidden_layers': 7, 'local_attention': 12,
  'rope_parameters': {'full_attention': {'rope_type': 'default', 'rope_theta': 80_000.0},
                      'sliding_attention': {'rope_type': 'default', 'rope_theta': 9_000.0}},
}  # fmt: skip
EUROBERT = PRE_NORM_LIKE | {
  'num_key_value_heads': 2, 'mask_token_id': 4,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 250_000.0},
}  # fmt: skip
DISTILBERT = {'dim': 48, 'n_layers': 3, 'n_heads': 4, 'hidden_dim': 80,
              'max_position_embeddings': 40}  # fmt: skip
TASKS = ('classification', 'tagging', 'span', 'choice')
# Start of their classes -> (sizes, heads of the classes for pre-training).
TINY = {
  'Roberta': (ROBERTA_LIKE | {'type_vocab_size': 1}, (('mlm',),)),
  'Albert': (BERT_LIKE | {'embedding_size': 24, 'hidden_act': 'gelu_new'},
             (('mlm', 'nsp'), ('mlm',))),
  'DistilBert': (DISTILBERT, (('mlm',),)),
  'Electra': (BERT_LIKE | {'embedding_size': 24}, (('mlm',), ('rtd',))),
  'MPNet': (ROBERTA_LIKE, (('mlm',),)),
  'ModernBert': (MODERNBERT, (('mlm',),)),
  'EuroBert': (EUROBERT, (('mlm',),)),
}  # fmt: skip
# (model, sizes of a released model where they are not the defaults, parameters of the encoder with
# its pooler as published).
RELEASED = {
  'roberta-base': ('Roberta', {'vocab_size': 50265, 'max_position_embeddings': 514,
                               'type_vocab_size': 1}, 124_645_632),
  'xlm-roberta-base': ('XLMRoberta', {'vocab_size': 250002, 'max_position_embeddings': 514,
                                      'type_vocab_size': 1}, 278_043_648),
  'camembert-base': ('Camembert', {'vocab_size': 32005, 'max_position_embeddings': 514,
                                   'type_vocab_size': 1}, 110_621_952),
  'albert-base-v2': ('Albert', {'hidden_size': 768, 'num_attention_heads': 12,
                                'intermediate_size': 3072}, 11_683_584),
  'albert-xxlarge-v2': ('Albert', {}, 222_595_584),
  'distilbert-base-uncased': ('DistilBert', {}, 66_362_880),
  'electra-small-discriminator': ('Electra', {}, 13_483_008),
  'electra-base-discriminator': ('Electra', {'embedding_size': 768, 'hidden_size': 768,
                                             'num_attention_heads': 12, 'intermediate_size': 3072},
                                 108_891_648),
  'mpnet-base': ('MPNet', {'max_position_embeddings': 514}, 109_486_464),
  'ModernBERT-base': ('ModernBert', {}, 149_014_272),
  'ModernBERT-large': ('ModernBert', {'num_hidden_layers': 28, 'hidden_size': 1024,
                                      'num_attention_heads': 16, 'intermediate_size': 2624},
                       394_781_696),
  'EuroBERT-210m': ('EuroBert', {}, 211_766_016),
}  # fmt: skip


def class_of(name, heads):
  family = next(family for family in families.FAMILIES if family.name == name)
  return getattr(transformers, name + family.classes[heads])


def theirs(name, heads, encoder=None):
  """A random model in all tensors, LayerNorms and biases too, with the encoder's if given."""
  sizes, _ = TINY[name]
  config = getattr(transformers, f'{name}Config')(vocab_size=V, num_labels=LABELS, **sizes)
  if heads in (('span',), ('mlm', 'nsp')):
    config.num_labels = 2
  config._attn_implementation = 'eager'  # the others return no probabilities
  torch.manual_seed(len(str(heads)))
  model = class_of(name, heads)(config).eval()
  for path, parameter in model.named_parameters():
    norm = 'norm.weight' in path.lower()
    torch.nn.init.normal_(parameter, mean=float(norm), std=0.1)
  if encoder:
    model.base_model.load_state_dict(encoder.state_dict(), strict=False)
  return model


def batch_of(pad_id=-1):
  """Pairs of an odd length, of which one row ends in padding, and labels of pre-training.

  Without `pad_id` any token is padding, so that transformers numbers its positions as ours: its
  loss of answers reads the states of padding.
  """
  rng = np.random.default_rng(0)
  ids = rng.integers(5, V, (4, LENGTH), dtype=np.int32)
  segments, types = np.ones((2, 4, LENGTH), np.int32)
  segments[1, 11:] = 0
  if pad_id >= 0:
    ids[1, 11:] = pad_id
  types[:, :7] = 0
  return {
    'input_ids': ids, 'token_type_ids': types, 'segment_ids': segments,
    'masked_lm_positions': np.stack([rng.permutation(11)[:4] for _ in range(4)]).astype(np.int32),
    'masked_lm_ids': rng.integers(0, V, (4, 4), dtype=np.int32),
    'masked_lm_weights': np.array([[1, 1, 1, 0]] * 4, np.float32),
    'next_sentence_labels': np.arange(4, dtype=np.int32) % 2,
  }  # fmt: skip


def labels_of(batch):
  """head -> labels."""
  real = batch['segment_ids'] > 0
  masked = np.full(real.shape, -100)
  for row, (places, ids) in enumerate(
    zip(batch['masked_lm_positions'], batch['masked_lm_ids'], strict=True)
  ):
    masked[row, places[:3]] = ids[:3]  # the fourth has no weight
  return {
    'classification': np.array([0, 2, 1, 1]), 'choice': np.array([1, 0]),
    'tagging': np.where(real, batch['input_ids'] % LABELS, -100),
    'span': np.array([[1, 4], [0, 10], [2, 2], [9, 16]]), 'rtd': batch['input_ids'] % 2,
    'mlm': masked, 'nsp': batch['next_sentence_labels'],
  }  # fmt: skip


def their_outputs(model, batch, heads):
  """Their outputs with the loss; types only where the model has two."""
  shape = (2, 2, LENGTH) if heads == ('choice',) else (4, LENGTH)
  inputs = {'input_ids': batch['input_ids'], 'attention_mask': batch['segment_ids']}
  if getattr(model.config, 'type_vocab_size', 0) == 2 and 'mpnet' not in model.config.model_type:
    inputs['token_type_ids'] = batch['token_type_ids']
  inputs = {name: torch.tensor(array.reshape(shape)).long() for name, array in inputs.items()}
  labels = {head: torch.tensor(array).long() for head, array in labels_of(batch).items()}
  if heads == ('span',):
    given = dict(zip(('start_positions', 'end_positions'), labels['span'].T, strict=True))
  else:
    given = {'labels': labels[heads[0]]}
  if 'nsp' in heads:
    given['sentence_order_label'] = labels['nsp']
  return model(**inputs, **given, output_hidden_states=True, output_attentions=True)


def our_losses(out, batch):
  """head -> the loss as their classes compute it."""
  labels, losses = labels_of(batch), {}
  sums, _ = mlm.pretraining_sums(out, batch, [h for h in ('mlm', 'nsp') if f'{h}_logits' in out])
  weights = mlm.pretraining_weights(batch)
  losses = {head: sums[head] / weights[head] for head in sums}
  for head in {'rtd', *TASKS} & {key.removesuffix('_logits') for key in out}:
    logits, gold = out[f'{head}_logits'], labels[head]
    if head == 'rtd':
      real = batch['segment_ids'] > 0
      nats = optax.sigmoid_binary_cross_entropy(logits, gold)
      losses[head] = (nats * real).sum() / real.sum()
      continue
    logits = logits.reshape(2, 2) if head == 'choice' else logits
    logits = logits.swapaxes(1, 2) if head == 'span' else logits
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(gold, 0))
    losses[head] = (nats * (gold >= 0)).sum() / (gold >= 0).sum()
  return losses


def check_close(ours, expected, what=''):
  expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
  assert np.shape(ours) == expected.shape, what
  worst = np.abs(ours - expected).max()
  assert worst <= 1e-5 * max(1, np.abs(expected).max()), (what, worst)


def check_states(out, expected, batch):
  """Hidden states and probabilities of every layer at real tokens."""
  real = batch['segment_ids'] > 0
  for ours, states in zip(out['all_hidden'], expected.hidden_states, strict=True):
    check_close(ours[real], states.detach().numpy()[real], 'hidden')
  for ours, probs in zip(out['attention'], expected.attentions, strict=True):
    check_close(ours.swapaxes(1, 2)[real], probs.detach().numpy().swapaxes(1, 2)[real], 'attention')


def check_logits(out, expected, batch, heads):
  real, rows = batch['segment_ids'] > 0, np.arange(4)[:, None]
  for head in heads:
    ours = out[f'{head}_logits']
    if head == 'span':
      for i, logits in enumerate((expected.start_logits, expected.end_logits)):
        check_close(ours[..., i][real], logits.detach().numpy()[real], head)
      continue
    if head == 'nsp':
      logits = expected.sop_logits
    else:
      logits = expected.logits if hasattr(expected, 'logits') else expected.prediction_logits
    logits = logits.detach().numpy()
    if head == 'mlm':
      logits = logits[rows, batch['masked_lm_positions']]
    elif head in ('tagging', 'rtd'):
      ours, logits = ours[real], logits[real]
    check_close(ours.reshape(logits.shape), logits, head)


def check_return(folder, config, params, tokenizer, model):
  """Saved by us and loaded by transformers: no key too many or too few, and the same bits."""
  save_hf(folder, config, params, tokenizer)
  again, info = type(model).from_pretrained(folder, output_loading_info=True)
  assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  assert again.config.architectures == [type(model).__name__]
  before, after = dict(model.named_parameters()), dict(again.named_parameters())
  assert before.keys() == after.keys()
  for name, parameter in after.items():
    assert torch.equal(parameter, before[name]), name
  assert getattr(again.config, 'layer_types', 0) == getattr(model.config, 'layer_types', 0)
  for name in TINY[model.config.__class__.__name__.removesuffix('Config')][0]:
    assert getattr(again.config, name) == getattr(model.config, name), name
  ours, again_params, _ = load_model(folder)
  assert ours.config == config
  check_same(params, again_params)


def vocabulary(pad_id):
  """A WordPiece vocabulary whose padding has the id that the model wants."""
  special = ['[UNK]', '[CLS]', '[SEP]', '[MASK]']
  special.insert(pad_id, '[PAD]')
  return Tokenizer([*special, *(f'w{i}' for i in range(V - 5))])


@pytest.mark.e2e
@pytest.mark.parametrize('name', [
  name if name in ('Albert', 'ModernBert') else pytest.param(name, marks=pytest.mark.full)
  for name in TINY
])  # fmt: skip
def test_all_outputs_losses_and_gradients_of_every_head_equal_transformers(name, tmp_path):
  encoder = theirs(name, ()).base_model
  known = next(family for family in families.FAMILIES if family.name == name).classes
  cases = [*TINY[name][1], *((head,) for head in TASKS if (head,) in known), ()]
  models, params = {}, {}
  tokenizer = vocabulary(getattr(encoder.config, 'pad_token_id', 0))
  for heads in cases:
    models[heads] = model = theirs(name, heads, encoder)
    folder = tmp_path / '_'.join(('their', *heads))
    model.save_pretrained(folder)
    config, one = load_hf(folder)
    assert set(one) - {'encoder', 'pooler'} == set(heads)
    check_return(tmp_path / '_'.join(('our', *heads)), config, one, tokenizer, model)
    params = one | params
  heads = tuple(sorted(set(params) - {'encoder', 'pooler'}))
  params['pooler'] = one.get('pooler')  # of the bare encoder
  if params['pooler'] is None:
    del params['pooler']
  batch = batch_of()
  bert = Bert(config, heads, 'pooler' in params, LABELS)

  def total(params):
    out = bert.apply({'params': params}, batch, capture=('hidden', 'attention'))
    losses = our_losses(out, batch)
    return sum(losses.values()), (out, losses)

  grads, (out, losses) = jax.device_get(jax.jit(jax.grad(total, has_aux=True))(params))
  sums = {}
  for case, model in models.items():
    if case and not (case == ('mlm',) and ('mlm', 'nsp') in models):
      expected = their_outputs(model, batch, case)
      if case == ('mlm',) or 'nsp' in case:
        check_states(out, expected, batch)
      check_logits(out, expected, batch, case)
      loss = sum(float(losses[head]) for head in case)
      assert loss == pytest.approx(expected.loss.item(), rel=1e-5), case
      expected.loss.backward()
      for path, parameter in model.named_parameters():
        if parameter.grad is not None:
          sums[case, path] = parameter.grad.numpy()
  check_gradients(config, grads, sums, models)
  check_packed(bert, params, batch)


def check_gradients(config, grads, sums, models):
  """The sum over their models, which share the encoder, is ours; all that we have is checked."""
  family, checked = families.family_of(config), set()
  shared = {}
  for (_, path), grad in sums.items():
    if path.startswith(f'{family.prefix}.'):
      shared[path] = shared.get(path, 0) + grad
  for case in {case for case, _ in sums}:
    kept = {part: grads[part] for part in ('encoder', 'pooler', *case) if part in grads}
    ours = huggingface.to_tensors(config, kept)
    own = {path: grad for (owner, path), grad in sums.items() if owner == case}
    for path, grad in (own | {path: shared[path] for path in own if path in shared}).items():
      check_close(ours[path], grad, (case, path))
      largest = np.abs(grad).max()  # most are far below 1
      assert np.abs(ours[path] - grad).max() <= 2e-4 * largest + 2e-7, (case, path)
      checked.add(path if path in shared else (case, path))
    unused = [path for path in ours.keys() - own.keys() - shared.keys() if ours[path].any()]
    assert not unused, unused
  assert set(shared) <= checked


def check_packed(bert, params, batch):
  """Two sequences in one row are as in two rows, positions included."""
  bert = bert.clone(heads=tuple(h for h in bert.heads if h in ('classification', 'tagging')))
  params = {part: params[part] for part in ('encoder', 'pooler', *bert.heads) if part in params}
  lengths = (LENGTH, 11)
  names = ('input_ids', 'token_type_ids')
  rows = {name: np.concatenate([batch[name][i][:n] for i, n in enumerate(lengths)])[None]
          for name in names}  # fmt: skip
  rows['segment_ids'] = np.repeat([1, 2], lengths)[None].astype(np.int32)
  rows['position_ids'] = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
  rows['cls_positions'] = np.array([[0, LENGTH]], np.int32)
  alone = {name: batch[name][:2] for name in (*names, 'segment_ids')}
  apply = jax.jit(bert.apply)
  packed, single = apply({'params': params}, rows), apply({'params': params}, alone)
  real = alone['segment_ids'] > 0
  for key in ('hidden', 'tagging_logits'):
    check_close(packed[key][0], np.asarray(single[key])[real], key)
  check_close(packed['classification_logits'][0], np.asarray(single['classification_logits']))


@pytest.mark.e2e
@pytest.mark.parametrize('name', RELEASED)
def test_parameter_counts_are_the_published_ones(name):
  start, sizes, count = RELEASED[name]
  content = getattr(transformers, f'{start}Config')(**sizes).to_dict()
  config = config_from_json(content, name)
  family = families.family_in(content, name)
  bert = Bert(config, heads=(), pooler='pooler' in family.modules)
  tree = jax.eval_shape(lambda: init_params(bert, jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count
  with torch.device('meta'):  # no memory, nothing computed
    model = getattr(transformers, f'{start}Model')(transformers.AutoConfig.for_model(**content))
  assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize('start', ['XLMRoberta', 'Camembert'])
def test_models_that_are_a_roberta_under_another_name_are_read_as_one(start, tmp_path):
  config = getattr(transformers, f'{start}Config')(vocab_size=V, **TINY['Roberta'][0])
  model = getattr(transformers, f'{start}ForSequenceClassification')(config).eval()
  model.save_pretrained(tmp_path)
  ours, params = load_hf(tmp_path)
  assert ours.position_offset == 2 and ours.max_positions == 40 and set(params) == {
    'encoder', 'classification',
  }  # fmt: skip
  batch = batch_of(1)
  out = jax.jit(Bert(ours, ('classification',), False).apply)({'params': params}, batch)
  expected = model(
    input_ids=torch.tensor(batch['input_ids']).long(),
    attention_mask=torch.tensor(batch['segment_ids']).long(),
  )  # fmt: skip
  check_close(np.asarray(out['classification_logits']), expected.logits)


@pytest.mark.parametrize('name', TINY)
def test_every_parameter_has_a_sharding_rule_and_a_name(name):
  content = getattr(transformers, f'{name}Config')(vocab_size=V, **TINY[name][0]).to_dict()
  config = config_from_json(content, name)
  family = families.family_of(config)
  assert family.name == name
  heads = tuple(sorted({head for heads in family.classes for head in heads}))
  tree = jax.eval_shape(lambda: init_params(Bert(config, heads), jax.random.key(0)))
  shardings = mesh_lib.tree_shardings(mesh_lib.make_mesh(2, 2, 2), PARAM_AXES, tree)
  mlp = shardings['encoder']['layers']['mlp']
  layer = mlp['gated_in' if config.gated_mlp else 'in']['kernel'].spec
  assert [axis for axis in layer if axis] == ['fsdp', 'tensor']
  unnamed = {entry.path for entry in mapping.entries(config, heads, False) if
             entry.name('huggingface').startswith('bertjax')}  # fmt: skip
  assert not unnamed


def test_buckets_of_relative_positions_are_those_of_mpnet():
  from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

  distance = torch.arange(600)[None] - torch.arange(600)[:, None]
  for count in (8, 32):
    expected = MPNetEncoder.relative_position_bucket(distance, num_buckets=count)
    np.testing.assert_array_equal(relative_position_buckets(600, count), expected.numpy())


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'embedding_size': 64}, ['embedding_size=64', 'a bert is the nearest']),
    ({'position_offset': 2}, ['position_offset=2']),
    ({'shared_layers': True, 'causal': True, 'embedding_size': 8}, ['causal=True', 'albert']),
  ],
)
def test_switches_that_no_model_of_transformers_has_are_refused_before_a_file_is_written(
  changes, words, tmp_path
):
  config = EncoderConfig(V, 16, 2, 2, 24, 20, **changes)
  with pytest.raises(ValueError) as raised:
    save_hf(tmp_path / 'model', config, {}, vocabulary(0))
  assert all(word in str(raised.value) for word in words)
  assert not list(tmp_path.iterdir())


def test_padding_that_would_shift_positions_is_refused(tmp_path):
  config = EncoderConfig(
    V, 16, 2, 2, 24, 20, position_offset=2, type_vocab_size=1, classifier_hidden='tanh'
  )
  with pytest.raises(ValueError, match='set position_offset=1'):
    save_hf(tmp_path / 'model', config, {}, vocabulary(0))


@pytest.mark.parametrize(
  ('name', 'changes', 'words'),
  [
    ('Albert', {'num_hidden_groups': 2}, 'num_hidden_groups=2 is not supported'),
    ('Electra', {'summary_type': 'mean'}, "summary_type='mean' is not supported"),
    ('Roberta', {'hidden_act': 'gelu_new'}, "a roberta has activation='gelu', got 'gelu_tanh'"),
    ('Roberta', {'model_type': 'longformer'}, "describes a 'longformer' model; known are albert"),
    ('MPNet', {'pad_token_id': 3}, 'pad_token_id=3 is not supported'),
  ],
)
def test_a_config_with_other_parts_is_refused_in_one_sentence(name, changes, words):
  content = getattr(transformers, f'{name}Config')(**TINY[name][0]).to_dict()
  with pytest.raises(ValueError, match=words):
    config_from_json(content | changes, 'config.json')


def test_a_classifier_of_roberta_needs_no_named_class(tmp_path):
  """Its tensors have other names, which a tagger's do not."""
  model = theirs('Roberta', ('classification',))
  model.save_pretrained(tmp_path)
  content = json.loads((tmp_path / 'config.json').read_text()) | {'architectures': None}
  (tmp_path / 'config.json').write_text(json.dumps(content))
  assert set(load_hf(tmp_path)[1]) == {'encoder', 'classification'}


def test_layers_that_share_their_weights_are_not_treated_apart():
  with pytest.raises(ValueError, match=r'layerwise_lr_decay=0\.9'):
    layer_factors(3, decay=0.9, shared=True)
  with pytest.raises(ValueError, match='num_trainable_layers=1'):
    layer_factors(3, trained=1, shared=True)
  frozen = layer_factors(3, trained=0, shared=True)
  assert frozen('encoder/layers/mlp/in/kernel') == 0 and frozen('classification/kernel') == 1
  layers = {'encoder': {'layers': {'bias': np.zeros(2)}, 'embeddings': {'bias': np.zeros(2)}}}
  fresh = {'encoder': {'layers': {'bias': np.ones(2)}, 'embeddings': {'bias': np.ones(2)}}}
  result = reinit_top_layers(layers, fresh, 3, shared=True)['encoder']
  assert result['layers']['bias'].all() and not result['embeddings']['bias'].any()


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'relative_buckets': 6}, 'relative_buckets must be 0'),
    ({'classifier_hidden': 'selu'}, 'classifier_hidden must be one of'),
    ({'position_offset': -1}, 'position_offset must be at least 0'),
    ({'positions': 'rotary', 'position_offset': 2}, "position_offset=2 needs positions='learned'"),
    ({'shared_layers': True, 'norm_position': 'pre'}, 'shared_layers=True needs layers'),
  ],
)
def test_switches_that_contradict_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    EncoderConfig(**changes)


def test_flops_of_a_shared_model_are_those_of_its_layers():
  """Counted by hand: 12 layers of 12 D^2, the projection, attention, the head at width E."""
  layers = 12 * 12 * 768**2 * 512 + 2 * 12 * 512**2 * 768
  head = 77 * (768 * 128 + 128 * 30000)
  assert train_flops(albert_base(), 512, 77) == 6 * (layers + 128 * 768 * 512 + head)


LAYER = 'bert/encoder/transformer/group_0/inner_group_0'
GOOGLE_ALBERT = {  # Google's variables -> transformers', as its released conversion had them
  'bert/embeddings/word_embeddings': 'albert.embeddings.word_embeddings.weight',
  'bert/embeddings/position_embeddings': 'albert.embeddings.position_embeddings.weight',
  'bert/embeddings/token_type_embeddings': 'albert.embeddings.token_type_embeddings.weight',
  'bert/embeddings/LayerNorm': 'albert.embeddings.LayerNorm',
  'bert/encoder/embedding_hidden_mapping_in': 'albert.encoder.embedding_hidden_mapping_in',
  **{f'{LAYER}/{google}': f'albert.encoder.albert_layer_groups.0.albert_layers.0.{theirs}'
     for google, theirs in {
       'attention_1/self/query': 'attention.query', 'attention_1/self/key': 'attention.key',
       'attention_1/self/value': 'attention.value', 'LayerNorm': 'attention.LayerNorm',
       'attention_1/output/dense': 'attention.dense', 'ffn_1/intermediate/dense': 'ffn',
       'ffn_1/intermediate/output/dense': 'ffn_output', 'LayerNorm_1': 'full_layer_layer_norm',
     }.items()},
  'bert/pooler/dense': 'albert.pooler',
  'cls/predictions/output_bias': 'predictions.bias',
  'cls/predictions/transform/dense': 'predictions.dense',
  'cls/predictions/transform/LayerNorm': 'predictions.LayerNorm',
  'cls/seq_relationship/output_weights': 'sop_classifier.classifier.weight',
  'cls/seq_relationship/output_bias': 'sop_classifier.classifier.bias',
}  # fmt: skip


def google_variables(model):
  """Google's variables of a model of transformers."""
  state, result = model.state_dict(), {}
  for google, theirs in GOOGLE_ALBERT.items():
    if theirs in state:
      result[google] = state[theirs].numpy()
      continue
    norm = 'norm' in theirs.lower()
    weight = state[f'{theirs}.weight'].numpy()
    result[f'{google}/{"gamma" if norm else "kernel"}'] = weight.T.copy()
    result[f'{google}/{"beta" if norm else "bias"}'] = state[f'{theirs}.bias'].numpy()
  return result


def test_albert_comes_from_google_s_files_and_returns_bit_for_bit(tmp_path):
  tf = pytest.importorskip('tensorflow')
  sizes, _ = TINY['Albert']
  model = theirs('Albert', ('mlm', 'nsp'))
  model.save_pretrained(tmp_path / 'theirs')
  variables = google_variables(model)
  (tmp_path / 'google').mkdir()
  tf.raw_ops.SaveV2(
    prefix=str(tmp_path / 'google' / 'model.ckpt-best'), tensor_names=list(variables),
    shape_and_slices=[''] * len(variables), tensors=list(variables.values()),
  )  # fmt: skip
  content = sizes | {'vocab_size': V, 'hidden_act': 'gelu', 'hidden_dropout_prob': 0,
                     'type_vocab_size': 2, 'net_structure_type': 0}  # fmt: skip
  (tmp_path / 'google' / 'albert_config.json').write_text(json.dumps(content))
  text = ' '.join(['banana', 'mango', 'papaya', 'guava'] * 50)
  pieces = train_sentencepiece([text], 20)
  (tmp_path / 'google' / '30k-clean.model').write_bytes(pieces)
  found, params, tokenizer = load_model(tmp_path / 'google')
  config, expected = load_hf(tmp_path / 'theirs')
  assert tokenizer.kind == 'sentencepiece' and tokenizer.model == pieces
  assert found.config.activation == 'gelu_tanh' and found.heads == ('mlm', 'nsp')
  assert dataclasses.replace(found.config, hidden_dropout=0.0, attention_dropout=0.0) == config
  check_same(params, expected)
  save_model(tmp_path / 'ours', found, params, tokenizer, format='google')
  again = tf.train.load_checkpoint(str(tmp_path / 'ours' / 'bert_model.ckpt'))
  assert set(again.get_variable_to_shape_map()) == set(variables)
  for name, value in variables.items():
    np.testing.assert_array_equal(again.get_tensor(name), value, err_msg=name)
  assert load_model(tmp_path / 'ours')[0] == found


def test_google_s_format_refuses_a_family_that_its_code_has_not(tmp_path):
  model = theirs('Electra', ('mlm',))
  model.save_pretrained(tmp_path / 'theirs')
  config, params = load_hf(tmp_path / 'theirs')
  with pytest.raises(ValueError, match="got model_type 'electra'"):
    save_google(tmp_path / 'ours', config, params, vocabulary(0))


@pytest.mark.parametrize(
  ('start', 'pooling'), [('ModernBert', 'mean'), ('EuroBert', 'mean'), ('EuroBert', 'bos')]
)
def test_classifiers_of_other_poolings_equal_transformers(start, pooling, tmp_path):
  config = getattr(transformers, f'{start}Config')(
    vocab_size=V, num_labels=LABELS, classifier_pooling=pooling, **TINY[start][0]
  )
  model = class_of(start, ('classification',))(config).eval()
  model.save_pretrained(tmp_path / 'theirs')
  ours, params = load_hf(tmp_path / 'theirs')
  batch = batch_of(0)
  out = jax.jit(Bert(ours, ('classification',), False, LABELS).apply)({'params': params}, batch)
  expected = model(
    input_ids=torch.tensor(batch['input_ids']).long(),
    attention_mask=torch.tensor(batch['segment_ids']).long(),
  )  # fmt: skip
  check_close(np.asarray(out['classification_logits']), expected.logits)
  save_hf(tmp_path / 'ours', ours, params, vocabulary(0))
  assert type(config).from_pretrained(tmp_path / 'ours').classifier_pooling == pooling


OLD_MODERNBERT = {
  'model_type': 'modernbert', 'num_hidden_layers': 8, 'global_attn_every_n_layers': 2,
  'global_rope_theta': 50_000.0, 'local_rope_theta': 5_000.0, 'local_attention': 64,
}  # fmt: skip


def test_both_layouts_of_rotary_settings_and_layers_are_one_config():
  new = transformers.ModernBertConfig(**OLD_MODERNBERT).to_dict()
  assert 'rope_parameters' in new and 'layer_types' in new and 'local_rope_theta' not in new
  old = config_from_json(OLD_MODERNBERT, 'config.json')
  assert config_from_json(new, 'config.json') == old
  assert (old.rope_theta, old.local_rope_theta) == (50_000.0, 5_000.0)
  assert (old.local_window, old.global_every) == (64, 2)
  released = config_from_json(transformers.ModernBertConfig().to_dict(), 'config.json')
  assert released == model_config.modernbert_base(classifier_dropout=0.0)
  all_global = {'model_type': 'modernbert', 'layer_types': ['full_attention'] * 22}
  assert config_from_json(all_global, 'config.json').local_window == 0
  rope = {'model_type': 'eurobert', 'rope_theta': 250_000.0}  # as EuroBERT's first files have it
  assert config_from_json(rope, 'config.json').rope_theta == 250_000.0


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    ({'layer_types': ['sliding_attention', 'full_attention']}, 'layer_types must make every n-th'),
    ({'layer_types': ['full_attention', 'chunked_attention']}, "got .*'chunked_attention'"),
    ({'rope_parameters': {'full_attention': {'rope_type': 'yarn', 'rope_theta': 1e4}}}, 'yarn'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'scaled rotary positions'),
    ({'rope_parameters': {'full_attention': {'type': 'linear', 'factor': 2.0}}}, 'linear'),
    ({'mlp_bias': True}, 'mlp_bias=True is not supported'),
    ({'mlp_dropout': 0.1}, 'mlp_dropout=0.1 is not supported'),
    ({'classifier_activation': None}, 'classifier_activation=None is not supported'),
    ({'local_attention': 0}, 'local_attention=0 is no window .* global_attn_every_n_layers=1'),
    ({'classifier_pooling': 'late'}, r"has classifier_pooling=\('cls', 'mean'\), got 'late'"),
  ],
)
def test_switches_of_modernbert_that_we_do_not_have_are_refused(content, words):
  with pytest.raises(ValueError, match=words):
    config_from_json({'model_type': 'modernbert'} | content, 'config.json')


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    ({'model_type': 'roberta', 'pad_token_id': None}, 'pad_token_id=None must be the id'),
    ({'model_type': 'roberta', 'pad_token_id': -1}, 'pad_token_id=-1 must be the id'),
    ({'model_type': 'distilbert', 'qa_dropout': 0.3}, 'qa_dropout=0.3 must be the 0.1 of dropout'),
    ({'model_type': 'electra', 'summary_use_proj': None}, 'summary_use_proj=None is not supported'),
  ],
)
def test_values_of_other_families_that_we_do_not_have_are_refused(content, words):
  with pytest.raises(ValueError, match=words):
    config_from_json(content, 'config.json')


def test_null_is_the_value_that_means_the_same():
  content = {'model_type': 'bert', 'position_embedding_type': None, 'add_cross_attention': None}
  assert config_from_json(content, 'config.json') == EncoderConfig()


def test_a_classifier_of_a_family_without_all_heads_is_found_by_its_class():
  for model_type, name, head in (('eurobert', 'EuroBertForTokenClassification', 'tagging'),
                                 ('neobert', 'NeoBERTLMHead', '')):  # fmt: skip
    content = {'model_type': model_type, 'architectures': [name]}
    assert huggingface.classifier_head(content) == head


SMALL_MODERNBERT = {'vocab_size': V, 'hidden_size': 32, 'num_layers': 4, 'num_heads': 2,
                    'mlp_size': 48, 'max_positions': 40, 'local_window': 12}  # fmt: skip
# Switches of NeoBERT, whose classifier_dropout is no null either.
SMALL_NEOBERT = {
  'vocab_size': V, 'hidden_size': 32, 'num_layers': 2, 'num_heads': 2, 'mlp_size': 48,
  'positions': 'rotary', 'norm_position': 'pre', 'type_vocab_size': 0, 'linear_bias': False,
  'gated_mlp': True, 'norm': 'rms', 'embedding_norm': False, 'activation': 'silu',
  'classifier_hidden': 'tanh', 'mlm_transform': False, 'tied_embeddings': False,
}  # fmt: skip


@pytest.mark.e2e
@pytest.mark.parametrize('activation', ['gelu', 'silu'])
def test_a_new_modernbert_is_loaded_by_transformers_with_the_same_logits(activation, tmp_path):
  config = model_config.modernbert_base(**SMALL_MODERNBERT, activation=activation)
  assert config.classifier_dropout == -1
  bert = Bert(config, ('mlm',), pooler=False)
  params = jax.jit(lambda: init_params(bert, jax.random.key(0)))()
  save_hf(tmp_path / 'm', config, params, vocabulary(0))
  model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / 'm').eval()
  assert model.config.classifier_dropout == 0.0
  ids = batch_of()['input_ids']
  ours = jax.jit(bert.apply)({'params': params}, {'input_ids': ids})['mlm_logits']
  check_close(np.asarray(ours), model(torch.tensor(ids).long()).logits)


def test_a_new_neobert_has_a_number_as_classifier_dropout():
  config = EncoderConfig(**SMALL_NEOBERT, hidden_dropout=0.25)
  content = huggingface.config_to_json(config, {'encoder': {}, 'mlm': {}}, 0)
  assert (content['model_type'], content['classifier_dropout']) == ('neobert', 0.25)


def test_a_distilbert_is_saved_with_its_dropout_for_answers_too():
  config = EncoderConfig(type_vocab_size=0, classifier_hidden='relu', hidden_dropout=0.2)
  content = huggingface.config_to_json(config, {'encoder': {}}, 0)
  assert (content['dropout'], content['qa_dropout']) == (0.2, 0.2)
  assert config_from_json(content, 'config.json').hidden_dropout == 0.2


def test_sinusoids_of_a_distilbert_are_a_table_that_is_trained_as_in_transformers(tmp_path):
  config = transformers.DistilBertConfig(vocab_size=V, sinusoidal_pos_embds=True, **DISTILBERT)
  model = transformers.DistilBertForMaskedLM(config).eval()
  table = model.distilbert.embeddings.position_embeddings.weight
  assert table.requires_grad and table[1, 0].item() == pytest.approx(np.sin(1.0))
  model.save_pretrained(tmp_path / 'theirs')
  ours, params = load_hf(tmp_path / 'theirs')
  ids = batch_of()['input_ids']
  out = jax.jit(Bert(ours, ('mlm',), False).apply)({'params': params}, {'input_ids': ids})
  check_close(np.asarray(out['mlm_logits']), model(torch.tensor(ids).long()).logits)
  save_hf(tmp_path / 'ours', ours, params, vocabulary(0))
  again = transformers.DistilBertForMaskedLM.from_pretrained(tmp_path / 'ours')
  assert torch.equal(again.distilbert.embeddings.position_embeddings.weight, table)


def test_a_modernbert_pools_by_cls_or_mean_only():
  late = model_config.modernbert_base(classifier_pooling='late')
  with pytest.raises(ValueError, match="no model with classifier_pooling='late'; a modernbert is"):
    families.family_of(late)


def test_weights_of_another_rotary_base_are_refused_with_the_flag(tmp_path):
  config = model_config.modernbert_base(**SMALL_MODERNBERT)
  params = jax.eval_shape(lambda: init_params(Bert(config, (), False), jax.random.key(0)))
  for name, value in (('rope_theta', 10_000.0), ('local_rope_theta', 500.0)):
    wanted = Bert(dataclasses.replace(config, **{name: value}), (), False)
    with pytest.raises(ValueError, match=f'--config.model.{name}={getattr(config, name)}'):
      load_params('weights', wanted, weights=(config, params))


def test_the_first_stage_may_have_another_rotary_base_than_the_weights(tmp_path, caplog):
  bert = Bert(
    model_config.modernbert_base(**SMALL_MODERNBERT, rope_theta=10_000.0), ('mlm',), pooler=False
  )
  params = jax.jit(lambda: init_params(bert, jax.random.key(0)))()
  save_hf(tmp_path / 'm', bert.config, params, vocabulary(0))
  config = load_recipe('modernbert_base:smoke')  # with rope_theta=10000
  config.init_from = str(tmp_path / 'm')
  longer = bert.clone(config=dataclasses.replace(bert.config, rope_theta=160_000.0))
  setup = pretrain.Setup(config, [], vocabulary(0), [longer], None, None, '', {})
  caplog.set_level('INFO')
  check_same(pretrain.load(setup, None), params)
  assert 'from rope_theta=10000.0 to 160000.0' in caplog.text
  config.model.rope_theta = 160_000.0
  with pytest.raises(ValueError, match=r'--config.model.rope_theta=10000.0'):
    pretrain.load(setup, None)


@pytest.mark.e2e
@pytest.mark.parametrize('types', [0, 1, 2])
def test_a_tokenizer_gives_transformers_token_types_where_the_model_has_two(types, tmp_path):
  changes = {0: {'classifier_hidden': 'relu'},
             1: {'classifier_hidden': 'tanh', 'position_offset': 2}, 2: {}}[types]  # fmt: skip
  config = EncoderConfig(V, 16, 1, 2, 16, 20, type_vocab_size=types, **changes)
  bert = Bert(config, ('mlm',), pooler=False)
  params = jax.jit(lambda: init_params(bert, jax.random.key(0)))()
  tokenizer = vocabulary(1 if types == 1 else 0)
  save_hf(tmp_path / 'm', config, params, tokenizer)
  inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'm')('w1', 'w2 w3')
  assert ('token_type_ids' in inputs) == (types == 2)
  model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / 'm').eval()
  logits = model(**{name: torch.tensor([row]) for name, row in inputs.items()}).logits
  batch = tokenizer('w1', 'w2 w3')
  check_close(np.asarray(jax.jit(bert.apply)({'params': params}, batch)['mlm_logits']), logits)


def test_a_tokenizer_without_a_mask_token_is_saved_with_the_tokens_that_it_has(tmp_path):
  model = theirs('EuroBert', ('classification',))
  model.save_pretrained(tmp_path / 'theirs')
  config, params = load_hf(tmp_path / 'theirs')
  tokenizer = vocabulary(0)
  del tokenizer.special['mask']
  save_hf(tmp_path / 'ours', config, params, tokenizer)
  content = json.loads((tmp_path / 'ours' / 'config.json').read_text())
  assert 'mask_token_id' not in content
  assert (content['bos_token_id'], content['eos_token_id']) == (2, 3)


def test_heads_that_share_a_tensor_are_not_saved_together(tmp_path):
  config = config_from_json(transformers.ModernBertConfig(vocab_size=V, **MODERNBERT).to_dict(), '')
  bert = Bert(config, ('mlm', 'tagging'), pooler=False)
  params = jax.eval_shape(lambda: init_params(bert, jax.random.key(0)))
  with pytest.raises(ValueError, match=r"'mlm', 'tagging'.* would both have the tensor head.dense"):
    save_hf(tmp_path, config, params, vocabulary(0))


@pytest.mark.e2e
@pytest.mark.parametrize('kind', ['roberta', 'xlm'])
def test_texts_and_pairs_have_the_logits_of_transformers(kind, documents, tmp_path):
  """From text to logits with byte-level BPE and Unigram: template of pairs, padding, positions."""
  lines = [line for text in documents for line in text.split('\n')][:200]
  train_tokenizer(kind, lines).save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(TOKENIZERS[kind]))
  fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
  start = {'roberta': 'Roberta', 'xlm': 'XLMRoberta'}[kind]
  config = getattr(transformers, f'{start}Config')(vocab_size=len(fast), **TINY['Roberta'][0])
  torch.manual_seed(0)
  model = getattr(transformers, f'{start}ForSequenceClassification')(config).eval()
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
  model.save_pretrained(tmp_path)
  ours, params, tokenizer = load_model(tmp_path)
  texts, pairs = ['Raises an error.', 'the value of a name'], ['The object returns', 'or not']
  for second in (None, pairs):
    given = fast(texts, second, padding=True, return_tensors='pt')
    batch = tokenizer(texts, second)
    np.testing.assert_array_equal(batch['input_ids'], given['input_ids'].numpy())
    with torch.no_grad():
      expected = model(given['input_ids'], attention_mask=given['attention_mask']).logits
    out = ours.apply({'params': params}, batch)
    check_close(np.asarray(out['classification_logits']), expected)
  save_model(tmp_path / 'ours', ours, params, tokenizer)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'ours')
  assert again(texts, pairs)['input_ids'] == fast(texts, pairs)['input_ids']


def dropouts(config, heads):
  """How often a training step drops out, with `heads` on top of the encoder and its pooler."""
  bert = Bert(config, heads, num_labels=LABELS)
  params = jax.eval_shape(lambda: init_params(bert, jax.random.key(0)))
  batch = {'input_ids': np.zeros((2, 8), np.int32)}
  run = functools.partial(bert.apply, train=True, rngs={'dropout': jax.random.key(0)})
  return count_bits(jax.make_jaxpr(lambda params: run({'params': params}, batch))(params).jaxpr)


def count_bits(jaxpr) -> int:
  """Calls of the random generator in a program, those of a loop's body once."""
  total = 0
  for equation in jaxpr.eqns:
    total += equation.primitive.name == 'random_bits'
    for value in jax.tree.leaves(list(equation.params.values())):
      value = getattr(value, 'jaxpr', value)
      total += count_bits(value) if hasattr(value, 'eqns') else 0
  return total


@pytest.mark.e2e
@pytest.mark.parametrize('name', ['Roberta', 'DistilBert', 'Electra'])
def test_heads_of_tasks_drop_out_where_transformers_does(name):
  count = []
  for head in TASKS:
    model = theirs(name, (head,)).train()
    for path, module in model.named_modules():
      if isinstance(module, torch.nn.Dropout) and not path.startswith(model.base_model_prefix):
        module.register_forward_hook(lambda *_: count.append(1))
    model(input_ids=torch.full((2, 2, 8) if head == 'choice' else (2, 8), 5))
  config = config_from_json(model.config.to_dict(), name)
  assert dropouts(config, TASKS) - dropouts(config, ()) == len(count)
