"""`GraphTokenizer`: `Tokenizer` as TensorFlow graph operations.

`tensorflow_text.FastBertTokenizer` maps compatibility forms ('…' to '. . .', 'ß' to 'ss') and
counts a word's length in bytes, so it is another tokenizer, except on printable ASCII: such texts
take this fast path. All others are normalized code point by code point with the tables of
`normalization`, then split by `FastWordpieceTokenizer`, whose longest match is exact.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from bertjax import io

try:
  with io.without_remarks():
    import tensorflow as tf
    import tensorflow_text as tft
except ImportError as error:
  raise ImportError(
    'the graph tokenizer and SavedModels need tensorflow and tensorflow-text, which are for Python '
    '3.11 to 3.13; without them use bertjax.Tokenizer, and --format=stablehlo to export.'
  ) from error

from bertjax.data import normalization
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from bertjax.data.wordpiece import MAX_CHARS_PER_WORD

io.import_tensorflow('the graph tokenizer', 'use bertjax.Tokenizer')  # hides the accelerators

_ASCII = r'[\t\n\r -~]*'
# The same without what might be a special token: '[' may stand before other letters only.
_ASCII_PLAIN = r'(?:[\t\n\r -Z\\-~]|\[[\t\n\r -BD-LNOQRTV-Z\\-~])*\[?'
_ASCII_NO_BRACKET = r'[\t\n\r -;=-Z\\-~]*'
_QUOTES = '|'.join(normalization.QUOTES)
_MARKERS = [chr(normalization.MARKERS + i) for i in range(normalization.MARKER_COUNT)]
_MOST_BYTES = 256  # of an entry in TensorFlow's WordPiece
_CUT = chr(normalization.MARKERS + normalization.MARKER_COUNT)


def unsupported(tokenizer: Tokenizer) -> str:
  """What the tokenizer has that a graph cannot have; '' if there is nothing."""
  if not tokenizer.standard:
    return f'the rules of a tokenizer.json ({tokenizer.kind})'
  longest = max(tokenizer.vocab, key=lambda piece: len(piece.removeprefix('##').encode()))
  if tokenizer.kind == 'wordpiece' and len(longest.removeprefix('##').encode()) > _MOST_BYTES:
    return f'an entry of more than {_MOST_BYTES} bytes, {longest[:20]!r}...'
  return ''


class GraphTokenizer(tf.Module):
  """Maps strings to ids within a TensorFlow graph.

  A SavedModel must have it as an attribute, or the model of SentencePiece is not saved.

  Args:
    tokenizer: whose vocabulary, case and rules to take.

  Raises:
    ValueError: if the tokenizer is `unsupported`.
  """

  def __init__(self, tokenizer: Tokenizer):
    if reason := unsupported(tokenizer):
      raise ValueError(
        f'the tokenizer has {reason}, which a TensorFlow graph cannot have; tokenise outside of '
        'the graph (`export --format=stablehlo` takes ids).'
      )
    make = _sentencepiece if tokenizer.kind == 'sentencepiece' else _wordpiece
    super().__init__()
    self._pattern, self._quick, self._exact, self.resource = make(tokenizer)

  def __call__(self, strings: tf.Tensor) -> tf.RaggedTensor:
    """Maps UTF-8 strings [B] to a RaggedTensor of int32 ids [B, tokens].

    Bytes that are no UTF-8 count as U+FFFD.
    """
    easy = tf.strings.regex_full_match(strings, self._pattern)
    quick = self._quick(tf.boolean_mask(strings, easy))
    return _merge(easy, quick, self._exact(tf.boolean_mask(strings, ~easy)))


def make_flat_encoder(tokenizer: Tokenizer) -> Callable[[Sequence[str]], tuple]:
  """Returns `Tokenizer.encode_flat` by the graph, compiled once."""
  graph = GraphTokenizer(tokenizer)

  @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
  def run(strings):
    ragged = graph(strings)
    return ragged.values, ragged.row_splits

  # Traced now, for tracing parses Python, which in two threads at once makes CPython 3.11 fail.
  traced = run.get_concrete_function()

  def encode(texts):
    texts = [text.encode() for text in tokenizer.replace_surrogates(texts)]
    values, splits = (x.numpy() for x in traced(tf.constant(texts, tf.string)))
    return values, np.diff(splits)

  return encode


def _merge(mask: tf.Tensor, true: tf.RaggedTensor, false: tf.RaggedTensor) -> tf.RaggedTensor:
  """Puts the rows of two ragged tensors back into the order of `mask`."""
  order = tf.concat([tf.where(mask)[:, 0], tf.where(~mask)[:, 0]], 0)
  return tf.gather(tf.concat([true, false], 0), tf.math.invert_permutation(order))


def _wordpiece(tokenizer: Tokenizer):
  """Returns the pattern of the easy texts, their tokenizer, that of the others, and what a
  SavedModel must keep."""
  longest = MAX_CHARS_PER_WORD[tokenizer.rules]
  last = {piece: i for i, piece in enumerate(tokenizer.vocab)}
  # Empty entries, and all but the last of equal ones, become what no word can be.
  vocab = [p if p and last[p] == i else f'[ {i} ]' for i, p in enumerate(tokenizer.vocab)]
  ascii_only = tft.FastBertTokenizer(
    vocab,
    max_bytes_per_word=longest,
    token_out_type=tf.int32,
    lower_case_nfd_strip_accents=tokenizer.lowercase,
  )
  markers = {}
  if tokenizer.rules == 'huggingface':  # as words are split at punctuation, '[MASK]' cannot come
    markers = dict(zip(SPECIAL_TOKENS, _MARKERS, strict=True))
  unknown = markers.get('[UNK]', '[UNK]')
  wordpiece = tft.FastWordpieceTokenizer(
    [markers.get(piece, piece) for piece in vocab],
    suffix_indicator='##',
    unknown_token=unknown,
    max_bytes_per_word=4 * longest,
    token_out_type=tf.int32,
    no_pretokenization=True,
  )
  normalize = _make_normalizer(tokenizer.rules, tokenizer.lowercase)

  def exact(strings):
    words = tf.strings.split(normalize(_mark(strings, markers) if markers else strings))
    too_long = tf.strings.length(words.values, 'UTF8_CHAR') > longest
    words = words.with_values(tf.where(too_long, unknown, words.values))
    return wordpiece.tokenize(words).merge_dims(-2, -1)

  return (_ASCII_PLAIN if markers else _ASCII), ascii_only.tokenize, exact, None


def _sentencepiece(tokenizer: Tokenizer):
  """As `_wordpiece`; here a text is split at special tokens, and the rest goes to the model."""
  pieces = tft.SentencepieceTokenizer(tokenizer.model, out_type=tf.int32)
  normalize = _make_normalizer('albert', tokenizer.lowercase)
  ids = list(tokenizer.special.values())
  names = [tokenizer.vocab[i] for i in ids]

  def quick(strings):
    strings = tf.strings.regex_replace(strings, _QUOTES, '"')
    return pieces.tokenize(tf.strings.lower(strings) if tokenizer.lowercase else strings)

  def exact(strings):
    strings = _mark(strings, {name: _CUT + name + _CUT for name in names})
    parts = tf.strings.split(strings, _CUT)
    match = parts.values[:, None] == tf.constant(names)
    special = tf.reduce_any(match, 1)
    known = tf.gather(ids, tf.argmax(tf.boolean_mask(match, special), 1))
    known = tf.RaggedTensor.from_uniform_row_length(known, 1)
    plain = tf.strings.regex_replace(tf.boolean_mask(parts.values, ~special), _QUOTES, '"')
    merged = _merge(special, known, pieces.tokenize(normalize(plain)))
    return parts.with_values(merged).merge_dims(-2, -1)

  return _ASCII_NO_BRACKET, quick, exact, pieces


def _mark(strings: tf.Tensor, replacements: dict[str, str]) -> tf.Tensor:
  """Replaces special tokens; private characters of the text cannot pass for their markers."""
  strings = tf.strings.regex_replace(strings, f'[{_MARKERS[0]}-{_CUT}]', '\ue000')
  for name, replacement in replacements.items():
    strings = tf.strings.regex_replace(strings, re.escape(name), replacement)
  return strings


def _make_normalizer(rules: str, lowercase: bool) -> Callable[[tf.Tensor], tf.Tensor]:
  """Returns the function that normalizes strings [B] as `normalization` does."""
  table = normalization.normalization_table(rules, lowercase)
  has_marks = table.rows.max() >= normalization.RANK

  def normalize(strings):
    codes = tf.strings.unicode_decode(strings, 'UTF-8')
    if table.cased is not None:
      any_sigma = tf.reduce_any(codes.values == ord('Σ'))
      codes = tf.cond(any_sigma, lambda: _final_sigma(codes, table), lambda: codes)
    rows = tf.RaggedTensor.from_row_splits(table.rows, table.row_splits)
    at = tf.gather(table.page_of * 256, codes.values // 256) + codes.values % 256
    rows = tf.gather(rows, tf.gather(table.pages.ravel(), at))
    values = tf.where(
      rows.values == normalization.SELF, tf.gather(codes.values, rows.value_rowids()), rows.values
    )
    splits = tf.gather(rows.row_splits, codes.row_splits)
    normalized = tf.RaggedTensor.from_row_splits(values, splits, validate=False)
    if has_marks:
      any_mark = tf.reduce_any(values >= normalization.RANK)
      normalized = tf.cond(any_mark, lambda: _sort_marks(normalized), lambda: normalized)
    return tf.strings.unicode_encode(normalized, 'UTF-8')

  return normalize


def _sort_marks(normalized: tf.RaggedTensor) -> tf.RaggedTensor:
  """Sorts the marks of each run by rank, then drops ranks and breaks: the canonical order."""
  rank = normalized.values // normalization.RANK
  starts = tf.cumsum(tf.cast(rank <= normalization.BREAK, tf.int64)) + normalized.value_rowids()
  order = tf.argsort(starts * 1024 + tf.cast(rank, tf.int64), stable=True)
  values = normalized.with_values(tf.gather(normalized.values, order))
  kept = values.with_values(values.values // normalization.RANK != normalization.BREAK)
  values = tf.ragged.boolean_mask(values, kept)
  return values.with_values(values.values % normalization.RANK)


def _final_sigma(
  codes: tf.RaggedTensor, table: normalization.NormalizationTable
) -> tf.RaggedTensor:
  """Replaces capital sigmas at the end of words, as Python's `str.lower` does."""
  where = tf.where(~_within(codes.values, table.ignorable))[:, 0]
  near, row = tf.gather(codes.values, where), tf.gather(codes.value_rowids(), where)
  cased, same_row = _within(near, table.cased), row[1:] == row[:-1]
  before = tf.concat([[False], cased[:-1] & same_row], 0)
  after = tf.concat([cased[1:] & same_row, [False]], 0)
  final = tf.boolean_mask(where, (near == ord('Σ')) & before & ~after)
  sigmas = tf.fill(tf.shape(final), ord('ς'))
  return codes.with_values(tf.tensor_scatter_nd_update(codes.values, final[:, None], sigmas))


def _within(codes: tf.Tensor, bounds: np.ndarray) -> tf.Tensor:
  """Which code points are in the ranges [bounds[0], bounds[1]), [bounds[2], ...)."""
  return tf.searchsorted(bounds, codes, side='right') % 2 == 1
