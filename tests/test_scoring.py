"""One name, one number: official-style scorers on the written files give the metrics reported.

The scorers here share no code with the package: scikit-learn, SciPy and seqeval, and SQuAD's two
evaluation scripts written again from their rules.
"""

import collections
import json
import re
import string

import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics
from scipy import stats

from bertjax import TASKS, Tokenizer
from bertjax.data.tokenizer import SPECIAL_TOKENS
from bertjax.scoring import decode_and_score

TOKENIZER = Tokenizer([*SPECIAL_TOKENS, *'abcdefghij', 'ada', 'lyon', 'the', ',', '.'])
COUNT = 40


def read_predictions(path):
  """The second column of a leaderboard file whose first one counts the examples."""
  head, *lines = path.read_text(encoding='utf-8').splitlines()
  rows = [line.split('\t') for line in lines]
  assert head == 'index\tprediction' and [row[0] for row in rows] == list(map(str, range(COUNT)))
  return [row[1] for row in rows]


def score_task(task, folder, logits):
  """(the reported scores, what was written) of logits for dev."""
  items = task.read('dev')
  encoded = task.encode(items, TOKENIZER, 32)
  predictions, scores = decode_and_score(task, items, encoded, logits(items, encoded))
  assert scores[task.metric] < 1
  return scores, task.write(folder, 'dev', items, predictions)


# GLUE: task -> (head of dev.tsv, its line with a label, the labels).
PAIR = 'sentence1\tsentence2'
GLUE = {
  'sst2': ('sentence\tlabel', 'a b\t{}', '01'),
  'cola': ('', 'x\t{}\t\ta b', '01'),
  'mrpc': ('Quality\t#1 String\t#2 String', '{}\ta\tb', '01'),
  'qqp': ('question1\tquestion2\tis_duplicate', 'a\tb\t{}', '01'),
  'wnli': (f'{PAIR}\tlabel', 'a\tb\t{}', '01'),
  'rte': (f'{PAIR}\tlabel', 'a\tb\t{}', ('entailment', 'not_entailment')),
  'qnli': ('question\tsentence\tlabel', 'a\tb\t{}', ('entailment', 'not_entailment')),
  'mnli': (f'{PAIR}\tgold_label', 'a\tb\t{}', ('entailment', 'neutral', 'contradiction')),
  'ax': ('Premise\tHypothesis\tLabel', 'a\tb\t{}', ('entailment', 'neutral', 'contradiction')),
  'stsb': (f'{PAIR}\tscore', 'a\tb\t{}', ()),
}
DEV = {'mnli': 'dev_matched.tsv', 'ax': 'diagnostic-full.tsv'}


@pytest.mark.parametrize('name', GLUE)
def test_glue(name, tmp_path):
  head, line, labels = GLUE[name]
  rng = np.random.default_rng(0)
  if labels:
    gold = [labels[n] for n in rng.integers(0, len(labels), COUNT)]
    logits = rng.normal(size=(COUNT, len(labels)))
  else:
    gold = [f'{x:.2f}' for x in rng.uniform(0, 5, COUNT)]
    logits = np.array(gold, float)[:, None] * 1.4 - 1 + rng.normal(size=(COUNT, 1))
    assert logits.min() < 0 and logits.max() > 5  # clipping makes ties, which change the ranks
  lines = [head] * bool(head) + [line.format(x) for x in gold]
  (tmp_path / DEV.get(name, 'dev.tsv')).write_text('\n'.join(lines) + '\n')
  scores, [path] = score_task(TASKS[name](str(tmp_path)), tmp_path, lambda *_: logits)
  assert scores == pytest.approx(official_glue(name, read_predictions(path), gold), abs=1e-12)


def official_glue(name, found, gold):
  if name == 'stsb':
    return correlations(found, gold)
  scores = {'accuracy': sklearn.metrics.accuracy_score(gold, found)}
  if name in ('cola', 'ax'):
    scores['matthews'] = sklearn.metrics.matthews_corrcoef(gold, found)
  if name in ('mrpc', 'qqp'):
    scores['f1'] = sklearn.metrics.f1_score(gold, found, pos_label='1')
  return scores


