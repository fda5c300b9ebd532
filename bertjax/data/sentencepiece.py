"""SentencePiece as ALBERT uses it: training unigram models, and the engine behind `Tokenizer`.

Before the model's own normalisation ALBERT turns `` and '' into " and, if uncased, drops accents
and lowers; letter by letter and by the tables of the `tokenizers` library, as Hugging Face does.
"""

import collections
import functools
import hashlib
import io
import itertools
import re
from collections.abc import Collection, Iterable, Iterator

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers

from bertjax.data import normalization, words
from bertjax.data.instances import Template
from bertjax.data.tokenizer_files import extra_tokens, read_json, special_tokens
from bertjax.data.wordpiece import NAMES

SPECIAL_PIECES = ('<pad>', '<unk>', '[CLS]', '[SEP]', '[MASK]')  # ALBERT's names and ids
_MAX_LINE = 1000  # characters; SentencePiece's trainer leaves lines of over 4,192 bytes out
_PARTS = re.compile(rf'(?=\S).{{1,{_MAX_LINE}}}(?!\S)|\S{{{_MAX_LINE}}}')  # split at white space


def train_sentencepiece(
  texts: Iterable[str], size: int, *, lowercase: bool = True, sentences: int = 10_000_000,
  coverage: float = 0.9995,
) -> bytes:  # fmt: skip
  """Trains a unigram model of exactly `size` tokens; the same texts give the same bytes.

  Args:
    texts: documents, of any length.
    size: tokens, special ones included.
    lowercase: lower and strip accents first, as the uncased tokenizer will.
    sentences: lines to learn from at most, over 100; of more, always the same random sample.
    coverage: fraction of the text that consists of characters in the vocabulary, from 0.98 to 1;
      the rarest ones become <unk>. See `coverage_for`.

  Returns:
    The content of a `spiece.model`.

  Raises:
    ValueError: if there is no text, or it does not suit the size.
  """
  if sentences <= 100:
    raise ValueError(f'sentences must be over 100, got {sentences}.')
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_lines(texts, lowercase),
      model_writer=model,
      model_type='unigram',
      vocab_size=size,
      pad_id=0,
      unk_id=1,
      bos_id=-1,
      eos_id=-1,
      pad_piece=SPECIAL_PIECES[0],
      unk_piece=SPECIAL_PIECES[1],
      control_symbols=list(SPECIAL_PIECES[2:]),
      character_coverage=coverage,
      input_sentence_size=sentences,
      shuffle_input_sentence=True,
      num_threads=16,  # sums depend on how many there are, so never on the machine
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = re.sub(r'^.*\] *| or decrease character_coverage.*', '', str(error))
    reason = reason or 'it holds no text'
    raise ValueError(f'no SentencePiece model of {size} tokens from this text: {reason}') from error
  return model.getvalue()


def count_characters(texts: Iterable[str], lowercase: bool = True) -> collections.Counter:
  """Counts the characters of texts as the trainer does."""
  counts = collections.Counter()
  normalizer = sentencepiece.SentencePieceNormalizer(rule_name='nmt_nfkc')
  for line in _lines(texts, lowercase):
    counts.update(normalizer.normalize(line))
  return counts


def coverage_for(counts: dict[str, int], kept: Collection[str]) -> float:
  """The `coverage` at which the trainer keeps these characters, the most frequent of `counts`."""
  least = sum(counts[c] for c in kept) - min(map(counts.get, kept), default=0) / 2
  return max(0.98, least / max(sum(counts.values()), 1)) if len(kept) < len(counts) else 1.0


def _lines(texts: Iterable[str], lowercase: bool) -> Iterator[str]:
  normalizer = normalization.albert_normalizer(lowercase)
  for text in texts:
    for line in text.splitlines():
      line = _normalize(line, normalizer, lowercase)
      yield from [line] if len(line) <= _MAX_LINE else _PARTS.findall(line)


