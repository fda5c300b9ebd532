"""Rerankers: candidates are read, trained on, ranked and scored, and the folder is handed over."""

import json
import math

import jax
import numpy as np
import pytest

from bertjax import finetune
from bertjax.__main__ import main
from bertjax.config import load_recipe, update
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.predictor import Predictor
from bertjax.inference.runner import TextError
from bertjax.interop import loading
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.tasks import make_task
from bertjax.training.metrics import read_metrics
from tests.tasks.test_embedding import lines

COLUMNS = {'text': 'q', 'pair': 'a'}
FIELDS = {'data.train_file': 'train.jsonl', 'task.text': 'q', 'task.pair': 'a'}
LISTS = {'task.negatives': 'n', 'task.num_negatives': 2}


@pytest.fixture(scope='module')
def model(tmp_path_factory, vocab):
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(tokenizer.vocab_size, 32, 2, 2, 64, 64)
  bert = Bert(config, heads=())
  folder = tmp_path_factory.mktemp('encoder') / 'model'
  loading.save_model(folder, bert, init_params(bert, jax.random.key(0)), tokenizer)
  return folder


def config_of(model, folder, recipe='rerank:smoke', **fields):
  config = load_recipe(recipe)
  update(config, FIELDS | {'init_from': str(model), 'data.source': str(folder)} | fields)
  return config


def questions(documents) -> list[dict]:
  """Questions whose answers begin with a word that the wrong ones do not have."""
  words = [text.split() for text in documents]
  return [
    {'q': ' '.join(w[4:8]), 'a': f'the {" ".join(w[:6])}',
     'n': [f'or {" ".join(w[8:14])}', f'or {w[1]}']}
    for w in words
  ]  # fmt: skip


@pytest.fixture(scope='module')
def trained(tmp_path_factory, model, documents):
  """(workdir, scores) of a listwise run with microbatches of complete lists."""
  folder = tmp_path_factory.mktemp('rerank')
  lines(folder / 'train.jsonl', questions(documents))
  config = config_of(
    model, folder, 'rerank:smoke,listwise', **LISTS | {
      'batch_size': 16, 'gradient_accumulation_steps': 2, 'num_train_epochs': 8.0,
      'learning_rate': 3e-3, 'data.loader': 'threads', 'data.dev_fraction': 0.3,
    },
  )  # fmt: skip
  return folder / 'run', finetune.run(config, workdir=str(folder / 'run'))


@pytest.mark.full
def test_a_run_learns_to_rank_the_answer_first(trained):
  workdir, scores = trained
  assert list(scores) == ['ndcg@10', 'mrr@10', 'recall@10', 'recall@100', 'map@100']
  losses = [row['loss'] for row in read_metrics(workdir) if row['kind'] == 'train']
  assert losses[0] == pytest.approx(math.log(3), abs=0.3) and losses[-1] < 0.5
  assert scores['mrr@10'] > 0.9
  ranking = (workdir / 'predictions' / 'dev.trec').read_text().splitlines()
  assert ranking[0].startswith('q0 Q0 d') and len(ranking) % 3 == 0
  assert 'query' in (workdir / 'report.html').read_text()


QUERY, TEXTS = (
  'return a value',
  ['the value is returned', 'or a file', 'x', 'the file or the value'],
)


@pytest.mark.full
def test_the_folder_gives_the_same_scores_in_a_cross_encoder(trained, tmp_path):
  library = pytest.importorskip('sentence_transformers')
  import torch

  folder = trained[0] / 'model'
  theirs, ours = library.CrossEncoder(str(folder), device='cpu'), Predictor.from_dir(folder)
  assert theirs.num_labels == 1 and isinstance(theirs.activation_fn, torch.nn.Identity)
  ranked = ours.rerank(QUERY, TEXTS)
  expected = theirs.rank(QUERY, TEXTS)
  assert [hit.number for hit in ranked] == [hit['corpus_id'] for hit in expected]
  np.testing.assert_allclose(
    [hit.score for hit in ranked], [hit['score'] for hit in expected], atol=2e-5
  )
  # A folder that it wrote is read with its activation, and converted with it.
  theirs.activation_fn = torch.nn.Sigmoid()
  theirs.save_pretrained(str(tmp_path / 'theirs'))
  assert main(['convert', f'--from={tmp_path}/theirs', f'--out={tmp_path}/ours']) == 0
  for name in ('theirs', 'ours'):
    hits = Predictor.from_dir(tmp_path / name).rerank([QUERY], [TEXTS], top_k=2)[0]
    scores = theirs.predict([(QUERY, TEXTS[hit.number]) for hit in hits])
    np.testing.assert_allclose([hit.score for hit in hits], scores, atol=2e-6)
    assert len(hits) == 2 and hits[0].number == ranked[0].number and 0 < hits[0].score < 1


