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
import traceback

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

# The kind of recipe that a verb needs; the others with a config take both kinds.
_RECIPES_OF = {
  'pretrain': 'pretrain', 'finetune': 'finetune', 'compile': 'pretrain', 'quickstart': 'pretrain'
}  # fmt: skip

# Names of transformers, of google-research/bert and of earlier versions, and ours. `_suggest` finds
# a near name without this table.
ALIASES = {
  'adam_beta1': ('optimizer.b1',),
  'adam_beta2': ('optimizer.b2',),
  'adam_epsilon': ('optimizer.eps',),
  'bf16': ('model.dtype',),
  'case': ('lowercase', 'data.lowercase'),
  'dataset_name': ('data.source', 'data.input'),
  'do_lower_case': ('data.lowercase', 'lowercase'),
  'eval_steps': ('eval_every',),
  'evaluation_strategy': ('eval_every',),
  'fp16': ('model.dtype',),
  'accumulation': ('gradient_accumulation_steps',),
  'epochs': ('num_train_epochs',),
  'gradient_checkpointing': ('model.remat',),
  'init_checkpoint': ('init_from', 'model'),
  'input_file': ('data.input', 'input'),
  'label_column_name': ('data.options',),
  'logging_steps': ('log_every',),
  'lr': ('learning_rate',),
  'lr_scheduler_type': ('schedule',),
  'masked_lm_prob': ('masking.rate',),
  'max_grad_norm': ('optimizer.clip_norm',),
  'max_predictions_per_seq': ('masking.max_predictions',),
  'max_seq_length': ('data.length',),
  'max_steps': ('num_train_steps',),
  'max_train_samples': ('data.max_train_examples',),
  'mlm_probability': ('masking.rate',),
  'model_name_or_path': ('init_from', 'model', 'from'),
  'num_labels': ('data.options',),
  'num_train_epochs': ('num_train_epochs', 'num_train_steps'),
  'steps': ('num_train_steps',),
  'num_warmup_steps': ('warmup_steps', 'warmup_ratio'),
  'optim': ('optimizer.name',),
  'out': ('workdir',),
  'output': ('head', 'out', 'workdir'),
  'output_dir': ('workdir', 'out'),
  'output_file': ('out',),
  'per_device_eval_batch_size': ('batch_size',),
  'per_device_train_batch_size': ('batch_size',),
  'recipe': ('config',),
  'rows': ('max_eval_examples',),
  'save_steps': ('save_every',),
  'save_total_limit': ('max_to_keep',),
  'step': ('checkpoint',),
  'task_name': ('task', 'do'),
  'to': ('out', 'workdir'),
  'tokenizer_name': ('data.vocab',),
  'train_batch_size': ('batch_size',),
  'train_file': ('data.files', 'data.input'),
  'validation_file': ('data.files',),
  'vocab_file': ('data.vocab', 'vocab'),
  'warmup_ratio': ('warmup_steps',),
  'warmup_steps': ('warmup_ratio',),
  'which': ('checkpoint',),
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
    print(f'bertjax {verb}: {_sentence(error)}', file=sys.stderr)
    return getattr(error, 'exit_code', 2)
  except KeyboardInterrupt as error:
    print(f'bertjax {verb}: {str(error) or "interrupted."}', file=sys.stderr)
    return 130
  return 0


_SMALLER = {  # what to change where memory is short
  'pretrain': 'lower --config.batch_size, split each batch with --config.gradient_accumulation_steps=2 (or 4, 8: '
  'without dropout the same result), or set --config.model.remat=full',
  'finetune': 'lower --config.batch_size, --config.data.length or --config.num_seeds, or set '
  '--config.model.remat=full',
  'evaluate': 'evaluate the model directory (--model, --config=RECIPE) with a lower '
  '--config.batch_size',
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


_DEFINE = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, str: flags.DEFINE_string}


def parse(program, arguments: list[str]) -> dict:
  """Parses a program's flags; returns the keyword arguments of its `run`.

  Raises:
    ValueError: for an unknown flag or field (with the nearest name) or a value of a wrong type.
  """
  values = flags.FlagValues()
  known = [name for name in program.FLAGS if name != 'config']
  for name in known:
    default, text = program.FLAGS[name]
    _DEFINE[type(default)](name, default, text, flag_values=values)
  fields, spec = {}, ''
  if 'config' in program.FLAGS:
    spec, arguments = _take_recipe(program.FLAGS['config'][0], arguments)
  if spec:
    config = recipe_for(program.__name__.rpartition('.')[2], spec)
    fields = {f'config.{name}': value for name, value in _flat(config).items()}
    _check_fields(arguments, fields)
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=values, sys_argv=['bertjax', *arguments]
    )
  try:
    left = values(['bertjax', *arguments])
  except flags.UnrecognizedFlagError as error:
    near = _suggest(error.flagname, program.FLAGS, fields)
    raise ValueError(
      f'unknown flag --{error.flagname}{near}; known are --{", --".join(program.FLAGS)}.'
    ) from error
  except flags.Error as error:
    if not (bad := re.match(r'flag --([\w.]+)=(.*?): ', str(error), re.S)):
      raise ValueError(f'{str(error).rstrip(".")}.') from error
    like = fields[bad[1]] if bad[1] in fields else program.FLAGS[bad[1]][0]
    kind = type(like).__name__
    raise ValueError(f'--{bad[1]} takes {kind}, as in {like!r}; got {bad[2]!r}.') from error
  if len(left) == 2 and hasattr(program, 'ARGUMENT'):
    values[program.ARGUMENT].value = left.pop()
  if len(left) > 1:
    raise ValueError(f'unexpected argument {left[1]!r}; options are written --name=value.')
  result = {name: values[name].value for name in known}
  paths = {n: v for n, v in result.items() if isinstance(v, str) and n not in _TEXTS}
  result |= {name: _expand_home(value) for name, value in paths.items()}
  if 'config' in program.FLAGS:
    result['config'] = config = values['config'].value if spec else None
  if spec:
    texts = {n: _expand_home(v) for n, v in _flat(config).items() if isinstance(v, str)}
    config.update_from_flattened_dict(texts)
  return result


