"""Vocab: trains a vocabulary on your text, and reports how a vocabulary fits a text.

  bertjax vocab --input=TEXTS --size=30522 --out=vocab.txt
  bertjax vocab --input=TEXTS --size=30000 --kind=sentencepiece --out=spiece.model
  bertjax vocab --input=TEXTS --size=50265 --kind=bpe --out=tokenizer.json
  bertjax vocab --input=TEXTS --vocab=vocab.txt --report_file=report.json   trains nothing

In a WordPiece vocabulary the special tokens have Google's ids ([PAD] 0, [UNK] 100, [CLS]
101, [SEP] 102, [MASK] 103). Byte-level BPE has RoBERTa's special tokens and keeps the case. Two
trainings on the same text write the same file, whatever the number of workers.
"""

import collections
import functools
import json
import logging

from etils import epath

from bertjax import io
from bertjax.data import dataset, vocabulary
from bertjax.data import text as text_lib
from bertjax.data import workers as worker_lib
from bertjax.data.tokenizer import Tokenizer

KINDS = ('wordpiece', 'sentencepiece', 'bpe')

_log = logging.getLogger(__name__)


def run(
  *, input: str, out: str = '', vocab: str = '', size: int = 30522, kind: str = 'wordpiece',
  format: str = 'prose', text_key: str = 'text', encoding: str = 'utf-8', on_bad_row: str = 'stop',
  lowercase: bool = True, report: bool = True, report_file: str = '',
  max_words: int = 1_000_000, workers: int = -1,
) -> None:  # fmt: skip
  """Trains and writes a vocabulary, unless `vocab` names one; then reports how it fits the input.

  Raises:
    ValueError: if the input cannot be read, the size does not fit the text, or `out` exists.
  """
  _check(out, vocab, kind, report, report_file, max_words, size, workers)
  lowercase = lowercase and not (out or vocab).endswith('.json')  # that decides its case
  workers = worker_lib.cores() if workers == -1 else workers
  bytes_of_text = sum(file_size for _, file_size, _ in text_lib.list_source(input))
  readings = []  # what each reading of the text met, the same each time

  def read(what):
    readings.append(text_lib.Report())
    with io.progress(what, bytes_of_text, unit='B') as update:
      for text in text_lib.read_documents(
        input, format, text_key=text_key, encoding=encoding, on_bad_row=on_bad_row,
        report=readings[-1],
      ):  # fmt: skip
        update(readings[-1].bytes_read())
        yield text

  error = 0
  if out and kind == 'sentencepiece':
    _train_sentencepiece(read, out, size, format, lowercase, workers)
  elif out:
    error = _train_merges(read, out, size, kind, lowercase, max_words, workers)
  if report:
    facts = vocabulary.describe(
      read('measuring the text'), out or vocab, format=format, lowercase=lowercase, workers=workers
    )
  readings[0].warn(lowercase)
  if report:
    facts |= {'count_error': error, 'invalid_utf8': readings[0].invalid_utf8}
    facts['bad_rows'] = readings[0].bad_rows
    print('\n'.join(_lines(facts, Tokenizer.from_file(out or vocab, lowercase=lowercase))))
    if report_file:
      io.write_text(report_file, json.dumps(facts, indent=1) + '\n')


def _train_merges(read, out, size: int, kind: str, lowercase: bool, max_words: int, workers) -> int:
  """Trains and writes a vocab.txt or tokenizer.json; returns how many occurrences of a word were
  lost at most."""
  counts = vocabulary.count_words(
    read('counting words'), lowercase=lowercase, max_words=max_words, workers=workers,
    byte_level=kind == 'bpe',
  )  # fmt: skip
  if kind == 'bpe':
    io.write_text(out, vocabulary.train_bpe(counts, size).to_str(pretty=True) + '\n')
  else:
    io.write_text(out, '\n'.join([*vocabulary.train_wordpiece(counts, size), '']))
  _log.info('%s: %d entries from %d distinct words', out, size, len(counts))
  return counts.error


def _train_sentencepiece(read, out: str, size: int, format: str, lowercase: bool, workers) -> None:
  """Trains and writes a spiece.model."""
  from bertjax.data import sentencepiece

  count = functools.partial(_count_characters, format=format, lowercase=lowercase)
  units = worker_lib.map_units(count, read('counting characters'), workers)
  counts = sum(units, collections.Counter())
  kept, rare = vocabulary.choose_alphabet(counts, size, len(sentencepiece.SPECIAL_PIECES))
  sentences = _sentences(read('reading sentences'), format)
  coverage = sentencepiece.coverage_for(counts, kept)
  io.write_bytes(out, sentencepiece.train_sentencepiece(
    sentences, size, lowercase=lowercase, coverage=coverage
  ))  # fmt: skip
  _log.info('%s: %d tokens, %d characters (%d more are too rare)', out, size, len(kept), rare)


