"""`bertjax vocab` and the corpus report: exact counts, any number of workers, advice for people."""

import itertools
import json
import os
import random
import subprocess
import sys

import pytest

from bertjax import vocab as program
from bertjax.__main__ import main
from bertjax.data import text as text_lib
from bertjax.data import vocabulary
from bertjax.data import workers as worker_lib
from bertjax.data.tokenizer import Tokenizer


def test_units_come_in_order_and_hold_every_text_once(monkeypatch):
  monkeypatch.setattr(worker_lib, '_UNIT', 10)
  texts = [str(i) * 3 for i in range(100)]
  units = worker_lib.map_units(list, iter(texts), workers=2)
  assert list(itertools.chain.from_iterable(units)) == texts
  assert list(worker_lib.map_units(list, [], workers=2)) == []


def command(*flags, seed='1'):
  environment = os.environ | {'PYTHONHASHSEED': seed}
  arguments = [sys.executable, '-m', 'bertjax', 'vocab', *flags]
  return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
  'kind, name, flags',
  [
    ('wordpiece', 'vocab.txt', ['--max_words=1000']),
    ('sentencepiece', 'spiece.model', []),
    ('bpe', 'tokenizer.json', []),
  ],
)
def test_two_processes_write_the_same_file_of_the_size_asked_for(
  corpus, tmp_path, kind, name, flags
):
  flags = [f'--input={corpus}', '--size=700', f'--kind={kind}', *flags]
  for seed in ('1', '2'):
    command(f'--out={tmp_path}/{seed}/{name}', *flags, seed=seed)
  one, two = (tmp_path / seed / name for seed in ('1', '2'))
  assert one.read_bytes() == two.read_bytes()
  tokenizer = Tokenizer.from_file(one, lowercase=kind != 'bpe')
  assert (tokenizer.vocab_size, tokenizer.kind) == (700, kind)
  assert sorted(path.name for path in tmp_path.rglob('*')) == ['1', '2', name, name]


