"""`bertjax predict`: files in order, in bounded memory, resumable; mistakes end in a sentence."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from bertjax import predict as predict_lib
from bertjax.__main__ import main
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.predictor import CALLS, Predictor
from bertjax.interop.loading import save_model
from tests.data.test_words import tagger
from tests.models import model

pa = pytest.importorskip('pyarrow')
from pyarrow import parquet  # noqa: E402


@pytest.fixture(scope='module')
def folder(tmp_path_factory, vocab):
  """A model directory with a classification head."""
  folder = tmp_path_factory.mktemp('model')
  bert, params, tokenizer = model(vocab, 'classification')
  save_model(folder, bert, params, tokenizer, labels=['bad', 'good'])
  return folder


@pytest.fixture(scope='module')
def texts():
  """Texts of many lengths; one is blank and one too long."""
  rng = np.random.default_rng(0)
  words = ['the', 'name', 'of', 'a, "class"', 'or', 'naïve']
  made = [' '.join(rng.choice(words, n)) for n in rng.integers(1, 9, 60)]
  return [*made[:20], '', *made[20:40], 'the ' * 60, *made[40:]]


def predict(folder, path, out, *more):
  return main(['predict', f'--model={folder}', '--do=classify', f'--input={path}',
               f'--out={out}', '--batch_size=4', *more])  # fmt: skip


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def answered(tmp_path_factory, folder, texts):
  """The answers to a text file."""
  path = tmp_path_factory.mktemp('answered')
  (path / 'in.txt').write_text(''.join(text + '\n' for text in texts))
  assert predict(folder, path / 'in.txt', path / 'out.jsonl') == 0
  return path


def test_records_keep_their_order_and_bad_ones_have_an_error(answered, folder, texts):
  found = lines(answered / 'out.jsonl')
  assert len(found) == len(texts)
  assert found[20] == {'error': 'a text is empty.', 'input': {'text': ''}}
  assert [line['input']['text'] for line in found] == texts
  assert (
    found[41]['error']
    == 'the text has 62 tokens with its special ones, the model takes at most 48.'
  )
  predictor = Predictor.from_dir(folder, batch_size=4)
  for number in (0, 19, 21, 40, 42, 61):
    scores = predictor.classify(texts[number]).scores
    assert found[number]['result']['scores'] == pytest.approx(scores, abs=1e-5)
    assert found[number]['result']['labels'] == [max(scores, key=scores.get)]
  kept = ['in.txt', 'out.jsonl', 'out.jsonl.part']  # the last as long as there are errors
  assert sorted(p.name for p in answered.iterdir()) == kept


def test_every_format_gives_the_same_lines(answered, folder, texts, tmp_path):
  rows = [{'id': i, 'body': text} for i, text in enumerate(texts)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  quoted = [f'{i},"{text.replace(chr(34), chr(34) * 2)}"' for i, text in enumerate(texts)]
  (tmp_path / 'a.csv').write_text('\ufeff' + '\r\n'.join(['id,body', *quoted]) + '\r\n')
  (tmp_path / 'a.tsv').write_text(
    '\n'.join(['id\tbody', *(f'{i}\t{t}' for i, t in enumerate(texts))])
  )
  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / 'a.parquet', row_group_size=7)
  for kind in ('jsonl', 'csv', 'tsv', 'parquet'):
    out = tmp_path / f'{kind}.jsonl'
    assert predict(folder, tmp_path / f'a.{kind}', out, '--columns=body') == 0
    expected = (
      (answered / 'out.jsonl').read_bytes().replace(b'"input": {"text": ', b'"input": {"body": ')
    )
    assert out.read_bytes() == expected, kind


def test_a_csv_output_has_a_column_for_each_part_of_a_result(answered, folder, texts, tmp_path):
  assert predict(folder, answered / 'in.txt', tmp_path / 'out.csv') == 0
  with (tmp_path / 'out.csv').open(newline='', encoding='utf-8') as file:
    table = list(csv.DictReader(file))
  assert list(table[0]) == ['text', 'labels', 'scores.bad', 'scores.good', 'error']
  assert [row['text'] for row in table] == texts
  assert table[20]['error'] == 'a text is empty.' and table[20]['labels'] == ''
  for row, line in zip(table, lines(answered / 'out.jsonl'), strict=True):
    if 'result' in line:
      assert row['labels'] == line['result']['labels'][0] and not row['error']
      assert float(row['scores.good']) == line['result']['scores']['good']


def test_other_columns_are_kept_on_request(folder, tmp_path):
  (tmp_path / 'a.csv').write_text('id,body\n7,the name\n8,\n')
  out = tmp_path / 'o.jsonl'
  assert predict(folder, tmp_path / 'a.csv', out, '--columns=body', '--keep=id') == 0
  assert [line['input'] for line in lines(out)] == [{'id': '7'}, {'id': '8'}]
  assert ['error' in line for line in lines(out)] == [False, True]


def test_an_ending_is_chosen_on_the_command_line(vocab, tmp_path, capsys):
  save_model(tmp_path / 'm', *model(vocab, 'choice'))
  arguments = ['--do=choose', '--text=the name', '--pair=of a class | is open|or None']
  assert main(['predict', f'--model={tmp_path}/m', *arguments]) == 0
  answer = json.loads(capsys.readouterr().out)
  expected = Predictor.from_dir(tmp_path / 'm').choose(
    'the name', ['of a class', 'is open', 'or None']
  )
  assert answer['text'] == expected.text and len(answer['probabilities']) == 3


@pytest.mark.parametrize('torn', [b'{"result": "30"}\n{"res', b'{"res'])
@pytest.mark.e2e
def test_a_killed_run_resumes_and_ends_with_the_same_bytes(tmp_path, monkeypatch, torn):
  monkeypatch.setattr(predict_lib, 'CHUNK', 10)
  path, out, seen = tmp_path / 'in.txt', tmp_path / 'out.jsonl', []
  path.write_text('\n'.join(str(i) for i in range(57)))

  def answer(items, stop=99):
    seen.append(len(items))
    if int(items[0][0]) >= stop:
      raise KeyboardInterrupt
    return [{'result': text} for (text,) in items]

  with pytest.raises(KeyboardInterrupt):
    predict_lib.answer_file(
      lambda items: answer(items, 30), path, out, ['text'], {'do': 'x', 'k': 1}
    )
  part = tmp_path / 'out.jsonl.part'
  with part.open('ab') as file:
    file.write(torn)
  for other, differ in (({'do': 'y', 'k': 1}, 'do'), ({'do': 'x'}, 'k')):
    with pytest.raises(ValueError, match=rf'begun with other settings \({differ}\); delete it'):
      predict_lib.answer_file(answer, path, out, ['text'], other)
  seen.clear()
  assert predict_lib.answer_file(answer, path, out, ['text'], {'do': 'x', 'k': 1}) == 57
  assert seen == [10, 10, 7]  # 30..56, in chunks: neither all at once nor anything twice
  assert [line['result'] for line in lines(out)] == [str(i) for i in range(57)]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['in.txt', 'out.jsonl']
  with pytest.raises(ValueError, match='exists already'):
    predict_lib.answer_file(answer, path, out, ['text'], {'do': 'x'})


def test_the_reader_holds_no_more_than_a_chunk(tmp_path, monkeypatch):
  monkeypatch.setattr(predict_lib, 'CHUNK', 10)
  path, most = tmp_path / 'in.jsonl', []
  path.write_text('\n'.join(json.dumps({'text': str(i)}) for i in range(100)))
  predict_lib.answer_file(
    lambda items: most.append(len(items)) or [0] * len(items), path, tmp_path / 'o.jsonl',
    ['text'], {},
  )  # fmt: skip
  assert most == [10] * 10


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('null.jsonl', '{"text": "one"}\n{"text": "two"}\n{"text": null}\n{"text": "four"}\n',
     ":3: column 'text' holds no text but null."),
    ('number.jsonl', '{"text": "one"}\n{"text": "two"}\n{"text": 3}\n{"text": "four"}\n',
     ":3: column 'text' holds no text but 3."),
    ('missing.jsonl', '{"text": "one"}\n{"text": "two"}\n{"body": "x"}\n{"text": "four"}\n',
     ":3: no column 'text'; it has ['body']."),
    ('short.csv', 'id,text\n1,one\n2,two\n3\n4,four\n', ':4: 1 fields, the first row has 2.'),
    ('long.csv', 'id,text\n1,one\n2,two\n3,a,b\n4,four\n', ':4: 3 fields, the first row has 2.'),
  ],
)  # fmt: skip
def test_a_row_without_its_text_is_an_error_line_and_a_mended_one_resumes(
  tmp_path, monkeypatch, caplog, name, content, message
):
  monkeypatch.setattr(predict_lib, 'CHUNK', 2)
  path, out, seen = tmp_path / name, tmp_path / 'out.jsonl', []
  path.write_text(content)

  def answer(items):
    seen.append([text for (text,) in items])
    return [{'result': text} for (text,) in items]

  assert predict_lib.answer_file(answer, path, out, ['text'], {}) == 4
  one, two, three, four = lines(out)
  assert [one, two, four] == [{'result': 'one'}, {'result': 'two'}, {'result': 'four'}]
  assert three == {'error': f'{path}{message}'}
  assert 'out.jsonl: 1 of 4 lines are errors; correct these rows' in caplog.text
  assert seen == [['one', 'two'], ['four']]

  seen.clear()  # the output is complete, but for its error
  assert predict_lib.answer_file(answer, path, out, ['text'], {}) == 4
  assert seen == [] and lines(out) == [one, two, three, four]
  broken, right = content.splitlines(True)[-2], content.splitlines(True)[-3]
  path.write_text(content.replace(broken, right.replace('two', 'corrected')))
  assert predict_lib.answer_file(answer, path, out, ['text'], {}) == 4
  assert seen == [['corrected', 'four']]  # the first chunk is kept
  assert lines(out) == [one, two, {'result': 'corrected'}, four]
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, 'out.jsonl'])
  with pytest.raises(ValueError, match='exists already'):
    predict_lib.answer_file(answer, path, out, ['text'], {})

  path.write_text(content + content.splitlines(True)[-1] * 3)
  out.unlink()
  seen.clear()

  def die(items):
    if len(seen) == 2:
      raise KeyboardInterrupt
    return answer(items)

  with pytest.raises(KeyboardInterrupt):
    predict_lib.answer_file(die, path, out, ['text'], {})
  path.write_text(path.read_text().replace(broken, right.replace('two', 'corrected')))
  seen.clear()
  assert predict_lib.answer_file(answer, path, out, ['text'], {}) == 7
  assert seen == [['corrected', 'four'], ['four', 'four'], ['four']]
  expected = ['one', 'two', 'corrected', 'four', 'four', 'four', 'four']
  assert [line['result'] for line in lines(out)] == expected


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_lists_of_words_are_tagged_from_files(tmp_path, kind):
  predictor = tagger(['O', 'B-X'])  # every word is a span
  save_model(
    tmp_path / 'm', predictor.model, predictor.runner.params, predictor.tokenizer,
    labels=predictor.labels,
  )  # fmt: skip
  words = [['the', 'U.S.', '(or'], [], ['北', '京']]
  if kind == 'jsonl':
    more = ['the U.S. (or', ['the', None]]
    content = ''.join(json.dumps({'text': value}) + '\n' for value in [*words, *more])
    (tmp_path / 'a.jsonl').write_text(content)
  else:
    parquet.write_table(pa.table({'text': words}), tmp_path / 'a.parquet')
  arguments = [f'--input={tmp_path}/a.{kind}', f'--out={tmp_path}/o.jsonl']
  assert main(['predict', f'--model={tmp_path}/m', '--do=tag', *arguments]) == 0
  found = lines(tmp_path / 'o.jsonl')
  texts = [[span['text'] for span in line.get('result', ())] for line in found]
  assert texts[:3] == words and found[1] == {'error': 'a text is empty.', 'input': {'text': []}}
  if kind == 'jsonl':
    assert texts[3] == ['the', 'U.S.', '(', 'or']
    assert found[4]['error'].endswith('a.jsonl:5: column \'text\' holds no text but ["the", null].')


def test_another_model_of_a_run_does_not_resume_an_output(tmp_path, folder, capsys):
  run, path = tmp_path / 'run', tmp_path / 'a.txt'
  shutil.copytree(folder, run / 'model')
  (run / 'run.json').write_text('{}')
  path.write_text('the name\n\n')  # its second row is an error, so that the .part stays
  assert predict(run, path, tmp_path / 'o.jsonl') == 0
  assert predict(run, path, tmp_path / 'o.jsonl') == 0
  weights = run / 'model' / 'model.safetensors'
  os.utime(weights, (1, 1))
  assert predict(run, path, tmp_path / 'o.jsonl') == 2
  assert 'begun with other settings (files)' in capsys.readouterr().err


def test_a_run_killed_before_it_has_caught_up_loses_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(predict_lib, 'CHUNK', 1)
  path, out, seen = tmp_path / 'a.txt', tmp_path / 'out.jsonl', []

  def run(text, stop):
    def answer(items):
      if items[0][0] == stop:
        raise KeyboardInterrupt
      seen.append(items[0][0])
      return [{'result': items[0][0]}]

    path.write_text(text)
    return predict_lib.answer_file(answer, path, out, ['text'], {})

  for text, stop in (('a\nb\nc\nd\n', 'd'), ('a\nB\nc\nd\n', 'B')):
    with pytest.raises(KeyboardInterrupt):
      run(text, stop)
  assert run('a\nB\nc\nd\n', '') == 4
  assert seen == ['a', 'b', 'c', 'B', 'd']
  assert [line['result'] for line in lines(out)] == ['a', 'B', 'c', 'd']


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.xlsx', b'', r'tables end in .csv, .tsv, .txt'),
    ('a.csv', b'id,body\n1,x\n', r"a.csv has no column 'text'; it has \['body', 'id'\]"),
    ('a.txt', b'fine\n\xff\xfe\n', r'a.txt:2: not UTF-8 text'),
    ('a.parquet', b'none', r'a.parquet is not a complete Parquet file'),
    ('a.csv', b'text\n"open', r'a.csv:2: no CSV \(unexpected end of data'),
  ],
)
def test_broken_files_are_named_with_the_row(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(predict_lib.read_items(tmp_path / name, ['text']))


def test_files_without_a_header_and_other_delimiters_are_answered(folder, tmp_path):
  (tmp_path / 'a.txt').write_text('1;the name\n2;of a class\n', encoding='utf-16')
  (tmp_path / 'b.txt').write_text('the name\nof a class\n')
  flags = ['--columns=1', '--delimiter=semicolon', '--encoding=utf-16']
  assert predict(folder, tmp_path / 'a.txt', tmp_path / 'a.jsonl', *flags) == 0
  assert predict(folder, tmp_path / 'b.txt', tmp_path / 'b.jsonl') == 0
  renamed = (tmp_path / 'a.jsonl').read_bytes().replace(b'"input": {"1": ', b'"input": {"text": ')
  assert renamed == (tmp_path / 'b.jsonl').read_bytes()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'predict needs --model=DIR, and --text'),
    (['--do=tags'], 'predict needs --model=DIR, and --text'),
    (['--do=tag', '--text=a'], 'needs a model with a tagging head; this one has the heads class'),
    (['--do=tags', '--text=a'], "there is no 'tags'; choose from fill_mask"),
    (['--do=answer', '--text=a'], 'needs a model with a span head'),
    (['--do=embed', '--text=a', '--top_k=3'], "embed has no option 'top_k'; it has pooling"),
    (['--do=embed', '--text=a', '--pooling=max'], "pooling must be one of ('mean',"),
    (['--do=embed', '--text='], 'predict needs --model=DIR'),
    (['--do=embed', '--text= '], 'a text is empty'),
    (['--do=embed', '--text=a', '--pair=b'], 'embed takes one text for each item, got 2'),
    (['--do=classify', '--pair=b'], 'a text is empty'),
    (['--do=nearest', '--text=a'], 'nearest, and only nearest, needs --corpus'),
    (['--do=embed', '--input=no.txt', '--out=o.jsonl'], 'no file no.txt'),
    (['--do=embed', '--input=a', '--out=README.jsonl', '--model=no'], 'no file a'),
    (['--do=embed', '--input=no.txt', '--out=o.tsv'], 'must be a local file that ends in'),
    (['--do=embed', '--input=a.txt', '--out=gs://b/o.jsonl'], 'must be a local file'),
    (['--do=embed', '--text=a', '--long=cut'], "long must be 'refuse' or 'window', got 'cut'"),
  ],
)
def test_mistakes_end_in_a_sentence(folder, capsys, arguments, message):
  assert main(['predict', f'--model={folder}', *arguments]) == 2
  error = capsys.readouterr().err
  assert message in error and 'Traceback' not in error


def test_a_pair_is_answered_on_the_spot(folder, capsys):
  arguments = ['--do=classify', '--text=the name', '--pair=of a class', '--batch_size=4']
  assert main(['predict', f'--model={folder}', *arguments]) == 0
  found = json.loads(capsys.readouterr().out)
  expected = Predictor.from_dir(folder).classify('the name', 'of a class')
  assert found['scores'] == pytest.approx(expected.scores, abs=1e-5)


def test_answers_are_as_long_as_max_answer(tmp_path, vocab, capsys):
  bert, params, tokenizer = model(vocab, 'span')
  save_model(tmp_path, bert, params, tokenizer)
  pair = ['--text=what is it', '--pair=the name of the class or None of the name']
  assert main(['predict', f'--model={tmp_path}', *pair, '--max_answer=1']) == 0
  found = json.loads(capsys.readouterr().out)
  assert {len(tokenizer.encode(entry['text'])[0]) for entry in found['nbest']} == {1}
  assert main(['predict', f'--model={tmp_path}', *pair]) == 0
  longer = json.loads(capsys.readouterr().out)
  assert max(len(tokenizer.encode(entry['text'])[0]) for entry in longer['nbest']) > 1


@pytest.mark.e2e
def test_every_call_is_answered_in_plain_json(vocab):
  tokenizer = Tokenizer.from_file(vocab)
  items = {
    'answer': ('the name?', 'the name of a class'), 'choose': ('a', 'b', 'c'),
    'rerank': ('a', 'b', 'c'), 'next_sentence': ('a', 'b'), 'fill_mask': ('a [MASK]',),
    'infill': ('a [MASK]',),
  }  # fmt: skip
  heads = ('mlm', 'nsp', 'classification', 'span', 'choice')
  full = Predictor(*model(vocab, *heads), batch_size=4)
  tagger = Predictor(*model(vocab, 'tagging'), batch_size=4)
  causal = Predictor(*model(vocab, 'mlm', causal=True))
  reranker = Predictor(*model(vocab, 'classification', labels=1))
  assert full.tokenizer.vocab == tokenizer.vocab
  for do in CALLS:
    item = items.get(do, ('the name of a class.',))
    options = {'nearest': {'corpus': ['a', 'b']}, 'continue': {'max_new_tokens': 3}}.get(do, {})
    predictor = {'tag': tagger, 'continue': causal, 'rerank': reranker}.get(do, full)
    predictor.check_call(do, len(item), options)
    [one] = predictor.call(do, [item], options)
    assert json.loads(json.dumps(one, allow_nan=False)) == one, do
  with pytest.raises(ValueError, match='choose takes 3 to 100 texts for each item, got 1'):
    full.check_call('choose', 1, {})


@pytest.mark.e2e
def test_predicting_needs_no_tensorflow(folder, tmp_path):
  code = (
    'import sys; sys.modules["tensorflow"] = None\n'
    'from bertjax.__main__ import main\n'
    f'sys.exit(main(["predict", "--model={folder}", "--do=nearest", "--text=the name", '
    f'"--corpus={tmp_path}/faq.txt", "--top_k=1"]))'
  )
  (tmp_path / 'faq.txt').write_text('a class\nthe name\n')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  [hit] = json.loads(done.stdout)
  assert (hit['number'], hit['text']) == (1, 'the name')
