"""`Tokenizer`: WordPiece as in BERT and SentencePiece as in ALBERT, to the letter; no TensorFlow.

WordPiece cleans the text, isolates CJK, strips accents and lowers (if `lowercase`), splits on white
space and punctuation and takes the longest matching pieces. Two references disagree in details
(Unicode tables, final sigma, the longest word), so `rules` names one: 'huggingface' is
`BertTokenizerFast`, where special tokens written out in a text ('[MASK]') stay special; 'google'
is tokenization.py of google-research/bert, where they do not. `graph_tokenizer` is the TensorFlow
twin.
"""

import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers

from bertjax.data import folding
from bertjax.data.sentencepiece import SentencePiece

SPECIAL_TOKENS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
MAX_CHARS_PER_WORD = {'huggingface': 100, 'google': 200}  # longer words become [UNK]


class Tokenizer:
  """Maps texts to ids and back.

  Args:
    vocab: WordPiece: the pieces, by id, continuations with '##'. SentencePiece: the bytes of the
      model file.
    lowercase: lower and strip accents, for "uncased" vocabularies.
    rules: 'huggingface' or 'google'; SentencePiece has only the former.

  Attributes:
    vocab: the pieces, by id.
    kind: 'wordpiece' or 'sentencepiece'.
    model: the bytes of the SentencePiece model; empty for WordPiece.
    surrogates: how many lone surrogates (half characters, which no UTF-8 can hold) were replaced
      by U+FFFD in the texts seen so far.

  Raises:
    ValueError: if the vocabulary lacks a special token or holds an entry twice or empty, the model
      is none, or there are no such rules.
  """

  def __init__(
    self,
    vocab: Sequence[str] | bytes,
    *,
    lowercase: bool = True,
    rules: str = 'huggingface',
    source: str = 'vocabulary',
  ):
    if rules not in folding.RULES or (rules == 'google' and isinstance(vocab, bytes)):
      raise ValueError(
        f"rules must be 'huggingface' or, for WordPiece, 'google'; got {rules!r} for {source}."
      )
    self.lowercase, self.rules, self.surrogates = lowercase, rules, 0
    if isinstance(vocab, bytes):
      self._engine = SentencePiece(vocab, lowercase, source)
    else:
      self._engine = _WordPiece(list(vocab), lowercase, rules, source)
    self.vocab, self.kind = self._engine.vocab, self._engine.kind
    self.model = vocab if isinstance(vocab, bytes) else b''
    self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
      self.vocab.index(token) for token in self._engine.special
    )

  @classmethod
  def from_file(cls, path, *, lowercase: bool = True, rules: str = 'huggingface') -> 'Tokenizer':
    """Reads a `vocab.txt`, a piece a line, or a SentencePiece model, `*.model`.

    Raises:
      ValueError: if there is no such file, or its content is no vocabulary.
    """
    path = epath.Path(path)
    if not path.is_file():
      raise ValueError(f'no vocabulary file {path}.')
    options = {'lowercase': lowercase, 'rules': rules, 'source': str(path)}
    if path.suffix == '.model':
      return cls(path.read_bytes(), **options)
    try:
      lines = path.read_text(encoding='utf-8').split('\n')
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{path} is no vocabulary: it is not UTF-8 text ({error.reason}).'
      ) from error
    if lines and not lines[-1]:
      lines.pop()
    return cls([line.rstrip('\r') for line in lines], **options)

  @classmethod
  def from_dir(cls, directory) -> 'Tokenizer':
    """Reads what `save` (or Hugging Face) wrote; case and rules come from `tokenizer_config.json`.

    Hugging Face's transformers 5 writes no `vocab.txt`: then the pieces come from `tokenizer.json`.
    """
    directory = epath.Path(directory)
    settings, path = {}, directory / 'tokenizer_config.json'
    if path.exists():
      settings = json.loads(path.read_text())
    options = {
      'lowercase': settings.get('do_lower_case', True),
      'rules': settings.get('rules', 'huggingface'),
    }
    lowercase = options['lowercase']
    for name, only in (('strip_accents', lowercase), ('tokenize_chinese_chars', True)):
      if settings.get(name) not in (None, only):
        raise ValueError(
          f'{path}: {name}={settings[name]} is no rule of BERT here; it must be {only}, as '
          f'do_lower_case={lowercase} has it.'
        )
    if (directory / 'spiece.model').exists():
      if settings.get('keep_accents', not lowercase) == lowercase:
        raise ValueError(
          f'{path}: accents must be dropped if and only if the text is lowered, '
          f'got keep_accents and do_lower_case both {lowercase}.'
        )
      return cls.from_file(directory / 'spiece.model', **options)
    path = directory / 'tokenizer.json'
    if path.exists() and not (directory / 'vocab.txt').exists():
      model = json.loads(path.read_text(encoding='utf-8'))['model']
      if model['type'] != 'WordPiece':
        raise ValueError(
          f'{path} is a {model["type"]} tokenizer; BERT needs WordPiece, ALBERT a spiece.model.'
        )
      pieces = sorted(model['vocab'], key=model['vocab'].get)
      return cls(pieces, **options, source=str(path))
    return cls.from_file(directory / 'vocab.txt', **options)

  def save(self, directory) -> None:
    """Writes the vocabulary and its settings so that `from_dir` and Hugging Face can read them.

    `vocab.txt` and `tokenizer.json`, or `spiece.model`; and `tokenizer_config.json`. Hugging Face
    knows its own rules only, whatever `rules` says.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = {'do_lower_case': self.lowercase, **self._engine.save(directory)}
    if self.rules != 'huggingface':
      settings['rules'] = self.rules
    names = zip(self.special, self._engine.special, strict=True)
    settings |= {f'{name}_token': token for name, token in names}
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
    if self.kind == 'sentencepiece':
      return np.array([piece.startswith('\u2581') for piece in self.vocab])
    return np.array([not piece.startswith('##') for piece in self.vocab])

  @property
  def fingerprint(self) -> str:
    """A hash of everything that decides the ids."""
    content = json.dumps(self._engine.identity)
    return hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()[:16]

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Maps texts to ids, without [CLS] and [SEP]."""
    return self._engine.encode(self.replace_surrogates(texts))

  def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Maps texts to their ids end to end, int32, and to how many each has, int64."""
    ids = self.encode(texts)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths.sum()), lengths

  def encode_offsets(self, texts: Sequence[str]):
    """Maps texts to (ids, offsets): for each piece its (start, end) in the text's characters."""
    return self._engine.encode_offsets(self.replace_surrogates(texts))

  def decode(self, ids: Sequence[int]) -> str:
    """Joins pieces to text; special tokens are kept."""
    return self._engine.decode(list(ids))

  def replace_surrogates(self, texts: Sequence[str]) -> list[str]:
    """Puts U+FFFD, which the rules drop, for each lone surrogate, and adds to `surrogates`."""
    clean = []
    for text in texts:
      if not text.isascii():
        text, count = re.subn('[\ud800-\udfff]', '\ufffd', text)
        self.surrogates += count
      clean.append(text)
    return clean

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


