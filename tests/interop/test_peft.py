"""Folders of PEFT: written, peft returns our logits; written by peft, we return its logits."""

import json
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bertjax import adapters as adapters_lib
from bertjax.__main__ import main
from bertjax.interop import loading, mapping, peft
from bertjax.model.heads import Bert
from bertjax.model.lora import Adapters
from tests.interop.test_families import BERT_LIKE, LABELS, TINY, V, batch_of, class_of, vocabulary
from tests.interop.test_neobert import tensors as neobert_tensors
from tests.interop.test_neobert import write as write_neobert

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')

FAMILIES = {'Bert': (BERT_LIKE | {'pad_token_id': 0}, ())} | TINY
ALL = r'encoder/layers/.*'


def base_model(name, folder):
  """Writes a random encoder as transformers does."""
  config = getattr(transformers, f'{name}Config')(vocab_size=V, **FAMILIES[name][0])
  torch.manual_seed(0)
  model = class_of(name, ())(config)
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.15)
  model.save_pretrained(folder)
  return folder


def random_lora(base, heads, targets, rank=3):
  """(adapters with arrays, their parameters, the model, all of its parameters) over a folder."""
  config, params = loading.load_weights(base)
  pooler = bool({*heads} & {*config.pooled_heads})
  bert = Bert(config, heads=heads, pooler=pooler, num_labels=LABELS)
  fresh = bert.init(jax.random.key(1), {'input_ids': np.ones((1, 4), int)})['params']
  frozen = {name: params[name] for name in ('encoder', *(['pooler'] if pooler else []))}
  matrices = adapters_lib.select(config, pooler, targets, rank)
  adapters = Adapters(matrices, rank, 5.0 / rank)
  keys = iter(jax.random.split(jax.random.key(2), 99))
  draw = lambda x: np.asarray(0.2 * jax.random.normal(next(keys), x.shape))  # noqa: E731
  trained = jax.tree.map(draw, {head: fresh[head] for head in heads})
  lora = jax.tree.map(draw, adapters.init(jax.random.key(0)))
  full = jax.device_get(adapters.complete({'lora': lora, 'base': frozen} | trained))
  return lora, trained, bert, full


def save(folder, base, lora, trained, bert, **about):
  settings = peft.Settings(3, 5.0, base=str(base))
  tokenizer = vocabulary(bert.config.position_offset - 1 if bert.config.position_offset else 0)
  peft.save(
    folder, settings, bert.config, lora, trained, tokenizer, pooler=bert.pooler, **about
  )  # fmt: skip


def logits_of(model, config, batch):
  """Logits of transformers' model for one of our batches."""
  named = {'input_ids': batch['input_ids'], 'attention_mask': batch['segment_ids']}
  if config.type_vocab_size > 1:
    named['token_type_ids'] = batch['token_type_ids']
  inputs = {name: torch.tensor(x.astype(np.int64)) for name, x in named.items()}
  with torch.no_grad():
    return model.eval()(**inputs).logits.numpy()


def batch_for(config):
  batch = batch_of(config.position_offset - 1 if config.position_offset else 0)
  return {name: batch[name] for name in ('input_ids', 'token_type_ids', 'segment_ids')}


@pytest.mark.full
@pytest.mark.parametrize('targets', [ALL, 'query,value'])
@pytest.mark.parametrize('name', FAMILIES)
def test_a_folder_of_adapters_is_loaded_by_peft_with_the_same_logits(name, targets, tmp_path):
  theirs = pytest.importorskip('peft')
  base = base_model(name, tmp_path / 'base')
  lora, trained, bert, full = random_lora(base, ('classification',), targets)
  save(tmp_path / 'adapters', base, lora, trained, bert, labels=('a', 'b', 'c'))
  batch = batch_for(bert.config)
  ours = np.asarray(bert.apply({'params': full}, batch)['classification_logits'])
  model = class_of(name, ('classification',)).from_pretrained(base, num_labels=LABELS)
  loaded = theirs.PeftModel.from_pretrained(model, tmp_path / 'adapters')
  np.testing.assert_allclose(logits_of(loaded, bert.config, batch), ours, rtol=0, atol=1e-5)
  count = sum('lora_' in path for path, _ in loaded.named_parameters())
  assert count == len(load_file(tmp_path / 'adapters' / 'adapter_model.safetensors')) - sum(
    'modules_to_save' in path for path, _ in loaded.named_parameters()
  )


