"""Words in every script: in a text, among tokens, and as masks, tags and fills use them."""

import functools

import jax
import numpy as np
import pytest

from bertjax.data import words
from bertjax.data import words as words_lib
from bertjax.data.sentencepiece import train_sentencepiece
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from bertjax.inference import mlm
from bertjax.inference.predictor import Predictor
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from tests import chinese


@functools.cache
def spiece() -> Tokenizer:
  latin = ['we use Python and (jax) here, the code is open', 'Python jax code, it is not ours'] * 40
  mixed = ['我们用Python写程序，也用jax。', '他说：“jax很快。”'] * 40
  return Tokenizer(train_sentencepiece([*chinese.documents(60), *latin, *mixed], 500))


@functools.cache
def characters() -> Tokenizer:
  """WordPiece with a Chinese alphabet and a few English words."""
  letters = sorted(set(''.join(chinese.documents(60)).replace('\n', '')))
  return Tokenizer([*SPECIAL_TOKENS, *letters, 'play', '##ing', 'the', 'dog', 'a', '##a', ',', '.'])


def spelt(text, spans):
  return [text[a:b] for a, b in spans]


@pytest.mark.parametrize(
  'text, expected',
  [
    ('EU rejects German call.', ['EU', 'rejects', 'German', 'call', '.']),
    ('(The U.S. said: "no".)', ['(', 'The', 'U.S.', 'said', ':', '"', 'no', '"', '.', ')']),
    (
      "J. Smith 's top-ten 1996-08-22 ...",
      ['J.', 'Smith', "'s", 'top-ten', '1996-08-22', '...'],
    ),
    (
      "England's (the U.S.'s) O’Neill’s; I'm, didn't.",
      [
        'England',
        "'s",
        '(',
        'the',
        'U.S.',
        "'s",
        ')',
        'O’Neill',
        '’s',
        ';',
        'I',
        "'m",
        ',',
        'did',
        "n't",
        '.',
      ],
    ),
    ("L'OR rock'n'roll 'S", ["L'OR", "rock'n'roll", "'S"]),
    ('+44 .500 US$ -- 3,000', ['+44', '.500', 'US$', '--', '3,000']),
    ('我用Python写，很快！', ['我', '用', 'Python', '写', '，', '很', '快', '！']),
    ('他说：“好……”', ['他', '说', '：', '“', '好', '…', '…', '”']),
    ('これはペンです。', ['こ', 'れ', 'は', 'ペ', 'ン', 'で', 'す', '。']),
    ('สวัสดี ครับ', ['ส', 'วั', 'ส', 'ดี', 'ค', 'รั', 'บ']),
    ('나는 학교에 갔다.', ['나는', '학교에', '갔다', '.']),
    ('Он сказал: «Да».', ['Он', 'сказал', ':', '«', 'Да', '»', '.']),
    ('', []),
    (' \n', []),
  ],
)
def test_words_of_a_text(text, expected):
  assert spelt(text, words.split(text)) == expected
  assert spelt(text, words.split(text, 'spaces')) == text.split()


def test_words_of_conll_2003_are_found_again_in_its_text(data_dir):
  from bertjax.tasks.tagging import read_conll

  found = total = 0
  for _, item in read_conll(data_dir / 'conll2003' / 'eng.testa'):
    text = ' '.join(item.texts)
    assert spelt(text, words.split(text, 'spaces')) == list(item.texts)
    ends = np.cumsum([len(word) + 1 for word in item.texts]).tolist()
    own = {(end - len(word) - 1, end - 1) for word, end in zip(item.texts, ends, strict=True)}
    found, total = found + len(own & set(words.split(text))), total + len(own)
  assert total > 50_000 and found / total > 0.995


