"""The `bertjax` command: `bertjax VERB --flags`, one verb for each program.

A program is a module with a docstring, `FLAGS = {name: (default, help)}` and `run(...)`, which gets
the flags as keyword arguments; the flag that `ARGUMENT` names may be given without its name. A
program with a 'config' flag gets an ml_collections config, read from a recipe and changed by
`--config.field=value`. Mistakes of the user end in one sentence and exit code 2; a traceback means
a bug in bertjax (BERTJAX_TRACEBACK=1 always shows it).
"""

import difflib
import importlib
import importlib.util
import inspect
import json
import logging
import os
import pathlib
import re
import sys

from absl import flags
from ml_collections import config_flags

_recipes_read = set()  # their errors are the user's

# In the order of a first day's work.
VERBS = {
  'quickstart': 'pre-train a small BERT on text every machine has, evaluate it, fill masks',
  'vocab': 'train a vocabulary on your text, or tell how one fits it',
  'prepare': 'turn raw text into training rows on disk',
  'pretrain': 'pre-train BERT from raw text or prepared rows',
  'finetune': 'train a pre-trained model on a task',
  'evaluate': 'evaluate a run or a model directory on held-out text',
  'predict': "a model's answers to a text or a file of texts",
  'explain': 'attention, layers and attributions of a text as one HTML page',
  'serve': 'a model as an HTTP service, with a page to try it',
  'convert': "turn a model into Hugging Face's or Google's files",
  'export': 'a model as a program: SavedModel with the tokenizer inside, or StableHLO',
  'compile': 'compile a recipe for a TPU slice that is not there: does it fit, how fast is it',
}