@pytest.mark.full
def test_files_texts_and_the_service_rank_as_the_predictor(trained, tmp_path, capsys):
  from fastapi.testclient import TestClient

  from bertjax import serve

  folder, workdir = trained[0] / 'model', trained[0]
  predictor = Predictor.from_dir(folder)
  expected = [vars(hit) for hit in predictor.rerank(QUERY, TEXTS)]
  ask = ['predict', f'--model={folder}', '--do=rerank']
  assert main([*ask, QUERY, f'--pair={"|".join(TEXTS)}', '--top_k=3']) == 0
  assert json.loads(capsys.readouterr().out) == expected[:3]
  lines(
    tmp_path / 'in.jsonl', [{'q': QUERY, 'd': TEXTS}, {'q': 'x', 'd': []}, {'q': 'x', 'd': ' '}]
  )
  flags = [f'--input={tmp_path}/in.jsonl', '--columns=q,d', f'--out={tmp_path}/out.jsonl']
  assert main([*ask, *flags]) == 0
  found = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert [hit['number'] for hit in found[0]['result']] == [hit['number'] for hit in expected]
  assert found[1]['error'] == 'query 0 has no documents.'
  assert found[2]['error'] == 'a text is empty.'
  client = TestClient(serve.make_app(predictor, 'run'))
  with client:
    answer = client.post('/rerank', json={'query': QUERY, 'documents': TEXTS, 'top_k': 2}).json()
    assert [hit['text'] for hit in answer['results']] == [hit['text'] for hit in expected[:2]]
    assert client.post('/rerank', json={'query': QUERY, 'documents': []}).status_code == 422
    assert 'rerank' in client.get('/healthz').json()['calls']
  checkpoint = Predictor.from_dir(loading.find_checkpoint(workdir))
  assert checkpoint.rerank(QUERY, TEXTS[:1])[0].score == pytest.approx(
    predictor.rerank(QUERY, TEXTS[:1])[0].score, abs=1e-6
  )


def predictor_of(vocab, outputs: int = 1, **options) -> Predictor:
  tokenizer = Tokenizer.from_file(vocab)
  bert = Bert(EncoderConfig(tokenizer.vocab_size, 16, 1, 2, 24, 24), ('classification',),
              num_labels=outputs)  # fmt: skip
  params = jax.tree.map(lambda x: 5 * x, init_params(bert, jax.random.key(3)))
  return Predictor(bert, params, tokenizer, **options)


@pytest.mark.e2e
def test_a_long_document_has_the_score_of_its_best_window(vocab):
  predictor = predictor_of(vocab, long='window', batch_size=4, activation='identity')
  words = 'the return value of a file is not a list or in the value '
  texts = [words * 3, 'the value']
  [ids], [query] = predictor.tokenizer.encode([texts[0]]), predictor.tokenizer.encode(['a file'])
  parts = predictor.runner.split((query, ids))
  assert len(parts) > 2 and [token for _, part in parts for token in part] == ids
  scores = [float(np.ravel(row)[0]) for row in predictor.runner.run(
    predictor.runner.make_batch(parts), 'classification')]  # fmt: skip
  hits = predictor.rerank('a file', texts)
  assert {hit.number: hit.score for hit in hits}[0] == pytest.approx(max(scores), abs=1e-5)
  with pytest.raises(TextError, match='takes at most 24'):
    predictor.rerank(texts[0], ['a'])
  with pytest.raises(TextError, match='takes at most 24'):
    predictor_of(vocab).rerank('a file', texts)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((['a'], ['b']), 'the documents of a query are a list of texts, got one text'),
    ((['a'], [[]]), 'query 0 has no documents'),
    ((['a'], [['b']], -1), 'top_k must be at least 1, or 0 for all documents, got -1'),
  ],
)
def test_what_cannot_be_ranked_is_one_sentence(vocab, arguments, message):
  queries, documents, *top_k = arguments
  with pytest.raises(ValueError, match=message):
    predictor_of(vocab).rerank(queries, documents, **{'top_k': top_k[0]} if top_k else {})


