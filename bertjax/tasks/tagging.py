"""Tagging of words: CoNLL-2003 and other files of its format (Devlin et al. 2018, section 5.3).

Each word is tokenised separately; its first token carries the tag, other tokens have no loss. IOB1,
IOB2, IOBES, BILOU and BMES are converted to BIO.
"""

import functools
import itertools
import logging
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from bertjax import io
from bertjax.data import instances, tables, words
from bertjax.objectives.entities import entities
from bertjax.objectives.labels import Tags
from bertjax.tasks import metrics
from bertjax.tasks.task import Encoded, Example, Task, gold_labels, known_split, text_room

_log = logging.getLogger(__name__)

_CONLL2003 = {'train': 'eng.train', 'dev': 'eng.testa', 'test': 'eng.testb'}


def conll(
  source: str = '', name: str = 'conll', *, files: Mapping[str, str], types: Sequence[str] = (),
  word: int = 0, tag: int = -1, context: bool = False, encoding: str = 'utf-8',
) -> Task:  # fmt: skip
  """Tagging from files with one word per line and blank lines between sentences.

  Args:
    source: folder of the files; or 'tfds:NAME', with 'tokens' and 'ner'.
    name: of the task.
    files: split -> file, with columns separated by spaces or tabs; 'test' may have words only, or
      placeholders. Lines '-DOCSTART-' and '#begin document' separate documents; other lines that
      begin with '#' and do not have the columns of the file are comments.
    types: of the entities, 'PER', 'LOC', ...; default: those of the training split, sorted.
    word: column of the word.
    tag: column of the tag; -1 = the last.
    context: fill each row with the sentences around it in its document.
    encoding: of the files.

  Raises:
    ValueError: without `types` and a training split.
  """

  def sentences(split):
    file = known_split(split, files)
    if source.startswith('tfds:'):
      return _from_tfds(source.removeprefix('tfds:'), file)
    path = epath.Path(source) / file
    return read_conll(path, word, tag, labelled=split != 'test', encoding=encoding)

  if not types:
    if 'train' not in files:
      raise ValueError("types are found in the 'train' split; name its file, or give `types`.")
    types = sorted({t for _, item in sentences('train') for t in _types(item.label)})
  labels = ('O', *(f'{prefix}-{t}' for t in types for prefix in 'BI'))

  def read(split):
    found = list(sentences(split))
    if not found:
      raise ValueError(f'{files[split]} holds no sentences.')
    for where, item in found:
      unknown = next((t for t in _types(item.label) if t not in types), None)
      if unknown is not None and split != 'test':  # of test all that is not predicted is a miss
        raise ValueError(
          f'{where}: the sentence has the unknown type {unknown!r}; the types are {list(types)}.'
        )
    seen = {t for _, item in found for t in _types(item.label)}
    absent = [t for t in types if t not in seen]
    if split == 'train' and absent:
      raise ValueError(f'{files[split]} has no training example of the class {absent[0]!r}.')
    return [item for _, item in found]

  label = Tags(labels, join=lambda texts: words.join(texts)[0])
  return Task(
    name, label, read,
    encode=functools.partial(encode, labels=labels, context=context),
    decode=label.decode, score=score, write=write, splits=tuple(files),
  )  # fmt: skip


def conll2003(
  source: str = '', *, files: Mapping[str, str] | None = None, context: bool = False
) -> Task:
  """CoNLL-2003 English named entities: eng.train, eng.testa, eng.testb, or 'tfds:conll2003'."""
  splits = {'train': 'train', 'dev': 'dev', 'test': 'test'}
  known = splits if source.startswith('tfds:') else _CONLL2003
  return conll(
    source, files=known | dict(files or {}), types=('LOC', 'MISC', 'ORG', 'PER'),
    context=context, name='conll2003',
  )  # fmt: skip


def _types(tags: Sequence[str] | None) -> list[str]:
  return [name for name, _, _ in entities(tags or ())]