def correlations(found, gold):
  found, gold = np.array(found, float), np.array(gold, float)
  return {'pearson': stats.pearsonr(found, gold)[0], 'spearman': stats.spearmanr(found, gold)[0]}


@pytest.mark.parametrize('kind', ['class', 'regression', 'multilabel'])
def test_tables(kind, tmp_path):
  rng = np.random.default_rng(1)
  names = ['ham', 'spam', 'eggs']
  chosen = rng.random((COUNT, 3)) < 0.5
  gold = {
    'class': [names[n] for n in rng.integers(0, 3, COUNT)],
    'regression': rng.normal(size=COUNT).tolist(),
    'multilabel': [[n for n, yes in zip(names, row, strict=True) if yes] for row in chosen],
  }[kind]
  logits = rng.normal(size=(COUNT, 1 if kind == 'regression' else 3)).astype(np.float32)
  if kind == 'regression':  # six digits would make these equal
    logits[:2, 0] = np.float32(0.1234567), np.nextafter(np.float32(0.1234567), np.float32(1))
  lines = [json.dumps({'text': 'a b', 'label': label}) for label in gold]
  (tmp_path / 'dev.jsonl').write_text('\n'.join(lines))
  options = {} if kind == 'regression' else {'labels': names}
  task = TASKS['table'](str(tmp_path), files={'dev': 'dev.jsonl'}, text='text', kind=kind,
                        **options)  # fmt: skip
  scores, [path] = score_task(task, tmp_path, lambda *_: logits)
  found = read_predictions(path)
  if kind == 'regression':
    expected = correlations(found, gold)
  elif kind == 'class':
    expected = {
      'accuracy': sklearn.metrics.accuracy_score(gold, found),
      'macro_f1': sklearn.metrics.f1_score(gold, found, average='macro'),
      'matthews': sklearn.metrics.matthews_corrcoef(gold, found),
    }
  else:
    found, gold = ([[n in row for n in names] for row in rows]
                   for rows in ([f.split('|') for f in found], gold))  # fmt: skip
    f1 = {f'{kind}_f1': sklearn.metrics.f1_score(gold, found, average=kind)
          for kind in ('micro', 'macro')}  # fmt: skip
    expected = f1 | {'exact': sklearn.metrics.accuracy_score(gold, found)}
  assert scores == pytest.approx(expected, abs=1e-8)  # nine digits of a float32


@pytest.mark.parametrize('name', ['swag', 'codah', 'choice'])
def test_choices(name, tmp_path):
  rng = np.random.default_rng(2)
  gold = rng.integers(0, 4, COUNT).tolist()
  if name == 'codah':
    lines = [f'o\ta\tb\tc\td\te\t{n}' for n in gold]
    task = TASKS[name](str(tmp_path), files={'dev': 'dev.tsv'})
    (tmp_path / 'dev.tsv').write_text('\n'.join(lines))
  else:
    ends = [f'ending{i}' for i in range(4)]
    lines = [','.join(['sent1', 'sent2', *ends, 'label']), *(f'a,b,c,d,e,f,{n}' for n in gold)]
    (tmp_path / 'val.csv').write_text('\n'.join(lines))
    options = {'prompt': 'sent1', 'endings': ends} if name == 'choice' else {}
    task = TASKS[name](str(tmp_path), files={'dev': 'val.csv'}, **options)
  scores, [path] = score_task(task, tmp_path, lambda *_: rng.normal(size=4 * COUNT))
  found = [int(text) for text in read_predictions(path)]
  assert scores == {'accuracy': pytest.approx(np.mean(np.array(found) == gold))}