def test_a_classifier_of_several_classes_is_no_reranker(vocab):
  predictor = predictor_of(vocab, outputs=3)
  assert 'rerank' not in predictor.calls() and 'rerank' in predictor_of(vocab).calls()
  message = 'needs a classification head with 1 output; the head of this model has 3'
  with pytest.raises(ValueError, match=message):
    predictor.rerank('a', ['b'])
  with pytest.raises(ValueError, match=message):
    predictor.check_call('rerank', 2, {})


def test_another_activation_or_a_prompt_of_a_cross_encoder_is_named(vocab, tmp_path):
  made = predictor_of(vocab)
  loading.save_model(tmp_path / 'm', made.model, made.runner.params, made.tokenizer,
                     sentence={'activation': 'identity'})  # fmt: skip
  assert loading.read_activation(tmp_path / 'm') == 'identity'
  settings = tmp_path / 'm' / 'config_sentence_transformers.json'
  for content, message in (
    ({'activation_fn': 'torch.nn.modules.activation.Tanh'}, 'the activation torch.* is not supp'),
    ({'default_prompt_name': 'q', 'activation_fn': None}, 'prompts of a CrossEncoder'),
  ):
    settings.write_text(json.dumps(content | {'model_type': 'CrossEncoder'}))
    predictor = Predictor.from_dir(tmp_path / 'm')
    with pytest.raises(ValueError, match=message):
      predictor.rerank(QUERY, TEXTS)


def test_lists_are_filled_up_and_a_negative_that_is_the_positive_is_none(tmp_path, vocab):
  rows = [{'q': 'a', 'a': 'b', 'n': ['c', 'b', 'e'], 's': [3, -1, 2.5, 0]},
          {'q': 'c', 'a': 'b', 'n': ['a'], 's': [1, 2]}]  # fmt: skip
  lines(tmp_path / 'train.jsonl', rows)
  make = {'files': {'train': 'train.jsonl'}, 'negatives': ('n',), 'num_negatives': 3, **COLUMNS}
  task = make_task('rerank', str(tmp_path), loss='listwise', **make)
  items, tokenizer = task.read('train'), Tokenizer.from_file(vocab)
  columns = task.encode(items, tokenizer, 12).columns
  np.testing.assert_array_equal(
    columns['labels'].reshape(2, 4), [[1, 0, np.nan, 0], [1, 0, np.nan, np.nan]]
  )
  shown = [tokenizer.decode(row).replace(' [PAD]', '') for row in columns['input_ids']]
  assert shown[1] == '[CLS] a [SEP] c [SEP]' and shown[-1] == '[CLS] [SEP] [SEP]'
  assert columns['example_ids'].tolist() == [0] * 4 + [1] * 4
  task = make_task('rerank', str(tmp_path), loss='margin_mse', label='s', **make)
  assert [item.label for item in task.read('train')] == [(3, -1, 2.5, 0), (1, 2)]
  (tmp_path / 'train.csv').write_text('q,a,n,m,x,y,z\na,b,c,d,1,2,3\n')
  columns = make | {'files': {'train': 'train.csv'}, 'negatives': ('n', 'm'), 'num_negatives': 1}
  task = make_task('rerank', str(tmp_path), loss='margin_mse', label='x|y|z', **columns)
  assert task.read('train')[0][1:3] == (('a', 'b', 'c'), (1, 2))


