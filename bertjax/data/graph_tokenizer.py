"""`GraphTokenizer`: the tf.data twin of `Tokenizer`, made of TensorFlow graph operations.

`tensorflow_text.FastBertTokenizer` folds compatibility forms ('…' to '. . .', 'ß' to 'ss') and is
therefore another tokenizer. Here Google's rules are spelled out: NFD, strip accents, lower, drop
control characters, isolate punctuation and CJK, split on white space, then its exact and fast
longest-match `FastWordpieceTokenizer`. Tests hold it to `Tokenizer` on real text.
"""

import itertools
from collections.abc import Callable, Sequence

import tensorflow as tf
import tensorflow_text as tft

from bertjax.data.tokenizer import MAX_CHARS_PER_WORD, SPECIAL_TOKENS, Tokenizer

for _kind in ('GPU', 'TPU'):
  tf.config.set_visible_devices([], _kind)

# The blocks of Google's _is_chinese_char, but for U+2B820..2B91F, which Hugging Face leaves out.
_CJK = (
  r'\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}\x{2B740}-\x{2B81F}'
  r'\x{2B920}-\x{2CEAF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}'
)
_PUNCTUATION = r'!-/:-@\[-`{-~\p{P}'
_CONTROL = r'[\x{0}\x{FFFD}\p{Cc}\p{Cf}\p{Co}]'


class GraphTokenizer:
  """Maps strings to ids within a TensorFlow graph.

  Args:
    tokenizer: whose vocabulary and case to take.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._lowercase = tokenizer.lowercase
    self._wordpiece = tft.FastWordpieceTokenizer(
      tokenizer.vocab,
      suffix_indicator='##',
      unknown_token='[UNK]',
      max_bytes_per_word=4 * MAX_CHARS_PER_WORD,
      token_out_type=tf.int32,
      no_pretokenization=True,
    )

  def __call__(self, strings: tf.Tensor) -> tf.RaggedTensor:
    """Maps UTF-8 strings [B] to a RaggedTensor of int32 ids [B, tokens]."""
    words = tf.strings.split(self.normalize(strings))
    # Too long in characters, though not in bytes.
    words = tf.strings.regex_replace(words, rf'^.{{{MAX_CHARS_PER_WORD + 1},}}$', '[UNK]')
    return self._wordpiece.tokenize(words).merge_dims(-2, -1)

  def normalize(self, strings: tf.Tensor) -> tf.Tensor:
    """Cleans, folds and puts spaces around punctuation and CJK, so that words can be split."""
    x = tf.strings.regex_replace(strings, r'[\t\n\r]|\p{Z}', ' ')
    x = tf.strings.regex_replace(x, _CONTROL, '')
    if self._lowercase:
      x = tft.normalize_utf8(x, 'NFD')
      x = tf.strings.regex_replace(x, r'\p{Mn}', '')
      # Hugging Face lowers letter by letter; TensorFlow would write a final sigma.
      x = tf.strings.lower(tf.strings.regex_replace(x, 'Σ', 'σ'), encoding='utf-8')
    return tf.strings.regex_replace(x, rf'([{_PUNCTUATION}{_CJK}])', r' \1 ')


def make_encoder(tokenizer: Tokenizer) -> Callable[[Sequence[str]], list[list[int]]]:
  """Returns `encode(texts)`, `Tokenizer.encode` by the graph, compiled once.

  A text that spells a special token ('[MASK]') goes to `Tokenizer`, which keeps the token whole.
  """
  graph = GraphTokenizer(tokenizer)

  @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
  def run(strings):
    ragged = graph(strings)
    return ragged.values, ragged.row_splits

  def encode(texts):
    values, splits = run(tf.constant([t.encode('utf-8', 'replace') for t in texts], tf.string))
    values, splits = values.numpy().tolist(), splits.numpy().tolist()
    ids = [values[a:b] for a, b in itertools.pairwise(splits)]
    for i, text in enumerate(texts):
      if '[' in text and any(token in text for token in SPECIAL_TOKENS):
        ids[i] = tokenizer.encode([text])[0]
    return ids

  return encode
