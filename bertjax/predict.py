"""Predict: a model's answers to a text, or to all texts of a file.

  bertjax predict --model=DIR --do=classify "A fine film."
  bertjax predict --model=DIR --do=answer --text="Who came?" --pair="Ada came, with a friend."
  bertjax predict --model=DIR --do=embed --input=texts.csv --columns=body --out=vectors.jsonl
  bertjax predict --model=DIR --do=answer --input=q.csv --columns=question,context --out=a.jsonl

  bertjax predict --model=DIR --do=choose --text="The door is" --pair="open.|an apple.|swims."

Files end in .txt (a text per line), .csv, .tsv, .jsonl or .parquet. The output has one line per
record, in order: in .jsonl {"result": ..., "input": {"text": ...}}, in .csv a column for each part
of a result. "error" says why a record cannot be answered: an empty text, null, a number, a missing
column, or a text beyond the model's limit unless --long=window. --keep=id repeats other columns of
the input than the texts. Run again after a kill, or after records with errors were corrected, the
command keeps finished lines. In .jsonl and .parquet a text may be a list of words for tag, and a
list of documents for rerank.

  fill_mask, infill   proposals for each [MASK]; all of them filled one after another
  score, correct      pseudo-log-likelihood; likelier words in the place of unlikely ones
  continue            the text continued, by a left-to-right model
  classify, tag       classes of --columns=TEXT or TEXT,PAIR; typed spans
  answer              out of --columns=QUESTION,CONTEXT, the context of any length
  choose              --columns=PROMPT,ENDING,ENDING,...
  rerank              documents by their score: --columns=QUERY,DOCUMENT,..., or a list of them
  next_sentence       the probability that --columns=FIRST,SECOND follow one another
  embed, nearest      vectors; the nearest texts of --corpus
  summarise           the sentences that stand for a text
"""

import csv
import hashlib
import io
import itertools
import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import tqdm
from etils import epath

from bertjax.data import tables
from bertjax.inference.predictor import CALLS, Predictor
from bertjax.inference.search import Index
from bertjax.interop import loading

_log = logging.getLogger(__name__)

CHUNK = 1024  # records; the more, the better they fall into batches of a length
LISTS = {'tag': 'words', 'rerank': 'texts'}  # what a list in a column is


def run(
  *, model: str, do: str = '', text: str = '', pair: str = '', input: str = '', out: str = '',
  columns: str = 'text', keep: str = '', corpus: str = '', index: str = '', delimiter: str = '',
  encoding: str = 'utf-8', long: str = 'refuse', batch_size: int = 32, **options,
) -> None:  # fmt: skip
  """Predicts; prints the answer to `text`, or writes those to a file.

  Raises:
    ValueError: if the flags, the model or the files do not fit one another.
  """
  asked = tuple(map(bool, (text or pair, input, out)))
  if not model or asked not in ((True, False, False), (False, True, True)):
    raise ValueError('predict needs --model=DIR, and --text=TEXT or --input=FILE with --out=FILE.')
  if do and do not in CALLS:
    raise ValueError(f'there is no {do!r}; choose from {", ".join(CALLS)}.')
  if (do == 'nearest') != bool(corpus or index):
    raise ValueError('nearest, and only nearest, needs --corpus=FILE or --index=FILE.')
  if input:
    check(input, out)
  predictor = Predictor.from_dir(model, long=long, batch_size=batch_size)
  if not do:
    do = predictor.default_call()
    _log.info('--do=%s, by the only head of %s', do, model)
  options = {name: value for name, value in options.items() if value}
  names = columns.split(',')
  given = options | ({'corpus': corpus or index} if do == 'nearest' else {})
  several = do in ('choose', 'rerank')  # endings or documents
  second = re.split(r'\s*[|\n]\s*', pair) if several else [pair]
  item = (text, *filter(None, second))
  predictor.check_call(do, len(names) if input else len(item), given)
  reading = {'delimiter': delimiter, 'encoding': encoding}
  if do == 'tag':
    _log.info('--words=%s; words should be as in training', options.get('words', 'text'))
  if do == 'nearest':
    texts = _corpus(corpus, names, reading) if corpus else None
    options['corpus'] = _index(predictor, texts, index, options.get('pooling'))
  if not input:
    [answer] = predictor.call(do, [item], options)
    print(json.dumps(answer, ensure_ascii=False, indent=2))
    return
  used = [loading.find_model(model), *filter(None, (corpus, index))]
  files = list(itertools.chain.from_iterable(map(version, used)))
  settings = given | {'model': model, 'do': do, 'columns': names, 'long': long,
                      'batch_size': batch_size, 'files': files}  # fmt: skip
  count = answer_file(
    lambda items: predictor.call_each(do, items, options), input, out, names, settings,
    keep.split(',') if keep else names, lists=LISTS.get(do, ''), **reading,
  )  # fmt: skip
  _log.info('%s: %s lines', out, f'{count:,}')


