"""Exact WordPiece: the graph path of tf.data against Hugging Face's `tokenizers`.

  python -m benchmarks tokenize --books=DIR --vocab=vocab.txt

All texts are in memory; ours ends in ragged ids, theirs in their `Encoding`s; both may use every
core. The ids are compared first.
"""

import pathlib

import tensorflow as tf

from benchmarks import measure, report
from bertjax.data import tokenizer_tf
from bertjax.data.tokenizer import Tokenizer

FLAGS = {
  'books': ('', 'a folder of text files'),
  'vocab': ('', 'vocab.txt, uncased'),
  'lines': (100_000, 'spread evenly over the books'),
  'rules': ('huggingface', "of ours: 'huggingface' or 'google'"),
  'batch_size': (4096, 'lines'),
  'repeats': (5, 'measured runs after one warm-up'),
  'out': ('', 'JSON file to write'),
}


def run(books, vocab, lines, rules, batch_size, repeats, out):
  texts = [
    line
    for path in sorted(pathlib.Path(books).iterdir())
    for line in path.read_text(encoding='utf-8').splitlines()
    if line.strip()
  ]
  texts = texts[:: max(1, len(texts) // lines)]
  tokenizer = Tokenizer.from_file(vocab, rules=rules)
  peer = Tokenizer.from_file(vocab)._engine._tokenizer
  graph = tokenizer_tf.GraphTokenizer(tokenizer)
  batches = tf.data.Dataset.from_tensor_slices(texts).batch(batch_size)
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

  contenders = {
    'bertjax, tf.data': ours,
    'tokenizers encode_batch': lambda: theirs(peer.encode_batch),
    'tokenizers encode_batch_fast': lambda: theirs(peer.encode_batch_fast),
  }
  rates = measure(contenders, repeats=repeats)
  return report(
    'tokenize', rates, 'tokens/s', out, rules=rules, tokens=tokens, lines_that_differ=wrong
  )
