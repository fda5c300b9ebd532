"""`Tokenizer`: WordPiece as in BERT, by Hugging Face's `tokenizers` library; no TensorFlow.

The rules are those of `BertTokenizerFast`: clean text, split CJK, strip accents and lower (if
`lowercase`), split on white space and punctuation, then the longest matching pieces. Special tokens
written out in a text ('[MASK]') stay special. `graph_tokenizer` holds the TensorFlow twin.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPECIAL_TOKENS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
MAX_CHARS_PER_WORD = 100  # longer words become [UNK]; Hugging Face's value (Google's head: 200)


class Tokenizer:
  """A WordPiece tokenizer.

  Args:
    vocab: the pieces, by id; continuations start with '##'.
    lowercase: lower and strip accents, for "uncased" vocabularies.

  Raises:
    ValueError: if the vocabulary lacks a special token or holds an entry twice or empty.
  """

  def __init__(self, vocab: Sequence[str], *, lowercase: bool = True, source: str = 'vocabulary'):
    self.vocab, self.lowercase = list(vocab), lowercase
    ids = {token: i for i, token in enumerate(self.vocab)}
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
      raise ValueError(
        f'{source} lacks the special tokens {missing}; BERT needs {list(SPECIAL_TOKENS)}, '
        'a line each.'
      )
    if len(ids) != len(self.vocab) or '' in ids:
      seen = set()
      line, token = next(
        (i, t) for i, t in enumerate(self.vocab, 1) if not t or t in seen or seen.add(t)
      )
      raise ValueError(
        f'{source}, line {line}: {"empty entry" if not token else f"{token!r} twice"}.'
      )
    self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
      ids[token] for token in SPECIAL_TOKENS
    )
    self._tokenizer = _build(ids, lowercase)

  @classmethod
  def from_file(cls, path, *, lowercase: bool = True) -> 'Tokenizer':
    """Reads a `vocab.txt`, a piece a line.

    Raises:
      ValueError: if there is no such file, or its content is no vocabulary.
    """
    path = epath.Path(path)
    if not path.is_file():
      raise ValueError(f'no vocabulary file {path}.')
    try:
      lines = path.read_text(encoding='utf-8').split('\n')
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{path} is no vocabulary: it is not UTF-8 text ({error.reason}).'
      ) from error
    if lines and not lines[-1]:
      lines.pop()
    return cls([line.rstrip('\r') for line in lines], lowercase=lowercase, source=str(path))

  @classmethod
  def from_dir(cls, directory) -> 'Tokenizer':
    """Reads what `save` (or Hugging Face) wrote; case comes from `tokenizer_config.json`.

    Hugging Face's transformers 5 writes no `vocab.txt`: then the pieces come from `tokenizer.json`.
    """
    directory = epath.Path(directory)
    settings, path = {}, directory / 'tokenizer_config.json'
    if path.exists():
      settings = json.loads(path.read_text())
    lowercase = settings.get('do_lower_case', True)
    path = directory / 'tokenizer.json'
    if path.exists() and not (directory / 'vocab.txt').exists():
      model = json.loads(path.read_text(encoding='utf-8'))['model']
      if model['type'] != 'WordPiece':
        raise ValueError(f'{path} is a {model["type"]} tokenizer, BERT needs WordPiece.')
      pieces = sorted(model['vocab'], key=model['vocab'].get)
      return cls(pieces, lowercase=lowercase, source=str(path))
    return cls.from_file(directory / 'vocab.txt', lowercase=lowercase)

  def save(self, directory) -> None:
    """Writes `vocab.txt`, `tokenizer.json` and `tokenizer_config.json` for Hugging Face."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / 'vocab.txt').write_text('\n'.join(self.vocab) + '\n', encoding='utf-8')
    fast = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
    fast.post_processor = tokenizers.processors.BertProcessing(
      ('[SEP]', self.sep_id), ('[CLS]', self.cls_id)
    )
    (directory / 'tokenizer.json').write_text(fast.to_str(pretty=True), encoding='utf-8')
    settings = {
      'tokenizer_class': 'BertTokenizer',
      'do_lower_case': self.lowercase,
      'strip_accents': None,
      'tokenize_chinese_chars': True,
      **{f'{token[1:-1].lower()}_token': token for token in SPECIAL_TOKENS},
    }
    (directory / 'tokenizer_config.json').write_text(json.dumps(settings, indent=2) + '\n')

  @property
  def vocab_size(self) -> int:
    return len(self.vocab)

  @property
  def special(self) -> dict[str, int]:
    """Ids by name: 'pad', 'unk', 'cls', 'sep', 'mask'."""
    names = ('pad', 'unk', 'cls', 'sep', 'mask')
    return {name: getattr(self, f'{name}_id') for name in names}

  @property
  def word_starts(self) -> np.ndarray:
    """Which ids begin a word: bool [V]."""
    return np.array([not piece.startswith('##') for piece in self.vocab])

  @property
  def fingerprint(self) -> str:
    """A hash of everything that decides the ids."""
    content = json.dumps([self.vocab, self.lowercase, MAX_CHARS_PER_WORD])
    return hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()[:16]

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Maps texts to ids, without [CLS] and [SEP]."""
    encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [item.ids for item in encoded]

  def encode_offsets(self, texts: Sequence[str]):
    """Maps texts to (ids, offsets): for each piece its (start, end) in the text's characters."""
    encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [item.ids for item in encoded], [item.offsets for item in encoded]

  def decode(self, ids: Sequence[int]) -> str:
    """Joins pieces to text; special tokens are kept."""
    return self._tokenizer.decode(list(ids), skip_special_tokens=False)

  def __call__(
    self, texts: Sequence[str], pairs: Sequence[str] | None = None, length: int | None = None
  ) -> dict[str, np.ndarray]:
    """Makes a batch: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP], padded with [PAD].

    Args:
      texts: B texts.
      pairs: B second texts, or None.
      length: L; default: the longest row's.

    Returns:
      'input_ids', 'token_type_ids' (1 on the pair and its [SEP]) and 'segment_ids' (0 = padding),
      int32 [B, L].

    Raises:
      ValueError: if the numbers differ, or a row does not fit: nothing is cut silently.
    """
    if pairs is not None and len(pairs) != len(texts):
      raise ValueError(f'texts and pairs must be as many, got {len(texts)} and {len(pairs)}.')
    first = [[self.cls_id, *ids, self.sep_id] for ids in self.encode(texts)]
    second = [[*ids, self.sep_id] for ids in self.encode(pairs)] if pairs else [[] for _ in first]
    sizes = [len(a) + len(b) for a, b in zip(first, second, strict=True)]
    longest = max(sizes, default=0)
    length = longest if length is None else length
    if longest > length:
      raise ValueError(
        f'text {sizes.index(longest)} has {longest} tokens with its special tokens, more than '
        f'length={length}; shorten it or raise length.'
      )
    batch = {
      name: np.full((len(first), length), fill, np.int32)
      for name, fill in (('input_ids', self.pad_id), ('token_type_ids', 0), ('segment_ids', 0))
    }
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
      size = sizes[row]
      batch['input_ids'][row, :size] = a + b
      batch['token_type_ids'][row, len(a) : size] = 1
      batch['segment_ids'][row, :size] = 1
    return batch


def word_splitter(lowercase: bool):
  """The normaliser and the pre-tokenizer of BERT: what comes before WordPiece."""
  normalizer = normalizers.BertNormalizer(
    clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
  )
  return normalizer, pre_tokenizers.BertPreTokenizer()


def _build(ids: dict[str, int], lowercase: bool) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(
    models.WordPiece(ids, unk_token='[UNK]', max_input_chars_per_word=MAX_CHARS_PER_WORD)
  )
  tokenizer.normalizer, tokenizer.pre_tokenizer = word_splitter(lowercase)
  tokenizer.decoder = decoders.WordPiece(prefix='##')
  tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
  return tokenizer
