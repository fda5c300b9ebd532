"""A folder's tokenizer: tokenizer.json, or the files that transformers wrote before it.

The files say some things twice, and transformers takes each from one of them: `read` follows it,
and refuses what its versions take from different ones.
"""

import json
import logging
import re

import tokenizers
from tokenizers import models

from bertjax import io
from bertjax.data import tokenizer_json, wordpiece
from bertjax.data.instances import Template
from bertjax.data.tokenizer_json import ROBERTA
from bertjax.data.wordpiece import MAX_CHARS_PER_WORD, NAMES, SPECIAL_TOKENS

_log = logging.getLogger(__name__)

# Values of tokenizer_class, without 'Fast', for which transformers takes the rules of WordPiece
# from tokenizer_config.json, and only the vocabulary and added tokens from tokenizer.json.
_BERT_CLASSES = ('BertTokenizer', 'DistilBertTokenizer', 'ElectraTokenizer')
_ROBERTA_CLASSES = ('RobertaTokenizer', 'BartTokenizer', 'LongformerTokenizer')
# Those whose normaliser is what SentencePiece's model file has, or none.
_UNIGRAM_CLASSES = ('XLMRobertaTokenizer', 'CamembertTokenizer')
_FLAGS = ('lstrip', 'rstrip', 'normalized', 'single_word', 'special')
_COMPONENTS = ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder')
# Special tokens that a file without roles is searched for.
_KNOWN = {name: (f'[{name.upper()}]', f'<{name}>') for name in ('pad', 'unk', 'mask')}


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
  content = read_json(directory / 'tokenizer.json')
  if added is None:
    settings |= read_json(directory / 'special_tokens_map.json')
    named = [text_of(settings.get(f'{name}_token')) for name in NAMES]
    special = {*named, *extra_tokens(settings)}
    added = {
      i: {'content': token, 'special': token in special, 'normalized': token not in special}
      for token, i in read_json(directory / 'added_tokens.json').items()
    }
    for token in content.get('added_tokens', []):
      added[token['id']] = {name: value for name, value in token.items() if name != 'id'}
  settings['added_tokens_decoder'] = {int(i): added[i] for i in sorted(added, key=int)}
  config = read_json(directory / 'config.json')
  plain = content and not path.exists() and 'model_type' not in config
  plain = plain and not (directory / 'spiece.model').exists()  # nothing but a tokenizer.json
  bert = config.get('model_type', 'bert') in ('bert', 'distilbert', 'electra') and not plain
  default = {'tokenizer_class': 'BertTokenizer' if bert else 'PreTrainedTokenizer'}
  if not content and (directory / 'vocab.json').exists():
    default = {'tokenizer_class': 'RobertaTokenizer'}
  name = next(filter(None, (s.get('tokenizer_class') for s in (settings, config, default))))
  settings['tokenizer_class'] = name.removesuffix('Fast')
  return settings


def extra_tokens(settings: dict) -> list[str]:
  """Special tokens besides the five."""
  extra = settings.get('extra_special_tokens') or settings.get('additional_special_tokens') or []
  return [text_of(token) for token in (extra.values() if isinstance(extra, dict) else extra)]


def special_tokens(settings: dict, default) -> list[str]:
  """The names of the padding, unknown, [CLS], [SEP] and mask tokens."""
  named = zip(NAMES, default, strict=True)
  return [text_of(settings.get(f'{name}_token') or token) for name, token in named]