def test_labelled_pairs_are_candidates_of_their_queries(tmp_path, model):
  rows = [('a', 'b', 1), ('a', 'c', 0.2), ('d', 'c', 0), ('e', 'b', 0.7), ('e', 'f', 0)]
  lines(tmp_path / 'train.jsonl', [dict(zip('qal', row, strict=True)) for row in rows])
  fields = {'task.label': 'l', 'data.dev_file': 'train.jsonl'}
  setup = finetune.set_up(config_of(model, tmp_path, **fields))
  assert [(e.texts, e.label) for e in setup.examples] == [
    (('a', 'b', 'c'), {'d0': 1, 'd1': 0}), (('e', 'b', 'f'), {'d0': 0.7, 'd2': 0}),
  ]  # fmt: skip
  assert setup.task.metric == 'ndcg@10' and setup.model.num_labels == 1
  assert setup.dev.columns['example_ids'].tolist() == [0, 0, 1, 1]
  found = setup.task.decode(setup.examples, setup.dev, np.array([[1.0], [1.0], [0.5], [2.0]]))
  assert found == [{'d1': 1, 'd0': 1}, {'d2': 2, 'd0': 0.5}] and list(found[0]) == ['d1', 'd0']
  fields |= {'task.evaluation': 'similarity'}
  setup = finetune.set_up(config_of(model, tmp_path, **fields))
  assert setup.task.metric == 'spearman' and setup.examples[3].label == 0.7


