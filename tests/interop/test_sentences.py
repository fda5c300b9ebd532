"""sentence-transformers' folders: what follows the encoder is applied as there, or refused."""

import json
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest

from bertjax.__main__ import main
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.predictor import Predictor
from bertjax.inference.runner import TextError
from bertjax.interop import mapping
from bertjax.interop.huggingface import save_hf
from bertjax.model.config import EncoderConfig

TEXTS = ['Return the value.', 'A file, or a list of files; none is read twice.', 'x']
TRANSFORMER = {'type': 'sentence_transformers.models.Transformer', 'path': ''}
POOLING = {'type': 'sentence_transformers.models.Pooling', 'path': '1_Pooling'}
DENSE = {'type': 'sentence_transformers.models.Dense', 'path': '2_Dense'}
NORMALIZE = {'type': 'sentence_transformers.models.Normalize', 'path': '3_Normalize'}
CLS = {'word_embedding_dimension': 16, 'pooling_mode_cls_token': True,
       'pooling_mode_mean_tokens': False}  # fmt: skip
LAST = {'word_embedding_dimension': 16, 'pooling_mode_lasttoken': True}
TANH = {'in_features': 16, 'out_features': 6, 'bias': True,
        'activation_function': 'torch.nn.modules.activation.Tanh'}  # fmt: skip
LINEAR = TANH | {'bias': False, 'activation_function': 'torch.nn.modules.linear.Identity'}


@pytest.fixture(scope='module')
def encoder(tmp_path_factory, vocab):
  """A model directory of a bare encoder."""
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(tokenizer.vocab_size, 16, 2, 2, 24, 40)
  rng = np.random.default_rng(0)
  flat = {
    path: rng.normal(0, 0.3, shape).astype(np.float32)
    for path, shape in mapping.shapes(config, (), True).items()
  }
  folder = tmp_path_factory.mktemp('encoder') / 'model'
  save_hf(folder, config, flax.traverse_util.unflatten_dict(flat, sep='/'), tokenizer)
  return folder


def make(encoder, folder, modules, pooling=None, dense=None, length=None, inner=''):
  """A folder as sentence-transformers writes it."""
  from safetensors.numpy import save_file

  shutil.copytree(encoder, folder / inner)
  (folder / 'modules.json').write_text(
    json.dumps([module | {'idx': i, 'name': str(i)} for i, module in enumerate(modules)])
  )
  for path in ('1_Pooling', '2_Dense', '3_Normalize'):
    (folder / path).mkdir()
  pooling = pooling or {'word_embedding_dimension': 16, 'pooling_mode_mean_tokens': True}
  (folder / '1_Pooling' / 'config.json').write_text(json.dumps(pooling))
  if dense:
    (folder / '2_Dense' / 'config.json').write_text(json.dumps(dense))
    rng = np.random.default_rng(1)
    tensors = {'linear.weight': rng.normal(0, 1, (6, 16)).astype(np.float32)}
    if dense['bias']:
      tensors['linear.bias'] = rng.normal(0, 1, 6).astype(np.float32)
    save_file(tensors, folder / '2_Dense' / 'model.safetensors')
  if length:
    settings = {'max_seq_length': length, 'do_lower_case': False}
    (folder / inner / 'sentence_bert_config.json').write_text(json.dumps(settings))
  return folder


