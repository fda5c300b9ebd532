"""Doctor: what would go wrong in a run, before it starts.

  bertjax doctor --config=bert_mini --config.data.input=TEXTS --config.data.vocab=vocab.txt
  bertjax doctor --config=table --train_file=train.csv --text=review --label=stars --model=MODEL

Looks at data, vocabulary, model, disk and devices, compiles the step and times a few of it. Of
text, the first --megabytes are read. Each finding is one sentence; '!!' marks what would stop or
spoil the run, '!' what is worth a look. Exits with code 1 if there is a '!!'.
"""

import collections
import datetime
import functools
import os
import pathlib
import shutil
import unicodedata
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import jax
import numpy as np

from bertjax import build, finetune, plan, prepare
from bertjax import compile as compile_lib
from bertjax.data import dataset, mixture, vocabulary
from bertjax.data import loader as loader_lib
from bertjax.data import text as text_lib
from bertjax.interop import loading
from bertjax.tasks import task as task_lib
from bertjax.training import layout as layout_lib
from bertjax.training import loop

OK, LOOK, WRONG = '', '!', '!!'
MOST_DUPLICATES = 0.01  # of documents or examples
MOST_TRUNCATED = 0.05  # of examples
MOST_EPOCHS = 100  # BERT had 40


class Finding(NamedTuple):
  """A sentence about a topic; `mark` is OK, LOOK or WRONG."""

  mark: str
  topic: str
  text: str


def run(config, workdir: str = '', megabytes: int = 20, probe: bool = True) -> list[Finding]:
  """Prints and returns the findings about a run that has not started.

  Args:
    config: of the run.
    workdir: where it would be; its disk is looked at.
    megabytes: text that is read.
    probe: whether the step is compiled and timed.

  Raises:
    SystemExit: with code 1, if a finding would stop or spoil the run.
  """
  checks = [lambda: machine(config), lambda: build.check(config)]
  tasks = 'task' in config
  checks += [lambda: examples(config)] if tasks else [lambda: text(config, megabytes)]
  checks.append(lambda: cost(config, workdir, probe))
  findings = []
  for check in checks:
    try:
      findings += check() or ()
    except (ValueError, OSError) as error:
      findings.append(Finding(WRONG, 'run', str(error)))
      break  # what follows needs what is missing
  for finding in findings:
    print(f'{finding.mark:<3}{finding.topic:<12}{finding.text}')
  if any(finding.mark == WRONG for finding in findings):
    raise SystemExit(1)
  return findings


def machine(config) -> Iterator[Finding]:
  """Devices, versions and the input pipeline."""
  devices, versions = jax.devices(), []
  for name in ('jax', 'libtpu', 'tensorflow'):
    try:
      versions.append(f'{name} {metadata.version(name)}')
    except metadata.PackageNotFoundError:
      continue
  yield Finding(OK, 'machine', f'{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} cores,'
                               f' {", ".join(versions)}')  # fmt: skip
  chosen = os.environ.get('JAX_PLATFORMS')
  there = any(map(os.path.exists, ('/dev/accel0', '/dev/nvidia0')))
  if devices[0].platform == 'cpu' and there and not chosen:
    yield Finding(
      WRONG, 'machine', 'there is an accelerator, and jax uses the CPU only; install '
      "'bertjax[tpu]' or 'bertjax[cuda]'.",
    )  # fmt: skip
  if loader_lib.choose_loader(config.data.loader) == 'threads':
    yield Finding(OK, 'machine', 'input by threads, without TensorFlow')


def text(config, megabytes: int) -> Iterator[Finding]:
  """Text, vocabulary and their fit, for pre-training."""
  config = config.copy_and_resolve_references()
  if config.data.prepared:
    rows = prepare.prepared_rows(config)
    counts = [dataset.read_manifest(folder)['counts'] for folder in rows.folders.values()]
    tokens = sum(count['train_tokens_used'] for count in counts)
    yield Finding(OK, 'rows', f'{sum(c["train_rows"] for c in counts):,} prepared training rows of '
                              f'{tokens:,} tokens')  # fmt: skip
    yield from epochs(config, tokens)
    return
  tokenizer = prepare.load_vocab(config)
  for stage in plan.stages(config):
    build.make_model(stage.config, tokenizer.vocab_size)
  if problem := prepare.case_problem(tokenizer):
    yield Finding(LOOK, 'vocabulary', problem)
  data = config.data
  for name, source in mixture.read_sources(data.input).items():
    topic = f'text {name}'.strip()
    report = text_lib.Report()
    documents, complete = read_text(data, source, megabytes, report)
    facts = vocabulary.describe(
      documents, data.vocab, format=data.format, lowercase=data.lowercase, workers=0
    )
    yield Finding(OK, topic, f'letters: {scripts(documents)}')
    yield from fit(config, topic, facts, report)
    read = sum(len(document.encode()) for document in documents)
    tokens, part = facts['tokens'], ''
    if not complete:
      tokens *= max(1, sum(size for _, size, _ in text_lib.list_source(source)) / read)
      part = f' in the first {read / 1e6:.0f} MB'
    counts = f'{facts["documents"]:,} documents of {facts["tokens"]:,} tokens{part}'
    yield Finding(OK, topic, counts)
    if not name:
      yield from epochs(config, tokens)


