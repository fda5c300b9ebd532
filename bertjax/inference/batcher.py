"""`Batcher`: what many callers ask at the same time, answered in batches by one thread."""

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Hashable, Sequence

_log = logging.getLogger(__name__)


class BusyError(RuntimeError):
  """The queue is full; try again later."""


class Batcher:
  """A bounded queue before a function.

  Args:
    answer: (key, items) -> a result for each item; runs in a separate thread, one call at a time.
    batch: items of a call at most, unless a caller brings more; those of one call have one key.
    queue: items that wait at most.
    wait: seconds to wait for others when one has come.
    watch: gets the number of items of each call.
  """

  def __init__(
    self, answer: Callable[[Hashable, list], list], *, batch: int, queue: int, wait: float,
    watch: Callable[[int], None] = lambda size: None,
  ):  # fmt: skip
    self._answer, self._batch, self._limit, self._wait = answer, batch, queue, wait
    self._watch, self._waiting, self._open = watch, asyncio.Queue(), False
    self._pool = concurrent.futures.ThreadPoolExecutor(1)

  @property
  def waiting(self) -> int:
    return self._waiting.qsize()

  def start(self) -> None:
    """Begins to answer; call it within the event loop."""
    self._open, self._worker = True, asyncio.create_task(self._work())

  async def close(self) -> None:
    """Refuses what comes, answers what waits, and ends."""
    self._open = False
    await self._waiting.join()
    self._worker.cancel()
    self._pool.shutdown()

  async def ask(self, key: Hashable, items: Sequence) -> list:
    """The results of items; a caller that stops waiting gets none.

    Raises:
      BusyError: if they do not all fit in the queue.
    """
    if not self._open or self.waiting + len(items) > self._limit:
      raise BusyError('the server is busy; try again in a second.')
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in items]
    for item, future in zip(items, futures, strict=True):
      self._waiting.put_nowait((key, item, future))
    return await asyncio.gather(*futures)

  async def _work(self) -> None:
    while True:
      taken = [await self._waiting.get()]
      if self.waiting < self._batch - 1:
        await asyncio.sleep(self._wait)
      while len(taken) < self._batch and self.waiting:
        taken.append(self._waiting.get_nowait())
      groups = {}
      for key, item, future in taken:
        if not future.done():  # its caller has gone
          groups.setdefault(key, []).append((item, future))
      for key, group in groups.items():
        await self._call(key, group)
      for _ in taken:
        self._waiting.task_done()

  async def _call(self, key, group) -> None:
    self._watch(len(group))
    items = [item for item, _ in group]
    try:
      results = await asyncio.get_running_loop().run_in_executor(
        self._pool, self._answer, key, items
      )
    except Exception as error:  # one bad call must not end the service
      _log.exception('a call of %s failed', key)
      results = [error] * len(items)
    for (_, future), result in zip(group, results, strict=True):
      if future.done():
        continue
      if isinstance(result, Exception):
        future.set_exception(result)
      else:
        future.set_result(result)