def read(directory, settings: dict) -> tuple[list[str] | tokenizers.Tokenizer, dict]:
  """The vocabulary or tokenizer of a folder, and the other arguments of `Tokenizer`.

  BertTokenizer takes the vocabulary from tokenizer.json if there is one, and its rules from
  tokenizer_config.json; other classes take everything from tokenizer.json, or vocab.json and
  merges.txt.

  Args:
    directory: the folder.
    settings: what `read_settings` found in it.

  Raises:
    ValueError: if a file is missing or corrupt, or asks for what is not supported; names it.
  """
  path, vocab_file = directory / 'tokenizer.json', directory / 'vocab.txt'
  content, rules = read_json(path), settings.get('rules', 'huggingface')
  fast = load(path, content) if content else _read_roberta(directory, settings)
  word_piece, lines = fast is None or isinstance(fast.model, models.WordPiece), []
  if word_piece and (vocab_file.exists() or not content):
    lines = wordpiece.read_vocab(vocab_file)
  if content and lines:
    _check_same_vocab(directory, lines, content, settings)
  if word_piece and settings['tokenizer_class'] in _BERT_CLASSES:
    special = dict(zip(NAMES, special_tokens(settings, SPECIAL_TOKENS), strict=True))
    fast = _build_bert(path, fast, content, lines, settings, special)
    lowercase = settings.get('do_lower_case', True)
  else:
    special = _find_roles(fast, settings)
    _check_prefix_space(path, fast, settings)
    _check_normalizer(path, content, settings)
    lowercase = tokenizer_json.lowers(fast)
  _add_tokens(fast, directory, settings, special)
  if fast.post_processor is None and settings['tokenizer_class'] in _BERT_CLASSES:
    wordpiece.add_template(fast, special)
  options = {'lowercase': lowercase, 'source': str(path if content else vocab_file)}
  if word_piece and tuple(special.values()) == SPECIAL_TOKENS:
    ids = fast.get_vocab()
    vocab = lines + [''] * (1 + max(ids.values()) - len(lines))
    for token, i in ids.items():
      vocab[i] = token
    standard = wordpiece.make_standard(vocab, lowercase, 'huggingface')
    sep = ids['[SEP]']
    same = tokenizer_json.find_template(fast, path) == Template(ids['[CLS]'], sep, (sep,))
    if same and tokenizer_json.rules_of(fast) == tokenizer_json.rules_of(standard):
      return vocab, options | {'rules': rules}
  if rules != 'huggingface':
    raise ValueError(
      f'{directory}: rules={rules} allows no added tokens and no other settings than do_lower_case.'
    )
  return fast, options | {'special': special}


