"""Both WordPiece tokenizers, with and without TensorFlow, against their references.

'huggingface' against transformers; 'google' against an oracle, written here from the published
rules of google-research/bert, slow and plain, with the running Python's Unicode tables.
"""

import functools
import itertools
import json
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data import normalization
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer

VOCABS = ['uncased', 'cased', 'multilingual-cased']
CJK = [
  range(0x4E00, 0xA000), range(0x3400, 0x4DC0), range(0x20000, 0x2A6E0), range(0x2A700, 0x2B740),
  range(0x2B740, 0x2B820), range(0x2B820, 0x2CEB0), range(0xF900, 0xFB00), range(0x2F800, 0x2FA20),
]  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def modules():
  """TensorFlow is imported for the tests that run, not where they are only collected."""
  global tf, tokenizer_tf
  import tensorflow as tf

  from bertjax.data import tokenizer_tf


def make_encoder(tokenizer):
  """`Tokenizer.encode` by the graph."""
  flat = tokenizer_tf.make_flat_encoder(tokenizer)

  def encode(texts):
    ids, lengths = flat(texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if texts else []

  return encode


def oracle_words(text: str, lowercase: bool) -> list[str]:
  """Google's BasicTokenizer, by its letter."""
  clean = ''
  for c in text:
    category = unicodedata.category(c)
    if c in ' \t\n\r' or category == 'Zs':
      clean += ' '
    elif c not in '\0\ufffd' and category not in ('Cc', 'Cf'):
      clean += f' {c} ' if any(ord(c) in block for block in CJK) else c
  words = []
  for token in clean.split():
    if lowercase:
      token = unicodedata.normalize('NFD', token.lower())
      token = ''.join(c for c in token if unicodedata.category(c) != 'Mn')
    for c in token:
      symbol = c.isascii() and c.isprintable() and not c.isalnum()
      if symbol or unicodedata.category(c).startswith('P'):
        words += ['', c, '']
      elif words:
        words[-1] += c
      else:
        words = [c]
    words.append('')
  return [word for word in words if word.strip()]


def oracle_pieces(word: str, ids: dict[str, int]) -> list[int]:
  """Google's WordpieceTokenizer: the longest match first."""
  if len(word) > 200:
    return [ids['[UNK]']]
  found, start = [], 0
  while start < len(word):
    prefix = '##' if start else ''
    end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in ids), None)
    if end is None:
      return [ids['[UNK]']]
    found.append(ids[prefix + word[start:end]])
    start = end
  return found


def make_oracle(tokenizer: Tokenizer):
  ids = {piece: i for i, piece in enumerate(tokenizer.vocab)}

  @functools.cache  # a space ends every word, so each distinct stretch is worked out once
  def encode_stretch(text):
    words = oracle_words(text, tokenizer.lowercase)
    return [i for word in words for i in oracle_pieces(word, ids)]

  def encode(texts):
    return [[i for part in text.split(' ') for i in encode_stretch(part)] for text in texts]

  return encode


def make_reference(tokenizer: Tokenizer, path: str):
  if tokenizer.rules == 'google':
    return make_oracle(tokenizer)
  transformers = pytest.importorskip('transformers')
  fast = transformers.BertTokenizerFast(vocab=path, do_lower_case=tokenizer.lowercase)
  return lambda texts: fast(texts, add_special_tokens=False).input_ids


LETTERS = {
  'marks': [chr(c) for c in range(0x300, 0x370)]
  + list('\u0483\u05b0\u0651\u093c\u094d\u302a\u20dd'),
  # Marks that neither rule drops, or only one, so that their canonical order shows.
  'kept marks': list('\u302e\u302f\u0903\u034f\u09be\U0001d165\U0001d166\U0001d16d\U0001d15e')
  + list('\u0344\u1ac0\u1acf\U00010efd\U0001e4ec\U0001e4ee\u0898\U00016ff0\U00011f41'),
  'joined': ['\U0001f468\u200d\U0001f469\u200d\U0001f467', '\U0001f3f3\ufe0f\u200d\U0001f308'],
  'case': ['İ', 'I', 'ı', 'i̇', 'ß', 'ẞ', 'Ǆ', 'ǅ', 'ΐ', 'ΟΔΟΣ', 'Σ', 'Σ.', "Σ'", 'ΑΣ', 'ς', 'ͅ'],
  'forms': ['ﬁ', '…', '½', '™', 'Ⅷ', '①', 'ｆｕｌｌ', '．', 'ª', 'ŉ', '한', '각']
  + list('\u212b\u2126\u037e\u1fef'),
  'cjk': ['漢', '字', '\U00020001', '\U0002b820', '\U0002ceb0', '\U00030000', '\uf900', 'か', '〇'],
  'right to left': ['\u200f', 'שלום', 'مرحبا', '\u0600', '\u06dd', '؟'],
  'controls': [chr(c) for c in (*range(33), *range(127, 161))]
  + list('\u00ad\u200b\u200d\u2028\u2029\u3000\u1680\u180e\ufeff\ufffd\ufffe\ue000\U000f0000'),
  'special': [*SPECIAL_TOKENS, '[mask]', '[', ']', '[[MASK]', '[MA', 'SK]', '##s', '[unused1]'],
  'long': [c * n for c in ('x', 'é', '\U0001f600') for n in (50, 99, 100, 101, 199, 200, 201)],
  'words': ['the', 'Hello', 'wörld', "don't", '1,000.5', 'a', '-', '—', '“', '$', '`', '~'],
}  # fmt: skip