def test_a_query_is_held_out_with_all_its_pairs(tmp_path):
  rows = [{'q': f'q{i % 20}', 'a': f'a{i}', 'label': i % 3 // 2} for i in range(60)]
  lines(tmp_path / 'train.jsonl', rows)
  task = make_task('rerank', str(tmp_path), files={'train': 'train.jsonl'}, dev_fraction=0.4,
                   **COLUMNS)  # fmt: skip
  parts = [{item.texts[0] for item in task.read(split)} for split in ('train', 'dev')]
  assert parts[0] and parts[1] and not parts[0] & parts[1] and len(parts[0] | parts[1]) == 20


BAD = {
  'no negatives': ({'n': []}, {}, r"train.jsonl:2: column 'n' holds no negatives\."),
  'empty negative': ({'n': ['b', ' ']}, {}, r"train.jsonl:2: column 'n' holds an empty text\."),
  'empty query': ({'q': ' '}, {}, r"train.jsonl:2: column 'q' holds no text\."),
  'empty pair': ({'a': ''}, {'task.negatives': ''}, r"train.jsonl:2: column 'a' holds no text\."),
  'same': ({'n': ['e', 'e']}, {}, 'train.jsonl:2: all negatives are the positive'),
  'label': ({'label': 2}, {'task.negatives': ''},
            r'train.jsonl:2: the label 2 is outside 0\.\.1, irrelevant to relevant'),
  'no label': ({'label': 'yes'}, {'task.negatives': ''}, 'must be a finite number, got .yes'),
  'few scores': ({'s': [1]}, {'task.loss': 'margin_mse', 'task.label': 's'},
                 'train.jsonl:2: the positive and 1 negatives need a score of the teacher each, '
                 'got 1'),
  'no score': ({'s': [1, None]}, {'task.loss': 'margin_mse', 'task.label': 's'},
               "train.jsonl:2: the teacher's score must be a finite number, got None"),
  'word': ({'s': [1, 'x']}, {'task.loss': 'margin_mse', 'task.label': 's'},
           "the teacher's score must be a finite number, got 'x'"),
  'lists': ({}, {'task.loss': 'listwise', 'task.negatives': ''},
            "task.loss='listwise' compares a positive with hard negatives; name their columns"),
  'loss': ({}, {'task.loss': 'hinge'},
           r"task.loss must be one of \('binary', 'listwise', 'margin_mse'\), got 'hinge'"),
  'beir': ({}, {'task.evaluation': 'beir'}, "'beir' and task.candidates='' do not fit"),
  'dev': ({}, {'task.evaluation': 'beir', 'task.candidates': 'x'}, 'needs a dev split of another'),
  'alike': ({'q': 'x', 'label': 1}, {'task.negatives': '', 'data.dev_file': 'train.jsonl'},
            'no query of the split has a relevant document and one that is not'),
  'number': ({}, {'task.num_candidates': 0}, 'task.num_candidates must be at least 1, got 0'),
  'frozen': ({}, {'data.packed_length': 40}, 'data.packed_length=40 must be -1, 0 or from 96'),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD)
def test_what_cannot_be_trained_is_one_sentence(model, tmp_path, case):
  row, fields, message = BAD[case]
  good = {'q': 'a', 'a': 'b', 'n': ['c'], 'label': 1, 's': [1, 0]}
  lines(tmp_path / 'train.jsonl', [good, good | {'q': 'd', 'a': 'e'} | row])
  with pytest.raises(ValueError, match=message):
    finetune.set_up(config_of(model, tmp_path, **LISTS | fields))


def beir(folder, rng) -> tuple[dict, dict]:
  """A folder of 12 queries, 150 documents, graded judgements and a run with ties: (qrels, run)."""
  (folder / 'qrels').mkdir(parents=True)
  lines(folder / 'corpus.jsonl', [{'_id': f'd{i}', 'text': f't{i}'} for i in range(150)])
  lines(folder / 'queries.jsonl', [{'_id': f'q{i}', 'text': f's{i}'} for i in range(12)])
  qrels = {f'q{i}': {f'd{j}': int(rng.integers(0, 4)) for j in rng.permutation(150)[:25]}
           for i in range(12)}  # fmt: skip
  qrels['q11'] = dict.fromkeys(qrels['q11'], 0)  # nothing relevant: it is not scored
  run = {f'q{i}': {f'd{j}': int(rng.integers(0, 9)) for j in rng.permutation(150)[:110]}
         for i in range(12)}  # fmt: skip
  rows = [f'{q}\t{d}\t{r}' for q, gold in qrels.items() for d, r in gold.items()]
  (folder / 'qrels' / 'test.tsv').write_text(
    '\n'.join(['query-id\tcorpus-id\tscore', *rows]) + '\n'
  )
  write_run(folder / 'bm25.trec', run)
  return qrels, run


def write_run(path, run) -> None:
  path.write_text(''.join(
    f'{q} Q0 {d} 1 {s} x\n' for q, scores in run.items() for d, s in scores.items()
  ))  # fmt: skip


def ranking_task(folder, **options):
  given = {'files': {'train': 'no.csv', 'dev': 'qrels/test.tsv'}, 'evaluation': 'beir',
           'candidates': 'bm25.trec', **COLUMNS} | options  # fmt: skip
  return make_task('rerank', str(folder), **given).judge


# By pytrec_eval-terrier 0.5.11, for the folder of seed 0 and the scores of seed 1, at most 100
# candidates a query.
GOLDEN = {
  'ndcg@10': 0.05689556036075099, 'mrr@10': 0.2304112554112554, 'recall@10': 0.039732854864433814,
  'recall@100': 0.5762124836885604, 'map@100': 0.08341367802095322,
}  # fmt: skip


def theirs(qrels, run) -> dict[str, float]:
  """The means over queries by pytrec_eval; its reciprocal rank has no limit."""
  library = pytest.importorskip('pytrec_eval')
  names = {'ndcg_cut.10', 'recip_rank', 'recall.10,100', 'map_cut.100'}
  each = library.RelevanceEvaluator(qrels, names).evaluate(run).values()
  found = {name: np.array([row[name] for row in each]) for name in next(iter(each))}
  ranks = found['recip_rank']
  return {
    'ndcg@10': found['ndcg_cut_10'].mean(), 'mrr@10': (ranks * (ranks > 0.099)).mean(),
    'recall@10': found['recall_10'].mean(), 'recall@100': found['recall_100'].mean(),
    'map@100': found['map_cut_100'].mean(),
  }  # fmt: skip


@pytest.fixture
def scored(tmp_path, caplog):
  """(qrels, run, items, random scores with ties, our metrics, log) of `beir`."""
  qrels, run = beir(tmp_path, np.random.default_rng(0))
  del qrels['q11']
  task = ranking_task(tmp_path)
  with caplog.at_level('INFO', 'bertjax'):
    items = task.read('dev')
  logits = np.random.default_rng(1).integers(0, 6, (1100, 1)).astype(np.float32)
  return qrels, run, items, logits, task.score(items, task.decode(items, None, logits)), caplog.text


def test_candidates_are_the_best_of_the_run_with_their_judgements(scored):
  qrels, run, items, _, found, _ = scored
  assert [item.id for item in items] == [f'q{i}' for i in range(11)]
  for item in items:  # ties by the last id
    scores = run[item.id]
    best = sorted(scores, key=lambda name: (scores[name], name), reverse=True)[:100]
    assert list(item.label)[:100] == best
    assert item.texts[1:] == tuple(f't{name[1:]}' for name in best)
    relevant = {name: value for name, value in item.label.items() if value}
    assert relevant == {name: value for name, value in qrels[item.id].items() if value}
  assert found == pytest.approx(GOLDEN, abs=1e-9)


def test_metrics_of_candidates_with_ties_equal_those_of_pytrec_eval(scored):
  qrels, run, items, logits, found, log = scored
  names, scores = {i.id: list(i.label)[:100] for i in items}, iter(logits.ravel().tolist())
  ranked = {query: {name: next(scores) for name in some} for query, some in names.items()}
  assert found == pytest.approx(theirs(qrels, ranked), abs=1e-9)
  before = {query: {name: run[query][name] for name in some} for query, some in names.items()}
  assert f'ndcg@10 {theirs(qrels, before)["ndcg@10"]:.4f}' in log and 'before reranking' in log


def test_candidates_are_read_from_runs_and_tables(tmp_path, caplog):
  _, run = beir(tmp_path, np.random.default_rng(0))
  del run['q3']
  write_run(tmp_path / 'bm25.trec', run)
  items = ranking_task(tmp_path, num_candidates=7).read('dev')
  assert 'has no candidates of 1 of 11 queries' in caplog.text and len(items[3].texts) == 1
  rows = [f'{q},{d},{s}' for q, scores in run.items() for d, s in scores.items()]
  (tmp_path / 'run.csv').write_text('\n'.join(['query-id,corpus-id,score', *rows]) + '\n')
  assert ranking_task(tmp_path, num_candidates=7, candidates='run.csv').read('dev') == items
  rows = [f'{q}\t{d}' for q, scores in run.items() for d in scores]
  (tmp_path / 'run.tsv').write_text('\n'.join(['query-id\tcorpus-id', *rows]) + '\n')
  plain = ranking_task(tmp_path, num_candidates=7, candidates='run.tsv').read('dev')
  assert list(plain[0].label)[:7] == list(run['q0'])[:7]
  task = ranking_task(tmp_path, num_candidates=7)
  logits = np.zeros((70, 1), np.float32)
  assert task.score(items, task.decode(items, None, logits))['mrr@10'] < 1


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (
      'q0 Q0 d999 1 2.0 x',
      r"the candidate 'd999' of the query 'q0', which is not in .*corpus.jsonl",
    ),
    ('q77 Q0 d1 1 2.0 x', r"candidates of the query 'q77', which .*test.tsv does not judge"),
    ('q0 Q0 d1 1 high x', r"bm25.trec:1: the score must be a finite number, got 'high'"),
    ('q0 d1 2.0', r'bm25.trec:1: a run has lines of 6 fields .*, got 3'),
    ('q0 Q0 d1 1 2.0 x\nq0 Q0 d1 2 1.0 x', "the query 'q0' has the candidate 'd1' twice"),
    ('q11 Q0 d1 1 2.0 x', 'has no candidates of the queries of'),
  ],
)
def test_a_run_that_cannot_be_ranked_is_one_sentence(tmp_path, line, message):
  beir(tmp_path, np.random.default_rng(0))
  (tmp_path / 'bm25.trec').write_text(line + '\n')
  with pytest.raises(ValueError, match=message):
    ranking_task(tmp_path).read('dev')
