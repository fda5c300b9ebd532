"""Multi-process start-up, consistency checks and a straggler watchdog.

`jax.distributed` is the engine; it ends every process when one of them dies. This module names what
it does not: processes that did not join, that were launched with different flags, or that stall.
Launchers restart the same command on exit code 75 (`stopping.STOPPED_EXIT_CODE`).
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import socket
import sys
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from bertjax import io
from bertjax.training.stopping import STOPPED_EXIT_CODE

# The only private names of jax in the package. A release may move them; without them processes
# start without the handshake, and a stall is reported without the state of the other processes.
try:
  from jax._src.clusters import ClusterEnv  # the detection inside jax.distributed.initialize
  from jax._src.distributed import global_state  # has the store that the processes share

  _detect = ClusterEnv.auto_detect_unset_distributed_params
except (ImportError, AttributeError):
  _detect = global_state = None

_log = logging.getLogger(__name__)

START_SECONDS = 300  # how long the first process waits for the last one
LEAVE_SECONDS = 5  # how long a process that failed waits for others that fail too


def start(coordinator_address: str = '', num_processes: int = 0, process_id: int = -1) -> None:
  """Joins the other processes of this run, if there are any, before jax touches a device.

  Raises:
    ValueError: for flags that contradict, or if the processes were started with different words.
    SystemExit: with code 75, after naming those that did not join within `START_SECONDS`.
  """
  if jax.distributed.is_initialized():
    return
  coordinator, processes, process, local = coordinator_address, num_processes, process_id, None
  if coordinator and not 0 <= process < processes:
    raise ValueError(
      f'--coordinator_address={coordinator} needs --num_processes=N and --process_id=0..N-1, got '
      f'--num_processes={processes} --process_id={process}.'
    )
  if not coordinator and (processes, process) not in ((0, -1), (1, -1), (1, 0)):
    raise ValueError(
      f'--num_processes={processes} and --process_id={process} need '
      '--coordinator_address=HOST:PORT; without it they are taken from TPU metadata or SLURM.'
    )
  if not coordinator and processes == 0 and _in_cluster():
    if _detect:
      coordinator, processes, process, local = _detect(None, None, None, None, None, START_SECONDS)
    else:
      _log.warning('jax %s moved its cluster detection; starting without it', jax.__version__)
      jax.distributed.initialize()
  if coordinator and processes != 1:
    try:
      handshake(coordinator, processes, process, START_SECONDS)
    except OSError as error:  # late hosts, a port not free yet: launchers try again
      _log.error('%s', error)
      raise SystemExit(STOPPED_EXIT_CODE) from error
    _keep_stdout()
    jax.distributed.initialize(coordinator, processes, process, local_device_ids=local)
    sys.excepthook = _leave_after_error
  if jax.distributed.is_initialized():
    # A process that found a program in the cache of its host would not help others to compile it.
    if jax.config.jax_compilation_cache_dir == io.compilation_cache():
      jax.config.update('jax_compilation_cache_dir', None)
    if jax.process_index():
      logging.getLogger('bertjax').setLevel(logging.WARNING)  # process 0 logs for all
    _log.info('%d processes, %d devices', jax.process_count(), jax.device_count())


def leave(code: int) -> None:
  """Ends this process after an error; returns if it is the only one.

  jax's own end waits five minutes for the other processes, which wait for this one in a
  collective. If all of them fail alike they still end together, so that each logs its error;
  otherwise jax ends the others when it notices, by a broken connection or missing heartbeats.
  """
  if not jax.distributed.is_initialized():
    return
  sys.stdout.flush()
  sys.stderr.flush()
  together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  together.start()
  together.join(LEAVE_SECONDS)
  os._exit(code)


def _leave_after_error(kind, error, trace) -> None:
  sys.__excepthook__(kind, error, trace)
  if issubclass(kind, Exception):
    leave(1)


def _keep_stdout() -> None:
  """Leaves stdout to Python: the libraries of collectives print there when they connect, into the
  JSON and CSV of programs."""
  if sys.stdout is sys.__stdout__:
    sys.stdout.flush()
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = open(os.dup(1), 'w', encoding=encoding, errors=errors)  # noqa: SIM115, PTH123
  os.dup2(2, 1)


def _in_cluster() -> bool:
  slurm = int(os.environ.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_PROCID' in os.environ
  tpu = 'TPU_WORKER_HOSTNAMES' in os.environ or any(
    pathlib.Path(device).exists() for device in ('/dev/accel0', '/dev/vfio/0')
  )
  return slurm or tpu


def handshake(coordinator: str, processes: int, process: int, seconds: float) -> None:
  """Waits until all processes have come, each with the same command line.

  Speaks over the coordinator's port, before jax takes it: every process says who it is, and
  process 0 answers all of them at once, with 'go' or with what is wrong.

  Raises:
    TimeoutError: if some are missing after `seconds`.
    ValueError: if one was started with other words than process 0.
  """
  host, _, port = coordinator.rpartition(':')
  words = '\n'.join(['', *sys.argv[1:], ''])
  words = re.sub(r'\n--?process_id[=\n]\d+(?=\n)', '', words).split('\n')
  hello = {'process': process, 'host': socket.gethostname(), 'words': words}
  limit = time.monotonic() + seconds
  if process == 0:
    answer = _count(int(port), processes, hello, limit)
  else:
    answer = _join(host, port, hello, limit)
  if answer != 'go':
    raise (ValueError if 'started with' in answer else TimeoutError)(answer)


def _count(port: int, processes: int, hello: dict, limit: float) -> str:
  """Process 0's side: accepts hellos until all have come; sends all of them the answer."""
  came, wrong = {}, ''
  with socket.create_server(('', port)) as server, contextlib.ExitStack() as open_ones:
    while len(came) < processes - 1 and time.monotonic() < limit:
      server.settimeout(max(limit - time.monotonic(), 0.01))
      with contextlib.suppress(TimeoutError, OSError, ValueError):  # a port scan is no process
        peer = open_ones.enter_context(server.accept()[0])
        peer.settimeout(5)
        said = json.loads(peer.makefile('r').readline())
        came[said['process']] = peer
        if said['words'] != hello['words']:
          wrong = (
            f'process {said["process"]} on {said["host"]} was started with {said["words"]}, '
            f'process 0 with {hello["words"]}; start all of them with the same flags.'
          )
    missing = sorted(set(range(1, processes)) - came.keys())
    if missing:
      wrong = (
        f'{len(missing)} of {processes} processes did not join: {missing}. Look at the logs of '
        'their hosts, and whether they reach the coordinator.'
      )
    for peer in came.values():
      with contextlib.suppress(OSError):
        peer.sendall((wrong or 'go').encode() + b'\n')
  return wrong or 'go'


