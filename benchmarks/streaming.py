"""Training batches from raw text as it is read: tokens/s, time to the first batch and memory.

  python -m benchmarks streaming --books=DIR --vocab=vocab.txt

Books are repeated, each time with another line, as JSONL in 8 files, to 10 and to 240 MB. Every
figure is that of a separate process; tokens are those of the batches, padding excluded. Private
memory (USS) is sampled every 20 batches, and the peak counts. Needs psutil.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import machine
from bertjax.data import blocks, streaming
from bertjax.data import loader as loader_lib
from bertjax.data import text as text_lib
from bertjax.data.masking import Masking
from bertjax.data.preprocess import Settings
from bertjax.data.tokenizer import Tokenizer

FLAGS = {
  'books': ('', 'a folder of prose, a file a document'),
  'vocab': ('', 'vocab.txt, uncased'),
  'repeats': (3, 'processes per figure'),
  'warmup': (800, 'batches before them: at first more text is read than used, to mix it'),
  'batches': (400, 'measured batches of 256 rows of 128 tokens'),
  'only': ('', 'LOADER,KIND,FOLDER to measure in this process: what each process does'),
  'out': ('', 'JSON file to write'),
}
KINDS = ('doc_sentences', 'nsp')


def run(books, vocab, repeats, warmup, batches, only, out):
  if only:
    print(json.dumps(measured(*only.split(','), vocab, warmup, batches)))
    return None
  found = []
  with tempfile.TemporaryDirectory() as folder:
    for size in (10, 240):
      fill(pathlib.Path(folder) / str(size), books, size * 10**6)
    for loader in ('tfdata', 'threads'):
      for kind in KINDS:
        for size in (10, 240):
          command = [sys.executable, '-m', 'benchmarks', *sys.argv[1:]]
          command.append(f'--only={loader},{kind},{folder}/{size}')
          runs = [last_line(command) for _ in range(repeats)]
          facts = {name: [run[name] for run in runs] for name in runs[0]}
          found.append({'loader': loader, 'kind': kind, 'megabytes': size} | facts)
  print('| streaming | MB of text | M tokens/s, median (min..max) | first batch, s | USS, MB |')
  print('|---|---|---|---|---|')
  for row in found:
    rates = [rate / 1e6 for rate in row['tokens_per_second']]
    print(
      f'| {row["loader"]}, {row["kind"]} | {row["megabytes"]} | {statistics.median(rates):.2f} '
      f'({min(rates):.2f}..{max(rates):.2f}) | {statistics.median(row["first_batch"]):.1f} | '
      f'{statistics.median(row["uss"]) / 1e6:,.0f} |'
    )
  result = {'benchmark': 'streaming', 'rows': found, **machine()}
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result


def last_line(command) -> dict:
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def fill(folder, books, size):
  folder.mkdir()
  documents, copy = list(text_lib.read_documents(books)), 0
  for number in range(8):
    with (folder / f'{number}.jsonl').open('w') as file:
      while file.tell() < size / 8:
        text = f'Copy {copy}.\n\n{documents[copy % len(documents)]}'
        file.write(json.dumps({'text': text}) + '\n')
        copy += 1


def measured(loader, kind, folder, vocab, warmup, count) -> dict:
  import psutil

  process, begun = psutil.Process(), time.perf_counter()
  tokenizer = Tokenizer.from_file(vocab)
  settings = Settings(kind=kind, length=128, format='jsonl', heldout_fraction=0.2)
  text = blocks.Text(folder, tokenizer, settings)
  masks = loader_lib.Batches(
    text.heldout(1000), 256, 0, Masking(), tokenizer.vocab_size, tokenizer.special,
    tokenizer.word_flags,
  )  # fmt: skip
  stream = streaming.Stream({'': text}, 256, masks.targets, loader=loader).batches()
  next(stream)
  first, tokens, most = time.perf_counter() - begun, 0, 0
  for _ in range(warmup):
    next(stream)
  begun = time.perf_counter()
  for number in range(count):
    tokens += int((next(stream)['segment_ids'] > 0).sum())
    if number % 20 == 0:
      most = max(most, process.memory_full_info().uss)
  rate = tokens / (time.perf_counter() - begun)
  return {'tokens_per_second': rate, 'first_batch': first, 'uss': most}