@pytest.mark.parametrize('name', ['sentence_order', 'next_sentence'])
def test_pairs_of_sentences(name, tmp_path):
  texts = [f'Sentence {i} one. Sentence {i} two.' for i in range(COUNT)]
  (tmp_path / 'a.txt').write_text('\n\n'.join(texts))
  task = TASKS[name](str(tmp_path), files={'dev': 'a.txt'})
  logits = np.random.default_rng(3).normal(size=(COUNT, 2))
  scores, [path] = score_task(task, tmp_path, lambda *_: logits)
  gold = [task.labels[item.label] for item in task.read('dev')]
  found = read_predictions(path)
  assert scores['accuracy'] == sklearn.metrics.accuracy_score(gold, found)
  assert scores['macro_f1'] == pytest.approx(sklearn.metrics.f1_score(gold, found, average='macro'))
  assert scores['matthews'] == pytest.approx(sklearn.metrics.matthews_corrcoef(gold, found))


@pytest.mark.parametrize('name', ['conll2003', 'conll'])
def test_tags(name, tmp_path):
  rng = np.random.default_rng(4)
  tags = ['O', *(f'{prefix}-{kind}' for kind in ('LOC', 'MISC', 'ORG', 'PER') for prefix in 'BI')]
  blocks = ['\n'.join(f'{w} {tags[n]}' for w, n in zip('abcde', rng.integers(0, 9, 5), strict=True))
            for _ in range(COUNT)]  # fmt: skip
  (tmp_path / 'eng.testa').write_text('\n\n'.join(blocks) + '\n')
  options = {'types': ('LOC', 'MISC', 'ORG', 'PER')} if name == 'conll' else {}
  task = TASKS[name](str(tmp_path), files={'dev': 'eng.testa'}, **options)

  def logits(items, encoded):
    values = rng.normal(size=(*encoded.columns['labels'].shape, 9))
    values[..., 0] += 1
    return values + 3 * (encoded.columns['labels'][..., None] == np.arange(9))

  scores, [path] = score_task(task, tmp_path, logits)
  lines = [[line.split() for line in block.split('\n')] for block in
           path.read_text().strip().split('\n\n')]  # fmt: skip
  gold, found = ([[line[column] for line in block] for block in lines] for column in (1, 2))
  spans = seqeval.metrics.sequence_labeling.get_entities
  original = [spans([line.split()[1] for line in block.split('\n')]) for block in blocks]
  assert list(map(spans, gold)) == original
  expected = {
    measure: getattr(seqeval.metrics, f'{measure}_score')(gold, found)
    for measure in ('f1', 'precision', 'recall', 'accuracy')
  }
  by_type = seqeval.metrics.classification_report(gold, found, output_dict=True)
  expected |= {f'f1_{kind}': by_type[kind]['f1-score'] for kind in ('LOC', 'MISC', 'ORG', 'PER')}
  assert scores == pytest.approx(expected, abs=1e-12)


def squad_file(version_2, count=COUNT):
  rng, entries = np.random.default_rng(5), []
  for i in range(count):
    words = rng.choice([*'abcdefghij', 'the', 'ada', 'lyon,'], 12).tolist()
    context, first = ' '.join(words), int(rng.integers(0, 8))
    answers = []
    for end in (first + 1, first + 3):
      text, start = ' '.join(words[first:end]), len(' '.join([*words[:first], ''])) if first else 0
      answers.append({'text': text, 'answer_start': start})
    impossible = version_2 and (i % 3 == 0)
    entries.append({'context': context, 'qas': [
      {'id': f'q{i}', 'question': 'a', 'answers': [] if impossible else answers,
       'is_impossible': bool(impossible)}]})  # fmt: skip
  if not version_2:
    entries = entries[1:]
  else:
    entries[0]['context'] = '\u00ad\u00ad'  # the tokenizer finds no token: the best text is ''
  return {'data': [{'paragraphs': entries}]}


