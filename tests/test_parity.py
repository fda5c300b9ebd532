"""Logits and hidden states equal to Hugging Face's on random weights; files load both ways."""

import numpy as np
import pytest

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop.directory import load_model, save_model
from bertjax.model.heads import Bert

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')


def theirs(vocab_size, **changes):
  config = transformers.BertConfig(
    vocab_size=vocab_size, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=80, max_position_embeddings=40, **changes,
  )  # fmt: skip
  torch.manual_seed(0)
  model = transformers.BertForPreTraining(config).eval()
  for parameter in model.parameters():  # biases and LayerNorms too, so that none can be mixed up
    torch.nn.init.normal_(parameter, std=0.1)
  return model


def inputs(vocab_size, rows=3, length=17):
  rng = np.random.default_rng(0)
  segments = np.ones((rows, length), np.int32)
  segments[1, 11:] = 0
  return {
    'input_ids': rng.integers(0, vocab_size, (rows, length), dtype=np.int32),
    'token_type_ids': rng.integers(0, 2, (rows, length), dtype=np.int32),
    'segment_ids': segments,
  }


@pytest.mark.parametrize('activation', ['gelu', 'gelu_new'])
def test_logits_and_states_equal_hugging_faces(tmp_path, vocab, activation):
  tokenizer = Tokenizer.from_file(vocab)
  model = theirs(tokenizer.vocab_size, hidden_act=activation)
  model.save_pretrained(tmp_path)
  tokenizer.save(tmp_path)
  config, params, _ = load_model(tmp_path)
  batch = inputs(tokenizer.vocab_size)
  with torch.no_grad():
    expected = model(
      input_ids=torch.tensor(batch['input_ids']),
      token_type_ids=torch.tensor(batch['token_type_ids']),
      attention_mask=torch.tensor(batch['segment_ids']),
      output_hidden_states=True,
    )
  out = Bert(config).apply({'params': params}, batch, capture=('hidden',))
  real = batch['segment_ids'] > 0
  pairs = [
    (out['mlm_logits'][real], expected.prediction_logits.numpy()[real]),
    (out['nsp_logits'], expected.seq_relationship_logits.numpy()),
  ]
  pairs += [
    (ours[real], states.numpy()[real])
    for ours, states in zip(out['all_hidden'], expected.hidden_states, strict=True)
  ]
  for ours, state in pairs:
    assert np.abs(ours - state).max() <= 1e-5 * max(1, np.abs(state).max())


@pytest.mark.parametrize(
  ('heads', 'pooler', 'architecture'),
  [(('mlm', 'nsp'), True, 'BertForPreTraining'), (('mlm',), False, 'BertForMaskedLM')],
)
def test_a_saved_model_loads_in_transformers_without_a_missing_key(
  tmp_path, vocab, heads, pooler, architecture
):
  import jax

  from bertjax.model.config import EncoderConfig
  from bertjax.model.heads import init_params

  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=48, num_layers=2, num_heads=4, mlp_size=80,
    max_positions=40, activation='gelu_tanh',
  )  # fmt: skip
  bert = Bert(config, heads=heads, pooler=pooler)
  params = init_params(bert, jax.random.key(3))
  save_model(tmp_path / 'model', config, params, tokenizer)
  model, info = getattr(transformers, architecture).from_pretrained(
    tmp_path / 'model', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
  assert model.config.architectures == [architecture]

  batch = inputs(tokenizer.vocab_size)
  with torch.no_grad():
    expected = model.eval()(
      input_ids=torch.tensor(batch['input_ids']),
      token_type_ids=torch.tensor(batch['token_type_ids']),
      attention_mask=torch.tensor(batch['segment_ids']),
    )
  logits = expected.prediction_logits if 'nsp' in heads else expected.logits
  ours = bert.apply({'params': params}, batch)['mlm_logits']
  real = batch['segment_ids'] > 0
  np.testing.assert_allclose(ours[real], logits.numpy()[real], atol=1e-5)

  fast = transformers.AutoTokenizer.from_pretrained(tmp_path / 'model')
  text = 'Raises [MASK] if the file is missing, naïve.'
  assert fast(text)['input_ids'] == tokenizer([text])['input_ids'][0].tolist()


def test_twenty_training_steps_follow_pytorchs(tmp_path, vocab):
  import jax

  from bertjax.model import losses
  from bertjax.model.encoder import PARAM_AXES
  from bertjax.training import loop, mesh
  from bertjax.training.optimizer import make_optimizer, unit_schedule

  tokenizer = Tokenizer.from_file(vocab)
  size, rate = tokenizer.vocab_size, 2e-3
  still = {'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}
  model = theirs(size, **still).train()
  model.save_pretrained(tmp_path)
  tokenizer.save(tmp_path)
  config, params, _ = load_model(tmp_path)
  one = mesh.make_mesh(devices=jax.devices()[:1])
  transform, schedule = make_optimizer('adamw'), unit_schedule('google', 20, 5)
  state, shardings = loop.init_state(
    lambda: loop.TrainState.create(params, transform, jax.random.key(0), rate), one, PARAM_AXES
  )
  step = loop.make_train_step(
    losses.pretraining_loss(Bert(config)), losses.pretraining_weights, transform, schedule,
    mesh=one, state_shardings=shardings,
  )  # fmt: skip
  kept = [p for n, p in model.named_parameters() if 'bias' in n or 'LayerNorm' in n]
  decayed = [p for n, p in model.named_parameters() if not ('bias' in n or 'LayerNorm' in n)]
  groups = [{'params': kept, 'weight_decay': 0.0}, {'params': decayed, 'weight_decay': 0.01}]
  adamw = torch.optim.AdamW(groups, lr=rate, eps=1e-6)

  for number in range(20):
    batch, rng = inputs(size), np.random.default_rng(number)
    batch['masked_lm_positions'] = rng.integers(0, 11, (3, 4), dtype=np.int32)
    batch['masked_lm_ids'] = rng.integers(0, size, (3, 4), dtype=np.int32)
    batch['masked_lm_weights'] = np.array([[1, 1, 1, 0]] * 3, np.float32)
    batch['next_sentence_labels'] = np.array([0, 1, 0], np.int32)
    state, metrics = step(state, batch)

    t = {k: torch.tensor(v).long() for k, v in batch.items()}
    out = model(
      input_ids=t['input_ids'],
      token_type_ids=t['token_type_ids'],
      attention_mask=t['segment_ids'],
    )
    picked = out.prediction_logits[torch.arange(3)[:, None], t['masked_lm_positions']][:, :3]
    loss = torch.nn.functional.cross_entropy(
      picked.reshape(9, size), t['masked_lm_ids'][:, :3].reshape(9)
    ) + torch.nn.functional.cross_entropy(out.seq_relationship_logits, t['next_sentence_labels'])
    adamw.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in adamw.param_groups:
      group['lr'] = rate * float(schedule(number))
    adamw.step()
    assert float(metrics['loss']) == pytest.approx(loss.item(), rel=1e-4), number


def test_weights_return_bit_for_bit(tmp_path, vocab):
  import jax

  tokenizer = Tokenizer.from_file(vocab)
  theirs(tokenizer.vocab_size).save_pretrained(tmp_path / 'a')
  tokenizer.save(tmp_path / 'a')
  config, params, _ = load_model(tmp_path / 'a')
  save_model(tmp_path / 'b', config, params, tokenizer)
  again_config, again, _ = load_model(tmp_path / 'b')
  assert again_config == config
  jax.tree.map(np.testing.assert_array_equal, params, again)