def _corpus(path: str, columns: list[str], reading: dict) -> list[str]:
  """The texts to search: the first column of a table."""
  texts = []
  for item, error, _ in read_items(path, columns[:1], **reading):
    if error:
      raise ValueError(error)
    texts.append(item[0])
  return texts


def _index(predictor: Predictor, texts: list[str] | None, index: str, pooling: str | None) -> Index:
  """The saved index, or one of the corpus, saved if it has a name."""
  if texts is None or (index and epath.Path(index).exists()):
    found = predictor.load_index(index)
    if texts not in (None, found.texts) or pooling not in (None, found.pooling):
      raise ValueError(
        f'{index} has {len(found.texts)} texts, pooling {found.pooling!r}, and is not of this '
        'corpus and pooling; delete it or name another.'
      )
    return found
  found = predictor.index(texts, pooling or '')
  if index:
    found.save(index)
    _log.info('%s: %s texts', index, f'{len(texts):,}')
  return found


def read_items(
  path, columns: Sequence[str], keep: Sequence[str] = (), lists: str = '', **reading
) -> Iterator[tuple[tuple, str, dict]]:
  """Yields (texts, error, kept values) of each record: `error` is '' or why there are no texts.

  Args:
    path: a table, see `data.tables.read_table`.
    columns: columns of the texts.
    keep: columns whose values are yielded beside the texts.
    lists: what a list in .jsonl and .parquet is: 'words' of a text, 'texts', or '' = an error.
    **reading: options of `read_table`.
  """
  asked = list(dict.fromkeys([*columns, *keep]))
  for row in tables.read_table(path, asked, **reading):
    error = row.error or tables.text_problem(
      row.values, columns, blank=True, word_lists=bool(lists)
    )
    kept = {column: row.values[column] for column in keep if column in row.values}
    if error:
      yield (), f'{row.where}: {error}.', kept
    else:
      texts = [row.values[column] for column in columns]
      if lists == 'texts':
        texts = [text for some in texts for text in (some if isinstance(some, list) else [some])]
      yield tuple(texts), '', kept


def answer_file(
  answer: Callable[[list], list], path, output, columns: Sequence[str], settings: dict,
  keep: Sequence[str] = (), **reading,
) -> int:  # fmt: skip
  """Writes a line for each record of a file; returns how many.

  Lines are collected as JSON in `OUTPUT.part` until the end, and as long as there are errors; a run
  that is started again with the same settings resumes. Memory does not grow with the file: `CHUNK`
  records are read, answered and written at a time, with a digest of the records, so that only the
  chunks of corrected records are answered again.

  Args:
    answer: tuples of texts -> {'result': JSON value} or {'error': sentence} for each.
    path: see `read_items`.
    output: a .jsonl or .csv file that does not exist, or has an `OUTPUT.part`.
    columns: of the texts.
    settings: whatever decides the answers, as JSON values.
    keep: columns that the output repeats, as 'input'.
    **reading: options of `read_items`.
  """
  check(path, output)
  output, path = pathlib.Path(output), epath.Path(path)
  part, fresh = _parts(output)
  output.parent.mkdir(parents=True, exist_ok=True)
  settings = settings | reading | {'input': str(path), 'keep': list(keep)}
  earlier, items = _earlier(part, settings), read_items(path, columns, keep, **reading)
  done = errors = 0
  with fresh.open('wb') as file, tqdm.tqdm(unit=' texts', disable=None) as bar:
    file.write(json.dumps(settings).encode() + b'\n')
    while chunk := list(itertools.islice(items, CHUNK)):
      digest = hashlib.sha256(json.dumps(chunk, default=str).encode()).hexdigest()
      before, lines = next(earlier, ('', []))
      if not before and fresh.exists():  # it has all that the earlier part had
        fresh.replace(part)
      if before != digest:
        lines = _answer(answer, chunk)
      file.write(b''.join([*lines, b'#', digest.encode(), b'\n']))  # no JSON begins with #
      file.flush()
      bar.update(len(chunk))
      done, errors = done + len(chunk), errors + sum(x.startswith(b'{"error":') for x in lines)
  if fresh.exists():
    fresh.replace(part)
  with fresh.open('wb') as out:
    if output.suffix == '.csv':
      _write_csv(part, io.TextIOWrapper(out, 'utf-8', newline='', write_through=True))
    else:
      out.writelines(_lines(part))
  fresh.replace(output)
  if errors:
    _log.warning(
      '%s: %d of %d lines are errors; correct these rows of %s and run the same command again: it '
      'keeps the other lines, which are in %s', output, errors, done, path, part,
    )  # fmt: skip
  else:
    part.unlink()
  return done


