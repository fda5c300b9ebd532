"""Exact WordPiece: the graph path of tf.data against Hugging Face's `tokenizers`.

  python -m benchmarks tokenize --data=DIR --out=tokenize.json

DIR holds `books` and `vocab` (`BERTJAX_DATA`). All texts lie in memory; ours ends in ragged ids,
theirs in their `Encoding`s, and both may use every core. The ids are compared first.
"""

import os
import pathlib
import statistics

import tensorflow as tf

import benchmarks
from bertjax.data import graph_tokenizer
from bertjax.data.tokenizer import Tokenizer

BATCH = 4096


def run(
  *, data: str = '', out: str = '', lines: str = '100000', rules: str = 'huggingface'
) -> None:
  """Measures on `lines` lines, spread evenly over the books."""
  folder = pathlib.Path(data or os.environ.get('BERTJAX_DATA', ''))
  texts = [
    line
    for path in sorted((folder / 'books').iterdir())
    for line in path.read_text(encoding='utf-8').splitlines()
    if line.strip()
  ]
  texts = texts[:: max(1, len(texts) // int(lines))]
  vocab = folder / 'vocab' / 'bert-base-uncased-vocab.txt'
  tokenizer = Tokenizer.from_file(vocab, rules=rules)
  peer = Tokenizer.from_file(vocab)._engine._tokenizer
  graph = graph_tokenizer.GraphTokenizer(tokenizer)
  batches = tf.data.Dataset.from_tensor_slices(texts).batch(BATCH)
  ids = batches.map(graph, num_parallel_calls=tf.data.AUTOTUNE)
  encoded = tokenizer.encode(texts)
  wrong = sum(
    a != b for a, b in zip((row for x in ids for row in x.to_list()), encoded, strict=True)
  )
  tokens = sum(map(len, encoded))

  def ours():
    return sum(int(ragged.row_splits[-1]) for ragged in ids)

  def theirs(encode_batch):
    encode_batch(texts, add_special_tokens=False)
    return tokens

  rates = benchmarks.measure({
    'ours, tf.data': ours,
    'tokenizers encode_batch': lambda: theirs(peer.encode_batch),
    'tokenizers encode_batch_fast': lambda: theirs(peer.encode_batch_fast),
  })  # fmt: skip
  own, *peers = map(statistics.median, rates.values())
  benchmarks.report(
    'tokens/s', rates, {'ratio to the faster of the two': own / max(peers)}, out=out,
    packages=('tensorflow', 'tensorflow-text', 'tokenizers'), rules=rules, lines=len(texts),
    tokens=tokens, lines_that_differ=wrong,
  )  # fmt: skip
