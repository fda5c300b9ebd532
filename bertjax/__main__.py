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

from bertjax.flags import VERBS, suggest, suggestion


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
    values = parse(verb, arguments)
    importlib.import_module(f'bertjax.{verb}').run(**values)
  except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
    if os.environ.get('BERTJAX_TRACEBACK'):
      raise
    error = _out_of_memory(verb, error) or error
    if not _is_users(error):
      raise
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

  Raises:
    ValueError: for an unknown flag or field (with the nearest name) or a value of a wrong type.
  """
  from absl import flags as absl_flags

  known, fields, config = VERBS[verb].flags, {}, None
  define = {
    bool: absl_flags.DEFINE_boolean, int: absl_flags.DEFINE_integer, str: absl_flags.DEFINE_string
  }  # fmt: skip
  values = absl_flags.FlagValues()
  names = [name for name in known if name != 'config']
  for name in names:
    default, text = known[name]
    define[type(default)](name, default, text, flag_values=values)
  if 'config' in known:
    spec, arguments = _take_recipe(known['config'][0], arguments)
    arguments = [_expand_short(item, VERBS[verb].short) for item in arguments]
    if spec:
      config, fields = _define_config(verb, spec, arguments, values)
  try:
    left = values(['bertjax', *arguments])
  except absl_flags.UnrecognizedFlagError as error:
    near = suggest(error.flagname, [*known, *VERBS[verb].short], fields)
    raise ValueError(
      f'unknown flag --{error.flagname}{near}; known are --{", --".join(known)}.'
    ) from error
  except absl_flags.Error as error:
    if not (bad := re.match(r'flag --([\w.]+)=(.*?): ', str(error), re.S)):
      raise ValueError(f'{str(error).rstrip(".")}.') from error
    like = fields[bad[1]] if bad[1] in fields else known[bad[1]][0]
    kind = type(like).__name__
    raise ValueError(f'--{bad[1]} takes {kind}, such as {like!r}; got {bad[2]!r}.') from error
  if len(left) == 2 and VERBS[verb].argument:
    values[VERBS[verb].argument].value = left.pop()
  if len(left) > 1:
    raise ValueError(f'unexpected argument {left[1]!r}; options are written --name=value.')
  result = {name: values[name].value for name in names}
  result |= _expand_homes({n: v for n, v in result.items() if n not in _TEXTS})
  if config is not None:
    fields = _config_module().flat(config)
    paths = {name: value for name, value in fields.items() if not name.startswith('task.')}
    config.update_from_flattened_dict(_expand_homes(paths))
  return result | ({'config': config} if 'config' in known else {})


_TEXTS = ('text', 'pair', 'delimiter')  # flags whose value is no path


def _expand_homes(values: dict) -> dict:
  expand = _config_module().expand_home
  return {name: expand(value) for name, value in values.items() if isinstance(value, str)}


def _config_module():  # imported when a flag or a recipe needs it: `bertjax --help` does not
  return importlib.import_module('bertjax.config')


def _define_config(verb: str, spec: str, arguments: list[str], values):
  """Defines a flag for every field of a recipe's config; returns the config and its fields.

  Raises:
    ValueError: for a field that the config does not have.
  """
  from ml_collections import config_flags

  config = _config_module().recipe_for(verb, spec)
  fields = {f'config.{name}': value for name, value in _config_module().flat(config).items()}
  for item in arguments:  # config_flags would raise a bare AttributeError
    name = item.lstrip('-').partition('=')[0].removeprefix('no')
    if item.startswith('-') and name.startswith('config.') and name not in fields:
      raise ValueError(
        f'the config has no field {name.removeprefix("config.")!r}{suggest(name, (), fields)}; '
        '--help lists all of them.'
      )
  config_flags.DEFINE_config_dict(
    'config', config, flag_values=values, sys_argv=['bertjax', *arguments]
  )
  return config, fields


def _expand_short(argument: str, short) -> str:
  """Writes a short flag, `--text=review`, as the field that it sets."""
  name = argument.lstrip('-').partition('=')[0]
  is_short = argument.startswith('-') and name in short
  return argument.replace(name, f'config.{short[name]}', 1) if is_short else argument


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
  last = error.__traceback__
  while last.tb_next:
    last = last.tb_next
  path = pathlib.Path(last.tb_frame.f_code.co_filename).resolve()
  package = pathlib.Path(__file__).resolve().parent
  return package in path.parents or path in _config_module().recipes_read


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
    module = _config_module()
    spec, _ = _take_recipe(known['config'][0] or 'bert_mini', arguments)
    config = module.recipe_for(verb, spec)
    kind = module.kind(config)
    table = module.FINETUNING if kind == 'finetune' else module.PRETRAINING
    parts += ['', f'Fields of the config {spec}, with its values:']
    for name, value in sorted(module.flat(config).items()):
      parts.append(_field(f'--config.{name}', value, table[name][1]))
    parts += ['', f'Recipes: {", ".join(module.recipe_names(kind))}']
    if kind == 'pretrain':
      parts += ['', 'Words after the colon of a recipe, separated by commas:']
      parts += [f'  {word:<24} {text}' for word, text in module.WORDS.items()]
  return '\n'.join(parts)


def _field(name: str, value, text: str) -> str:
  return f'  {f"{name}={value}":<44} {text}'


def entry() -> None:
  """The console script."""
  sys.exit(main())


if __name__ == '__main__':
  entry()
