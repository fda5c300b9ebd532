"""A map over spawned worker processes that keeps the order and bounds what is in memory."""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator

_UNIT = 2**23  # characters


class _Process(multiprocessing.context.SpawnProcess):
  """A spawned process that does not import the parent's `__main__`.

  Workers run functions of this package only. Importing `__main__` would run a script without a main
  guard again, which then waits for the lock that its parent holds; a script from stdin has no file
  to import at all.
  """

  def start(self):
    main = vars(sys.modules['__main__'])
    hidden = {name: main.pop(name) for name in ('__file__', '__spec__') if name in main}
    main['__spec__'] = None  # multiprocessing reads it
    try:
      super().start()
    finally:
      main.update(hidden)


class _Context(multiprocessing.context.SpawnContext):
  Process = _Process


@contextlib.contextmanager
def processes(count: int, threads: bool = True):
  """Gives `in_order(function, items)`: a lazy map over `count` spawned processes.

  Functions and items must be picklable. The processes live as long as the context, so what a
  function caches in one is there at its next call. A count of 0 means two threads of this process,
  for functions that spend their time in libraries, or with threads=False `map` itself.
  """
  if not count and not threads:
    yield map
  elif not count:
    with threads_in_order(2) as in_order:
      yield in_order
  else:
    pool = concurrent.futures.ProcessPoolExecutor(count, _Context(), _use_one_thread)
    with pool as executor:
      yield functools.partial(_in_order, executor, count)


@contextlib.contextmanager
def threads_in_order(count: int):
  """Gives `in_order(function, items)`, as `processes` does, over `count` threads."""
  with concurrent.futures.ThreadPoolExecutor(count) as executor:
    yield functools.partial(_in_order, executor, count)


def _in_order(executor, count: int, function: Callable, items: Iterable) -> Iterator:
  ahead = collections.deque()
  try:
    for item in items:
      ahead.append(executor.submit(function, item))
      if len(ahead) > 2 * count:  # who makes the items waits for the workers
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()
  except RuntimeError as error:  # an iterator left open closes at exit, without imported modules
    if not isinstance(error, concurrent.futures.process.BrokenProcessPool):
      raise
    message = 'a worker process died, perhaps for want of memory; run again with fewer --workers.'
    raise RuntimeError(message) from error
  finally:
    for future in ahead:
      future.cancel()


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def batches(texts: Iterable[str], chars: int) -> Iterator[list[str]]:
  """Splits a stream of texts into lists of about so many characters."""
  batch, size = [], 0
  for text in texts:
    batch.append(text)
    size += len(text)
    if size >= chars:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def map_units(function: Callable, texts: Iterable[str], workers: int = 1) -> Iterator:
  """Yields function(list of texts) for units of about 8 million characters, in order.

  The units depend on the texts only, so the results do not depend on the number of processes.

  Args:
    function: picklable; it runs in this process if there is only one unit or one worker.
    texts: documents; a longer one is a separate unit.
    workers: processes, spawned.
  """
  units = batches(texts, _UNIT)
  first = list(itertools.islice(units, 2))
  count = workers if workers > 1 and len(first) > 1 else 0
  with processes(count, threads=False) as in_order:  # functions keep a memo
    yield from in_order(function, itertools.chain(first, units))


def _use_one_thread() -> None:
  """One thread of TensorFlow or `tokenizers` in each worker: their number fills the cores."""
  names = ('TF_NUM_INTRAOP_THREADS', 'TF_NUM_INTEROP_THREADS', 'RAYON_NUM_THREADS')
  os.environ.update(dict.fromkeys(names, '1'), TF_CPP_MIN_LOG_LEVEL='3')
