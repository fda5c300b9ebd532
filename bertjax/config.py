"""Configs: the fields of a run (fields.py), and the recipes that set them.

Programs read a config; libraries take plain arguments. A recipe is a Python file whose
`get_config(words)` starts from `pretraining()` or `finetuning()` and changes fields; the command
line (`--config.field=value`) changes any of them.
"""

import importlib.util
import pathlib
import re
import traceback
from collections.abc import Iterable

from ml_collections import ConfigDict

from bertjax.fields import FINETUNING, PRETRAINING, STAGE
from bertjax.flags import VERBS, expand_home, suggest, suggestion
from bertjax.model import config as model_config

# What may follow the colon of a recipe for pre-training.
WORDS = {
  'smoke': 'the recipe end to end in seconds',
  'mini': '4 layers, 256 wide, 16 rows of 128 tokens per batch: for two cores, as bert_mini',
  'two_lengths': 'four times as long rows in the last tenth of the steps: 512 tokens in the paper',
  'three_stages': 'warm-up and constant rate, eight times as long rows, decay with half the masks',
  'length_512': 'rows of 512 tokens, as a second run that starts from a model',
  'continued': 'continued pre-training of --config.init_from on your own domain',
  'no_nsp': 'no next-sentence prediction (Table 5)',
  'ltr': 'left-to-right prediction without NSP (Table 5)',
  'size_LAYERS_WIDTH_HEADS': 'size of the encoder, such as size_6_768_12 (Table 6)',
}

# What the word `smoke` sets: any recipe end to end in seconds.
SMOKE = {
  'model.num_layers': 2, 'model.hidden_size': 32, 'model.num_heads': 2, 'model.mlp_size': 64,
  'model.max_positions': 64, 'model.dtype': 'float32', 'data.length': 64, 'data.dupe_factor': 1,
  'masking.max_predictions': 10, 'batch_size': 8, 'gradient_accumulation_steps': 1,
  'num_train_steps': 20, 'warmup_steps': 5, 'log_every': 5, 'eval_every': 10,
  'max_eval_examples': 64, 'save_every': 10,
}  # fmt: skip


def _mini(config) -> dict:
  """What `bert_mini` has in place of a pod's sizes, batch and learning rate."""
  return {
    **_size(config, 4, 256, 4), 'model.dtype': 'float32', 'data.length': 128,
    'masking.max_predictions': min(20, config.masking.max_predictions),
    'batch_size': 16,  # more steps for the same tokens; not compared with 32
    'num_train_steps': 40_000, 'warmup_steps': 1_000, 'learning_rate': 1e-3,
    'model.initializer_range': 0.05,  # as the quickstart; 0.02 suits 768 wide
    'model.unroll': 4,  # a 2-layer model ran at 21.8k instead of 18.1k tokens/s on two cores
    # Far from one epoch too many.
    'model.hidden_dropout': 0.0, 'model.attention_dropout': 0.0,
    'log_every': 50, 'eval_every': 1_000, 'max_eval_examples': 1_024, 'save_every': 500,
  }  # fmt: skip


def _size(config, layers: int, width: int, num_heads: int) -> dict:
  """Sizes of the encoder, the MLP as many times as wide as before."""
  mlp = config.model.mlp_size * width // config.model.hidden_size
  return {'model.num_layers': layers, 'model.hidden_size': width, 'model.num_heads': num_heads,
          'model.mlp_size': mlp}  # fmt: skip


