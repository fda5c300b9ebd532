"""`Tokenizer`: rules, offsets, batches and files; `test_tokenizer_tf` holds it to references."""

import functools
import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bertjax.data import normalization, preprocess
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
def test_text_is_cleaned_normalised_and_split_and_special_tokens_are_kept(text, lowercase, ids):
  assert Tokenizer(TINY, lowercase=lowercase).encode([text]) == [ids]


def test_offsets_point_into_the_original_text(tiny):
  text = '  Wörlds\u00ad, HELLO'
  ids, offsets = tiny.encode_offsets([text])
  assert ids == tiny.encode([text])
  assert [text[a:b] for a, b in offsets[0]] == ['Wörld', 's', ',', 'HELLO']


@pytest.mark.data
@pytest.mark.parametrize('rules', normalization.RULES)
@pytest.mark.parametrize('name', ['uncased', 'cased'])
@pytest.mark.e2e
def test_offsets_spell_the_tokens_on_real_text(data_dir, real_lines, name, rules):
  path = data_dir / 'vocab' / f'bert-base-{name}-vocab.txt'
  tokenizer = Tokenizer.from_file(path, lowercase=name == 'uncased', rules=rules)
  check_offsets(tokenizer, real_lines)


@pytest.mark.parametrize('rules', normalization.RULES)
@pytest.mark.parametrize('lowercase', [True, False])
@given(st.text(st.sampled_from('aBé İßﬁ\u0301\u00ad\u200d\u302e\U0001d165字한,\n\0x\ud800')))
@settings(deadline=None, max_examples=200)
def test_offsets_spell_the_tokens_of_any_mixture(rules, lowercase, text):
  # Hugging Face's offsets are wrong where marks are reordered; ours are not.
  assume(rules == 'google' or not {'\u302e', '\U0001d165'} & set(text))
  # A letter can become several ('한' three, in NFD): their tokens share its span.
  check_offsets(letter_tokenizer(rules, lowercase), [text], lambda piece, found: piece in found)


@functools.cache
def letter_tokenizer(rules, lowercase):
  letters = 'aBbéeİißsﬁxS\u302e\U0001d165字한\u1112\u1161\u11ab,'
  vocab = [*SPECIAL_TOKENS, *letters, *('##' + c for c in letters)]
  return Tokenizer(vocab, lowercase=lowercase, rules=rules)


def check_offsets(tokenizer, texts, spells=lambda piece, found: piece == found):
  """Every token is the normalised slice of the text at its offsets."""
  fold, split = normalization.make_steps(tokenizer.rules, tokenizer.lowercase)
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
  huggingface, google = (Tokenizer(vocab, rules=rules) for rules in normalization.RULES)
  assert huggingface.encode(['[MASK] ΟΔΟΣ']) == [[4, len(TINY) + 4]]
  assert google.encode(['[MASK] ΟΔΟΣ']) == [[len(TINY) + i for i in (0, 2, 1, 3)]]
  assert huggingface.fingerprint != google.fingerprint
  with pytest.raises(ValueError, match=r"rules must be 'huggingface' or.* got 'hf'"):
    Tokenizer(vocab, rules='hf')


def test_decode_joins_tokens_and_keeps_special_ones(tiny):
  assert tiny.decode([2, 5, 11, 6, 7, 12, 4, 3]) == '[CLS] hello, worlds! [MASK] [SEP]'


def test_a_call_makes_a_padded_batch_of_pairs(tiny):
  batch = tiny(['a', 'hello world'], ['worlds', 'a'], length=8)
  assert batch['input_ids'].tolist() == [[2, 8, 3, 6, 7, 3, 0, 0], [2, 5, 6, 3, 8, 3, 0, 0]]
  assert batch['token_type_ids'].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]
  assert batch['segment_ids'].tolist() == [[1] * 6 + [0] * 2] * 2
  assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


