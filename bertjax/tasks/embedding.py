"""Sentence embeddings from tables of pairs, hard negatives or scored pairs.

They are evaluated on scored pairs (STS) or by retrieval, among the pairs of a split or in a folder
of BEIR's format.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from bertjax import io
from bertjax.data import instances, tables
from bertjax.objectives.embeddings import Embedding, Positives, Retrieval, Similarity
from bertjax.tasks import classification, metrics
from bertjax.tasks.task import Encoded, Example, Task, gold_labels, known_split, truncate

_log = logging.getLogger(__name__)

_CHOICES = {'loss': ('contrastive', 'cosine'), 'evaluation': ('retrieval', 'similarity', 'beir'),
            'pooling': ('', 'mean', 'cls', 'last')}  # fmt: skip


def embed(
  source: str = '', *, files: Mapping[str, str], text: str, pair: str,
  negatives: Sequence[str] = (), num_negatives: int = 0, label: str = 'label',
  loss: str = 'contrastive', evaluation: str = 'retrieval', max_score: float = 1.0,
  temperature: float = 0.05, symmetric: bool = False, widths: Sequence[int] = (),
  pooling: str = '', query_prompt: str = '', document_prompt: str = '', delimiter: str = '',
  encoding: str = 'utf-8', on_bad_row: str = 'stop',
) -> Task:  # fmt: skip
  """Texts as vectors, by cosine similarity.

  Args:
    source: folder of the files, or 'tfds:NAME' and the files are its splits.
    files: split -> a table that `data.tables.read_table` reads.
    text: column of the anchor (query), or of the first text of a scored pair.
    pair: column of the positive (document), or of the second text.
    negatives: columns of hard negatives; in JSONL and Parquet a column may hold a list.
    num_negatives: hard negatives of an example; of longer lists the first ones are used, shorter
      ones have fewer. 0 = one for each column.
    label: column of the score of a pair.
    loss: 'contrastive' trains on positives, 'cosine' on scores.
    evaluation: of a contrastive model: 'retrieval' of the positives of a split among its texts,
      'similarity' by scored pairs, or 'beir', whose files are FOLDER/qrels/NAME.tsv beside
      FOLDER/corpus.jsonl and FOLDER/queries.jsonl.
    max_score: see `Similarity`.
    temperature: see `contrastive.info_nce`.
    symmetric: likewise.
    widths: see `contrastive.couple`.
    pooling: 'mean', 'cls' or 'last'; '' = 'mean'.
    query_prompt: text in front of anchors, queries and scored texts.
    document_prompt: text in front of all other texts.
    delimiter: between columns, see `classification.table`.
    encoding: of the files.
    on_bad_row: a record without a text or score raises ('stop') or is skipped ('skip').

  Raises:
    ValueError: for an option that is not one of its choices, or out of range.
  """
  for name, value in (('loss', loss), ('evaluation', evaluation), ('pooling', pooling)):
    if value not in _CHOICES[name]:
      raise ValueError(f'task.{name} must be one of {_CHOICES[name]}, got {value!r}.')
  for name, number in (('max_score', max_score), ('temperature', temperature)):
    if not 0 < number < np.inf:
      raise ValueError(f'task.{name} must be above 0, got {number}.')
  prompts = {'query': query_prompt, 'document': document_prompt}
  common = {'pooling': pooling or 'mean', 'prompts': prompts, 'widths': tuple(widths)}
  make_layouts = functools.partial(
    classification.make_layouts, on_bad_row=on_bad_row, delimiter=delimiter, encoding=encoding
  )
  scored = functools.partial(Similarity, max_score=max_score, **common)
  others = {split: file for split, file in files.items() if split != 'train'}

  def similarity(kind: Similarity, some: Mapping[str, str]) -> Task:
    layouts = make_layouts(some, (text, pair), label)
    read = functools.partial(classification.read_texts, source=source, layouts=layouts, label=kind)
    score = functools.partial(classification.score, label=kind, measure=metrics.correlations)
    write = functools.partial(classification.write_texts, label=kind)
    return _task(kind, read, score, write, some)

  if loss == 'cosine':
    return similarity(scored(), files)
  if evaluation != 'retrieval' and 'dev' not in files:
    raise ValueError(
      f'task.evaluation={evaluation!r} needs a dev split of another kind than the training pairs; '
      'set --config.data.dev_file.'
    )
  judges = {
    'similarity': lambda task: similarity(scored(unit=''), others),
    'retrieval': lambda task: _retrieval(lambda split: as_corpus(task.read(split)), task, common),
    'beir': lambda task: _retrieval(
      lambda split: read_beir(epath.Path(source) / known_split(split, others)), task, common
    ),
  }
  kind = Positives(
    rows=2 + (num_negatives or len(negatives)), temperature=temperature, symmetric=symmetric,
    **common,
  )  # fmt: skip
  layouts = make_layouts(files, (text, pair, *negatives), '')
  read = functools.partial(read_pairs, source=source, layouts=layouts, most=kind.rows - 2)
  task = _task(kind, read, None, None, files)
  return dataclasses.replace(task, judged_by=judges[evaluation])


def _task(label: Embedding, read, measure, write, splits) -> Task:
  encoder = functools.partial(encode, label=label)
  return Task('embed', label, read, encoder, label.decode, measure, write, tuple(splits))


def _retrieval(read, task: Task, common: dict) -> Task:
  return _task(Retrieval(**common), read, score_rankings, write_rankings, task.splits)


def read_pairs(
  split: str, *, source: str, layouts: Mapping, most: int, targets: Callable | None = None
) -> list[Example]:
  """The examples of a split: anchor, positive and up to `most` hard negatives.

  Args:
    split: name of the split.
    source: see `classification.read_rows`.
    layouts: split -> `classification.Layout`.
    most: number of hard negatives.
    targets: (values of a record, its texts) -> (a number for each positive and negative, '') or
      (None, why there is none), for the label; None = the label is the number of negatives.

  Raises:
    ValueError: for a record without one of its texts, or a split whose positives are all equal.
  """
  layout = known_split(split, layouts)
  found, skipped = [], []
  for number, row in enumerate(classification.read_rows(source, layout)):
    texts, error = _texts(row, layout.texts)
    label = None
    if targets and not error:
      label, error = targets(row.values, texts)
    if not error:
      texts = texts[: 2 + most]
      found.append(Example(str(number), texts, label[: 1 + most] if label else len(texts) - 2))
    elif layout.on_bad_row == 'skip':
      skipped.append(f'{row.where}: {error}')
    else:
      raise ValueError(f'{row.where}: {error}.')
  if skipped:
    shown = '; '.join(skipped[:10] + ['...'] * (len(skipped) > 10))
    _log.warning('%s: %d of %d rows skipped: %s.', split, len(skipped), number + 1, shown)
  if not found:
    raise ValueError(f'{layout.file} holds no examples.')
  if split == 'train' and not most and len({item.texts[1] for item in found}) == 1:
    raise ValueError(
      f'{layout.file}: the positives of all {len(found)} examples are {found[0].texts[1]!r}, so '
      'that there are no negatives; give pairs of different texts.'
    )
  return found


def _texts(row: tables.Row, columns: Sequence) -> tuple[tuple[str, ...], str]:
  """The texts of a record, and what is wrong with it as in `Row.error`."""
  error = row.error or tables.text_problem(row.values, columns, word_lists=True)
  if error:
    return (), error
  values = [row.values[column] for column in columns]
  for column, value in zip(columns, values, strict=True):
    if isinstance(value, list) and column in columns[:2]:
      return (), f'column {column!r} holds a list, which only columns of negatives may'
    if isinstance(value, list) and not (value and all(text.strip() for text in value)):
      return (), f'column {column!r} holds {"an empty text" if value else "no negatives"}'
  lists = [value if isinstance(value, list) else [value] for value in values]
  return tuple(itertools.chain.from_iterable(lists)), ''


def as_corpus(items: Sequence[Example]) -> list[Example]:
  """Examples of pairs as queries, one for each anchor, and documents, one for each other text."""
  ids = {text: f'd{number}' for number, text in enumerate(
    dict.fromkeys(text for item in items for text in item.texts[1:]))}  # fmt: skip
  relevant: dict[str, dict] = {}
  for item in items:
    relevant.setdefault(item.texts[0], {})[ids[item.texts[1]]] = 1
  queries = [Example(f'q{n}', (text,), gold) for n, (text, gold) in enumerate(relevant.items())]
  return queries + [Example(name, (text,), {}, document=1) for text, name in ids.items()]


def read_beir(qrels: epath.Path) -> list[Example]:
  """The queries that a file of judgements names, and the documents, of a folder in BEIR's format.

  Raises:
    ValueError: for a malformed record, a judged query that is missing, or no relevant document.
  """
  return [*read_queries(qrels, read_qrels(qrels)), *read_corpus(qrels)]


def read_qrels(qrels: epath.Path) -> dict[str, dict[str, int]]:
  """{query: {document: relevance}} of FOLDER/qrels/NAME.tsv."""
  judged: dict[str, dict[str, int]] = {}
  for row in records(qrels, ('query-id', 'corpus-id', 'score')):
    query, document, score = row.values.values()
    if not score.strip().lstrip('-').isdecimal():
      raise ValueError(f'{row.where}: the relevance must be an integer, got {score!r}.')
    judged.setdefault(query, {})[document] = int(score)
  return judged


def read_queries(qrels: epath.Path, judged: Mapping[str, Mapping]) -> list[Example]:
  """The queries that have a relevant document; the label is {document: relevance}."""
  folder = qrels.parent.parent
  relevant = {query: gold for query, gold in judged.items() if max(gold.values()) > 0}
  if not relevant:
    raise ValueError(f'{qrels} has no relevant document.')
  texts = {
    row.values['_id']: row.values['text']
    for row in records(folder / 'queries.jsonl', ('_id', 'text'))
  }
  missing = [query for query in relevant if query not in texts]
  if missing:
    raise ValueError(
      f'{folder / "queries.jsonl"} has no query {missing[0]!r}, which {qrels} names.'
    )
  return [Example(name, (texts[name],), gold) for name, gold in relevant.items()]


def read_corpus(qrels: epath.Path) -> Iterator[Example]:
  """Yields the documents beside a file of judgements."""
  for row in records(qrels.parent.parent / 'corpus.jsonl', ('_id', 'text'), ('title',)):
    values = row.values
    text = f'{values.get("title") or ""} {values["text"]}'.strip()
    yield Example(values['_id'], (text,), {}, document=1)


def records(path, columns, optional=()) -> Iterator[tables.Row]:
  """The rows of a table; raises ValueError for one without these texts."""
  for row in tables.read_table(path, columns, optional=optional):
    error = row.error or tables.text_problem(row.values, columns, blank=True)
    if error:
      raise ValueError(f'{row.where}: {error}.')
    yield row


def encode(items: Sequence[Example], tokenizer, length: int, *, label: Embedding) -> Encoded:
  """A row for each text, truncated; short lists of negatives are filled up with empty rows."""
  query, document = (label.prompts.get(name, '') for name in ('query', 'document'))
  texts, prompted = [], []
  for item in items:
    row = [*item.texts, *[''] * (label.rows - len(item.texts))]
    texts += row
    others = query if label.numeric else document  # the texts of a scored pair are alike
    first = document if item.document else query
    prompted += [first + row[0], *(text and others + text for text in row[1:])]
  rows = [(ids,) for ids in tokenizer.encode(prompted)]
  truncated = sum(truncate(row, length, tokenizer.template) for row in rows)
  columns = instances.lay_out(rows, tokenizer, length)
  columns['labels'] = label.number([item.label for item in items], texts)
  columns['example_ids'] = np.repeat(np.arange(len(items), dtype=np.int32), label.rows)
  return Encoded(columns, {'texts': len(rows), 'truncated': truncated})


def score_rankings(items: Sequence[Example], predictions) -> dict[str, float]:
  gold_labels(items)
  queries = [i for i, item in enumerate(items) if not item.document]
  return metrics.retrieval(
    [list(predictions[i]) for i in queries], [items[i].label for i in queries]
  )


def write_rankings(folder, split, items, predictions) -> list:
  """Writes FOLDER/SPLIT.trec, a run in the format of trec_eval."""
  lines = [
    f'{item.id} Q0 {name} {rank} {score:.9g} bertjax'
    for item, ranking in zip(items, predictions, strict=True)
    for rank, (name, score) in enumerate(ranking.items(), 1)
  ]
  path = epath.Path(folder) / f'{split}.trec'
  io.write_text(path, '\n'.join(lines) + '\n')
  return [path]