def to_bio(tags: Sequence[str]) -> tuple[str, ...]:
  """Converts tags in IOB1, IOB2, IOBES, BILOU or BMES to BIO (IOB2)."""
  result = ['O'] * len(tags)
  for name, first, last in entities(tags):
    result[first:last] = [f'B-{name}'] + [f'I-{name}'] * (last - first - 1)
  return tuple(result)


def to_tag(label: str) -> str:
  """The tag of a model's label: itself, 'O' for a special token, 'I-TYPE' for a bare type."""
  if label == 'O' or re.fullmatch('[BIESULM]-.+', label):
    return label
  return 'O' if re.fullmatch(r'\[\w+\]|<\w+>', label) else f'I-{label}'


def read_conll(
  path, word: int = 0, tag: int = -1, *, labelled: bool = True, encoding: str = 'utf-8'
) -> Iterator[tuple[str, Example]]:
  """Yields the sentences of a file, each with the file and line where it starts.

  Args:
    path: the file.
    word: column of the word, which may be empty in a file with tabs.
    tag: column of the tag.
    labelled: whether tags are required; if not, lines may have one column, and a sentence with an
      invalid tag has no label.
    encoding: of the file.

  Raises:
    ValueError: if a line has another number of columns than the first, or an invalid tag.
  """
  lines = [
    (n, line.split('\t') if '\t' in line else re.split(' +', line.strip(' ')))
    for n, line in enumerate(
      [*(x.rstrip('\r\n') for x in tables.read_lines(path, encoding)), ''], 1
    )
  ]
  shaped = [f for _, f in lines if any(f) and f[0] != '-DOCSTART-']
  words = min(shaped, key=lambda f: (f[0].startswith('#'), f[0] == '#'), default=[])  # the first
  width = len(words)  # lines that begin with '#' may be comments
  document, rows, comments = 0, [], []
  for number, fields in lines:
    border = fields[:1] == ['-DOCSTART-'] or fields[:2] in (['#begin', 'document'],
                                                            ['#end', 'document'])  # fmt: skip
    if border or not any(fields):
      if rows:
        yield _sentence(path, rows, document, labelled)
      rows, document = [], document + (border and fields[0] != '#end')
    elif fields[0].startswith('#') and not _is_row(fields, width, tag):
      comments.append(number)
    else:
      _check_columns(f'{path}:{number}', fields, width, word, tag, labelled)
      rows.append((number, fields[word], fields[tag].strip() if width > 1 else None))
  if comments:
    _log.info('%s: %d comment lines, the first in line %d', path, len(comments), comments[0])


_TAG = re.compile('O|[BIESLUM]-.+')


def _is_row(fields: list[str], width: int, tag: int) -> bool:
  """Whether a line that begins with '#' has the columns of the file and a valid tag."""
  fits = len(fields) == width and -width <= tag < width
  return fits and (width == 1 or bool(_TAG.fullmatch(fields[tag].strip())))


def _check_columns(where, fields, width: int, word: int, tag: int, labelled: bool) -> None:
  if len(fields) != width:
    raise ValueError(f'{where}: {len(fields)} columns, the first line of words has {width}.')
  for name, column in (('word', word), ('tag', tag)):
    if not -width <= column < width:
      raise ValueError(f'{where}: {width} columns, so there is no {name}={column} (from 0).')
  if width == 1 and labelled:
    raise ValueError(f'{where}: a word without a tag.')


def _sentence(path, rows, document: int, labelled: bool) -> tuple[str, Example]:
  numbers, words, tags = zip(*rows, strict=True)
  wrong = [(n, tag) for n, _, tag in rows if tag is None or not _TAG.fullmatch(tag)]
  if wrong and labelled:
    raise ValueError(
      f'{path}:{wrong[0][0]}: {wrong[0][1]!r} is no tag; tags are O, B-X, I-X, E-X and S-X (or '
      'L-X, U-X and M-X).'
    )
  label = None if wrong else to_bio(tags)
  return f'{path}:{numbers[0]}', Example(str(numbers[0]), words, label, document)


