"""Programs on models of every family: pre-training recipes, and fine-tuning from transformers'."""

import json

import numpy as np
import pytest

from bertjax import explain, finetune, predict
from bertjax.__main__ import main
from bertjax.config import load_recipe
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.predictor import Predictor
from bertjax.interop.loading import load_model
from tests.interop import test_neobert
from tests.interop.test_families import TINY, class_of, theirs, vocabulary
from tests.test_finetune import write_sst2

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')
safetensors = pytest.importorskip('safetensors.numpy')


def check_loads(folder, model_type, architecture):
  """transformers reads a model directory of ours without a missing or unexpected key."""
  content = json.loads((folder / 'config.json').read_text())
  assert (content['model_type'], content['architectures']) == (model_type, [architecture])
  model, info = getattr(transformers, architecture).from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  return model.eval()


def convert(source, out, *flags):
  assert main(['convert', f'--from={source}', f'--out={out}', *flags]) == 0


def arrays(folder):
  """The tensors of a folder as files have them."""
  return safetensors.load_file(folder / 'model.safetensors')


def check_round_trip(folder, tmp_path, tokenizer, *, formats=('hf', 'hf')):
  """Converts a folder of transformers' by the command, and what that wrote once more."""
  tokenizer.save(folder)
  first, second = tmp_path / 'first', tmp_path / 'second'
  for source, out, form in zip((folder, first), (first, second), formats, strict=True):
    convert(source, out, f'--format={form}')
  before, after = arrays(folder), arrays(second)
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype and np.array_equal(tensor, after[name]), name
  return second


@pytest.mark.parametrize(('name', 'heads'), [
  *((name, heads) for name in TINY for heads in (*TINY[name][1], ('classification',))),
  ('XLMRoberta', ('classification',)), ('Camembert', ('mlm',)),
])  # fmt: skip
def test_a_folder_of_transformers_is_converted_there_and_back_bit_for_bit(name, heads, tmp_path):
  like = name if name in TINY else 'Roberta'
  model = theirs(like, heads)
  if name != like:  # the same model under another name
    theirs_too = getattr(transformers, type(model).__name__.replace(like, name))
    model = theirs_too(theirs_too.config_class(**model.config.to_dict()))
  model.save_pretrained(tmp_path / 'theirs')
  tokenizer = vocabulary(getattr(model.config, 'pad_token_id', 0))
  last = check_round_trip(tmp_path / 'theirs', tmp_path, tokenizer)
  check_loads(last, like.lower(), class_of(like, heads).__name__)
  for file in ('config.json', 'model.safetensors', 'tokenizer_config.json', 'vocab.txt'):
    assert (last / file).read_bytes() == (tmp_path / 'first' / file).read_bytes()


def test_a_neobert_is_converted_there_and_back_bit_for_bit(tmp_path):
  test_neobert.write(tmp_path / 'theirs', test_neobert.tensors())
  check_round_trip(tmp_path / 'theirs', tmp_path, vocabulary(0))


def test_an_albert_is_converted_to_google_s_files_and_back_bit_for_bit(tmp_path):
  model = theirs('Albert', ('mlm', 'nsp'))
  model.save_pretrained(tmp_path / 'theirs')
  last = check_round_trip(tmp_path / 'theirs', tmp_path, vocabulary(0), formats=('google', 'hf'))
  assert (tmp_path / 'first' / 'albert_config.json').is_file()
  check_loads(last, 'albert', 'AlbertForPreTraining')
  convert(last, tmp_path / 'again', '--format=google')
  names = sorted(path.name for path in (tmp_path / 'first').iterdir())
  assert names == sorted(path.name for path in (tmp_path / 'again').iterdir())
  for name in names:
    assert (tmp_path / 'again' / name).read_bytes() == (tmp_path / 'first' / name).read_bytes()


def rewrite(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  ('change', 'command', 'words'),
  [
    ('rows', 'predict --model={0} --text=w1', 'has a vocabulary of 61 entries, and the word table'),
    ('rows', 'finetune --config=glue:sst2 --workdir={1}/run --config.init_from={0} '
     '--config.data.length=32 --config.data.source={1}/sst2',
     'has a vocabulary of 61 entries, and the word table'),
    ('component', 'predict --model={0} --text=w1', 'cannot read its normalizer (Telepathy)'),
    ('layers', 'convert --from={0} --out={1}/out', 'layer_types must make every n-th layer'),
    ('architecture', 'convert --from={0} --out={1}/out', "describes a 'deberta-v2' model; known"),
    ('', 'pretrain --config=modernbert_base:smoke --workdir={1}/run --config.data.input={1} '
     '--config.model.position_offset=2', "position_offset=2 needs positions='learned'"),
    ('', 'pretrain --config=modernbert_base:smoke --workdir={1}/run --config.data.input={1} '
     '--config.model.embedding_size=8', 'embedding_size=8; a modernbert is the nearest'),
    ('', 'pretrain --config=bert_mini:smoke --workdir={1}/run --config.init_from={0} '
     '--config.data.prepared={2}', 'has vocab_size=60, this run wants 600'),
  ],
)  # fmt: skip
def test_a_mistake_about_a_model_gets_one_sentence(
  change, command, words, tiny_rows, tmp_path, capsys
):
  folder, extra = tmp_path / 'm', ['more'] if change == 'rows' else []
  theirs('ModernBert', ('mlm',)).save_pretrained(folder)
  Tokenizer([*vocabulary(0).vocab, *extra]).save(folder)
  if change == 'component':
    rewrite(folder / 'tokenizer_config.json', tokenizer_class='PreTrainedTokenizerFast')
    rewrite(folder / 'tokenizer.json', normalizer={'type': 'Telepathy'})
  if change == 'layers':
    rewrite(folder / 'config.json', layer_types=['sliding_attention'] * 7)
  if change == 'architecture':
    rewrite(folder / 'config.json', model_type='deberta-v2', architectures=['DebertaV2Model'])
  (tmp_path / 'sst2').mkdir()
  write_sst2(tmp_path / 'sst2')
  capsys.readouterr()
  assert main(command.format(folder, tmp_path, tiny_rows).split()) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('bertjax')]
  assert len(lines) == 1 and words in lines[0], lines
  assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('run/checkpoints/*'))