def make_strings(count: int, seed: int) -> list[str]:
  """Mixtures of hard cases and of code points from anywhere, mostly where they are assigned."""
  rng, kinds = random.Random(seed), list(LETTERS)

  def part():
    draw = rng.random()
    if draw < 0.25:
      return ' '
    if draw < 0.45:
      limit = rng.choice((0x110000, 0x30000, 0x20000, 0x3000, 0x590))
      return chr(
        rng.choice([c for c in [rng.randrange(limit)] if not 0xD800 <= c < 0xE000] or [32])
      )
    return rng.choice(LETTERS[rng.choice(kinds)])

  return [''.join(part() for _ in range(rng.randrange(12))) for _ in range(count)]


@functools.cache
def read_lines(data_dir, step: int = 1) -> list[str]:
  """Every `step`-th line of books, WikiText-2 and GLUE, context and question of SQuAD."""
  paths = [*sorted((data_dir / 'books').iterdir()), data_dir / 'wikitext-2' / 'valid.txt']
  paths += sorted((data_dir / 'glue').glob('*/*.tsv'))
  lines = [line for path in paths for line in path.read_text(encoding='utf-8').split('\n')]
  for path in sorted((data_dir / 'squad').glob('*.json')):
    for article in json.loads(path.read_text(encoding='utf-8'))['data']:
      for paragraph in article['paragraphs']:
        lines += [paragraph['context'], *(qa['question'] for qa in paragraph['qas'])]
  return lines[::step]


def load(data_dir, name, rules):
  path = str(data_dir / 'vocab' / f'bert-base-{name}-vocab.txt')
  tokenizer = Tokenizer.from_file(path, lowercase=name == 'uncased', rules=rules)
  return tokenizer, make_reference(tokenizer, path), make_encoder(tokenizer)


def differing(texts, tokenizer, reference, twin) -> list:
  found = []
  for start in range(0, len(texts), 5000):
    part = texts[start : start + 5000]
    rows = zip(part, reference(part), tokenizer.encode(part), twin(part), strict=True)
    found += [ascii(text) for text, wanted, own, graph in rows if not wanted == own == graph]
  return found


@pytest.mark.data
@pytest.mark.parametrize(('name', 'rules'), [
  pytest.param(name, rules, marks=() if (name, rules) in (
    ('uncased', 'huggingface'), ('multilingual-cased', 'google')) else pytest.mark.full)
  for name in VOCABS for rules in normalization.RULES
])  # fmt: skip
@pytest.mark.e2e
def test_both_tokenizers_equal_the_reference_on_samples(data_dir, name, rules):
  triple = load(data_dir, name, rules)
  assert differing(read_lines(data_dir, 40), *triple) == []
  assert differing(make_strings(5_000, seed=1), *triple) == []


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize('rules', normalization.RULES)
@pytest.mark.parametrize('name', VOCABS)
def test_both_tokenizers_equal_the_reference_on_all_text_and_200_000_strings(data_dir, name, rules):
  triple, lines = load(data_dir, name, rules), read_lines(data_dir)
  assert len(lines) > 500_000
  assert differing(lines, *triple) == []
  assert differing(make_strings(200_000, seed=2), *triple) == []


