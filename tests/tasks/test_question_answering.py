"""SQuAD: windows, labels, answers to the letter, n-best lists, null odds, the official files."""

import functools
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax import TASKS, Tokenizer
from bertjax.data.sentencepiece import train_sentencepiece
from bertjax.data.tokenizer import SPECIAL_TOKENS
from bertjax.tasks import question_answering
from bertjax.tasks.task import Example
from tests import chinese

WORDS = [f'w{i}' for i in range(40)]
TOKENIZER = Tokenizer([*SPECIAL_TOKENS, 'q', *WORDS, '##1', '-', ',', '1895', '1943', '(', ')'])


def words(*numbers):
  return ' '.join(f'w{i}' for i in numbers)


IDS = itertools.count()


def ask(context, answer=None, question='q'):
  label = None if answer is None else ((answer, context.index(answer)),) if answer else ()
  return Example(str(next(IDS)), (question, context), label)


def encode(items, length=10, stride=3):
  return question_answering.encode(items, TOKENIZER, length, stride=stride, max_query=2)


def gold_logits(encoded):
  """Logits that put all weight on the labels."""
  labels = encoded.columns['labels']
  logits = np.zeros((len(labels), encoded.columns['input_ids'].shape[1], 2))
  for row, (start, end) in zip(logits, labels, strict=True):
    row[start, 0] = row[end, 1] = 9 if start else 1
  return logits


def test_a_long_context_is_read_in_windows_as_in_googles_code():
  encoded = encode([ask(words(*range(9)), 'w7')])
  rows = [TOKENIZER.decode(row) for row in encoded.columns['input_ids']]
  assert rows == [f'[CLS] q [SEP] {words(*range(first, first + 6))} [SEP]' for first in (0, 3)]
  assert encoded.columns['ends'].tolist() == [[[3, 10]]] * 2
  assert encoded.columns['labels'].tolist() == [[0, 0], [7, 7]]  # outside: [CLS]
  assert encoded.counts == {'features': 2, 'truncated_questions': 0, 'answers_outside': 0}


@pytest.mark.parametrize(
  'tokens, stride, firsts',
  [(6, 3, [0]), (7, 3, [0, 3]), (14, 3, [0, 3, 6, 9]), (14, 9, [0, 6, 12])],
)
def test_windows_start_a_stride_apart_and_never_skip_a_token(tokens, stride, firsts):
  windows = list(question_answering._windows(tokens, 6, stride))
  assert [first for first, _ in windows] == firsts
  assert windows[-1][0] + windows[-1][1] == tokens


def test_a_token_counts_where_it_has_most_context():
  encoded = encode([ask(words(*range(9)))])
  seen = question_answering._max_context(encoded.alignment)
  # Tokens 3, 4 and 5 are in both windows; 4 has one neighbour more in the first than 5, and so on.
  assert seen.tolist() == [0] * 5 + [1] * 4


def test_a_longer_window_counts_a_hundredth_for_each_token():
  encoded = question_answering.encode(
    [ask(words(*[1] * 382))], TOKENIZER, 385, stride=128, max_query=64
  )
  assert [(w.first, w.count) for w in encoded.alignment] == [(0, 381), (128, 254)]
  # Of token 300 the first window shows 80 after it, the second 81: 80 + 3.81 > 81 + 2.54.
  assert question_answering._max_context(encoded.alignment)[300] == 0


def test_answers_are_the_tightest_tokens_around_the_characters():
  items = [ask('w1 (1895-1943) w2', '1895'), ask('w1 w2', ' w2'), ask('w1 w21 w3', '1')]
  items[2] = items[2]._replace(label=(('21', 4),))
  encoded = encode(items, 12)
  ids, labels = encoded.columns['input_ids'], encoded.columns['labels']
  assert [TOKENIZER.decode(row[a : b + 1]) for row, (a, b) in zip(ids, labels, strict=True)] == [
    '1895', 'w2', 'w21'
  ]  # fmt: skip


def test_an_answer_longer_than_all_windows_is_counted():
  encoded = encode([ask(words(*range(12)), words(*range(1, 9)))])
  assert not encoded.columns['labels'].any() and encoded.counts['answers_outside'] == 1


def test_long_questions_are_truncated_and_counted():
  encoded = encode([ask('w1', question='q q q')])
  assert encoded.counts['truncated_questions'] == 1
  assert TOKENIZER.decode(encoded.columns['input_ids'][0][:6]) == '[CLS] q q [SEP] w1 [SEP]'
  for length, stride in ((5, 3), (10, 0)):
    with pytest.raises(ValueError, match='windows need length > max_query'):
      encode([ask('w1')], length, stride)


