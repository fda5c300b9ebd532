"""Micro-batching: what comes together is answered together, nothing is lost."""

import asyncio

import pytest

from bertjax.inference.batcher import Batcher, BusyError


def run_batcher(script, answer, **options):
  async def body():
    batcher = Batcher(answer, **({'batch': 4, 'queue': 8, 'wait': 0.05} | options))
    batcher.start()
    try:
      return await script(batcher)
    finally:
      await batcher.close()

  return asyncio.run(body())


def test_what_comes_together_is_answered_together_by_kind():
  seen = []

  def answer(key, items):
    seen.append((key, items))
    return [f'{key}{item}' for item in items]

  async def script(batcher):
    asked = [batcher.ask(key, [item]) for key, item in ('a1', 'b2', 'a3', 'a4', 'a5')]
    return await asyncio.gather(*asked)

  assert run_batcher(script, answer) == [['a1'], ['b2'], ['a3'], ['a4'], ['a5']]
  assert seen == [('a', ['1', '3', '4']), ('b', ['2']), ('a', ['5'])]


def test_a_full_queue_refuses_all_of_a_request_and_recovers():
  async def script(batcher):
    first = asyncio.gather(*(batcher.ask('a', [i, i]) for i in range(4)))
    await asyncio.sleep(0)
    with pytest.raises(BusyError, match='try again'):
      await batcher.ask('a', [9])
    await first
    return await batcher.ask('a', [10])

  assert run_batcher(script, lambda key, items: items) == [10]


def test_a_failing_call_fails_its_callers_only():
  def answer(key, items):
    if key == 'bad':
      raise RuntimeError('broken')
    return [ValueError('this one') if item == 2 else item for item in items]

  async def script(batcher):
    asked = [batcher.ask('bad', [1]), batcher.ask('good', [1]), batcher.ask('good', [2])]
    found = await asyncio.gather(*asked, return_exceptions=True)
    return [*found, await batcher.ask('good', [3])]

  bad, good, one, later = run_batcher(script, answer)
  assert isinstance(bad, RuntimeError) and isinstance(one, ValueError)
  assert (good, later) == ([1], [3])


def test_requests_of_gone_clients_are_skipped():
  seen = []

  async def script(batcher):
    with pytest.raises(TimeoutError):
      await asyncio.wait_for(batcher.ask('a', [1]), 0.01)
    return await batcher.ask('a', [2])

  answer = lambda key, items: seen.extend(items) or items  # noqa: E731
  assert run_batcher(script, answer, wait=0.1) == [2] and seen == [2]