word_splitter = folding.word_splitter


class _WordPiece:
  """WordPiece by Hugging Face's library, after its own rules or Google's."""

  kind, special = 'wordpiece', SPECIAL_TOKENS

  def __init__(self, vocab: list[str], lowercase: bool, rules: str, source: str):
    _check_vocab(vocab, source)
    self.vocab, self._lowercase, self._rules = vocab, lowercase, rules
    self._tokenizer = _build(vocab, lowercase, rules)

  @property
  def identity(self) -> list:
    """Everything that decides the ids; Google's rules move with Python's Unicode tables."""
    google = ['google', unicodedata.unidata_version] if self._rules == 'google' else []
    return [self.vocab, self._lowercase, MAX_CHARS_PER_WORD[self._rules], *google]

  def encode(self, texts):
    if self._rules == 'google':
      texts = [folding.google_normalize(text, self._lowercase) for text in texts]
    encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [item.ids for item in encoded]

  def encode_offsets(self, texts):
    google = self._rules == 'google'
    if google:
      aligned = [folding.google_align(text, self._lowercase) for text in texts]
      texts = [text for text, _ in aligned]
    encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    offsets = [item.offsets for item in encoded]
    if google:
      rows = zip(aligned, offsets, strict=True)
      offsets = [[(at[a], at[b - 1] + 1) for a, b in spans] for (_, at), spans in rows]
    return [item.ids for item in encoded], offsets

  def decode(self, ids):
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def save(self, directory) -> dict:
    text = '\n'.join(self.vocab) + '\n'
    (directory / 'vocab.txt').write_text(text, encoding='utf-8')
    fast = _build(self.vocab, self._lowercase, 'huggingface')
    fast.model.max_input_chars_per_word = MAX_CHARS_PER_WORD[self._rules]
    fast.post_processor = tokenizers.processors.BertProcessing(
      ('[SEP]', self.vocab.index('[SEP]')), ('[CLS]', self.vocab.index('[CLS]'))
    )
    (directory / 'tokenizer.json').write_text(fast.to_str(pretty=True), encoding='utf-8')
    return {
      'tokenizer_class': 'BertTokenizer', 'strip_accents': None, 'tokenize_chinese_chars': True
    }  # fmt: skip


def _check_vocab(vocab: list[str], source: str) -> None:
  known = set(vocab)
  missing = [token for token in SPECIAL_TOKENS if token not in known]
  if missing:
    raise ValueError(
      f'{source} lacks the special tokens {missing}; BERT needs {list(SPECIAL_TOKENS)}, '
      'a line each.'
    )
  if len(known) != len(vocab) or '' in known:
    seen = set()
    line, token = next((i, t) for i, t in enumerate(vocab, 1) if not t or t in seen or seen.add(t))
    raise ValueError(
      f'{source}, line {line}: {"empty entry" if not token else f"{token!r} twice"}.'
    )


def _build(vocab: list[str], lowercase: bool, rules: str) -> tokenizers.Tokenizer:
  ids, longest = {token: i for i, token in enumerate(vocab)}, MAX_CHARS_PER_WORD[rules]
  tokenizer = tokenizers.Tokenizer(
    models.WordPiece(ids, unk_token='[UNK]', max_input_chars_per_word=longest)
  )
  tokenizer.decoder = decoders.WordPiece(prefix='##')
  if rules == 'google':
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  else:
    tokenizer.normalizer, tokenizer.pre_tokenizer = folding.word_splitter(lowercase)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
  return tokenizer
