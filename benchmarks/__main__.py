"""Runs one benchmark: `python -m benchmarks NAME --flag=value ...`."""

import argparse
import importlib
import pathlib
import sys

from bertjax import io


def main() -> None:
  folder = pathlib.Path(__file__).parent
  names = sorted(path.stem for path in folder.glob('*.py') if path.stem[0] != '_')
  if len(sys.argv) < 2 or sys.argv[1] not in names:
    sys.exit(f'usage: python -m benchmarks NAME --flags; NAME is one of {", ".join(names)}')
  io.reuse_memory()  # as the `bertjax` command does; the baselines in this process have it as well
  module = importlib.import_module(f'benchmarks.{sys.argv[1]}')
  parser = argparse.ArgumentParser(
    f'python -m benchmarks {sys.argv[1]}', description=module.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  for name, (default, text) in module.FLAGS.items():
    parser.add_argument(f'--{name}', type=type(default), default=default, help=text)
  module.run(**vars(parser.parse_args(sys.argv[2:])))


if __name__ == '__main__':
  main()