def _join(host: str, port: str, hello: dict, limit: float) -> str:
  """The others' side: says hello, as soon as process 0 listens, and waits for its answer."""
  while time.monotonic() < limit:
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as peer:
      peer.settimeout(max(limit - time.monotonic(), 0.01) + 10)  # process 0 counts longer
      peer.sendall(json.dumps(hello).encode() + b'\n')
      if answer := peer.makefile('r').readline().strip():
        return answer
    time.sleep(0.2)
  return f'process 0 is not reachable at {host}:{port}; look at the log of its host.'


def agree(name: str, value) -> None:
  """Raises ValueError unless all processes hold the same JSON value; names those that do not."""
  text = json.dumps(value, sort_keys=True, default=str)
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], np.uint32)
  every = multihost_utils.process_allgather(digest).reshape(-1)
  other = [int(i) for i in np.flatnonzero(every != every[0])]
  if other:
    raise ValueError(
      f'processes {other} have another {name} than process 0; give all of them the same recipe, '
      'data and version.'
    )


def all_true(value: bool) -> bool:
  """Whether `value` holds on every process; a meeting point for all of them."""
  return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def total(values) -> np.ndarray:
  """The sum over all processes of an array that each has."""
  return multihost_utils.process_allgather(np.asarray(values)[None], tiled=True).sum(0)


def gather(value) -> list:
  """A JSON value of every process, in their order."""
  if jax.process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  size = int(np.max(multihost_utils.process_allgather(np.array(len(text)))))
  texts = multihost_utils.process_allgather(np.frombuffer(text.ljust(size), np.uint8))
  return [json.loads(text.tobytes()) for text in texts]


def host_copy(tree):
  """Gathers sharded arrays to complete NumPy arrays on every process."""
  return multihost_utils.process_allgather(tree, tiled=True)


class Watch:
  """Ends this process when a step takes longer than `seconds`, after naming who holds it up.

  Use it around the loop, which calls `at` with all that it begins. 0 seconds watch nothing.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._now = (0, 'starting', time.monotonic())
    self._done = threading.Event()
    self._client, self._process = getattr(global_state, 'client', None), jax.process_index()

  def at(self, step: int, doing: str) -> None:
    """Notes what this process begins to do for a step."""
    self._now = (step, doing, time.monotonic())

  def __enter__(self):
    if self._seconds:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_):
    self._done.set()

  def _watch(self):
    while not self._done.wait(min(self._seconds / 4, 10)):
      step, doing, since = self._now
      waited = time.monotonic() - since
      if self._client:
        note = json.dumps([step, doing, socket.gethostname()])
        with contextlib.suppress(Exception):  # a dead coordinator: jax ends this process soon
          self._client.key_value_set(f'bertjax/{self._process}', note, allow_overwrite=True)
      if waited > self._seconds:
        _log.error(
          'nothing has moved for %.0f s (stall_seconds=%g): %s. Ending with code %d; start the '
          'same command again.', waited, self._seconds, self._blame(), STOPPED_EXIT_CODE,
        )  # fmt: skip
        sys.stderr.flush()
        os._exit(STOPPED_EXIT_CODE)  # the main thread waits inside a collective

  def _blame(self) -> str:
    """Those who have come least far, and of these the ones that do not wait for others."""
    notes = {self._process: [*self._now[:2], socket.gethostname()]}
    if self._client:
      try:
        found = self._client.key_value_dir_get('bertjax/')
        notes |= {int(key.rsplit('/', 1)[1]): json.loads(note) for key, note in found}
      except Exception:  # it has ended: what this one waited for is all that is known
        step, doing, host = notes[self._process]
        return f'process 0 has gone, process {self._process} on {host} is {doing} at step {step}'
    first = min(step for step, _, _ in notes.values())
    behind = {i: note for i, note in notes.items() if note[0] == first}
    busy = {i: note for i, note in behind.items() if not note[1].startswith('waiting')}
    return ', '.join(
      f'process {i} on {host} is {doing} at step {step}'
      for i, (step, doing, host) in sorted((busy or behind).items())
    )