@pytest.mark.parametrize('kind', ['wordpiece', 'sentencepiece'])
def test_every_character_that_occurs_twice_has_an_entry(tmp_path, kind, capsys):
  often, rng = [chr(0x4E00 + i) for i in range(1200)], random.Random(0)
  twice, once = ([chr(first + i) for i in range(100)] for first in (0x6000, 0x7000))
  lines = [''.join(rng.sample(often, 100)) + '。' for _ in range(720)]
  text = '\n'.join([*lines, *twice, *twice, *once])
  (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
  out = tmp_path / ('v.txt' if kind == 'wordpiece' else 'v.model')
  flags = [f'--input={tmp_path}/a.txt', '--size=1405', f'--out={out}', f'--kind={kind}']
  assert main(['vocab', *flags]) == 0
  vocab = set(Tokenizer.from_file(out).vocab)
  assert vocab.issuperset([*often, *twice]) and vocab.isdisjoint(once)
  assert '0.14% [UNK]' in capsys.readouterr().out


def test_training_prints_a_report_and_keeps_it_as_json(corpus, tmp_path, capsys):
  report = tmp_path / 'new' / 'report.json'
  flags = [f'--input={corpus}', '--size=700', f'--out={tmp_path}/v.txt', f'--report_file={report}']
  assert main(['vocab', *flags]) == 0
  told, facts = capsys.readouterr().out, json.loads(report.read_text())
  assert f'{facts["documents"]} documents, {facts["sentences"]:,} sentences' in told
  assert facts['documents'] == 40 and '0 documents have the very text' in told
  assert (
    facts['nsp'] is True and '40 documents have two sentences or more: --config.nsp=True' in told
  )
  assert facts['count_error'] == 0 and 'pruned' not in told
  assert '[UNK]  ' not in told and 'case  ' not in told
  again = tmp_path / 'again.json'  # the same for a vocabulary that exists
  flags = [f'--input={corpus}', f'--vocab={tmp_path}/v.txt', f'--report_file={again}']
  assert main(['vocab', *flags]) == 0
  assert capsys.readouterr().out == told and json.loads(again.read_text()) == facts


def test_invalid_bytes_and_rows_without_text_are_counted_as_prepare_counts_them(
  vocab, tmp_path, caplog
):
  (tmp_path / 'a.txt').write_bytes('An old café. A naïve résumé.'.encode('latin-1'))
  (tmp_path / 'b.jsonl').write_text('{"text": null}\n{"text": "One. Two."}')
  report = tmp_path / 'a.json'
  program.run(input=f'{tmp_path}/a.txt', vocab=str(vocab), report_file=str(report))
  assert json.loads(report.read_text())['invalid_utf8'] == 4
  assert '4 invalid byte sequences' in caplog.text and '--encoding=cp1252' in caplog.text
  options = {'input': f'{tmp_path}/a.txt', 'vocab': str(vocab), 'encoding': 'latin-1'}
  program.run(**options, report_file=f'{tmp_path}/b.json')
  assert json.loads((tmp_path / 'b.json').read_text())['invalid_utf8'] == 0
  options = {'input': f'{tmp_path}/b.jsonl', 'vocab': str(vocab), 'format': 'jsonl'}
  program.run(**options, on_bad_row='skip', report_file=f'{tmp_path}/c.json')
  assert json.loads((tmp_path / 'c.json').read_text())['bad_rows'] == 1


def test_a_vocabulary_of_chinese_holds_its_characters(tmp_path):
  letters = [chr(0x4E00 + i) for i in range(3000)]
  text = ''.join(f'{a}{b}。' for a, b in zip(letters, reversed(letters), strict=True))
  (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
  report, options = tmp_path / 'r.json', {'input': f'{tmp_path}/a.txt', 'out': f'{tmp_path}/v.txt'}
  with pytest.raises(ValueError, match=r'for its 3001 characters .* choose a size of at most 3105'):
    program.run(**options, size=4000)
  program.run(**options, size=3105, report_file=str(report))
  facts = json.loads(report.read_text())
  assert (facts['unknown'], facts['words'], facts['sentences']) == (0, 6000, 3000)


def test_the_report_has_the_pruning(corpus, tmp_path, capsys):
  program.run(input=str(corpus), out=f'{tmp_path}/v.txt', size=700, max_words=1000)
  assert 'pruned      --max_words was reached: counts are up to' in capsys.readouterr().out


@pytest.mark.parametrize(
  'trained, read, reported',
  [
    (True, False, 'the vocabulary does not fit; it has no capitals: --lowercase?'),
    (False, True, 'entries have capitals and are never used with --lowercase'),
    (False, False, None),
    (True, True, None),
  ],
)
def test_a_vocabulary_of_the_other_case_is_noticed(
  corpus, tmp_path, capsys, trained, read, reported
):
  path = f'{tmp_path}/v.txt'
  program.run(input=str(corpus), out=path, size=700, lowercase=trained, report=False)
  assert capsys.readouterr().out == ''  # no report unless asked for
  program.run(input=str(corpus), vocab=path, lowercase=read)
  out = capsys.readouterr().out
  assert (
    reported in out
    if reported
    else not {'[UNK]  ', 'case  '} & {line[:7] for line in out.split('\n')}
  )


def test_documents_of_one_sentence_are_no_food_for_next_sentence_prediction(
  vocab, tmp_path, capsys
):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "Only this."}\n' * 5 + '{"text": "Two. Sentences."}\n' * 3)
  program.run(input=str(path), format='jsonl', vocab=str(vocab))
  out = capsys.readouterr().out
  assert '3 documents have two sentences or more: --config.nsp=False' in out
  assert '6 documents have the very text of an earlier one' in out


@pytest.mark.parametrize(
  'flags, message',
  [
    ([], 'vocab needs either --out=FILE to train one, or --vocab=FILE'),
    (['--out=/tmp/v', '--vocab=/tmp/v'], 'vocab needs either'),
    (['--out=/tmp/v', '--kind=word'], "--kind must be one of .*'sentencepiece'.*got 'word'"),
    (['--out=/tmp/v', '--kind=bpe'], r'BPE tokenizer, .* is named \*.json; got .* --out=/tmp/v'),
    (['--out=/tmp/v.json'], r'is named \*.json; got --kind=wordpiece --out=/tmp/v.json'),
    pytest.param(  # after the text is read
      ['--out=/tmp/v.json', '--kind=bpe', '--size=9'],
      'needs a size of at least 261, got 9',
      marks=pytest.mark.e2e,
    ),
    (['--out=/tmp/v', '--kind=sentencepiece'], r'is named \*.model; got .* --out=/tmp/v'),
    (['--out=/tmp/v.model'], r'is named \*.model; got --kind=wordpiece --out=/tmp/v.model'),
    (['--out=/tmp/v', '--lowercase=upper'], "--lowercase takes bool, such as True; got 'upper'"),
    (['--out=/tmp/v', '--noreport', '--report_file=r'], '--noreport .* with --report_file'),
    (['--out=/tmp/v', '--max_words=5'], '--max_words must be at least --size=30522, got 5'),
    (['--vocab=/tmp/v', '--noreport'], '--noreport leaves nothing to do with --vocab'),
    (['--vocab=/no/such'], 'no vocabulary file /no/such'),
    ([f'--out={__file__}'], 'exists already; remove it or choose another --out'),
    (['--vocab=/tmp/v', f'--report_file={__file__}'], 'exists already; .* another --report_file'),
    (['--out=/no/v', '--input=/no/such.txt'], 'no such file or folder'),
  ],
)
def test_wrong_flags_raise_one_sentence(capsys, flags, message):
  assert main(['vocab', '--input=embedded', *flags]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  with pytest.raises(ValueError, match=message):
    raise ValueError(error)


def test_text_without_words_gets_one_sentence(tmp_path, vocab):
  (tmp_path / 'a.txt').write_text(' \n')
  with pytest.raises(ValueError, match='the input has no text'):
    program.run(input=str(tmp_path / 'a.txt'), vocab=str(vocab))


@pytest.mark.data
def test_google_s_uncased_vocabulary_fits_wikitext_and_not_with_case(data_dir):
  path = data_dir / 'vocab' / 'bert-base-uncased-vocab.txt'
  texts = list(text_lib.read_documents(str(data_dir / 'wikitext-2'), 'wikitext'))
  lower, keep = (
    vocabulary.describe(texts, path, format='wikitext', lowercase=case) for case in (True, False)
  )
  assert lower['words'] == keep['words'] == 213_886
  assert lower['unknown'] < 50 and 0.11 < keep['unknown'] / keep['tokens'] < 0.13


@pytest.mark.data
@pytest.mark.e2e
def test_books_give_the_same_vocabulary_in_any_process_with_any_workers(data_dir, tmp_path):
  flags = [f'--input={data_dir}/books/[A-D]*', '--size=30522', '--noreport']  # two units
  for seed in ('1', '2'):
    command(f'--out={tmp_path}/{seed}', f'--workers={seed}', *flags, seed=seed)
  assert (tmp_path / '1').read_bytes() == (tmp_path / '2').read_bytes()
  assert Tokenizer.from_file(tmp_path / '1').vocab_size == 30522
