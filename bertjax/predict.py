"""Predict: a model's answers to a text, or to all texts of a file.

  bertjax predict --model=DIR --do=classify "A fine film."
  bertjax predict --model=DIR --do=answer --text="Who came?" --pair="Ada came, with a friend."
  bertjax predict --model=DIR --do=embed --input=texts.csv --columns=body --out=vectors.jsonl
  bertjax predict --model=DIR --do=answer --input=q.csv --columns=question,context --out=a.jsonl

Files end in .txt (a text a line), .csv, .tsv, .jsonl or .parquet. The output has a JSON line for
each row, in order: {"result": ...}, or {"error": ...} where a row cannot be answered (an empty
text, null, a number, a missing column, or a text beyond the model's limit unless --long=window).
Run again after a kill, or after rows with errors were corrected, the command keeps finished lines.
For tag, .jsonl and .parquet may have a list of words in the place of a text.

  fill_mask, infill   proposals for each [MASK]; all of them filled one after another
  score, correct      pseudo-log-likelihood; likelier words in the place of unlikely ones
  continue            the text continued, by a left-to-right model
  classify, tag       classes of --columns=TEXT or TEXT,PAIR; typed spans
  answer              out of --columns=QUESTION,CONTEXT, the context of any length
  choose              --columns=PROMPT,ENDING,ENDING,...
  next_sentence       the probability that --columns=FIRST,SECOND follow one another
  embed, nearest      vectors; the nearest texts of --corpus
  summarise           the sentences that stand for a text
"""

import itertools
import json
import logging

from etils import epath

from bertjax.inference import calls, streams
from bertjax.inference.predictor import Predictor
from bertjax.inference.search import Index
from bertjax.interop import loading

_log = logging.getLogger(__name__)


def run(
  *, model: str, do: str = '', text: str = '', pair: str = '', input: str = '', out: str = '',
  columns: str = 'text', corpus: str = '', index: str = '', delimiter: str = '',
  encoding: str = 'utf-8', long: str = 'refuse', batch_size: int = 32, **options,
) -> None:  # fmt: skip
  """Predicts; prints the answer to `text`, or writes those to a file.

  Raises:
    ValueError: if the flags, the model or the files do not fit one another.
  """
  asked = tuple(map(bool, (text or pair, input, out)))
  if not model or asked not in ((True, False, False), (False, True, True)):
    raise ValueError('predict needs --model=DIR, and --text=TEXT or --input=FILE with --out=FILE.')
  if do and do not in calls.CALLS:
    raise ValueError(f'there is no {do!r}; choose from {", ".join(calls.CALLS)}.')
  if (do == 'nearest') != bool(corpus or index):
    raise ValueError('nearest, and only nearest, needs --corpus=FILE or --index=FILE.')
  if input:
    streams.check(input, out)
  predictor = Predictor.from_dir(model, long=long, batch_size=batch_size)
  if not do:
    do = calls.default(predictor)
    _log.info('--do=%s, by the only head of %s', do, model)
  options = {name: value for name, value in options.items() if value}
  names = columns.split(',')
  given = options | ({'corpus': corpus or index} if do == 'nearest' else {})
  item = (text, pair) if pair else (text,)
  calls.check(predictor, do, len(names) if input else len(item), given)
  reading = {'delimiter': delimiter, 'encoding': encoding}
  if do == 'tag':
    _log.info('--words=%s; words should be as in training', options.get('words', 'text'))
  if do == 'nearest':
    texts = _corpus(corpus, names, reading) if corpus else None
    options['corpus'] = _index(predictor, texts, index, options.get('pooling'))
  if not input:
    [answer] = calls.call(predictor, do, [item], options)
    print(json.dumps(answer, ensure_ascii=False, indent=2))
    return
  used = [loading.find_model(model), *filter(None, (corpus, index))]
  files = list(itertools.chain.from_iterable(map(streams.version, used)))
  settings = given | {'model': model, 'do': do, 'columns': names, 'long': long,
                      'batch_size': batch_size, 'files': files}  # fmt: skip
  count = streams.answer_file(
    lambda items: calls.call_each(predictor, do, items, options), input, out, names, settings,
    word_lists=do == 'tag', **reading,
  )  # fmt: skip
  _log.info('%s: %s lines', out, f'{count:,}')


def _corpus(path: str, columns: list[str], reading: dict) -> list[str]:
  """The texts to search: the first column of a table."""
  texts = []
  for item, error in streams.read_items(path, columns[:1], **reading):
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
