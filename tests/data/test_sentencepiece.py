"""SentencePiece behind `Tokenizer`: training, ids, offsets, files and the TensorFlow graph."""

import hashlib
import json
import pickle
import random
import time

import numpy as np
import pytest
import sentencepiece

from bertjax.data import sentencepiece as sentencepiece_lib
from bertjax.data.sentencepiece import SPECIAL_PIECES, train_sentencepiece
from bertjax.data.tokenizer import Tokenizer

HARD = [
  'Hello, [MASK] world!', '[MASK][SEP] a[MASK]b <pad>', '', ' ', '  two  spaces ', '[mask] <PAD>',
  "``quoted'' text", 'Wörld naïve \ufb01ne ½ ™', 'ΟΔΟΣ İstanbul', '漢字 かな 한국어',
  'x\u00ad\0\ufffd\u200d', '\U0001f468\u200d\U0001f469 \U000f0000 \U000f0005',
  'מים مرحبا', 'a\u0301\u0327', 'long' * 80,
  'a\x85b', '\x85 next\x85line\x85',
]  # fmt: skip


MIXED = 2000


@pytest.fixture(scope='module', params=[True, False], ids=['lower', 'keep'])
def tokenizer(request, documents):
  model = train_sentencepiece(documents, 800, lowercase=request.param)
  return Tokenizer(model, lowercase=request.param)


def make_texts(documents) -> list[str]:
  """Lines of the documents, the hard cases, and mixtures of both."""
  rng = random.Random(0)
  lines = [line for text in documents for line in text.splitlines()]
  parts = [part for text in HARD for part in (text, *text)]
  mixed = [''.join(rng.choices(parts, k=6)) + rng.choice(lines)[:30] for _ in range(MIXED)]
  return lines + HARD + mixed


def test_two_trainings_give_the_same_bytes_and_the_size_asked_for(documents):
  first, second = (train_sentencepiece(iter(documents), 500) for _ in range(2))
  assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
  tokenizer = Tokenizer(first)
  assert tokenizer.vocab_size == 500
  assert tokenizer.vocab[:5] == list(SPECIAL_PIECES)
  assert list(tokenizer.special.values()) == [0, 1, 2, 3, 4]
  assert all(piece == piece.lower() for piece in tokenizer.vocab[5:])


def test_a_sample_of_the_lines_is_always_the_same(documents):
  models = [train_sentencepiece(documents, 300, sentences=n) for n in (200, 200, 10_000)]
  assert models[0] == models[1] != models[2]
  with pytest.raises(ValueError, match='over 100, got 100'):
    train_sentencepiece(documents, 300, sentences=100)


def test_long_lines_are_learnt_from_too():
  text = ' '.join(['banana'] * 3000 + ['mango', 'papaya', 'guava'] * 50)
  assert '▁banana' in Tokenizer(train_sentencepiece([text], 20)).vocab


