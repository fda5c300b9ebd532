"""`Tokenizer`: WordPiece as in BERT, SentencePiece as in ALBERT, and any `tokenizer.json`, to the
letter; no TensorFlow.

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
import logging
import re
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers
from etils import epath

from bertjax.data import (
  instances,
  normalization,
  sentencepiece,
  tokenizer_files,
  tokenizer_json,
  wordpiece,
  words,
)
from bertjax.data.loader import model_inputs
from bertjax.data.wordpiece import SPECIAL_TOKENS

__all__ = ['SPECIAL_TOKENS', 'Tokenizer']

_log = logging.getLogger(__name__)

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
      model file. Others: a tokenizer of Hugging Face's library, as `from_dir` makes it of a
      tokenizer.json; its rules then replace `lowercase` and `rules`.
    lowercase: lower and strip accents, for "uncased" vocabularies.
    rules: 'huggingface' or 'google'; SentencePiece has only the former.
    source: name of the vocabulary in messages.
    special: of a tokenizer of Hugging Face's library, its 'pad', 'unk' and 'mask' tokens by these
      names, those that it has.

  Attributes:
    vocab: the tokens, by id; '' where an id has none.
    kind: 'wordpiece', 'sentencepiece', or the model of a tokenizer.json: 'bpe', 'unigram', ...
    template: the special tokens around a text and a pair.
    model: the bytes of the SentencePiece model; empty for others.
    settings: entries of the source's tokenizer_config.json, which `save` keeps.
    surrogates: how many lone surrogates (half characters, which no UTF-8 can hold) were replaced
      by U+FFFD in the texts seen so far.

  Raises:
    ValueError: if a vocabulary lacks a special token, the model is none, there are no such rules,
      or a tokenizer puts other special tokens around texts than an `instances.Template` has.
  """

  def __init__(
    self,
    vocab: Sequence[str] | bytes | tokenizers.Tokenizer,
    *,
    lowercase: bool = True,
    rules: str = 'huggingface',
    source: str = 'vocabulary',
    special: Mapping[str, str] | None = None,
  ):
    if rules not in normalization.RULES or (rules == 'google' and isinstance(vocab, bytes)):
      raise ValueError(
        f"rules must be 'huggingface' or, for WordPiece, 'google'; got {rules!r} for {source}."
      )
    self.lowercase, self.rules, self.surrogates, self.settings = lowercase, rules, 0, {}
    self.model, self._source = vocab if isinstance(vocab, bytes) else b'', source
    if isinstance(vocab, bytes):
      self._engine = sentencepiece.SentencePiece(vocab, lowercase, source)
    elif isinstance(vocab, tokenizers.Tokenizer):
      self._engine = tokenizer_json.TokenizerJson(vocab, dict(special or {}), source)
    else:
      self._engine = wordpiece.WordPiece(list(vocab), lowercase, rules, source)
    self.vocab, self.kind, self.template = (
      self._engine.vocab, self._engine.kind, self._engine.template
    )  # fmt: skip
    ids = {token: i for i, token in enumerate(self.vocab)}
    self.special = {name: ids[token] for name, token in self._engine.special.items()}

  @classmethod
  def from_file(cls, path, *, lowercase: bool = True, rules: str = 'huggingface') -> 'Tokenizer':
    """Reads a `vocab.txt`, one token per line, a SentencePiece model, `*.model`, a
    `tokenizer.json`, or a model directory.

    Raises:
      ValueError: if there is no such file, its content is no vocabulary, or the tokenizer.json or
        model directory has another case or other rules than were asked for.
    """
    path = epath.Path(path)
    if path.is_dir() or (path.suffix == '.json' and path.is_file()):
      if path.is_dir() or (path.parent / 'tokenizer_config.json').exists():
        tokenizer = cls.from_dir(path if path.is_dir() else path.parent)
      else:
        fast, special = tokenizer_files.read_file(path)
        lowered = tokenizer_json.lowers(fast)
        tokenizer = cls(fast, lowercase=lowered, source=str(path), special=special)
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

    BERT's rules come from `tokenizer_config.json`, those of other classes from `tokenizer.json` (or
    `vocab.json` and `merges.txt`); added tokens from either, or from `added_tokens.json`.

    Args:
      directory: the folder.
      lowercase: overrides do_lower_case.

    Raises:
      ValueError: if a file is missing or corrupt, or asks for what this class cannot do; names it.
    """
    directory = epath.Path(directory)
    settings = tokenizer_files.read_settings(directory)
    for name in ('truncation_side', 'padding_side'):
      if settings.get(name, 'right') != 'right':
        _log.warning(
          '%s: %s=%s is not supported: texts are truncated and padded on the right',
          directory / 'tokenizer_config.json', name, settings[name],
        )  # fmt: skip
    if lowercase not in (None, settings.get('do_lower_case', True)):
      settings |= {'do_lower_case': lowercase, 'strip_accents': None}
      settings.pop('keep_accents', None)
    if (directory / 'spiece.model').exists():
      sentencepiece.check_files(directory, settings)
      lowered = settings.get('do_lower_case', True)
      tokenizer = cls.from_file(directory / 'spiece.model', lowercase=lowered)
    else:
      vocab, options = tokenizer_files.read(directory, settings)
      if lowercase not in (None, options['lowercase']):
        raise ValueError(
          f'{directory / "tokenizer.json"} has its own normaliser, which lowers: '
          f'{options["lowercase"]}; that cannot be overridden.'
        )
      tokenizer = cls(vocab, **options)
    tokenizer.settings = {k: v for k, v in settings.items() if k not in _LOCAL}
    return tokenizer

  def save(self, directory, *, max_length: int = 0, token_types: bool = True) -> None:
    """Writes the vocabulary and its settings so that `from_dir` and Hugging Face can read them.

    `tokenizer.json` (WordPiece: `vocab.txt` too), or `spiece.model`; and `tokenizer_config.json`.
    Hugging Face knows its own rules only, whatever `rules` says.

    Args:
      directory: the folder.
      max_length: positions of the model: `model_max_length` is this, or less if the tokenizer's
        source said so. 0 = only what the source said.
      token_types: False for a model with fewer than two, to which transformers must give none.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = self.settings | {'do_lower_case': self.lowercase}
    kept = {name: value for name, value in settings.items() if name == 'model_input_names'}
    settings |= self._engine.save(directory) | kept
    if not token_types:
      settings['model_input_names'] = ['input_ids', 'attention_mask']
    settings.pop('rules', None)
    if self.rules != 'huggingface':
      settings['rules'] = self.rules
    settings |= {f'{name}_token': token for name, token in self._engine.special.items()}
    if max_length:  # transformers' pipelines truncate to it, and without it to nothing
      settings['model_max_length'] = min(settings.get('model_max_length') or max_length, max_length)
    text = json.dumps(settings, indent=2, ensure_ascii=False) + '\n'
    (directory / 'tokenizer_config.json').write_text(text, encoding='utf-8')

  @property
  def vocab_size(self) -> int:
    return len(self.vocab)

  def id_of(self, role: str) -> int:
    """The id of the 'pad', 'unk', 'cls', 'sep' or 'mask' token.

    Raises:
      ValueError: if the tokenizer has none.
    """
    if role not in self.special:
      raise ValueError(
        f'{self._source} has no {role} token, which this needs; name one in tokenizer_config.json '
        f'("{role}_token": "...") that is in the vocabulary.'
      )
    return self.special[role]

  pad_id = property(lambda self: self.id_of('pad'))
  unk_id = property(lambda self: self.id_of('unk'))
  cls_id = property(lambda self: self.id_of('cls'))
  sep_id = property(lambda self: self.id_of('sep'))
  mask_id = property(lambda self: self.id_of('mask'))

  @property
  def standard(self) -> bool:
    """Whether vocabulary, case and `rules` say everything: no rules of a tokenizer.json."""
    return self._engine.standard

  @property
  def spaced(self) -> bool:
    """Whether a word gets the ids of running text only with a space before it (byte-level BPE)."""
    return self._engine.spaced

  @functools.cached_property
  def word_flags(self) -> np.ndarray:
    """Where words begin and end among tokens: flags of `data.words` by id, uint8 [V].

    Raises:
      ValueError: if tokens do not show it.
    """
    return np.array([self._engine.flags(piece) for piece in self.vocab], np.uint8)

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

  def encode_words(self, words: Sequence[str]) -> list[list[int]]:
    """Maps words to their ids within a text that was split into words (each with a space before it
    where a tokenizer is `spaced`: `is_split_into_words` and `add_prefix_space` of transformers)."""
    return self.encode([f' {word}' if self.spaced else word for word in words])

  def as_running_text(self, sentences: list[str]) -> list[str]:
    """Sentences of a document with the spaces before them that a `spaced` tokenizer needs."""
    if not self.spaced:
      return sentences
    pairs = itertools.pairwise(['', *sentences])
    return [' ' * (bool(a) and words.needs_blank(a, b)) + b for a, b in pairs]

  def encode_offsets(self, texts: Sequence[str] | str, *, trim: bool = False):
    """Maps texts to (ids, offsets): for each token its (start, end) in the text's characters.

    Args:
      texts: texts, or one as a string.
      trim: moves the start of a token past its white space, which byte-level BPE may include; a
        token of white space is where the next word begins.
    """
    texts = self.replace_surrogates(texts)
    ids, offsets = self._engine.encode_offsets(texts)
    if trim and not self.standard:
      offsets = [
        [_trim(text, *span) for span in row] for text, row in zip(texts, offsets, strict=True)
      ]
    return ids, offsets

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
    """Makes a batch: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP], padded with [PAD]; with the
    special tokens and token types of `template`.

    Args:
      texts: B texts, or one as a string.
      pairs: B second texts, or one as a string, or None.
      length: L; default: the longest row's.

    Returns:
      'input_ids', 'token_type_ids' (1 on BERT's pair and its [SEP]) and 'segment_ids' (0 =
      padding), int32 [B, L].

    Raises:
      ValueError: if the numbers differ, or a row does not fit: nothing is truncated silently.
    """
    texts, pairs = ([x] if isinstance(x, str) else x for x in (texts, pairs))
    if pairs is not None and len(pairs) != len(texts):
      raise ValueError(f'texts and pairs must be as many, got {len(texts)} and {len(pairs)}.')
    rows = list(zip(*map(self.encode, [texts] if pairs is None else [texts, pairs]), strict=True))
    sizes = [sum(map(len, row)) + self.template.count(len(row)) for row in rows]
    longest = max(sizes, default=0)
    length = longest if length is None else length
    if longest > length:
      raise ValueError(
        f'text {sizes.index(longest)} has {longest} tokens with its special tokens, more than '
        f'length={length}; shorten it or raise length.'
      )
    return model_inputs(instances.lay_out(rows, self, length))


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
  while start < len(text) and text[start].isspace():
    start += 1
  return start, max(start, end)
