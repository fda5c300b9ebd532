"""WordPiece as BERT uses it, with just a `vocab.txt`: an engine behind `Tokenizer`."""

import logging
import unicodedata

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bertjax.data import normalization, words
from bertjax.data.instances import Template

_log = logging.getLogger(__name__)

SPECIAL_TOKENS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
MAX_CHARS_PER_WORD = {'huggingface': 100, 'google': 200}  # longer words become [UNK]
NAMES = ('pad', 'unk', 'cls', 'sep', 'mask')


class WordPiece:
  """WordPiece by Hugging Face's library, by BERT's rules or Google's."""

  kind, standard, spaced = 'wordpiece', True, False

  def __init__(self, vocab: list[str], lowercase: bool, rules: str, source: str):
    self.vocab = _check_vocab(vocab, source)
    self.special = dict(zip(NAMES, SPECIAL_TOKENS, strict=True))
    self._lowercase, self._rules = lowercase, rules
    self._tokenizer = make_standard(self.vocab, lowercase, rules)
    ids = {token: i for i, token in enumerate(self.vocab)}
    cls, sep = (ids[self.special[name]] for name in ('cls', 'sep'))
    self.template = Template(cls, sep, (sep,))

  @property
  def identity(self) -> list:
    """Everything that decides the ids; Google's rules move with Python's Unicode tables."""
    google = ['google', unicodedata.unidata_version] if self._rules == 'google' else []
    return [self.vocab, self._lowercase, MAX_CHARS_PER_WORD[self._rules], *google]

  def encode(self, texts):
    if self._rules == 'google':
      texts = [normalization.google_normalize(text, self._lowercase) for text in texts]
    encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [item.ids for item in encoded]

  def encode_offsets(self, texts):
    google = self._rules == 'google'
    if google:
      aligned = [normalization.google_align(text, self._lowercase) for text in texts]
      texts = [text for text, _ in aligned]
    encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    offsets = [item.offsets for item in encoded]
    if google:
      rows = zip(aligned, offsets, strict=True)
      offsets = [[(at[a], at[b - 1] + 1) for a, b in spans] for (_, at), spans in rows]
    return [item.ids for item in encoded], offsets

  def decode(self, ids):
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def word_of(self, token):
    return token.removeprefix('##') or token, token.startswith('##')

  def flags(self, token):
    return words.flags(*self.word_of(token))

  def save(self, directory) -> dict:
    fast = make_standard(self.vocab, self._lowercase, 'huggingface')
    fast.model.max_input_chars_per_word = MAX_CHARS_PER_WORD[self._rules]
    add_template(fast, self.special)
    (directory / 'vocab.txt').write_text('\n'.join(self.vocab) + '\n', encoding='utf-8')
    (directory / 'tokenizer.json').write_text(fast.to_str(pretty=True), encoding='utf-8')
    return {
      'tokenizer_class': 'BertTokenizer', 'strip_accents': None, 'tokenize_chinese_chars': True
    }  # fmt: skip


def _check_vocab(vocab: list[str], source: str) -> list[str]:
  """The entries without empty ones at the end; logs duplicates and empty ones.

  Raises:
    ValueError: without the special tokens.
  """
  last = {token: i for i, token in enumerate(vocab)}
  missing = [token for token in SPECIAL_TOKENS if token not in last]
  if missing:
    raise ValueError(
      f'{source} lacks the special tokens {missing}; BERT needs {list(SPECIAL_TOKENS)}, a line '
      'each.'
    )
  twice = [i for i, token in enumerate(vocab) if token and last[token] != i]
  if twice:
    i = twice[0]
    _log.warning(
      '%s: %d entries occur again; the last one counts, as in transformers: %r is %d, not %d',
      source, len(twice), vocab[i], last[vocab[i]], i,
    )  # fmt: skip
  if empty := vocab.count(''):
    _log.warning('%s: %d empty entries, the first with id %d', source, empty, vocab.index(''))
  return vocab[: 1 + max(i for token, i in last.items() if token)]


def read_vocab(path) -> list[str]:
  """The entries of a vocab.txt by id, which is the number of the line, as transformers reads it.

  White space at the end of a line and a byte order mark are no part of an entry.
  """
  if not path.is_file():
    raise ValueError(f'no vocabulary file {path}.')
  try:
    text = path.read_bytes().decode('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is no vocabulary: it is not UTF-8 text ({error.reason}).') from error
  lines = [line.removesuffix('\r') for line in text.removeprefix('\ufeff').split('\n')]
  entries = [line.rstrip() for line in lines[:-1] if not lines[-1]] or [*map(str.rstrip, lines)]
  padded = sum(line != entry for line, entry in zip(lines, entries, strict=False))
  if text.startswith('\ufeff'):
    _log.warning('%s begins with a byte order mark, which was dropped', path)
  if padded:
    _log.warning('%s: white space at the end of %d lines was dropped', path, padded)
  return entries


def make_standard(vocab: list[str], lowercase: bool, rules: str) -> tokenizers.Tokenizer:
  """BERT's tokenizer; `vocab` are the entries by id."""
  fast = build({token: i for i, token in enumerate(vocab)}, '[UNK]', rules, lowercase=lowercase)
  if rules == 'huggingface':
    fast.add_special_tokens(list(SPECIAL_TOKENS))
  return fast


def build(ids: dict, unknown: str, rules: str, **options) -> tokenizers.Tokenizer:
  """BERT's tokenizer without special tokens; `options` are those of `BertNormalizer`."""
  longest = MAX_CHARS_PER_WORD[rules]
  model = models.WordPiece(ids, unk_token=unknown, max_input_chars_per_word=longest)
  fast = tokenizers.Tokenizer(model)
  fast.decoder = decoders.WordPiece(prefix='##')
  if rules == 'google':  # texts are normalised before
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  else:
    fast.normalizer = normalizers.BertNormalizer(clean_text=True, **options)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  return fast


def add_template(fast: tokenizers.Tokenizer, special: dict[str, str]) -> None:
  """Makes transformers put [CLS] and [SEP] around a text."""
  cls, sep = special['cls'], special['sep']
  fast.post_processor = processors.BertProcessing(
    (sep, fast.token_to_id(sep)), (cls, fast.token_to_id(cls))
  )
