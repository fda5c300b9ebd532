"""ELECTRA: samples, losses and gradients beside transformers', any split of a batch, and a run."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bertjax import objectives, prepare
from bertjax.__main__ import main
from bertjax.config import load_recipe
from bertjax.data import dataset, loader
from bertjax.data.masking import Masking
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import loading
from bertjax.model import encoder
from bertjax.model.config import electra_small
from bertjax.model.heads import Bert, generator_params
from bertjax.objectives import electra
from bertjax.training import loop
from bertjax.training import mesh as mesh_lib
from bertjax.training.metrics import read_metrics

CONFIG = electra_small(
  vocab_size=600, hidden_size=32, num_heads=4, num_layers=2, mlp_size=64, embedding_size=24,
  max_positions=64, initializer_range=0.2, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
DISCRIMINATOR = Bert(CONFIG, heads=('rtd',), pooler=False)
GENERATOR = electra.make_generator(CONFIG, 0.5)
OBJECTIVE = electra.pretraining(DISCRIMINATOR, GENERATOR)


@pytest.fixture(scope='module')
def batches(tiny_rows, vocab):
  """step -> a batch of 16 real rows."""
  rows, special = dataset.Dataset(tiny_rows, 'train'), Tokenizer.from_file(vocab).special
  masking = Masking(max_predictions=10, mask_prob=0.85, random_prob=0.0)
  return loader.Batches(rows, 16, 0, masking, 600, special, objective='electra').training


@pytest.fixture(scope='module')
def packed_rows(corpus, vocab, tmp_path_factory):
  """Prepared rows of up to four sequences."""
  rows = tmp_path_factory.mktemp('packed') / 'rows'
  settings = prepare.Settings(
    length=64, kind='doc_sentences', short_seq_prob=0.5, max_sequences_per_row=4,
    heldout_fraction=0.2,
  )  # fmt: skip
  prepare.prepare(str(corpus), Tokenizer.from_file(vocab), settings, rows)
  return rows


@pytest.fixture(scope='module')
def params():
  """Of both models, biases and norms random too."""
  params = jax.jit(OBJECTIVE.init)(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(
    tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  )


@jax.jit
def total(params, batch):
  """The loss that a step minimises, and all its parts."""
  sums, metrics = OBJECTIVE.loss(params, batch, None)
  result = loop.means(sums, metrics, OBJECTIVE.weights(batch), OBJECTIVE.scale)
  return result['loss'], result


@jax.jit
def sampled(params, batch):
  """(ids, replaced) that the discriminator gets."""
  out = jax.jit(GENERATOR.apply)({'params': generator_params(params)}, batch)
  return electra.replace_masked(out['mlm_logits'], batch)


@pytest.mark.e2e
def test_losses_and_gradients_equal_transformers(params, batches, tmp_path, vocab):
  """Both of its classes with the same weights and the same samples, their embeddings tied."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  tokenizer, batch = Tokenizer.from_file(vocab), batches(3)
  loading.save_model(tmp_path / 'generator', GENERATOR, generator_params(params), tokenizer)
  own = {name: params[name] for name in ('encoder', 'rtd')}
  loading.save_model(tmp_path / 'model', DISCRIMINATOR, own, tokenizer)
  generator = transformers.ElectraForMaskedLM.from_pretrained(tmp_path / 'generator').eval()
  model = transformers.ElectraForPreTraining.from_pretrained(tmp_path / 'model').eval()
  generator.electra.embeddings = model.electra.embeddings
  generator.generator_lm_head.weight = model.electra.embeddings.word_embeddings.weight
  ids, replaced = (torch.tensor(np.asarray(x)) for x in sampled(params, batch))
  their = {name: torch.tensor(batch[name]).long() for name in batch if name != 'sample_seeds'}
  common = {'attention_mask': (their['segment_ids'] > 0).long(),
            'token_type_ids': their['token_type_ids']}  # fmt: skip
  used = batch['masked_lm_weights'] > 0
  rows = np.broadcast_to(np.arange(len(used))[:, None], used.shape)[used]
  labels = torch.full_like(ids, -100).long()
  labels[rows, batch['masked_lm_positions'][used]] = their['masked_lm_ids'][used]
  mlm_loss = generator(input_ids=their['input_ids'], labels=labels, **common).loss
  out = model(input_ids=ids.long(), labels=replaced.long(), **common)
  (mlm_loss + 50 * out.loss).backward()

  (loss, parts), gradients = jax.value_and_grad(total, has_aux=True)(params, batch)
  assert parts['mlm_loss'] == pytest.approx(mlm_loss.item(), rel=1e-5)
  assert parts['rtd_loss'] == pytest.approx(out.loss.item(), rel=1e-5)
  assert loss == pytest.approx(mlm_loss.item() + 50 * out.loss.item(), rel=1e-5)
  real = batch['segment_ids'] > 0
  found, replaced = (out.logits > 0).numpy()[real], replaced.numpy()[real]
  assert parts['rtd_accuracy'] == pytest.approx((found == replaced).mean())
  assert parts['rtd_precision'] == pytest.approx(replaced[found].mean())
  assert parts['rtd_recall'] == pytest.approx(found[replaced].mean())

  with torch.no_grad():  # their gradients as tensors of ours, by the way that weights take
    for module in (generator, model):
      for parameter in module.parameters():
        parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
  generator.save_pretrained(tmp_path / 'generator')
  model.save_pretrained(tmp_path / 'model')
  expected = loading.load_weights(tmp_path / 'model')[1]
  small = loading.load_weights(tmp_path / 'generator')[1]
  expected = expected | {'generator': electra.without_shared(small)}
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * largest),
    gradients, expected,
  )  # fmt: skip