def _from_tfds(name: str, split: str) -> Iterator[tuple[str, Example]]:
  """Yields the sentences of a TFDS dataset, each as a document: TFDS does not keep documents."""
  rows = tables.read_tfds(name, split, ('tokens', 'ner'), label='ner')
  for number, (where, row, _) in enumerate(rows):
    if len(row['tokens']) != len(row['ner']):
      raise ValueError(f'{where}: {len(row["tokens"])} words and {len(row["ner"])} tags.')
    yield where, Example(str(number), tuple(row['tokens']), to_bio(row['ner']), number)


def encode(
  items: Sequence[Example], tokenizer, length: int, *, labels: Sequence[str], context: bool
) -> Encoded:
  """Encodes sentences; `context` fills each row from both sides with the document around it.

  A longer sentence is split into rows with disjoint words, so every word is tagged once.
  `alignment` [N, L] is the index of the word that starts at a position, -1 elsewhere.
  """
  room = text_room(length, 2)
  pieces, truncated = _pieces(items, tokenizer, room)
  streams, begins = {}, []
  for number, (item, tokens) in enumerate(zip(items, pieces, strict=True)):
    stream = streams.setdefault(item.document if context else number, [])
    begins.append((stream, len(stream)))
    stream.extend(itertools.chain.from_iterable(tokens))
  number_of = {label: number for number, label in enumerate(labels)}
  rows, places, tags, owners = [], [], [], []
  for number, (item, (stream, begin)) in enumerate(zip(items, begins, strict=True)):
    starts = begin + np.cumsum([0, *map(len, pieces[number])])
    own = np.array([number_of.get(tag, -1) for tag in item.label or [''] * len(item.texts)])
    for first, last in _chunks(starts, room):
      spare = room - (starts[last] - starts[first])
      left = min(starts[first], max(spare // 2, spare - (len(stream) - starts[last])))
      shown = starts[first] - left
      place, tag = np.full((2, length), -1, np.int32)
      at = 1 + starts[first:last] - shown
      place[at], tag[at] = np.arange(first, last), own[first:last]
      rows.append((stream[shown : shown + room],))
      places.append(place)
      tags.append(tag)
      owners.append(number)
  columns = instances.lay_out(rows, tokenizer, length) | {
    'labels': np.array(tags, np.int32).reshape(-1, length),
    'example_ids': np.array(owners, np.int32),
  }
  counts = {'features': len(rows), 'split': len(rows) - len(items), 'truncated_words': truncated}
  return Encoded(columns, counts, np.array(places, np.int32).reshape(-1, length))


def _pieces(items, tokenizer, room: int) -> tuple[list[list[list[int]]], int]:
  """Token ids of each word of each item ([UNK] if none), and how many words were truncated."""
  ids = iter(tokenizer.encode_words([word for item in items for word in item.texts]))
  pieces = [[next(ids) or [tokenizer.unk_id] for _ in item.texts] for item in items]
  truncated = sum(len(word) > room for words in pieces for word in words)
  return [[word[:room] for word in words] for words in pieces], truncated


def _chunks(starts: np.ndarray, room: int) -> Iterator[tuple[int, int]]:
  """Yields (first, last + 1) word of the parts of a sentence that fit into `room` tokens."""
  first = 0
  while first < len(starts) - 1:
    last = int(np.searchsorted(starts, starts[first] + room, 'right')) - 1
    yield first, last
    first = last


def score(items: Sequence[Example], predictions) -> dict[str, float]:
  return metrics.span_scores(predictions, gold_labels(items))


def write(folder, split: str, items: Sequence[Example], predictions) -> list[pathlib.Path]:
  """Writes FOLDER/SPLIT.conll for conlleval: word, reference tag if any, predicted tag."""
  odd = any(' ' in word or not word for item in items for word in item.texts)
  blank = '\t' if odd else ' '
  blocks = []
  for item, tags in zip(items, predictions, strict=True):
    columns = (item.texts, *([] if item.label is None else [item.label]), tags)
    blocks.append('\n'.join(blank.join(line) for line in zip(*columns, strict=True)))
  path = pathlib.Path(folder) / f'{split}.conll'
  io.write_text(path, '\n\n'.join(blocks) + '\n')
  return [path]