def read_file(path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """A tokenizer.json on its own, and its special tokens by role."""
  fast = load(path, io.read_json(path))
  return fast, _find_roles(fast, {})


def load(path, content: dict) -> tokenizers.Tokenizer:
  """A tokenizer.json as it is, without truncation and padding.

  Raises:
    ValueError: if the library cannot read it; names the component that it does not know.
  """

  def make(content):
    return tokenizers.Tokenizer.from_str(json.dumps(content))

  try:
    fast = make(content)
  except Exception as error:  # the library raises bare ones
    for name in _COMPONENTS:
      try:
        make(content | {name: None})
      except Exception:
        continue
      kinds = ', '.join(dict.fromkeys(re.findall('"type": "(.*?)"', json.dumps(content[name]))))
      raise ValueError(
        f'{path}: tokenizers {tokenizers.__version__} cannot read its {name} ({kinds}); install a '
        'version that knows it, or correct the file.'
      ) from error
    raise ValueError(f'{path} is no tokenizer.json that can be read: {error}.') from error
  fast.no_truncation()
  fast.no_padding()
  return fast


def _read_roberta(directory, settings: dict) -> tokenizers.Tokenizer | None:
  """RoBERTa's tokenizer of vocab.json and merges.txt; None if they are not there.

  Raises:
    ValueError: if there is none, and no vocab.txt that could be read without a tokenizer.json.
  """
  vocab, merges = directory / 'vocab.json', directory / 'merges.txt'
  name = settings['tokenizer_class']
  if name in _ROBERTA_CLASSES and vocab.exists() and merges.exists():
    try:
      fast = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:
      raise ValueError(f'{vocab} and {merges.name} cannot be read: {error}.') from error
    named = {role: text_of(settings.get(f'{role}_token') or t) for role, t in ROBERTA.items()}
    tokenizer_json.make_byte_level(fast, named, settings.get('add_prefix_space', False))
    return fast
  if name not in _BERT_CLASSES:
    raise ValueError(
      f'{directory}: tokenizer_class={name} needs a tokenizer.json; load and save the tokenizer '
      'with transformers once, which writes it.'
    )
  return None


def _build_bert(path, fast, content, lines, settings: dict, special) -> tokenizers.Tokenizer:
  """BERT's tokenizer by the rules of tokenizer_config.json."""
  options = _bert_options(settings)
  if content:
    _check_bert_rules(path, content, settings.get('rules', 'huggingface'), options)
  ids = content['model']['vocab'] if content else {token: i for i, token in enumerate(lines)}
  bert = wordpiece.build(ids, special['unk'], 'huggingface', **options)
  if fast is not None and fast.post_processor is not None:
    bert.post_processor = fast.post_processor
  return bert


def _find_roles(fast: tokenizers.Tokenizer, settings: dict) -> dict[str, str]:
  """Special tokens by role: those of tokenizer_config.json, the model's own, or known names."""
  special, ids, model = {}, fast.get_vocab(), json.loads(fast.to_str())['model']
  unknown = model.get('unk_token')
  if model.get('unk_id') is not None:
    unknown = model['vocab'][model['unk_id']][0]
  for name in NAMES:
    known = next((token for token in _KNOWN.get(name, ()) if token in ids), None)
    token = text_of(settings.get(f'{name}_token', known))
    if token := (unknown if name == 'unk' else None) or token:
      special[name] = token
  return special


def _check_prefix_space(path, fast: tokenizers.Tokenizer, settings: dict) -> None:
  """Raises ValueError if tokenizer_config.json has another add_prefix_space than byte-level BPE."""
  rules = json.dumps(json.loads(fast.to_str())['pre_tokenizer'])
  found = re.search('"type": "ByteLevel", "add_prefix_space": (true|false)', rules)
  default = False if settings['tokenizer_class'] in _ROBERTA_CLASSES else None
  wanted = settings.get('add_prefix_space', default)
  if found and wanted is not None and wanted != (found[1] == 'true'):
    raise ValueError(
      f'{path}: add_prefix_space={found[1]} in its pre_tokenizer is not the {str(wanted).lower()} '
      'of tokenizer_config.json, and versions of transformers differ in which they take; make them '
      'equal.'
    )


def _check_normalizer(path, content: dict, settings: dict) -> None:
  """Raises ValueError for a normaliser of tokenizer.json that transformers makes another of.

  RoBERTa's class has none, those of Unigram the one of SentencePiece's model file, and MPNet's that
  of BERT by tokenizer_config.json.
  """
  name, normalizer = settings['tokenizer_class'], content.get('normalizer') or {}
  kinds = {part.get('type') for part in normalizer.get('normalizers', [normalizer])}
  found = {}
  if name in _ROBERTA_CLASSES:
    found['normalizer'] = (normalizer.get('type'), None)
  elif name in _UNIGRAM_CLASSES and not kinds <= {None, 'Precompiled', 'Strip', 'Replace'}:
    found['normalizer'] = (normalizer.get('type'), 'Precompiled')
  elif name == 'MPNetTokenizer':
    found['normalizer'] = (normalizer.get('type'), 'BertNormalizer')
    for key, value in {'clean_text': True, **_bert_options(settings)}.items():
      found[f'normalizer.{key}'] = (normalizer.get(key), value)
  _check_equal(path, name, found)


def _check_equal(path, name: str, found: dict[str, tuple]) -> None:
  """Raises ValueError for the first part of which tokenizer_class=`name` has another value.

  `found` is {part: (value in tokenizer.json, value of the class)}.
  """
  for part, (value, expected) in found.items():
    if value != expected:
      raise ValueError(
        f'{path}: {part}={value} is not the {expected} of tokenizer_class={name}, and versions of '
        'transformers differ in which they take; in tokenizer_config.json set tokenizer_class to '
        'PreTrainedTokenizerFast to apply it, or make the two equal.'
      )


def _bert_options(settings: dict) -> dict:
  """The options of BERT's normaliser in tokenizer_config.json."""
  return {
    'lowercase': settings.get('do_lower_case', True),
    'strip_accents': settings.get('strip_accents'),
    'handle_chinese_chars': settings.get('tokenize_chinese_chars') is not False,
  }


def _check_bert_rules(path, content: dict, rules: str, options: dict) -> None:
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
  _check_equal(path, 'BertTokenizer', found)
  for name, value in options.items():
    if normalizer.get(name) != value:
      _log.warning(
        '%s: %s=%s of the normaliser is overridden by %s in tokenizer_config.json, as in '
        'transformers', path, name, normalizer.get(name), value,
      )  # fmt: skip


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


def _add_tokens(fast: tokenizers.Tokenizer, directory, settings: dict, special: dict) -> None:
  """Adds the tokens that the files name, in transformers' order.

  Raises:
    ValueError: if a token gets another id than the files say, or one that is taken.
  """
  added, named = settings['added_tokens_decoder'], {*special.values(), *extra_tokens(settings)}
  known = {token.content for token in fast.get_added_tokens_decoder().values()}
  tokens = [*added.values(), *(settings.get(f'{name}_token') or '' for name in NAMES)]
  tokens += [*special.values(), *extra_tokens(settings)]
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
