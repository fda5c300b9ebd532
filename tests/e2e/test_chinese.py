"""Chinese from raw text to every kind of answer, with the verbs only.

Measured in two runs (2 cores, jax 0.10.2, seed 0, 11 minutes): 56.1% random NSP labels, 0.00%
[UNK], held-out masked-LM loss 4.00 and NSP accuracy 0.91 after 500 steps; accuracy 0.98, tagging F1
1.00, CMRC F1 0.75, exact match 0.70. The bounds leave room for other versions of jax.
"""

import contextlib
import csv
import io
import json
import re

import pytest

from bertjax.__main__ import main
from bertjax.data import dataset
from bertjax.training.metrics import read_metrics
from tests import chinese

TINY = [
  '--config=bert_mini', '--config.model.num_layers=2', '--config.model.hidden_size=64',
  '--config.model.num_heads=2', '--config.model.mlp_size=128', '--config.model.max_positions=96',
  '--config.model.unroll=2', '--config.data.length=64',
]  # fmt: skip
TUNE = [
  '--config.data.length=96', '--config.batch_size=16', '--config.model.hidden_dropout=0.0',
  '--config.model.attention_dropout=0.0', '--config.model.classifier_dropout=0.0',
  '--config.optimizer.name=adamw', '--config.data.test=',
]  # fmt: skip


def call(*arguments) -> str:
  """Calls a verb; returns what it printed."""
  with contextlib.redirect_stdout(io.StringIO()) as out:
    assert main([str(argument) for argument in arguments]) == 0
  return out.getvalue()


def ask(model, do, text, *more):
  """The answer of `bertjax predict`."""
  return json.loads(call('predict', f'--model={model}', f'--do={do}', f'--text={text}', *more))


@pytest.fixture(scope='module')
def work(tmp_path_factory):
  """A folder with 400 documents of three paragraphs: 70,000 characters, no blank among them."""
  folder = tmp_path_factory.mktemp('chinese')
  (folder / 'texts').mkdir()
  for number, text in enumerate(chinese.documents(400)):
    assert ' ' not in text
    (folder / 'texts' / f'{number:03d}.txt').write_text(text, encoding='utf-8')
  return folder


@pytest.fixture(scope='module')
def vocab(work):
  letters = {*''.join(path.read_text('utf-8') for path in (work / 'texts').iterdir())} - {'\n'}
  path = work / 'vocab.txt'
  call(
    'vocab', f'--input={work / "texts"}', f'--size={104 + len(letters)}', f'--out={path}',
    f'--report_file={work / "report.json"}',
  )  # fmt: skip
  assert letters <= set(path.read_text('utf-8').split('\n'))
  return path


@pytest.fixture(scope='module')
def rows(work, vocab):
  call(
    'prepare', *TINY, f'--out={work / "rows"}', f'--config.data.input={work / "texts"}',
    f'--config.data.vocab={vocab}', '--config.data.dupe_factor=2',
  )  # fmt: skip
  return work / 'rows'


@pytest.fixture(scope='module')
def model(work, rows):
  call(
    'pretrain', *TINY, f'--workdir={work / "run"}', f'--config.data.prepared={rows}',
    '--config.masking.unit=whole_word', '--config.masking.max_predictions=10',
    '--config.num_train_steps=500', '--config.warmup_steps=100', '--config.batch_size=32',
    '--config.learning_rate=2e-3', '--config.eval_every=0', '--config.save_every=500',
  )  # fmt: skip
  return work / 'run' / 'model'


def tune(work, model, recipe, *flags):
  """Fine-tunes in a folder named after the recipe; returns it and the best dev scores."""
  folder = work / recipe.replace(':', '_')
  call('finetune', f'--config={recipe}', f'--workdir={folder}', f'--config.init_from={model}',
       f'--config.data.source={work}', *TUNE, *flags)  # fmt: skip
  lines = [row for row in read_metrics(folder) if row['kind'] == 'eval']
  return folder, lines[-1]


def test_half_of_the_next_sentences_are_random_and_no_token_is_unknown(work, rows):
  report = json.loads((work / 'report.json').read_text())
  assert report['unknown'] == 0
  assert report['sentences'] > 15 * report['documents']  # not one a paragraph
  assert report['words'] > 10 * report['sentences']  # characters, not clauses
  labels = dataset.Dataset(rows, 'train')[:]['next_sentence_labels']
  assert len(labels) > 3000 and 0.5 < labels.mean() < 0.65


