"""Serve: a model as a small HTTP service, on this machine only unless --host is set.

  bertjax serve --model=DIR
  curl localhost:8000/predict -H 'content-type: application/json' \\
      -d '{"do": "classify", "inputs": ["A fine film."]}'

  POST /predict    {"do": ..., "inputs": [a text, or a list of texts, ...], and options}; the names
                   are those of `bertjax predict`, but for nearest; of tag, a list is a text's words
  POST /embed      {"inputs": [texts], "pooling": "mean"}
  POST /nearest    {"inputs": [texts], "top_k": 5}: the nearest texts of --index
  POST /rerank     {"query": text, "documents": [texts], "top_k": 5}: documents by their score
  GET  /           a page to try it; /explain?text= shows attention; /docs is the OpenAPI page
  GET  /healthz    the model, and what can be asked of it; /metrics is for Prometheus

What comes at the same time is answered in batches. Errors are {"detail": a sentence}: 400 and 422
what is asked is wrong, 408 a request that came too slowly, 413 one too large, 503 the queue is full
or the server is shutting down, 504 an answer took too long. SIGTERM answers what waits and ends
the service. Without a password: put a proxy before it where others can reach it.
"""

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import time
from typing import Annotated, Literal

import numpy as np

from bertjax import io, pages
from bertjax.data import words
from bertjax.inference import inspect
from bertjax.inference.batcher import Batcher, BusyError
from bertjax.inference.predictor import CALLS, Predictor
from bertjax.inference.runner import TextError
from bertjax.inference.search import Index

try:
  import fastapi
  import prometheus_client
  import pydantic
  import uvicorn
  from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
except ModuleNotFoundError as error:
  raise ModuleNotFoundError(
    f"serve needs {error.name}, which is not installed: pip install -e '.[serve]'"
  ) from error

_log = logging.getLogger(__name__)


# By compile_all; rerank runs the program of classify.
UNCOMPILED = {'infill', 'score', 'continue', 'correct', 'nearest', 'rerank', 'summarise'}

Text = Annotated[str, pydantic.Field(max_length=50_000)]


class Question(pydantic.BaseModel):
  """A request to /predict; the options are those of `Predictor`'s methods."""

  model_config = pydantic.ConfigDict(extra='forbid', json_schema_extra={
    'examples': [{'do': 'fill_mask', 'inputs': ['The [MASK] is open.'], 'top_k': 3}]
  })  # fmt: skip
  do: str
  inputs: list[Text | list[Text]] = pydantic.Field(min_length=1, max_length=64)
  top_k: int | None = pydantic.Field(None, ge=1, le=100)
  ratio: float | None = pydantic.Field(None, gt=0)
  max_new_tokens: int | None = pydantic.Field(None, ge=1, le=512)
  temperature: float | None = pydantic.Field(None, gt=0, allow_inf_nan=False)
  seed: int | None = pydantic.Field(None, ge=0)
  words: Literal['text', 'spaces', 'tokens'] | None = None
  sentences: int | None = pydantic.Field(None, ge=1, le=50)
  pooling: Literal['mean', 'cls', 'last_four'] | None = None
  no_answer: bool | None = None
  threshold: float | None = pydantic.Field(None, allow_inf_nan=False)
  max_answer: int | None = pydantic.Field(None, ge=1, le=512)


class EmbedQuestion(pydantic.BaseModel):
  """A request to /embed."""

  model_config = pydantic.ConfigDict(extra='forbid')
  inputs: list[Text] = pydantic.Field(min_length=1, max_length=64)
  pooling: Literal['', 'mean', 'cls', 'last_four'] = ''  # '' = the model's own


class NearestQuestion(pydantic.BaseModel):
  """A request to /nearest."""

  model_config = pydantic.ConfigDict(extra='forbid')
  inputs: list[Text] = pydantic.Field(min_length=1, max_length=64)
  top_k: int = pydantic.Field(5, ge=1, le=100)


class RerankQuestion(pydantic.BaseModel):
  """A request to /rerank."""

  model_config = pydantic.ConfigDict(extra='forbid', json_schema_extra={
    'examples': [{'query': 'Where is my order?', 'top_k': 1,
                  'documents': ['Orders are tracked under Account.', 'We sell books.']}]
  })  # fmt: skip
  query: Text
  documents: list[Text] = pydantic.Field(min_length=1, max_length=999)
  top_k: int = pydantic.Field(0, ge=0, le=999)  # 0 = all