def test_words_of_conll_2003_are_found_again_in_plain_text(data_dir):
  """Also where the words are printed as usual: "England's", "(Lyon)"."""
  from benchmarks.tag_text import plain_text
  from bertjax.objectives.entities import entities
  from bertjax.tasks.tagging import read_conll

  kept, found = [], []
  for _, item in read_conll(data_dir / 'conll2003' / 'eng.testa'):
    text, places = plain_text(item.texts)
    split = words.split(text)
    found += [place in split for place in places]
    starts, ends = map(set, zip(*split, strict=True))
    kept += [
      places[a][0] in starts and places[b - 1][1] in ends for _, a, b in entities(item.label)
    ]
  assert len(kept) == 5942
  assert np.mean(found) > 0.99 and np.mean(kept) > 0.995


def words_of(tokenizer, text):
  [ids], [offsets] = tokenizer.encode_offsets([text])
  spans = [(offsets[a][0], offsets[b - 1][1]) for a, b in mlm.words_of(tokenizer, ids)]
  return spelt(text, spans)


def test_words_among_sentencepiece_tokens_end_at_han_and_punctuation():
  tokenizer = spiece()
  text = '我们用Python写程序，也用jax。'
  found = words_of(tokenizer, text)
  assert ''.join(found) == text
  assert 'Python' in found and 'jax' in found and '，' in found and '。' in found
  assert all(len(word) <= 4 for word in found if word != 'Python')  # no clause is a word
  assert words_of(tokenizer, 'the (jax) code, it is') == [
    'the',
    '(',
    'jax',
    ')',
    'code',
    ',',
    'it',
    'is',
  ]


@pytest.mark.parametrize('make', [spiece, characters])
def test_each_word_of_chinese_is_at_most_a_token(make):
  tokenizer = make()
  for text in chinese.documents(20, seed=1):
    [ids] = tokenizer.encode([text])
    sizes = [b - a for a, b in mlm.words_of(tokenizer, ids)]
    blank = [tokenizer.vocab[i] == '▁' for i in ids]
    assert len(sizes) >= len(ids) - sum(blank)


def test_wordpiece_words_are_as_before():
  tokenizer = characters()
  flags = tokenizer.word_flags & words.BEGINS
  assert [p for p, f in zip(tokenizer.vocab, flags, strict=True) if not f] == ['##ing', '##a']


def stub(tokenizer, *heads, labels=2, **fields) -> Predictor:
  """A random tiny model around a tokenizer."""
  config = EncoderConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=1, mlp_size=16,
    max_positions=64, initializer_range=0.3, **fields,
  )  # fmt: skip
  bert = Bert(config, heads=heads, pooler=False, num_labels=labels)
  params = jax.device_get(jax.jit(init_params, static_argnums=0)(bert, jax.random.key(0)))
  return Predictor(bert, params, tokenizer, batch_size=4)


def prefer(predictor, token):
  """Makes a token the masked-LM head's choice for every mask."""
  params = dict(predictor.runner.params)
  bias = np.array(params['mlm']['bias'])
  bias[predictor.tokenizer.vocab.index(token)] = 1e4
  params['mlm'] = params['mlm'] | {'bias': bias}
  predictor.runner.params = params
  return predictor


@pytest.mark.parametrize(
  'text, token, expected',
  [
    ('我爱[MASK]京。', '北', '我爱北京。'),
    ('他 [MASK]  北京 ，很好', '在', '他 在  北京 ，很好'),
    ('The  DOG, [MASK] !', 'the', 'The  DOG, the !'),
    ('He was play [MASK]  here.', '##ing', 'He was playing  here.'),
    ('the[MASK]here', 'dog', 'the dog here'),
    ('北京[MASK]人', 'dog', '北京dog人'),
    ('[MASK][MASK]', 'dog', 'dog dog'),
  ],
)
@pytest.mark.e2e
def test_a_filled_text_is_the_original_outside_of_the_mask(text, token, expected):
  predictor = prefer(stub(characters(), 'mlm'), token)
  fill = predictor.fill_mask(text, top_k=1)[0][0]
  assert fill.token == token
  assert predictor.infill(text) == expected
  if text.count('[MASK]') == 1:
    assert fill.text == expected
  else:
    assert fill.text == 'dog[MASK]'


