"""`Tokenizer`: WordPiece as in BERT and SentencePiece as in ALBERT, to the letter; no TensorFlow.

WordPiece cleans the text, isolates CJK, strips accents and lowers (if `lowercase`), splits on white
space and punctuation and takes the longest matching tokens. Two references disagree in details
(Unicode tables, final sigma, the longest word), so `rules` names one: 'huggingface' is
`BertTokenizerFast`, where special tokens written out in a text ('[MASK]') stay special; 'google'
is tokenization.py of google-research/bert, where they do not. `tokenizer_tf` is the same in
TensorFlow.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence

import numpy as np
import tokenizers
from etils import epath

from bertjax.data import instances, normalization, sentencepiece, wordpiece, words
from bertjax.data.loader import model_inputs
from bertjax.data.wordpiece import SPECIAL_TOKENS

# Entries of tokenizer_config.json that name files or paths of the machine that wrote it, and the
# one that the engine writes again.
_LOCAL = ('name_or_path', 'tokenizer_file', 'special_tokens_map_file', 'vocab_file', 'is_local',
          'local_files_only', 'auto_map', 'backend', 'added_tokens_decoder')  # fmt: skip


class Tokenizer:
  """Maps texts to ids and back.

  >>> import bertjax
  >>> tokenizer = bertjax.Tokenizer(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'hello', '##s'])
  >>> tokenizer.encode(['Hello hellos'])
  [[5, 5, 6]]
  >>> tokenizer(['hello', 'hellos'])['input_ids']  # [B, L]
  array([[2, 5, 3, 0],
         [2, 5, 6, 3]], dtype=int32)

  Args:
    vocab: WordPiece: the tokens, by id, continuations with '##'. SentencePiece: the bytes of the
      model file.
    lowercase: lower and strip accents, for "uncased" vocabularies.
    rules: 'huggingface' or 'google'; SentencePiece has only the former.
    source: name of the vocabulary in messages.
    backend: a WordPiece `tokenizers.Tokenizer` whose normaliser, pre-tokenizer and added tokens
      replace BERT's; `from_dir` makes it of a tokenizer.json that has its own.
    special: names of the padding, unknown, [CLS], [SEP] and mask tokens of `backend`.

  Attributes:
    vocab: the tokens, by id; '' where an id has none.
    kind: 'wordpiece' or 'sentencepiece'.
    model: the bytes of the SentencePiece model; empty for WordPiece.
    settings: entries of the source's tokenizer_config.json, which `save` keeps.
    surrogates: how many lone surrogates (half characters, which no UTF-8 can hold) were replaced
      by U+FFFD in the texts seen so far.

  Raises:
    ValueError: if the vocabulary lacks a special token, the model is none, or there are no such
      rules.
  """

  def __init__(
    self,
    vocab: Sequence[str] | bytes,
    *,
    lowercase: bool = True,
    rules: str = 'huggingface',
    source: str = 'vocabulary',
    backend: tokenizers.Tokenizer | None = None,
    special: Sequence[str] = SPECIAL_TOKENS,
  ):
    if rules not in normalization.RULES or (rules == 'google' and isinstance(vocab, bytes)):
      raise ValueError(
        f"rules must be 'huggingface' or, for WordPiece, 'google'; got {rules!r} for {source}."
      )
    self.lowercase, self.rules, self.surrogates, self.settings = lowercase, rules, 0, {}
    if isinstance(vocab, bytes):
      self._engine = sentencepiece.SentencePiece(vocab, lowercase, source)
    else:
      special = tuple(special)
      self._engine = wordpiece.WordPiece(list(vocab), lowercase, rules, source, backend, special)
    self.vocab, self.kind = self._engine.vocab, self._engine.kind
    self.model = vocab if isinstance(vocab, bytes) else b''
    ids = {token: i for i, token in enumerate(self.vocab)}
    self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
      ids[token] for token in self._engine.special
    )

  @classmethod
  def from_file(cls, path, *, lowercase: bool = True, rules: str = 'huggingface') -> 'Tokenizer':
    """Reads a `vocab.txt`, one token per line, a SentencePiece model, `*.model`, or a model
    directory.

    Raises:
      ValueError: if there is no such file, its content is no vocabulary, or the model directory has
        another case or other rules than were asked for.
    """
    path = epath.Path(path)
    if path.is_dir():
      tokenizer = cls.from_dir(path)
      for name, asked in (('lowercase', lowercase), ('rules', rules)):
        if getattr(tokenizer, name) != asked:
          raise ValueError(
            f'{path} has a tokenizer with {name}={getattr(tokenizer, name)}, got {asked}; set '
            f'--config.data.{name}={getattr(tokenizer, name)}.'
          )
      return tokenizer
    if not path.is_file():
      raise ValueError(f'no vocabulary file {path}.')
    options = {'lowercase': lowercase, 'rules': rules, 'source': str(path)}
    if path.suffix == '.model':
      return cls(path.read_bytes(), **options)
    return cls(wordpiece.read_vocab(path), **options)

  @classmethod
  def from_dir(cls, directory, *, lowercase: bool | None = None) -> 'Tokenizer':
    """Reads what `save` or transformers wrote, and gives the ids that transformers would give.

    Rules come from `tokenizer_config.json` or, if its tokenizer_class is a generic one, from
    `tokenizer.json`; added tokens from either, or from `added_tokens.json`.

    Args:
      directory: the folder.
      lowercase: overrides do_lower_case.

    Raises:
      ValueError: if a file is missing or corrupt, or asks for what this class cannot do; names it.
    """
    directory = epath.Path(directory)
    settings = wordpiece.read_settings(directory)
    if lowercase not in (None, settings.get('do_lower_case', True)):
      settings |= {'do_lower_case': lowercase, 'strip_accents': None}
      settings.pop('keep_accents', None)
    if (directory / 'spiece.model').exists():
      sentencepiece.check_files(directory, settings)
      lowered = settings.get('do_lower_case', True)
      tokenizer = cls.from_file(directory / 'spiece.model', lowercase=lowered)
    else:
      vocab, options = wordpiece.read(directory, settings)
      if lowercase not in (None, options['lowercase']):
        raise ValueError(
          f'{directory / "tokenizer.json"} has its own normaliser, which lowers: '
          f'{options["lowercase"]}; that cannot be overridden.'
        )
      tokenizer = cls(vocab, **options)
    tokenizer.settings = {k: v for k, v in settings.items() if k not in _LOCAL}
    return tokenizer

  def save(self, directory, *, max_length: int = 0) -> None:
    """Writes the vocabulary and its settings so that `from_dir` and Hugging Face can read them.

    `vocab.txt` and `tokenizer.json`, or `spiece.model`; and `tokenizer_config.json`. Hugging Face
    knows its own rules only, whatever `rules` says.

    Args:
      directory: the folder.
      max_length: positions of the model: `model_max_length` is this, or less if the tokenizer's
        source said so. 0 = only what the source said.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = self.settings | {'do_lower_case': self.lowercase}
    settings |= self._engine.save(directory)
    settings.pop('rules', None)
    if self.rules != 'huggingface':
      settings['rules'] = self.rules
    names = zip(self.special, self._engine.special, strict=True)
    settings |= {f'{name}_token': token for name, token in names}
    if max_length:  # transformers' pipelines truncate to it, and without it to nothing
      settings['model_max_length'] = min(settings.get('model_max_length') or max_length, max_length)
    text = json.dumps(settings, indent=2, ensure_ascii=False) + '\n'
    (directory / 'tokenizer_config.json').write_text(text, encoding='utf-8')

  @property
  def vocab_size(self) -> int:
    return len(self.vocab)

  @property
  def special(self) -> dict[str, int]:
    """Ids by name: 'pad', 'unk', 'cls', 'sep', 'mask'."""
    return {name: getattr(self, f'{name}_id') for name in wordpiece.NAMES}

  @property
  def standard(self) -> bool:
    """Whether vocabulary, case and `rules` say everything: no added tokens or special rules."""
    return self.kind == 'sentencepiece' or self._engine.own is None

  @functools.cached_property
  def word_flags(self) -> np.ndarray:
    """Where words begin and end among tokens: flags of `data.words` by id, uint8 [V]."""
    return np.array([words.flags(*self.word_of(piece)) for piece in self.vocab], np.uint8)

  def word_of(self, token: str) -> tuple[str, bool]:
    """The text of an entry of the vocabulary, and whether it continues the word before it."""
    return self._engine.word_of(token)

  @property
  def fingerprint(self) -> str:
    """A hash of everything that decides the ids."""
    content = json.dumps(self._engine.identity)
    return hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()[:16]

  def encode(self, texts: Sequence[str] | str) -> list[list[int]]:
    """Maps texts to ids, without [CLS] and [SEP]; one text as a string is a list of one."""
    return self._engine.encode(self.replace_surrogates(texts))

  def encode_flat(self, texts: Sequence[str] | str) -> tuple[np.ndarray, np.ndarray]:
    """Maps texts to their ids end to end, int32, and to how many each has, int64."""
    ids = self.encode(texts)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths.sum()), lengths

  def encode_offsets(self, texts: Sequence[str] | str):
    """Maps texts to (ids, offsets): for each token its (start, end) in the text's characters."""
    return self._engine.encode_offsets(self.replace_surrogates(texts))

  def decode(self, ids: Sequence[int]) -> str:
    """Joins tokens to text; special tokens are kept."""
    return self._engine.decode(list(ids))

  def replace_surrogates(self, texts: Sequence[str] | str) -> list[str]:
    """Puts U+FFFD, which the rules drop, for each lone surrogate, and adds to `surrogates`."""
    clean = []
    for text in [texts] if isinstance(texts, str) else texts:
      if not text.isascii():
        text, count = re.subn('[\ud800-\udfff]', '\ufffd', text)
        self.surrogates += count
      clean.append(text)
    return clean

  def __call__(
    self,
    texts: Sequence[str] | str,
    pairs: Sequence[str] | str | None = None,
    length: int | None = None,
  ) -> dict[str, np.ndarray]:
    """Makes a batch: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP], padded with [PAD].

    Args:
      texts: B texts, or one as a string.
      pairs: B second texts, or one as a string, or None.
      length: L; default: the longest row's.

    Returns:
      'input_ids', 'token_type_ids' (1 on the pair and its [SEP]) and 'segment_ids' (0 = padding),
      int32 [B, L].

    Raises:
      ValueError: if the numbers differ, or a row does not fit: nothing is truncated silently.
    """
    texts, pairs = ([x] if isinstance(x, str) else x for x in (texts, pairs))
    if pairs is not None and len(pairs) != len(texts):
      raise ValueError(f'texts and pairs must be as many, got {len(texts)} and {len(pairs)}.')
    rows = list(zip(*map(self.encode, [texts] if pairs is None else [texts, pairs]), strict=True))
    sizes = [1 + sum(len(part) + 1 for part in row) for row in rows]
    longest = max(sizes, default=0)
    length = longest if length is None else length
    if longest > length:
      raise ValueError(
        f'text {sizes.index(longest)} has {longest} tokens with its special tokens, more than '
        f'length={length}; shorten it or raise length.'
      )
    return model_inputs(instances.lay_out(rows, self, length))
