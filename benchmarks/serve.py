"""A served model under load: how many answers a second, how late, and is any lost or wrong.

  bertjax serve --model=DIR &
  python -m benchmarks serve --texts=FILE

Each client asks /embed for a text, waits for the answer and asks again. Answers are compared with
those that the texts got one by one before. `lost` counts requests without an answer of status 200.
"""

import asyncio
import functools
import json
import pathlib
import time
import urllib.parse

import numpy as np

from benchmarks import machine

FLAGS = {
  'url': ('http://127.0.0.1:8000', 'of the service'),
  'texts': ('', 'a file with a text a line'),
  'count': (200, 'texts, spread evenly over the lines'),
  'clients': (64, 'at a time'),
  'seconds': (60.0, 'of load'),
  'out': ('', 'JSON file to write'),
}


def run(url, texts, count, clients, seconds, out):
  lines = [line for line in pathlib.Path(texts).read_text('utf-8').splitlines() if line.strip()]
  lines = lines[:: max(1, len(lines) // count)][:count]
  result = asyncio.run(load(url, lines, clients, seconds))
  times = result.pop('times')
  for share in (50, 95, 99):
    result[f'ms_p{share}'] = round(1000 * float(np.percentile(times, share)), 1)
  result |= {'clients': clients, 'seconds': seconds, 'texts': len(lines),
             'answers_per_second': round(result['answers'] / seconds, 1)}  # fmt: skip
  print('| ' + ' | '.join(result) + ' |\n' + '|---' * len(result) + '|')
  print('| ' + ' | '.join(map(str, result.values())) + ' |')
  if out:
    pathlib.Path(out).write_text(json.dumps(result | machine(), indent=1) + '\n')
  return result


async def load(url: str, texts: list[str], clients: int, seconds: float) -> dict:
  """Asks from many clients at once; returns the counts, and the seconds of each answer.

  Requests are written to the sockets as they are: a client library takes more processor time for a
  request than the service, and from the same cores.
  """
  parts = urllib.parse.urlsplit(url)
  requests = [request_of(parts.netloc, text) for text in texts]
  connect = functools.partial(asyncio.open_connection, parts.hostname, parts.port)

  async def ask(streams, request):
    reader, writer = streams
    writer.write(request)
    head = (await reader.readuntil(b'\r\n\r\n')).lower()
    size = int(head.partition(b'content-length:')[2].partition(b'\r')[0])
    body = await reader.readexactly(size)
    if head.split(None, 2)[1] != b'200':
      raise ConnectionError(body)
    return np.array(json.loads(body)['embeddings'][0])

  streams = await connect()
  expected = [await ask(streams, request) for request in requests]
  counts = {'answers': 0, 'lost': 0, 'wrong': 0, 'times': []}
  end = time.perf_counter() + seconds

  async def work(number):
    streams = await connect()
    while (start := time.perf_counter()) < end:
      try:
        vector = await ask(streams, requests[number % len(texts)])
      except (OSError, EOFError):
        counts['lost'] += 1
        streams = await connect()
        continue
      counts['times'].append(time.perf_counter() - start)
      counts['answers'] += 1
      counts['wrong'] += bool(np.abs(vector - expected[number % len(texts)]).max() > 1e-4)
      number += clients

  await asyncio.gather(*map(work, range(clients)))
  return counts


def request_of(host: str, text: str) -> bytes:
  """The bytes of a request for the embedding of a text."""
  body = json.dumps({'inputs': [text]}).encode()
  head = (
    f'POST /embed HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n'
    f'content-length: {len(body)}\r\n\r\n'
  )
  return head.encode() + body