def test_sentencepiece_fills_keep_the_spacing_too():
  latin = next(p for p in spiece().vocab if p[0] == '▁' and p[1:].isascii() and p[1:].isalpha())
  for token in (latin, '。'):
    predictor, word = prefer(stub(spiece(), 'mlm'), token), token.strip('▁')
    assert predictor.infill('We  use [MASK] , here') == f'We  use {word} , here'
    assert predictor.infill('我们用[MASK]，') == f'我们用{word}，'


def test_corrections_of_chinese_sentencepiece_text_are_single_tokens():
  predictor = stub(spiece(), 'mlm')
  text = '我们用Python写程序，也用jax。'
  found = predictor.correct(text, ratio=1e-9, top_k=3)
  assert len(found) >= 6
  for item in found:
    assert text[item.start : item.end] == item.word and item.word.isalpha() and len(item.word) <= 6


def tagger(labels):
  """A tagger that tags every word of a text with the last label."""
  predictor = stub(characters(), 'tagging', labels=len(labels))
  bias = np.zeros(len(labels), np.float32)
  bias[-1] = 1e4
  params = dict(predictor.runner.params)
  params['tagging'] = params['tagging'] | {'bias': bias}
  return Predictor(predictor.model, params, predictor.tokenizer, labels=labels, batch_size=4)


def test_the_word_rule_of_tag_is_an_option():
  predictor = tagger(['O', 'B-X'])
  text = 'EU rejects the U.S. call.'

  def found(**options):
    return [span.text for span in predictor.tag(text, **options)]

  assert found() == ['EU', 'rejects', 'the', 'U.S.', 'call', '.']
  assert found(words='spaces') == ['EU', 'rejects', 'the', 'U.S.', 'call.']
  assert found(words='tokens') == ['EU', 'rejects', 'the', 'U', '.', 'S', '.', 'call', '.']
  with pytest.raises(ValueError, match=r"words must be one of .* got 'word'"):
    predictor.tag(text, words='word')
  assert [s.text for s in predictor.tag('我在北京。')] == list('我在北京。')
  assert [s.text for s in predictor.tag([['U.S.', '北京', 'a b']])[0]] == ['U.S.', '北京', 'a b']
  assert predictor.tag([[*'我在北京。']]) == predictor.tag(['我在北京。'])


@pytest.mark.parametrize(
  ('parts', 'text'),
  [
    (['EU', 'rejects', '.'], 'EU rejects .'),
    ([*'我在北京，', '2008', '年', '。'], '我在北京，2008年。'),
    (['我', '用', 'deep', 'learning', '写'], '我用deep learning写'),
    (['ฉัน', 'รัก'], 'ฉันรัก'),
    (['나는', '간다'], '나는 간다'),
    (['', 'a', ''], ' a '),
    ([], ''),
  ],
)
def test_words_are_joined_as_their_script_does(parts, text):
  found, spans = words.join(parts)
  assert found == text and [found[a:b] for a, b in spans] == parts


@pytest.mark.parametrize('stray', ['[PAD]', 'X', '[CLS]', '<pad>'])
def test_one_label_that_is_no_bio_tag_does_not_tear_the_spans(stray):
  predictor = tagger(['O', stray, 'B-LOC', 'I-LOC'])
  [span] = predictor.tag('北京市')
  assert (span.label, span.text) == ('LOC', '北京市')
  spans = tagger(['O', 'B-LOC', 'I-LOC', stray]).tag('北京')
  assert [(s.label, s.text) for s in spans] == ([('X', '北京')] if stray == 'X' else [])


@pytest.mark.parametrize(
  'chunk, words',
  [('word--', 1), ("l'été", 1), ('中国，人民', 4), ('用Python3写的。', 4), ('これはペン', 5),
   ('、。', 1), ('한국어는', 1), ('«Да!»', 1), ('ภาษาไทย', 1)],
)  # fmt: skip
def test_words_are_those_of_the_language(chunk, words):
  assert words_lib.count_words(chunk) == words