@pytest.mark.e2e
def test_the_discriminator_sends_the_generator_no_gradient(params, batches):
  gradients = jax.jit(jax.grad(lambda p: OBJECTIVE.loss(p, batches(0), None)[0]['rtd']))(params)
  assert not any(np.any(x) for x in jax.tree.leaves(gradients['generator']))
  assert np.any(gradients['encoder']['embeddings']['word']['embedding'])


def test_samples_replace_the_selected_tokens_only_and_an_equal_one_is_original(params, batches):
  batch = batches(1)
  ids, replaced = map(np.asarray, sampled(params, batch))
  original = batch['input_ids'].copy()
  for row, used in enumerate(batch['masked_lm_weights'] > 0):
    original[row, batch['masked_lm_positions'][row, used]] = batch['masked_lm_ids'][row, used]
  np.testing.assert_array_equal(replaced, ids != original)
  selected = np.zeros(ids.shape, bool)
  for row, used in enumerate(batch['masked_lm_weights'] > 0):
    selected[row, batch['masked_lm_positions'][row, used]] = True
  assert 0 < replaced.sum() <= selected.sum()
  assert not (replaced & ~selected).any()
  certain = jnp.full((*batch['masked_lm_ids'].shape, 600), -1e9)
  certain = jnp.where(jnp.arange(600) == batch['masked_lm_ids'][..., None], 0.0, certain)
  ids, replaced = electra.replace_masked(certain, batch)
  assert not replaced.any()
  np.testing.assert_array_equal(ids, original)


def test_samples_follow_the_generators_distribution():
  logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
  batch = {'sample_seeds': np.arange(300, dtype=np.int32), 'input_ids': np.zeros((300, 20), int),
           'masked_lm_positions': np.tile(np.arange(20), (300, 1)),
           'masked_lm_ids': np.zeros((300, 20), int),
           'masked_lm_weights': np.ones((300, 20))}  # fmt: skip
  ids, _ = electra.replace_masked(jnp.broadcast_to(logits, (300, 20, 3)), batch)
  counts = np.bincount(np.asarray(ids).ravel(), minlength=3) / ids.size
  np.testing.assert_allclose(counts, [0.1, 0.2, 0.7], atol=0.02)


def test_the_samples_of_a_row_do_not_depend_on_the_rows_beside_it(params, batches):
  batch = batches(2)
  ids, _ = sampled(params, batch)
  part = {name: array[5:9] for name, array in batch.items()}
  np.testing.assert_array_equal(sampled(params, part)[0], ids[5:9])
  again, _ = sampled(params, batch | {'sample_seeds': batch['sample_seeds'] + 1})
  assert (np.asarray(again) != ids).any()


@functools.cache
def steps(devices: int, accumulation: int, objective=OBJECTIVE):
  """train(params, batches) -> metrics of each step and the last parameters."""
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices])
  shard = mesh_lib.sharder(mesh, encoder.PARAM_AXES)
  optimizer = optax.sgd(0.01)

  def train(params, batches):
    make = lambda params: loop.TrainState.create(params, optimizer, jax.random.key(1))  # noqa: E731
    state, shardings = loop.init_state(make, shard, params)
    step = loop.make_train_step(
      objective.loss, objective.weights, optimizer, mesh=mesh, state_shardings=shardings,
      accumulation=accumulation, scale=objective.scale,
    )  # fmt: skip
    metrics = []
    for batch in loop.to_device(batches, mesh):
      state, values = step(state, batch)
      metrics.append(values)
    return jax.device_get((metrics, state.params))

  return train


