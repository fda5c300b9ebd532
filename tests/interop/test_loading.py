"""Model directories: labels, vocabularies, missing parts, saves that fail; what is refused."""

import dataclasses
import json
import logging
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from bertjax import convert
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import files
from bertjax.interop.huggingface import load_hf, save_hf
from bertjax.interop.loading import load_model, load_params, read_labels, save_model
from bertjax.model.heads import Bert
from bertjax.scoring import check_labels
from tests.interop.models import (
  change_config,
  check_refused,
  check_same,
  random_params,
  tiny,
)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'model_type': 'deberta-v2'}, ['deberta-v2', 'known are', 'bert', 'roberta']),
    ({'model_type': 'roberta'}, ['no tensor roberta.embeddings']),
    ({'position_embedding_type': 'relative_key'}, ['relative_key']),
    ({'add_cross_attention': True}, ['add_cross_attention']),
    ({'hidden_act': 'mish'}, ['mish', 'gelu_new']),
    ({'hidden_size': '16'}, ['hidden_size', "'16'", 'int']),
    ({'num_attention_heads': 3}, ['num_heads=3']),
    ({'vocab_size': 601}, ['model.safetensors', 'word_embeddings', '(600, 16)', '(601, 16)']),
  ],
)
def test_a_config_that_does_not_fit_is_named(folder, changes, words):
  change_config(folder, **changes)
  check_refused(folder, *words)


@pytest.mark.parametrize('text', ['{"model_type": "bert",', '[1]', '\x80'])
def test_corrupt_json_is_named(folder, text):
  (folder / 'config.json').write_bytes(text.encode('latin-1'))
  check_refused(folder, 'config.json', 'corrupt')


def test_a_config_of_another_library_without_a_model_type_is_refused(folder):
  content = {'architectures': ['BartForMaskedLM'], 'hidden_size': 16}
  (folder / 'config.json').write_text(json.dumps(content))
  check_refused(folder, 'BartForMaskedLM')


def test_a_vocabulary_larger_than_the_word_table_is_refused(saved, folder, tmp_path):
  with (folder / 'vocab.txt').open('a') as file:
    file.write('[new1]\n[new2]\n')
  check_refused(folder, 'differ in 2 tokens', "'[new1]'")
  (folder / 'tokenizer.json').unlink()
  check_refused(folder, '602 entries', 'word_embeddings', '600 rows')
  tokenizer = Tokenizer.from_file(folder / 'vocab.txt')
  with pytest.raises(ValueError, match='602 entries'):
    save_hf(tmp_path / 'new', saved[1], saved[2], tokenizer)
  assert not (tmp_path / 'new').exists()
  for resize in (False, True):
    with pytest.raises(ValueError, match='602 entries'):
      load_params(folder, Bert(saved[1]), tokenizer=tokenizer, resize=resize, weights=saved[1:])


def test_a_failed_save_leaves_the_old_model_and_no_half(saved, folder, vocab):
  before = {path.name: path.read_bytes() for path in folder.iterdir()}

  class FullDisk(Tokenizer):
    def save(self, directory, **options):
      raise OSError('No space left on device')

  with pytest.raises(OSError, match='space'):
    save_hf(folder, saved[1], saved[2], FullDisk(Tokenizer.from_file(vocab).vocab))
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  assert [path.name for path in folder.parent.iterdir()] == ['model']


def test_a_folder_with_more_than_a_model_is_not_replaced(saved, folder, vocab):
  (folder / 'thesis.txt').write_text('years')
  with pytest.raises(ValueError, match='thesis'):
    save_hf(folder, saved[1], saved[2], Tokenizer.from_file(vocab))
  assert (folder / 'thesis.txt').read_text() == 'years'


def test_labels_and_the_classifiers_dropout_come_back(vocab, tmp_path):
  config, tokenizer = tiny(vocab, classifier_dropout=0.3)
  params = random_params(config, ('classification',))
  save_hf(tmp_path / 'a', config, params, tokenizer, labels=['bad', 'so so', 'good'],
          problem_type='single_label_classification')  # fmt: skip
  assert load_hf(tmp_path / 'a')[0] == config
  assert read_labels(tmp_path / 'a') == (['bad', 'so so', 'good'], 'single_label_classification')
  save_hf(tmp_path / 'b', config, params, tokenizer)
  assert read_labels(tmp_path / 'b') == (['LABEL_0', 'LABEL_1', 'LABEL_2'], '')
  with pytest.raises(ValueError, match='3 classes'):
    save_hf(tmp_path / 'c', config, params, tokenizer, labels=['bad', 'good'])
  change_config(tmp_path / 'a', id2label={'0': 'bad', '1': 'good'})
  check_refused(tmp_path / 'a', 'config.json', '2 labels', 'has 3')