VARIANTS = {
  'mean': ([TRANSFORMER, POOLING], {}),
  'mean and Normalize': ([TRANSFORMER, POOLING, NORMALIZE], {}),
  'cls': ([TRANSFORMER, POOLING], {'pooling': CLS}),
  'cls by its name of today': (
    [TRANSFORMER, POOLING], {'pooling': {'embedding_dimension': 16, 'pooling_mode': 'cls'}}
  ),
  'last token': ([TRANSFORMER, POOLING], {'pooling': LAST}),
  'Dense with tanh': ([TRANSFORMER, POOLING, DENSE], {'dense': TANH}),
  'Dense without bias, and Normalize': (
    [TRANSFORMER, POOLING, DENSE, NORMALIZE], {'dense': LINEAR, 'pooling': CLS}
  ),
  'Normalize before Dense': ([TRANSFORMER, POOLING, NORMALIZE, DENSE], {'dense': TANH}),
  'the encoder in a separate folder': (
    [TRANSFORMER | {'path': '0_Transformer'}, POOLING], {'inner': '0_Transformer', 'pooling': CLS}
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.e2e
def test_embeddings_equal_sentence_transformers_for_every_layer(encoder, tmp_path, name):
  library = pytest.importorskip('sentence_transformers')
  modules, options = VARIANTS[name]
  folder = make(encoder, tmp_path / 'model', modules, length=30, **options)
  expected = library.SentenceTransformer(str(folder), device='cpu').encode(TEXTS)
  np.testing.assert_allclose(Predictor.from_dir(folder).embed(TEXTS), expected, atol=2e-5)


def test_a_pooling_or_scaling_that_is_named_goes_before_the_files(encoder, tmp_path):
  plain = Predictor.from_dir(encoder)
  folder = make(encoder, tmp_path / 'model', [TRANSFORMER, POOLING, DENSE], CLS, TANH)
  model = Predictor.from_dir(folder)
  np.testing.assert_array_equal(model.embed(TEXTS, 'mean'), plain.embed(TEXTS))
  assert model.embed(TEXTS).shape == (3, 6)
  unit = model.embed(TEXTS, normalise=True)
  np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
  assert [hits[0].number for hits in model.nearest(TEXTS, corpus=TEXTS)] == [0, 1, 2]


def test_texts_beyond_max_seq_length_are_refused_or_read_in_parts(encoder, tmp_path):
  folder = make(encoder, tmp_path / 'model', [TRANSFORMER, POOLING], length=8)
  text = 'a ' * 10
  with pytest.raises(TextError, match=r'12 tokens .* at most 8'):
    Predictor.from_dir(folder).embed(text)
  found = Predictor.from_dir(folder, long='window').embed(text)
  halves = Predictor.from_dir(folder).embed('a ' * 5)
  np.testing.assert_allclose(found, halves, atol=1e-5)
  assert Predictor.from_dir(folder).embed(text, 'mean').shape == (16,)


@pytest.mark.parametrize(
  ('modules', 'options', 'message'),
  [
    ([TRANSFORMER, POOLING], {'pooling': {'pooling_mode': 'max'}}, 'the pooling max is not'),
    ([TRANSFORMER, POOLING], {'pooling': CLS | {'pooling_mode_mean_tokens': True}},
     'the pooling cls_token and mean_tokens is not'),
    ([TRANSFORMER, POOLING, DENSE],
     {'dense': TANH | {'activation_function': 'torch.nn.modules.activation.ReLU'}}, 'ReLU'),
    ([TRANSFORMER, {'type': 'sentence_transformers.models.LSTM', 'path': ''}, POOLING], {},
     'the module LSTM'),
    ([TRANSFORMER], {}, 'no Pooling module'),
    ([{'type': 'sentence_transformers.models.CLIPModel', 'path': ''}], {}, 'first module is CLIP'),
  ],
)  # fmt: skip
def test_a_layer_that_is_not_supported_is_refused_where_it_is_needed(
  encoder, tmp_path, modules, options, message
):
  folder = make(encoder, tmp_path / 'model', modules, **options)
  predictor = Predictor.from_dir(folder)
  with pytest.raises(ValueError, match=message):
    predictor.embed(TEXTS)
  assert predictor.embed(TEXTS, 'mean').shape == (3, 16)


def test_the_default_prompt_is_put_in_front_of_every_text(encoder, tmp_path, capsys):
  folder = make(encoder, tmp_path / 'model', [TRANSFORMER, POOLING])
  path, plain = folder / 'config_sentence_transformers.json', Predictor.from_dir(folder)
  expected = plain.embed([f'query: {text}' for text in TEXTS])
  for default in ('query', None):
    settings = {'prompts': {'query': 'query: ', 'document': ''}, 'default_prompt_name': default}
    path.write_text(json.dumps(settings))
    predictor = Predictor.from_dir(folder)
    np.testing.assert_array_equal(predictor.embed(TEXTS, prompt='query'), expected)
    found = predictor.embed(TEXTS)
    np.testing.assert_array_equal(found, expected if default else plain.embed(TEXTS))
    if default:
      arguments = ['export', f'--model={folder}', f'--out={tmp_path}/a', '--format=stablehlo']
      assert main(arguments) == 2 and 'the default prompt' in capsys.readouterr().err
  path.write_text(json.dumps({'prompts': {}, 'default_prompt_name': 'query'}))
  with pytest.raises(ValueError, match=r"has no prompt 'query', its default; it has \[\]"):
    Predictor.from_dir(folder).embed(TEXTS)
  path.write_text(json.dumps({'prompts': {'query': 'query: '}}))
  pooling = folder / '1_Pooling' / 'config.json'
  pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {'include_prompt': False}))
  with pytest.raises(ValueError, match='include_prompt=false'):
    Predictor.from_dir(folder).embed(TEXTS)


