"""The verbs of the command, their flags and fields' names elsewhere: data for parsing and `--help`.

A verb's `run` gets its flags as keyword arguments; a verb with the flag 'config' gets a config too.
"""

import difflib
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_SOURCE = "a model directory, a run's workdir, a folder of another library or a hub name"
_MODEL = ('', f'model: {_SOURCE}')
_WORKDIR = ('', 'directory of the run; the same directory resumes it')
_BATCH_SIZE = (32, 'examples per batch')
_LONG = ('refuse', "texts beyond the model's maximum length: 'refuse', or 'window' = read in parts")
_TEXT_FORMAT = 'prose, google, wikitext, jsonl, parquet or tfds'
_ENCODING = 'by its Python name: utf-8, gb18030, utf-16, latin-1 or another'
_PROCESSES = {
  'coordinator_address': ('', 'HOST:PORT of process 0; empty = from TPU metadata or SLURM, else a '
                              'single process'),
  'num_processes': (0, 'number of processes, with --coordinator_address'),
  'process_id': (-1, 'number of this process, from 0, with --coordinator_address'),
}  # fmt: skip


class Verb(NamedTuple):
  """A program of the command.

  Attributes:
    summary: what it does, for `bertjax --help`.
    flags: flag -> (default, help); the type of the default is that of the flag.
    recipes: the kind of recipe that --config takes, 'pretrain' or 'finetune'; '' = both, or none.
    short: short flag -> the field of the config that it sets.
    smaller: what to change where memory is short.
    argument: the flag that may be given without its name; the texts of a tuple are as many as are
      given.
  """

  summary: str
  flags: dict
  recipes: str = ''
  argument: str = ''
  short: Mapping[str, str] = MappingProxyType({})
  smaller: str = 'take a smaller model or text'