_TEXTS = ('text', 'pair', 'delimiter')  # flags that are no path


def _expand_home(value: str) -> str:
  """Expands `~` and `~user` at the start of each path in a value, where a shell does not: behind
  `=`, as in --workdir=~/run, and behind commas."""

  def expand(match):
    home = os.path.expanduser(match[0])  # noqa: PTH111 (Path's raises RuntimeError)
    if home == '~':
      raise ValueError(f'{value}: this user has no home directory for ~; give a full path.')
    return home

  return re.sub(r'^~[\w.-]*$|(?<![^=,])~[\w.-]*(?=/)', expand, value)


def load_recipe(spec: str):
  """Reads a recipe, `PATH:WORDS` or `NAME:WORDS` (a file in configs/*/), and returns its config."""
  name, _, arg = spec.partition(':')
  path = pathlib.Path(_expand_home(name))
  if not path.is_file():
    found = {p.stem: p for p in sorted(_recipes().glob('*/*.py')) if p.stem != '__init__'}
    if path.stem not in found:
      raise ValueError(
        f'no recipe {name!r}{_nearest(path.stem, found)}: give a file, or one of '
        f'{", ".join(found)}.'
      )
    path = found[path.stem]
  if path.suffix != '.py':
    raise ValueError(f'{path} is no recipe: a recipe is a Python file, *.py, with get_config.')
  _recipes_read.add(path.resolve())
  loader = importlib.util.spec_from_file_location(f'bertjax_recipe_{path.stem}', path)
  module = importlib.util.module_from_spec(loader)
  try:
    loader.loader.exec_module(module)
    config = module.get_config(arg)
    if not hasattr(config, 'to_dict'):
      raise TypeError('get_config returned no config; it starts from default_config()')
    defaults = importlib.import_module(f'bertjax.{_kind(config)}').default_config()
  except (AttributeError, KeyError, NameError, SyntaxError, TypeError) as error:
    raise ValueError(f'{path}{_where(error, path)}: {_reason(error)}.') from error
  known, given = _flat(defaults), _flat(config)
  for name in [*given, *known]:
    if name not in known:
      raise ValueError(f'{path}: the config has no field {name!r}{_suggest(name, (), known)}.')
    if type(given.get(name)) is not type(known[name]):
      raise ValueError(
        f'{path}: {name} takes {type(known[name]).__name__}, as in {known[name]!r}; got '
        f'{given.get(name)!r}.'
      )
  return config