def test_the_answer_is_a_slice_of_the_original_context():
  item = ask('  W1,\u00a0 w2\u00ad (w3)  w4', 'w2\u00ad (w3)')
  encoded = encode([item], 16)
  [answer] = question_answering.decode([item], encoded, gold_logits(encoded), version_2=False)
  assert answer.text in ('w2\u00ad (w3', 'w2\u00ad (w3)') and answer.text == 'w2\u00ad (w3)'
  assert question_answering.score([item], [answer], version_2=False) == {'exact': 1.0, 'f1': 1.0}


def naive(item, encoded, logits, size, max_answer):
  """The texts of the n-best list without a null answer."""
  return [text for _, text in naive_scores(item, encoded, logits, size, max_answer)][:size]


def naive_scores(item, encoded, logits, size, max_answer):
  """Google's get_predictions as plain loops; returns each text with its best score, by score."""
  found = []
  windows = encoded.alignment
  for window, row in zip(windows, logits, strict=True):
    tops = [sorted(range(len(row)), key=lambda i, s=s: -row[i, s])[:size] for s in (0, 1)]
    for start in tops[0]:
      for end in tops[1]:
        inside = window.place <= start <= end < window.place + window.count
        if not inside or end - start + 1 > max_answer:
          continue
        token = start - window.place + window.first
        scores = [
          min(token - w.first, w.first + w.count - 1 - token) + 0.01 * w.count
          if w.first <= token < w.first + w.count else -1
          for w in windows
        ]  # fmt: skip
        if windows[scores.index(max(scores))] is window:
          last = end - window.place + window.first
          text = item.texts[1][window.offsets[token, 0] : window.offsets[last, 1]]
          found.append((row[start, 0] + row[end, 1], text))
  found.sort(key=lambda entry: -entry[0])
  best = {}
  for score, text in found:
    best.setdefault(text, score)
  return [(score, text) for text, score in best.items()]


