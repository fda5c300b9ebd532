"""The `bertjax` command: `bertjax VERB --flags`, one verb per program.

A program is a module with a docstring and `run(...)`, which gets the flags of its verb (flags.py)
as keyword arguments. A verb with the flag 'config' gets an ml_collections config, read from a
recipe and changed by `--config.field=value`. A user's mistake ends in one sentence and exit code 2,
before jax is imported where it is in the flags; a traceback means a bug in bertjax
(BERTJAX_TRACEBACK=1 always shows it).
"""

import ast
import importlib
import json
import logging
import os
import pathlib
import re
import sys

from bertjax.flags import VERBS, Verb, expand_home, suggest, suggestion


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
    near = suggestion(verb, VERBS)
    print(f'bertjax: unknown verb {verb!r}{near}; see bertjax --help', file=sys.stderr)
    return 2
  logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stderr)
  logging.getLogger('bertjax').setLevel(logging.INFO)
  if not os.environ.get('BERTJAX_TRACEBACK'):
    logging.getLogger('absl').addFilter(_worth_reading)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # no messages about absent GPUs
  try:
    if any(argument in ('-h', '--help', '-help', '--helpfull') for argument in arguments):
      print(_help(verb, arguments))
      return 0
    io = importlib.import_module('bertjax.io')
    io.use_compilation_cache()
    if verb != 'prepare':  # whose processes are many
      io.reuse_memory()
    values = parse(verb, arguments)
    importlib.import_module(f'bertjax.{verb}').run(**values)
  except BrokenPipeError:
    raise
  except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
    if os.environ.get('BERTJAX_TRACEBACK'):
      raise
    error = _out_of_memory(verb, error) or error
    if not _is_users(error):
      raise
    if changes := getattr(error, 'changes', None):  # in the settings of a run to be resumed
      error.changes = {_as_typed(verb, arguments, field): v for field, v in changes.items()}
    print(f'bertjax {verb}: {_sentence(error)}', file=sys.stderr)
    return getattr(error, 'exit_code', 2)
  except KeyboardInterrupt as error:
    print(f'bertjax {verb}: {str(error) or "interrupted."}', file=sys.stderr)
    return 130
  return 0


def _out_of_memory(verb: str, error: BaseException) -> MemoryError | None:
  """What to change after an allocation failed on a device or the host; None for other errors."""
  jax_error = type(error).__name__ == 'JaxRuntimeError' and 'RESOURCE_EXHAUSTED' in str(error)
  if not jax_error and not isinstance(error, MemoryError):
    return None
  size = re.search(r'allocat\w+ ([\d.,]+ ?[KMGT]?i?[Bb]\w*)', str(error))
  size = f' while allocating {size[1]}' if size else ''
  return MemoryError(f'out of memory{size}; {VERBS[verb].smaller}.')


def _worth_reading(record: logging.LogRecord) -> bool:
  """Drops orbax's remarks on options that we chose, and the tracebacks of its threads, since the
  loop, which waits for them, raises the same error; keeps its warnings."""
  record.exc_info = record.exc_text = None
  return not str(record.msg).startswith(
    ('Given directory is read only', 'CheckpointManagerOptions.read_only', 'Requested `track')
  )


def parse(verb: str, arguments: list[str]) -> dict:
  """Parses the flags of a verb; returns the keyword arguments of its program's `run`.

  A value follows `=` or is the next argument; a boolean is --flag or --noflag, or has a value after
  `=`. A field of the config is a flag like any other, under its own name and its short one.

  Raises:
    ValueError: for an unknown flag or field (with the nearest name) or a value of a wrong type.
  """
  program, config, fields, texts = VERBS[verb], None, {}, []
  if 'config' in program.flags:
    from bertjax import config as config_lib  # takes a while to import

    spec, arguments = _take_recipe(program.flags['config'][0], arguments)
    config = config_lib.recipe_for(verb, spec) if spec else None
    if config and 'stages' in config:
      typed = (argument.lstrip('-').removeprefix('config.') for argument in arguments)
      config_lib.add_stages(config, typed)
    fields = {f'config.{n}': v for n, v in config_lib.flat(config or {}).items()}
  values = {n: default for n, (default, _) in program.flags.items() if n != 'config'} | fields
  items = iter(arguments)
  for item in items:
    typed, equals, text = item.lstrip('-').partition('=')
    name = f'config.{program.short[typed]}' if typed in program.short else typed
    if not item.startswith('-'):
      texts.append(item)
    elif item == '--':
      texts += items
    elif name in values:
      if not equals:
        text = 'true' if isinstance(values[name], bool) else next(items, None)
      values[name] = _convert(typed, text, values[name])
    elif isinstance(values.get(name.removeprefix('no')), bool) and not equals:
      values[name.removeprefix('no')] = False
    else:
      raise ValueError(_unknown(typed, program, fields))
  if isinstance(values.get(program.argument), tuple):
    values[program.argument], texts = tuple(map(expand_home, texts)), []
  elif len(texts) == 1 and program.argument:
    values[program.argument] = texts.pop()
  if texts:
    raise ValueError(f'unexpected argument {texts[0]!r}; options are written --name=value.')
  for name, value in values.items():
    if isinstance(value, str) and name not in _TEXTS and not name.startswith('config.task.'):
      values[name] = expand_home(value)
  if 'config' not in program.flags:
    return values
  if config:
    config_lib.update(config, {n.removeprefix('config.'): values.pop(n) for n in fields})
  return values | {'config': config}


