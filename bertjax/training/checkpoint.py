"""Checkpoints by orbax: asynchronous, atomic, the newest N and the best, checked on the way back.

A checkpoint is the complete `TrainState` and a JSON `meta` (config, data position, versions). orbax
restores a file with a flipped bit without a word, so `meta` carries a checksum per array, computed
on the devices; a restore verifies it, and logs and skips a corrupt checkpoint. orbax also commits
checkpoints that lack their manifest, so every array is opened once after each commit.
"""

import contextlib
import logging
import math
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from bertjax.training import distributed
from bertjax.training.mesh import path_name
from bertjax.training.stopping import STOPPED_EXIT_CODE

_log = logging.getLogger(__name__)


class CheckpointError(OSError):
  """A checkpoint could not be written or read; the message says which and what is left."""

  exit_code: int = 2  # of the program


class UnreadableError(CheckpointError):
  """This process could not read a checkpoint."""


def check_path(directory) -> epath.Path:
  """The absolute path of a folder for checkpoints, `~` expanded.

  orbax globs below the unescaped path, and tensorstore reads it as a URL in UTF-8, so a path with
  other characters would get checkpoints that cannot be read again.

  Raises:
    ValueError: if the path has such characters, or `~` stands for no home directory.
  """
  text = os.path.expanduser(os.fspath(directory))  # noqa: PTH111 (Path's raises RuntimeError)
  if text.startswith('~'):
    raise ValueError(
      f'{directory}: no home directory for {text.split("/")[0]!r}; give a full path.'
    )
  path = epath.Path(text)
  path = path if '://' in text else path.resolve()  # orbax refuses relative paths
  wrong = sorted(set('*?[]\\') & set(os.fspath(path)))
  if wrong:
    raise ValueError(
      f'checkpoints in {path} could not be read again, for its path contains {" ".join(wrong)}; '
      'choose a folder whose full path has none of * ? [ ] \\.'
    )
  try:
    os.fspath(path).encode('utf-8' if sys.getfilesystemencoding() == 'utf-8' else 'ascii')
  except UnicodeEncodeError:
    raise ValueError(
      f'checkpoints in {os.fspath(path)!a} could not be read again, for its path is not UTF-8 in '
      'this locale; set LC_ALL=C.UTF-8 or choose a path in ASCII.'
    ) from None
  return path


@jax.jit
def _checksums(leaves):
  def checksum(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}').astype(jnp.uint32)
    odd = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1  # weights the place, loses no bit
    return jnp.sum(bits.reshape(-1) * odd, dtype=jnp.uint32)

  return [checksum(leaf) for leaf in leaves]


