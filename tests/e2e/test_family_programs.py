"""Every program on a tiny model of every family, each with a tokenizer of its kind.

They take minutes and run with --slow. Recipes and fine-tuning by the command are in
test_families.py; outputs and gradients in tests/interop.
"""

import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest

from bertjax import build, explain, export, finetune, predict, pretrain
from bertjax.config import load_recipe
from bertjax.data.sentencepiece import train_sentencepiece
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.predictor import Predictor
from bertjax.interop import families, loading
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import init_params
from bertjax.training import loop
from bertjax.training.metrics import read_metrics
from tests import test_finetune
from tests.data import test_tokenizer_json
from tests.e2e.test_ways import make_sums
from tests.interop import test_neobert
from tests.interop.test_families import TINY, class_of

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')

TOKENIZERS = {'Roberta': 'roberta', 'Albert': 'sentencepiece', 'DistilBert': 'wordpiece',
              'Electra': 'wordpiece', 'MPNet': 'roberta', 'ModernBert': 'modern',
              'EuroBert': 'modern', 'NeoBERT': 'wordpiece'}  # fmt: skip
TASKS = {'sst2': 'glue', 'stsb': 'glue', 'conll2003': 'tagging', 'squad1': 'squad',
         'codah': 'choice'}  # fmt: skip


class Start(NamedTuple):
  """A random model that transformers, or the authors' code, wrote."""

  family: families.Family
  folder: pathlib.Path
  config: EncoderConfig


def make_tokenizer(kind: str, folder, documents, vocab) -> Tokenizer:
  if kind == 'wordpiece':
    return Tokenizer.from_file(vocab)
  if kind == 'sentencepiece':
    return Tokenizer(train_sentencepiece(documents, 600))
  lines = [line for text in documents for line in text.split('\n')]
  test_tokenizer_json.train(kind, lines).save(str(folder / 'tokenizer.json'))
  config = test_tokenizer_json.CONFIG.get(kind, test_tokenizer_json.BERT_CONFIG)
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return Tokenizer.from_dir(folder)


@pytest.fixture(
  scope='module', params=[pytest.param(n, marks=pytest.mark.slow) for n in TOKENIZERS]
)
def start(request, documents, vocab, tmp_path_factory) -> Start:
  name, folder = request.param, tmp_path_factory.mktemp('family') / request.param
  tokenizer = make_tokenizer(TOKENIZERS[name], tmp_path_factory.mktemp('t'), documents, vocab)
  family = next(family for family in families.FAMILIES if family.name == name)
  if name == 'NeoBERT':
    test_neobert.write(folder, test_neobert.tensors(words=tokenizer.vocab_size))
    content = test_neobert.CONTENT | {'vocab_size': tokenizer.vocab_size, 'max_length': 130}
    (folder / 'config.json').write_text(json.dumps(content))
  else:
    sizes = TINY[name][0] | {'max_position_embeddings': 132, 'vocab_size': tokenizer.vocab_size}
    if name == 'ModernBert':
      sizes['num_hidden_layers'] = 4
    torch.manual_seed(0)
    config = getattr(transformers, f'{name}Config')(**sizes | {'pad_token_id': tokenizer.pad_id})
    heads = ('mlm', 'nsp') if name == 'Albert' else ('mlm',)
    class_of(name, heads)(config).save_pretrained(folder)
  tokenizer.save(folder)
  return Start(family, folder, loading.load_weights(folder)[0])


@pytest.fixture
def pretraining(start, corpus):
  """The config of a run of four steps on 8 devices, from new weights."""
  config = load_recipe('bert_mini:smoke')
  config.model.update({k: v for k, v in dataclasses.asdict(start.config).items()
                       if k in config.model})  # fmt: skip
  config.nsp = start.family.name == 'Albert'
  config.data.input, config.data.vocab = str(corpus), str(start.folder)
  config.data.lowercase = loading.load_tokenizer(start.folder).lowercase
  config.data.kind = 'sop' if config.nsp else ''
  config.batch_size, config.num_train_steps, config.save_every, config.log_every = 8, 4, 2, 1
  config.schedule, config.warmup_steps, config.learning_rate = 'constant', 0, 1e-3
  config.eval_every = 0
  return config


def losses(workdir):
  return [row['loss'] for row in read_metrics(workdir) if row['kind'] == 'train']


def weights(workdir):
  return (workdir / 'model' / 'model.safetensors').read_bytes()


def cut_after(monkeypatch, steps: int):
  """Interrupts the next run after some steps."""
  real = loop.fit

  def fit(state, *args, **kwargs):
    monkeypatch.setattr(loop, 'fit', real)
    real(state, *args, **kwargs | {'steps': steps})
    raise KeyboardInterrupt

  monkeypatch.setattr(loop, 'fit', fit)