# In the order of a first day's work.
VERBS = {
  'quickstart': Verb(
    'pre-train a small BERT on bundled text, evaluate it and fill masks, in minutes',
    {
      'config': ('quickstart', "recipe; 'quickstart:smoke' takes seconds and learns nothing"),
      'workdir': ('bertjax-quickstart', 'directory of the run; the same directory resumes it'),
    },
    'pretrain',
  ),
  'vocab': Verb(
    'train a vocabulary on your text, or report how one fits it',
    {
      'input': ('', 'text: files, folders, globs, tfds:NAME, hf:NAME or embedded, by commas'),
      'out': ('', 'vocabulary to train and write: vocab.txt, spiece.model or tokenizer.json'),
      'vocab': ('', 'existing vocabulary to report on; an alternative to --out'),
      'size': (30522, 'number of entries, special tokens included'),
      'kind': ('wordpiece', "vocabulary type: 'wordpiece', 'sentencepiece' (unigram) or 'bpe' "
               '(byte-level, as in RoBERTa)'),
      'format': ('prose', f'format of the text: {_TEXT_FORMAT}'),
      'text_key': ('text', 'JSONL field, Parquet column or TFDS feature that contains the text'),
      'encoding': ('utf-8', f'encoding of text files, {_ENCODING}'),
      'on_bad_row': ('stop', "JSONL and Parquet records without text: 'stop' or 'skip'"),
      'lowercase': (True, 'lower-casing, which also strips accents; byte-level BPE keeps the case'),
      'report': (True, 'report of how the vocabulary fits the text'),
      'report_file': ('', 'JSON file for the report'),
      'max_words': (1_000_000, 'distinct words in memory; beyond it the rare half is dropped'),
      'workers': (-1, 'worker processes; 0 = none, -1 = one per core; the result is the same'),
    },
  ),
  'prepare': Verb(
    'tokenise text into a prepared dataset on disk',
    {
      'config': ('bert_mini', 'recipe, by name or path; its data section describes the text'),
      'out': ('', 'directory to write; a partial one is resumed, a complete one is an error'),
      'workers': (-1, 'worker processes; 0 = none, -1 = one per core where the text is worth it'),
      'format': ('rows', "format of the dataset: 'rows', or 'google', TFRecords with static masks"),
      'shard': ('0/1', "part i of n, as 'i/n' with i from 0; all n write into the same --out"),
    },
    short={'input': 'data.input', 'vocab': 'data.vocab', 'train_file': 'data.train_file',
           'model': 'init_from'},
  ),
  'pretrain': Verb(
    'pre-train BERT on raw text or a prepared dataset',
    {
      'config': ('bert_mini', 'recipe: NAME or FILE, or with changes NAME:WORDS'),
      'workdir': _WORKDIR,
    } | _PROCESSES,
    'pretrain',
    short={'input': 'data.input', 'vocab': 'data.vocab', 'prepared': 'data.prepared',
           'model': 'init_from'},
    smaller='lower --config.batch_size, split each batch with --config.gradient_accumulation_steps='
            '2 (or 4, 8: without dropout the same result), or set --config.model.remat=full',
  ),
  'finetune': Verb(
    'fine-tune a pre-trained model on a task',
    {
      'config': ('glue', 'recipe: NAME or FILE, or with changes NAME:WORDS'),
      'workdir': _WORKDIR,
    } | _PROCESSES,
    'finetune',
    short={'train_file': 'data.train_file', 'dev_file': 'data.dev_file',
           'test_file': 'data.test_file', 'text': 'task.text', 'pair': 'task.pair',
           'label': 'task.label', 'model': 'init_from'},
    smaller='lower --config.batch_size, --config.data.length or --config.num_seeds, or set '
            '--config.model.remat=full',
  ),
  'evaluate': Verb(
    "evaluate a run or a model directory on held-out text or a task's split",
    {
      'workdir': ('', 'directory of a run, which contains its own config'),
      'checkpoint': ('best', "checkpoint of --workdir: 'best', 'newest' or a step"),
      'model': ('', f'model to evaluate, an alternative to --workdir: {_SOURCE}'),
      'config': ('', 'recipe with the data to evaluate --model on'),
      'split': ('', 'split of a task; empty = data.dev'),
      'out': ('', 'directory for the predictions of a task; existing files are replaced (logged)'),
      'max_eval_examples': (0, "maximum number of held-out examples; 0 = the config's"),
      'unigram': ('', 'texts that give the unigram frequencies of the baseline; empty = the '
                      'training set'),
    } | _PROCESSES,
    smaller='evaluate the model directory (--model, --config=RECIPE) with a lower '
            '--config.batch_size',
  ),
  'doctor': Verb(
    'look at data, model and machine of a run before it starts: findings, time and memory',
    {
      'config': ('bert_mini', 'recipe of the run, with its fields'),
      'workdir': ('', 'directory that the run would have, for the space on its disk'),
      'megabytes': (20, 'text to read, in MB'),
      'probe': (True, 'compilation and a few steps, for time and memory'),
    },
    short={'input': 'data.input', 'vocab': 'data.vocab', 'prepared': 'data.prepared',
           'train_file': 'data.train_file', 'dev_file': 'data.dev_file', 'text': 'task.text',
           'pair': 'task.pair', 'label': 'task.label', 'model': 'init_from'},
    smaller='set --noprobe, or lower --config.batch_size',
  ),
  'compare': Verb(
    'compare runs side by side, and with the band of reference runs',
    {
      'runs': ((), 'directories of runs, one after the other, without the name of the flag'),
      'out': ('', 'HTML page with curves to write; an existing one is replaced (logged)'),
      'band': ('', 'JSON file of a band; exit code 1 if a run leaves it'),
      'write_band': ('', 'JSON file to write: the band of these runs, which differ in their seed'),
    },
    argument='runs',
  ),
  'reproduce': Verb(
    'run a named experiment, such as a table of the paper, and check what it claims',
    {
      'name': ('', 'experiment, without the name of the flag; empty = list them'),
      'workdir': ('', 'directory of the runs, which resume; empty = runs/NAME'),
      'seeds': (0, 'runs of each variant, from seed 0; 0 = 3'),
      'out': ('', 'JSON file for the table; an existing one is replaced'),
      'input': ('', 'text for pre-training: files, folders, globs, tfds:NAME or hf:NAME'),
      'glue': ('', 'folder of the GLUE tasks, such as SST-2'),
      'conll': ('', 'folder of CoNLL-2003'),
      'model': _MODEL,
    },
    argument='name',
  ),
  'predict': Verb(
    "a model's answers for a text or a file of texts",
    {
      'model': _MODEL,
      'do': ('', 'prediction: fill_mask, infill, score, continue, correct, classify, tag, answer, '
                 'choose, rerank, next_sentence, embed, nearest, summarise; empty = by the '
                 "model's only head"),
      'text': ('', 'input text; the first of a pair'),
      'pair': ('', 'second text of a pair; choose: the endings, and rerank: the documents, '
                   'separated by |'),
      'input': ('', 'file of inputs (.txt, .csv, .tsv, .jsonl, .parquet), instead of --text'),
      'columns': ('text', 'columns of --input that contain the texts, separated by commas; numbers '
                          'from 0 in a file without header'),
      'delimiter': ('', 'column delimiter of --input and --corpus: a character, or tab, comma, '
                        "semicolon, pipe, space; empty = by the file's extension"),
      'encoding': ('utf-8', f'encoding of --input and --corpus, {_ENCODING}'),
      'out': ('', '.jsonl or .csv file to write, with --input'),
      'keep': ('', 'columns of --input that the output repeats, separated by commas; empty = '
                   'those of the texts'),
      'corpus': ('', 'nearest: file of the texts to search, in the first of --columns or one per '
                     'line'),
      'index': ('', 'nearest: .npz file of the embedded corpus; written from --corpus if missing'),
      'top_k': (0, 'number of proposals, answers, hits or documents; 0 = the default of --do'),
      'words': ('', "tag: definition of a word: 'text' (default), 'spaces' or 'tokens'"),
      'max_new_tokens': (0, 'continue: maximum number of new tokens; 0 = 32'),
      'seed': (0, 'continue: seed of the samples among the --top_k most probable tokens'),
      'sentences': (0, 'summarise: number of sentences; 0 = 3'),
      'pooling': ('', "pooling of embeddings: 'mean', 'cls', 'last' or 'last_four'; empty = "
                      "the model's own, else 'mean'"),
      'prompt': ('', "embed: name of the prompt, of the model's files, in front of each text"),
      'width': (0, 'embed: first components to keep of the vectors; 0 = all'),
      'no_answer': (False, "answer: '' is among the answers, as in SQuAD 2.0"),
      'max_answer': (0, 'answer: maximum length in tokens; 0 = 30; 50 suits Chinese'),
      'long': _LONG,
      'batch_size': _BATCH_SIZE,
    },
    argument='text',
    smaller='lower --batch_size',
  ),
  'explain': Verb(
    'attention, layers and attributions of a text as an HTML page',
    {
      'model': _MODEL,
      'text': ('', 'text to explain; the first of a pair'),
      'pair': ('', 'second text of a pair; with a choice head the endings, one per line'),
      'out': ('explain.html', 'HTML file to write; an existing one is replaced (logged)'),
    },
    argument='text',
  ),
  'serve': Verb(
    'serve a model over HTTP, with a page to try it',
    {
      'model': _MODEL,
      'host': ('127.0.0.1', 'address to listen on; 0.0.0.0 = all interfaces'),
      'port': (8000, 'port; 0 = any free one'),
      'index': ('', 'index for /nearest, written by `bertjax predict --do=nearest --index`'),
      'batch_size': _BATCH_SIZE,
      'queue': (1024, 'maximum number of waiting texts; further requests get 503'),
      'wait_ms': (5, 'milliseconds that a text waits for others to fill its batch'),
      'timeout': (30, 'seconds until a request gets 504, or 408 if it has not arrived by then'),
      'max_body': (262_144, 'maximum size of a request in bytes; larger ones get 413'),
      'long': _LONG,
      'warm_up': (True, 'compilation for all lengths at the start, not at the first texts'),
    },
    smaller='lower --batch_size',
  ),
  'convert': Verb(
    "convert a model to Hugging Face's or Google's files",
    {
      'from': ('', f'model: {_SOURCE} (NAME@REVISION), or the prefix of a TF1 checkpoint'),
      'checkpoint': (-1, 'step of a checkpoint of --from=WORKDIR; -1 = model/, or the newest'),
      'base': ('', 'base model of adapters in --from; empty = the one that they name'),
      'out': ('', 'directory to write; it must not exist, or be empty'),
      'format': ('hf', "format to write: 'hf' (model directory) or 'google' (bert_model.ckpt.*)"),
      'heads': ('', 'heads to keep, separated by commas; empty = all'),
      'gelu': ('erf', "meaning of 'gelu' in a bert_config.json: 'erf' or 'tanh'"),
      'lowercase': ('', "lower-casing of the tokenizer: 'true' or 'false'; empty = by the files"),
      'hub': ('', 'repository OWNER/NAME of the Hugging Face hub to upload --out to, with a model '
                  'card; created as private; empty = none'),
    },
  ),
  'export': Verb(
    'export a model as a program: a SavedModel with its tokenizer, or StableHLO',
    {
      'model': _MODEL,
      'out': ('', 'directory to write; it must not exist'),
      'format': ('savedmodel', "format to write: 'savedmodel' or 'stablehlo'"),
      'head': ('', "output head; empty = the task's head, else embeddings"),
      'pooling': ('', "pooling of exported embeddings: 'mean', 'cls', 'last' or 'last_four'; "
                      "empty = the model's own"),
    },
  ),
  'compile': Verb(
    'compile a recipe for a TPU topology without the hardware: memory and roofline bound',
    {
      'config': ('bert_base', 'recipe; its fields set mesh, batch size and rematerialisation'),
      'topology': ('', 'TPU slice, such as v5e:16x16, or several, as 2*v5e:16x16; empty = time '
                       'steps on the local devices'),
      'sweep': ('', "values of fields, all combinations, as 'batch_size=256,512;model.remat=none,"
                    "full'"),
      'out': ('', 'JSON file for the reports'),
    },
    'pretrain',
  ),
}  # fmt: skip