def check(path, output) -> None:
  """Raises ValueError if `answer_file` cannot read `path`, or would overwrite `output`."""
  if pathlib.Path(output).suffix not in ('.jsonl', '.csv') or '://' in str(output):
    raise ValueError(f'--out must be a local file that ends in .jsonl or .csv, got {output}.')
  output = pathlib.Path(output)
  if output.exists() and not _parts(output)[0].exists():
    raise ValueError(f'{output} exists already; delete it or choose another --out.')
  if not epath.Path(path).is_file():
    raise ValueError(f'no file {path}.')


def _parts(output: pathlib.Path) -> list[pathlib.Path]:
  return [output.with_name(output.name + end) for end in ('.part', '.part.new')]


def _earlier(part: pathlib.Path, settings: dict) -> Iterator[tuple[str, list[bytes]]]:
  """The (digest, lines) of each complete chunk of an earlier run.

  Raises:
    ValueError: if it had other settings.
  """
  if not part.exists():
    return
  with part.open('rb') as file:
    before = json.loads(file.readline())
    names = sorted(settings.keys() | before.keys())
    differ = [name for name in names if settings.get(name) != before.get(name)]
    if differ:
      raise ValueError(
        f'{part} was begun with other settings ({", ".join(differ)}); delete it to start over.'
      )
    lines = []
    for line in file:
      if line.startswith(b'#'):
        yield line[1:-1].decode(), lines
        lines = []
      else:
        lines.append(line)


def _answer(answer: Callable[[list], list], chunk: list) -> list[bytes]:
  """The lines of a chunk."""
  answers = iter(answer([texts for texts, error, _ in chunk if not error]))
  lines = []
  for _, error, kept in chunk:
    value = {'error': error} if error else next(answers)
    if kept:
      value = {**value, 'input': kept}
    text = json.dumps(value, ensure_ascii=False, default=str) + '\n'
    lines.append(text.encode('utf-8', 'replace'))  # lone surrogates have no UTF-8
  return lines


def _lines(part: pathlib.Path) -> Iterator[bytes]:
  """The lines of a complete `OUTPUT.part`, without settings and digests."""
  with part.open('rb') as file:
    yield from (line for line in itertools.islice(file, 1, None) if not line.startswith(b'#'))


def _write_csv(part: pathlib.Path, out) -> None:
  """Writes the lines as a table: kept columns, one for each part of a result, and 'error'."""
  columns = dict.fromkeys(name for line in _lines(part) for name in _flat(json.loads(line)))
  table = csv.DictWriter(out, sorted(columns, key=lambda name: name == 'error'))
  table.writeheader()
  table.writerows(_flat(json.loads(line)) for line in _lines(part))


def _flat(line: dict) -> dict:
  """A line as cells: {'input': {'text': t}, 'result': {'scores': {'good': p}}} becomes 'text' and
  'scores.good'; strings of a list are joined by |, other lists are JSON."""
  cells = {name: _cell(value) for name, value in line.get('input', {}).items()}
  if 'error' in line:
    return cells | {'error': line['error']}
  result = line['result'] if isinstance(line['result'], dict) else {'result': line['result']}
  for name, value in result.items():
    name = f'result.{name}' if name in cells else name
    if isinstance(value, dict):
      cells |= {f'{name}.{key}': _cell(item) for key, item in value.items()}
    else:
      cells[name] = _cell(value)
  return cells


def _cell(value):
  if not isinstance(value, list):
    return value
  texts = all(isinstance(item, str) for item in value)
  return '|'.join(value) if texts else json.dumps(value, ensure_ascii=False)


def version(path) -> list:
  """[path, bytes, time of change] of a file, or of all of a local folder; [] of a hub's name."""
  path = epath.Path(path)
  files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
  stats = [(str(file), file.stat()) for file in files if file.is_file()]
  return [[name, stat.length, stat.mtime] for name, stat in stats]