@pytest.mark.parametrize('piece', ['word ', '字', 'x' * 999 + ' '])
def test_a_long_line_is_split_in_linear_time_without_loss(piece):
  def seconds(count):
    start = time.process_time()
    lines = list(sentencepiece_lib._lines([piece * (count // len(piece))], lowercase=True))
    assert max(map(len, lines)) <= 1000 and len(''.join(lines).replace(' ', '')) > 0.7 * count
    return time.process_time() - start

  assert seconds(2_000_000) < 40 * max(seconds(200_000), 0.01)  # 100 times when quadratic


def test_chinese_characters_of_a_text_are_in_the_vocabulary():
  letters = [chr(0x4E00 + i) for i in range(3000)]
  text = ''.join(f'{a}{b}。' for a, b in zip(letters, reversed(letters), strict=True))
  tokenizer = Tokenizer(train_sentencepiece([text], 3005))
  ids = tokenizer.encode([text])[0]
  assert ids.count(tokenizer.unk_id) < 0.001 * len(ids)


@pytest.mark.parametrize(
  'texts, size, message',
  [
    ([], 100, 'of 100 tokens from this text: it holds no text'),
    (['a b'], 100, 'Vocabulary size too high .* <= '),
    (['the quick brown fox'], 8, 'smaller than required_chars'),
  ],
)
def test_a_size_that_does_not_suit_the_text_is_refused(texts, size, message):
  with pytest.raises(ValueError, match=message):
    train_sentencepiece(texts, size)


def test_encode_and_decode_keep_special_tokens(tokenizer):
  ids = tokenizer.encode(['the old [MASK] was[SEP]', '[mask]'])
  assert ids[0].count(tokenizer.mask_id) == ids[0].count(tokenizer.sep_id) == 1
  assert tokenizer.decode(ids[0]) == 'the old [MASK] was [SEP]'
  assert tokenizer.mask_id not in ids[1]
  assert (
    tokenizer.decode([2, *tokenizer.encode(['the man'])[0], 3, 0]) == '[CLS] the man [SEP] <pad>'
  )


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    (
      {'tokenizer_config': {'tokenizer_class': 'T5Tokenizer'}},
      'T5Tokenizer is not',
    ),
    ({'added_tokens': {'[P1]': 300}}, r"besides ALBERT's .* got \['\[P1\]'\]"),
    ({'tokenizer_config': {'additional_special_tokens': ['[P1]']}}, r"got \['\[P1\]'\]"),
    ({'tokenizer_config': {'mask_token': '<mask>'}}, r"got \['<mask>'\]"),
    ({'special_tokens_map': {'mask_token': {'content': '[SEP]'}}}, "besides ALBERT's"),
    ({'tokenizer_config': {'remove_space': False}}, 'remove_space=false is not'),
    ({'tokenizer_config': {'keep_accents': True}}, 'accents must be dropped if and only if'),
    (
      {'tokenizer': {'model': {'type': 'Unigram', 'vocab': [['a', 0.0]]}}},
      'different vocabularies',
    ),
  ],
)
def test_files_that_a_sentencepiece_model_cannot_follow_are_refused(
  tokenizer, tmp_path, files, message
):
  (tmp_path / 'spiece.model').write_bytes(tokenizer.model)
  assert Tokenizer.from_dir(tmp_path).vocab == tokenizer.vocab
  for name, content in files.items():
    (tmp_path / f'{name}.json').write_text(json.dumps(content))
  with pytest.raises(ValueError, match=message):
    Tokenizer.from_dir(tmp_path)


def test_case_and_accents_are_normalised_as_in_albert(documents):
  model = train_sentencepiece(documents, 300)
  lower, keep = Tokenizer(model), Tokenizer(model, lowercase=False)
  assert lower.encode(["``HOUSE'' Wórld"]) == lower.encode(['"house" world'])
  assert keep.encode(["``house''"]) == lower.encode(['"house"'])
  assert keep.encode(['HOUSE']) != keep.encode(['house'])


@pytest.mark.e2e
def test_the_graph_tokenizer_gives_the_same_ids(tokenizer, documents):
  from bertjax.data import tokenizer_tf

  texts = make_texts(documents)
  assert len(texts) > 2500
  ids, lengths = tokenizer_tf.make_flat_encoder(tokenizer)(texts)
  twins = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
  score = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model).get_score
  for i, (own, twin) in enumerate(zip(tokenizer.encode(texts), twins, strict=True)):
    if i >= len(texts) - MIXED:  # of equally good ways ('l ll', 'll l') libraries take either
      assert sum(map(score, own)) == pytest.approx(sum(map(score, twin))), ascii(texts[i])
      own, twin = sorted(own), sorted(twin)
    assert own == twin, ascii(texts[i])


def test_offsets_spell_the_tokens(tokenizer, documents):
  texts = make_texts(documents)[::3]
  ids, offsets = tokenizer.encode_offsets(texts)
  assert ids == tokenizer.encode(texts)
  for text, row, spans in zip(texts, ids, offsets, strict=True):
    for token, (start, end) in zip(row, spans, strict=True):
      piece, found = tokenizer.vocab[token].removeprefix('▁'), text[start:end]
      if token in tokenizer.special.values():
        assert piece in ('<unk>', found)
      elif piece and found and found.isascii():  # of 'ﬁ', the model's 'f' has no separate span
        folded = found.lower() if tokenizer.lowercase else found
        assert piece in (folded, '"'), (ascii(text), start, end)


def test_a_call_makes_a_padded_batch(tokenizer):
  batch = tokenizer(['the', 'the man'], length=12)
  assert batch['input_ids'][0, :1].tolist() == [tokenizer.cls_id]
  assert (batch['input_ids'] == tokenizer.pad_id).sum() == (batch['segment_ids'] == 0).sum()


def test_a_worker_process_gets_the_same_tokenizer(tokenizer):
  assert pickle.loads(pickle.dumps(tokenizer)).encode(HARD) == tokenizer.encode(HARD)


def test_save_and_from_dir_keep_the_model_and_the_case(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  loaded = Tokenizer.from_dir(tmp_path)
  assert (loaded.model, loaded.lowercase) == (tokenizer.model, tokenizer.lowercase)
  assert loaded.fingerprint == tokenizer.fingerprint
  other = Tokenizer(tokenizer.model, lowercase=not tokenizer.lowercase)
  assert other.fingerprint != tokenizer.fingerprint


def test_accents_that_do_not_go_with_the_case_are_refused(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  settings = {'do_lower_case': True, 'keep_accents': True}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  with pytest.raises(ValueError, match='got keep_accents and do_lower_case both True'):
    Tokenizer.from_dir(tmp_path)


def test_albert_s_tokenizer_reads_what_we_save_and_gives_the_same_ids(
  tokenizer, tmp_path, documents
):
  transformers = pytest.importorskip('transformers')
  tokenizer.save(tmp_path)
  albert = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert type(albert).__name__.startswith('AlbertTokenizer')
  batch = tokenizer(['The [MASK] man.'], ['A word'])
  assert albert('The [MASK] man.', 'A word').input_ids == batch['input_ids'][0].tolist()
  lines = [line for text in documents for line in text.splitlines() if line.isascii()]
  theirs = albert(lines, add_special_tokens=False).input_ids
  assert [x for x, a, b in zip(lines, tokenizer.encode(lines), theirs, strict=True) if a != b] == []


def test_a_file_that_is_no_model_or_lacks_special_tokens_is_refused(tmp_path, documents):
  (tmp_path / 'spiece.model').write_bytes(b'garbage')
  with pytest.raises(ValueError, match=r'spiece.model is no SentencePiece model'):
    Tokenizer.from_file(tmp_path / 'spiece.model')
  path = tmp_path / 'plain'
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(documents), model_prefix=str(path), vocab_size=300, minloglevel=2
  )
  with pytest.raises(
    ValueError, match=r"plain.model lacks the special tokens \['<pad>', '\[CLS\]'"
  ):
    Tokenizer.from_file(tmp_path / 'plain.model')
  with pytest.raises(ValueError, match=r"rules must be .* got 'google'"):
    Tokenizer(b'', rules='google')