class SentencePiece:
  """A model file as `Tokenizer` needs it; special tokens in the text are kept.

  Raises:
    ValueError: if the content is no model or lacks ALBERT's special tokens.
  """

  kind, standard, spaced = 'sentencepiece', True, False

  def __init__(self, model: bytes, lowercase: bool, source: str):
    self.model, self._lowercase = model, lowercase
    self.special = dict(zip(NAMES, SPECIAL_PIECES, strict=True))
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise ValueError(f'{source} is no SentencePiece model.') from error
    self.vocab = self._processor.id_to_piece(list(range(self._processor.get_piece_size())))
    missing = sorted(set(SPECIAL_PIECES) - set(self.vocab))
    if missing:
      raise ValueError(
        f'{source} lacks the special tokens {missing}; ALBERT has {list(SPECIAL_PIECES)}: '
        'train with `bertjax vocab --kind=sentencepiece`, which adds them.'
      )
    self._ids = {piece: self.vocab.index(piece) for piece in SPECIAL_PIECES}
    sep = self._ids['[SEP]']
    self.template = Template(self._ids['[CLS]'], sep, (sep,))
    self._split = re.compile('(' + '|'.join(map(re.escape, SPECIAL_PIECES)) + ')').split
    self._normalizer = normalization.albert_normalizer(lowercase)

  @property
  def identity(self) -> list:
    """Everything that decides the ids."""
    return ['sentencepiece', hashlib.sha256(self.model).hexdigest(), self._lowercase]

  def encode(self, texts):
    parts = [self._split(text) for text in texts]
    plain = [
      _normalize(part, self._normalizer, self._lowercase) for row in parts for part in row[::2]
    ]
    plain = iter(self._processor.encode(plain))
    return [
      [i for p, part in enumerate(row) for i in ([self._ids[part]] if p % 2 else next(plain))]
      for row in parts
    ]

  def encode_offsets(self, texts):
    rows = [self._encode_row(text) for text in texts]
    return [ids for ids, _ in rows], [offsets for _, offsets in rows]

  def _encode_row(self, text):
    ids, offsets, start = [], [], 0
    for p, part in enumerate(self._split(text)):
      if p % 2:
        ids.append(self._ids[part])
        offsets.append((start, start + len(part)))
      else:
        normalized = self._normalizer.normalize_str(part)
        spans = [*_aligner(self._lowercase).encode(part).offsets, (len(part), len(part))]
        encoded = self._processor.encode(normalized, return_type='offset_mapping')
        ids += encoded['ids']
        offsets += [_trim(text, start, spans, a, b) for a, b in encoded['offsets']]
      start += len(part)
    return ids, offsets

  def decode(self, ids):
    parts, special = [], set(self._ids.values())
    for is_special, run in itertools.groupby(ids, special.__contains__):
      run = list(run)
      parts += [self.vocab[i] for i in run] if is_special else [self._processor.decode(run)]
    return ' '.join(parts)

  def word_of(self, token):
    text = token.removeprefix('\u2581')
    return text, text == token and token not in self._ids

  def flags(self, token):
    return words.flags(*self.word_of(token))

  def save(self, directory) -> dict:
    (directory / 'spiece.model').write_bytes(self.model)
    return {'tokenizer_class': 'AlbertTokenizer', 'keep_accents': not self._lowercase}


def check_files(directory, settings: dict) -> None:
  """Raises ValueError for what a SentencePiece tokenizer cannot do here."""
  path, name = directory / 'tokenizer_config.json', settings['tokenizer_class']
  if name not in ('AlbertTokenizer', 'BertTokenizer'):
    raise ValueError(
      f'{path}: tokenizer_class={name} is not supported with a spiece.model, only AlbertTokenizer.'
    )
  lowercase = settings.get('do_lower_case', True)
  if settings.get('keep_accents', not lowercase) == lowercase:
    raise ValueError(
      f'{path}: accents must be dropped if and only if the text is lowered, '
      f'got keep_accents and do_lower_case both {lowercase}.'
    )
  for option in ('remove_space', 'add_prefix_space'):
    if not settings.get(option, True):
      raise ValueError(f'{path}: {option}=false is not supported with a spiece.model.')
  special = special_tokens(settings, SPECIAL_PIECES)
  added = [token['content'] for token in settings['added_tokens_decoder'].values()]
  other = sorted({*special, *added, *extra_tokens(settings)} - set(SPECIAL_PIECES))
  if other or special != list(SPECIAL_PIECES):
    raise ValueError(
      f"{directory}: a spiece.model takes no tokens besides ALBERT's {list(SPECIAL_PIECES)}, got "
      f'{other or special}.'
    )
  model = read_json(directory / 'tokenizer.json').get('model')
  if model:
    source = directory / 'spiece.model'
    pieces = SentencePiece(source.read_bytes(), lowercase, str(source)).vocab
    if model.get('type') != 'Unigram' or pieces != [piece for piece, _ in model['vocab']]:
      raise ValueError(
        f'{source} and tokenizer.json hold different vocabularies, of which transformers reads the '
        'latter; delete the wrong one.'
      )


def _trim(text, start, spans, a, b):
  """Maps a token's normalized span to the text, without leading white space."""
  begin, end = start + spans[a][0], start + (spans[b - 1][1] if b > a else spans[a][0])
  while begin < end and text[begin].isspace():
    begin += 1
  return begin, end


def _normalize(text: str, normalizer, lowercase: bool) -> str:
  if not text.isascii():
    return normalizer.normalize_str(text)
  for quote in normalization.QUOTES:
    text = text.replace(quote, '"')
  return text.lower() if lowercase else text


@functools.cache
def _aligner(lowercase: bool) -> tokenizers.Tokenizer:
  """Splits a normalized text into characters, whose offsets only Hugging Face's encodings have."""
  aligner = tokenizers.Tokenizer(models.WordLevel({'': 0}, unk_token=''))
  aligner.normalizer = normalization.albert_normalizer(lowercase)
  aligner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
  return aligner