@given(st.integers(1, 20), st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_the_n_best_list_is_googles(tokens, seed, size, max_answer):
  item = ask(words(*range(tokens)))
  encoded = encode([item])
  logits = np.random.default_rng(seed).normal(size=(len(encoded.alignment), 10, 2))
  [answer] = question_answering.decode(
    [item], encoded, logits, version_2=False, size=size, max_answer=max_answer
  )
  expected = naive(item, encoded, logits, size, max_answer)
  assert [entry['text'] for entry in answer.nbest] == (expected or [''])
  assert answer.text == answer.best == (expected or [''])[0]
  assert sum(entry['probability'] for entry in answer.nbest) == pytest.approx(1)
  [answer] = question_answering.decode(
    [item], encoded, logits, version_2=True, size=size, max_answer=max_answer
  )
  null = min(row[0].sum() for row in logits)
  best = {text: score for score, text in naive_scores(item, encoded, logits, size, max_answer)}
  ranked = sorted([*best, ''], key=lambda text: -best.get(text, null))[:size]
  assert [entry['text'] for entry in answer.nbest] == list(dict.fromkeys([*ranked, '']))


def test_no_answer_is_given_above_the_threshold_of_the_null_odds():
  item = ask('w1 w2', 'w1')
  encoded = encode([item], 8)
  logits = np.zeros((1, 8, 2))
  logits[0, 0] = 2, 1.5  # null: 3.5
  logits[0, 3] = 2, 1  # w1: 3
  for threshold, text in ((0.0, ''), (0.4, ''), (0.5, 'w1'), (1.0, 'w1')):
    [answer] = question_answering.decode([item], encoded, logits, threshold, version_2=True)
    assert (answer.text, answer.best, answer.null_odds) == (text, 'w1', 0.5)
  total = sum(np.exp([0, 3 - 3.5, 2 - 3.5, 0 - 3.5]))  # null, w1, w1 w2, w2
  assert answer.nbest[0] == {
    'text': '', 'probability': pytest.approx(1 / total), 'start_logit': 2.0, 'end_logit': 1.5
  }  # fmt: skip
  [plain] = question_answering.decode([item], encoded, logits, version_2=False)
  assert plain.text == 'w1' and '' not in [entry['text'] for entry in plain.nbest]


def test_the_null_score_is_the_least_of_all_windows():
  item = ask(words(*range(9)))
  encoded = encode([item])
  logits = np.zeros((2, 10, 2))
  logits[:, 0] = [[5, 5], [1, 2]]
  [answer] = question_answering.decode([item], encoded, logits, version_2=True)
  assert answer.null_odds == 3


def answer(text, odds, best=None):
  return question_answering.Answer(text, best or text, odds, [])


def test_scores_of_version_2_and_its_best_threshold():
  items = [ask('w1 w2', 'w1'), ask('w1 w2', 'w2'), ask('w1 w2', ''), ask('w1 w2', '')]
  found = [answer('w1', -3), answer('', 1, 'w1 w2'), answer('w1', -1), answer('', 2, 'w2')]
  scores = question_answering.score(items, found, version_2=True)
  assert scores['exact'] == 0.5 and scores['f1'] == 0.5
  assert scores['has_answer_exact'] == scores['no_answer_f1'] == 0.5
  # Refusing all but the first: right are 1, 3 and 4.
  assert (scores['best_f1'], scores['best_f1_threshold']) == (0.75, -3)
  assert (scores['best_exact'], scores['best_exact_threshold']) == (0.75, -3)


def file_of(*questions, context='w1 w2'):
  paragraphs = [{'context': context, 'qas': list(questions)}]
  return {'version': '2', 'data': [{'title': 't', 'paragraphs': paragraphs}]}


def question(answer='w2', start=3, **changes):
  answers = [{'text': answer, 'answer_start': start}]
  return {'id': 'x7', 'question': 'q', 'answers': answers} | changes


@pytest.mark.parametrize(
  'content, message',
  [
    (file_of(question(answers=[])), r'question x7 has no answer; that is for squad2'),
    (file_of(question(question=' ')), r'question x7: the question is empty'),
    (file_of(question(), context=''), r'question x7: the context is empty'),
    (file_of(question(answers=[{'text': ' '}])), r'x7: an answer must have a text; no answer is'),
    (file_of(question(answers=['w2'])), r'x7: an answer must have a text'),
    (file_of({'id': 'x7', 'question': 'q'}), r'x7 has no list of answers; only the split test may'),
    ({'data': [{'paragraphs': [{'qas': [question()]}]}]}, r"f.json is not in SQuAD's .*'context'"),
    ([1], r"f.json is not in SQuAD's format"),
    ({'data': []}, r'f.json holds no questions'),
  ],
)
def test_bad_files_are_named_with_the_question(tmp_path, content, message):
  (tmp_path / 'f.json').write_text(json.dumps(content))
  with pytest.raises(ValueError, match=message):
    TASKS['squad1'](str(tmp_path), files={'train': 'f.json'}).read('train')


TOWER = 'The  tower was finished in 1889 by a company in Lyon.'


def read_questions(folder, *answers, context=TOWER, split='dev', name='squad1', **changes):
  """The questions of a file, one for each answer (text, answer_start), None = no answer_start."""
  entries = [
    {'id': f'q{i}', 'question': 'When?',
     'answers': [{'text': text} | ({} if start is None else {'answer_start': start})]} | changes
    for i, (text, start) in enumerate(answers)
  ]  # fmt: skip
  (folder / 'f.json').write_text(json.dumps(file_of(*entries, context=context)))
  return TASKS[name](str(folder), files={split: 'f.json'}).read(split)


@pytest.mark.parametrize(
  'text, start, found',
  [
    ('1889', 27, ('1889', 27)),
    ('1889', 28, ('1889', 27)),  # off by one, within the word
    ('1889', 26, ('1889', 27)),  # off by one, at the blank before it
    ('The tower', 0, ('The  tower', 0)),  # the file's text has one blank of two
    ('Lyon.', 48, ('Lyon.', 48)),
    ('Lyon', 51, ('Lyon', 48)),  # its end would be behind the context's
    ('1889', 40, ('1889', -1)),  # other words
    ('1889', None, ('1889', -1)),
    ('1889', -1, ('1889', -1)),
    ('1889', 999, ('1889', -1)),
    ('1890', 27, ('1890', -1)),
  ],
)
def test_an_answer_beside_its_start_is_found_as_in_run_squad(tmp_path, caplog, text, start, found):
  [item] = read_questions(tmp_path, (text, start))
  assert item.label == (found,)
  told = 'f.json: answers of 1 questions were found beside their answer_start' in caplog.text
  assert told == (found[1] not in (start, -1))
  assert found[1] < 0 or TOWER[found[1] :].startswith(found[0])


def test_of_equal_answers_in_one_clause_the_nearest_is_taken(tmp_path):
  context = '塔于1889年完工，1889年开放。'  # without white space the clause is one word
  starts = [read_questions(tmp_path, ('1889', n), context=context)[0].label[0][1] for n in (1, 11)]
  assert starts == [2, 10]


def test_answers_without_a_place_are_scored_by_text_and_not_trained_on(tmp_path, caplog):
  items = read_questions(tmp_path, ('1889', None), ('in Paris', 24), ('Lyon', 48))
  found = [question_answering.Answer(text, text, 0.0, []) for text in ('1889', 'Lyon', 'a Lyon')]
  assert question_answering.score(items, found, version_2=False) == pytest.approx(
    {'exact': 2 / 3, 'f1': 2 / 3}
  )
  assert [item.id for item in question_answering.with_places(items)] == ['q2']
  assert '2 of 3 questions are skipped in training' in caplog.text
  assert "question q0, answer '1889'" in caplog.text
  encoded = encode(items, 12)
  assert encoded.columns['labels'].max(1).tolist()[:2] == [-1, -1]
  assert encoded.counts['answers_outside'] == 0
  with pytest.raises(ValueError, match='no training question has an answer'):
    question_answering.with_places(items[:2])


def test_questions_that_share_an_id_are_reported_and_scored_with_what_is_written(tmp_path, caplog):
  items = read_questions(tmp_path, ('1889', 27), ('Lyon', 48), id='q1')
  assert "f.json: 1 ids belong to several questions (the first is 'q1')" in caplog.text
  found = [question_answering.Answer(text, text, 0.0, []) for text in ('1889', 'Lyon')]
  paths = question_answering.write(tmp_path, 'dev', items, found, version_2=False)
  assert json.loads(paths[0].read_text()) == {'q1': 'Lyon'}
  assert question_answering.score(items, found, version_2=False)['exact'] == 0.5


def test_a_test_split_may_have_empty_answers(tmp_path):
  [item] = read_questions(tmp_path, ('x', 0), split='test', answers=[])
  assert item.label is None
  [item] = read_questions(tmp_path, ('x', 0), split='test', name='squad2', answers=[])
  assert item.label == ()


def test_a_file_that_is_no_json_is_named(tmp_path):
  (tmp_path / 'dev-v1.1.json').write_text('{')
  with pytest.raises(ValueError, match=r'dev-v1.1.json holds no JSON'):
    TASKS['squad1'](str(tmp_path)).read('dev')
  with pytest.raises(ValueError, match=r"there is no split 'test'; there are \('train', 'dev'\)"):
    TASKS['squad1'](str(tmp_path)).read('test')


REAL = {  # file: (version 2, questions, with answer, answers recovered to the letter)
  'train-v1.1-first12articles.json': (False, 4370, 4370, 4343),
  'dev-v1.1-first24articles.json': (False, 5696, 5696, 5669),
  'dev-v2.0-excerpt-3articles.json': (True, 950, 473, 473),
}


@pytest.mark.data
@pytest.mark.parametrize('name', REAL)
@pytest.mark.e2e
def test_labelled_spans_of_real_files_decode_to_the_labelled_answers(data_dir, tmp_path, name):
  version_2, questions, answerable, verbatim = REAL[name]
  task = TASKS[f'squad{1 + version_2}'](str(data_dir / 'squad'), files={'dev': name})
  items = task.read('dev')
  tokenizer = Tokenizer.from_file(data_dir / 'vocab' / 'bert-base-uncased-vocab.txt')
  encoded = task.encode(items, tokenizer, 384)
  answers = question_answering.decode(
    items, encoded, gold_logits(encoded), version_2=version_2, max_answer=384
  )
  labels = [item.label[0][0].strip() if item.label else '' for item in items]
  right = [a.text == label for a, label in zip(answers, labels, strict=True)]
  assert len(items) == questions and sum(map(bool, labels)) == answerable
  assert sum(right) == verbatim + questions - answerable
  for a, label in zip(answers, labels, strict=True):  # the rest begins or ends within a token
    assert label in a.text and len(a.text) - len(label) <= 12
  paths = task.write(tmp_path, 'dev', items, answers)
  names = ['predictions', 'nbest_predictions'] + ['null_odds'] * version_2
  assert [path.name for path in paths] == [f'{name}.json' for name in names]
  official = json.loads(paths[0].read_text())
  assert official == {item.id: a.text for item, a in zip(items, answers, strict=True)}
  assert task.score(items, answers)[task.metric] > 0.99


@pytest.mark.data
@pytest.mark.e2e
def test_training_labels_are_those_of_run_squad_but_for_answers_within_a_token(data_dir):
  tokenizer = Tokenizer.from_file(data_dir / 'vocab' / 'bert-base-uncased-vocab.txt')
  compared, differ = 0, []
  for name, (version_2, *_) in REAL.items():
    task = TASKS[f'squad{1 + version_2}'](str(data_dir / 'squad'), files={'dev': name})
    items = [item for item in task.read('dev') if item.label]
    encoded = task.encode(items, tokenizer, 1000, stride=900)  # a window holds any context
    shift = [window.place for window in encoded.alignment]
    spans = (encoded.columns['labels'] - np.array(shift)[:, None]).tolist()
    for item, ours in zip(items, spans, strict=True):
      theirs, found = run_squad_span(tokenizer, item.texts[1], *item.label[0])
      compared += 1
      if ours != theirs:
        differ.append(found)
        assert theirs[0] <= ours[0] <= ours[1] <= theirs[1] or found
  assert (compared, len(differ), sum(differ)) == (10_539, 23, 2)


def run_squad_span(tokenizer, context, answer, start):
  """Whole words first, then `_improve_answer_span`; and whether that found the answer."""
  word_of, tokens, ends = pieces_of_words(tokenizer, context)
  first, last = ends[word_of[start]], ends[word_of[start + len(answer) - 1] + 1] - 1
  wanted = tokenizer.encode([answer])[0]
  for i in range(first, last + 1):
    if tokens[i : i + len(wanted)] == wanted and i + len(wanted) - 1 <= last:
      return [i, i + len(wanted) - 1], True
  return [first, last], False


@functools.cache
def pieces_of_words(tokenizer, context):
  """The word of each character, all tokens, and the index of each word's first token."""
  spaces = [c in ' \t\r\n\u202f' for c in context]
  begins = [not s and (i == 0 or spaces[i - 1]) for i, s in enumerate(spaces)]
  words = re.split('[ \t\r\n\u202f]+', context.strip(' \t\r\n\u202f'))
  pieces = tokenizer.encode(words)
  tokens = [token for word in pieces for token in word]
  return (np.cumsum(begins) - 1).tolist(), tokens, np.cumsum([0, *map(len, pieces)]).tolist()


def test_chinese_answers_are_found_in_unsegmented_text_and_scored_by_characters(tmp_path):
  (tmp_path / 'dev.json').write_text(json.dumps(chinese.questions(30)), encoding='utf-8')
  files = {'dev': 'dev.json'}
  task = TASKS['squad1'](str(tmp_path), files=files, scorer='cmrc2018')
  items = task.read('dev')
  letters = sorted({c for item in items for text in item.texts for c in text})
  spiece = train_sentencepiece([text for item in items for text in item.texts], 150)
  for tokenizer, least in ((Tokenizer([*SPECIAL_TOKENS, *letters]), 1), (Tokenizer(spiece), 0.8)):
    encoded = task.encode(items, tokenizer, 96)
    assert encoded.counts['answers_outside'] == 0
    found = task.decode(items, encoded, gold_logits(encoded))
    for item, prediction in zip(items, found, strict=True):
      assert item.label[0][0] in prediction.text and prediction.text in item.texts[1]
    scores = task.score(items, found)
    assert scores['f1'] >= scores['exact'] and scores['f1'] >= least
  almost = [prediction._replace(text=f'《{prediction.text}》。') for prediction in found]
  assert task.score(items, almost) == scores
  for options, longest in (({}, 30), ({'scorer': 'cmrc2018'}, 50), ({'max_answer': 7}, 7)):
    assert TASKS['squad1'](files=files, **options).decode.keywords['max_answer'] == longest
  words = TASKS['squad1'](str(tmp_path), files=files)
  assert words.score(items, almost)['f1'] == 0  # a clause is one word there
  with pytest.raises(ValueError, match=r"scorer must be one of \('squad', 'cmrc2018'\), got 'f1'"):
    TASKS['squad1'](str(tmp_path), scorer='f1')


def test_no_answer_is_right_under_cmrc_scoring_too():
  items = [ask('w1 w2', 'w1'), ask('w1 w2', '')]
  scores = question_answering.score(
    items, [answer('w1', -3), answer('。', 1)], version_2=True, scorer='cmrc2018'
  )
  assert scores['exact'] == scores['f1'] == 1
