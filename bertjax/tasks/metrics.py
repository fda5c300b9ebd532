"""Official metrics of the tasks, all as fractions (0.91, not 91).

Edge cases follow the official scorers: scikit-learn's and SciPy's functions for GLUE,
conlleval.pl for spans of tags, evaluate-v1.1.py and evaluate-v2.0.py for SQuAD,
cmrc2018_evaluate.py for answers in Chinese.
"""

import collections
import difflib
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from bertjax.objectives.entities import entities


def confusion(predicted, gold, classes: int) -> np.ndarray:
  """Counts [C, C]: rows are the gold classes, columns the predicted ones."""
  table = np.zeros((classes, classes), np.int64)
  np.add.at(table, (np.asarray(gold, int), np.asarray(predicted, int)), 1)
  return table


def of_classes(predicted, gold) -> dict[str, float]:
  """All metrics of classes, from their numbers [N].

  'f1' is that of class 1, 0 if it is neither in the references nor predicted; 'macro_f1' is the
  mean over the classes that are; 'matthews' is the correlation for any number of classes (R_K), 0
  if one side is constant.
  """
  table = confusion(predicted, gold, int(max(np.max(predicted), np.max(gold), 1)) + 1).astype(float)
  total, correct, wanted, found = table.sum(), np.trace(table), table.sum(1), table.sum(0)
  with np.errstate(invalid='ignore'):
    f1 = 2 * np.diag(table) / (wanted + found)
  spread = np.sqrt((total**2 - wanted @ wanted) * (total**2 - found @ found))
  return {
    'accuracy': float(correct / total),
    'f1': float(np.nan_to_num(f1[1])),
    'macro_f1': float(np.nanmean(f1)),
    'matthews': float((correct * total - wanted @ found) / spread) if spread else 0.0,
  }