@pytest.mark.parametrize(
  'name', [*(pytest.param(name, marks=pytest.mark.full) for name in FAMILIES), 'NeoBERT']
)
def test_a_folder_of_adapters_is_read_as_the_merged_model(name, tmp_path):
  if name == 'NeoBERT':  # its queries, keys and values are interleaved
    base = tmp_path / 'base'
    write_neobert(base, neobert_tensors())
  else:
    base = base_model(name, tmp_path / 'base')
  lora, trained, bert, full = random_lora(base, ('classification',), ALL)
  save(tmp_path / 'adapters', base, lora, trained, bert, labels=('a', 'b', 'c'))
  model, params, _ = loading.load_model(tmp_path / 'adapters')
  assert model.heads == ('classification',) and model.num_labels == LABELS
  assert loading.read_labels(tmp_path / 'adapters')[0] == ['a', 'b', 'c']
  wanted = flax.traverse_util.flatten_dict(full)
  found = flax.traverse_util.flatten_dict(params)
  assert wanted.keys() <= found.keys()  # and the base model's pooler
  for path, array in wanted.items():
    np.testing.assert_allclose(found[path], array, rtol=0, atol=1e-6)
  save(tmp_path / 'adapters', 'owner/name@v1', lora, trained, bert)
  settings, content = peft.read_settings(tmp_path / 'adapters')
  assert content['base_model_name_or_path'] == 'owner/name' and content['revision'] == 'v1'
  assert settings.base == 'owner/name@v1'


@pytest.mark.full
@pytest.mark.parametrize(
  ('name', 'rslora'), [*((name, False) for name in FAMILIES), ('Bert', True)]
)
def test_adapters_that_peft_wrote_are_merged_with_the_same_logits(name, rslora, tmp_path):
  theirs = pytest.importorskip('peft')
  base = base_model(name, tmp_path / 'base')
  config, _ = loading.load_weights(base)
  modules = {module.rpartition('.')[2] for _, module in mapping.matrices(config, False).values()}
  # peft saves `classifier` without being asked, and not what these have below it.
  also = {'ModernBert': ['head'], 'EuroBert': ['dense']}.get(name)
  settings = theirs.LoraConfig(
    modules_to_save=also, task_type='SEQ_CLS', r=2, lora_alpha=7, target_modules=sorted(modules),
    use_rslora=rslora, lora_dropout=0.1, init_lora_weights=False,
  )  # fmt: skip
  torch.manual_seed(1)
  model = class_of(name, ('classification',)).from_pretrained(base, num_labels=LABELS)
  model = theirs.get_peft_model(model, settings)
  model.save_pretrained(tmp_path / 'adapters')
  assert json.loads((tmp_path / 'adapters' / peft.CONFIG).read_text())[
    'base_model_name_or_path'
  ] == str(base)
  config, params = loading.load_weights(tmp_path / 'adapters')
  batch = batch_for(config)
  bert = Bert(config, ('classification',), 'classification' in config.pooled_heads, LABELS)
  ours = np.asarray(bert.apply({'params': params}, batch)['classification_logits'])
  np.testing.assert_allclose(logits_of(model, config, batch), ours, rtol=0, atol=1e-5)