def test_lower_casing_that_changes_the_text_is_refused(encoder, tmp_path):
  folder = make(encoder, tmp_path / 'model', [TRANSFORMER, POOLING])
  (folder / 'sentence_bert_config.json').write_text('{"do_lower_case": true}')
  Predictor.from_dir(folder).embed(TEXTS)  # the tokenizer lowers anyway
  settings = json.loads((folder / 'tokenizer_config.json').read_text()) | {'do_lower_case': False}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  with pytest.raises(ValueError, match='do_lower_case=true with a cased tokenizer'):
    Predictor.from_dir(folder).embed(TEXTS)


@pytest.mark.e2e
def test_export_takes_the_models_pooling_and_refuses_dense_layers(encoder, tmp_path, capsys):
  folder = make(encoder, tmp_path / 'model', [TRANSFORMER, POOLING, DENSE], CLS, TANH)
  assert main(['export', f'--model={folder}', f'--out={tmp_path}/a', '--format=stablehlo']) == 2
  assert 'dense layers after its pooling' in capsys.readouterr().err
  shutil.copy(folder / '1_Pooling' / 'config.json', tmp_path)
  cls = make(encoder, tmp_path / 'cls', [TRANSFORMER, POOLING], CLS, length=8)
  assert main(['export', f'--model={cls}', f'--out={tmp_path}/b', '--format=stablehlo']) == 0
  signature = json.loads((tmp_path / 'b' / 'signature.json').read_text())
  assert (signature['output'], signature['max_length']) == ('cls', 8)
  program = jax.export.deserialize((tmp_path / 'b' / 'model.stablehlo').read_bytes())
  predictor, texts = Predictor.from_dir(cls), ['the name', 'a']
  batch = predictor.tokenizer(texts)
  found = program.call(*(batch[name] for name in signature['inputs']))
  np.testing.assert_allclose(found['embedding'], predictor.embed(texts, normalise=True), atol=1e-5)
  arrays = [np.ones((2, 9), np.int32)] * 3
  assert program.call(*(a[:, :8] for a in arrays))['embedding'].shape == (2, 16)
  with pytest.raises(ValueError, match='shapes'):
    program.call(*arrays)


def test_convert_warns_that_layers_after_the_encoder_are_left_behind(encoder, tmp_path, caplog):
  folder = make(encoder, tmp_path / 'model', [TRANSFORMER, POOLING], CLS)
  for source, warned in ((encoder, False), (folder, True)):
    assert main(['convert', f'--from={source}', f'--out={tmp_path}/to{warned}']) == 0
    assert ('sentence-transformers (modules.json) are not converted' in caplog.text) == warned
