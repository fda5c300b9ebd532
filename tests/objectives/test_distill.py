"""Distillation: losses beside torch, a teacher that is not trained or saved, and runs."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bertjax
from bertjax import prepare
from bertjax.__main__ import main
from bertjax.config import load_recipe
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import loading
from bertjax.model import encoder
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.objectives import distill, labels
from bertjax.training import layout, loop, sweep
from bertjax.training import mesh as mesh_lib
from bertjax.training.checkpoint import Checkpoints
from tests.test_finetune import write_sst2

SMALL = EncoderConfig(
  vocab_size=600, hidden_size=32, num_layers=2, num_heads=4, mlp_size=64, max_positions=64,
  initializer_range=0.2, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
LARGE = dataclasses.replace(SMALL, num_layers=3, mlp_size=96)
STUDENT, TEACHER = (Bert(config, ('mlm',), False) for config in (SMALL, LARGE))
ALL = distill.DISTILBERT | distill.MINILM


@pytest.fixture(scope='module')
def params():
  """Of the student, with the teacher's."""
  init = jax.jit(init_params, static_argnums=0)
  return init(STUDENT, jax.random.key(0)) | {'teacher': init(TEACHER, jax.random.key(1))}


@pytest.mark.e2e
def test_all_losses_equal_torch(params, batch):
  """Those of DistilBERT's training code, and MiniLM's, on the states of transformers' models."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  objective = distill.pretraining(STUDENT, TEACHER, ALL, temperature=2.0, layer=1)
  sums, _ = jax.jit(objective.loss, static_argnums=2)(params, batch, None)
  weights = objective.weights(batch)
  ours = {name: float(sums[name] / weights[name]) for name in sums}

  def theirs(model, own, layer):
    config = model.config
    bert = transformers.BertForMaskedLM(transformers.BertConfig(
      vocab_size=600, hidden_size=32, num_hidden_layers=config.num_layers, num_attention_heads=4,
      intermediate_size=config.mlp_size, max_position_embeddings=64, attn_implementation='eager',
    )).eval()  # fmt: skip
    tensors = bertjax.interop.huggingface.to_tensors(config, own)
    tensors = {name: torch.tensor(np.array(x)) for name, x in tensors.items()}
    assert not bert.load_state_dict(tensors, strict=False).unexpected_keys
    values = []
    attention = bert.bert.encoder.layer[layer].attention.self
    attention.value.register_forward_hook(lambda *x: values.append(x[2]))
    with torch.no_grad():
      out = bert(
        torch.tensor(batch['input_ids']).long(), token_type_ids=torch.tensor(
          batch['token_type_ids']).long(), attention_mask=torch.tensor(batch['segment_ids']).long(),
        output_hidden_states=True, output_attentions=True,
      )  # fmt: skip
    value = values[0].reshape(16, 64, 4, 8).transpose(1, 2)
    mask = torch.tensor(batch['segment_ids'] == 0)[:, None, None] * -1e9
    relation = torch.softmax(value @ value.transpose(2, 3) / 8**0.5 + mask, -1)
    return out.logits, out.hidden_states[-1], out.attentions[layer], relation

  own = {name: part for name, part in params.items() if name != 'teacher'}
  (s_logits, s_hidden, *s_relations), (t_logits, t_hidden, *t_relations) = (
    theirs(STUDENT, own, 1), theirs(TEACHER, params['teacher'], 1)
  )  # fmt: skip
  used = batch['masked_lm_weights'] > 0
  rows = np.broadcast_to(np.arange(16)[:, None], used.shape)[used]
  masked = rows, batch['masked_lm_positions'][used]
  F = torch.nn.functional
  s, t = (F.log_softmax(x[masked] / 2, -1) for x in (s_logits, t_logits))
  real = torch.tensor(batch['segment_ids'] > 0)
  target = torch.ones(int(real.sum()))
  expected = {
    'mlm': F.cross_entropy(s_logits[masked], torch.tensor(batch['masked_lm_ids'][used]).long()),
    'soft': torch.nn.KLDivLoss(reduction='batchmean', log_target=True)(s, t) * 4,
    'cosine': torch.nn.CosineEmbeddingLoss()(s_hidden[real], t_hidden[real], target),
  }
  for name, s, t in zip(('attention', 'value'), s_relations, t_relations, strict=True):
    nats = F.kl_div(s.clamp_min(1e-30).log(), t, reduction='none').sum(-1).mean(1)
    expected[name] = nats[real].mean()
  assert ours.keys() == expected.keys()
  for name in ours:
    assert ours[name] == pytest.approx(expected[name].item(), rel=1e-5, abs=1e-6), name


def test_a_student_that_is_the_teacher_has_nothing_to_learn(params, batch):
  objective = distill.pretraining(TEACHER, TEACHER, ALL)
  same = params['teacher'] | {'teacher': params['teacher']}
  losses, _ = jax.jit(objective.loss, static_argnums=2)(same, batch, None)
  for name in ('soft', 'cosine', 'attention', 'value'):
    assert abs(float(losses[name])) < 1e-3 < float(losses['mlm'])


LOGITS = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)


@pytest.mark.parametrize(
  ('label', 'shape'),
  [
    (labels.Class(names=('a', 'b', 'c')), (4, 3)),
    (labels.Multilabel(names=('a', 'b', 'c')), (4, 3)),
    (labels.Regression(), (4, 1)),
    (labels.Tags(names=('O', 'B-x', 'I-x')), (4, 6, 3)),
    (labels.Span(), (4, 6, 2)),
    (labels.Choice(), (4,)),
  ],
  ids=lambda x: type(x).__name__,
)
def test_soft_losses_of_a_label_are_least_at_the_teachers_logits(label, shape):
  ours, theirs = (x[tuple(map(slice, shape))] for x in LOGITS.reshape(2, *LOGITS.shape[1:]))
  ours, theirs = (np.resize(x, shape) for x in (ours, theirs))
  segments = np.ones((4, 6), np.int32)
  kind = {'tags': (4, 6), 'span': (4, 2), 'multilabel': (4, 3)}
  shaped = kind.get(type(label).__name__.lower(), (4,))
  batch = {'labels': np.zeros(shaped, np.int32), 'segment_ids': segments,
           'input_ids': segments, 'example_weights': np.ones(4, np.float32)}  # fmt: skip

  def total(logits):
    losses = label.soft_losses(logits, theirs, batch, 2.0)
    assert losses.shape == label.weights(batch).shape
    return losses.sum()

  value, gradient = jax.value_and_grad(total)(jnp.asarray(ours))
  assert value > 1e-3
  assert np.abs(gradient).max() > 1e-3
  value, gradient = jax.value_and_grad(total)(jnp.asarray(theirs))
  np.testing.assert_allclose(value, 0, atol=1e-6)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_soft_targets_of_classes_equal_torch():
  torch = pytest.importorskip('torch')
  ours, theirs = LOGITS.reshape(2, -1, 3)
  soft = labels.Class(names=('a', 'b', 'c')).soft_losses(ours, theirs, {}, 3.0)
  F = torch.nn.functional
  expected = F.kl_div(
    F.log_softmax(torch.tensor(ours) / 3, -1), F.softmax(torch.tensor(theirs) / 3, -1),
    reduction='batchmean',
  )  # fmt: skip
  assert float(soft.mean()) == pytest.approx(9 * expected.item(), rel=1e-5)


@functools.cache
def run(devices, sizes, accumulation):
  """step(params, batch) -> metrics and parameters after a step, with a sharded teacher."""
  mesh = mesh_lib.make_mesh(*sizes, devices=jax.devices()[:devices])
  lay = layout.Layout(mesh, encoder.PARAM_AXES, accumulation=accumulation)

  def step(params, batch):
    kept = {'teacher': params['teacher']}
    frozen = jax.device_put(kept, mesh_lib.tree_shardings(mesh, encoder.PARAM_AXES, kept))
    objective = distill.pretraining(STUDENT, TEACHER, ALL, frozen=frozen)
    own = {name: part for name, part in params.items() if name != 'teacher'}
    state, shardings, _ = layout.restore_or_init(
      objective, optax.adam(1e-3), lay, load=lambda make: jax.device_get(own)
    )
    assert 'teacher' not in state.params
    moments = state.opt_state[0].mu
    assert jax.tree.structure(moments) == jax.tree.structure(own)  # none for the teacher
    train = lay.train_step(objective, optax.adam(1e-3), shardings)
    (rows,) = loop.to_device([batch], mesh)
    state, metrics = train(state, rows)
    return jax.device_get((metrics, state.params))

  return step


@pytest.mark.parametrize(
  ('devices', 'sizes', 'accumulation'),
  [
    pytest.param(8, (2, 2, 2), 1, marks=pytest.mark.stack),
    pytest.param(1, (1, 1, 1), 4, marks=pytest.mark.full),
  ],
)
@pytest.mark.e2e
def test_any_mesh_and_microbatches_train_the_same(devices, sizes, accumulation, params, batch):
  one, last = run(1, (1, 1, 1), 1)(params, batch)
  other, others = run(devices, sizes, accumulation)(params, batch)
  for name in one:
    np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), last, others)


def test_runs_of_a_sweep_share_the_teacher():
  objective = bertjax.objectives.Objective(
    lambda rng: {'w': jnp.zeros(())},
    lambda params, batch, rng: (
      {'fit': jnp.square(params['w'] - params['teacher'] * batch['y']).sum()}, {}
    ),
    lambda batch: {'fit': batch['y'].size}, frozen={'teacher': jnp.float32(3)},
  )  # fmt: skip
  runs = tuple((0, rate) for rate in (0.1, 0.2))
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  lay = sweep.Sweep(mesh, encoder.PARAM_AXES, runs=runs)
  optimizer = bertjax.make_optimizer('sgd', weight_decay=0.0, clip_norm=0.0)
  state, shardings, _ = layout.restore_or_init(objective, optimizer, lay)
  state, _ = lay.train_step(objective, optimizer, shardings)(
    state, {'y': np.ones((2, 4), np.float32)}
  )
  np.testing.assert_allclose(state.params['w'], [0.6, 1.2], rtol=1e-5)


def change(config, **fields):
  return Bert(dataclasses.replace(config, **fields), ('mlm',), False)


@pytest.mark.parametrize(
  ('teacher', 'options', 'words'),
  [
    (change(LARGE, vocab_size=700), {}, 'vocab_size=700, the student 600'),
    (change(LARGE, hidden_size=64), {}, "hidden_size=64, the student 32, .* 'cosine'"),
    (change(LARGE, num_heads=2), {'scale': distill.MINILM}, 'num_heads=2, the student 4'),
    (Bert(LARGE, (), False), {}, 'no masked-LM head'),
    (TEACHER, {'layer': 3}, 'distill.layer=3 is no layer .* has 3'),
    (TEACHER, {'temperature': 0.0}, 'distill.temperature must be above 0'),
    (TEACHER, {'scale': {'mlm': 1.0}}, 'all weights of the teacher are 0'),
    (TEACHER, {'scale': {'soft': -1.0}}, 'distill.soft_weight=-1.0'),
    (change(LARGE, positions='rotary'), {'scale': distill.MINILM}, 'which the teacher lacks'),
  ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_one_sentence(teacher, options, words):
  with pytest.raises(ValueError, match=words):
    distill.pretraining(STUDENT, teacher, **options)


def test_layers_are_taken_in_the_order_given(params):
  config, kept = loading.take_layers(LARGE, params['teacher'], [2, 0], 'X')
  assert config.num_layers == 2
  name = ('encoder', 'layers', 'mlp', 'in', 'kernel')
  before, after = (functools.reduce(dict.get, name, p) for p in (params['teacher'], kept))
  np.testing.assert_array_equal(after, np.asarray(before)[[2, 0]])
  with pytest.raises(ValueError, match='init_layers has 3, and the 3 layers of X'):
    loading.take_layers(LARGE, params['teacher'], [3], 'X')


@pytest.fixture(scope='module')
def rows(corpus, vocab, tmp_path_factory):
  folder = tmp_path_factory.mktemp('distil') / 'rows'
  settings = prepare.Settings(length=64, kind='doc_sentences', heldout_fraction=0.2)
  prepare.prepare(str(corpus), Tokenizer.from_file(vocab), settings, folder)
  return folder


@pytest.fixture(scope='module')
def teachers(vocab, tmp_path_factory):
  """Model directories: 'mlm', of 4 layers, and 'sst2', with a classifier."""
  folder, tokenizer = tmp_path_factory.mktemp('teachers'), Tokenizer.from_file(vocab)
  config = dataclasses.replace(
    LARGE, num_layers=4, num_heads=2, mlp_size=64, vocab_size=tokenizer.vocab_size
  )
  for name, heads in (('mlm', ('mlm',)), ('sst2', ('classification',))):
    model = Bert(config, heads, pooler=name == 'sst2')
    named = {'labels': ('negative', 'positive')} if name == 'sst2' else {}
    loading.save_model(
      folder / name,
      model,
      jax.device_get(jax.jit(init_params, static_argnums=0)(model, jax.random.key(2))),
      tokenizer,
      **named,
    )
  return folder


def arguments(recipe, rows, teacher, workdir, *more):
  return ['pretrain', f'--config={recipe}:smoke', f'--workdir={workdir}',
          f'--config.data.prepared={rows}', f'--config.distill.teacher={teacher}',
          '--config.data.loader=threads', '--config.num_train_steps=4', '--config.eval_every=2',
          '--config.warmup_steps=1',
          '--config.save_every=2', '--config.log_every=1', *more]  # fmt: skip


@pytest.mark.full
def test_distilbert_starts_from_layers_resumes_and_saves_no_teacher(
  rows, teachers, tmp_path, capsys
):
  teacher = teachers / 'mlm'
  args = arguments('distil_base', rows, teacher, tmp_path / 'run', f'--model={teacher}',
                   '--config.init_layers=1,3')  # fmt: skip
  changed = [arg for arg in args if not arg.startswith('--workdir')]
  assert main([*changed, f'--workdir={tmp_path}/none', '--config.learning_rate=1e-30']) == 0
  before = loading.load_weights(teacher)[1]['encoder']['layers']['mlp']['in']['kernel'][[1, 3]]
  after = loading.load_weights(tmp_path / 'none')[1]['encoder']['layers']['mlp']['in']['kernel']
  np.testing.assert_allclose(after, before, atol=1e-6)

  assert main(args) == 0
  scores = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
  assert {'mlm_loss', 'soft_loss', 'cosine_loss', 'mlm_perplexity'} <= scores.keys()
  saved = Checkpoints(tmp_path / 'run' / 'checkpoints', keep=2, read_only=True)
  weights = loading.load_weights(tmp_path / 'run' / 'checkpoints' / str(saved.steps()[-1]))[1]
  assert weights.keys() == {'encoder', 'mlm'}
  bytes_before = (tmp_path / 'run' / 'model' / 'model.safetensors').read_bytes()
  for name in ('checkpoints/4', 'model'):
    shutil.rmtree(tmp_path / 'run' / name)
  assert main(args) == 0
  assert (tmp_path / 'run' / 'model' / 'model.safetensors').read_bytes() == bytes_before
  capsys.readouterr()
  assert main(['evaluate', f'--workdir={tmp_path}/run', '--checkpoint=newest']) == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed['soft_loss'] == pytest.approx(scores['soft_loss'], rel=1e-5)


@pytest.mark.full
def test_minilm_of_another_width_becomes_an_encoder(rows, teachers, tmp_path):
  args = arguments('minilm', rows, teachers / 'mlm', tmp_path / 'run',
                   '--config.model.hidden_size=16')  # fmt: skip
  assert main(args) == 0
  scores = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
  assert scores['attention_loss'] > 0 and scores['value_loss'] > 0
  model, _, _ = bertjax.load_model(tmp_path / 'run')
  assert model.heads == () and model.config.hidden_size == 16


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config.distill.teacher='], 'distillation needs a teacher'),
    (['--config.objective=mlm'], 'distillation needs a teacher'),
    (['--config.nsp=True'], 'set nsp=False'),
    (['--config.model.hidden_size=64'], "the loss 'cosine' needs the same"),
    (['--config.distill.layer=9'], 'distill.layer=9 is no layer'),
    (['--config.init_layers=0'], 'layers of init_from, which is empty'),
  ],
)
def test_settings_that_do_not_fit_get_one_sentence(flags, words, rows, teachers, tmp_path, capsys):
  args = arguments('distil_base', rows, teachers / 'mlm', tmp_path / 'run')
  assert main([*args, *flags]) == 2
  message = capsys.readouterr().err
  assert words in message
  assert 'Traceback' not in message


def test_a_teacher_with_another_vocabulary_is_refused(rows, teachers, vocab, tmp_path, capsys):
  words = vocab.read_text().splitlines()
  tokenizer = Tokenizer([*words[:-2], words[-1], words[-2]])
  model, params, _ = bertjax.load_model(teachers / 'mlm')
  loading.save_model(tmp_path / 'other', model, params, tokenizer)
  assert main(arguments('distil_base', rows, tmp_path / 'other', tmp_path / 'run')) == 2
  assert 'has another vocabulary than the student' in capsys.readouterr().err


def fine_tuning(folder, student, teacher, *more):
  write_sst2(folder)
  return ['finetune', '--config=glue:sst2', f'--workdir={folder}/run', f'--model={student}',
          f'--config.data.source={folder}', f'--config.distill.teacher={teacher}',
          '--config.data.length=32', '--config.num_train_epochs=1.0', '--config.batch_size=8',
          '--config.data.loader=threads', *more]  # fmt: skip


@pytest.mark.full
def test_a_task_is_learnt_from_a_teacher(teachers, tmp_path):
  """Only from soft targets, with half of its layers frozen; two runs share the teacher."""
  args = fine_tuning(tmp_path, teachers / 'mlm', teachers / 'sst2', '--config.init_layers=0,2',
                     '--config.distill.soft_weight=1.0', '--config.num_trainable_layers=1',
                     '--config.learning_rates=1e-4,1e-3')  # fmt: skip
  assert main(args) == 0
  model, params, _ = bertjax.load_model(tmp_path / 'run')
  assert model.config.num_layers == 2 and params.keys() == {'encoder', 'pooler', 'classification'}
  rows = [json.loads(line) for path in (tmp_path / 'run' / 'logs').glob('*.jsonl')
          for line in path.read_text().splitlines()]  # fmt: skip
  assert any('soft_loss' in row for row in rows)


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config.distill.soft_weight=1.5'], 'must be in [0, 1] for a task'),
    (['--config.distill.temperature=0'], 'distill.temperature must be above 0'),
    (['--config.distill.teacher=MLM'], 'has no classification head'),
    (['--config.init_layers=0,9'], 'init_layers has 9'),
    (['--config.init_layers=a'], "init_layers are written '0,2,4'"),
  ],
)
def test_a_task_refuses_a_teacher_that_does_not_fit(flags, words, teachers, tmp_path, capsys):
  flags = [flag.replace('MLM', str(teachers / 'mlm')) for flag in flags]
  assert main(fine_tuning(tmp_path, teachers / 'mlm', teachers / 'sst2', *flags)) == 2
  message = capsys.readouterr().err
  assert words in message
  assert 'Traceback' not in message


def test_a_teacher_with_another_number_of_labels_is_refused(teachers, tmp_path, capsys):
  model, params, tokenizer = bertjax.load_model(teachers / 'sst2')
  wide = Bert(model.config, ('classification',), num_labels=3)
  params = jax.device_get(jax.jit(init_params, static_argnums=0)(wide, jax.random.key(0)))
  loading.save_model(tmp_path / 'three', wide, params, tokenizer)
  assert main(fine_tuning(tmp_path, teachers / 'mlm', tmp_path / 'three')) == 2
  assert 'predicts 3 labels' in capsys.readouterr().err


def test_recipes_have_the_papers_weights():
  config = load_recipe('distil_base')
  names = ('mlm', 'soft', 'cosine', 'attention', 'value')
  assert [config.distill[f'{n}_weight'] for n in names] == [2.0, 5.0, 1.0, 0.0, 0.0]
  assert (config.model.num_layers, config.distill.temperature) == (6, 2.0)
  config = load_recipe('minilm')
  assert [config.distill[f'{n}_weight'] for n in names] == [0.0, 0.0, 0.0, 1.0, 1.0]
  assert (config.model.hidden_size, config.model.num_heads) == (384, 12)