def test_one_text_as_a_string_is_one_row(tiny):
  one, many = tiny('hello worlds', 'a'), tiny(['hello worlds'], ['a'])
  assert one['input_ids'].tolist() == many['input_ids'].tolist() == [[2, 5, 6, 7, 3, 8, 3]]
  assert tiny('hello')['input_ids'].tolist() == [[2, 5, 3]]
  assert tiny.encode('hello a') == [[5, 8]]
  assert tiny.encode_offsets('hello a') == ([[5, 8]], [[(0, 5), (6, 7)]])
  assert tiny.encode_flat('hello a')[1].tolist() == [2]
  with pytest.raises(ValueError, match='got 2 and 1'):
    tiny(['a', 'b'], 'cd')


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
    (None, r'no vocabulary file .*vocab.txt'),
  ],
)
def test_a_wrong_vocabulary_is_named(tmp_path, content, message):
  if content is not None:
    (tmp_path / 'vocab.txt').write_text(content, encoding='utf-8')
  with pytest.raises(ValueError, match=message):
    Tokenizer.from_file(tmp_path / 'vocab.txt')


FOUND = {
  'crlf': '\r\n'.join([*TINY, '']),
  'byte order mark': '\ufeff' + '\n'.join([*TINY, '']),
  'blank lines at the end': '\n'.join([*TINY, '', '', '']),
  'blank line inside': '\n'.join([*TINY[:7], '', *TINY[7:], '']),
  'emptied entries': '\n'.join([*TINY[:7], '', '  ', *TINY[9:], '']),
  'doubled entry': '\n'.join([*TINY, 'hello', 'new']),
  'doubled entry inside': '\n'.join([*TINY[:8], 'hello', *TINY[8:], '']),
  'doubled special token': '\n'.join([*TINY, '[SEP]']),
  'white space at the end of lines': '\n'.join(
    [*TINY[:5], 'hello ', 'world\t', '##s\u3000', *TINY[8:]]
  ),
  'other line separators': '\n'.join([*TINY[:5], 'a\u2028b', 'a\x85b', 'a\rb', *TINY[5:], '']),
}


@pytest.mark.parametrize('name', FOUND)
def test_a_vocabulary_as_it_is_found_has_transformers_ids_and_keeps_them(tmp_path, caplog, name):
  (tmp_path / 'vocab.txt').write_bytes(FOUND[name].encode())
  ours = Tokenizer.from_file(tmp_path / 'vocab.txt')
  text = 'Hello, worlds a world hello! new [MASK] Übung [SEP]'
  ids = ours([text])['input_ids'][0].tolist()
  ours.save(tmp_path / 'saved')
  again = Tokenizer.from_dir(tmp_path / 'saved')
  assert again.vocab == ours.vocab and again.fingerprint == ours.fingerprint
  assert Tokenizer.from_file(tmp_path / 'saved' / 'vocab.txt').vocab == ours.vocab
  assert again([text])['input_ids'][0].tolist() == ids
  assert name in ('crlf', 'other line separators') or caplog.records
  if name == 'doubled entry':
    assert (
      ours.vocab[5] == 'hello' and ids[1] == len(TINY) and "'hello' is 17, not 5" in caplog.text
    )
  transformers = pytest.importorskip('transformers')
  for folder in (tmp_path, tmp_path / 'saved'):
    assert transformers.BertTokenizer.from_pretrained(folder)(text).input_ids == ids


@pytest.mark.parametrize('rules', normalization.RULES)
@pytest.mark.e2e
def test_the_graph_and_the_library_agree_on_a_vocabulary_with_holes(rules):
  graph = pytest.importorskip('bertjax.data.tokenizer_tf')
  ours = Tokenizer([*TINY[:7], '', '', 'hello', *TINY[7:]], rules=rules)
  for text in ('hello worlds hello', 'Übung hello 字'):
    ids, _ = graph.make_flat_encoder(ours)([text])
    assert ids.tolist() == ours.encode([text])[0]


@pytest.mark.parametrize('rules', normalization.RULES)
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


