"""Sentence embeddings: pairs are read, trained on and scored, and the folder is handed over."""

import json

import jax
import numpy as np
import pytest

from bertjax import finetune, scoring
from bertjax.config import load_recipe, update
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.predictor import Predictor
from bertjax.interop import loading
from bertjax.model import similarity
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.objectives.contrastive import ABSENT
from bertjax.tasks import make_task, metrics
from bertjax.training.metrics import read_metrics

COLUMNS = {'text': 'q', 'pair': 'a'}


def lines(path, rows) -> str:
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path.name


def pairs(documents) -> list[dict]:
  """Questions that repeat words of their answers."""
  words = [text.split() for text in documents]
  return [{'q': ' '.join(w[4:9]), 'a': ' '.join(w[:20]), 'n': [' '.join(w[-10:])]} for w in words]


@pytest.fixture(scope='module')
def model(tmp_path_factory, vocab):
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(tokenizer.vocab_size, 16, 2, 2, 24, 40)
  bert = Bert(config, heads=(), pooler=False)
  folder = tmp_path_factory.mktemp('encoder') / 'model'
  params = jax.jit(init_params, static_argnums=0)(bert, jax.random.key(0))
  loading.save_model(folder, bert, params, tokenizer)
  return folder


def config_of(model, folder, **fields):
  config = load_recipe('embed:smoke')
  given = {
    'data.train_file': 'train.jsonl', 'task.text': 'q', 'task.pair': 'a', 'task.negatives': 'n',
    'model.hidden_dropout': 0.0, 'model.attention_dropout': 0.0, 'learning_rate': 3e-3,
    'num_train_epochs': 4.0, 'data.loader': 'threads',
  }  # fmt: skip
  update(config, given | {'init_from': str(model), 'data.source': str(folder)} | fields)
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory, model, documents):
  """(workdir, scores) of a run with prompts, Matryoshka widths and microbatches."""
  folder = tmp_path_factory.mktemp('embed')
  lines(folder / 'train.jsonl', pairs(documents))
  lines(folder / 'dev.jsonl', [row | {'n': ['x']} for row in pairs(documents)[:20]])
  config = config_of(
    model, folder, **{
      'data.dev_file': 'dev.jsonl', 'task.query_prompt': 'the : ', 'task.pooling': 'cls',
      'task.widths': '8', 'batch_size': 16, 'gradient_accumulation_steps': 2,
    },
  )  # fmt: skip
  return folder / 'run', finetune.run(config, workdir=str(folder / 'run'))


@pytest.mark.full
def test_a_run_learns_to_find_answers(trained):
  workdir, scores = trained
  assert list(scores) == ['ndcg@10', 'mrr@10', 'recall@10', 'recall@100', 'map@100', 'ndcg@10_8']
  rows = read_metrics(workdir)
  losses = [row['loss'] for row in rows if row['kind'] == 'train']
  assert losses[-1] < 0.8 * losses[0] and scores['ndcg@10'] > 0.6
  assert not any('loss' in row for row in rows if row['kind'] == 'eval')  # ranked, not trained
  ranking = (workdir / 'predictions' / 'dev.trec').read_text().splitlines()
  assert len(ranking) == 20 * 21 and ranking[0].startswith('q0 Q0 d')  # 20 answers and 'x'


@pytest.mark.full
def test_the_folder_gives_the_same_vectors_in_sentence_transformers(trained):
  library = pytest.importorskip('sentence_transformers')
  folder, texts = trained[0] / 'model', ['Return the value.', 'A file.']
  theirs = library.SentenceTransformer(str(folder), device='cpu')
  ours = Predictor.from_dir(folder)
  assert theirs.get_max_seq_length() == 32 == ours.layers.max_length
  np.testing.assert_allclose(ours.embed(texts), theirs.encode(texts), atol=2e-5)
  prompted = theirs.encode(texts, prompt_name='query')
  np.testing.assert_allclose(ours.embed(texts, prompt='query'), prompted, atol=2e-5)
  assert np.abs(prompted - theirs.encode(texts)).max() > 1e-3
  short = library.SentenceTransformer(str(folder), device='cpu', truncate_dim=8)
  short = short.encode(texts, normalize_embeddings=True)
  np.testing.assert_allclose(ours.embed(texts, width=8), short, atol=2e-5)


