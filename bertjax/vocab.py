"""Vocab: trains a WordPiece vocabulary on your text.

  bertjax vocab --input=TEXTS --size=30522 --out=vocab.txt

The special tokens stand in Google's places ([PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102, [MASK] 103).
Two trainings on the same text write the same file.
"""

import logging

from etils import epath

from bertjax.data import sources, vocabulary

_log = logging.getLogger(__name__)

FLAGS = {
  'input': ('', 'file, folder, glob, tfds:NAME or embedded; several joined by commas'),
  'out': ('', 'the vocab.txt to write'),
  'size': (30522, 'entries, special ones included'),
  'format': ('prose', 'prose, google, wikitext, jsonl or tfds'),
  'text_key': ('text', 'field of the text in JSONL objects and TFDS examples'),
  'case': ('lower', "'lower' (also strips accents) or 'keep'"),
}


def run(*, input: str, out: str, size: int, format='prose', text_key='text', case='lower') -> None:
  """Trains and writes a vocabulary.

  Raises:
    ValueError: if the input cannot be read, the size does not fit the text, or `out` exists.
  """
  if not out:
    raise ValueError('vocab needs --out=FILE, the vocab.txt to write.')
  if case not in ('lower', 'keep'):
    raise ValueError(f"--case must be 'lower' or 'keep', got {case!r}.")
  path = epath.Path(out)
  if path.exists():
    raise ValueError(f'{out} exists already; remove it or choose another --out.')
  documents = sources.read_documents(input, format, text_key=text_key)
  counts = vocabulary.count_words(documents, lowercase=case == 'lower')
  vocab = vocabulary.train_wordpiece(counts, size)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / (path.name + '.tmp')
  temporary.write_text('\n'.join(vocab) + '\n', encoding='utf-8')
  temporary.replace(path)
  _log.info('%s: %d entries from %d distinct words', out, len(vocab), len(counts))