BERT = {'do_lower_case': True, 'tokenizer_class': 'BertTokenizer'}
MASK_LEFT = {'__type': 'AddedToken', 'content': '[MASK]', 'lstrip': True, 'rstrip': False,
             'normalized': False, 'single_word': False, 'special': True}  # fmt: skip
TEXTS = [
  'Hello WORLD, a Übung! [MASK] hello-worlds', 'BRCA1 brca1 [P1]hello[P2] <mask> NEWTOK newtok',
  'übung 字a字 hello\u00adworld\x00s', '', ' [MASK]a [MASK]', 'a' * 101 + ' a', 'HelloWORLD a,b',
]  # fmt: skip


def write_tokenizer(folder, *, content=None, config=None, **files):
  """A folder as transformers writes one: TINY, a tokenizer.json changed by `content`, and files."""
  folder.mkdir()
  fast = Tokenizer(TINY)
  fast.save(folder)
  if content is None:
    (folder / 'tokenizer.json').unlink()
  else:
    data = json.loads((folder / 'tokenizer.json').read_text()) | content
    (folder / 'tokenizer.json').write_text(json.dumps(data))
  (folder / 'tokenizer_config.json').write_text(json.dumps(BERT | (config or {})))
  (folder / 'config.json').write_text('{"model_type": "bert", "vocab_size": 30}')
  for name, data in files.items():
    (folder / f'{name}.json').write_text(json.dumps(data))
  return folder


def added(*tokens, start=17, **flags):
  plain = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
           'special': True}  # fmt: skip
  five = [{'id': i, 'content': token} | plain for i, token in enumerate(SPECIAL_TOKENS)]
  new = [{'id': start + i, 'content': token} | plain | flags for i, token in enumerate(tokens)]
  return {'added_tokens': five + new}


WORD_PIECE = {'type': 'WordPiece', 'vocab': {'[PAD]': 0}, 'unk_token': '[UNK]',
              'continuing_subword_prefix': '##', 'max_input_chars_per_word': 100}  # fmt: skip
GENERIC = {'tokenizer_class': 'PreTrainedTokenizerFast'}
GENERIC |= {f'{name.strip("[]").lower()}_token': name for name in SPECIAL_TOKENS}
LOWER_NFC = {'type': 'Sequence', 'normalizers': [{'type': 'NFC'}, {'type': 'Lowercase'}]}
VARIANTS = {
  'added tokens in tokenizer.json': {'content': added('[P1]', '[P2]')},
  'added words that are normalised': {
    'content': added('BRCA1', 'newtok', normalized=True, special=False)
  },
  'added single words': {'content': added('BRCA1', 'NEWTOK', single_word=True, special=False)},
  'added_tokens.json beside vocab.txt': {'added_tokens': {'BRCA1': 17, '[P1]': 18}},
  'added_tokens.json with a special token': {
    'added_tokens': {'[P1]': 17}, 'special_tokens_map': {'additional_special_tokens': ['[P1]']},
  },
  'added_tokens_decoder': {
    'config': {'added_tokens_decoder': {
      str(token['id']): {k: v for k, v in token.items() if k != 'id'}
      for token in added('NEWTOK', special=False, normalized=True)['added_tokens']
    }}
  },
  'another mask token in tokenizer_config.json': {'config': {'mask_token': 'world'}},
  'another mask token that is new': {'config': {'mask_token': '<mask>'}},
  'another mask token in special_tokens_map.json': {
    'special_tokens_map': {'mask_token': {'content': '<mask>', 'lstrip': True, 'rstrip': False,
                                          'normalized': False, 'single_word': False}}
  },
  'a mask token that takes the white space before it': {'config': {'mask_token': MASK_LEFT}},
  'extra special tokens': {'config': {'additional_special_tokens': ['[P1]', '[P2]']}},
  'accents kept': {'config': {'strip_accents': False}},
  'accents stripped in a cased tokenizer': {
    'config': {'do_lower_case': False, 'strip_accents': True}
  },
  'Chinese characters not isolated': {'config': {'tokenize_chinese_chars': False}},
  'tokenizer.json and tokenizer_config.json disagree about case': {
    'content': {}, 'config': {'do_lower_case': False}
  },
  'no tokenizer_class': {'content': {}, 'config': {'tokenizer_class': None}},
  'a generic class': {'content': {}, 'config': GENERIC},
  'a generic class with another normaliser': {
    'content': {'normalizer': LOWER_NFC}, 'config': GENERIC
  },
  'a generic class without a normaliser': {'content': {'normalizer': None}, 'config': GENERIC},
  'a generic class with another pre-tokenizer': {
    'content': {'pre_tokenizer': {'type': 'WhitespaceSplit'}} | added('NEWTOK', special=False),
    'config': GENERIC,
  },
  'a generic class with a template': {
    'content': {'post_processor': {'type': 'TemplateProcessing', 'single': [
      {'SpecialToken': {'id': '[CLS]', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}},
      {'SpecialToken': {'id': '[SEP]', 'type_id': 0}}], 'pair': [
      {'SpecialToken': {'id': '[CLS]', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}},
      {'SpecialToken': {'id': '[SEP]', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}},
      {'SpecialToken': {'id': '[SEP]', 'type_id': 1}}], 'special_tokens': {
      '[CLS]': {'id': '[CLS]', 'ids': [2], 'tokens': ['[CLS]']},
      '[SEP]': {'id': '[SEP]', 'ids': [3], 'tokens': ['[SEP]']}}}},
    'config': GENERIC,
  },
}  # fmt: skip