def test_each_width_is_scored_by_its_own_cosines(tmp_path):
  rows = [{'q': f'question {n}', 'a': f'answer {n}'} for n in range(20)]
  files = {'dev': lines(tmp_path / 'dev.jsonl', rows)}
  task = make_task('embed', str(tmp_path), files=files, widths=(2,), **COLUMNS).judge
  vectors = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
  vectors[:20] += vectors[20:]  # queries, then documents
  unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  scores = scoring.decode_and_score(task, task.read('dev'), None, unit)[1]
  gains = {}
  for width, name in ((16, 'ndcg@10'), (2, 'ndcg@10_2')):
    short = unit[:, :width] / np.linalg.norm(unit[:, :width], axis=1, keepdims=True)
    cosines = short[:20] @ short[20:].T
    ranks = (cosines > np.diag(cosines)[:, None]).sum(1)
    gains[name] = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean()
    assert scores[name] == pytest.approx(gains[name], abs=1e-6)
  assert gains['ndcg@10'] > gains['ndcg@10_2'] + 0.1


@pytest.mark.full
def test_a_checkpoint_and_a_converted_model_keep_pooling_and_prompts(trained, tmp_path):
  from bertjax.__main__ import main

  workdir, layers = trained[0], Predictor.from_dir(trained[0] / 'model').layers
  assert (layers.pooling, layers.prompts) == ('cls', {'query': 'the : '})
  assert Predictor.from_dir(loading.find_checkpoint(workdir)).layers == layers
  assert main(['convert', f'--from={workdir}/model', f'--out={tmp_path}/model']) == 0
  assert Predictor.from_dir(tmp_path / 'model').layers == layers


@pytest.mark.full
def test_queries_and_documents_of_an_index_get_their_prompts(trained):
  predictor = Predictor.from_dir(trained[0] / 'model')
  index = predictor.index(['Return the value.', 'A file.'])
  np.testing.assert_array_equal(index.vectors, predictor.embed(index.texts))  # no such prompt
  [hits] = predictor.nearest(['a file'], index, top_k=1)
  vector = predictor.embed('a file', prompt='query')
  assert hits[0].similarity == pytest.approx(max(index.vectors @ vector), abs=1e-6)
  with pytest.raises(ValueError, match=r"no prompt 'passage'; it has \['query'\]"):
    predictor.embed('a', prompt='passage')
  with pytest.raises(ValueError, match=r'width must be in 0\.\.16, got 17'):
    predictor.embed('a', width=17)


def test_negatives_are_lists_or_columns_and_short_lists_are_filled_up(tmp_path, vocab):
  rows = [{'q': 'a', 'a': 'b', 'n': ['c', 'd', 'e'], 'm': 'b'}, {'q': 'c', 'a': 'b', 'n': ['a']}]
  lines(tmp_path / 'train.jsonl', rows)
  make = {'files': {'train': 'train.jsonl'}, **COLUMNS, 'query_prompt': 'x '}
  task = make_task('embed', str(tmp_path), negatives=('n',), num_negatives=2, **make)
  items = task.read('train')
  assert [item.texts for item in items] == [('a', 'b', 'c', 'd'), ('c', 'b', 'a')]
  tokenizer = Tokenizer.from_file(vocab)
  columns = task.encode(items, tokenizer, 8).columns
  assert columns['labels'].reshape(2, 4).tolist() == [[0, 1, 2, 3], [2, 1, 0, ABSENT]]
  shown = [tokenizer.decode(row).replace(' [PAD]', '') for row in columns['input_ids']]
  assert shown[:2] == ['[CLS] x a [SEP]', '[CLS] b [SEP]'] and shown[-1] == '[CLS] [SEP]'
  lines(tmp_path / 'train.jsonl', [rows[0]])
  task = make_task('embed', str(tmp_path), negatives=('n', 'm'), **make)
  assert task.read('train')[0].texts == ('a', 'b', 'c', 'd') and task.choices == 4


