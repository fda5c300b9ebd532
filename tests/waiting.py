"""Waiting for a condition instead of for a time."""

import time


def until(condition, what: str, seconds: float = 300):
  """Returns the first true value of `condition()`; raises after `seconds`."""
  deadline = time.monotonic() + seconds
  while not (value := condition()):
    if time.monotonic() > deadline:
      raise AssertionError(f'{what} did not happen within {seconds} seconds')
    time.sleep(0.02)
  return value
