"""Runs one measurement: `python -m benchmarks tokenize --data=DIR`."""

import importlib
import pathlib
import sys


def main() -> None:
  names = sorted(path.stem for path in pathlib.Path(__file__).parent.glob('[!_]*.py'))
  if len(sys.argv) < 2 or sys.argv[1] not in names or not all('=' in x for x in sys.argv[2:]):
    sys.exit(f'usage: python -m benchmarks NAME [--key=value ...]; NAME is one of {names}')
  options = dict(option.removeprefix('--').split('=', 1) for option in sys.argv[2:])
  importlib.import_module(f'benchmarks.{sys.argv[1]}').run(**options)


if __name__ == '__main__':
  main()
