"""Predict: a model's answers to a text, or to all texts of a file.

  bertjax predict --model=DIR --do=classify "A fine film."
  bertjax predict --model=DIR --do=answer --text="Who came?" --pair="Ada came, with a friend."
  bertjax predict --model=DIR --do=embed --input=texts.csv --columns=body --output=vectors.jsonl
  bertjax predict --model=DIR --do=answer --input=q.csv --columns=question,context --output=a.jsonl

Files end in .txt (a text a line), .csv, .tsv, .jsonl or .parquet. The output has a JSON line for
each row, in order: {"result": ...}, or {"error": ...} where a row cannot be answered (an empty
text, null, a number, a missing column, or a text beyond the model's limit unless --long=window).
Started again after a kill, the command resumes, also where rows of the input were mended.

  fill_mask, infill   proposals for each [MASK]; all of them filled one after another
  score, correct      pseudo-log-likelihood; likelier words in the place of unlikely ones
  classify, tag       classes of --columns=TEXT or TEXT,PAIR; typed spans
  answer              out of --columns=QUESTION,CONTEXT, the context of any length
  choose              --columns=PROMPT,ENDING,ENDING,...
  next_sentence       the probability that --columns=FIRST,SECOND follow one another
  embed, nearest      vectors; the nearest texts of --corpus
  summarise           the sentences that stand for a text
"""

import json
import logging

from bertjax.inference import calls, streams
from bertjax.inference.predictor import Predictor

_log = logging.getLogger(__name__)

ARGUMENT = 'text'
FLAGS = {
  'model': ('', "a model directory, a run's workdir, a folder of another library, or a hub name"),
  'do': ('', f"what to predict: {', '.join(calls.CALLS)}; '' = what the model's only head does"),
  'text': ('', 'a text; of a pair the first'),
  'pair': ('', 'second text of a pair'),
  'input': ('', 'a file of texts, in place of --text'),
  'columns': ('text', 'columns of the texts in --input, joined by commas; numbers, from 0, in a '
                      'file without a header'),
  'delimiter': ('', 'delimiter between the columns of --input and --corpus: a character, or tab, '
                    "comma, semicolon, pipe, space; '' = by the file's ending"),
  'encoding': ('utf-8', 'encoding of --input and --corpus, by the name that Python gives it'),
  'output': ('', 'the .jsonl file to write, with --input'),
  'corpus': ('', "nearest: a file with the texts to search, in columns[0] or a line each"),
  'top_k': (0, 'how many proposals, answers or hits; 0 = the default'),
  'sentences': (0, 'summarise: how many; 0 = 3'),
  'pooling': (
    '', "pooling of embeddings: 'mean', 'cls' or 'last_four'; '' = the model's own, else 'mean'"
  ),
  'no_answer': (0, "answer: 1 = the answer may be '' (SQuAD 2.0)"),
  'long': ('refuse', "texts beyond the model's limit: 'refuse', or read in parts, 'window'"),
  'batch_size': (32, 'rows of a batch'),
}  # fmt: skip


def run(
  *, model: str, do: str = '', text: str = '', pair: str = '', input: str = '', output: str = '',
  columns: str = 'text', corpus: str = '', delimiter: str = '', encoding: str = 'utf-8',
  long: str = 'refuse', batch_size: int = 32, **options,
) -> None:  # fmt: skip
  """Predicts; prints the answer to `text`, or writes those to a file.

  Raises:
    ValueError: if the flags, the model or the files do not fit one another.
  """
  asked = tuple(map(bool, (text or pair, input, output)))
  if not model or asked not in ((True, False, False), (False, True, True)):
    raise ValueError(
      'predict needs --model=DIR, and --text=TEXT or --input=FILE with --output=FILE.'
    )
  if do and do not in calls.CALLS:
    raise ValueError(f'there is no {do!r}; choose from {", ".join(calls.CALLS)}.')
  if (do == 'nearest') != bool(corpus):
    raise ValueError('nearest, and only nearest, needs --corpus=FILE.')
  predictor = Predictor.from_dir(model, long=long, batch_size=batch_size)
  if not do:
    do = calls.default(predictor)
    _log.info('--do=%s, by the only head of %s', do, model)
  options = {name: value for name, value in options.items() if value}
  names = columns.split(',')
  given = options | ({'corpus': corpus} if corpus else {})
  item = (text, pair) if pair else (text,)
  calls.check(predictor, do, len(names) if input else len(item), given)
  reading = {'delimiter': delimiter, 'encoding': encoding}
  if corpus:
    found = _corpus(corpus, names, reading)
    options['corpus'] = predictor.index(found, options.get('pooling', ''))
  if not input:
    [answer] = calls.call(predictor, do, [item], options)
    print(json.dumps(answer, ensure_ascii=False, indent=2))
    return
  files = streams.version(model) + (streams.version(corpus) if corpus else [])
  settings = given | {'model': model, 'do': do, 'columns': names, 'long': long,
                      'batch_size': batch_size, 'files': files}  # fmt: skip
  count = streams.answer_file(
    lambda items: calls.call_each(predictor, do, items, options), input, output, names, settings,
    **reading,
  )  # fmt: skip
  _log.info('%s: %s lines', output, f'{count:,}')


def _corpus(path: str, columns: list[str], reading: dict) -> list[str]:
  """The texts to search: the first column of a table."""
  texts = []
  for item, error in streams.read_items(path, columns[:1], **reading):
    if error:
      raise ValueError(error)
    texts.append(item[0])
  return texts
