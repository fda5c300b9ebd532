"""Raw text to training rows with next-sentence pairs, against create_pretraining_data.py.

  python -m benchmarks text_to_rows --books=DIR --vocab=vocab.txt --google=CHECKOUT

All read the same file, a sentence a line (our splitter made it). `--google` is a checkout of
google-research/bert, run under tf.compat.v1 on the first `--google_chars` of the text, masks
included, since it makes them there. Hugging Face's is the usual recipe without pairs:
`datasets.map` to tokenise and then to group into rows, two processes (`pip install datasets`). Its
cache and ours are emptied before each run. Tokens are those of the text, counted once by our
tokenizer, however many passes are made over them.
"""

import importlib
import pathlib
import random
import shutil
import sys
import tempfile

from benchmarks import measure, report
from bertjax import prepare
from bertjax.data import sentences
from bertjax.data import text as text_lib
from bertjax.data.tokenizer import Tokenizer

FLAGS = {
  'books': ('', 'a folder of prose, a file a document'),
  'vocab': ('', 'vocab.txt, uncased'),
  'google': ('', 'a checkout of google-research/bert; empty leaves it out'),
  'google_chars': (2_000_000, 'of text for it'),
  'passes': (10, 'over the text with other pairs, ours and theirs (their dupe_factor)'),
  'repeats': (5, 'measured runs after one warm-up'),
  'workers': (-1, 'our worker processes, as in bertjax prepare'),
  'out': ('', 'JSON file to write'),
}


def run(books, vocab, google, google_chars, passes, repeats, workers, out):
  tokenizer = Tokenizer.from_file(vocab)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    whole, part = folder / 'whole.txt', folder / 'part.txt'
    documents = [sentences.split_prose(text) for text in text_lib.read_documents(books)]
    whole.write_text('\n\n'.join('\n'.join(document) for document in documents))
    text = whole.read_text()
    part.write_text(text[:google_chars])
    tokens = {path: count_tokens(tokenizer, path.read_text()) for path in (whole, part)}
    contenders = {
      'bertjax prepare': lambda: ours(whole, tokenizer, folder, workers, passes, tokens[whole])
    }
    contenders['datasets.map, 2 processes'] = hugging_face(whole, vocab, folder, tokens[whole])
    if google:
      contenders['create_pretraining_data.py'] = google_s(google, part, vocab, passes, tokens[part])
    return report(
      'text_to_rows', measure(contenders, repeats=repeats), 'tokens/s', out, dupe_factor=passes
    )


def count_tokens(tokenizer, text):
  return sum(map(len, tokenizer.encode(text.splitlines())))


def ours(path, tokenizer, folder, workers, passes, tokens):
  settings = prepare.Settings(
    format='google', heldout_fraction=0.1, num_shards=2, dupe_factor=passes
  )
  manifest = prepare.prepare(str(path), tokenizer, settings, folder / 'rows', workers=workers)
  counts = manifest['counts']
  assert counts['train_tokens'] + counts['heldout_tokens'] == tokens
  shutil.rmtree(folder / 'rows')
  return tokens


def hugging_face(path, vocab, folder, tokens):
  import datasets
  import transformers

  datasets.disable_progress_bars()
  tokenizer = transformers.BertTokenizerFast(vocab, do_lower_case=True)

  def tokenise(batch):
    return tokenizer(batch['text'], add_special_tokens=False, return_attention_mask=False)

  def group(batch):
    ids = [token for row in batch['input_ids'] for token in row]
    return {'rows': [ids[i : i + 126] for i in range(0, len(ids), 126)]}

  def once():
    cache = folder / 'cache'
    data = datasets.load_dataset('text', data_files=str(path), cache_dir=str(cache))['train']
    data = data.map(tokenise, batched=True, num_proc=2, remove_columns=['text'])
    data = data.map(group, batched=True, num_proc=2, remove_columns=data.column_names)
    assert len(data)
    shutil.rmtree(cache)
    return tokens

  return once


def google_s(checkout, path, vocab, passes, tokens):
  import tensorflow.compat.v1 as tf

  ours = sys.modules['tensorflow']
  sys.modules['tensorflow'] = tf  # what their `import tensorflow` is to find
  sys.path.insert(0, checkout)
  create = importlib.import_module('create_pretraining_data')
  tokenization = importlib.import_module('tokenization')
  sys.modules['tensorflow'] = ours
  tf.flags.FLAGS(['benchmark', '--input_file=', '--output_file=', f'--vocab_file={vocab}'])
  tokenizer = tokenization.FullTokenizer(vocab, do_lower_case=True)

  def once():
    rng = random.Random(12345)
    instances = create.create_training_instances(
      [str(path)], tokenizer, 128, passes, 0.1, 0.15, 20, rng
    )
    with tempfile.TemporaryDirectory() as folder:
      create.write_instance_to_example_files(instances, tokenizer, 128, 20, [f'{folder}/rows'])
    return tokens

  return once
