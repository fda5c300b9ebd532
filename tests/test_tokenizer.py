"""`Tokenizer` against transformers on real text, its TensorFlow twin, and its own rules."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data import tokenizer as tokenizer_lib
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer

WORDS = ['hello', 'world', '##s', 'a', '##a', '##b', ',', '!', "'", 'ubung', 'Hello', '字']
TINY = [*SPECIAL_TOKENS, *WORDS]  # [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, hello 5, ...


@pytest.fixture
def tiny():
  return Tokenizer(TINY)


def make_twin(tokenizer):
  from bertjax.data import graph_tokenizer

  return graph_tokenizer.make_encoder(tokenizer)


@pytest.fixture(scope='module')
def real_lines(data_dir) -> list[str]:
  """Lines of every book, WikiText-2, SQuAD's contexts and GLUE's sentences, about 2 MB."""
  lines = (data_dir / 'wikitext-2' / 'valid.txt').read_text(encoding='utf-8').splitlines()
  for path in sorted((data_dir / 'books').iterdir()):
    book = path.read_text(encoding='utf-8').splitlines()
    lines += book[:50] + [line for line in book if not line.isascii()][:10]
  for path in sorted((data_dir / 'squad').glob('dev*.json')):
    for article in json.loads(path.read_text(encoding='utf-8'))['data']:
      lines += [paragraph['context'] for paragraph in article['paragraphs']]
  for path in sorted((data_dir / 'glue').glob('*/dev.tsv')):
    lines += [field for line in path.open(encoding='utf-8') for field in line.split('\t')[-3:]]
  assert len(lines) > 15_000
  return lines


@pytest.mark.data
@pytest.mark.parametrize('name', ['uncased', 'cased', 'multilingual-cased'])
def test_ids_equal_transformers_and_the_graph_twin_s_on_real_text(data_dir, real_lines, name):
  transformers = pytest.importorskip('transformers')
  path, lowercase = str(data_dir / 'vocab' / f'bert-base-{name}-vocab.txt'), name == 'uncased'
  tokenizer = Tokenizer.from_file(path, lowercase=lowercase)
  ids = tokenizer.encode(real_lines)
  reference = transformers.BertTokenizerFast(vocab=path, do_lower_case=lowercase)
  assert reference.vocab_size == tokenizer.vocab_size > 20_000
  assert reference(real_lines, add_special_tokens=False).input_ids == ids
  twin = make_twin(tokenizer)(real_lines)
  assert [line for line, a, b in zip(real_lines, ids, twin, strict=True) if a != b] == []


@pytest.mark.parametrize('lowercase', [True, False])
def test_graph_twin_treats_every_character_of_unicode_3_2_alike(lowercase):
  import tensorflow as tf

  from bertjax.data import graph_tokenizer

  twin = graph_tokenizer.GraphTokenizer(Tokenizer(TINY, lowercase=lowercase))
  normalizer, splitter = tokenizer_lib.word_splitter(lowercase)
  moved = '\u166d\u1734\u1885\u1886'  # of another category in a later Unicode
  category = unicodedata.ucd_3_2_0.category
  letters = [c for c in map(chr, range(0x110000)) if category(c) not in ('Cn', 'Cs', 'Co')]
  texts = [f'a{letter}b' for letter in letters if letter not in moved]
  assert len(texts) > 90_000
  split = tf.strings.split(twin.normalize(tf.constant([text.encode() for text in texts])))
  for text, words in zip(texts, split.to_list(), strict=True):
    wanted = splitter.pre_tokenize_str(normalizer.normalize_str(text))
    assert [word.decode() for word in words] == [word for word, _ in wanted], text.encode()


LETTERS = (
  'aBe1 .,-[]#\t\n\0\x0b\x85\u2028\u3000\u00ad\u200d\ufeff\ufffd\u0301ΣσςİıßﬁǅÉ…½™漢字한Я\U0002b820'
)


@pytest.fixture(scope='module')
def twins():
  letters = {c for c in LETTERS + LETTERS.lower() if c.isprintable() and c not in ' ,'}
  entries = dict.fromkeys([*TINY, *sorted(letters), *('##' + c for c in sorted(letters))])
  tokenizers = [Tokenizer(entries, lowercase=lowercase) for lowercase in (True, False)]
  return [(tokenizer.encode, make_twin(tokenizer)) for tokenizer in tokenizers]


@given(st.lists(st.sampled_from([*LETTERS, *SPECIAL_TOKENS, '[mask]', 'the', 'x' * 60])))
@settings(deadline=None, max_examples=150)
def test_graph_twin_gives_the_same_ids_on_any_mixture(twins, parts):
  for encode, twin in twins:
    assert twin([''.join(parts), '']) == encode([''.join(parts), ''])


@pytest.mark.parametrize('letter', ['x', 'é', '\U0001f600'])
def test_a_word_of_101_characters_is_unknown_and_one_of_100_is_not(letter):
  tokenizer = Tokenizer([*TINY, letter, f'##{letter}'], lowercase=False)
  for encode in (tokenizer.encode, make_twin(tokenizer)):
    assert encode([letter * 101, letter * 100]) == [[1], [len(TINY)] + [len(TINY) + 1] * 99]


@pytest.mark.parametrize(
  'text, lowercase, ids',
  [
    ('HELLO\u00ad\0, Wörlds!', True, [5, 11, 6, 7, 12]),
    ('Hello hello übung', False, [15, 5, 1]),
    ('Übung', True, [14]),
    ('a字a', True, [8, 16, 8]),
    ('a [MASK],[SEP]', True, [8, 4, 11, 3]),
    ('[mask] worlda', True, [1, 1, 1, 6, 9]),
  ],
)
def test_text_is_cleaned_folded_and_split_and_special_tokens_stay_whole(text, lowercase, ids):
  assert Tokenizer(TINY, lowercase=lowercase).encode([text]) == [ids]


def test_offsets_point_into_the_original_text(tiny):
  text = '  Wörlds\u00ad, HELLO'
  ids, offsets = tiny.encode_offsets([text])
  assert ids == tiny.encode([text])
  assert [text[a:b] for a, b in offsets[0]] == ['Wörld', 's', ',', 'HELLO']


@pytest.mark.data
def test_offsets_spell_the_pieces_on_real_text(data_dir, real_lines):
  path = data_dir / 'vocab' / 'bert-base-cased-vocab.txt'
  tokenizer, lines = Tokenizer.from_file(path, lowercase=False), real_lines[::10]
  for line, ids, offsets in zip(lines, *tokenizer.encode_offsets(lines), strict=True):
    for token, (start, end) in zip(ids, offsets, strict=True):
      assert tokenizer.vocab[token] in ('[UNK]', line[start:end], '##' + line[start:end])


def test_decode_joins_pieces_and_keeps_special_tokens(tiny):
  assert tiny.decode([2, 5, 11, 6, 7, 12, 4, 3]) == '[CLS] hello, worlds! [MASK] [SEP]'


def test_a_call_makes_a_padded_batch_of_pairs(tiny):
  batch = tiny(['a', 'hello world'], ['worlds', 'a'], length=8)
  assert batch['input_ids'].tolist() == [[2, 8, 3, 6, 7, 3, 0, 0], [2, 5, 6, 3, 8, 3, 0, 0]]
  assert batch['token_type_ids'].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]
  assert batch['segment_ids'].tolist() == [[1] * 6 + [0] * 2] * 2
  assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


def test_a_call_pads_to_the_longest_row_and_refuses_a_smaller_length(tiny):
  batch = tiny(['a', 'a a a'])
  assert batch['input_ids'].tolist() == [[2, 8, 3, 0, 0], [2, 8, 8, 8, 3]]
  assert not batch['token_type_ids'].any()
  with pytest.raises(ValueError, match=r'text 1 has 5 tokens .* more than length=4'):
    tiny(['a', 'a a a'], length=4)
  with pytest.raises(ValueError, match='got 2 and 1'):
    tiny(['a', 'b'], ['c'])


@pytest.mark.parametrize(
  'content, message',
  [
    ('[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n', r"vocab.txt lacks the special tokens \['\[MASK\]'\]"),
    ('\n'.join([*TINY, 'hello']), r"vocab.txt, line 18: 'hello' twice"),
    ('\n'.join([*TINY, '', 'b']), 'vocab.txt, line 18: empty entry'),
    (None, r'no vocabulary file .*vocab.txt'),
  ],
)
def test_a_wrong_vocabulary_is_named_with_the_line(tmp_path, content, message):
  if content is not None:
    (tmp_path / 'vocab.txt').write_text(content, encoding='utf-8')
  with pytest.raises(ValueError, match=message):
    Tokenizer.from_file(tmp_path / 'vocab.txt')


def test_windows_line_ends_are_no_part_of_a_piece(tmp_path):
  (tmp_path / 'vocab.txt').write_bytes('\r\n'.join([*TINY, '']).encode())
  assert Tokenizer.from_file(tmp_path / 'vocab.txt').vocab == TINY


@pytest.mark.parametrize('lowercase', [True, False])
def test_save_and_from_dir_keep_the_vocabulary_and_the_case(tmp_path, lowercase):
  saved = Tokenizer(TINY, lowercase=lowercase)
  saved.save(tmp_path)
  loaded = Tokenizer.from_dir(tmp_path)
  assert (loaded.vocab, loaded.lowercase) == (TINY, lowercase)
  assert loaded.fingerprint == saved.fingerprint != Tokenizer(TINY[:-1]).fingerprint
  assert loaded.fingerprint != Tokenizer(TINY, lowercase=not lowercase).fingerprint


@pytest.mark.parametrize('lowercase', [True, False])
def test_transformers_reads_what_we_save_and_we_read_what_it_saves(tmp_path, lowercase):
  transformers = pytest.importorskip('transformers')
  ours = Tokenizer(TINY, lowercase=lowercase)
  ours.save(tmp_path / 'ours')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'ours')
  batch = ours(['Hello, [MASK] Übung!'], ['a'])
  assert theirs('Hello, [MASK] Übung!', 'a').input_ids == batch['input_ids'][0].tolist()
  theirs.save_pretrained(tmp_path / 'theirs')
  again = Tokenizer.from_dir(tmp_path / 'theirs')
  assert (again.vocab, again.lowercase) == (TINY, lowercase)


def test_a_hugging_face_tokenizer_of_another_kind_is_refused(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{"model": {"type": "Unigram", "vocab": []}}')
  with pytest.raises(ValueError, match=r'tokenizer.json is a Unigram tokenizer'):
    Tokenizer.from_dir(tmp_path)