# Names in transformers, google-research/bert and earlier versions -> ours, the first that the verb
# knows. `suggest` finds near names without this table.
ALIASES = {
  'accumulation': ('gradient_accumulation_steps',),
  'adam_beta1': ('optimizer.b1',),
  'adam_beta2': ('optimizer.b2',),
  'adam_epsilon': ('optimizer.eps',),
  'bf16': ('model.dtype',),
  'case': ('lowercase', 'data.lowercase'),
  'dataset_name': ('data.source', 'data.input'),
  'epochs': ('num_train_epochs',),
  'eval_rows': ('max_eval_examples',),
  'eval_steps': ('eval_every',),
  'evaluation_strategy': ('eval_every',),
  'files': ('data.train_file',),
  'fp16': ('model.dtype',),
  'fresh_head': ('reinit_head',),
  'gradient_checkpointing': ('model.remat',),
  'head_factor': ('head_lr_multiplier',),
  'init_checkpoint': ('init_from', 'model'),
  'input_file': ('data.input', 'input'),
  'keep': ('max_to_keep',),
  'label_column_name': ('task.label',),
  'logging_steps': ('log_every',),
  'lr': ('learning_rate',),
  'lr_scheduler_type': ('schedule',),
  'mask_share': ('masking.mask_prob',),
  'masked_lm_prob': ('masking.rate',),
  'max_grad_norm': ('optimizer.clip_norm',),
  'max_seq_length': ('data.length',),
  'max_steps': ('num_train_steps',),
  'mlm_probability': ('masking.rate',),
  'model_name_or_path': ('init_from', 'model', 'from'),
  'num_train_epochs': ('num_train_steps',),
  'num_warmup_steps': ('warmup_steps', 'warmup_ratio'),
  'optim': ('optimizer.name',),
  'options': ('task.text',),
  'out': ('workdir',),
  'output': ('head', 'out', 'workdir'),
  'output_dir': ('workdir', 'out'),
  'output_file': ('out',),
  'pack': ('data.packed_length',),
  'passes': ('data.dupe_factor',),
  'per_device_eval_batch_size': ('batch_size',),
  'per_device_train_batch_size': ('batch_size',),
  'random_share': ('masking.random_prob',),
  'recipe': ('config',),
  'redraw_layers': ('reinit_top_layers',),
  'rows': ('max_eval_examples',),
  'save_steps': ('save_every',),
  'save_total_limit': ('max_to_keep',),
  'seeds': ('num_seeds',),
  'sequences': ('data.max_sequences_per_row',),
  'short_probability': ('data.short_seq_prob',),
  'span_over_padding': ('span_loss_includes_padding',),
  'spike': ('loss_spike_threshold',),
  'step': ('checkpoint',),
  'steps': ('num_train_steps',),
  'task': ('task.name', 'do'),
  'task_name': ('task.name', 'do'),
  'text_column_name': ('task.text',),
  'to': ('out', 'workdir'),
  'tokenizer_name': ('data.vocab',),
  'train_file': ('data.train_file', 'data.input'),
  'validation_file': ('data.dev_file',),
  'vocab_file': ('data.vocab', 'vocab'),
  'warmup_ratio': ('warmup_steps',),
  'warmup_share': ('warmup_ratio', 'warmup_steps'),
  'warmup_steps': ('warmup_ratio',),
  'which': ('checkpoint',),
}