@pytest.mark.parametrize('named', [(), ('neg', 'pos'), ('bad', 'good'), ('good', 'bad')])
def test_labels_that_are_taken_by_their_number_are_logged(vocab, tmp_path, caplog, named):
  config, tokenizer = tiny(vocab)
  params = random_params(config, ('classification',), num_labels=2)
  save_hf(tmp_path / 'a', config, params, tokenizer, labels=named)
  task = types.SimpleNamespace(
    head='classification', name='reviews', num_labels=2, labels=('bad', 'good')
  )
  if named == ('good', 'bad'):
    with pytest.raises(ValueError, match='must be the same in the same order'):
      check_labels(tmp_path / 'a', params, task)
    return
  caplog.clear()
  check_labels(tmp_path / 'a', params, task)
  expected = {(): 'LABEL_0 is bad, LABEL_1 is good', ('neg', 'pos'): 'neg is bad, pos is good'}
  found = [record.getMessage() for record in caplog.records]
  assert [text.split("task's order: ")[1] for text in found] == [
    text for names, text in expected.items() if names == named
  ]


def test_the_layout_of_a_classifier_must_be_stated(vocab, tmp_path):
  config, tokenizer = tiny(vocab)
  params = random_params(config, ('tagging',))
  save_hf(tmp_path / 'a', config, params, tokenizer)
  assert 'tagging' in load_hf(tmp_path / 'a')[1]
  change_config(tmp_path / 'a', architectures=None)
  check_refused(tmp_path / 'a', 'classifier', 'heads')
  check_same(load_hf(tmp_path / 'a', heads=('tagging',))[1], params)
  with pytest.raises(ValueError, match='both have the tensor classifier'):
    save_hf(tmp_path / 'b', config, random_params(config, ('tagging', 'choice')), tokenizer)


def test_a_missing_part_is_initialised_only_on_request(saved, caplog):
  caplog.set_level(logging.INFO, 'bertjax')
  folder, config, params = saved
  bert = Bert(config, heads=('classification',), num_labels=3)
  initial = random_params(config, ('classification',), seed=1)
  with pytest.raises(ValueError, match='classification'):
    load_params(folder, bert, initial=initial)
  result = load_params(folder, bert, initial=initial, fresh=('classification',))
  assert list(result) == ['encoder', 'pooler', 'classification']
  check_same(result['classification'], initial['classification'])
  check_same(result['encoder'], params['encoder'])
  assert 're-initialised: classification' in caplog.text


def test_a_changed_vocabulary_keeps_the_embeddings_of_shared_tokens_on_request(saved):
  folder, config, params = saved
  old = Tokenizer.from_dir(folder)
  pieces = old.vocab[:300] + ['newword', '##new'] + old.vocab[400:][::-1]
  tokenizer = Tokenizer(pieces)
  wanted = dataclasses.replace(config, vocab_size=len(pieces), max_positions=32)
  bert, initial = Bert(wanted), random_params(wanted, seed=1)
  with pytest.raises(ValueError, match='init_resize'):
    load_params(folder, bert, initial=initial, tokenizer=tokenizer)
  result = load_params(folder, bert, initial=initial, tokenizer=tokenizer, resize=True)
  for *path, leaf in (('encoder', 'embeddings', 'word', 'embedding'), ('mlm', 'bias')):
    table, before, drawn = result, params, initial
    for name in (*path, leaf):
      table, before, drawn = table[name], before[name], drawn[name]
    np.testing.assert_array_equal(table[:300], before[:300])
    np.testing.assert_array_equal(table[300:302], drawn[300:302])
    np.testing.assert_array_equal(table[302:], before[400:][::-1])
  positions = result['encoder']['embeddings']['position']['embedding']
  np.testing.assert_array_equal(
    positions[:20], params['encoder']['embeddings']['position']['embedding']
  )
  np.testing.assert_array_equal(
    positions[20:], initial['encoder']['embeddings']['position']['embedding'][20:]
  )
  check_same(result['encoder']['layers'], params['encoder']['layers'])


@pytest.mark.parametrize('change', [{'activation': 'gelu_tanh'}, {'mlp_size': 32}])
def test_a_model_of_another_shape_is_refused_even_with_resizing(saved, change):
  (name,) = change
  bert = Bert(dataclasses.replace(saved[1], **change))
  with pytest.raises(ValueError, match=f'--config.model.{name}='):
    load_params(saved[0], bert, resize=True, initial=saved[2])


def test_another_vocabulary_of_the_same_size_is_noticed(saved):
  pieces = Tokenizer.from_dir(saved[0]).vocab
  bert = Bert(saved[1])
  with pytest.raises(ValueError, match='another vocabulary'):
    load_params(saved[0], bert, tokenizer=Tokenizer(pieces[::-1]))
  with pytest.raises(ValueError, match='lowercase=True'):
    load_params(saved[0], bert, tokenizer=Tokenizer(pieces, lowercase=False))
  check_same(load_params(saved[0], bert, tokenizer=Tokenizer(pieces)), saved[2])


