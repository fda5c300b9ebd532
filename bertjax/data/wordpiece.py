"""WordPiece as BERT uses it: the engine behind `Tokenizer`, and its files as they are found.

The files of a tokenizer say the same things twice, and transformers takes each from one of them:
`read` follows it, and refuses what its versions take from different ones.
"""

import json
import logging
import unicodedata

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bertjax import io
from bertjax.data import normalization

_log = logging.getLogger(__name__)

SPECIAL_TOKENS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
MAX_CHARS_PER_WORD = {'huggingface': 100, 'google': 200}  # longer words become [UNK]
NAMES = ('pad', 'unk', 'cls', 'sep', 'mask')
# Values of tokenizer_class, without 'Fast'. For the first, transformers takes the rules from
# tokenizer_config.json and only the vocabulary and added tokens from tokenizer.json; for the
# second, it takes everything from tokenizer.json.
_BERT_CLASSES = ('BertTokenizer', 'DistilBertTokenizer', 'ElectraTokenizer')
_FLAGS = ('lstrip', 'rstrip', 'normalized', 'single_word', 'special')
_GENERIC_CLASSES = ('PreTrainedTokenizer', 'TokenizersBackend')


class WordPiece:
  """WordPiece by Hugging Face's library, by BERT's rules, Google's rules, or those of `own`."""

  kind = 'wordpiece'

  def __init__(self, vocab, lowercase, rules, source, own, special):
    self.vocab = _check_vocab(vocab, source, special)
    self.special, self.own, self._lowercase, self._rules = special, own, lowercase, rules
    self._tokenizer = own or _standard(self.vocab, lowercase, rules)

  @property
  def identity(self) -> list:
    """Everything that decides the ids; Google's rules move with Python's Unicode tables."""
    google = ['google', unicodedata.unidata_version] if self._rules == 'google' else []
    own = [rules_of(self.own), self.special] if self.own else []
    return [self.vocab, self._lowercase, MAX_CHARS_PER_WORD[self._rules], *google, *own]

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

  def save(self, directory) -> dict:
    fast, entries = self.own, self.vocab
    settings = {'tokenizer_class': 'BertTokenizer', 'strip_accents': None,
                'tokenize_chinese_chars': True}  # fmt: skip
    if fast is None:
      fast = _standard(self.vocab, self._lowercase, 'huggingface')
      fast.model.max_input_chars_per_word = MAX_CHARS_PER_WORD[self._rules]
      _add_template(fast, self.special)
    else:  # the class for which transformers takes all rules from tokenizer.json
      entries = entries[: 1 + max(fast.get_vocab(with_added_tokens=False).values())]
      settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_input_names': ['input_ids', 'token_type_ids', 'attention_mask'],
      }
    (directory / 'vocab.txt').write_text('\n'.join(entries) + '\n', encoding='utf-8')
    (directory / 'tokenizer.json').write_text(fast.to_str(pretty=True), encoding='utf-8')
    return settings


