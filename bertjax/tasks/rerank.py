"""Rerankers: cross-encoders that learn from labelled pairs or from positives and hard negatives.

They are evaluated by how they rank the candidates of each query: those of a split, or those that a
first search has found for the queries of a folder of BEIR's format.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from bertjax.data import tables
from bertjax.objectives.labels import Regression
from bertjax.objectives.rerank import Candidates, Listwise, MarginMse, Ranking, Relevance
from bertjax.tasks import classification, embedding, metrics
from bertjax.tasks.task import Encoded, Example, Task, gold_labels, known_split

_log = logging.getLogger(__name__)

_LISTS = {'binary': Candidates, 'listwise': Listwise, 'margin_mse': MarginMse}
_EVALUATIONS = ('retrieval', 'similarity', 'beir')
_RELEVANT = 0.5  # the least label of a relevant document


def rerank(
  source: str = '', *, files: Mapping[str, str], text: str, pair: str,
  negatives: Sequence[str] = (), num_negatives: int = 0, label: str = 'label',
  loss: str = 'binary', evaluation: str = 'retrieval', candidates: str = '',
  num_candidates: int = 100, delimiter: str = '', encoding: str = 'utf-8',
  on_bad_row: str = 'stop',
) -> Task:  # fmt: skip
  """A score for each pair of a query and a document.

  Args:
    source: folder of the files, or 'tfds:NAME' and the files are its splits.
    files: split -> a table that `data.tables.read_table` reads.
    text: column of the query.
    pair: column of the document: the positive where there are `negatives`.
    negatives: columns of hard negatives; in JSONL and Parquet a column may hold a list. Without
      any, records are labelled pairs.
    num_negatives: hard negatives of an example: the first ones of longer lists, shorter ones have
      fewer. 0 = one for each column.
    label: column of the label of a pair, in [0, 1]; with 'margin_mse' the columns, joined by '|',
      of the teacher's scores of positive and negatives, of which one may hold a list.
    loss: 'binary' (cross-entropy of each pair), 'listwise' (softmax over the positive and its
      negatives) or 'margin_mse' (the teacher's margins between positive and negatives).
    evaluation: 'retrieval' ranks the documents that a split has for each query, 'similarity'
      correlates scores with the labels of pairs, 'beir' ranks `candidates` for the queries of
      FOLDER/qrels/NAME.tsv, the file of the split.
    candidates: file in the folder: a run in the format of trec_eval, or a table with query-id,
      corpus-id and optionally score.
    num_candidates: of each query, those with the highest scores.
    delimiter: between columns, see `classification.table`.
    encoding: of the files.
    on_bad_row: a record without a text or label raises ('stop') or is skipped ('skip').

  Raises:
    ValueError: for an option that is not one of its choices, is out of range or missing.
  """
  _check(loss, evaluation, candidates, num_candidates, bool(negatives), files)
  others = {split: file for split, file in files.items() if split != 'train'}
  layouts = functools.partial(
    classification.make_layouts, on_bad_row=on_bad_row, delimiter=delimiter, encoding=encoding
  )
  judges: dict[str, Callable[[Task], Task]] = {
    'similarity': lambda task: task,
    'retrieval': lambda task: _ranking(lambda split: as_candidates(task.read(split)), task),
    'beir': lambda task: _ranking(
      lambda split: read_candidates(
        epath.Path(source) / known_split(split, others), epath.Path(source) / candidates,
        num_candidates,
      ), task,
    ),
  }  # fmt: skip

  def pairs(some: Mapping[str, str], judge: Callable | None = None) -> Task:
    kind = Relevance()
    read = functools.partial(
      classification.read_texts, source=source, layouts=layouts(some, (text, pair), label),
      label=kind,
    )  # fmt: skip
    encode_pairs = functools.partial(classification.encode, label=kind)
    score = functools.partial(classification.score, label=kind, measure=metrics.correlations)
    write = functools.partial(classification.write_texts, label=kind)
    return Task('rerank', kind, read, encode_pairs, kind.decode, score, write, tuple(some),
                judged_by=judge, key=_query)  # fmt: skip

  if not negatives:
    return pairs(files, judges[evaluation])
  kind = _LISTS[loss](rows=1 + (num_negatives or len(negatives)))
  scores = tuple(label.split('|')) if loss == 'margin_mse' else ''
  read = functools.partial(
    embedding.read_pairs, source=source, most=kind.rows - 1,
    layouts=layouts(files, (text, pair, *negatives), scores, ()),
    targets=lambda values, texts: kind.targets([values[name] for name in scores], texts),
  )  # fmt: skip
  judges['similarity'] = lambda task: pairs(others)
  return Task('rerank', kind, read, functools.partial(encode, label=kind), kind.decode, None, None,
              tuple(files), judged_by=judges[evaluation], key=_query)  # fmt: skip


def _check(
  loss: str, evaluation: str, candidates: str, num_candidates: int, negatives: bool,
  files: Mapping[str, str],
) -> None:  # fmt: skip
  for name, value, known in (('loss', loss, _LISTS), ('evaluation', evaluation, _EVALUATIONS)):
    if value not in known:
      raise ValueError(f'task.{name} must be one of {tuple(known)}, got {value!r}.')
  if loss != 'binary' and not negatives:
    raise ValueError(
      f'task.loss={loss!r} compares a positive with hard negatives; name their columns '
      '(--config.task.negatives).'
    )
  if (evaluation == 'beir') != bool(candidates):
    raise ValueError(
      f'task.evaluation={evaluation!r} and task.candidates={candidates!r} do not fit: candidates '
      "are ranked by evaluation='beir', which needs them."
    )
  if num_candidates < 1:
    raise ValueError(f'task.num_candidates must be at least 1, got {num_candidates}.')
  if 'dev' not in files and (evaluation == 'beir' or (evaluation == 'similarity' and negatives)):
    raise ValueError(
      f'task.evaluation={evaluation!r} needs a dev split of another kind than the training '
      'examples; set --config.data.dev_file.'
    )


def _query(item: Example) -> Sequence[str]:
  return item.texts[:1]


def _ranking(read: Callable[[str], list[Example]], task: Task) -> Task:
  kind = Ranking()
  return Task(
    task.name, kind, read, functools.partial(encode, label=kind), kind.decode,
    embedding.score_rankings, embedding.write_rankings, task.splits,
  )  # fmt: skip


def as_candidates(items: Sequence[Example]) -> list[Example]:
  """A query for each different first text, with all documents that examples have for it.

  Of lists the positives are relevant, of labelled pairs those with a label of at least 0.5, which
  is the relevance.

  Raises:
    ValueError: if no query has a relevant document and another one.
  """
  gold_labels(items)
  relevance: dict[str, dict[str, float]] = {}
  for item in items:
    query, *documents = item.texts
    lists = isinstance(item.label, tuple)
    grades = [1.0] if lists else [item.label * (item.label >= _RELEVANT)]
    found = relevance.setdefault(query, {})
    for document, grade in zip(documents, [*grades, *[0.0] * len(documents)], strict=False):
      found[document] = max(grade, found.get(document, 0.0))
  queries = {query: gold for query, gold in relevance.items() if max(gold.values()) > 0}
  if not any(min(gold.values()) == 0 for gold in queries.values()):
    raise ValueError(
      'no query of the split has a relevant document and one that is not, so there is nothing to '
      "rank; set --config.task.evaluation=similarity, or 'beir' with candidates."
    )
  if len(queries) < len(relevance):
    _log.info('%d queries without a relevant document are skipped', len(relevance) - len(queries))
  ids = {text: f'd{number}' for number, text in enumerate(
    dict.fromkeys(text for gold in queries.values() for text in gold))}  # fmt: skip
  return [
    Example(f'q{number}', (query, *gold), {ids[text]: grade for text, grade in gold.items()})
    for number, (query, gold) in enumerate(queries.items())
  ]


def read_candidates(qrels: epath.Path, path: epath.Path, most: int) -> list[Example]:
  """The judged queries of a folder in BEIR's format with the candidates of a file.

  A query without candidates counts as one whose relevant documents are not found, which is logged.

  Args:
    qrels: FOLDER/qrels/NAME.tsv.
    path: of the candidates, see `rerank`.
    most: candidates of a query.

  Raises:
    ValueError: for a malformed file, or candidates of a query that is not judged or with an id that
      is not in the corpus.
  """
  judged, run = embedding.read_qrels(qrels), read_run(path, most)
  if unknown := [query for query in run if query not in judged]:
    raise ValueError(
      f'{path} has candidates of the query {unknown[0]!r}, which {qrels} does not judge; name the '
      'judgements of these queries.'
    )
  queries = embedding.read_queries(qrels, judged)
  wanted = {name: query.id for query in queries for name in run.get(query.id, ())}
  texts = {item.id: item.texts[0] for item in embedding.read_corpus(qrels) if item.id in wanted}
  if missing := [name for name in wanted if name not in texts]:
    raise ValueError(
      f'{path} has the candidate {missing[0]!r} of the query {wanted[missing[0]]!r}, which is not '
      f'in {qrels.parent.parent / "corpus.jsonl"}.'
    )
  if not texts:
    raise ValueError(f'{path} has no candidates of the queries of {qrels}.')
  if lost := sum(query.id not in run for query in queries):
    _log.warning(
      '%s has no candidates of %d of %d queries, which score 0', path, lost, len(queries)
    )
  found = [run.get(query.id, []) for query in queries]
  before = metrics.retrieval(found, [query.label for query in queries])
  _log.info('%s: %s before reranking', path,
            '  '.join(f'{name} {value:.4f}' for name, value in before.items()))  # fmt: skip
  return [
    Example(query.id, (*query.texts, *(texts[name] for name in names)),
            {name: query.label.get(name, 0) for name in names} | query.label)
    for query, names in zip(queries, found, strict=True)
  ]  # fmt: skip


def read_run(path: epath.Path, most: int) -> dict[str, list[str]]:
  """{query: ids of its best candidates} by score as in trec_eval, or in the order of the file."""
  found: dict[str, dict[str, float]] = {}
  for where, query, document, score in _run_rows(path):
    number, error = Regression().parse(score)
    if error:
      raise ValueError(f'{where}: the score must be a finite number, got {score!r}.')
    if document in found.setdefault(query, {}):
      raise ValueError(f'{where}: the query {query!r} has the candidate {document!r} twice.')
    found[query][document] = number
  return {
    query: sorted(scores, key=lambda name: (scores[name], name), reverse=True)[:most]
    for query, scores in found.items()
  }


def _run_rows(path: epath.Path):
  """Yields (where, query, document, score) of a run."""
  if path.suffix in ('.tsv', '.csv', '.jsonl', '.parquet'):
    for number, row in enumerate(
      embedding.records(path, ('query-id', 'corpus-id'), optional=('score',))
    ):
      query, document = row.values['query-id'], row.values['corpus-id']
      yield row.where, query, document, row.values.get('score', -number)
    return
  for number, line in enumerate(tables.read_lines(path, 'utf-8'), 1):
    fields = line.split()
    if fields and len(fields) != 6:
      raise ValueError(
        f'{path}:{number}: a run has lines of 6 fields (QUERY Q0 DOCUMENT RANK SCORE TAG), got '
        f'{len(fields)}.'
      )
    if fields:
      yield f'{path}:{number}', fields[0], fields[2], fields[4]


def encode(items: Sequence[Example], tokenizer, length: int, *, label) -> Encoded:
  """A row for each candidate, truncated by Google's rule; short lists are filled up with empty
  rows."""
  rows, owners = [], []
  for number, item in enumerate(items):
    query, *documents = item.texts
    values = label.row_labels(item.label, len(documents))
    pairs = [(query, document) for document in documents]
    pairs += [('', '')] * (len(values) - len(documents))
    rows += [Example(item.id, p, value) for p, value in zip(pairs, values, strict=True)]
    owners += [number] * len(values)
  encoded = classification.encode(rows, tokenizer, length, label=Relevance())
  encoded.columns['example_ids'][:] = owners
  return encoded