@pytest.mark.parametrize('name', ['squad1', 'squad2'])
def test_squad(name, tmp_path):
  version_2 = name == 'squad2'
  content = squad_file(version_2)
  (tmp_path / 'dev.json').write_text(json.dumps(content))
  task = TASKS[name](str(tmp_path), files={'dev': 'dev.json'}, max_query=4)
  rng = np.random.default_rng(6)

  def logits(items, encoded):
    values = rng.normal(size=(*encoded.columns['input_ids'].shape, 2))
    values[:, 0] += 1.5  # null odds that are too high: the best threshold is not 0
    for row, (start, end) in zip(values, encoded.columns['labels'], strict=True):
      row[start, 0] += 3
      row[end, 1] += 2
    return values

  scores, paths = score_task(task, tmp_path, logits)
  written = {path.stem: json.loads(path.read_text()) for path in paths}
  expected = evaluate_squad(content, written['predictions'], version_2)
  assert scores.items() >= {k: pytest.approx(v, abs=1e-12) for k, v in expected.items()}.items()
  if version_2:
    assert scores['best_f1_threshold'] != 0 and scores['f1'] == pytest.approx(scores['best_f1'])
    best = {
      text: [e['text'] for e in entries if e['text']][:1]
      for text, entries in written['nbest_predictions'].items()
    }
    best = {name: texts[0] if texts else '' for name, texts in best.items()}
    assert best['q0'] == ''  # a right answer, as the written '' is
    for measure in ('exact', 'f1'):
      figures = find_best_threshold(content, best, written['null_odds'], measure)
      assert scores[f'best_{measure}'] == pytest.approx(figures[0], abs=1e-12)
    assert set(scores) == {*expected, 'best_f1', 'best_f1_threshold', 'best_exact',
                           'best_exact_threshold'}  # fmt: skip


def normalize(text):
  text = ''.join(c for c in text.lower() if c not in string.punctuation)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def measures(found, gold, version_2):
  """(exact, F1) of one answer against one reference."""
  a, b = normalize(found).split(), normalize(gold).split()
  exact = float(normalize(found) == normalize(gold))
  if version_2 and not (a and b):
    return exact, float(a == b)
  same = sum((collections.Counter(a) & collections.Counter(b)).values())
  return exact, 2 * same / (len(a) + len(b)) if same else 0.0


def each_question(content, predictions, version_2):
  """id -> (exact, F1, whether it has an answer)."""
  found = {}
  for article in content['data']:
    for paragraph in article['paragraphs']:
      for entry in paragraph['qas']:
        golds = [answer['text'] for answer in entry['answers']]
        if version_2:
          golds = [gold for gold in golds if normalize(gold)] or ['']
        pairs = [measures(predictions[entry['id']], gold, version_2) for gold in golds]
        exact, f1 = (max(values) for values in zip(*pairs, strict=True))
        found[entry['id']] = exact, f1, bool(entry['answers'])
  return found


def evaluate_squad(content, predictions, version_2):
  """What evaluate-v1.1.py or evaluate-v2.0.py prints, as ratios."""
  found = list(each_question(content, predictions, version_2).values())
  parts = {'': found}
  if version_2:
    parts |= {'has_answer_': [f for f in found if f[2]],
              'no_answer_': [f for f in found if not f[2]]}  # fmt: skip
  return {
    f'{part}{name}': float(np.mean([f[i] for f in values]))
    for part, values in parts.items() for i, name in enumerate(('exact', 'f1'))
  }  # fmt: skip


def find_best_threshold(content, best, null_odds, measure):
  """`find_best_thresh` of evaluate-v2.0.py: (score, threshold)."""
  found = each_question(content, best, True)
  index = ('exact', 'f1').index(measure)
  current = most = sum(not has for *_, has in found.values())
  threshold = 0.0
  for name in sorted(null_odds, key=null_odds.get):
    has = found[name][2]
    current += found[name][index] if has else -1 if best[name] else 0
    if current > most:
      most, threshold = current, null_odds[name]
  return most / len(found), threshold