def test_pre_training_is_the_same_on_any_mesh_resumes_bitwise_and_continues(
  pretraining, tmp_path, monkeypatch
):
  monkeypatch.setenv('BERTJAX_CACHE', str(tmp_path / 'cache'))
  run = lambda name: pretrain.run(pretraining, workdir=str(tmp_path / name))  # noqa: E731
  one_device = functools.partial(build.make_layout, devices=jax.devices()[:1])
  with monkeypatch.context() as patch:
    patch.setattr(build, 'make_layout', one_device)
    run('one')
  pretraining.mesh.data, pretraining.mesh.fsdp, pretraining.mesh.tensor = 2, 2, 2
  run('many')
  found = losses(tmp_path / 'many')
  assert len(found) == 4
  np.testing.assert_allclose(found, losses(tmp_path / 'one'), rtol=1e-4)
  cut_after(monkeypatch, 2)
  with pytest.raises(KeyboardInterrupt):
    run('cut')
  run('cut')
  assert losses(tmp_path / 'cut') == found
  assert weights(tmp_path / 'cut') == weights(tmp_path / 'many')
  pretraining.init_from, pretraining.learning_rate = str(tmp_path / 'many'), 1e-30
  run('continued')
  assert weights(tmp_path / 'continued') == weights(tmp_path / 'many')


@pytest.mark.parametrize('task', TASKS)
def test_a_task_has_the_same_loss_and_gradient_packed_and_in_buckets(start, task, tmp_path):
  config = task_config(start, task, tmp_path)
  head = build.make_task(config).head
  single = finetune.set_up(config)
  config.data.packed_length = 0 if head == 'choice' else 128
  config.data.buckets = '' if config.data.packed_length else '12,20'
  packed = finetune.set_up(config)
  params = finetune.load(single, lambda: init_params(single.model, jax.random.key(0)))
  sums = make_sums(single.objective)
  batch, other = packed.batches.training(0), single.batches.training(0)
  assert batch['input_ids'].size != other['input_ids'].size
  one, two = sums(params, batch), sums(params, other)
  floor = 3e-5 * max(np.abs(x).max() for x in jax.tree.leaves(two['gradient']))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=floor)


def task_config(start, task, tmp_path):
  source = tmp_path / task
  source.mkdir()
  getattr(test_finetune, f'write_{task}')(source)
  config = load_recipe(f'{TASKS[task]}:{task}')
  config.init_from, config.data.source = str(start.folder), str(source)
  config.data.length = 96 if task == 'squad1' else 48
  config.data.loader, config.data.packed_length = 'threads', 0
  config.batch_size, config.num_train_epochs, config.learning_rate = 16, 1.0, 2e-3
  return config


def test_trials_give_a_model_that_predicts_is_explained_served_and_exported(start, tmp_path):
  config = task_config(start, 'sst2', tmp_path)
  config.num_seeds, config.learning_rates = 2, '2e-3,1e-3'
  finetune.run(config, workdir=str(tmp_path / 'run'))
  table = json.loads((tmp_path / 'run' / 'trials.json').read_text())
  assert len(table['trials']) == 4
  folder, texts = tmp_path / 'run' / 'model', ['the value returns', 'an error raises']
  predictor = Predictor.from_dir(folder)
  expected = [item.scores for item in predictor.classify(texts)]
  (tmp_path / 'in.txt').write_text('\n'.join(texts))
  predict.run(model=str(folder), input=str(tmp_path / 'in.txt'), out=str(tmp_path / 'out.jsonl'))
  for line, scores in zip((tmp_path / 'out.jsonl').read_text().splitlines(), expected, strict=True):
    assert json.loads(line)['result']['scores'] == pytest.approx(scores, abs=1e-5)
  explain.run(model=str(folder), text=texts[0], out=str(tmp_path / 'page.html'))
  assert 'returns' in (tmp_path / 'page.html').read_text()
  check_served(predictor, texts, expected)
  check_exported(folder, predictor, texts, expected, tmp_path)


def check_served(predictor, texts, expected):
  from tests.test_serve import ask, serving

  with serving(predictor, timeout=60) as client:
    found = ask(client, 'classify', *texts).json()['results']
    for item, scores in zip(found, expected, strict=True):
      assert item['scores'] == pytest.approx(scores, abs=1e-5)
    vectors = client.post('/embed', json={'inputs': texts}).json()['embeddings']
    np.testing.assert_allclose(vectors, predictor.embed(texts), atol=1e-5)


def check_exported(folder, predictor, texts, expected, tmp_path):
  """The exported programs have the predictor's probabilities."""
  probs = [list(scores.values()) for scores in expected]
  export.run(model=str(folder), out=str(tmp_path / 'hlo'), format='stablehlo')
  call = jax.export.deserialize((tmp_path / 'hlo' / 'model.stablehlo').read_bytes()).call
  batch = predictor.tokenizer(texts)
  names = json.loads((tmp_path / 'hlo' / 'signature.json').read_text())['inputs']
  found = call(*(batch[name] for name in names))
  np.testing.assert_allclose(found['probabilities'], probs, atol=1e-5)
  tf = pytest.importorskip('tensorflow')
  if predictor.tokenizer.kind == 'bpe':
    with pytest.raises(ValueError, match=r'the rules of a tokenizer.json .* --format=stablehlo'):
      export.run(model=str(folder), out=str(tmp_path / 'tf'))
    return
  export.run(model=str(folder), out=str(tmp_path / 'tf'))
  module = tf.saved_model.load(str(tmp_path / 'tf'))
  found = module.signatures['serving_default'](text=tf.constant(texts))
  np.testing.assert_allclose(found['probabilities'], probs, atol=1e-5)
