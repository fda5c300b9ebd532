"""Side-by-side measurements against peers: `python -m benchmarks NAME [--key=value ...]`.

A module has `run(**options)`, which takes its options as strings, times its contestants with
`measure` (in turns, so that a busy moment hits all alike) and prints them with `report`.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable


def measure(contestants: dict[str, Callable[[], float]], repeats: int = 5) -> dict:
  """Runs each contestant once to warm up and then `repeats` times, in turns.

  Args:
    contestants: by name, functions that do the work and return how many units they did.
    repeats: timed runs of each.

  Returns:
    Units a second by name, a list with an entry a run.
  """
  rates = {name: [] for name in contestants}
  for turn in range(repeats + 1):
    for name, work in contestants.items():
      start = time.perf_counter()
      units = work()
      if turn:
        rates[name].append(units / (time.perf_counter() - start))
  return rates


def report(unit: str, rates: dict, ratios: dict, *, packages, out: str = '', **facts) -> None:
  """Prints medians, spreads and ratios, and writes all of it to the JSON file `out` if given.

  Args:
    unit: what is counted, as 'tokens/s'.
    rates: as `measure` returns.
    ratios: numbers to print below, by what they mean.
    packages: distributions whose versions matter.
    out: path of the JSON file.
    **facts: whatever else describes the measurement.
  """
  print(f'{unit:36} {"median":>12} {"lowest":>12} {"highest":>12}')
  for name, runs in rates.items():
    print(f'{name:36} {statistics.median(runs):12,.0f} {min(runs):12,.0f} {max(runs):12,.0f}')
  for name, ratio in ratios.items():
    print(f'{name:36} {ratio:12.2f}')
  content = {
    'command': ' '.join(['python -m benchmarks', *sys.argv[1:]]),
    'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores',
    'load_before': os.getloadavg()[1],
    'versions': {name: importlib.metadata.version(name) for name in packages},
    'unit': unit, **facts, 'rates': rates, 'ratios': ratios,
  }  # fmt: skip
  print(json.dumps({key: content[key] for key in content if key != 'rates'}))
  if out:
    temporary = pathlib.Path(f'{out}.tmp')
    temporary.write_text(json.dumps(content, indent=2) + '\n')
    temporary.replace(out)