def checksums(tree) -> dict[str, int]:
  """A 32-bit checksum of every leaf by path; integers, so any sharding gives the same number."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  values = jax.device_get(_checksums([leaf for _, leaf in leaves]))
  return {path_name(path): int(value) for (path, _), value in zip(leaves, values, strict=True)}


class Checkpoints:
  """The checkpoints of one run, in one folder.

  Args:
    directory: where they are stored; made if missing, checked by `check_path`. May be remote
      (`gs://`).
    keep: how many of the newest to keep. The best one stays besides.
    best: the metric of an evaluation that says which is best; the lowest is, or the `highest`.
    read_only: for a reader beside a running trainer, whose unfinished files must stay.
  """

  def __init__(
    self, directory, keep: int = 2, *, best: str = 'loss', highest: bool = False,
    read_only: bool = False,
  ):  # fmt: skip
    self._remote = '://' in os.fspath(directory)
    self.directory = check_path(directory)
    self._unchecked: int | None = None  # the step whose commit has not been checked yet
    if not read_only:
      self.directory.mkdir(parents=True, exist_ok=True)

    def cost(metrics: dict) -> float:
      return -metrics[best] if highest else metrics[best]

    newest = policies.LatestN(keep)
    lowest = policies.BestN(
      get_metric_fn=cost, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    # Only `best_fn` makes orbax write and read the metrics, and with `max_to_keep` it would drop
    # the newest step, from which a run resumes; the policy decides what stays.
    options = ocp.CheckpointManagerOptions(
      best_fn=cost, best_mode='min',
      preservation_policy=policies.AnyPreservationPolicy([newest, lowest]),
      cleanup_tmp_directories=not read_only, read_only=read_only, create=False,
    )  # fmt: skip
    _silence_closed_loops()
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def save(self, step: int, state, meta: dict, metrics: dict | None = None) -> None:
    """Starts writing; returns once the arrays are copied off the devices.

    Raises:
      CheckpointError: if this or the write before it failed, or what that one committed is not
        complete; earlier checkpoints are untouched.
    """
    self.wait()
    self._check_space(state)
    meta = meta | {'checksums': checksums(state)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    if not self._attempt(self._manager.save, step, args=args, metrics=metrics):
      # orbax ignores a step that is not newer than the newest.
      raise CheckpointError(f'{self.directory} holds a checkpoint newer than step {step} already.')
    self._unchecked = step

  def wait(self) -> None:
    """Waits until everything is on disk; raises CheckpointError if it is not complete there."""
    self._attempt(self._manager.wait_until_finished)
    step, self._unchecked = self._unchecked, None
    if step is None or jax.process_index():
      return
    try:
      self._manager.item_metadata(step)  # opens every array
    except Exception as error:  # orbax and tensorstore each raise their own
      raise CheckpointError(
        f'{self.directory}/{step}: written, but it cannot be read again ({_first_line(error)}); '
        'stopping, since nothing of this run would be saved there.'
      ) from error

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def best_step(self) -> int:
    """The step with the best evaluation, or the newest if none was evaluated."""
    best = self._manager.best_step()
    return self.steps()[-1] if best is None else best

  def meta(self, step: int) -> dict:
    """The JSON of one checkpoint."""
    return self._read(step, meta=ocp.args.JsonRestore())['meta']

  def _read(self, step: int, **items):
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax, tensorstore and json each raise their own
      raise UnreadableError(
        f'{self.directory}/{step}: unreadable ({_first_line(error)}).'
      ) from error

  def restore(self, step: int, abstract_state):
    """Reads and verifies one checkpoint.

    Args:
      step: one of `steps()`.
      abstract_state: `jax.ShapeDtypeStruct`s with shardings; the mesh may differ from the saver's.

    Raises:
      CheckpointError: if it cannot be read or an array differs from its checksum.
    """
    meta = self.meta(step)
    state = self._read(step, state=ocp.args.StandardRestore(abstract_state))['state']
    now = checksums(state)
    wrong = [name for name, value in meta['checksums'].items() if now.get(name) != value]
    if wrong:
      raise CheckpointError(
        f'{self.directory}/{step} is corrupt: {len(wrong)} of {len(now)} arrays differ from their '
        f'checksum, the first is {wrong[0]}.'
      )
    return state, meta

  def restore_newest(self, abstract_state):
    """Restores the newest complete checkpoint; each corrupt one is named in a warning and moved to
    `STEP.corrupt`, so that its step can be saved again.

    Raises:
      CheckpointError: if there are checkpoints, but none is complete.
    """
    corrupt: dict[int, object] = {}
    for step in reversed(self.steps()):
      try:
        found = self.restore(step, abstract_state)
        corrupt[step] = f'{self.directory}/{step}: another process could not read it.'
      except CheckpointError as error:
        found, corrupt[step] = None, error
        _log.warning('%s Trying the one before.', error)
        if isinstance(error, UnreadableError) and jax.process_count() > 1:
          self._end_all(step)
      if distributed.all_true(found is not None):
        del corrupt[step]
        if jax.process_index() == 0:
          for other in corrupt:
            self._set_aside(other)
        distributed.all_true(True)
        self._manager.reload()
        return found
    raise CheckpointError(
      f'no checkpoint in {self.directory} is complete; the newest: {next(iter(corrupt.values()))}'
    )

  def _set_aside(self, step: int) -> None:
    (self.directory / str(step)).rename(self.directory / f'{step}.corrupt')

  def _end_all(self, step: int) -> None:
    """Sets a checkpoint aside and ends this process: others may wait for it within the read, where
    no vote reaches them, and end with it. Launchers start all of them again."""
    _log.error('Ending with code %d; start the same command again.', STOPPED_EXIT_CODE)
    with contextlib.suppress(OSError):  # another process may have been faster
      self._set_aside(step)
    sys.stderr.flush()
    os._exit(STOPPED_EXIT_CODE)  # Python's own end would wait for the others

  def _check_space(self, state) -> None:
    """Refuses before writing: a disk that fills half-way makes orbax's threads very loud."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Remote storage does not fill.
    free = math.inf if self._remote else shutil.disk_usage(self.directory).free
    if free < 1.1 * needed:
      raise CheckpointError(
        f'could not save to {self.directory}: a checkpoint takes {needed / 1e6:,.1f} MB and '
        f'{free / 1e6:,.1f} MB are free. Complete checkpoints there: {self.steps() or "none"}; '
        'make room and start the same command again.'
      )

  def _attempt(self, action, *args, **kwargs):
    try:
      return action(*args, **kwargs)
    except Exception as error:
      failed = CheckpointError(
        f'could not save to {self.directory} ({_first_line(error)}). Complete checkpoints there: '
        f'{self.steps() or "none"}.'
      )
      if self._remote:  # storage may recover: launchers try again
        failed.exit_code = STOPPED_EXIT_CODE
      raise failed from error


def _silence_closed_loops() -> None:
  """After a failed write, tensorstore's threads call back into orbax's closed event loop, each with
  a traceback. The failure itself reaches `Checkpoints.wait`."""
  before = sys.unraisablehook

  def report(problem) -> None:
    if 'Event loop is closed' not in str(problem.exc_value):
      before(problem)

  if getattr(before, '__qualname__', '') != report.__qualname__:
    sys.unraisablehook = report


def _first_line(error: Exception) -> str:
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) <= 300 else f'{line[:100]} ... {line[-200:]}'  # the reason is at the end
