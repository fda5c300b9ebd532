"""LoRA in runs: what is trained and saved, resuming, sweeps, and settings that do not fit."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from bertjax import evaluate, finetune, pretrain
from bertjax.__main__ import main
from bertjax.config import load_recipe
from bertjax.interop import loading
from bertjax.training.metrics import read_metrics
from tests.test_finetune import make, model  # noqa: F401


@pytest.fixture
def config(make):  # noqa: F811
  """A run that trains adapters of rank 4 and a new head."""
  config = make('sst2')
  config.lora.rank, config.learning_rate = 4, 1e-2
  return config


def test_the_optimizer_has_moments_of_the_adapters_and_the_head_only(config):
  states = []
  for rank in (4, 0):
    config.lora.rank = rank
    setup = finetune.set_up(config)
    init = functools.partial(setup.layout.make_state, setup.objective, setup.optimizer)
    states.append(jax.eval_shape(init))
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
  adapted, full = states
  assert adapted.params.keys() == {'lora', 'classification'}
  # 2 layers, queries and values: A [32, 4] and B [4, 32]; the head [32, 2] and its bias.
  assert size(adapted.params) == 4 * (2 * 2 * 2 * 32 * 4 + 32 * 2 + 2)
  assert 0 <= size(adapted.opt_state) - 2 * size(adapted.params) < 100  # counts and rates
  assert size(full.opt_state) > 15 * size(adapted.opt_state)


@pytest.mark.e2e
def test_the_frozen_model_is_stored_in_the_dtype_of_its_matmuls(config):
  config.model.dtype = 'bfloat16'
  setup = finetune.set_up(config)
  base = setup.objective.frozen['base']
  layers = base['encoder']['layers']
  assert layers['mlp']['in']['kernel'].dtype == base['pooler']['kernel'].dtype == 'bfloat16'
  assert base['encoder']['embeddings']['word']['embedding'].dtype == 'float32'  # summed in it
  assert layers['attention']['qkv']['kernel'].dtype == 'float32'  # adapters are added to it
  assert layers['mlp_layer_norm']['scale'].dtype == 'float32'
  batch = {'input_ids': np.ones((8, 4), np.int32)}
  outputs = [
    setup.model.apply({'params': setup.lora.base | {'classification': new} | tree}, batch)['hidden']
    for new in [jax.device_get(setup.objective.init(jax.random.key(0))['classification'])]
    for tree in ({}, jax.device_get(base))
  ]
  np.testing.assert_array_equal(*outputs)  # the same bits


@pytest.mark.full
def test_a_run_learns_resumes_bit_for_bit_and_saves_a_merged_model(config, tmp_path):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  config.num_train_epochs, config.save_every, config.max_to_keep = 8.0, 10, 20
  scores = finetune.run(config, workdir=str(tmp_path / 'run'))
  assert scores['accuracy'] > 0.75  # a random encoder
  bert, params, tokenizer = loading.load_model(tmp_path / 'run')
  assert set(params) == {'encoder', 'pooler', 'classification'}
  batch = tokenizer(['the value of', 'in a exception'])
  ours = bert.apply({'params': params}, batch)['classification_logits']
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'run/model')
  inputs = {'input_ids': batch['input_ids'], 'attention_mask': batch['segment_ids'],
            'token_type_ids': batch['token_type_ids']}  # fmt: skip
  with torch.no_grad():
    logits = theirs.eval()(**{n: torch.tensor(np.int64(x)) for n, x in inputs.items()}).logits
  np.testing.assert_allclose(logits.numpy(), ours, rtol=0, atol=1e-5)
  again = evaluate.evaluate_task(config, str(tmp_path / 'run' / 'model'))
  assert again['loss'] == pytest.approx(scores['loss'], abs=1e-5)
  steps = sorted(int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir())
  _, newest = loading.load_weights(loading.find_checkpoint(tmp_path / 'run', steps[-1]))
  assert set(newest) == set(params)
  # Without the last checkpoints the same run continues to the same bits.
  before = (tmp_path / 'run' / 'checkpoints' / str(steps[-1]) / 'meta' / 'metadata').read_text()
  for step in [step for step in steps if step > 60]:
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(step))
  finetune.run(config, workdir=str(tmp_path / 'run'))
  after = (tmp_path / 'run' / 'checkpoints' / str(steps[-1]) / 'meta' / 'metadata').read_text()
  assert json.loads(after)['checksums'] == json.loads(before)['checksums']
  assert any(name.startswith('params/lora/') for name in json.loads(after)['checksums'])
  assert not any('params/encoder' in name for name in json.loads(after)['checksums'])


@pytest.mark.full
def test_peft_folders_of_a_run_are_its_model_and_a_changed_base_is_refused(config, tmp_path):
  config.lora.save, config.num_train_epochs, config.lora.modules_to_save = 'peft', 2.0, 'pooler'
  start = config.init_from
  source = shutil.copytree(start, tmp_path / 'base')
  config.init_from = str(source)
  scores = finetune.run(config, workdir=str(tmp_path / 'run'))
  files = {p.name for p in (tmp_path / 'run' / 'model').iterdir()}
  assert {'adapter_config.json', 'adapter_model.safetensors'} <= files
  assert 'model.safetensors' not in files
  content = json.loads((tmp_path / 'run' / 'model' / 'adapter_config.json').read_text())
  assert content['base_model_name_or_path'] == str(source.resolve())
  assert content['modules_to_save'] == ['classifier', 'pooler']
  again = evaluate.evaluate_task(config, str(tmp_path / 'run' / 'model'))
  assert again['loss'] == pytest.approx(scores['loss'], abs=1e-5)
  newest = loading.find_checkpoint(tmp_path / 'run')
  loading.load_weights(newest)
  config.init_from = str(newest)
  with pytest.raises(ValueError, match='which transformers cannot load; convert it first'):
    finetune.set_up(config)
  config.init_from = str(source)
  bert, params, tokenizer = loading.load_model(source)
  params['encoder']['layers']['mlp']['in']['bias'] += 1
  loading.save_model(source, bert, params, tokenizer)
  with pytest.raises(ValueError, match=r'adapters of the base model .* which has changed since'):
    loading.load_weights(newest)
  loading.load_weights(newest, base=start)  # the model as it was
  with pytest.raises(ValueError, match=r'lora\.base: '):
    finetune.run(config, workdir=str(tmp_path / 'run'))


def write_pairs(config, folder):
  rows = '\n'.join(f'the value {i}\tof the error {i}' for i in range(40))
  (folder / 'pairs.tsv').write_text(f'query\tanswer\n{rows}\n')
  config.data.train_file, config.task.text, config.task.pair = 'pairs.tsv', 'query', 'answer'
  config.data.source = str(folder)


@pytest.mark.e2e
@pytest.mark.parametrize('recipe', ['embed:smoke', 'glue:sst2'])
def test_new_adapters_leave_embeddings_and_distillation_as_they_are(recipe, config, tmp_path):
  if recipe == 'embed:smoke':
    source, config = config.init_from, load_recipe(recipe)
    config.init_from = source
    write_pairs(config, tmp_path)
  else:  # a teacher with the same head
    bert, params, tokenizer = loading.load_model(config.init_from)
    bert = bert.clone(heads=('classification',))
    head = {'kernel': np.ones((32, 2), np.float32), 'bias': np.zeros(2, np.float32)}
    params = {name: params[name] for name in ('encoder', 'pooler')} | {'classification': head}
    loading.save_model(tmp_path / 'teacher', bert, params, tokenizer, labels=('0', '1'))
    config.distill.teacher = str(tmp_path / 'teacher')
  losses = []
  for rank in (0, 4):
    config.lora.rank = rank
    setup = finetune.set_up(config)
    objective, batch = setup.objective, setup.batches.training(0)
    fresh = objective.init(jax.random.key(0))
    own = {name: setup.weights[1].get(name, part) for name, part in fresh.items()}
    loss = jax.jit(lambda p, b, f=objective.loss: f(p, b, None)[0])
    losses.append(loss(own | (objective.frozen or {}), batch))
  assert losses[0].keys() == losses[1].keys() and 'lora' in own
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *losses)


@pytest.mark.full
def test_trials_with_adapters_equal_single_runs(config, tmp_path):
  config.num_train_epochs, config.data.buckets, config.num_seeds = 2.0, '', 2
  finetune.run(config, workdir=str(tmp_path / 'trials'))
  table = json.loads((tmp_path / 'trials' / 'trials.json').read_text())
  config.num_seeds, config.seed = 1, 1
  finetune.run(config, workdir=str(tmp_path / 'single'))
  found = [r['accuracy'] for r in read_metrics(tmp_path / 'single') if r['kind'] == 'eval']
  np.testing.assert_allclose(found, table['trials'][1]['values'], atol=0.04)


@pytest.mark.full
def test_pre_training_continues_with_adapters(model, tiny_rows, tmp_path, capsys):  # noqa: F811
  config = load_recipe('bert_mini:smoke')
  config.init_from, config.data.prepared = str(model), str(tiny_rows)
  encoder = loading.load_weights(model)[0]
  config.model.update({n: getattr(encoder, n) for n in ('max_positions', 'num_layers', 'mlp_size')})
  config.lora.rank, config.lora.modules_to_save, config.learning_rate = 4, 'mlm', 1e-2
  scores = pretrain.run(config, workdir=str(tmp_path / 'run'))
  _, before = loading.load_weights(model)
  _, after = loading.load_weights(tmp_path / 'run')
  same = jax.tree.map(np.array_equal, before, after)
  assert not same['encoder']['layers']['attention']['qkv']['kernel']
  assert same['encoder']['layers']['mlp']['in']['kernel'] and not same['mlm']['bias']
  assert all(jax.tree.leaves(same['encoder']['embeddings']))
  capsys.readouterr()
  assert main(['evaluate', f'--workdir={tmp_path}/run', '--checkpoint=newest']) == 0
  assert json.loads(capsys.readouterr().out)['loss'] == pytest.approx(scores['loss'], abs=1e-5)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'lora.targets': 'gate'}, "lora.targets='gate' matches no matrix of the model; it has enc"),
    ({'lora.targets': 'encoder/layers/7/.*'}, 'matches no matrix of the model'),
    ({'lora.targets': '(query'}, r"lora.targets='\(query' is neither a name nor a pattern"),
    ({'lora.rank': 33}, 'lora.rank=33 is larger than the shorter side of encoder.*, 32'),
    ({'lora.rank': -1}, 'lora.rank must be at least 0, got -1'),
    ({'lora.alpha': 0.0}, 'lora.alpha must be above 0, got 0.0'),
    ({'lora.save': 'both'}, "lora.save must be 'merged' or 'peft', got 'both'"),
    ({'lora.rank': 0, 'lora.alpha': 8.0}, 'lora.alpha=8.0 is for adapters; set lora.rank'),
    ({'lora.modules_to_save': 'mlm'}, "lora.modules_to_save='mlm' is no head of the model; choose"),
    ({'num_trainable_layers': 0}, 'num_trainable_layers=0 freezes the adapters of lora.rank=4 too'),
    (
      {'reinit_top_layers': 1},
      'reinit_top_layers=1 and lora.rank=4 do not fit: layers that are new',
    ),
    ({'init_layers': '0'}, 'init_layers=0 and lora.rank=4 do not fit: the layers that remain must'),
    ({'init_from': '/nowhere'}, 'no folder /nowhere'),
  ],
)
def test_settings_that_do_not_fit_get_one_sentence(fields, words, config):
  config.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=words) as raised:
    finetune.set_up(config)
  assert '\n' not in str(raised.value)