def test_added_tokens_go_through_every_form_of_a_model_with_the_same_ids(folder, tmp_path):
  """convert to Hugging Face's and Google's files and back; transformers reads the same ids."""
  transformers = pytest.importorskip('transformers')
  change_config(folder, vocab_size=602)
  tensors = files.read_tensors(folder / 'model.safetensors')
  for name in ('bert.embeddings.word_embeddings.weight', 'cls.predictions.bias'):
    tensors[name] = np.concatenate([tensors[name], np.ones_like(tensors[name][:2])])
  save_file(tensors, folder / 'model.safetensors')
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  theirs.add_tokens(['BRCA1', '[P1]'])
  theirs.save_pretrained(folder)
  (folder / 'vocab.txt').unlink()
  text = 'a BRCA1 [P1], brca1 a[P1]'
  ids = theirs(text).input_ids
  assert {600, 601} < set(ids)
  source = folder
  for name, form in (('hf', 'hf'), ('google', 'google'), ('back', 'hf')):
    convert.run(out=str(tmp_path / name), format=form, **{'from': str(source)})
    source = tmp_path / name
    bert, _, tokenizer = load_model(source)
    assert bert.config.vocab_size == tokenizer.vocab_size == 602
    assert tokenizer([text])['input_ids'][0].tolist() == ids
    assert transformers.AutoTokenizer.from_pretrained(source)(text).input_ids == ids
  plain = Tokenizer(Tokenizer.from_dir(source).vocab)
  with pytest.raises(ValueError, match='added tokens or special rules'):
    load_params(source, bert, tokenizer=plain)
  load_params(source, bert, tokenizer=Tokenizer.from_file(source))


@pytest.mark.e2e
def test_transformers_pipelines_truncate_long_texts_of_a_saved_model(vocab, tmp_path):
  """They truncate to model_max_length; without it the model crashes on its position table."""
  transformers = pytest.importorskip('transformers')
  config, tokenizer = tiny(vocab)
  params = random_params(config, ('classification',))
  save_hf(tmp_path / 'a', config, params, tokenizer)
  tokenizer.settings = {'model_max_length': 12}
  save_hf(tmp_path / 'b', config, params, tokenizer)
  for name, length in (('a', 20), ('b', 12)):
    pipeline = transformers.pipeline('text-classification', str(tmp_path / name))
    assert pipeline.tokenizer.model_max_length == length
    assert pipeline('a b ' * 200, truncation=True)[0]['label'].startswith('LABEL_')


@pytest.mark.parametrize(
  ('heads', 'pooler'),
  [
    ((), True),
    (('mlm',), False),
    (('mlm', 'nsp'), True),
    (('tagging',), False),
    (('choice',), True),
  ],
)
def test_a_loaded_module_has_the_heads_of_its_files(vocab, tmp_path, heads, pooler):
  config, tokenizer = tiny(vocab)
  bert = Bert(config, heads, pooler, num_labels=3 if 'tagging' in heads else 2)
  save_model(tmp_path / 'm', bert, random_params(config, heads, pooler), tokenizer)
  model, params, tokenizer = load_model(tmp_path / 'm')
  assert model == bert
  out = model.apply(
    {'params': params}, tokenizer(['A sentence.', 'Another'], ['A pair.', 'Or two'])
  )
  assert {'hidden', *(f'{head}_logits' for head in heads)} <= out.keys()
  assert ('pooled' in out) == pooler


def test_an_absent_head_is_named_with_those_there_are(saved):
  with pytest.raises(ValueError, match='has no tagging head; it has the heads mlm, nsp'):
    load_model(saved[0], heads=('mlm', 'tagging'))
  model, params, tokenizer = load_model(saved[0], heads=('nsp',))
  assert model.heads == ('nsp',)
  with pytest.raises(ValueError, match='the parameters have no mlm head; they have the heads nsp'):
    model.clone(heads=('mlm',)).apply({'params': params}, tokenizer('the name'))
  with pytest.raises(ValueError, match='no pooler; they have no heads, only the bare encoder'):
    model.clone(heads=()).apply({'params': {'encoder': params['encoder']}}, tokenizer('the name'))


def test_a_save_without_its_parameters_or_format_is_refused(saved, tmp_path):
  model, params, tokenizer = load_model(saved[0])
  with pytest.raises(ValueError, match=r"has the parts \['encoder', .* consists of \['encoder',"):
    save_model(tmp_path / 'm', model, params | {'rtd': {}}, tokenizer)
  with pytest.raises(ValueError, match="format must be 'hf' or 'google', got 'tf'"):
    save_model(tmp_path / 'm', model, params, tokenizer, format='tf')
  with pytest.raises(TypeError, match='got a EncoderConfig'):
    save_model(tmp_path / 'm', model.config, params, tokenizer)
  assert not list(tmp_path.iterdir())


def test_load_model_and_load_hf_agree(saved):
  assert load_model(saved[0])[0].config == load_hf(saved[0])[0] == saved[1]


def test_a_model_that_a_kill_left_aside_comes_back(tmp_path):
  (tmp_path / 'model.replaced').mkdir()
  (tmp_path / 'model.replaced' / 'model.safetensors').write_bytes(b'the old one')
  with (
    pytest.raises(KeyboardInterrupt),
    files.new_directory(tmp_path / 'model', 'model.safetensors'),
  ):
    raise KeyboardInterrupt
  assert [path.name for path in tmp_path.iterdir()] == ['model']
  assert (tmp_path / 'model' / 'model.safetensors').read_bytes() == b'the old one'