@pytest.mark.parametrize('name', VARIANTS)
def test_rules_of_a_tokenizers_files_give_transformers_ids_and_survive_a_save(tmp_path, name):
  transformers = pytest.importorskip('transformers')
  folder = write_tokenizer(tmp_path / 'found', **VARIANTS[name])
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  Tokenizer.from_dir(folder).save(tmp_path / 'saved')
  shutil.copy(folder / 'config.json', tmp_path / 'saved')
  saved = transformers.AutoTokenizer.from_pretrained(tmp_path / 'saved')
  prints = set()
  for ours in (Tokenizer.from_dir(folder), Tokenizer.from_dir(tmp_path / 'saved')):
    prints.add(ours.fingerprint)
    ids, offsets = ours.encode_offsets(TEXTS)
    assert ids == ours.encode(TEXTS)
    for text, row, spans in zip(TEXTS, ids, offsets, strict=True):
      expected = theirs(text, return_offsets_mapping=True, add_special_tokens=False)
      assert row == expected.input_ids == saved(text, add_special_tokens=False).input_ids
      assert spans == expected.offset_mapping
      pair = ours([text], ['a [MASK]'])
      assert pair['input_ids'][0].tolist() == theirs(text, 'a [MASK]').input_ids
      assert saved(text, 'a [MASK]').token_type_ids == pair['token_type_ids'][0].tolist()
    for which in ('pad', 'unk', 'cls', 'sep', 'mask'):
      assert ours.special[which] == getattr(theirs, f'{which}_token_id')
      assert ours.special[which] == getattr(saved, f'{which}_token_id')
  assert len(prints) == 1