def main(argv: list[str] | None = None) -> int:
  """Runs one verb; returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(_overview())
    return 0
  verb, arguments = argv[0], argv[1:]
  if verb == '--version':
    print(importlib.import_module('bertjax').__version__)
    return 0
  if verb not in VERBS:
    print(
      f'bertjax: unknown verb {verb!r}{_nearest(verb, VERBS)}; see bertjax --help', file=sys.stderr
    )
    return 2
  logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stderr)
  logging.getLogger('bertjax').setLevel(logging.INFO)
  if not os.environ.get('BERTJAX_TRACEBACK'):
    logging.getLogger('absl').addFilter(_worth_reading)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # no chatter about absent GPUs
  try:
    program = importlib.import_module(f'bertjax.{verb}')
    if any(argument in ('-h', '--help', '-help', '--helpfull') for argument in arguments):
      print(_help(verb, program, arguments))
      return 0
    program.run(**parse(program, arguments))
  except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
    if os.environ.get('BERTJAX_TRACEBACK'):
      raise
    error = _out_of_memory(verb, error) or error
    if not _is_users(error):
      raise
    print(f'bertjax {verb}: {error}', file=sys.stderr)
    return getattr(error, 'exit_code', 2)
  except KeyboardInterrupt as error:
    print(f'bertjax {verb}: {str(error) or "interrupted."}', file=sys.stderr)
    return 130
  return 0


_SMALLER = {  # what to change where memory is short
  'pretrain': 'lower --config.batch_size, split each batch with --config.accumulation=2 (or 4, 8: '
  'without dropout the same result), or set --config.model.remat=full',
  'finetune': 'lower --config.batch_size, --config.data.length or --config.seeds, or set '
  '--config.model.remat=full',
  'evaluate': 'lower --batch_size',
  'predict': 'lower --batch_size',
  'serve': 'lower --batch_size',
}


def _out_of_memory(verb: str, error: BaseException) -> MemoryError | None:
  """What to change after an allocation failed on a device or the host; None for other errors."""
  jax_error = type(error).__name__ == 'JaxRuntimeError' and 'RESOURCE_EXHAUSTED' in str(error)
  if not jax_error and not isinstance(error, MemoryError):
    return None
  size = re.search(r'allocat\w+ ([\d.,]+ ?[KMGT]?i?[Bb]\w*)', str(error))
  size = f' while allocating {size[1]}' if size else ''
  return MemoryError(f'out of memory{size}; {_SMALLER.get(verb, "take a smaller model or text")}.')


def _worth_reading(record: logging.LogRecord) -> bool:
  """Drops orbax's remarks on options that we chose, and the tracebacks of its threads, since the
  loop, which waits for them, raises the same; but no warning."""
  record.exc_info = record.exc_text = None
  return not str(record.msg).startswith(
    ('Given directory is read only', 'CheckpointManagerOptions.read_only', 'Requested `track')
  )


def parse(program, arguments: list[str]) -> dict:
  """Parses a program's flags; returns the keyword arguments of its `run`.

  Raises:
    ValueError: for an unknown flag or field (with the nearest name) or a value of a wrong type.
  """
  values = flags.FlagValues()
  known = [name for name in program.FLAGS if name != 'config']
  for name in known:
    default, text = program.FLAGS[name]
    define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_string
    define(name, default, text, flag_values=values)
  fields = {}
  spec, arguments = _take_recipe(program.FLAGS.get('config', ('',))[0], arguments)
  if spec:
    config = load_recipe(spec)
    fields = {f'config.{name}': value for name, value in _flat(config).items()}
    _check_fields(arguments, fields)
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=values, sys_argv=['bertjax', *arguments]
    )
  try:
    left = values(['bertjax', *arguments])
  except flags.UnrecognizedFlagError as error:
    near = _nearest(error.flagname, program.FLAGS)
    raise ValueError(
      f'unknown flag --{error.flagname}{near}; known are --{", --".join(program.FLAGS)}.'
    ) from error
  except flags.Error as error:
    bad = re.search(r'--(config\.[\w.]+)', str(error))
    like = f'; it takes {type(fields[bad[1]]).__name__}, as in {fields[bad[1]]!r}' if bad else ''
    raise ValueError(f'{error}{like}.') from error
  if len(left) == 2 and hasattr(program, 'ARGUMENT'):
    values[program.ARGUMENT].value = left.pop()
  if len(left) > 1:
    raise ValueError(f'unexpected argument {left[1]!r}; options are written --name=value.')
  result = {name: values[name].value for name in known}
  paths = {n: v for n, v in result.items() if isinstance(v, str) and n not in _TEXTS}
  result |= {name: _expand_home(value) for name, value in paths.items()}
  if 'config' in program.FLAGS:
    config = result['config'] = values['config'].value if spec else None
    texts = {n: v for n, v in (_flat(config) if spec else {}).items() if isinstance(v, str)}
    if spec:
      config.update_from_flattened_dict({n: _expand_home(v) for n, v in texts.items()})
  return result


_TEXTS = ('text', 'pair')  # flags that hold a text


def _expand_home(value: str) -> str:
  """Expands `~` and `~user` at the start of each path in a value, where a shell does not: behind
  `=`, as in --workdir=~/run, and behind commas."""

  def expand(match):
    home = os.path.expanduser(match[0])  # noqa: PTH111 (Path's raises RuntimeError)
    if home == '~':
      raise ValueError(f'{value}: this user has no home directory for ~; give a full path.')
    return home

  return re.sub(r'(?<![^=,])~[\w.-]*(?=/|$)', expand, value)


def load_recipe(spec: str):
  """Reads a recipe, `PATH:WORDS` or `NAME:WORDS` (a file in configs/*/), and returns its config."""
  name, _, arg = spec.partition(':')
  path = pathlib.Path(_expand_home(name))
  if not path.is_file():
    found = {p.stem: p for p in sorted(_recipes().glob('*/*.py')) if p.stem != '__init__'}
    if path.stem not in found:
      raise ValueError(
        f'no recipe {name}{_nearest(path.stem, found)}: give a file, or one of {", ".join(found)}.'
      )
    path = found[path.stem]
  _recipes_read.add(path.resolve())
  loader = importlib.util.spec_from_file_location(f'bertjax_recipe_{path.stem}', path)
  module = importlib.util.module_from_spec(loader)
  loader.loader.exec_module(module)
  return module.get_config(arg)


def _recipes() -> pathlib.Path:
  """configs/ as installed (bertjax.configs), or beside the package in a checkout."""
  installed = pathlib.Path(__file__).parent / 'configs'
  return installed if installed.is_dir() else pathlib.Path(__file__).parent.parent / 'configs'


def _take_recipe(default: str, arguments: list[str]) -> tuple[str, list[str]]:
  """Splits --config=SPEC (or --config SPEC) off; the --config.field flags stay."""
  spec, rest, items = default, [], iter(arguments)
  for item in items:
    name, equals, value = item.partition('=')
    if name in ('--config', '-config'):
      spec = value if equals else next(items, '')
    else:
      rest.append(item)
  return spec, rest


def _check_fields(arguments: list[str], fields) -> None:
  """Names the nearest field where config_flags would raise a bare AttributeError."""
  for item in arguments:
    name = item.lstrip('-').partition('=')[0].removeprefix('no')
    if item.startswith('-') and name.startswith('config.') and name not in fields:
      raise ValueError(
        f'the config has no field {name.removeprefix("config.")!r}{_nearest(name, fields)}; '
        '--help lists all of them.'
      )


def _flat(config) -> dict:
  from flax.traverse_util import flatten_dict

  return flatten_dict(config.to_dict(), sep='.')


def _nearest(name: str, known) -> str:
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f', did you mean {close[0]!r}' if close else ''


def _is_users(error: BaseException) -> bool:
  """Raised by a `raise` of ours or a recipe, or a file or a package is missing: no bug."""
  if isinstance(error, OSError | json.JSONDecodeError | ModuleNotFoundError | MemoryError):
    return True
  last = error.__traceback__
  while last.tb_next:
    last = last.tb_next
  path = pathlib.Path(last.tb_frame.f_code.co_filename).resolve()
  package = pathlib.Path(__file__).resolve().parent
  return package in path.parents or path in _recipes_read


def _overview() -> str:
  lines = [f'  {verb:<12}{text}' for verb, text in VERBS.items()]
  return '\n'.join([
    'bertjax: BERT pre-training in JAX.', '',
    'usage: bertjax VERB [--flag=value ...]', '', *lines, '',
    'bertjax VERB --help tells the flags of a verb and every field of its config.',
  ])  # fmt: skip


def _help(verb: str, program, arguments: list[str]) -> str:
  """The program's docstring, its flags, and the config's fields with the recipe's values."""
  parts = [f'bertjax {verb}: {VERBS[verb]}', '', inspect.getdoc(program), '', 'Flags:']
  parts += [_field(f'--{name}', *program.FLAGS[name]) for name in program.FLAGS]
  if 'config' in program.FLAGS:
    from bertjax.model.config import EncoderConfig

    spec, _ = _take_recipe(program.FLAGS['config'][0] or 'bert_mini', arguments)
    told = {f'model.{name}': text for name, text in _comments(EncoderConfig).items()}
    owner = (
      program if hasattr(program, 'default_config') else importlib.import_module('bertjax.pretrain')
    )
    told |= _comments(owner.default_config)
    parts += ['', f'Fields of the config {spec}, with its values:']
    for name, value in _flat(load_recipe(spec)).items():
      parts.append(_field(f'--config.{name}', value, told.get(name, '')))
    folder = owner.__name__.rpartition('.')[2]
    recipes = sorted(p.stem for p in _recipes().glob(f'{folder}/*.py') if p.stem != '__init__')
    parts += ['', f'Recipes: {", ".join(recipes)}']
    if hasattr(owner, 'vary'):
      parts += ['', inspect.getdoc(owner.vary)]
  return '\n'.join(parts)


def _field(name: str, value, text: str) -> str:
  return f'  {f"{name}={value}":<44} {text}'.rstrip()


def _comments(source) -> dict[str, str]:
  """Field -> the comment behind its line, so that the help is the comment in the source.

  Fields of a group, which a line like `'data': c({` opens, are 'data.field'.
  """
  result, group = {}, ''
  for line in inspect.getsource(source).split('\n'):
    if opened := re.match(r"\s*'(\w+)': c\(\{", line):
      group = f'{opened[1]}.'
    elif line.strip() == '}),':
      group = ''
    elif found := re.match(r"\s*'?(\w+)'?:\s.*?\s\s#\s(.*)", line):
      result[group + found[1]] = found[2]
  return result


def entry() -> None:
  """The console script."""
  sys.exit(main())


if __name__ == '__main__':
  entry()