def _sentences(texts, format: str):
  return (sentence for text in texts for sentence in text_lib.split_document(text, format))


def _count_characters(texts: list[str], format: str, lowercase: bool) -> collections.Counter:
  from bertjax.data import sentencepiece

  return sentencepiece.count_characters(_sentences(texts, format), lowercase)


def _check(out, vocab, kind, report, report_file, max_words, size, workers) -> None:
  for wrong, message in (
    (workers < -1, f'--workers must be at least -1, got {workers}.'),
    (bool(out) == bool(vocab),
     'vocab needs either --out=FILE to train one, or --vocab=FILE to report on it.'),
    (kind not in KINDS, f'--kind must be one of {KINDS}, got {kind!r}.'),
    (out and out.endswith('.model') != (kind == 'sentencepiece'),
     f'a SentencePiece model, and nothing else, is named *.model; got --kind={kind} --out={out}.'),
    (out and out.endswith('.json') != (kind == 'bpe'),
     f'a BPE tokenizer, and nothing else, is named *.json; got --kind={kind} --out={out}.'),
    (not report and vocab, '--noreport leaves nothing to do with --vocab; drop one of them.'),
    (not report and report_file,
     '--noreport leaves nothing to do with --report_file; drop one of them.'),
    (max_words < size, f'--max_words must be at least --size={size}, got {max_words}.'),
    *((path and epath.Path(path).exists(),
       f'{path} exists already; remove it or choose another --{name}.')
      for name, path in (('out', out), ('report_file', report_file))),
  ):  # fmt: skip
    if wrong:
      raise ValueError(message)


def _lines(facts: dict, tokenizer: Tokenizer) -> list[str]:
  """The report for people."""
  documents, sentences, tokens = (facts[name] for name in ('documents', 'sentences', 'tokens'))
  unknown, enough = facts['unknown'] / max(tokens, 1), facts['documents_for_nsp']
  lines = [
    f'corpus      {documents:,} documents, {sentences:,} sentences '
    f'({sentences / documents:,.1f} a document), {facts["words"]:,} words',
    f'tokens      {tokens:,}, {tokens / max(facts["words"], 1):.2f} a word, {unknown:.2%} [UNK]',
    f'sentences   {_shares(facts["sentences_by_length"])}',
    f'documents   {_shares(facts["documents_by_length"])}',
    f'duplicates  {facts["duplicates"]:,} documents have the very text of an earlier one',
    f'NSP         {enough:,} documents have two sentences or more: --config.nsp={facts["nsp"]}',
  ]
  random = facts['random_labels']
  lines[-1] += f'; {random:.0%} of its labels would be random (data.length={vocabulary.ROW})'
  if random > dataset.MOST_RANDOM:
    lines.append(
      'sentences   are about as long as rows or are not found in this text: far more labels are '
      'random than the 50% and a little that the rule gives'
    )
  if facts['count_error']:
    error = facts['count_error']
    lines.append(f'pruned      --max_words was reached: counts are up to {error:,} too low')
  return lines + _misfits(unknown, tokenizer)


def _shares(histogram: list[int]) -> str:
  names = [*(f'up to {edge:,}' for edge in vocabulary.EDGES), f'over {vocabulary.EDGES[-1]:,}']
  cells = zip(names, histogram, strict=True)
  return 'tokens: ' + ', '.join(f'{name} {n / sum(histogram):.1%}' for name, n in cells if n)


def _misfits(unknown: float, tokenizer: Tokenizer) -> list[str]:
  """What a case other than the vocabulary's does: [UNK] for capitals, or entries never used."""
  lines, cased = [], vocabulary.count_cased(tokenizer)[0]
  if tokenizer.lowercase and cased:
    lines.append(
      f'case        {cased:,} entries have capitals and are never used with --lowercase: '
      'is this a cased vocabulary (--nolowercase)?'
    )
  if unknown > dataset.MOST_UNKNOWN:
    fits = tokenizer.lowercase or cased or not tokenizer.standard
    hint = '' if fits else '; it has no capitals: --lowercase?'
    lines.append(f'[UNK]       {unknown:.1%} of the tokens: the vocabulary does not fit{hint}')
  return lines
