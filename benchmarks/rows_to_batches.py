"""Prepared rows to masked batches, one process, against DataCollatorForLanguageModeling.

  OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks rows_to_batches

Both start from rows of token ids in memory order; ours gathers them from the store in permuted
order, the collator gets a list of dicts, as a PyTorch DataLoader gives it. Tokens are all positions
of all rows. `taskset` holds both to one core.
"""

import pathlib
import tempfile

import numpy as np

from benchmarks import measure, report
from bertjax.data import dataset, loader
from bertjax.data.masking import Masking

FLAGS = {
  'length': (128, 'tokens a row'),
  'unit': ('subword', "masking.unit of ours: 'subword', 'whole_word' or 'span'"),
  'batch_size': (256, 'rows'),
  'batches': (20, 'in a measured run'),
  'vocab': ('', 'vocab.txt, uncased, for the collator'),
  'repeats': (5, 'measured runs after one warm-up'),
  'out': ('', 'JSON file to write'),
}


def run(length, unit, batch_size, batches, vocab, repeats, out):
  with tempfile.TemporaryDirectory() as folder:
    rows = make_rows(pathlib.Path(folder) / 'rows', length)
    contenders = {
      'bertjax': ours(rows, length, unit, batch_size, batches),
      'DataCollatorForLanguageModeling': hugging_face(rows, vocab, batch_size, batches),
    }
    name = f'rows_to_batches, length {length}'
    return report(name, measure(contenders, repeats=repeats), 'tokens/s', out)


def make_rows(folder, length, count=50_000):
  rng = np.random.default_rng(0)
  columns = {
    'input_ids': rng.integers(1000, 30_000, (count, length), np.uint16),
    'ends': np.tile(np.array([length // 2, length], np.uint16), (count, 1, 1)),
    'next_sentence_labels': rng.integers(0, 2, (count, 1), np.uint8),
  }
  columns['input_ids'][:, 0] = 101
  columns['input_ids'][:, [length // 2 - 1, length - 1]] = 102
  shapes = {name: (a.dtype.str, a.shape[1:]) for name, a in columns.items()}
  writer = dataset.Writer(folder, {}, shapes)
  writer.add_shard('train', 0, [columns])
  writer.finish({'train': 1, 'heldout': 0}, tokenizer='')
  return dataset.Dataset(folder, 'train')


def ours(rows, length, unit, batch_size, count):
  masking = Masking(max_predictions=20 if length <= 128 else 76, unit=unit)
  special = {'pad': 0, 'cls': 101, 'sep': 102, 'mask': 103}
  starts = np.random.default_rng(1).random(30_522) < 0.7
  made = loader.Batches(rows, batch_size, 0, masking, 30_522, special, starts)

  def once():
    for step in range(count):
      made.training(step)
    return count * batch_size * length

  return once


def hugging_face(rows, vocab, batch_size, count):
  import transformers

  tokenizer = transformers.BertTokenizerFast(vocab, do_lower_case=True)
  collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
  ids = [
    [{'input_ids': row.tolist()} for row in rows[np.arange(i, i + batch_size)]['input_ids']]
    for i in range(0, count * batch_size, batch_size)
  ]

  def once():
    for batch in ids:
      collate(batch)
    return sum(len(row['input_ids']) for batch in ids for row in batch)

  return once