def precision_recall(gold: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
  """The precision-recall curve of a label.

  Args:
    gold: bool [N], true somewhere.
    score: [N]; predicted are scores of at least the threshold.

  Returns:
    Precision and recall at each distinct score, from the highest to the lowest; and the average
    precision, the sum of the precisions weighted by the gain in recall, without interpolation.
  """
  order = np.argsort(-score, kind='stable')
  last = np.flatnonzero(np.diff(score[order], append=np.inf))  # of equal scores
  hits = np.cumsum(gold[order])[last]
  precision, recall = hits / (last + 1), hits / gold.sum()
  return precision, recall, float(np.diff(recall, prepend=0) @ precision)


def correlations(predicted, gold) -> dict[str, float]:
  """Pearson and Spearman; 0 if undefined: one side is constant or not finite."""
  from scipy import stats  # takes seconds to import

  predicted, gold = np.asarray(predicted, np.float64), np.asarray(gold, np.float64)
  if not np.isfinite(predicted).all() or np.ptp(predicted) == 0 or np.ptp(gold) == 0:
    return {'pearson': 0.0, 'spearman': 0.0}
  return {
    'pearson': float(stats.pearsonr(predicted, gold).statistic),
    'spearman': float(stats.spearmanr(predicted, gold).statistic),
  }


def retrieval(rankings: Sequence[Sequence], relevant: Sequence[Mapping]) -> dict[str, float]:
  """nDCG@10, MRR@10, recall@10, recall@100 and MAP@100: means over queries, as trec_eval's.

  Args:
    rankings: ids of documents of each query, best first.
    relevant: {id: relevance} of each query; documents above 0 are relevant, and the gain of nDCG is
      the relevance.

  Raises:
    ValueError: if a query has no relevant document.
  """
  table = [_ranking(ranking, gold) for ranking, gold in zip(rankings, relevant, strict=True)]
  return {name: float(np.mean([row[name] for row in table])) for name in table[0]}


def _ranking(ranking: Sequence, relevant: Mapping) -> dict[str, float]:
  ideal = np.array(sorted((r for r in relevant.values() if r > 0), reverse=True), float)
  if not len(ideal):
    raise ValueError('a query has no relevant document; leave it out.')
  gains = np.array([max(relevant.get(name, 0), 0) for name in ranking], float)
  hits, discount = gains > 0, np.log2(np.arange(2, 12))
  precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
  dcg, best = ((g[:10] / discount[: len(g)]).sum() for g in (gains, ideal))
  return {
    'ndcg@10': dcg / best,
    'mrr@10': max((1 / (place + 1) for place in np.flatnonzero(hits[:10])), default=0.0),
    'recall@10': hits[:10].sum() / len(ideal),
    'recall@100': hits[:100].sum() / len(ideal),
    'map@100': (precision * hits)[:100].sum() / len(ideal),
  }


def multilabel(predicted: np.ndarray, gold: np.ndarray) -> dict[str, float]:
  """Micro and macro F1, and the fraction of examples with all labels right, from [N, C] arrays."""
  predicted, gold = np.asarray(predicted, bool), np.asarray(gold, bool)
  hits = (predicted & gold).sum(0)
  sizes = predicted.sum(0) + gold.sum(0)
  return {
    'micro_f1': float(2 * hits.sum() / max(sizes.sum(), 1)),
    'macro_f1': float((2 * hits / np.maximum(sizes, 1)).mean()),
    'exact': float((predicted == gold).all(1).mean()),
  }


def span_scores(predicted: Iterable[Sequence[str]], gold: Iterable[Sequence[str]]) -> dict:
  """Precision, recall and F1 of complete typed spans, F1 of each type, and the words' accuracy."""
  hits, found, wanted = (collections.Counter() for _ in range(3))
  right = words = 0
  for ours, theirs in zip(predicted, gold, strict=True):
    a, b = set(entities(ours)), set(entities(theirs))
    for counter, spans in ((hits, a & b), (found, a), (wanted, b)):
      counter.update(name for name, _, _ in spans)
    right += sum(x == y for x, y in zip(ours, theirs, strict=True))
    words += len(theirs)
  scores = {
    'f1': _f1(hits.total(), found.total(), wanted.total()),
    'precision': hits.total() / max(found.total(), 1),
    'recall': hits.total() / max(wanted.total(), 1),
    'accuracy': right / max(words, 1),
  }
  types = sorted(found.keys() | wanted.keys())
  return scores | {f'f1_{name}': _f1(hits[name], found[name], wanted[name]) for name in types}


def _f1(hits: int, found: int, wanted: int) -> float:
  return 2 * hits / max(found + wanted, 1)


_PUNCTUATION = str.maketrans('', '', string.punctuation)


def normalize_answer(text: str) -> str:
  """Lower-cased text without ASCII punctuation, articles and extra white space."""
  text = text.lower().translate(_PUNCTUATION)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def answer_exact(predicted: str, gold: str) -> float:
  return float(normalize_answer(predicted) == normalize_answer(gold))


def answer_f1(predicted: str, gold: str) -> float:
  """F1 of bags of words; 0 if both are empty, as in evaluate-v1.1.py."""
  a, b = normalize_answer(predicted).split(), normalize_answer(gold).split()
  common = (collections.Counter(a) & collections.Counter(b)).total()
  return 2 * common / (len(a) + len(b)) if common else 0.0


_CMRC_PUNCTUATION = str.maketrans('', '', '-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』')


def normalize_cmrc(text: str) -> str:
  """Lower-cased text without the punctuation that cmrc2018_evaluate.py removes; spaces stay."""
  return text.lower().strip().translate(_CMRC_PUNCTUATION)


def cmrc_exact(predicted: str, gold: str) -> float:
  """Exact match of CMRC 2018."""
  return float(normalize_cmrc(predicted) == normalize_cmrc(gold))


def cmrc_f1(predicted: str, gold: str) -> float:
  """F1 of CMRC 2018 from the longest common substring of segments.

  A segment is a Han character (U+4E00 to U+9FA5) or a word. The official script splits the text
  between Han characters with NLTK; here words are letters and digits with '.', ',' or an apostrophe
  inside, and each other mark.
  """
  a, b = (_CMRC_SEGMENT.findall(normalize_cmrc(text)) for text in (predicted, gold))
  common = difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
  return 2 * common / (len(a) + len(b)) if common else 0.0


_CMRC_SEGMENT = re.compile(r"[一-龥]|[^\W一-龥]+(?:[.,'][^\W一-龥]+)*|[^\w\s]")


def best_answer(measure: Callable[[str, str], float], predicted: str, references: Sequence[str]):
  """Maximum of a measure over the reference answers, as in SQuAD 1.1."""
  return max(measure(predicted, reference) for reference in references)


def best_answer_v2(
  measure: Callable[[str, str], float], predicted: str, references: Sequence[str],
  normalize: Callable[[str], str] = normalize_answer,
):  # fmt: skip
  """`best_answer` by the rules of SQuAD 2.0: an empty text is right only if both are empty.

  References that normalise to an empty text are ignored; without any, '' is right.
  """
  references = [text for text in references if normalize(text)] or ['']
  if normalize(predicted) and references != ['']:
    return best_answer(measure, predicted, references)
  return float(not normalize(predicted) and references == [''])


def best_threshold(scores, null_odds, answerable) -> tuple[float, float]:
  """The threshold on null odds that maximises the mean score; above it the answer is ''.

  Args:
    scores: of the best texts, [N]; without a reference answer, 1 for an empty text, else 0.
    null_odds: [N].
    answerable: bool [N].

  Returns:
    (mean score, threshold). Unlike evaluate-v2.0.py, examples of equal odds are treated alike, and
    the threshold is below all odds if it is best never to answer.
  """
  scores, null_odds = np.asarray(scores, np.float64), np.asarray(null_odds, np.float64)
  answerable = np.asarray(answerable, bool)
  order = np.argsort(null_odds, kind='stable')
  gains, odds = (scores - ~answerable)[order], null_odds[order]
  totals = (~answerable).sum() + np.cumsum(gains)
  totals[:-1][odds[1:] == odds[:-1]] = -np.inf
  best = int(totals.argmax())
  if totals[best] <= (~answerable).sum():
    return float((~answerable).mean()), float(odds[0] - 1)
  return float(totals[best] / len(scores)), float(odds[best])
