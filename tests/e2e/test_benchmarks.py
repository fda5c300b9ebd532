"""The benchmarks run, at sizes that say nothing about speed (figures: docs/benchmarks.md)."""

import importlib.util
import json
import math
import random

import jax
import pytest

from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.predictor import Predictor
from bertjax.training import hardware
from tests.models import model as tiny_model
from tests.test_finetune import make, model  # noqa: F401 (fixtures)

pytest.importorskip('torch')
pytest.importorskip('transformers')

TINY = {'preset': 'tiny', 'rows': 8, 'steps': 1, 'repeats': 1, 'out': ''}


def defaults(module, **changes):
  """The values of a benchmark's flags."""
  return {name: default for name, (default, _) in module.FLAGS.items()} | changes


def test_pre_training_steps():
  from benchmarks import train_step

  found = train_step.run(**defaults(train_step, **TINY, length=32, predictions=4, compiled=0))
  assert [row['name'] for row in found['rows']] == ['bertjax', 'transformers, eager']
  assert found['ratio_at_equal_flops'] > 0 and found['product_flops_per_second'] > 0
  assert {'command', 'date', 'machine', 'versions'} <= set(found)


@pytest.mark.parametrize('trained', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_waits_for_a_gpu(trained, tiny_rows, tmp_path, monkeypatch):
  """The script for a GPU, on what there is; the sheet of a card gives its MFU."""
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  from benchmarks import gpu

  monkeypatch.setitem(hardware.CHIPS, jax.devices()[0].device_kind, hardware.CHIPS['H200'])
  sizes = {'sizes': 'tiny:32', 'tokens': '128', 'bits': 'rbg', 'dropouts': '0.1', 'steps': 1,
           'repeats': 2}  # fmt: skip
  rows = str(tiny_rows) if trained else ''
  own = {'prepared': rows, 'workdir': str(tmp_path / 'run'), 'minutes': 0.02,
         'recipe': 'bert_mini:smoke', 'batch_size': 32}  # fmt: skip
  out = tmp_path / 'gpu.json'
  gpu.run(**defaults(gpu, **sizes, **own, out=str(out)))
  found = json.loads(out.read_text())
  assert [(c['who'], c['dropout']) for c in found['cells']] == [('bertjax, rbg', 0.1)]
  assert all(0 < c['mfu'] < 1 and len(c['tokens_per_second']) == 2 for c in found['cells'])
  assert ('run' in found) == trained
  if trained:
    run = found['run']
    assert max(row['step'] for row in run['curve']) == run['steps'] > 0
    assert math.isfinite(run['scores']['loss'])


@pytest.mark.slow  # smaller version: the steps above
def test_compile_time_and_scaling():
  from benchmarks import compile_time, scaling

  found = compile_time.run(**defaults(compile_time, preset='tiny', layers='2', length=32))
  assert found['rows'][0]['loop'] > 0 and found['rows'][0]['unrolled'] > 0
  sizes = {'lengths': '64', 'batches': '', 'layers': '1'}
  assert len(scaling.run(**defaults(scaling, **TINY, **sizes))['rows']) == 3


@pytest.mark.parametrize('task', ['stsb', 'sst2'])
def test_fine_tuning_beside_transformers(make, model, tmp_path, task):  # noqa: F811
  from benchmarks import finetune, finetune_step

  source = make(task).data.source
  shared = {'config': f'glue:{task}', 'source': source, 'model': str(model), 'length': 32}
  if task == 'stsb':
    out = tmp_path / 'out.json'
    finetune.run(**defaults(finetune, **shared, steps=3, batch_size=8, out=str(out)))
    result = json.loads(out.read_text())
    assert len(result['ours']) == 3 and result['largest_difference'] < 1e-3
    return
  found = finetune_step.run(
    **defaults(finetune_step, **shared, batch_size=8, pack=64, steps=2, repeats=1)
  )
  assert len(found['rows']) == 4 and all(math.isfinite(row['ratio']) for row in found['rows'])


def test_trials_that_a_process_runs(make, model):  # noqa: F811
  from benchmarks import trials

  source = make('sst2').data.source
  shared = {'config': 'glue:sst2', 'source': source, 'model': str(model), 'length': 32}
  assert trials.run(**defaults(trials, **shared, steps=2, only='1,2e-5')) is None


def test_a_service_under_load(vocab, tmp_path):
  pytest.importorskip('fastapi')
  from benchmarks import serve
  from tests.test_serve import serving

  texts = tmp_path / 'texts.txt'
  texts.write_text('the name\nof a class\n')
  predictor = Predictor(*tiny_model(vocab, 'classification'), batch_size=8)
  with serving(predictor, timeout=60) as client:
    url = str(client.base_url)
    found = serve.run(**defaults(serve, url=url, texts=str(texts), clients=4, seconds=1.0))
  assert found['answers'] >= 4 and found['lost'] == found['wrong'] == 0


def test_plain_text_is_printed_as_usual():
  from benchmarks.tag_text import plain_text

  words = ['He', 'said', ':', '"', 'It', "'s", '(', '1', '%', ')', '$', '5', ',', 'no', '.', '"']
  text, places = plain_text(words)
  assert text == 'He said: "It\'s (1%) $5, no."'
  assert [text[start:end] for start, end in places] == words


def test_embeddings_beside_sentence_transformers(model, tmp_path):  # noqa: F811
  pytest.importorskip('sentence_transformers')
  from benchmarks import embeddings

  texts = [f'the name of {word}' for word in ('a class', 'the file', 'an error', 'a list')]
  pairs = list(zip(texts, texts[1:] + texts[:1], strict=True))
  for name, split, columns, label in (
    ('RTE', 'train', 'sentence1\tsentence2\tlabel', 'entailment'),
    ('MRPC', 'train', '#1 String\t#2 String\tQuality', '1'),
    ('STS-B', 'dev', 'sentence1\tsentence2\tscore', None),
  ):
    (tmp_path / name).mkdir()
    rows = [f'{a}\t{b}\t{label or n}' for n, (a, b) in enumerate(pairs)]
    (tmp_path / name / f'{split}.tsv').write_text('\n'.join([columns, *rows, '']))
  sizes = {'seeds': 1, 'layers': 1, 'epochs': 1.0, 'batch_size': 16, 'microbatches': 2}
  found = embeddings.run(**defaults(embeddings, glue=str(tmp_path), model=str(model), **sizes))
  assert all(math.isfinite(found[name][0]) for name in ('start', 'ours', 'theirs'))


def test_tagging_with_other_output_layers(make, model, tmp_path):  # noqa: F811
  from benchmarks import tagging

  source, out = make('conll2003', 'tagging').data.source, tmp_path / 'out.json'
  sizes = {'fraction': 0.5, 'max_train': 24, 'max_dev': 8, 'epochs': 1.0, 'batch_size': 8}
  shared = {'source': source, 'model': str(model), 'seeds': 1, 'out': str(out)}
  tagging.run(**defaults(tagging, **shared, **sizes, variants='zero_prior'))
  found = tagging.run(**defaults(tagging, **shared, **sizes, variants='zero_prior,theirs'))
  assert list(found['variants']) == ['zero_prior', 'theirs'] and json.loads(out.read_text())
  assert all(0 <= rows[0]['f1'] <= 1 and len(rows) == 1 for rows in found['variants'].values())
  assert found['data']['eng.train']['sentences'] == 24


def test_only_the_needle_gives_its_class_away(vocab, corpus):
  from benchmarks import needle

  tokenizer = Tokenizer.from_file(vocab)
  prose = needle.words_of(corpus, tokenizer)
  draw = random.Random(0)
  for others in (False, True):
    text = needle.make_text(draw, prose, tokenizer, 200, others)
    words = text['text'].split()
    assert words[words.index(needle.KEY) + 2] == text['label'] and words.count(needle.KEY) == 1
    assert sorted(set(words) & set(needle.CLASSES)) == (
      sorted(needle.CLASSES) if others else [text['label']]
    )
    assert sum(words.count(c) for c in needle.CLASSES) == (4 if others else 1)
    [ids] = tokenizer.encode([text['text']])
    assert 180 < len(ids) <= 198


@pytest.mark.slow  # smaller version: the texts above
def test_needle_in_short_texts(corpus, tmp_path):
  from benchmarks import needle

  sizes = {'stages': '64x4x2,128x2x2', 'dev': 8, 'books': str(corpus)}
  found = needle.run(**defaults(needle, **sizes, workdir=str(tmp_path / 'needle')))
  assert [stage['length'] for stage in found['stages']] == [64, 128]
  assert all(0 <= stage[name] <= 1 for stage in found['stages'] for name in ('accuracy', 'control'))


PARTS = 'step,base_step,mask,text,finetune,inference,compile,memory'


@pytest.mark.parametrize('parts', ['step,inference', pytest.param(PARTS, marks=pytest.mark.slow)])
def test_keras_hub_has_our_weights(make, model, documents, tmp_path, parts):  # noqa: F811
  """Logits and vectors of both sides are compared before a part is measured."""
  if not importlib.util.find_spec('keras_hub'):
    pytest.skip('needs keras-hub')
  from benchmarks import keras_hub

  (tmp_path / 'RTE').mkdir()
  rows = '\n'.join('the name of a class\tan error\t0' for _ in range(8))
  (tmp_path / 'RTE' / 'train.tsv').write_text(f'sentence1\tsentence2\tlabel\n{rows}\n')
  (tmp_path / 'SST-2').symlink_to(make('sst2').data.source)
  (books := tmp_path / 'books').mkdir()
  for number, document in enumerate(documents):
    (books / f'{number}.txt').write_text(document)
  sizes = {'presets': 'tiny', 'rows': 8, 'length': 32, 'predictions': 4, 'steps': 1,
           'repeats': 1, 'texts': 16, 'tasks': 'sst2:SST-2', 'characters': 40_000}  # fmt: skip
  folders = {'glue': str(tmp_path), 'books': str(books), 'model': str(model)}
  found = keras_hub.run(**defaults(keras_hub, **folders, **sizes, parts=parts))
  assert len(found['parts']) == len(parts.split(','))
  differences = [part['difference'] for part in found['parts'] if 'difference' in part]
  assert len(differences) >= 2 and max(differences) < keras_hub.TOLERANCE
  assert all(len(part['rows']) >= 2 for part in found['parts'] if 'rows' in part)
