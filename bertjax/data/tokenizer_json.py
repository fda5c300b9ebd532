"""A tokenizer of Hugging Face's library (byte-level BPE, Unigram, WordPiece, ...): an engine behind
`Tokenizer`.

The template of pairs and where words begin are asked of the tokenizer itself. `tokenizer_files`
reads it from a folder.
"""

import functools
import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from bertjax.data import words
from bertjax.data.instances import Template
from bertjax.data.wordpiece import NAMES

# RoBERTa's special tokens, by id.
ROBERTA = {'cls': '<s>', 'pad': '<pad>', 'sep': '</s>', 'unk': '<unk>', 'mask': '<mask>'}
_COMPONENTS = ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder')
_SPACE = '\u2581'  # of SentencePiece


class TokenizerJson:
  """A tokenizer of Hugging Face's library as `Tokenizer` needs it.

  Args:
    fast: the tokenizer.
    special: {role: token}; [CLS] and [SEP] are those of its template.
    source: its name in messages.

  Attributes:
    spaced: whether a word in running text needs a space before it to get the ids that it has there,
      as in byte-level BPE.
  """

  standard = False

  def __init__(self, fast: tokenizers.Tokenizer, special: dict[str, str], source: str):
    self._tokenizer, self._source = fast, source
    ids = fast.get_vocab()
    self.vocab = [''] * (1 + max(ids.values(), default=-1))
    for token, i in ids.items():
      self.vocab[i] = token
    self.template = find_template(fast, source)
    ends = {'cls': self.template.first, 'sep': self.template.last}
    special = special | {name: self.vocab[i] for name, i in ends.items()}
    self.special = {name: special[name] for name in NAMES if name in special}
    self.kind = type(fast.model).__name__.lower()
    self.spaced, self._mark = encode_one(fast, 'a') != encode_one(fast, ' a'), _word_mark(fast)
    self._added = {token.content for token in fast.get_added_tokens_decoder().values()}

  @property
  def identity(self) -> list:
    """Everything that decides the ids."""
    return [rules_of(self._tokenizer), self.template, self.special]

  def encode(self, texts):
    return [item.ids for item in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

  def encode_offsets(self, texts):
    encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [item.ids for item in encoded], [item.offsets for item in encoded]

  def decode(self, ids):
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def word_of(self, token):
    if token in self._added:
      return token, False
    kind, mark = self._mark
    if kind == 'bytes':
      raw = _to_bytes(token)
      text = raw.decode(errors='replace')
      return text.lstrip(), not (text[:1].isspace() or not raw)
    if kind == 'space':
      text = token.removeprefix(mark)
      return text, text == token
    if kind == 'inner':
      return token.removeprefix(mark) or token, bool(mark) and token.startswith(mark)
    if kind == 'end':
      return token.removesuffix(mark) or token, True
    raise ValueError(
      f'the tokens of {self._source} do not show where words begin, which masks of whole words and '
      "tags of words need; mask single tokens (masking.unit='subword')."
    )

  def flags(self, token):
    """As `words.flags`; no word ends within a character that byte-level BPE splits."""
    text, continues = self.word_of(token)
    kind, mark = self._mark
    if kind == 'bytes' and text.endswith('\ufffd') and token not in self._added:
      return words.flags(_complete(_to_bytes(token)).lstrip(), continues) & ~words.ENDS
    ends = kind == 'end' and token.endswith(mark)
    return words.flags(text, continues) | words.ENDS * ends

  def save(self, directory) -> dict:
    (directory / 'tokenizer.json').write_text(self._tokenizer.to_str(pretty=True), encoding='utf-8')
    if self.kind == 'wordpiece':
      size = self._tokenizer.get_vocab_size(with_added_tokens=False)
      text = '\n'.join(self.vocab[:size]) + '\n'
      (directory / 'vocab.txt').write_text(text, encoding='utf-8')
    types = ['token_type_ids'] * (self.template.shared is not None)
    return {  # the class for which transformers takes all rules from tokenizer.json
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'model_input_names': ['input_ids', *types, 'attention_mask'],
    }


def encode_one(fast: tokenizers.Tokenizer, text: str) -> list[int]:
  return fast.encode(text, add_special_tokens=False).ids


def find_template(fast: tokenizers.Tokenizer, source) -> Template:
  """The special tokens that a tokenizer puts around a text and a pair.

  Raises:
    ValueError: if they are no `Template`.
  """
  single, pair = fast.encode('a'), fast.encode('a', 'a')
  middle = [n for n, text in enumerate(pair.sequence_ids) if text is None][1:-1]
  types, text = pair.type_ids, encode_one(fast, 'a')
  shared = sum(types[n] == 0 for n in middle) if any(types) else None
  ids = [pair.ids[n] for n in middle]
  template = Template(pair.ids[0], pair.ids[-1], tuple(ids), shared)
  row = [template.first, *text, *ids, *text, template.last]
  start = len(row) if shared is None else 1 + len(text) + shared
  found = single.ids, any(single.type_ids), pair.ids, types
  one, two = [template.first, *text, template.last], [n >= start for n in range(len(row))]
  if found != (one, False, row, two) or not ids:
    raise ValueError(
      f'{source}: its post_processor makes {single.tokens} of a text and {pair.tokens} of a pair, '
      f'with token types {types}; what is supported is one special token before a text, one or '
      'more between two texts, and one after.'
    )
  return template


def _word_mark(fast: tokenizers.Tokenizer) -> tuple[str, str]:
  """How tokens show where words begin: ('bytes', ''), ('space', '▁'), ('inner', '##'), ('end',
  '</w>') or ('', '') if they do not."""
  content = json.loads(fast.to_str())
  parts = json.dumps([content[name] for name in _COMPONENTS], ensure_ascii=False)
  if '"ByteLevel"' in parts:
    return 'bytes', ''
  if _SPACE in parts:
    return 'space', _SPACE
  model = content['model']
  if isinstance(fast.model, (models.WordPiece, models.WordLevel)) or model.get(
    'continuing_subword_prefix'
  ):
    return 'inner', model.get('continuing_subword_prefix') or ''
  suffix = model.get('end_of_word_suffix') or ''
  return ('end' if suffix else '', suffix)


@functools.cache
def _byte_of() -> dict[str, int]:
  """Bytes by the letters that stand for them in byte-level BPE (Radford et al. 2019): those of
  Latin-1 that are visible for themselves, the rest from U+0100 on."""
  visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = [byte for byte in range(256) if byte not in visible]
  return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}