@pytest.mark.parametrize(
  ('row', 'fields', 'message'),
  [
    ({'n': ''}, {}, r"train.jsonl:2: column 'n' holds no text\."),
    ({'n': []}, {}, r"train.jsonl:2: column 'n' holds no negatives\."),
    ({'n': ['b', ' ']}, {}, r"train.jsonl:2: column 'n' holds an empty text\."),
    ({'a': ['b']}, {}, r"column 'a' holds a list, which only columns of negatives may"),
    ({'n': 'b'}, {'task.loss': 'cosine', 'task.label': 's', 'task.negatives': ''},
     r'train.jsonl:2: the score 4 is outside -1\.\.1; set --config.task.max_score'),
    ({}, {'batch_size': 1, 'task.negatives': '', 'mesh.data': 1},
     'batch_size=1 leaves no negatives'),
    ({'a': 'b'}, {'task.negatives': ''}, "the positives of all 2 examples are 'b'"),
    ({}, {'task.pooling': 'max'}, r"task.pooling must be one of \('', 'mean', 'cls', 'last'\)"),
    ({}, {'task.temperature': 0.0}, r'task.temperature must be above 0, got 0\.0'),
    ({}, {'task.widths': '8|x'}, r"task.widths are written '256\|128', got '8\|x'"),
    ({}, {'task.widths': '16', 'data.dev_file': 'train.jsonl'},
     r'task.widths=16 must be above 0 and below 16'),
    ({}, {'task.evaluation': 'beir'}, 'needs a dev split of another kind'),
    ({}, {'num_trainable_layers': 0}, 'num_trainable_layers=0 leaves nothing to train'),
    ({}, {'data.packed_length': 40, 'data.length': 8}, 'set data.packed_length=0'),
    ({}, {'gradient_accumulation_steps': 3}, 'batch_size must be a multiple of replicas'),
  ],
)  # fmt: skip
def test_what_cannot_be_trained_is_one_sentence(model, tmp_path, row, fields, message):
  good = {'q': 'a', 'a': 'b', 'n': ['c'], 's': 1}
  lines(tmp_path / 'train.jsonl', [good, good | {'q': 'd', 'a': 'e', 's': 4} | row])
  with pytest.raises(ValueError, match=message):
    finetune.set_up(config_of(model, tmp_path, **fields))


def test_scored_pairs_are_cosines(model, tmp_path):
  (tmp_path / 'train.tsv').write_text('q\ta\ts\na\tb\t5\nc\td\t2.5\n')
  fields = {'data.train_file': 'train.tsv', 'data.dev_file': 'train.tsv', 'task.label': 's'}
  scored = {'task.loss': 'cosine', 'task.max_score': 5.0, 'task.negatives': ''}
  setup = finetune.set_up(config_of(model, tmp_path, **fields, **scored))
  assert setup.columns['labels'].tolist() == [1, 1, 0.5, 0.5]
  vectors = similarity.unit(np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32))
  found = setup.task.decode(setup.examples, None, vectors)
  np.testing.assert_allclose(found, [vectors[0] @ vectors[1], vectors[2] @ vectors[3]], rtol=1e-5)
  lines(tmp_path / 'train.jsonl', [{'q': 'a', 'a': 'b'}, {'q': 'c', 'a': 'd'}])
  fields['data.train_file'] = 'train.jsonl'
  contrastive = {'task.evaluation': 'similarity', 'task.max_score': 5.0, 'task.negatives': ''}
  setup = finetune.set_up(config_of(model, tmp_path, **fields, **contrastive))
  assert setup.task.label.metrics[0] == 'spearman' and [e.label for e in setup.examples] == [5, 2.5]
  assert setup.training.label.metrics != setup.task.label.metrics