_TEXTS = ('text', 'pair', 'delimiter')  # flags whose value is no path
_BOOLEANS = {'true': True, 't': True, '1': True, 'false': False, 'f': False, '0': False}


def _convert(flag: str, text: str | None, default):
  """The value of a flag, of the type of its default."""
  if text is None:
    raise ValueError(f'missing value for flag --{flag}.')
  kind = type(default)
  try:
    return _BOOLEANS[text.lower()] if kind is bool else kind(text)
  except (KeyError, ValueError) as error:
    raise ValueError(
      f'--{flag} takes {kind.__name__}, such as {default!r}; got {text!r}.'
    ) from error


def _unknown(flag: str, program: Verb, fields: dict) -> str:
  """The sentence for an unknown flag or field, with the nearest name."""
  field = flag.removeprefix('no').removeprefix('config.')
  if fields and flag.removeprefix('no') != field:
    near = suggest(field, fields=fields)
    return f'the config has no field {field!r}{near}; --help lists all of them.'
  near = suggest(flag, [*program.flags, *program.short], fields)
  return f'unknown flag --{flag}{near}; known are --{", --".join(program.flags)}.'


def _as_typed(verb: str, arguments: list[str], field: str) -> str:
  """The flag by which a field was set, such as --train_file; the field if by none."""
  names = {f'config.{field}', *(n for n, ours in VERBS[verb].short.items() if ours == field)}
  typed = [item.lstrip('-').partition('=')[0] for item in arguments if item.startswith('-')]
  return next((f'--{name}' for name in typed if name.removeprefix('no') in names), field)


def _take_recipe(default: str, arguments: list[str]) -> tuple[str, list[str]]:
  """Splits --config=SPEC (or --config SPEC) off; the --config.field flags stay."""
  spec, rest, items = default, [], iter(arguments)
  for item in items:
    name, equals, value = item.partition('=')
    if name in ('--config', '-config'):
      spec = value if equals else next(items, '')
      if not spec:
        raise ValueError('--config needs a recipe: a file, or the name of one in configs/.')
    else:
      rest.append(item)
  return spec, rest


def _sentence(error: BaseException) -> str:
  if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
    return f'{error.filename} cannot be made: there is a file where a directory is needed.'
  return str(error)


def _is_users(error: BaseException) -> bool:
  """Whether bertjax or a recipe raised the error, or a file or package is missing: no bug."""
  if isinstance(error, OSError | json.JSONDecodeError | ModuleNotFoundError | MemoryError):
    return True
  from bertjax import config as config_lib

  last = error.__traceback__
  while last.tb_next:
    last = last.tb_next
  path = pathlib.Path(last.tb_frame.f_code.co_filename).resolve()
  package = pathlib.Path(__file__).resolve().parent
  return package in path.parents or path in config_lib.recipes_read


def _overview() -> str:
  lines = [f'  {name:<12}{verb.summary}' for name, verb in VERBS.items()]
  return '\n'.join([
    'bertjax: BERT in JAX.', '', 'usage: bertjax VERB [--flag=value ...]', '', *lines, '',
    'bertjax VERB --help lists the flags of a verb and every field of its config.',
  ])  # fmt: skip


def _help(verb: str, arguments: list[str]) -> str:
  """The program's docstring, its flags, and the config's fields with the recipe's values.

  Reads the docstring without importing the program, which would import jax.
  """
  source = (pathlib.Path(__file__).parent / f'{verb}.py').read_text()
  known = VERBS[verb].flags
  parts = [f'bertjax {verb}: {VERBS[verb].summary}', '', ast.get_docstring(ast.parse(source)), '']
  parts += ['Flags:', *(_field(f'--{name}', *known[name]) for name in known)]
  if short := VERBS[verb].short:
    parts += ['', 'Short for a field of the config:']
    parts += [f'  --{name:<20} --config.{field}' for name, field in short.items()]
  if 'config' in known:
    from bertjax import config as config_lib

    spec, _ = _take_recipe(known['config'][0] or 'bert_mini', arguments)
    config = config_lib.recipe_for(verb, spec)
    kind, table = config_lib.kind(config), config_lib.table_of(config)
    parts += ['', f'Fields of the config {spec}, with its values:']
    for name, value in sorted(config_lib.flat(config).items()):
      parts.append(_field(f'--config.{name}', value, table[name][1]))
    parts += ['', f'Recipes: {", ".join(config_lib.recipe_names(kind))}']
    if kind == 'pretrain':
      parts += [
        '',
        'Fields of a stage, as --config.stages[0].steps; the next number adds a stage:',
      ]
      parts += [_field(f'  {name}', *entry) for name, entry in config_lib.STAGE.items()]
      parts += ['', 'Words after the colon of a recipe, separated by commas:']
      parts += [f'  {word:<24} {text}' for word, text in config_lib.WORDS.items()]
  return '\n'.join(parts)


def _field(name: str, value, text: str) -> str:
  return f'  {f"{name}={value}":<44} {text}'


def entry() -> None:
  """The console script."""
  try:
    code = main()
    sys.stdout.flush()
  except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = 141  # what a shell reports for SIGPIPE
  distributed = sys.modules.get('bertjax.training.distributed')
  if distributed and code not in (0, 130):  # on Ctrl-C all processes end together
    distributed.leave(code)
  sys.exit(code)


if __name__ == '__main__':
  entry()