def _to_bytes(token: str) -> bytes:
  table = _byte_of()
  return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()


def _complete(raw: bytes) -> str:
  """Decodes a token that may end within a character, which is then another one of the same kind: a
  letter of a script without spaces, punctuation, or U+FFFD."""
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    if error.reason != 'unexpected end of data':
      return raw.decode(errors='replace')
    tail = raw[error.start :]
    missing = 2 + (tail[0] >= 0xE0) + (tail[0] >= 0xF0) - len(tail)
    low, high = ((tail + fill * missing).decode(errors='replace') for fill in (b'\xa0', b'\xbf'))
    alone = words.flags(low, True) and words.flags(high, True)
    return raw[: error.start].decode() + (high if alone else '\ufffd')


def rules_of(fast: tokenizers.Tokenizer) -> dict:
  """All of a tokenizer.json that decides the ids of a text."""
  content = json.loads(fast.to_str())
  return {name: content[name] for name in ('added_tokens', 'normalizer', 'pre_tokenizer', 'model')}


def lowers(fast: tokenizers.Tokenizer) -> bool:
  """Whether the tokenizer lowers the case of texts."""
  return fast.normalizer is not None and fast.normalizer.normalize_str('A') == 'a'


def make_byte_level(
  fast: tokenizers.Tokenizer, special: dict[str, str], space: bool = False
) -> None:
  """Gives a BPE model the rules of RoBERTa: bytes, and <s> A </s></s> B </s>.

  Args:
    fast: the model's tokenizer.
    special: {role: token}, in the order in which missing ones are added.
    space: puts a space before a text.
  """
  fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
  fast.decoder = decoders.ByteLevel()
  for role, token in special.items():  # <mask> takes the space before it
    fast.add_special_tokens([tokenizers.AddedToken(token, lstrip=role == 'mask')])
  ends = ((special[role], fast.token_to_id(special[role])) for role in ('sep', 'cls'))
  fast.post_processor = processors.RobertaProcessing(
    *ends, trim_offsets=True, add_prefix_space=space
  )