def _check_vocab(vocab: list[str], source: str, special) -> list[str]:
  """The entries without empty ones at the end; logs duplicates and empty ones.

  Raises:
    ValueError: without the special tokens.
  """
  last = {token: i for i, token in enumerate(vocab)}
  missing = [token for token in special if token not in last]
  if missing:
    raise ValueError(
      f'{source} lacks the special tokens {missing}; BERT needs {list(special)}, a line each.'
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


def _standard(vocab: list[str], lowercase: bool, rules: str) -> tokenizers.Tokenizer:
  """BERT's tokenizer; `vocab` are the entries by id."""
  fast = _build({token: i for i, token in enumerate(vocab)}, '[UNK]', rules, lowercase=lowercase)
  if rules == 'huggingface':
    fast.add_special_tokens(list(SPECIAL_TOKENS))
  return fast


def _build(ids: dict, unknown: str, rules: str, **options) -> tokenizers.Tokenizer:
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


def _add_template(fast: tokenizers.Tokenizer, special) -> None:
  """Makes transformers put [CLS] and [SEP] around a text."""
  _, _, cls, sep, _ = special
  fast.post_processor = processors.BertProcessing(
    (sep, fast.token_to_id(sep)), (cls, fast.token_to_id(cls))
  )


def rules_of(fast: tokenizers.Tokenizer) -> dict:
  """All of a tokenizer.json that decides the ids, but for the vocabulary."""
  model, parts = fast.model, {'normalizer': fast.normalizer, 'pre_tokenizer': fast.pre_tokenizer}
  rules = {name: part and json.loads(part.__getstate__()) for name, part in parts.items()}
  names = ('unk_token', 'continuing_subword_prefix', 'max_input_chars_per_word')
  rules['model'] = [getattr(model, name) for name in names]
  rules['added_tokens'] = [
    [i, token.content, *(getattr(token, flag) for flag in _FLAGS)]
    for i, token in sorted(fast.get_added_tokens_decoder().items())
  ]
  return rules


def read_json(path) -> dict:
  """A JSON object, or {} if there is no such file."""
  return io.read_json(path) if path.exists() else {}


def text_of(token) -> str:
  """The text of a special token, which files hold as a string or as an object."""
  return token['content'] if isinstance(token, dict) else token


def read_settings(directory) -> dict:
  """tokenizer_config.json, and what transformers has kept in other files.

  'tokenizer_class' is without 'Fast', and 'added_tokens_decoder' is {id: token as an object}.
  """
  path = directory / 'tokenizer_config.json'
  settings = read_json(path)
  if settings.get('split_special_tokens'):
    raise ValueError(
      f'{path}: split_special_tokens=true is not supported: special tokens in a text are '
      'kept here. Set it to false.'
    )
  added = settings.get('added_tokens_decoder')
  if added is None:
    settings |= read_json(directory / 'special_tokens_map.json')
    named = [text_of(settings.get(f'{name}_token')) for name in NAMES]
    special = {*named, *extra_tokens(settings)}
    added = {
      i: {'content': token, 'special': token in special, 'normalized': token not in special}
      for token, i in read_json(directory / 'added_tokens.json').items()
    }
    for token in read_json(directory / 'tokenizer.json').get('added_tokens', []):
      added[token['id']] = {name: value for name, value in token.items() if name != 'id'}
  settings['added_tokens_decoder'] = {int(i): added[i] for i in sorted(added, key=int)}
  sources = (settings, read_json(directory / 'config.json'), {'tokenizer_class': 'BertTokenizer'})
  name = next(filter(None, (source.get('tokenizer_class') for source in sources)))
  settings['tokenizer_class'] = name.removesuffix('Fast')
  return settings


def extra_tokens(settings: dict) -> list[str]:
  """Special tokens besides the five."""
  extra = settings.get('extra_special_tokens') or settings.get('additional_special_tokens') or []
  return [text_of(token) for token in (extra.values() if isinstance(extra, dict) else extra)]


def read(directory, settings: dict) -> tuple[list[str], dict]:
  """The vocabulary of a folder and the other arguments of `Tokenizer`.

  BertTokenizer takes the vocabulary from tokenizer.json if there is one, and its rules from
  tokenizer_config.json; a generic class takes everything from tokenizer.json.

  Args:
    directory: the folder.
    settings: what `read_settings` found in it.

  Raises:
    ValueError: if a file is missing or corrupt, or asks for what is not supported; names it.
  """
  path, vocab_file = directory / 'tokenizer.json', directory / 'vocab.txt'
  content, rules = read_json(path), settings.get('rules', 'huggingface')
  kind, name = content.get('model', {}).get('type', 'WordPiece'), settings['tokenizer_class']
  if kind != 'WordPiece':
    raise ValueError(f'{path} is a {kind} tokenizer; BERT needs WordPiece, ALBERT a spiece.model.')
  if name not in _BERT_CLASSES + _GENERIC_CLASSES:
    raise ValueError(
      f'{directory}: tokenizer_class={name} is not supported; known are '
      f'{", ".join(_BERT_CLASSES + _GENERIC_CLASSES)}, and AlbertTokenizer with a spiece.model.'
    )
  if name in _GENERIC_CLASSES and not content:
    raise ValueError(f'{directory}: tokenizer_class={name} needs a tokenizer.json.')
  lines = read_vocab(vocab_file) if vocab_file.exists() or not content else []
  if content and lines:
    _check_same_vocab(directory, lines, content, settings)
  special = special_tokens(settings, SPECIAL_TOKENS)
  if name in _GENERIC_CLASSES:
    special[1] = content['model']['unk_token']
    fast = _load_json(path, content, special)
    lowercase = fast.normalizer is not None and fast.normalizer.normalize_str('A') == 'a'
  else:
    lowercase = settings.get('do_lower_case', True)
    options = {
      'lowercase': lowercase, 'strip_accents': settings.get('strip_accents'),
      'handle_chinese_chars': settings.get('tokenize_chinese_chars') is not False,
    }  # fmt: skip
    if content:
      _check_bert_rules(path, content, special, rules, options)
    ids = content['model']['vocab'] if content else {token: i for i, token in enumerate(lines)}
    fast = _build(ids, special[1], 'huggingface', **options)
  _add_tokens(fast, directory, settings, special)
  ids = fast.get_vocab()
  vocab = lines + [''] * (1 + max(ids.values()) - len(lines))
  for token, i in ids.items():
    vocab[i] = token
  options = {'lowercase': lowercase, 'source': str(path if content else vocab_file)}
  standard = _standard(vocab, lowercase, 'huggingface')
  if special == list(SPECIAL_TOKENS) and rules_of(fast) == rules_of(standard):
    return vocab, options | {'rules': rules}
  if rules != 'huggingface':
    raise ValueError(
      f'{directory}: rules={rules} allows no added tokens and no other settings than do_lower_case.'
    )
  if fast.post_processor is None:
    _add_template(fast, special)
  return vocab, options | {'backend': fast, 'special': special}


def _load_json(path, content: dict, special) -> tokenizers.Tokenizer:
  """A tokenizer.json as it is.

  Raises:
    ValueError: if the library cannot read it, or a text does not become [CLS] A [SEP] B [SEP].
  """
  try:
    fast = tokenizers.Tokenizer.from_str(json.dumps(content))
  except Exception as error:  # the library raises bare ones
    raise ValueError(f'{path} cannot be read: {error}.') from error
  fast.no_truncation()
  fast.no_padding()
  if content['model'].get('continuing_subword_prefix', '##') != '##':
    prefix = content['model']['continuing_subword_prefix']
    raise ValueError(f'{path}: continuing_subword_prefix={prefix!r} is not supported, only "##".')
  first, second = (fast.encode(text, add_special_tokens=False).ids for text in 'ab')
  cls, sep = (fast.token_to_id(special[i]) for i in (2, 3))
  pair = fast.encode('a', 'b')
  expected = [cls, *first, sep, *second, sep], [0] * (len(first) + 2) + [1] * (len(second) + 1)
  if (pair.ids, pair.type_ids) != expected:
    raise ValueError(
      f'{path}: its post_processor makes {pair.tokens} of a pair; only {special[2]} A {special[3]} '
      f'B {special[3]} is supported.'
    )
  return fast


def _check_bert_rules(path, content: dict, special, rules: str, options: dict) -> None:
  """Raises ValueError for rules of a tokenizer.json that only some versions of transformers apply.

  With tokenizer_class=BertTokenizer, version 4 applies them and version 5 does not.
  """
  normalizer, model = content.get('normalizer') or {}, content['model']
  splitter = content.get('pre_tokenizer') or {}
  found = {
    'normalizer': (normalizer.get('type'), 'BertNormalizer'),
    'normalizer.clean_text': (normalizer.get('clean_text', True), True),
    'pre_tokenizer': (splitter.get('type'), 'BertPreTokenizer'),
    'model.max_input_chars_per_word': (
      model.get('max_input_chars_per_word', 100), MAX_CHARS_PER_WORD[rules],
    ),
  }  # fmt: skip
  for name, (value, expected) in found.items():
    if value != expected:
      raise ValueError(
        f'{path}: {name}={value} is not the {expected} of tokenizer_class=BertTokenizer, and '
        'versions of transformers differ in which they take; in tokenizer_config.json set '
        'tokenizer_class to PreTrainedTokenizerFast to apply it, or change it here.'
      )
  for name, value in options.items():
    if normalizer.get(name) != value:
      _log.warning(
        '%s: %s=%s of the normaliser is overridden by %s in tokenizer_config.json, as in '
        'transformers', path, name, normalizer.get(name), value,
      )  # fmt: skip
  if content.get('post_processor'):
    _load_json(path, content, special)


def _check_same_vocab(directory, lines: list[str], content: dict, settings: dict) -> None:
  """Raises ValueError if vocab.txt has other tokens than tokenizer.json, added ones aside."""
  ids = content['model']['vocab']
  known = ids | {token['content']: i for i, token in settings['added_tokens_decoder'].items()}
  found = {token: i for i, token in enumerate(lines) if token}
  wrong = [token for token, i in found.items() if known.get(token) != i]
  wrong += [token for token in ids if token and token not in found]
  if wrong:
    token = wrong[0]
    raise ValueError(
      f'{directory}: vocab.txt and tokenizer.json differ in {len(wrong)} tokens, first in '
      f'{token!r} (id {found.get(token)} and {ids.get(token)}); transformers reads tokenizer.json. '
      'Delete the file that is wrong.'
    )


def special_tokens(settings: dict, default) -> list[str]:
  """The names of the padding, unknown, [CLS], [SEP] and mask tokens."""
  named = zip(NAMES, default, strict=True)
  return [text_of(settings.get(f'{name}_token') or token) for name, token in named]


def _add_tokens(fast: tokenizers.Tokenizer, directory, settings: dict, special) -> None:
  """Adds the tokens that the files name, in transformers' order.

  Raises:
    ValueError: if a token gets another id than the files say, or one that is taken.
  """
  added, named = settings['added_tokens_decoder'], {*special, *extra_tokens(settings)}
  known = {token.content for token in fast.get_added_tokens_decoder().values()}
  tokens = [*added.values(), *(settings.get(f'{name}_token') or '' for name in NAMES)]
  tokens += [*special, *extra_tokens(settings)]
  for token in tokens:
    if (text := text_of(token)) and text not in known:
      known.add(text)
      flags = token if isinstance(token, dict) else {}
      flags = {name: flags[name] for name in _FLAGS if name in flags}
      is_special = text in named or flags.get('special', False)
      fast.add_tokens([tokenizers.AddedToken(text, **flags | {'special': is_special})])
  for i, token in added.items():
    if fast.token_to_id(token['content']) != i:
      raise ValueError(
        f'{directory}: the added token {token["content"]!r} has id {i} in the files and would get '
        f'{fast.token_to_id(token["content"])}; correct its id.'
      )
  ids = fast.get_vocab()
  if len(set(ids.values())) < len(ids):
    raise ValueError(f'{directory}: added tokens have ids of other tokens; correct their ids.')
