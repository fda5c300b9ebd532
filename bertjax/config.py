"""Configs: every field of a run with its default and its help, and the recipes that set them.

Programs read a config; libraries take plain arguments. A recipe is a Python file whose
`get_config(words)` starts from `pretraining()` or `finetuning()` and changes fields; the command
line (`--config.field=value`) changes any of them.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import traceback

from ml_collections import ConfigDict

from bertjax.flags import VERBS, suggest, suggestion
from bertjax.model import config as model_config

# Field -> (default, help). Help is a noun phrase that stands alone: unit, meaning of the default,
# choices.
SHARED = {
  'init_from': ('', 'model to start from: a model directory (bertjax, Hugging Face, Google), a '
                    "run's workdir or a hub name"),
  'seed': (0, 'seed of initial weights, data order, masks and dropout'),
  'prng_impl': ('threefry2x32', "generator of dropout: 'threefry2x32', or 'rbg' (faster on TPU, "
                                'but its bits depend on the mesh)'),
  'batch_size': (256, 'examples in a global batch, over all devices and microbatches'),
  'learning_rate': (1e-4, 'peak learning rate'),
  'schedule': ('google', "learning-rate decay: 'google' (linear, counted from step 0), 'linear' "
                         "(from the end of the warm-up) or 'constant'"),
  'optimizer.name': ('bert', "optimizer: 'bert' (AdamW without bias correction), 'adamw', 'lamb' "
                             "or 'sgd'"),
  'optimizer.b1': (0.9, 'decay rate of the first moment; momentum of sgd'),
  'optimizer.b2': (0.999, 'decay rate of the second moment'),
  'optimizer.eps': (1e-6, 'epsilon added to sqrt(v), outside the square root'),
  'optimizer.weight_decay': (0.01, 'decoupled weight decay; biases and LayerNorm are excluded'),
  'optimizer.clip_norm': (1.0, 'maximum global norm of the gradient; 0.0 = no clipping'),
  'data.length': (128, 'maximum sequence length in tokens'),
  'data.loader': ('auto', "input pipeline: 'tfdata', 'threads', or 'auto' = tfdata where TensorFlow "
                          'is installed'),
  'mesh.data': (-1, 'data-parallel replicas; -1 = all devices that fsdp and tensor leave'),
  'mesh.fsdp': (1, 'replicas that shard parameters and optimizer moments among them'),
  'mesh.tensor': (1, 'devices that shard each layer (tensor parallelism)'),
  'patience': (0, 'evaluations without improvement before the run stops early; 0 = never'),
  'log_every': (100, 'steps between log lines'),
  'max_to_keep': (2, 'newest checkpoints that are kept, beside the best one'),
}  # fmt: skip

PRETRAINING = SHARED | {
  'nsp': (True, 'next-sentence prediction beside the masked LM; False = full sentences in one '
                'segment'),
  'objective': ('mlm', "training objective: 'mlm', or 'next_token' (left-to-right ablation, needs "
                       'model.causal=True)'),
  'init_resize': (False, 'permission for init_from to have another vocabulary or maximum length'),
  'num_train_steps': (1_000_000, 'total number of training steps'),
  'gradient_accumulation_steps': (1, 'microbatches per step; without dropout the result equals '
                                     'that of one large batch'),
  'warmup_steps': (10_000, 'steps of linear warm-up from 0 to the peak learning rate'),
  'data.input': ('', 'raw text: file, folder, glob, tfds:NAME or embedded; separated by commas'),
  'data.prepared': ('', 'prepared dataset directory, written by `bertjax prepare`; an alternative '
                        'to data.input'),
  'data.format': ('prose', 'format of data.input: prose, google, wikitext, jsonl, parquet, tfds or '
                           'tfrecord'),
  'data.text_key': ('text', 'JSONL field, Parquet column or TFDS feature that contains the text'),
  'data.encoding': ('utf-8', 'encoding of text files by its Python name: utf-8, gb18030, utf-16, '
                             'latin-1 or another'),
  'data.on_bad_row': ('stop', "JSONL and Parquet records without text: 'stop', or 'skip' and count "
                              'them'),
  'data.vocab': ('', 'vocabulary: vocab.txt or a SentencePiece *.model; a prepared dataset '
                     'contains its own'),
  'data.lowercase': (True, 'lower-casing, which also strips accents, for "uncased" vocabularies'),
  'data.rules': ('huggingface', 'tokenization rules where the reference implementations differ: '
                                "'huggingface' or 'google'"),
  'data.kind': ('', 'example format: nsp, sop, doc_sentences or full_sentences; empty = nsp, or '
                    'doc_sentences with nsp=False'),
  'data.heldout_fraction': (0.05, 'fraction of documents held out for evaluation, selected by a '
                                  'hash of their text; 1.0 = all'),
  'data.dupe_factor': (1, 'copies of the corpus, each with other sentence pairs'),
  'data.short_seq_prob': (0.1, 'probability that an example gets a random shorter length'),
  'data.max_sequences_per_row': (1, 'maximum number of sequences packed into one row; 1 = no '
                                    'packing'),
  'data.num_shards': (0, 'files of the prepared training set; 0 = one per 64 MB of text'),
  'data.binary': ('refuse', "binary files in data.input: 'refuse' or 'skip'"),
  'data.cache_dir': ('', 'directory in which raw text is prepared; empty = $BERTJAX_CACHE or '
                         '~/.cache/bertjax'),
  'masking.rate': (0.15, "fraction of a row's tokens to predict"),
  'masking.max_predictions': (20, 'maximum number of predictions per row: 20 at length 128, 76 at '
                                  '512; -1 = from masking.rate'),
  'masking.mask_prob': (0.8, 'probability that a selected token becomes [MASK]'),
  'masking.random_prob': (0.1, 'probability that a selected token becomes a random token; the rest '
                               'is unchanged'),
  'masking.unit': ('subword', "masking unit: 'subword', 'whole_word' or 'span' (n-grams of words)"),
  'masking.max_span': (3, 'maximum words per span; n words have a probability proportional to 1/n'),
  'stage2.fraction': (0.0, 'fraction of the steps that belongs to stage 2, which follows the first '
                           'part of the run; 0.0 = no such stage, 0.1 in the paper'),
  'stage2.length': (512, 'sequence length in stage 2, in tokens; 0 = as before'),
  'stage2.batch_size': (0, 'rows in a global batch in stage 2; 0 = as before'),
  'stage2.max_predictions': (76, 'maximum number of predictions per row in stage 2; -1 = from the '
                                 'rate, 0 = as before'),
  'stage2.mask_rate': (0.0, 'masking.rate in stage 2; 0.0 = as before'),
  'stage2.prepared': ('', 'prepared dataset directory of stage 2; empty = as before, for rows of '
                          'the same length'),
  'stage3.fraction': (0.0, 'fraction of the steps that belongs to stage 3, which ends the run; 0.0 '
                           '= no such stage'),
  'stage3.length': (0, 'sequence length in stage 3, in tokens; 0 = as before'),
  'stage3.batch_size': (0, 'rows in a global batch in stage 3; 0 = as before'),
  'stage3.max_predictions': (0, 'maximum number of predictions per row in stage 3; -1 = from the '
                                'rate, 0 = as before'),
  'stage3.mask_rate': (0.0, 'masking.rate in stage 3; 0.0 = as before'),
  'stage3.prepared': ('', 'prepared dataset directory of stage 3; empty = as before, for rows of '
                          'the same length'),
  'eval_every': (10_000, 'steps between evaluations on held-out examples; 0 = at the end only'),
  'max_eval_examples': (10_000, 'maximum number of held-out examples per evaluation'),
  'save_every': (1_000, 'steps between checkpoints'),
  'on_divergence': ('stop', "reaction to a loss that is not finite: 'stop', or 'skip' = return to "
                            'the last checkpoint and skip the batches since'),
  'loss_spike_threshold': (0.0, 'nats above the median of the last 100 losses that count as '
                                'divergence; 0.0 = off'),
  'compilation_cache_dir': ('', 'directory of compiled programs for the next start; gs:// works; '
                                'empty = none'),
  'stall_seconds': (3600.0, 'seconds without progress after which the process exits with code 75; '
                            '0.0 = never'),
  'save_model': ('last', "step saved as model/: 'last', or 'best' (lowest held-out loss)"),
}  # fmt: skip

FINETUNING = SHARED | {
  'task.name': ('sst2', 'task: a name in bertjax.TASKS, such as sst2, squad1, conll2003 or table'),
  'reinit_head': (True, "new output layer; False = the model's own layer for this task"),
  'reinit_top_layers': (0, 'top layers that are re-initialised with the pooler (Zhang et al. 2021)'),
  'num_trainable_layers': (-1, 'top layers that are trained, without embeddings; -1 = all, 0 = '
                               'frozen encoder'),
  'layerwise_lr_decay': (1.0, 'ratio of the learning rate of a layer to that of the layer above'),
  'head_lr_multiplier': (1.0, 'learning-rate multiplier outside the encoder, such as 10.0 for a '
                              'CRF or BiLSTM'),
  'num_seeds': (1, 'runs with consecutive seeds, trained together; the first uses `seed`'),
  'num_train_epochs': (3.0, 'passes over the training split'),
  'batch_size': (32, SHARED['batch_size'][1]),
  'learning_rate': (2e-5, SHARED['learning_rate'][1]),
  'learning_rates': ('', 'sweep of peak learning rates, such as 2e-5,3e-5,5e-5, each with every '
                         'seed'),
  'warmup_ratio': (0.1, 'fraction of the steps used for linear warm-up'),
  'class_weights': ('', "class weights of the loss: 'balanced', or one number per class, such as "
                        '1.0,2.5'),
  'data.source': ('', "directory in the task's official layout, or tfds:NAME"),
  'data.prepared': ('', 'training set written by `bertjax prepare` with this config; empty = '
                        'encoded at the start'),
  'data.train_file': ('', 'file of the training split: a path, or a name in data.source'),
  'data.dev_file': ('', 'file of the dev split: a path, or a name in data.source'),
  'data.test_file': ('', 'file of the test split: a path, or a name in data.source'),
  'data.dev_fraction': (0.1, 'fraction of the training examples held out, by a hash of their '
                             'texts, if the task has no dev split'),
  'data.buckets': ('32,48,64,96,128,192,256,384', 'batch lengths in tokens, without packing'),
  'data.packed_length': (-1, 'row length in tokens for packed examples; 0 = no packing, -1 = '
                             'data.length, at least 128'),
  'data.train': ('train', 'split to train on'),
  'data.dev': ('dev', 'split to evaluate on'),
  'data.test': ('test', 'split to predict at the end, if the source has it; empty = none'),
  'data.max_train_examples': (0, 'maximum number of training examples, a random subset by `seed`; '
                                 '0 = all'),
  'span_loss_includes_padding': (False, "softmax of the SQuAD loss over padding too, as Google's; "
                                        'without buckets'),
  'log_every': (50, SHARED['log_every'][1]),
  'eval_every': (0, 'steps between evaluations; 0 = after each epoch'),
  'save_every': (0, 'steps between checkpoints; 0 = at evaluations only'),
  'max_to_keep': (1, SHARED['max_to_keep'][1]),
  'save_model': ('best', "step saved as model/: 'best' by the task's metric, or 'last'"),
}  # fmt: skip

# Options of tasks; `tasks.make_task` accepts those of the task at hand.
FINETUNING |= {
  'task.text': ('', 'column of the text (table); a number from 0 in a file without a header'),
  'task.pair': ('', 'column of the second text of a sentence pair (table)'),
  'task.label': ('label', 'column of the label (table, choice)'),
  'task.kind': ('class', "kind of label: 'class', 'regression' or 'multilabel' (table)"),
  'task.labels': ('', "label names joined by '|' (table); empty = those of the training split"),
  'task.separator': ('|', 'separator of the labels in a multilabel field (table)'),
  'task.prompt': ('', 'column of the text that every ending completes (choice)'),
  'task.endings': ('', "columns of the endings, joined by '|' (choice)"),
  'task.start': ('', 'column of the text in front of every ending (choice)'),
  'task.delimiter': ('', 'delimiter between columns (table, choice): a character, or tab, comma, '
                         'semicolon, pipe, space; empty = detect'),
  'task.encoding': ('utf-8', 'encoding of text files by its Python name (table, choice, conll)'),
  'task.on_bad_row': ('stop', "records without text or label (table, choice): 'stop', or 'skip' and "
                              'count them'),
  'task.types': ('', "entity types joined by '|' (conll); empty = those of the training split"),
  'task.word': (0, 'column of the word, from 0 (conll)'),
  'task.tag': (-1, 'column of the tag, from 0 (conll); -1 = the last'),
  'task.context': (False, 'sequences filled with the sentences around in the document (conll2003, '
                          'conll)'),
  'task.stride': (128, 'tokens from one window of a context to the next (squad1, squad2)'),
  'task.max_query': (64, 'maximum tokens of a question (squad1, squad2)'),
  'task.nbest': (20, 'candidate answers per question (squad1, squad2)'),
  'task.max_answer': (0, 'maximum tokens of an answer (squad1, squad2); 0 = 30, or 50 with cmrc2018'),
  'task.scorer': ('squad', "comparison of answers: 'squad', or 'cmrc2018' for Chinese (squad1, "
                           'squad2)'),
  'task.format': ('prose', 'format of the text, such as data.format of pre-training '
                           '(sentence_order, next_sentence)'),
  'task.seed': (0, 'seed of the choice of wrong pairs (sentence_order, next_sentence)'),
}  # fmt: skip

_ENCODER = {f'model.{f.name}': (f.default, f.metadata['help'])
            for f in dataclasses.fields(model_config.EncoderConfig)}  # fmt: skip
OF_TASKS = (*model_config.HEAD_FIELDS, 'frozen')  # fields of EncoderConfig for fine-tuning alone
PRETRAINING |= {n: f for n, f in _ENCODER.items() if n.partition('.')[2] not in OF_TASKS}
for _name in (*model_config.HEAD_FIELDS, 'dtype', 'attention', 'remat', 'unroll'):
  FINETUNING[f'model.{_name}'] = _ENCODER[f'model.{_name}']
for _name in ('hidden_dropout', 'attention_dropout', 'classifier_dropout'):
  _help = _ENCODER[f'model.{_name}'][1].partition(';')[0]
  FINETUNING[f'model.{_name}'] = (-1.0, f'{_help}; -1.0 = as the model was trained')

MLM_VARIANTS = {  # the paper's appendix C.2: probabilities of [MASK] and of a random token
  'mask_80_10': (0.8, 0.1),
  'mask_100_0': (1.0, 0.0),
  'mask_80_20': (0.8, 0.2),
  'mask_80_0': (0.8, 0.0),
  'mask_0_80': (0.0, 0.8),
  'mask_0_100': (0.0, 1.0),
}

# What may follow the colon of a recipe for pre-training.
WORDS = {
  'smoke': 'the recipe end to end in seconds',
  'two_lengths': 'rows of 512 tokens for the last tenth of the steps, as in the paper',
  'length_512': 'rows of 512 tokens, as a second run that starts from a model',
  'continued': 'continued pre-training of --config.init_from on your own domain',
  'no_nsp': 'no next-sentence prediction (Table 5)',
  'ltr': 'left-to-right prediction without NSP (Table 5)',
  'size_LAYERS_WIDTH_HEADS': 'size of the encoder, such as size_6_768_12 (Table 6)',
} | {name: f'{mask:.0%} [MASK], {random:.0%} random tokens (Table 8)'
     for name, (mask, random) in MLM_VARIANTS.items()}  # fmt: skip

# What the word `smoke` sets: any recipe end to end in seconds.
SMOKE = {
  'model.num_layers': 2, 'model.hidden_size': 32, 'model.num_heads': 2, 'model.mlp_size': 64,
  'model.max_positions': 64, 'model.dtype': 'float32', 'data.length': 64, 'data.dupe_factor': 1,
  'masking.max_predictions': 10, 'batch_size': 8, 'gradient_accumulation_steps': 1,
  'num_train_steps': 20, 'stage2.length': 64, 'warmup_steps': 5, 'log_every': 5,
  'eval_every': 10, 'max_eval_examples': 64, 'save_every': 10,
}  # fmt: skip


def pretraining(preset: str = 'base') -> ConfigDict:
  """All fields of a pre-training run; recipes change some and flags change any."""
  config, encoder = _build(PRETRAINING), model_config.PRESETS[preset]()
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


def flat(tree) -> dict:
  """The fields of a config, or of its dict, by dotted names."""
  result = {}
  for name, value in tree.items():
    section = isinstance(value, dict | ConfigDict)
    result |= {f'{name}.{leaf}': v for leaf, v in flat(value).items()} if section else {name: value}
  return result


def vary(config: ConfigDict, words: str) -> ConfigDict:
  """Applies `WORDS`, separated by commas, and returns the config.

  Raises:
    ValueError: for an unknown word.
  """
  for word in filter(None, words.split(',')):
    if word == 'smoke':
      config.update_from_flattened_dict(SMOKE)
    elif word == 'two_lengths':
      config.stage2.fraction = 0.1
    elif word == 'length_512':
      config.data.length, config.masking.max_predictions = 512, 76
      config.num_train_steps, config.warmup_steps, config.learning_rate = 100_000, 1_000, 1e-5
    elif word == 'continued':  # Google's README: a smaller learning rate, such as 2e-5
      config.num_train_steps, config.warmup_steps, config.learning_rate = 20_000, 1_000, 2e-5
      config.eval_every = 1_000
    elif word == 'no_nsp':
      config.nsp, config.data.dupe_factor = False, 1
    elif word == 'ltr':
      config.nsp, config.objective, config.model.causal = False, 'next_token', True
      config.data.dupe_factor = 1  # there are no pairs to sample again
    elif word in MLM_VARIANTS:
      config.masking.mask_prob, config.masking.random_prob = MLM_VARIANTS[word]
    elif size := re.fullmatch(r'size_(\d+)_(\d+)_(\d+)', word):
      layers, width, num_heads = map(int, size.groups())
      config.model.update(
        {'num_layers': layers, 'hidden_size': width, 'num_heads': num_heads, 'mlp_size': 4 * width}
      )
    else:
      raise ValueError(f'unknown word {word!r} after the recipe; known are {", ".join(WORDS)}.')
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
  known = flat(finetuning() if kind(config) == 'finetune' else pretraining())
  given = flat(config)
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


def expand_home(value: str) -> str:
  """Expands `~` and `~user` at the start of each path in a value, where a shell does not: after
  `=`, as in --workdir=~/run, and after commas."""

  def expand(match):
    home = os.path.expanduser(match[0])  # noqa: PTH111 (Path's raises RuntimeError)
    if home == '~':
      raise ValueError(f'{value}: this user has no home directory for ~; give a full path.')
    return home

  return re.sub(r'^~[\w.-]*$|(?<![^=,])~[\w.-]*(?=/)', expand, value)


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
