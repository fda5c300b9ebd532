"""`Index`: texts by their embeddings, for look-ups and extracts."""

import dataclasses
import json
import zipfile
from collections.abc import Sequence

import numpy as np
from etils import epath

from bertjax import io


@dataclasses.dataclass(frozen=True)
class Hit:
  """A text of the corpus, its number there, and its cosine similarity to the query."""

  number: int
  text: str
  similarity: float


class Index:
  """A corpus.

  Args:
    texts: its N texts.
    vectors: their embeddings [N, D], of length 1.
    pooling: how they were embedded, '' as the model's own; queries must be, too.
  """

  def __init__(self, texts: Sequence[str], vectors: np.ndarray, pooling: str = ''):
    self.texts, self.vectors, self.pooling = list(texts), vectors, pooling

  def save(self, path) -> None:
    """Writes an .npz file: texts (JSON), vectors and pooling."""
    content = json.dumps({'texts': self.texts, 'pooling': self.pooling}).encode()
    with io.replacing(path) as temporary, temporary.open('wb') as file:
      np.savez(file, vectors=self.vectors, content=np.frombuffer(content, np.uint8))

  @classmethod
  def load(cls, path) -> 'Index':
    """Reads what `save` wrote; see also `Predictor.load_index`.

    Raises:
      ValueError: if there is no such file, or it is no index.
    """
    path = epath.Path(path)
    if not path.is_file():
      raise ValueError(
        f'no index {path}; `bertjax predict --do=nearest --corpus=FILE --index={path}` writes it.'
      )
    try:
      with path.open('rb') as file, np.load(file) as arrays:
        return cls(**json.loads(arrays['content'].tobytes()), vectors=arrays['vectors'])
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError) as error:
      raise ValueError(f'{path} is no index of texts: {error}.') from error

  def nearest(self, queries: np.ndarray, top_k: int) -> list[list[Hit]]:
    """The texts most similar to each query [Q, D] of length 1, the nearest first."""
    if not self.texts:
      raise ValueError('the corpus has no texts.')
    if top_k < 1:
      raise ValueError(f'top_k must be at least 1, got {top_k}.')
    found = []
    for query in queries:
      similar = self.vectors @ query
      order = np.argsort(-similar, kind='stable')[:top_k]
      found.append([Hit(int(i), self.texts[i], float(similar[i])) for i in order])
    return found

  def summarise(self, start: int, end: int, count: int) -> list[str]:
    """Up to `count` of the texts start..end-1 by maximal marginal relevance (Carbonell and
    Goldstein 1998): similar to their mean, and dissimilar to one another; in their order."""
    if count < 1:
      raise ValueError(f'sentences must be at least 1, got {count}.')
    if start == end:
      return []
    vectors, chosen = self.vectors[start:end], []
    similar, mean = vectors @ vectors.T, vectors.mean(0)
    relevance = vectors @ mean / np.linalg.norm(mean)
    while len(chosen) < min(count, len(vectors)):
      known = similar[:, chosen].max(1) if chosen else 0
      worth = 0.7 * relevance - 0.3 * known
      worth[chosen] = -np.inf
      chosen.append(int(worth.argmax()))
    return [self.texts[start + i] for i in sorted(chosen)]