def check_folds(texts, rules, lowercase):
  """The graph's words are the reference's, letter by letter."""
  fold = tokenizer_tf._make_normalizer(rules, lowercase)
  words = tf.strings.split(fold(tf.constant([text.encode() for text in texts]))).to_list()
  normalizer, splitter = normalization.word_splitter(lowercase)
  for text, found in zip(texts, words, strict=True):
    if rules == 'google':
      wanted = oracle_words(text, lowercase)
    else:
      wanted = [w for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    assert b' '.join(found).decode() == ' '.join(wanted), ascii(text)


@pytest.mark.parametrize(('lowercase', 'rules'), [
  pytest.param(True, 'google', marks=pytest.mark.stack),  # Python's tables are of another Unicode
  pytest.param(True, 'huggingface', marks=pytest.mark.full),
  pytest.param(False, 'google', marks=pytest.mark.full), (False, 'huggingface'),
])  # fmt: skip
@pytest.mark.e2e
def test_the_graph_normalises_every_code_point_as_the_reference(rules, lowercase):
  letters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
  if rules == 'huggingface':  # the normaliser gets these for special tokens, not from texts
    letters = [
      c for c in letters if not 0 <= ord(c) - normalization.MARKERS < normalization.MARKER_COUNT
    ]
  check_folds([f'a{c}b' for c in letters], rules, lowercase)


@pytest.mark.e2e
@pytest.mark.parametrize('rules', normalization.RULES)
def test_marks_come_in_canonical_order(rules):
  marks = [*LETTERS['kept marks'], '\u0301', '\u094d', '\u0900', '\u00ad', '\0', 'x', 'Σ', '한']
  check_folds([''.join(three) for three in itertools.product(marks, repeat=3)], rules, True)


PIECES = sorted({c for parts in LETTERS.values() for part in parts for c in part + part.lower()})


@functools.cache
def small_twins(rules):
  pieces = [c for c in PIECES if c.isprintable() and c != ' ']
  vocab = dict.fromkeys([*SPECIAL_TOKENS, 'the', 'hello', *pieces, *('##' + c for c in pieces)])
  tokenizers = [Tokenizer(vocab, lowercase=case, rules=rules) for case in (True, False)]
  return [(t, make_encoder(t), make_oracle(t)) for t in tokenizers]


@pytest.mark.e2e
@pytest.mark.parametrize('rules', normalization.RULES)
@given(st.lists(st.sampled_from(PIECES + LETTERS['special']) | st.characters(), max_size=20))
@settings(deadline=None, max_examples=150)
def test_tokenizers_agree_on_any_mixture_also_where_every_letter_is_a_token(rules, parts):
  texts = [''.join(parts), '', ''.join(parts[::-1])]
  for tokenizer, twin, oracle in small_twins(rules):
    wanted = tokenizer.encode(texts)
    assert twin(texts) == wanted
    if rules == 'google':
      assert oracle(tokenizer.replace_surrogates(texts)) == wanted


@pytest.mark.parametrize('rules, longest', [('huggingface', 100), ('google', 200)])
@pytest.mark.parametrize('letter', ['x', 'é', '\U0001f600'])
def test_the_longest_word_is_counted_in_characters(rules, longest, letter):
  vocab = [*SPECIAL_TOKENS, letter, f'##{letter}']
  tokenizer = Tokenizer(vocab, lowercase=False, rules=rules)
  for encode in (tokenizer.encode, make_encoder(tokenizer)):
    found = encode([letter * (longest + 1), letter * longest])
    assert found == [[1], [5] + [6] * (longest - 1)]


def test_the_graph_takes_bytes_that_are_no_utf_8_as_dropped_characters():
  tokenizer = Tokenizer([*SPECIAL_TOKENS, 'ab', 'c'])
  strings = tf.constant([b'a\xffb c', b'', b'a\xed\xa0\x80b[MASK]\xc3'])
  assert tokenizer_tf.GraphTokenizer(tokenizer)(strings).to_list() == [[5, 6], [], [5, 4]]


def test_the_graph_travels_in_a_saved_model(tmp_path):
  tokenizer = Tokenizer([*SPECIAL_TOKENS, 'a', 'uber', ','])
  graph, module = tokenizer_tf.GraphTokenizer(tokenizer), tf.Module()
  module.tokenize = tf.function(
    lambda strings: graph(strings).to_tensor(), input_signature=[tf.TensorSpec([None], tf.string)]
  )
  tf.saved_model.save(module, str(tmp_path))
  operations = {op.type for op in module.tokenize.get_concrete_function().graph.get_operations()}
  assert not {op for op in operations if 'PyFunc' in op}
  loaded = tf.saved_model.load(str(tmp_path))
  texts = ['a,Über', 'a[MASK]']
  assert loaded.tokenize(tf.constant(texts)).numpy().tolist() == [[5, 7, 6], [5, 4, 0]]