@pytest.mark.parametrize(
  ('variant', 'message'),
  [
    (
      {'config': {'tokenizer_class': 'RobertaTokenizer'}},
      r'tokenizer_class=RobertaTokenizer needs a tokenizer.json',
    ),
    ({'config': {'tokenizer_class': 'BertJapaneseTokenizer'}}, 'BertJapaneseTokenizer needs'),
    ({'config': GENERIC}, 'needs a tokenizer.json'),
    ({'content': {'normalizer': LOWER_NFC}}, r'normalizer=Sequence .* PreTrainedTokenizerFast'),
    ({'content': {'pre_tokenizer': {'type': 'WhitespaceSplit'}}}, 'pre_tokenizer=WhitespaceSplit'),
    (
      {'content': {'post_processor': None}, 'config': GENERIC},
      r"makes \['a'\] of a text and \['a', 'a'\] of a pair",
    ),
    ({'content': added('[P1]', start=19)}, r"'\[P1\]' has id 19 in the files and would get 17"),
    ({'added_tokens': {'[P1]': 25}}, r"'\[P1\]' has id 25 in the files and would get 17"),
    (
      {'content': {}, 'config': {'tokenizer_class': 'MPNetTokenizer', 'do_lower_case': False}},
      'normalizer.lowercase=True is not the False of tokenizer_class=MPNetTokenizer',
    ),
    ({'config': {'split_special_tokens': True}}, 'split_special_tokens=true is not supported'),
    ({'config': {'rules': 'google'}, 'added_tokens': {'[P1]': 17}}, 'rules=google allows no added'),
    ({'content': {'model': WORD_PIECE}}, 'differ in 12 tokens'),
    (
      {'tokenizer': {'model': {'type': 'BPE', 'vocab': {}}}},
      'is no tokenizer.json that can be read',
    ),
    ({'tokenizer': [1]}, 'tokenizer.json is corrupt'),
  ],
)
def test_what_a_tokenizer_cannot_do_is_refused_by_name(tmp_path, variant, message):
  folder = write_tokenizer(tmp_path / 'found', **variant)
  with pytest.raises(ValueError, match=message):
    Tokenizer.from_dir(folder)


@pytest.mark.parametrize('name', ['truncation_side', 'padding_side'])
def test_sides_other_than_the_right_are_warned_about(tmp_path, caplog, name):
  folder = write_tokenizer(tmp_path / 'found', config={name: 'left'})
  Tokenizer.from_dir(folder)
  assert f'tokenizer_config.json: {name}=left is not supported' in caplog.text


def test_a_tokenizer_with_its_own_rules_is_no_graph(tmp_path):
  graph = pytest.importorskip('bertjax.data.tokenizer_tf')
  folder = write_tokenizer(tmp_path / 'found', **VARIANTS['added tokens in tokenizer.json'])
  tokenizer = Tokenizer.from_dir(folder)
  assert not tokenizer.standard and Tokenizer(TINY).standard
  with pytest.raises(ValueError, match=r'the rules of a tokenizer.json \(wordpiece\)'):
    graph.GraphTokenizer(tokenizer)
  longest = 'ก' * 86  # as text without spaces gives, and longer than TensorFlow allows
  with pytest.raises(ValueError, match="an entry of more than 256 bytes, 'กกก"):
    graph.GraphTokenizer(Tokenizer([*TINY, longest], lowercase=False))


def test_added_tokens_reach_the_rows_that_worker_processes_encode(tmp_path):
  folder = write_tokenizer(tmp_path / 'found', **VARIANTS['added words that are normalised'])
  tokenizer = Tokenizer.from_file(folder)
  tokenizer.save(tmp_path / 'rows')
  shard = ('train', 0)
  _, tokens = preprocess.tokenize(
    str(tmp_path / 'rows'), 'prose', 0.0, 1, (shard,), ['hello newtok brca1']
  )
  [(ids, *_)] = tokens.values()
  assert ids.tolist() == tokenizer.encode('hello newtok brca1')[0] == [5, 18, 17]
  with pytest.raises(ValueError, match=r'--config\.data\.lowercase=True'):
    Tokenizer.from_file(folder, lowercase=False)


def test_settings_of_the_source_are_kept_and_the_length_is_the_models_at_most(tmp_path):
  folder = write_tokenizer(tmp_path / 'found', config={'model_max_length': 256, 'x': 1,
                                                       'name_or_path': '/home/me'})  # fmt: skip
  tokenizer = Tokenizer.from_dir(folder)
  for length, expected in ((512, 256), (128, 128), (0, 256)):
    tokenizer.save(tmp_path / 'saved', max_length=length)
    settings = json.loads((tmp_path / 'saved' / 'tokenizer_config.json').read_text())
    assert settings['model_max_length'] == expected and settings['x'] == 1
    assert 'name_or_path' not in settings