def recipe_for(verb: str, spec: str):
  """Loads a recipe; raises ValueError unless it is of the kind that the verb runs."""
  config = load_recipe(spec)
  kind = _kind(config)
  if kind != _RECIPES_OF.get(verb, kind):
    raise ValueError(
      f'{spec} is a recipe for {kind}; {verb} takes '
      f'{", ".join(_names(_RECIPES_OF[verb]))}, or a file like these.'
    )
  return config


def _kind(config) -> str:
  return 'finetune' if 'task' in config else 'pretrain'


def _where(error: BaseException, path: pathlib.Path) -> str:
  """', line N' of the recipe, where an error passed through it."""
  if isinstance(error, SyntaxError):
    return f', line {error.lineno}'
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if frame.filename == str(path)]  # fmt: skip
  return f', line {lines[-1]}' if lines else ''


def _reason(error: BaseException) -> str:
  """The sentence for a recipe's error; ml_collections' own lists every field of the config."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  text = str(error.args[0] if error.args else error)
  if missing := re.match(r'Key "([\w.]+)"', text) or re.match(r"'(\w+)'(\n|$)", text):
    fields = {
      name: '' for kind in ('pretrain', 'finetune')
      for name in _flat(importlib.import_module(f'bertjax.{kind}').default_config())
    }  # fmt: skip
    return f'the config has no field {missing[1]!r}{_suggest(missing[1], (), fields)}'
  if kind := re.match(r"Could not override field '([\w.]+)' \(reference\)\. (.*)", text, re.S):
    wanted = re.findall(r"<class '([\w.]+)'>", kind[2])
    value = kind[2].partition(' is of original type')[0]
    return f'{kind[1]} takes {wanted[-1].rpartition(".")[2]}, got {wanted[0]} {value}'
  return f'{type(error).__name__}: {text.rstrip(".")}'


def _recipes() -> pathlib.Path:
  """configs/ as installed (bertjax.configs), or beside the package in a checkout."""
  installed = pathlib.Path(__file__).parent / 'configs'
  return installed if installed.is_dir() else pathlib.Path(__file__).parent.parent / 'configs'


def _names(kind: str) -> list[str]:
  """Names of the recipes of a kind."""
  return sorted(p.stem for p in _recipes().glob(f'{kind}/*.py') if p.stem != '__init__')


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


def _check_fields(arguments: list[str], fields) -> None:
  """Names the nearest field where config_flags would raise a bare AttributeError."""
  for item in arguments:
    name = item.lstrip('-').partition('=')[0].removeprefix('no')
    if item.startswith('-') and name.startswith('config.') and name not in fields:
      raise ValueError(
        f'the config has no field {name.removeprefix("config.")!r}{_suggest(name, (), fields)}; '
        '--help lists all of them.'
      )


def _flat(config) -> dict:
  from flax.traverse_util import flatten_dict

  return flatten_dict(config.to_dict(), sep='.')


def _nearest(name: str, known) -> str:
  close = difflib.get_close_matches(name, list(known), n=1)
  return f', did you mean {close[0]!r}' if close else ''


def _suggest(name: str, flag_names, fields) -> str:
  """', did you mean --flag' for an unknown flag or field: by another library's name, then ours.

  Args:
    name: as it was given, without dashes.
    flag_names: of the program.
    fields: the config's, as 'config.data.length', or as 'data.length' in a recipe.
  """
  known = {flag: f'--{flag}' for flag in flag_names}
  for field in fields:
    ours = f'--{field}' if field.startswith('config.') else field
    known.setdefault(field.removeprefix('config.'), ours)
  for path in list(known):  # 'length' too stands for the first field of this name
    known.setdefault(path.rpartition('.')[2], known[path])
  leaf = name.rpartition('.')[2]
  close = difflib.get_close_matches(leaf, list(known), n=1, cutoff=0.7)
  for ours in (*ALIASES.get(leaf, ()), name.removeprefix('config.'), leaf, *close):
    if ours in known:
      return f', did you mean {known[ours]}'
  return ''


def _sentence(error: BaseException) -> str:
  if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
    return f'{error.filename} cannot be made: there is a file where a folder is needed.'
  return str(error)


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
    for name, value in _flat(recipe_for(program.__name__.rpartition('.')[2], spec)).items():
      parts.append(_field(f'--config.{name}', value, told.get(name, '')))
    folder = owner.__name__.rpartition('.')[2]
    parts += ['', f'Recipes: {", ".join(_names(folder))}']
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
