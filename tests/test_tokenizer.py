"""`Tokenizer`: rules, offsets, batches and files; `test_graph_tokenizer` holds it to references."""

import functools
import json
import pickle

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bertjax.data import folding
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer

WORDS = ['hello', 'world', '##s', 'a', '##a', '##b', ',', '!', "'", 'ubung', 'Hello', '字']
TINY = [*SPECIAL_TOKENS, *WORDS]  # [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, hello 5, ...


@pytest.fixture
def tiny():
  return Tokenizer(TINY)


@pytest.fixture(scope='module')
def real_lines(data_dir) -> list[str]:
  """Lines of WikiText-2, SQuAD and every book, many of them not ASCII."""
  lines = (data_dir / 'wikitext-2' / 'valid.txt').read_text(encoding='utf-8').splitlines()[::10]
  for path in sorted((data_dir / 'books').iterdir()):
    book = path.read_text(encoding='utf-8').splitlines()
    lines += book[:9] + [line for line in book if not line.isascii()][:10]
  for path in sorted((data_dir / 'squad').glob('dev-v1*.json')):
    for article in json.loads(path.read_text(encoding='utf-8'))['data']:
      lines += [paragraph['context'] for paragraph in article['paragraphs'][::3]]
  assert len(lines) > 2_000
  return lines


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
@pytest.mark.parametrize('rules', folding.RULES)
@pytest.mark.parametrize('name', ['uncased', 'cased'])
def test_offsets_spell_the_pieces_on_real_text(data_dir, real_lines, name, rules):
  path = data_dir / 'vocab' / f'bert-base-{name}-vocab.txt'
  tokenizer = Tokenizer.from_file(path, lowercase=name == 'uncased', rules=rules)
  check_offsets(tokenizer, real_lines)


@pytest.mark.parametrize('rules', folding.RULES)
@pytest.mark.parametrize('lowercase', [True, False])
@given(st.text(st.sampled_from('aBé İßﬁ\u0301\u00ad\u200d\u302e\U0001d165字한,\n\0x\ud800')))
@settings(deadline=None, max_examples=200)
def test_offsets_spell_the_pieces_of_any_mixture(rules, lowercase, text):
  # Hugging Face's library tells wrong places where marks change theirs; ours does not.
  assume(rules == 'google' or not {'\u302e', '\U0001d165'} & set(text))
  # A letter can become several ('한' three, in NFD): their pieces share its span.
  check_offsets(letter_tokenizer(rules, lowercase), [text], lambda piece, found: piece in found)


@functools.cache
def letter_tokenizer(rules, lowercase):
  letters = 'aBbéeİißsﬁxS\u302e\U0001d165字한\u1112\u1161\u11ab,'
  vocab = [*SPECIAL_TOKENS, *letters, *('##' + c for c in letters)]
  return Tokenizer(vocab, lowercase=lowercase, rules=rules)


def check_offsets(tokenizer, texts, spells=lambda piece, found: piece == found):
  """Every piece is the folded slice of the text that its offsets tell."""
  fold, split = folding.make_steps(tokenizer.rules, tokenizer.lowercase)
  ids, offsets = tokenizer.encode_offsets(texts)
  assert ids == tokenizer.encode(texts)
  for text, row, spans in zip(tokenizer.replace_surrogates(texts), ids, offsets, strict=True):
    for token, (start, end) in zip(row, spans, strict=True):
      piece = tokenizer.vocab[token].removeprefix('##')
      found = split(fold(text[start:end])).strip()
      assert piece == '[UNK]' or spells(piece, found), (ascii(text), start, end)


def test_a_worker_process_gets_the_same_tokenizer(tiny):
  assert pickle.loads(pickle.dumps(tiny)).encode(['hello world']) == tiny.encode(['hello world'])


def test_lone_surrogates_are_dropped_and_counted(tiny):
  texts = ['hel\ud800lo', 'a\udfff \udfff', 'a']
  assert tiny.encode(texts) == [[5], [8], [8]]
  assert tiny.surrogates == 3
  assert tiny.encode_offsets(texts[:1])[1] == [[(0, 6)]]


def test_rules_differ_in_special_tokens_and_in_the_final_sigma():
  vocab = [*TINY, '[', ']', 'mask', 'οδος', 'οδοσ']
  huggingface, google = (Tokenizer(vocab, rules=rules) for rules in folding.RULES)
  assert huggingface.encode(['[MASK] ΟΔΟΣ']) == [[4, len(TINY) + 4]]
  assert google.encode(['[MASK] ΟΔΟΣ']) == [[len(TINY) + i for i in (0, 2, 1, 3)]]
  assert huggingface.fingerprint != google.fingerprint
  with pytest.raises(ValueError, match=r"rules must be 'huggingface' or.* got 'hf'"):
    Tokenizer(vocab, rules='hf')


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


@pytest.mark.parametrize('rules', folding.RULES)
@pytest.mark.parametrize('lowercase', [True, False])
def test_save_and_from_dir_keep_vocabulary_case_and_rules(tmp_path, lowercase, rules):
  saved = Tokenizer(TINY, lowercase=lowercase, rules=rules)
  saved.save(tmp_path)
  loaded = Tokenizer.from_dir(tmp_path)
  assert (loaded.vocab, loaded.lowercase, loaded.rules) == (TINY, lowercase, rules)
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


@pytest.mark.parametrize('changes', [{'strip_accents': False}, {'tokenize_chinese_chars': False}])
def test_rules_that_are_not_berts_are_refused(tmp_path, changes):
  Tokenizer(TINY).save(tmp_path)
  path = tmp_path / 'tokenizer_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(ValueError, match=f'{next(iter(changes))}=False is no rule of BERT here'):
    Tokenizer.from_dir(tmp_path)


def test_a_hugging_face_tokenizer_of_another_kind_is_refused(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{"model": {"type": "Unigram", "vocab": []}}')
  with pytest.raises(ValueError, match=r'tokenizer.json is a Unigram tokenizer'):
    Tokenizer.from_dir(tmp_path)