@pytest.mark.slow
def test_pretraining_learns_characters_and_what_follows(work, model):
  scores = [row for row in read_metrics(work / 'run') if row['kind'] == 'eval'][-1]
  assert scores['mlm_loss'] < 4.4  # the unigram's is about 5.5
  assert scores['nsp_accuracy'] > 0.8


@pytest.mark.slow
def test_masks_are_filled_in_the_text_as_it_stands(model):
  [fills] = ask(model, 'fill_mask', '导游笑着[MASK]：“别着急，中午就到了。”')
  assert '说' in [fill['token'] for fill in fills]
  for fill in fills:
    assert fill['text'] == f'导游笑着{fill["token"]}：“别着急，中午就到了。”'


@pytest.mark.slow
def test_reviews_are_classified_explained_and_reported(work, model):
  for split, count, seed in (('train', 300, 1), ('dev', 60, 2)):
    with (work / f'{split}.csv').open('w', encoding='utf-8', newline='') as file:
      csv.writer(file).writerows([('评论', '评价'), *chinese.reviews(count, seed)])
  folder, scores = tune(
    work, model, 'table', '--config.data.train_file=train.csv', '--config.data.dev_file=dev.csv',
    '--config.num_train_epochs=3.0',
    '--config.task.text=评论', '--config.task.label=评价', '--config.learning_rate=1e-3',
  )  # fmt: skip
  assert scores['accuracy'] > 0.9
  text = chinese.reviews(2, seed=3)[1][0]
  assert ask(folder / 'model', 'classify', text)['labels'] == ['差评']
  page = (folder / 'report.html').read_text('utf-8')
  assert re.search('<text[^>]*>好评</text>', page) and re.search('<text[^>]*>差评</text>', page)
  explanation = work / 'page.html'
  call('explain', f'--model={folder / "model"}', f'--text={text}', f'--out={explanation}')
  assert json.dumps('差评') in explanation.read_text('utf-8')


@pytest.mark.slow
def test_names_are_tagged_character_by_character(work, model):
  for split, count, seed in (('train', 600, 1), ('dev', 100, 2)):
    blocks = ['\n'.join(' '.join(row) for row in rows) for rows in chinese.tagged(count, seed)]
    (work / f'{split}.conll').write_text('\n\n'.join(blocks) + '\n', encoding='utf-8')
  folder, scores = tune(
    work, model, 'tagging:conll', '--config.data.train_file=train.conll',
    '--config.data.dev_file=dev.conll',
    '--config.num_train_epochs=4.0', '--config.learning_rate=2e-3',
  )  # fmt: skip
  assert scores['f1'] > 0.95
  spans = ask(folder / 'model', 'tag', '昨天下午，欧阳雪坐火车去了哈尔滨。')
  assert [(s['label'], s['text']) for s in spans] == [('PER', '欧阳雪'), ('LOC', '哈尔滨')]


@pytest.mark.slow
def test_questions_are_answered_and_scored_as_in_cmrc_2018(work, model):
  for split, count, seed in (('train', 1500, 1), ('dev', 100, 2)):
    content = json.dumps(chinese.questions(count, seed), ensure_ascii=False)
    (work / f'{split}.json').write_text(content, encoding='utf-8')
  folder, scores = tune(
    work, model, 'squad', '--config.data.train_file=train.json', '--config.data.dev_file=dev.json',
    '--config.task.scorer=cmrc2018', '--config.task.max_query=24', '--config.num_train_epochs=6.0',
    '--config.learning_rate=2e-3',
  )  # fmt: skip
  assert scores['f1'] >= scores['exact'] and scores['f1'] > 0.6 and scores['exact'] > 0.5
  context = '张伟最爱吃米粉。李华出生在杭州。'
  answer = ask(folder / 'model', 'answer', '谁出生在杭州？', f'--pair={context}')
  assert answer['text'] and answer['text'] in context


@pytest.mark.slow
def test_a_summary_has_complete_sentences(model):
  text = chinese.documents(1, seed=5)[0]
  found = ask(model, 'summarise', text, '--sentences=3', '--long=window')
  assert len(found) == 3
  assert all(s in text and s[-1] in '。！？”' and 4 < len(s) < 40 for s in found)
