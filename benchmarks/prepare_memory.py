"""Memory of `bertjax prepare` as the text grows: private memory summed over the process tree.

  python -m benchmarks prepare_memory --books=DIR --vocab=vocab.txt

Books are repeated, each time with another line, to 10 and to 240 MB. USS (unique set size)
leaves mapped files out; it is sampled every 0.2 s, and the peak counts. Needs psutil.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import machine

FLAGS = {
  'books': ('', 'a folder of prose, a file a document'),
  'vocab': ('', 'vocab.txt, uncased'),
  'workers': (2, 'worker processes'),
  'out': ('', 'JSON file to write'),
}


def run(books, vocab, workers, out):
  peaks = {}
  for megabytes in (10, 240):
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      fill(folder / 'text', books, megabytes * 10**6)
      command = [
        sys.executable, '-m', 'bertjax', 'prepare', '--config=bert_mini', f'--workers={workers}',
        f'--out={folder}/rows', f'--config.data.input={folder}/text',
        f'--config.data.vocab={vocab}',
      ]  # fmt: skip
      peaks[megabytes] = peak(command)
      print(f'{megabytes} MB of text: {peaks[megabytes] / 1e6:,.0f} MB', flush=True)
  limit = 1e9 + 0.9e9 * workers
  growth = peaks[240] / peaks[10] - 1
  print(f'growth {growth:.1%}; limit for {workers} workers {limit / 1e6:,.0f} MB')
  if out:
    result = {'peak_bytes': peaks, 'growth': growth, 'workers': workers, **machine()}
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')


def fill(folder, books, size):
  folder.mkdir()
  paths, number = sorted(p for p in pathlib.Path(books).rglob('*') if p.is_file()), 0
  while size > 0:
    text = f'Copy {number}.\n\n' + paths[number % len(paths)].read_text()
    (folder / f'{number:05d}.txt').write_text(text)
    size, number = size - len(text.encode()), number + 1


def peak(command) -> int:
  import psutil

  process, most = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
  while process.poll() is None:
    total = 0
    for one in (process, *process.children(recursive=True)):
      try:
        total += one.memory_full_info().uss
      except psutil.Error:  # it ended meanwhile
        continue
    most = max(most, total)
    time.sleep(0.2)
  if process.returncode:
    raise RuntimeError(f'prepare ended with code {process.returncode}')
  return most