@pytest.mark.full
def test_a_classifier_of_modernbert_on_its_masked_lm_s_dense_layer_is_read_with_it(tmp_path):
  theirs = pytest.importorskip('peft')
  torch.manual_seed(0)
  config = transformers.ModernBertConfig(vocab_size=V, **FAMILIES['ModernBert'][0])
  transformers.ModernBertForMaskedLM(config).save_pretrained(tmp_path / 'base')
  start = transformers.ModernBertForSequenceClassification.from_pretrained
  model = theirs.get_peft_model(start(tmp_path / 'base', num_labels=LABELS), theirs.LoraConfig(
    task_type='SEQ_CLS', r=2, target_modules=['Wqkv'], init_lora_weights=False
  ))  # fmt: skip
  model.save_pretrained(tmp_path / 'adapters')
  config, params = loading.load_weights(tmp_path / 'adapters')
  assert set(params) == {'encoder', 'classification'}
  batch = batch_for(config)
  bert = Bert(config, ('classification',), False, LABELS)
  ours = np.asarray(bert.apply({'params': params}, batch)['classification_logits'])
  np.testing.assert_allclose(logits_of(model, config, batch), ours, rtol=0, atol=1e-5)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A folder of adapters, with its base model beside."""
  root = tmp_path_factory.mktemp('peft')
  base = base_model('Bert', root / 'base')
  lora, trained, bert, _ = random_lora(base, ('classification',), 'query,value')
  save(root / 'adapters', base, lora, trained, bert, labels=('a', 'b', 'c'))
  return root


@pytest.fixture
def folder(written, tmp_path):
  """A copy of it, to change."""
  return shutil.copytree(written / 'adapters', tmp_path / 'adapters')


def change_tensors(folder, change):
  path = folder / 'adapter_model.safetensors'
  save_file(change(load_file(path)), path)


def refused(folder, words):
  with pytest.raises(ValueError, match=words) as raised:
    loading.load_model(folder)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'use_dora': True}, 'use_dora=True is not supported; merge the model with peft'),
    ({'bias': 'all'}, "bias='all' is not supported"),
    ({'fan_in_fan_out': True}, 'fan_in_fan_out=True is not supported'),
    ({'rank_pattern': {'query': 4}}, r"rank_pattern=\{'query': 4\} is not supported"),
    ({'init_lora_weights': 'pissa'}, "init_lora_weights='pissa' is not supported"),
    ({'peft_type': 'IA3'}, "peft_type='IA3' is not supported; adapters are read from LORA"),
    ({'r': 0}, 'r=0 must be a rank'),
    ({'r': 2}, r'has the shapes .* rank 2 of the base model needs'),
    (
      {'base_model_name_or_path': '/nowhere'},
      "base model '/nowhere' cannot be read .*--base=MODEL",
    ),
    ({'base_model_name_or_path': None}, 'names no base model; name it: bertjax convert'),
  ],
)
def test_adapters_that_we_do_not_have_are_refused_by_name(changes, words, folder):
  content = json.loads((folder / peft.CONFIG).read_text())
  (folder / peft.CONFIG).write_text(json.dumps(content | changes))
  refused(folder, words)


def test_adapters_that_do_not_fit_the_base_model_are_refused(folder, written, tmp_path):
  name = 'base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight'
  change_tensors(folder, lambda x: {n.replace('layer.2.', 'layer.9.'): t for n, t in x.items()})
  refused(folder, r'adapter of bert.encoder.layer.9.attention.self.\w+, and the base model has no')
  shutil.copytree(written / 'adapters', folder, dirs_exist_ok=True)
  change_tensors(folder, lambda x: x | {name: x[name][:, :40].copy()})
  refused(
    folder, r'self.query has the shapes \(\(3, 40\), \(48, 3\)\), and rank 3 of the base model'
  )
  shutil.copytree(written / 'adapters', folder, dirs_exist_ok=True)
  change_tensors(folder, lambda x: {n: t for n, t in x.items() if n != name})
  refused(folder, 'only one of the two matrices of bert.encoder.layer.0.attention.self.query')
  lost = {
    'base_model.model.bert.embeddings.word_embeddings.lora_embedding_A': np.ones((3, 4), 'f4')
  }
  change_tensors(folder, lambda x: x | lost)
  refused(folder, 'lora_embedding_A is not supported; adapters are read of linear layers only')
  with pytest.raises(ValueError, match='is a complete model, not adapters of the base model'):
    loading.load_model(written / 'base', base='x')


def test_convert_merges_adapters_with_a_base_model_that_has_moved(folder, written, tmp_path):
  shutil.copytree(written / 'base', tmp_path / 'moved')
  content = json.loads((folder / peft.CONFIG).read_text())
  (folder / peft.CONFIG).write_text(json.dumps(content | {'base_model_name_or_path': 'gone/away'}))
  out = tmp_path / 'out'
  flags = [f'--from={folder}', f'--base={tmp_path / "moved"}', f'--out={out}']
  assert main(['convert', *flags]) == 0
  _, merged = loading.load_weights(out)
  jax.tree.map(np.testing.assert_array_equal, merged, loading.load_weights(written / 'adapters')[1])
  model = transformers.BertForSequenceClassification.from_pretrained(out)
  assert model.config.id2label == {0: 'a', 1: 'b', 2: 'c'}