def run(
  *, model: str, index: str = '', host: str = '127.0.0.1', port: int = 8000, batch_size: int = 32,
  long: str = 'refuse', warm_up: bool = True, **limits,
) -> None:  # fmt: skip
  """Serves until SIGTERM or SIGINT.

  Raises:
    ValueError: if there is no model, or a limit is none.
    OSError: if the port is taken.
  """
  if not model:
    raise ValueError('serve needs --model=DIR.')
  if not host or not 0 <= port < 65_536:
    raise ValueError(f'--host and a --port of 0..65535 are needed, got {host!r} and {port}.')
  predictor = Predictor.from_dir(model, batch_size=batch_size, long=long)
  corpus = predictor.load_index(index) if index else None
  app = make_app(predictor, pages.run_name(model), corpus, **limits)
  listening = socket.create_server((host, port))
  if warm_up:
    compile_all(predictor)
  config = uvicorn.Config(
    app, log_level='warning', timeout_graceful_shutdown=60, limit_concurrency=2048
  )
  signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn sends it again when all is done
  _log.info('http://%s:%d', host, listening.getsockname()[1])
  uvicorn.Server(config).run([listening])


def make_app(
  predictor: Predictor, name: str, index: Index | None = None, *, queue: int = 1024,
  wait_ms: int = 5, timeout: float = 30, max_body: int = 262_144,
) -> fastapi.FastAPI:  # fmt: skip
  """The ASGI application; the limits are those of `bertjax serve --help`."""
  if queue < 1 or wait_ms < 0 or timeout <= 0 or max_body < 1:
    raise ValueError('--queue, --timeout and --max_body must be above 0, --wait_ms not below.')
  service = Service(predictor, name, index, queue, wait_ms / 1000, timeout)
  app = fastapi.FastAPI(title=f'bertjax: {name}', lifespan=service.lifespan)
  app.add_middleware(BodyLimit, most=max_body, seconds=timeout)
  app.middleware('http')(service.watch)
  app.post('/predict')(service.predict)
  app.post('/embed')(service.embed)
  if index is not None:
    app.post('/nearest')(service.nearest)
  if 'rerank' in predictor.calls():
    app.post('/rerank')(service.rerank)
  app.get('/explain', response_class=HTMLResponse)(service.explain)
  app.get('/healthz')(service.healthz)
  app.get('/metrics', response_class=PlainTextResponse)(service.metrics)
  app.get('/', response_class=HTMLResponse, include_in_schema=False)(service.demo)
  for kind, status in (
    (ValueError, 400), (TextError, 422), (BusyError, 503), (TimeoutError, 504),
  ):  # fmt: skip
    app.add_exception_handler(kind, _handler(status))
  app.add_exception_handler(fastapi.exceptions.RequestValidationError, _malformed)
  return app


class Service:
  """What the addresses answer.

  Args:
    predictor: the model.
    name: its name.
    index: what /nearest searches.
    queue: texts that wait at most.
    wait: seconds for which a text waits for others.
    timeout: seconds until a caller is given up.
  """

  def __init__(
    self, predictor: Predictor, name: str, index: Index | None, queue: int, wait: float,
    timeout: float,
  ):  # fmt: skip
    self._predictor, self._name, self._index, self._timeout = predictor, name, index, timeout
    self._registry = registry = prometheus_client.CollectorRegistry()
    self._requests = prometheus_client.Counter(
      'bertjax_requests', 'Requests', ['path', 'status'], registry=registry
    )
    self._seconds = prometheus_client.Histogram(
      'bertjax_request_seconds', 'Seconds to the answer', ['path'], registry=registry
    )
    sizes = prometheus_client.Histogram(
      'bertjax_batch_texts', 'Texts of a call', buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
    )
    waiting = prometheus_client.Gauge('bertjax_waiting_texts', 'Texts that wait', registry=registry)
    self._batcher = Batcher(
      self._answer, batch=predictor.runner.batch_size, queue=queue, wait=wait,
      watch=sizes.observe,
    )  # fmt: skip
    waiting.set_function(lambda: self._batcher.waiting)

  @contextlib.asynccontextmanager
  async def lifespan(self, app):
    """Answers between start and end."""
    self._batcher.start()
    yield
    await self._batcher.close()

  async def watch(self, request: fastapi.Request, call_next):
    """Counts requests and their times."""
    start = time.perf_counter()
    response = await call_next(request)
    path = getattr(request.scope.get('route'), 'path', 'other')
    self._requests.labels(path, response.status_code).inc()
    self._seconds.labels(path).observe(time.perf_counter() - start)
    return response

  async def predict(self, question: Question):
    """Answers texts."""
    if question.do == 'nearest':
      raise ValueError('nearest is not served here; ask /nearest, which needs --index.')
    one = question.do == 'tag'  # a list is the words of a text
    items = [(item,) if one or isinstance(item, str) else tuple(item) for item in question.inputs]
    options = question.model_dump(exclude={'do', 'inputs'}, exclude_none=True)
    return JSONResponse({'results': await self._ask(question.do, items, options)})

  async def embed(self, question: EmbedQuestion):
    """Unit vectors of texts."""
    items = [(text,) for text in question.inputs]
    options = {'pooling': question.pooling, 'normalise': True}
    # FastAPI's own conversion would look at each number.
    return JSONResponse({'embeddings': await self._ask('embed', items, options)})

  async def nearest(self, question: NearestQuestion):
    """The nearest texts of the index."""
    items = [(text,) for text in question.inputs]
    return JSONResponse(
      {'results': await self._wait(('nearest', ('top_k', question.top_k)), items)}
    )

  async def rerank(self, question: RerankQuestion):
    """The documents of a query, best first."""
    item = (question.query, *question.documents)
    [ranked] = await self._ask('rerank', [item], {'top_k': question.top_k})
    return {'results': ranked}

  async def explain(self, text: str, pair: str = ''):
    """A page on one text: attention, layers, attributions."""
    [page] = await self._wait(('explain',), [(text, pair)])
    return page

  async def healthz(self):
    """The model, and what can be asked of it."""
    return {'status': 'ok', 'model': self._name, 'calls': self._calls()}

  def _calls(self) -> list[str]:
    return [name for name in self._predictor.calls() if name != 'nearest']

  async def metrics(self):
    """Counts and times, for Prometheus."""
    return prometheus_client.generate_latest(self._registry).decode()

  async def demo(self):
    """The page to try it."""
    names = [*self._calls(), *(['nearest'] if self._index else []), 'explain']
    return pages.render(
      self._name, template='service.html', data={'model': self._name, 'calls': names}
    )

  async def _ask(self, do: str, items: list, options: dict) -> list:
    for count in sorted({len(item) for item in items}):
      self._predictor.check_call(do, count, options)
    return await self._wait((do, *sorted(options.items())), items)

  async def _wait(self, key: tuple, items: list) -> list:
    return await asyncio.wait_for(self._batcher.ask(key, items), self._timeout)

  def _answer(self, key: tuple, items: list) -> list:
    """The result of each item, or an exception with the reason why there is none."""
    do, *options = key
    if do == 'explain':
      return [self._explain(*item) for item in items]
    options = dict(options) | ({'corpus': self._index} if do == 'nearest' else {})
    answers = self._predictor.call_each(do, items, options)
    return [TextError(a['error']) if 'error' in a else a['result'] for a in answers]

  def _explain(self, text: str, pair: str):
    try:
      found = inspect.explain(self._predictor, text, pair)
      return inspect.to_html(found, self._name)
    except ValueError as error:
      return TextError(str(error))


