"""Input and output that other modules share.

A file or directory is written under a temporary name and then renamed, so that a killed process
leaves the old content or none, never a part of the new. TensorFlow, where it is used at all, reads
and writes files; the accelerators belong to JAX.
"""

import contextlib
import ctypes
import importlib
import json
import logging
import os
import pathlib
import platform
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator

import tqdm
from etils import epath

_LOG_SECONDS = 20
# Parameters of malloc.h: one arena, as only the first one may hold blocks over 64 MB; none of them
# directly from the system; and the rest of the heap stays when its end is freed.
_MALLOPT = {'M_ARENA_MAX': (-8, 1), 'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, -1)}
_CACHE_BYTES = 2_000_000_000  # of compiled programs; those not used for longest go first

_log = logging.getLogger(__name__)


def compilation_cache() -> str:
  """Returns the folder of compiled programs, in `$BERTJAX_CACHE` or ~/.cache/bertjax; '' if that is
  remote or cannot be written to."""
  folder = os.environ.get('BERTJAX_CACHE') or '~/.cache/bertjax'
  try:
    path = pathlib.Path(folder).expanduser() / 'compiled' / _processor()
    if '://' not in folder:
      path.mkdir(0o700, parents=True, exist_ok=True)
    return str(path) if os.access(path, os.W_OK) else ''
  except (OSError, RuntimeError):  # RuntimeError: no home directory
    return ''


def _processor() -> str:
  """A name for what this processor can do: several machines may share a home directory, and a
  program that was compiled for one may have instructions that another lacks."""
  facts = ''
  with contextlib.suppress(OSError, StopIteration):
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    facts = next(line for line in lines if line.startswith(('flags', 'Features')))
  return f'{platform.machine()}-{zlib.crc32(facts.encode()):08x}'


def use_compilation_cache() -> None:
  """Lets jax, which is not imported yet, keep compiled programs for the next start of a command,
  unless JAX_COMPILATION_CACHE_DIR says where."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ and (folder := compilation_cache()):
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
    os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(_CACHE_BYTES))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')


def reuse_memory() -> None:
  """Lets glibc keep freed memory for the next allocation; with MALLOC_ or GLIBC_TUNABLES in the
  environment, those settings stay.

  On a CPU, XLA allocates the temporary arrays of a step, hundreds of MB, again in each step. Blocks
  of that size would come from the system, which zeroes them page by page at their first use.
  """
  if any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ):
    return
  if sys.platform == 'linux' and (mallopt := getattr(ctypes.CDLL(None), 'mallopt', None)):
    for parameter, value in _MALLOPT.values():
      mallopt(parameter, value)


@contextlib.contextmanager
def replacing(path) -> Iterator[epath.Path]:
  """Gives a temporary path to write a file or directory to, and renames it to `path` afterwards.

  What an earlier process left under the temporary name is deleted first, and so is the temporary
  file after an error. `path` itself may be a file, which is replaced, or an empty directory.
  """
  path = epath.Path(path)
  temporary = path.parent / f'{path.name}.incomplete'
  path.parent.mkdir(parents=True, exist_ok=True)
  remove(temporary)
  try:
    yield temporary
    temporary.replace(path)
  finally:
    remove(temporary)


def remove(path) -> None:
  """Deletes a file or a directory with its content, if there is one."""
  path = epath.Path(path)
  if path.is_dir():
    path.rmtree()
  elif path.exists():
    path.unlink()


def write_bytes(path, data: bytes) -> None:
  with replacing(path) as temporary:
    temporary.write_bytes(data)


def write_text(path, text: str) -> None:
  """Writes UTF-8."""
  write_bytes(path, text.encode())


def write_json(path, value) -> None:
  """Writes indented JSON; what JSON does not know becomes its `str`."""
  write_text(path, json.dumps(value, indent=2, default=str) + '\n')


def read_json(path, kind: type = dict):
  """Reads a JSON object, or with `kind=list` an array.

  Raises:
    ValueError: if the file holds something else.
  """
  path = epath.Path(path)
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:  # JSON or UTF-8
    raise ValueError(f'{path} is corrupt: {error}.') from error
  if not isinstance(content, kind):
    found = type(content).__name__
    raise ValueError(f'{path} is corrupt: it holds a {found}, not a {kind.__name__}.')
  return content


def first_line(error: Exception) -> str:
  """The first line of a message of the hub's library that is a sentence."""
  lines = re.sub(r' *\(Request ID[^)]*\)', '', str(error)).splitlines()
  lines = [line for line in lines if line and not re.fullmatch(r'\d+ Client Error\.', line)]
  return lines[0] if lines else repr(error)


@contextlib.contextmanager
def progress(what: str, total: float, unit: str = '') -> Iterator[Callable[[float], None]]:
  """Reports progress and the time left: a bar on a terminal, elsewhere a log line now and then.

  Args:
    what: name of the work.
    total: amount of work; 0 = unknown.
    unit: of the amount.

  Yields:
    A function to call with the amount done so far.
  """
  start = logged = time.monotonic()
  options = {'unit': unit, 'unit_scale': True, 'disable': None, 'leave': False}
  with tqdm.tqdm(desc=what, total=total or None, **options) as bar:

    def update(done: float) -> None:
      nonlocal logged
      bar.update(done - bar.n)
      now = time.monotonic()
      if bar.disable and done and now - logged > _LOG_SECONDS:
        logged = now
        left = tqdm.tqdm.format_interval((now - start) * max(total - done, 0) / done)
        estimate = f'{min(done / total, 1):.0%}, about {left} left' if total else f'{done:,} {unit}'
        _log.info('%s: %s', what, estimate)

    yield update


_REMARK = re.compile(rb'WARNING: All log messages before absl|[IW]\d{4} [\d:.]+ +\d+ \S+\.cc:\d+\]')


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
  """Holds stderr back and then writes it without the remarks of TensorFlow's C++ code.

  An import of TensorFlow 2.21 remarks on oneDNN and absent GPUs, whatever TF_CPP_MIN_LOG_LEVEL is.
  """
  with tempfile.TemporaryFile() as held:
    sys.stderr.flush()
    console = os.dup(2)
    os.dup2(held.fileno(), 2)
    try:
      yield
    finally:
      sys.stderr.flush()
      os.dup2(console, 2)
      os.close(console)
      held.seek(0)
      for line in held:
        if not _REMARK.match(line):
          os.write(2, line)


def import_tensorflow(feature: str, instead: str, module: str = 'tensorflow'):
  """Imports TensorFlow, or a module that needs it, and hides the accelerators from it.

  Args:
    feature: what needs TensorFlow, for the message.
    instead: what to do where it is not installed, for the message.
    module: the module to import and return.

  Raises:
    ValueError: if TensorFlow is not installed.
  """
  try:
    with without_remarks():
      import tensorflow as tf

      imported = importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
      f'{feature}: TensorFlow cannot be imported ({error}); pip install tensorflow '
      f'tensorflow-datasets (they are for Python 3.11 to 3.13), or {instead} where it is installed.'
    ) from error
  with contextlib.suppress(RuntimeError):  # its devices are initialised already
    for kind in ('GPU', 'TPU'):
      tf.config.set_visible_devices([], kind)
  return imported