@pytest.mark.full
@pytest.mark.parametrize(
  ('recipe', 'architecture', 'flags'),
  [
    ('roberta_base', 'RobertaForMaskedLM', ['--config.model.position_offset=1']),
    ('albert_base', 'AlbertForPreTraining', []),
  ],
)
def test_a_recipe_trains_a_model_that_transformers_reads(
  recipe, architecture, flags, corpus, vocab, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('BERTJAX_CACHE', str(tmp_path / 'cache'))
  args = ['pretrain', f'--config={recipe}:smoke', f'--workdir={tmp_path}/run',
          f'--config.data.input={corpus}', f'--config.data.vocab={vocab}',
          '--config.num_train_steps=6', '--config.batch_size=8']  # fmt: skip
  if flags:  # the vocabulary's padding has the id 0, RoBERTa's 1
    assert main(args) == 2
    assert 'position_offset=2' in capsys.readouterr().err
  assert main([*args, *flags]) == 0
  model = check_loads(tmp_path / 'run' / 'model', recipe.partition('_')[0], architecture)
  predictor = Predictor.from_dir(tmp_path / 'run' / 'model')
  batch = predictor.tokenizer(['the name of a [MASK]', 'or'])
  out = predictor.runner.logits(predictor.runner.params, batch, 'mlm')
  with torch.no_grad():
    expected = model(
      input_ids=torch.tensor(batch['input_ids']).long(),
      attention_mask=torch.tensor(batch['segment_ids']).long(),
    )
  logits = expected[0].numpy()
  real = batch['segment_ids'] > 0
  assert np.abs(np.asarray(out)[real] - logits[real]).max() <= 1e-5 * max(1, np.abs(logits).max())


@pytest.mark.full
@pytest.mark.parametrize(
  'name', [name if name in ('Roberta', 'Albert') else pytest.param(name, marks=pytest.mark.slow)
           for name in TINY]
)  # fmt: skip
def test_a_folder_of_transformers_is_fine_tuned_and_predicts(name, vocab, tmp_path):
  tokenizer = Tokenizer.from_file(vocab)
  sizes, _ = TINY[name]
  if 'pad_token_id' in sizes:  # RoBERTa's and MPNet's padding has the id 1
    pieces = list(tokenizer.vocab)
    pieces[:2] = pieces[1::-1]
    tokenizer = Tokenizer(pieces)
  config = getattr(transformers, f'{name}Config')(vocab_size=tokenizer.vocab_size, **sizes)
  torch.manual_seed(0)
  class_of(name, ('mlm',))(config).save_pretrained(tmp_path / 'theirs')
  tokenizer.save(tmp_path / 'theirs')
  (tmp_path / 'sst2').mkdir()
  write_sst2(tmp_path / 'sst2')
  recipe = load_recipe('glue:sst2')
  recipe.init_from, recipe.data.source = str(tmp_path / 'theirs'), str(tmp_path / 'sst2')
  recipe.data.length, recipe.data.loader = 32, 'threads'
  recipe.batch_size, recipe.num_train_epochs, recipe.learning_rate = 8, 1.0, 2e-3
  finetune.run(recipe, workdir=str(tmp_path / 'run'))
  folder = tmp_path / 'run' / 'model'
  model = check_loads(folder, config.model_type, f'{name}ForSequenceClassification')
  (tmp_path / 'in.txt').write_text('the value returns\nan error raises\n')
  predict.run(model=str(folder), input=str(tmp_path / 'in.txt'), out=str(tmp_path / 'out.jsonl'))
  lines = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  batch = load_model(folder)[2](['the value returns', 'an error raises'])
  with torch.no_grad():
    logits = model(
      input_ids=torch.tensor(batch['input_ids']).long(),
      attention_mask=torch.tensor(batch['segment_ids']).long(),
    ).logits
  probs = torch.softmax(logits, -1).numpy()
  scores = [[line['result']['scores'][label] for label in ('0', '1')] for line in lines]
  np.testing.assert_allclose(scores, probs, atol=1e-5)
  explain.run(model=str(folder), text='the value returns', out=str(tmp_path / 'page.html'))
  assert 'returns' in (tmp_path / 'page.html').read_text()