def read_text(data, source: str, megabytes: int, report) -> tuple[list[str], bool]:
  """The first documents of a source, and whether they are all of them."""
  documents, size = [], 0
  for document in text_lib.read_documents(
    source, data.format, text_key=data.text_key, encoding=data.encoding,
    on_bad_row=data.on_bad_row, report=report,
  ):  # fmt: skip
    if size >= megabytes * 1e6:
      return documents, False
    documents.append(document)
    size += len(document.encode())
  return documents, True


def fit(config, topic: str, facts: dict, report) -> Iterator[Finding]:
  """How text and vocabulary fit each other and the objective."""
  unknown = facts['unknown'] / max(facts['tokens'], 1)
  same = facts['duplicates'] / facts['documents']
  for far, mark, sentence in (
    (unknown > dataset.MOST_UNKNOWN, WRONG,
     f'{unknown:.1%} of the tokens are [UNK]; train a vocabulary on this text with `bertjax '
     'vocab`, or change data.lowercase.'),
    (same > MOST_DUPLICATES, LOOK,
     f'{facts["duplicates"]:,} of {facts["documents"]:,} documents ({same:.0%}) repeat an earlier '
     'one; remove duplicates.'),
    (config.nsp and not facts['nsp'], WRONG,
     f'{facts["documents_for_nsp"]:,} of {facts["documents"]:,} documents have two sentences or '
     'more, too few for next-sentence prediction; set --config.nsp=False.'),
    (config.nsp and facts['random_labels'] > dataset.MOST_RANDOM, LOOK,
     f'{facts["random_labels"]:.0%} of the next-sentence labels would be random in rows of '
     f'{vocabulary.ROW} tokens, where the rule gives a little over 50%; see data.format, or set '
     '--config.nsp=False.'),
    (report.invalid_utf8, LOOK,
     f'{report.invalid_utf8:,} byte sequences are invalid in data.encoding={config.data.encoding}'
     f'{report.hint or "; name another encoding."}'),
  ):  # fmt: skip
    if far:
      yield Finding(mark, topic, sentence)


def scripts(documents: list[str]) -> str:
  """The most frequent scripts among the first letters of documents, by their Unicode names.

  >>> scripts(['BERT 模型', 'Modell'])
  '83% Latin, 17% CJK'
  """
  letters = (c for document in documents for c in document[:2000] if c.isalpha())
  names = (unicodedata.name(letter, 'unnamed').partition(' ')[0] for letter in letters)
  counts = collections.Counter(name if name == 'CJK' else name.capitalize() for name in names)
  return ', '.join(f'{n / counts.total():.0%} {name}' for name, n in counts.most_common(4)
                   if n >= 0.005 * counts.total())  # fmt: skip


def epochs(config, tokens: float) -> Iterator[Finding]:
  """How often the run reads its text."""
  stages = plan.stages(config)
  read = sum((s.stop - s.start) * s.config.batch_size * s.config.data.length for s in stages)
  times = read / max(tokens, 1)
  many = times > MOST_EPOCHS
  advice = '; BERT had 40, so add text or lower num_train_steps.' if many else ''
  yield Finding(LOOK if many else OK, 'epochs', f'{stages[-1].stop:,} steps read {read:,} tokens, '
                f'the text about {times:.3g} times{advice}')  # fmt: skip


def examples(config) -> Iterator[Finding]:
  """Training and dev examples, their labels and lengths, for fine-tuning."""
  if not config.init_from:
    raise ValueError('finetune needs --config.init_from=MODEL (--model).')
  task, tokenizer = build.make_task(config), loading.load_tokenizer(config.init_from)
  train, dev = build.training_examples(config, task), task.judge.read(config.data.dev)
  encoded = task.encode(train, tokenizer, config.data.length)
  yield Finding(
    OK, 'examples', f'{len(train):,} to train on, {len(dev):,} in {config.data.dev}; labels: '
    f'{task_lib.describe_labels(task, train)}',
  )  # fmt: skip
  texts = [item.texts for item in train]
  known, repeated = collections.defaultdict(set), len(texts) - len(set(texts))
  for item in train:
    known[item.texts].add(str(item.label))
  both = sum(len(labels) > 1 for labels in known.values())
  leaked = sum(item.texts in known for item in dev) if task is task.judge else 0
  ids = encoded.columns['input_ids']
  real = encoded.columns['ends'][:, -1, 1].sum()
  unknown = np.count_nonzero(ids == tokenizer.special.get('unk', -1)) / max(real, 1)
  cut = encoded.counts.get('truncated', 0)
  for far, mark, sentence in (
    (leaked, WRONG, f'{leaked:,} of {len(dev):,} dev examples are in the training split too, so '
     'their scores say little; remove them from one.'),
    (repeated > MOST_DUPLICATES * len(texts), LOOK,
     f'{repeated:,} of {len(texts):,} training examples repeat an earlier one.'),
    (both, LOOK, f'Training texts with more than one label: {both:,}.'),
    (cut > MOST_TRUNCATED * len(train), LOOK,
     f'{cut:,} of {len(train):,} training examples are truncated to data.length='
     f'{config.data.length}; raise it.'),
    (unknown > dataset.MOST_UNKNOWN, LOOK,
     f'{unknown:.1%} of the tokens are [UNK]; choose a model whose vocabulary has this language.'),
  ):  # fmt: skip
    if far:
      yield Finding(mark, 'examples', sentence)


