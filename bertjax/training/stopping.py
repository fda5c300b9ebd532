"""Stopping on a signal: SIGTERM or Ctrl-C ends a run after a step and a save."""

import contextlib
import logging
import os
import signal

import jax
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: saved, not finished; launchers start the same command again


class StopSignal:
  """Remembers SIGTERM or a first Ctrl-C inside a `with` block, so that a step is never interrupted.

  Of many processes the signal to any one stops all of them at the same step: there jax handles
  SIGTERM, and the processes agree on a step that none has passed.

  Attributes:
    received: the number of the signal; 0 before.
  """

  def __enter__(self):
    self.received = self._here = 0
    self._before = {}
    numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
    with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
      for number in numbers:
        # Jobs in the background ignore SIGINT, and continue to.
        if signal.getsignal(number) not in (None, signal.SIG_IGN):
          self._before[number] = signal.signal(number, self._receive)
    return self

  def asked(self, step: int) -> int:
    """The signal to stop on before `step`; every process asks before each of its steps."""
    if jax.process_count() == 1:
      self.received = self._here
    elif multihost_utils.reached_preemption_sync_point(step):
      self.received = self._here or signal.SIGTERM
    return self.received

  def _receive(self, number, _):
    if number == signal.SIGINT and self._here == number:
      raise KeyboardInterrupt
    self._here = number
    if number == signal.SIGINT:
      _log.warning('Ctrl-C: saving after this step; press it again to abort without saving.')
      if jax.process_count() > 1:
        os.kill(os.getpid(), signal.SIGTERM)

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)


def exit_if_stopped(stopped: int, step: int) -> None:
  """Ends a run that the signal `stopped` (0 = none) stopped at a step.

  Raises:
    KeyboardInterrupt: after Ctrl-C.
    SystemExit: after SIGTERM, with the code on which launchers restart the process.
  """
  if stopped == signal.SIGINT:
    raise KeyboardInterrupt(f'stopped at step {step}, saved; the same command resumes the run.')
  if stopped:
    _log.warning('stopped by SIGTERM at step %d, saved; the same command resumes the run.', step)
    raise SystemExit(STOPPED_EXIT_CODE)