@pytest.mark.parametrize(
  ('devices', 'accumulation'),
  [
    pytest.param(4, 2, marks=pytest.mark.stack),
    *(pytest.param(*pair, marks=pytest.mark.full) for pair in ((8, 1), (1, 4))),
  ],
)
@pytest.mark.e2e
def test_devices_and_microbatches_sample_and_train_the_same(devices, accumulation, params, batches):
  data = [batches(step) for step in range(3)]
  one, last = steps(1, 1)(params, data)
  other, others = steps(devices, accumulation)(params, data)
  for a, b in zip(one, other, strict=True):
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), last, others)


def test_packed_sequences_have_the_losses_of_single_ones(packed_rows, vocab, params):
  """With a generator that is certain, so that both sample the same."""
  read = loader.Batches(
    dataset.Dataset(packed_rows, 'train'), 16, 0, Masking(max_predictions=12), 600,
    Tokenizer.from_file(vocab).special, objective='electra',
  )  # fmt: skip
  packed = read.training(0)
  assert packed['segment_ids'].max() > 1
  bias = jnp.where(jnp.arange(600) == 77, 1e4, 0.0)
  certain = params | {'generator': params['generator'] | {'mlm': params['generator']['mlm']
                                                          | {'bias': bias}}}  # fmt: skip
  single = {name: [] for name in packed if name != 'cls_positions'}
  for row, sequence in zip(*np.nonzero(packed['example_weights']), strict=True):
    inside = np.flatnonzero(packed['segment_ids'][row] == sequence + 1)
    pad = 64 - len(inside)
    for name in ('input_ids', 'token_type_ids', 'position_ids'):
      single[name].append(np.pad(packed[name][row, inside], (0, pad)))
    single['segment_ids'].append(np.pad(np.ones(len(inside), np.int32), (0, pad)))
    place = packed['masked_lm_positions'][row] - inside[0]
    own = (packed['masked_lm_weights'][row] > 0) & (place >= 0) & (place < len(inside))
    single['masked_lm_positions'].append(np.where(own, place, 0))
    single['masked_lm_ids'].append(packed['masked_lm_ids'][row])
    single['masked_lm_weights'].append(own.astype(np.float32))
    single['example_weights'].append(np.float32(1))
    single['sample_seeds'].append(np.int32(0))
  single = {name: np.stack(arrays) for name, arrays in single.items()}
  _, expected = total(certain, single)
  _, ours = total(certain, packed)
  for name in expected:
    np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4, err_msg=name)


def test_evaluation_counts_no_row_twice(params, tiny_rows, vocab):
  """The last batch is filled up with rows of weight 0."""
  heldout = dataset.Dataset(tiny_rows, 'heldout')
  make = functools.partial(
    loader.Batches, heldout, seed=0, masking=Masking(max_predictions=10), vocab_size=600,
    special=Tokenizer.from_file(vocab).special, objective='electra',
  )  # fmt: skip
  scores = []
  for size in (16, 24):
    batches = make(batch_size=size)
    sums = [jax.jit(OBJECTIVE.loss, static_argnums=2)(params, batches.evaluation(i), None)
            for i in range(batches.evaluation_steps)]  # fmt: skip
    weights = [OBJECTIVE.weights(batches.evaluation(i)) for i in range(batches.evaluation_steps)]
    add = lambda *x: np.sum(x, dtype=np.float64)  # noqa: E731
    scores.append(loop.means(*jax.tree.map(add, *sums), jax.tree.map(add, *weights)))
  assert len(heldout) % 16 or len(heldout) % 24
  for name in scores[0]:
    np.testing.assert_allclose(scores[0][name], scores[1][name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  ('size', 'words'), [(0.0, 'must be above 0'), (1.5, 'at most 1'), (0.4, 'do not divide it')]
)
def test_a_generator_of_an_impossible_size_is_refused(size, words):
  with pytest.raises(ValueError, match=words):
    electra.make_generator(dataclasses.replace(CONFIG, hidden_size=40, num_heads=8), size)


def test_the_papers_generator():
  small = electra.make_generator(electra_small()).config
  assert (small.hidden_size, small.num_heads, small.mlp_size) == (64, 1, 256)
  assert (small.embedding_size, small.num_layers) == (128, 12)
  config = load_recipe('electra_small')
  assert (config.objective, config.rtd_weight, config.generator_size) == ('electra', 50.0, 0.25)
  assert (config.masking.mask_prob, config.masking.random_prob) == (0.85, 0.0)


ARGS = ['pretrain', '--config=electra_small:smoke', '--config.data.loader=threads']


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config.nsp=True'], 'set nsp=False'),
    (
      ['--config.model.classifier_hidden=', '--config.model.embedding_size=0'],
      "got those of a bert; set model.classifier_hidden='gelu'",
    ),
    (['--config.generator_size=0'], 'generator_size must be above 0'),
    (['--config.rtd_weight=-1'], 'rtd_weight must be above 0'),
    (['--config.init_from=x'], 'name both, or none'),
    (['--config.objective=mlm', '--config.generator_from=x'], "is for objective='electra'"),
  ],
)
def test_settings_that_electra_does_not_have_get_one_sentence(
  flags, words, tiny_rows, tmp_path, capsys
):
  args = [*ARGS, f'--workdir={tmp_path}/run', f'--config.data.prepared={tiny_rows}']
  assert main([*args, *flags]) == 2
  message = capsys.readouterr().err
  assert words in message
  assert 'Traceback' not in message
  assert not (tmp_path / 'run').exists()