def suggestion(name: str, known) -> str:
  """', did you mean NAME' for the nearest of the known names; '' if none is near."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f', did you mean {close[0]!r}' if close else ''


def suggest(name: str, flags=(), fields=()) -> str:
  """', did you mean --flag' for an unknown flag or field: by another name, then by a near one.

  Args:
    name: as it was given, without dashes.
    flags: of the verb.
    fields: of the config, as 'config.data.length', or as 'data.length' in a recipe.
  """
  if old := re.fullmatch(r'(config\.)?stage([23])\.(\w+)', name):  # of earlier versions
    leaf = 'steps (a number of steps)' if old[3] == 'fraction' else old[3]
    prefix = '--config.' if next(iter(fields), '').startswith('config.') else ''
    return f', did you mean {prefix}stages[{int(old[2]) - 1}].{leaf}'
  known = {flag: f'--{flag}' for flag in flags}
  for field in fields:
    ours = f'--{field}' if field.startswith('config.') else field
    known.setdefault(field.removeprefix('config.'), ours)
  for path in list(known):  # 'length' also names the first field of this name
    known.setdefault(path.rpartition('.')[2], known[path])
  leaf = name.rpartition('.')[2]
  close = difflib.get_close_matches(leaf, list(known), n=1, cutoff=0.7)
  for ours in (*ALIASES.get(leaf, ()), name.removeprefix('config.'), leaf, *close):
    if ours in known:
      return f', did you mean {known[ours]}'
  return ''


def expand_home(value: str) -> str:
  """Expands `~` and `~user` at the start of each path in a value, where a shell does not: after
  `=`, as in --workdir=~/run, and after commas."""

  def expand(match):
    home = os.path.expanduser(match[0])  # noqa: PTH111 (Path's raises RuntimeError)
    if home == '~':
      raise ValueError(f'{value}: this user has no home directory for ~; give a full path.')
    return home

  return re.sub(r'^~[\w.-]*$|(?<![^=,])~[\w.-]*(?=/)', expand, value)