def test_a_folder_of_beir_is_ranked_and_ties_go_by_the_last_id(tmp_path):
  (tmp_path / 'qrels').mkdir()
  lines(tmp_path / 'corpus.jsonl', [
    {'_id': 'd1', 'title': 'One', 'text': 'b'}, {'_id': 'd2', 'title': '', 'text': 'b'},
    {'_id': 'd3', 'text': 'c'},
  ])  # fmt: skip
  lines(tmp_path / 'queries.jsonl', [{'_id': 'x', 'text': 'a'}, {'_id': 'y', 'text': 'z'}])
  qrels = tmp_path / 'qrels' / 'test.tsv'
  qrels.write_text('query-id\tcorpus-id\tscore\nx\td1\t2\nx\td3\t1\ny\td2\t0\n')
  files = {'train': 'none.csv', 'dev': 'qrels/test.tsv'}
  task = make_task('embed', str(tmp_path), files=files, evaluation='beir', **COLUMNS).judge
  items = task.read('dev')
  assert [(item.id, *item.texts) for item in items] == [
    ('x', 'a'), ('d1', 'One b'), ('d2', 'b'), ('d3', 'c')
  ]  # fmt: skip
  vectors = np.array([[1, 0], [0.6, 0.8], [0.6, 0.8], [1, 0]], np.float32)
  predictions = task.decode(items, None, vectors)
  assert list(predictions[0]) == ['d3', 'd2', 'd1'] and predictions[1:] == [{}, {}, {}]
  scores = task.score(items, predictions)
  ndcg = (1 + 2 / np.log2(4)) / (2 + 1 / np.log2(3))
  assert scores['ndcg@10'] == pytest.approx(ndcg)
  assert (scores['mrr@10'], scores['recall@10']) == (1, 1)
  assert scores['map@100'] == pytest.approx((1 + 2 / 3) / 2)
  qrels.write_text('query-id\tcorpus-id\tscore\nq\td1\t1\n')
  with pytest.raises(ValueError, match=r"queries.jsonl has no query 'q', which .* names"):
    task.read('dev')


def test_the_nearest_vectors_are_exact_in_any_blocks():
  rng = np.random.default_rng(0)
  queries, corpus = rng.integers(-2, 3, (7, 4)), rng.integers(-2, 3, (50, 4))  # many ties
  queries, corpus = (x.astype(np.float32) for x in (queries, corpus))
  order = np.argsort(-(queries @ corpus.T), axis=1, kind='stable')[:, :9]
  for rows, columns in ((100, 1000), (3, 16)):
    scores, found = similarity.nearest(queries, corpus, 9, rows=rows, columns=columns)
    np.testing.assert_array_equal(found, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(queries @ corpus.T, order, 1))


def test_ranking_metrics_equal_a_brute_force():
  rng, rankings, relevant = np.random.default_rng(0), [], []
  for _ in range(30):
    rankings.append(rng.permutation(150)[:100].tolist())
    relevant.append({int(i): int(rng.integers(0, 3)) for i in rng.integers(0, 150, 25)} | {0: 1})
  found = metrics.retrieval(rankings, relevant)
  sums = dict.fromkeys(found, 0.0)
  for ranking, gold in zip(rankings, relevant, strict=True):
    good = [name for name, value in gold.items() if value]
    places = [place for place, name in enumerate(ranking, 1) if name in good]
    ideal = sorted(gold.values(), reverse=True)[:10]
    gain = lambda values: sum(v / np.log2(i + 1) for i, v in enumerate(values, 1))  # noqa: E731
    sums['ndcg@10'] += gain([gold.get(name, 0) for name in ranking[:10]]) / gain(ideal)
    sums['mrr@10'] += 1 / places[0] if places and places[0] <= 10 else 0
    sums['recall@10'] += sum(place <= 10 for place in places) / len(good)
    sums['recall@100'] += len(places) / len(good)
    sums['map@100'] += sum(n / place for n, place in enumerate(places, 1)) / len(good)
  assert found == pytest.approx({name: value / 30 for name, value in sums.items()})
  with pytest.raises(ValueError, match='no relevant document'):
    metrics.retrieval([[1]], [{1: 0}])
