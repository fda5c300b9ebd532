"""Exact WordPiece: the graph path of tf.data against Hugging Face's `tokenizers`.

  python -m benchmarks tokenize --books=DIR --vocab=vocab.txt
  python -m benchmarks tokenize --books=DIR --vocab=tokenizer.json   byte-level BPE, cased

All texts are in memory; ours ends in ragged ids, theirs in their `Encoding`s; both may use every
core. The ids are compared first. A tokenizer.json is no graph: then ours is `encode_flat`, and
`prepare` of the same text from a file.
"""

import itertools
import pathlib
import tempfile

from benchmarks import measure, report
from bertjax.data import preprocess
from bertjax.data.tokenizer import Tokenizer

FLAGS = {
  'books': ('', 'a folder of text files'),
  'vocab': ('', 'vocab.txt, uncased; or tokenizer.json, cased'),
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
  if vocab.endswith('.json'):
    return _run_json(texts, vocab, repeats, out)
  import tensorflow as tf

  from bertjax.data import tokenizer_tf

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


def _run_json(texts, vocab, repeats, out):
  """The same for a tokenizer.json, with `prepare` from a file to records of 128 tokens."""
  tokenizer = Tokenizer.from_file(vocab, lowercase=False)
  peer = tokenizer._engine._tokenizer
  encoded = [item.ids for item in peer.encode_batch(texts, add_special_tokens=False)]
  tokens, numbers = sum(map(len, encoded)), itertools.count()
  flat, lengths = tokenizer.encode_flat(texts)
  ends = itertools.pairwise([0, *lengths.cumsum()])
  wrong = sum(flat[a:b].tolist() != ids for (a, b), ids in zip(ends, encoded, strict=True))
  settings = preprocess.Settings(kind='doc_sentences', heldout_fraction=1)
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder) / 'text.txt'
    source.write_text('\n\n'.join(texts), encoding='utf-8')

    def prepare():
      rows = pathlib.Path(folder) / str(next(numbers))
      manifest = preprocess.prepare(str(source), tokenizer, settings, rows, workers=0)
      return manifest['counts']['heldout_tokens']

    def count(encode):
      encode()
      return tokens

    contenders = {
      'bertjax prepare': prepare,
      'bertjax encode_flat': lambda: count(lambda: tokenizer.encode_flat(texts)),
    } | {
      f'tokenizers {name}': lambda name=name: count(
        lambda: getattr(peer, name)(texts, add_special_tokens=False)
      )
      for name in ('encode_batch', 'encode_batch_fast')
    }
    rates = measure(contenders, repeats=repeats)
  return report('tokenize', rates, 'tokens/s', out, tokens=tokens, lines_that_differ=wrong)
