"""Losses of pre-training: cross-entropy, and packed sequences as unpacked ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bertjax import config as config_lib
from bertjax import pretrain
from bertjax.data import instances, loader, packing, sentences
from bertjax.data.masking import Masking, mask_tokens
from bertjax.data.tokenizer import Tokenizer
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.objectives.mlm import cross_entropy, pretraining_sums, pretraining_weights
from tests.conftest import make_corpus

LENGTH = 128
KEYS = ('input_ids', 'token_type_ids', 'segment_ids', 'position_ids')


@pytest.fixture(scope='module')
def packed(documents, vocab):
  """A masked batch of real sentence pairs, up to four a row."""
  tokenizer = Tokenizer.from_file(vocab)
  corpus = make_corpus([tokenizer.encode(sentences.split_prose(text)) for text in documents])
  items = list(instances.build(corpus, 'nsp', length=32, short_seq_prob=0.8))
  rows = list(packing.first_fit(items, LENGTH, 4, tokenizer.template.size))[:40]
  pad, template = tokenizer.pad_id, tokenizer.template
  (columns,) = instances.to_columns(rows, corpus.tokens, LENGTH, 4, template=template, pad_id=pad)
  batch = mask_tokens(
    loader.expand(columns), np.ones(40), np.arange(40), 0, Masking(max_predictions=30),
    vocab_size=600, mask_id=tokenizer.mask_id, never=(pad, template.first, template.last),
  )  # fmt: skip
  assert {1, 2, 3, 4} <= set(batch['segment_ids'].ravel())
  return batch


@pytest.fixture(scope='module')
def run(packed):
  """run(batch) -> outputs of a tiny float32 model."""
  config = EncoderConfig(
    vocab_size=600, hidden_size=32, num_layers=2, num_heads=4, mlp_size=64, max_positions=LENGTH
  )
  model = Bert(config)
  params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
  return jax.jit(lambda batch: model.apply({'params': params}, batch))


def unpack(batch):
  """One sequence a row, in the order of the packed ones; positions by default."""
  rows = {name: [] for name in KEYS[:3]}
  labels, where, ids, weights = [], [], [], []
  for row, sequence in zip(*np.nonzero(batch['example_weights']), strict=True):
    inside = np.flatnonzero(batch['segment_ids'][row] == sequence + 1)
    for name in rows:
      rows[name].append(np.pad(batch[name][row, inside], (0, LENGTH - len(inside))))
    used = np.isin(batch['masked_lm_positions'][row], inside)
    used &= batch['masked_lm_weights'][row] > 0
    where.append(np.where(used, batch['masked_lm_positions'][row] - inside[0], 0))
    ids.append(batch['masked_lm_ids'][row])
    weights.append(used.astype(np.float32))
    labels.append(batch['next_sentence_labels'][row, sequence])
  result = {name: np.stack(arrays) for name, arrays in rows.items()}
  result['segment_ids'] = (result['segment_ids'] > 0).astype(np.int32)
  return result | {
    'masked_lm_positions': np.stack(where), 'masked_lm_ids': np.stack(ids),
    'masked_lm_weights': np.stack(weights), 'next_sentence_labels': np.array(labels),
    'example_weights': np.ones(len(labels), np.float32),
  }  # fmt: skip


def losses(out, batch):
  """The loss of each prediction and of each pair, in order."""
  mlm = cross_entropy(out['mlm_logits'], batch['masked_lm_ids'])[batch['masked_lm_weights'] > 0]
  nsp = cross_entropy(out['nsp_logits'], batch['next_sentence_labels'])
  return mlm, nsp[batch['example_weights'] > 0]


@pytest.mark.e2e
def test_every_prediction_and_pair_has_the_loss_of_its_unpacked_sequence(packed, run):
  single = unpack(packed)
  assert len(single['input_ids']) > 1.5 * len(packed['input_ids'])
  one, other = run(packed), run(single)
  for a, b in zip(losses(one, packed), losses(other, single), strict=True):
    assert len(a) == len(b) > 16
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  sums, sums_single = pretraining_sums(one, packed), pretraining_sums(other, single)
  weights, weights_single = pretraining_weights(packed), pretraining_weights(single)
  for a, b in ((sums, sums_single), (weights, weights_single)):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


def test_other_tokens_in_one_sequence_change_no_logit_of_the_others(packed, run):
  batch = {name: packed[name] for name in (*KEYS, 'cls_positions')}
  second = (batch['segment_ids'] == 2) & (batch['position_ids'] > 0)
  changed = batch | {'input_ids': np.where(second, 7, batch['input_ids'])}
  one, other = run(batch), run(changed)
  others = np.isin(batch['segment_ids'], (1, 3, 4))
  for name, same in (('mlm_logits', others), ('nsp_logits', np.arange(4) != 1)):
    before, after = (np.asarray(out[name]) for out in (one, other))
    same = np.broadcast_to(same, before.shape[:2])
    np.testing.assert_array_equal(before[same], after[same])
    assert (before[~same] != after[~same]).any()


@pytest.mark.parametrize(
  'changes',
  [
    pytest.param({'data.kind': 'sop'}, marks=pytest.mark.full),
    {
      'data.max_sequences_per_row': 4,
      'data.short_seq_prob': 1.0,
      'data.heldout_fraction': 0.5,
      'gradient_accumulation_steps': 2,
    },
  ],
)
@pytest.mark.e2e
def test_a_run_trains_and_evaluates(changes, corpus, vocab, tmp_path):
  config = config_lib.vary(config_lib.pretraining('tiny'), 'smoke')
  config.data.update(
    input=str(corpus), vocab=str(vocab), heldout_fraction=0.2, cache_dir=str(tmp_path)
  )
  config.update(num_train_steps=3, warmup_steps=1, batch_size=16)
  config.update_from_flattened_dict(changes)
  scores = pretrain.run(config, workdir=str(tmp_path / 'run'))
  (path,) = tmp_path.glob('*/manifest.json')
  manifest = json.loads(path.read_text())
  assert manifest['settings']['kind'] == (config.data.kind or 'nsp')
  assert scores['mlm_weight'] > 0 and 0 < scores['mlm_loss'] < 10
  pairs, rows = scores['nsp_weight'], min(manifest['counts']['heldout_rows'], 64)
  assert pairs == rows if config.data.max_sequences_per_row == 1 else pairs > rows


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_cross_entropy_and_its_gradient_equal_optax(dtype):
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(3, 5, 11)) * 4, dtype)
  labels, weights = jnp.asarray(rng.integers(0, 11, (3, 5))), jnp.asarray(rng.random((3, 5)))

  def gradient(loss):
    return jax.value_and_grad(lambda x: (loss(x.astype(dtype), labels) * weights).sum())(logits)

  want = gradient(
    lambda x, y: optax.losses.softmax_cross_entropy_with_integer_labels(x.astype(jnp.float32), y)
  )
  got = gradient(cross_entropy)
  assert got[1].dtype == dtype
  tolerance = 1e-6 if dtype == 'float32' else 1e-2
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  np.testing.assert_allclose(*(x[1].astype(np.float32) for x in (got, want)), atol=tolerance)