@pytest.mark.full
def test_a_run_resumes_bit_for_bit_and_leaves_two_models_of_transformers(
  packed_rows, tmp_path, capsys, caplog
):
  run = tmp_path / 'run'
  args = [*ARGS, f'--config.data.prepared={packed_rows}', '--config.log_every=1',
          '--config.learning_rate=3e-3']  # fmt: skip
  assert main([*args, f'--workdir={run}']) == 0
  shutil.copytree(run, tmp_path / 'stopped')
  for name in ('checkpoints/20', 'model', 'generator', 'metrics.json'):
    path = tmp_path / 'stopped' / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert main([*args, f'--workdir={tmp_path}/stopped']) == 0
  assert 'resuming from step 10' in caplog.text
  for name in ('model/model.safetensors', 'generator/model.safetensors', 'metrics.json'):
    assert (run / name).read_bytes() == (tmp_path / 'stopped' / name).read_bytes(), name
  losses = [row['loss'] for row in read_metrics(run) if row['kind'] == 'train']
  assert losses[-1] < losses[0]

  scores = json.loads((run / 'metrics.json').read_text())
  capsys.readouterr()
  assert main(['evaluate', f'--workdir={run}', '--checkpoint=newest']) == 0
  printed = json.loads(capsys.readouterr().out)
  for name in ('mlm_loss', 'rtd_loss', 'rtd_accuracy', 'rtd_precision', 'rtd_recall'):
    assert printed[name] == pytest.approx(scores[name], rel=1e-6)
  assert main(['evaluate', '--config=electra_small:smoke', f'--model={run}/model',
               f'--config.data.prepared={packed_rows}']) == 2  # fmt: skip
  assert 'ELECTRA is a pair' in capsys.readouterr().err

  for head, name in (('rtd', 'model'), ('mlm', 'generator')):  # a checkpoint holds both
    convert = ['convert', f'--from={run}', '--checkpoint=20', f'--out={tmp_path}/{name}']
    assert main([*convert, *(['--heads=mlm'] if head == 'mlm' else [])]) == 0
    converted = (tmp_path / name / 'model.safetensors').read_bytes()
    assert converted == (run / name / 'model.safetensors').read_bytes()

  more = [f'--config.init_from={run}/model', f'--config.generator_from={run}/generator']
  assert main([*args, f'--workdir={tmp_path}/more', *more, '--config.num_train_steps=5']) == 0
  other = [more[0], f'--config.generator_from={tmp_path}/more/generator']
  assert main([*args, f'--workdir={tmp_path}/other', *other]) == 2
  assert 'have other embeddings' in capsys.readouterr().err

  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  for name, kind in (('model', 'ElectraForPreTraining'), ('generator', 'ElectraForMaskedLM')):
    theirs, info = getattr(transformers, kind).from_pretrained(run / name, output_loading_info=True)
    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    model, params, tokenizer = loading.load_model(run / name)
    batch = tokenizer(['the name of a [MASK]', 'or'])
    out = jax.jit(model.apply)({'params': params}, batch)[f'{model.heads[0]}_logits']
    with torch.no_grad():
      logits = theirs.eval()(
        torch.tensor(batch['input_ids']).long(),
        attention_mask=torch.tensor(batch['segment_ids']).long(),
      ).logits.numpy()
    real = batch['segment_ids'] > 0
    np.testing.assert_allclose(np.asarray(out)[real], logits[real], atol=1e-5)


def test_the_objective_is_public():
  assert objectives.electra is electra