def _handler(status: int):
  async def respond(request, error):
    sentence = str(error) or 'the answer took too long; send fewer or shorter texts.'
    headers = {'retry-after': '1'} if status == 503 else None
    return JSONResponse({'detail': sentence}, status, headers)

  return respond


async def _malformed(request, error):
  """FastAPI's own answer would repeat the input, which may not even be encodable."""
  reasons = [f'{".".join(map(str, e["loc"]))}: {e["msg"]}' for e in error.errors()[:3]]
  return JSONResponse({'detail': '; '.join(reasons)}, 422)


def compile_all(predictor: Predictor) -> None:
  """Answers made-up texts of all lengths, so that no real ones wait for a compiler."""
  _log.info('compiling for all lengths; with --nowarm_up it is done at the first texts')
  tokenizer = predictor.tokenizer
  whole = (tokenizer.word_flags & (words.BEGINS | words.BLANK)) == words.BEGINS
  word, _ = tokenizer.word_of(tokenizer.vocab[int(np.flatnonzero(whole)[-1])])
  dos = set(predictor.calls()) - UNCOMPILED
  programs = list(itertools.product(dos, predictor.runner.lengths, predictor.runner.sizes))
  with io.progress('compiling', len(programs)) as update:
    for done, (do, length, count) in enumerate(programs):
      update(done)
      text = f'{tokenizer.vocab[tokenizer.mask_id]} ' + f'{word} ' * (length - 8)
      item = (text, *[word] * (CALLS[do].least - 1))
      predictor.call_each(do, [item[::-1] if do == 'answer' else item] * count, {})


class BodyLimit:
  """ASGI middleware: refuses requests that are incomplete, too slow or too large."""

  def __init__(self, app, most: int, seconds: float):
    self.app, self.most, self.seconds = app, most, seconds

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self.app(scope, receive, send)
      return
    try:
      body, size = await asyncio.wait_for(self._read(receive), self.seconds)
    except TimeoutError:
      refusal = JSONResponse({'detail': 'the request came too slowly.'}, 408)
      await refusal(scope, receive, send)
      return
    if size > self.most:
      sentence = f'a request may have {self.most} bytes, got {size}; send several.'
      await JSONResponse({'detail': sentence}, 413)(scope, receive, send)
      return
    message = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def replay():
      return message.pop() if message else await receive()

    await self.app(scope, replay, send)

  async def _read(self, receive) -> tuple[bytes, int]:
    """The body as far as it is allowed, and its size; read to its end, for only then do clients
    read the answer."""
    body, size, more = [], 0, True
    while more:
      message = await receive()
      part, more = message.get('body', b''), message.get('more_body', False)
      size += len(part)
      if size <= self.most:
        body.append(part)
    return b''.join(body), size