def cost(config, workdir: str, probe: bool) -> Iterator[Finding]:
  """Time and memory of the run by a short probe, and the disk of its checkpoints."""
  if not probe:
    return
  if 'task' not in config and (config.objective == 'distill' or config.lora.rank):
    yield Finding(OK, 'time', 'not measured: the probe of pre-training knows no teacher and no '
                              'adapters')  # fmt: skip
    return
  reports = finetuning_probe(config) if 'task' in config else pretraining_probe(config)
  seconds = 0.0
  for report in reports:
    stage = f'stage {report["stage"]}' if 'stage' in report else 'step'
    if 'does_not_fit' in report:
      yield Finding(WRONG, 'memory', f'{stage}: {report["does_not_fit"]}; lower batch_size or set '
                                     'model.remat.')  # fmt: skip
      return
    peak, there = report['peak_bytes'], device_memory()
    wrong = bool(there) and peak > there
    of = f' of {there / 1e9:.1f}' if there else ''
    advice = '; lower batch_size, or set gradient_accumulation_steps or model.remat.' * wrong
    yield Finding(WRONG if wrong else OK, 'memory', f'{stage}: {peak / 1e9:.2f}{of} GB on each '
                                                    f'device{advice}')  # fmt: skip
    seconds += report['steps'] * report['measured_step_seconds']
    yield Finding(OK, 'time', f'{stage}: {1e3 * report["measured_step_seconds"]:,.0f} ms, '
                              f'{report["measured_tokens_per_second"]:,.0f} tokens/s')  # fmt: skip
  whole = datetime.timedelta(seconds=round(seconds))
  yield Finding(OK, 'time', f'the run takes about {whole}, without evaluations and input')
  arrays = 1 + {'sgd': 1}.get(config.optimizer.name, 2) + bool(config.optimizer.average)
  size, copies = 4 * arrays * report['parameters'], config.max_to_keep + 2  # the best, a new one
  folder = pathlib.Path(workdir or '.').absolute()
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  wrong = size * copies > free
  sizes = f'{copies} checkpoints of {size / 1e9:.2f} GB, {free / 1e9:,.1f} GB free in {folder}'
  yield Finding(WRONG if wrong else OK, 'disk', sizes + '; choose another --workdir.' * wrong)


def device_memory() -> int:
  """Bytes of a device, or of what is free of the host's where that is the device; 0 = unknown."""
  if stats := jax.local_devices()[0].memory_stats():
    return stats.get('bytes_limit', 0)
  path = pathlib.Path('/proc/meminfo')
  lines = path.read_text().splitlines() if path.exists() else []
  kib = next((int(line.split()[1]) for line in lines if line.startswith('MemAvailable')), 0)
  return 1024 * kib // len(jax.local_devices())


def pretraining_probe(config) -> list[dict]:
  """A report of each stage."""
  config = config.copy_and_resolve_references()
  if not config.model.vocab_size:
    prepared = prepare.prepared_rows(config) if config.data.prepared else None
    tokenizer = prepared.tokenizer if prepared else prepare.load_vocab(config)
    config.model.vocab_size = tokenizer.vocab_size
  return [compile_lib.report_of(s, jax.devices(), measure=True) for s in plan.stages(config)]


def finetuning_probe(config) -> list[dict]:
  """The report of the first batches."""
  setup = finetune.set_up(config)
  state, shardings, _ = layout_lib.restore_or_init(
    setup.objective, setup.optimizer, setup.layout, load=functools.partial(finetune.load, setup)
  )
  batch = next(loop.to_device(iter([setup.batches.training(0)]), setup.layout.mesh))
  step = setup.layout.train_step(setup.objective, setup.optimizer, shardings)
  compiled = step.lower(state, batch).compile()
  rows, length = batch['input_ids'].shape[-2:]
  report = {
    'device': jax.devices()[0].device_kind, 'steps': setup.steps, 'batch_size': rows,
    'length': length, 'model_flops': 0.0,
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
  } | compile_lib.costs_of(compiled)  # fmt: skip
  return [report | compile_lib.measured(compiled, state, batch, report)]