def _two_lengths(config) -> dict:
  """BERT's two stages: 90% of the steps on rows of 128 tokens, 10% on 512 (appendix A.2)."""
  length, most = 4 * config.data.length, config.masking.max_predictions
  most = most if most == -1 else most * 76 // 20
  return {
    'stages[0].steps': 0, 'stages[1].steps': max(1, config.num_train_steps // 10),
    'stages[1].length': length, 'stages[1].max_predictions': most,
    'model.max_positions': max(length, config.model.max_positions),
  }  # fmt: skip


def _three_stages(config) -> dict:
  """The stages of ModernBERT (Warner et al. 2024), each with about the same tokens per batch."""
  steps, length = max(1, config.num_train_steps // 10), 8 * config.data.length
  changes = {
    'nsp': False, 'data.kind': 'full_sentences', 'data.dupe_factor': 1, 'masking.rate': 0.3,
    'masking.max_predictions': -1, 'model.max_positions': max(length, config.model.max_positions),
    'stages[0].schedule': 'constant', 'stages[1].schedule': 'constant',
    'stages[2].schedule': 'one_minus_sqrt', 'stages[2].mask_rate': 0.15,
  }  # fmt: skip
  longer = {'steps': steps, 'length': length, 'batch_size': max(1, config.batch_size // 8)}
  if config.model.positions == 'rotary':
    longer['rope_theta'] = 160_000.0
  return changes | {f'stages[{n}].{name}': v for n in (1, 2) for name, v in longer.items()}


# The fields that each word sets; stages depend on those that the other words set.
_CHANGES = {
  'smoke': SMOKE,
  'mini': _mini,
  'two_lengths': _two_lengths,
  'three_stages': _three_stages,
  'length_512': {'data.length': 512, 'masking.max_predictions': 76, 'num_train_steps': 100_000,
                 'warmup_steps': 1_000, 'learning_rate': 1e-5},
  # Google's README: a smaller learning rate, such as 2e-5.
  'continued': {'num_train_steps': 20_000, 'warmup_steps': 1_000, 'learning_rate': 2e-5,
                'eval_every': 1_000},
  'no_nsp': {'nsp': False, 'data.dupe_factor': 1},  # there are no pairs to sample again
  'ltr': {'nsp': False, 'data.dupe_factor': 1, 'objective': 'next_token', 'model.causal': True},
}  # fmt: skip

for _mask, _random in ((80, 10), (100, 0), (80, 20), (80, 0), (0, 80), (0, 100)):  # appendix C.2
  _word = f'mask_{_mask}_{_random}'
  WORDS[_word] = f'{_mask}% [MASK], {_random}% random tokens (Table 8)'
  _CHANGES[_word] = {'masking.mask_prob': _mask / 100, 'masking.random_prob': _random / 100}


def pretraining(preset: str = 'base') -> ConfigDict:
  """All fields of a pre-training run; recipes change some and flags change any."""
  config = _build(PRETRAINING | {'stages': ((), '')})
  encoder = model_config.PRESETS[preset]()
  config.model.update({name: getattr(encoder, name) for name in config.model})
  config.model.vocab_size = 0  # the vocabulary's size
  return config


def finetuning(task: str = 'sst2') -> ConfigDict:
  """All fields of a fine-tuning run of a task of `bertjax.TASKS`."""
  config = _build(FINETUNING)
  config.task.name = task
  return config


def _build(fields: dict) -> ConfigDict:
  """The locked config of a table of fields, whose dotted names become sections."""
  tree = {}
  for name, (default, _) in fields.items():
    section, _, leaf = name.rpartition('.')
    (tree.setdefault(section, {}) if section else tree)[leaf] = default
  return ConfigDict(tree).lock()


def stage(**fields) -> ConfigDict:
  """A stage for `config.stages`, with some of the fields of `fields.STAGE`."""
  section = _build(STAGE)
  section.update(fields)
  return section


def flat(tree) -> dict:
  """The fields of a config, or of its dict, by dotted names, such as 'stages[0].length'."""
  result = {}
  for name, value in tree.items():
    sections = {name: value} if isinstance(value, dict | ConfigDict) else {}
    if name == 'stages':
      sections = {f'stages[{number}]': section for number, section in enumerate(value)}
    elif not sections:
      result[name] = value
    for path, section in sections.items():
      result |= {f'{path}.{leaf}': v for leaf, v in flat(section).items()}
  return result


def update(config: ConfigDict, fields: dict) -> None:
  """Sets fields by their dotted names; adds the stages that are missing."""
  add_stages(config, fields)
  in_stages = {name: _STAGE_FIELD.match(name) for name in fields}
  config.update_from_flattened_dict({n: v for n, v in fields.items() if not in_stages[n]})
  for name, match in in_stages.items():
    if match:
      config.stages[int(match['number'])][match['leaf']] = fields[name]


def add_stages(config: ConfigDict, names: Iterable[str]) -> None:
  """Adds a stage for each of the names in order that is of the next one, stages[0] first.

  Raises:
    ValueError: for a name of a stage behind the next one.
  """
  for match in filter(None, map(_STAGE_FIELD.match, names)):
    number, count = int(match['number']), len(config.stages)
    if number > count:
      raise ValueError(
        f'{match[0]} is a field of stage {number + 1}, but the config has {count} stages; number '
        f'them from 0 without a gap, the next one is stages[{count}].'
      )
    if number == count:
      config.stages = (*config.stages, stage())


_STAGE_FIELD = re.compile(r'stages\[(?P<number>\d+)\]\.(?P<leaf>\w+)')


def to_dict(config: ConfigDict) -> dict:
  """The config of a pre-training run as JSON holds it."""
  return config.to_dict() | {'stages': [section.to_dict() for section in config.stages]}


def table_of(config: ConfigDict) -> dict:
  """Field -> (default, help) of a config with its stages."""
  if kind(config) == 'finetune':
    return FINETUNING
  table = dict(PRETRAINING)
  for number in range(len(config.get('stages', ()))):
    table |= {f'stages[{number}].{name}': entry for name, entry in STAGE.items()}
  return table


def vary(config: ConfigDict, words: str) -> ConfigDict:
  """Applies `WORDS`, separated by commas, and returns the config.

  Raises:
    ValueError: for an unknown word.
  """
  names, order = filter(None, words.split(',')), {'mini': -1, 'two_lengths': 1, 'three_stages': 1}
  for word in sorted(names, key=lambda word: order.get(word, 0)):  # sizes first, stages last
    changes = _CHANGES.get(word)
    if size := re.fullmatch(r'size_(\d+)_(\d+)_(\d+)', word):
      changes = _size(config, *map(int, size.groups()))
    if not changes:
      raise ValueError(f'unknown word {word!r} after the recipe; known are {", ".join(WORDS)}.')
    update(config, changes(config) if callable(changes) else changes)
  return config


def load_recipe(spec: str) -> ConfigDict:
  """Reads a recipe, `PATH:WORDS` or `NAME:WORDS` (a file in configs/*/), and returns its config.

  Raises:
    ValueError: if there is no such recipe, or for a mistake in it; names the line.
  """
  name, _, words = spec.partition(':')
  path = pathlib.Path(expand_home(name))
  if not path.is_file():
    found = {p.stem: p for p in sorted(_folder().glob('*/*.py')) if p.stem != '__init__'}
    if path.stem not in found:
      raise ValueError(
        f'no recipe {name!r}{suggestion(path.stem, found)}: name a file, or one of '
        f'{", ".join(found)}.'
      )
    path = found[path.stem]
  if path.suffix != '.py':
    raise ValueError(f'{path} is no recipe; a recipe is a Python file, *.py, with get_config.')
  recipes_read.add(path.resolve())
  loader = importlib.util.spec_from_file_location(f'bertjax_recipe_{path.stem}', path)
  module = importlib.util.module_from_spec(loader)
  try:
    loader.loader.exec_module(module)
    config = module.get_config(words)
    if not hasattr(config, 'to_dict'):
      raise TypeError('get_config must return a config, from bertjax.config.pretraining() or '
                      'finetuning()')  # fmt: skip
  except (AttributeError, KeyError, NameError, SyntaxError, TypeError) as error:
    raise ValueError(f'{path}{_line(error, path)}: {_reason(error)}.') from error
  known, given = {n: default for n, (default, _) in table_of(config).items()}, flat(config)
  for name in [*given, *known]:
    if name not in known:
      raise ValueError(f'{path}: the config has no field {name!r}{suggest(name, fields=known)}.')
    if type(given.get(name)) is not type(known[name]):
      raise ValueError(
        f'{path}: {name} takes {type(known[name]).__name__}, such as {known[name]!r}; got '
        f'{given.get(name)!r}.'
      )
  return config


def recipe_for(verb: str, spec: str) -> ConfigDict:
  """Loads a recipe; raises ValueError unless it is of the kind that the verb runs."""
  config, wanted = load_recipe(spec), VERBS[verb].recipes
  if wanted and kind(config) != wanted:
    raise ValueError(
      f'{spec} is a recipe for {kind(config)}; {verb} takes {", ".join(recipe_names(wanted))}, or '
      'a file like these.'
    )
  return config


recipes_read: set[pathlib.Path] = set()  # files whose errors are the user's


def kind(config) -> str:
  """'pretrain' or 'finetune', the program that runs a config."""
  return 'finetune' if 'task' in config else 'pretrain'


def recipe_names(kind: str) -> list[str]:
  """The names of the recipes of a kind."""
  return sorted(p.stem for p in _folder().glob(f'{kind}/*.py') if p.stem != '__init__')


def _folder() -> pathlib.Path:
  """configs/ as installed (bertjax.configs), or beside the package in a checkout."""
  installed = pathlib.Path(__file__).parent / 'configs'
  return installed if installed.is_dir() else pathlib.Path(__file__).parent.parent / 'configs'


def _line(error: BaseException, path: pathlib.Path) -> str:
  """', line N' of the recipe, where an error passed through it."""
  if isinstance(error, SyntaxError):
    return f', line {error.lineno}'
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == str(path)]
  return f', line {lines[-1]}' if lines else ''


def _reason(error: BaseException) -> str:
  """The sentence for a recipe's error; ml_collections' own lists every field of the config."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  text = str(error.args[0] if error.args else error)
  if missing := re.match(r'Key "([\w.]+)"', text) or re.match(r"'(\w+)'(\n|$)", text):
    near = suggest(missing[1], fields=PRETRAINING | FINETUNING)
    return f'the config has no field {missing[1]!r}{near}'
  if field := re.match(r"Could not override field '([\w.]+)' \(reference\)\. (.*)", text, re.S):
    wanted = re.findall(r"<class '([\w.]+)'>", field[2])
    value = field[2].partition(' is of original type')[0]
    return f'{field[1]} takes {wanted[-1].rpartition(".")[2]}, got {wanted[0]} {value}'
  return f'{type(error).__name__}: {text.rstrip(".")}'
