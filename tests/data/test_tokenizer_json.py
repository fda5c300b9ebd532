"""Any `tokenizer.json`: ids, pairs, offsets and words against transformers, on real text."""

import functools
import itertools
import json
import random
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import bertjax.config as config_lib
from bertjax import prepare
from bertjax.data import (
  dataset,
  loader,
  masking,
  preprocess,
  tokenizer_json,
  words,
)
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.predictor import Predictor
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.tasks import question_answering, task
from tests import articles

ROBERTA = list(tokenizer_json.ROBERTA.values())  # <s> <pad> </s> <unk> <mask>
BERT = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
# Letters of languages that the articles do not have; a word is a few of them.
LETTERS = {
  'Greek': 'αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώΑΒΓΔΣΟ', 'Hebrew': 'אבגדהוזחטיכלמנסעפצקרשת',
  'Japanese': 'のはをにがでとしたてる日本語東京大学アメ', 'Korean': '가나다라마바사아자차카타파하',
  'German': 'abcdefghijklmnopqrstuvwxyzäöüßÄÖÜ', 'Georgian': 'აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ',
}  # fmt: skip
ODD = [
  '\u0301', '\u00ad', '\u200d', '\ufeff', '\ufb01', 'İ', '½', '…', '\U0001f469\u200d\U0001f680',
  '\t', '\n', '  ', '\u3000', '\xa0', '\x00', '\ud7ff', '\U0001d518', '\u202e', '—', "''", '<mask>',
  ' [MASK] ', '</s>', 'NEWTOK', '##', '\u2581', 'Ġ', '0' * 9,
]  # fmt: skip


def real_lines(folder, count: int) -> list[str]:
  """Lines in thirteen languages: books (English), articles, Chinese, and words of other scripts."""
  rng = random.Random(0)
  lines = []
  for path in sorted((folder / 'books').iterdir()) if folder else ():
    book = path.read_text(encoding='utf-8').splitlines()
    lines += [line[:200] for line in book if line.strip()][:200]
  for language in articles.PHRASES:
    lines += [line for text in articles.articles(language) for line in text.split('\n') if line]
  for letters in LETTERS.values():
    for _ in range(400):
      sentence = (
        ''.join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 20))
      )
      lines.append(rng.choice([' ', ' ', ', ']).join(sentence) + rng.choice(['.', '!', '', ' ']))
  rng.shuffle(lines)
  for n in range(0, len(lines), 9):  # something odd somewhere
    at = rng.randint(0, len(lines[n]))
    lines[n] = lines[n][:at] + ''.join(rng.choices(ODD, k=rng.randint(1, 3))) + lines[n][at:]
  return lines[:count]


def train(kind: str, lines: list[str]) -> tokenizers.Tokenizer:
  """A tokenizer as a family of models has it."""
  fast = tokenizers.Tokenizer(
    {'xlm': models.Unigram, 'wordpiece': functools.partial(models.WordPiece, unk_token='[UNK]')}
    .get(kind, models.BPE)()
  )  # fmt: skip
  special = ROBERTA if kind in ('roberta', 'xlm') else BERT
  options = {'vocab_size': 900, 'special_tokens': special, 'show_progress': False}
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  if kind in ('roberta', 'modern'):
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    fast.normalizer = normalizers.NFC() if kind == 'modern' else None
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
  elif kind == 'xlm':
    trainer = trainers.UnigramTrainer(unk_token='<unk>', **options | {'vocab_size': 3000})
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    fast.decoder = decoders.Metaspace()
  else:
    trainer = trainers.WordPieceTrainer(**options | {'vocab_size': 3000})
    fast.normalizer = normalizers.Sequence(
      [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    fast.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    fast.decoder = decoders.WordPiece()
  fast.train_from_iterator(lines, trainer)
  first, last = (
    special[(special is not ROBERTA and 2) or 0],
    special[2 if special is ROBERTA else 3],
  )
  ids = [(token, fast.token_to_id(token)) for token in (first, last)]
  if kind == 'roberta':
    fast.post_processor = processors.RobertaProcessing(ids[1], ids[0], add_prefix_space=False)
  else:
    pair = f'{last} $B {last}' if kind == 'xlm' else f'$B:1 {last}:1'
    fast.post_processor = processors.TemplateProcessing(
      single=f'{first} $A {last}', pair=f'{first} $A {last} {pair}', special_tokens=ids
    )
  if kind in ('modern', 'wordpiece'):
    fast.add_tokens(['NEWTOK', '  '])
    fast.add_special_tokens([tokenizers.AddedToken('[MASK]', lstrip=True)])
  return fast


CONFIG = {
  'roberta': {'tokenizer_class': 'RobertaTokenizer'},
  'xlm': {'tokenizer_class': 'PreTrainedTokenizerFast'}
  | {f'{name}_token': token for name, token in tokenizer_json.ROBERTA.items()},
}
BERT_CONFIG = {f'{token.strip("[]").lower()}_token': token for token in BERT}
BERT_CONFIG |= {
  'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': 8192,
  'model_input_names': ['input_ids', 'attention_mask'],
}  # fmt: skip
MODELS = {'roberta': 'roberta', 'xlm': 'xlm-roberta', 'modern': 'modernbert', 'wordpiece': 'bert'}


@pytest.fixture(scope='module')
def folders(tmp_path_factory, documents):
  """{kind: folder} of tokenizers trained on a few lines of all languages."""
  lines = [line for text in documents for line in text.split('\n')][:300] + real_lines(None, 1000)
  result = {}
  for kind, model in MODELS.items():
    result[kind] = folder = tmp_path_factory.mktemp(kind)
    train(kind, lines).save(str(folder / 'tokenizer.json'))
    config = json.dumps(CONFIG.get(kind, BERT_CONFIG))
    (folder / 'tokenizer_config.json').write_text(config)
    (folder / 'config.json').write_text(json.dumps({'model_type': model}))
  return result


def check(folder, lines: list[str], part: int = 200) -> None:
  """No difference from transformers in ids, offsets and pairs."""
  transformers = pytest.importorskip('transformers')
  ours, theirs = Tokenizer.from_dir(folder), transformers.AutoTokenizer.from_pretrained(folder)
  for start in range(0, len(lines), part):
    first = lines[start : start + part]
    ids, offsets = ours.encode_offsets(first)
    flat, lengths = ours.encode_flat(first)
    expected = theirs(first, add_special_tokens=False, return_offsets_mapping=True)
    assert ids == expected.input_ids == ours.encode(first)
    assert offsets == expected.offset_mapping
    assert flat.tolist() == list(itertools.chain(*ids)) and lengths.tolist() == list(map(len, ids))
    batch = ours(first, first[::-1])
    expected = theirs(first, first[::-1], return_token_type_ids=True)
    sizes = batch['segment_ids'].sum(1)
    for name in ('input_ids', 'token_type_ids'):
      rows = zip(batch[name], sizes, strict=True)
      assert [row[:size].tolist() for row, size in rows] == expected[name]


@pytest.mark.parametrize('kind', MODELS)
def test_ids_offsets_and_pairs_are_those_of_transformers(folders, documents, kind):
  check(folders[kind], [*documents[0].split('\n')[:60], *real_lines(None, 340)])


@pytest.mark.data
@pytest.mark.slow  # smaller version: 400 lines, above
@pytest.mark.parametrize('kind', MODELS)
def test_20_000_real_lines_have_the_ids_offsets_and_pairs_of_transformers(folders, data_dir, kind):
  lines = real_lines(data_dir, 20_000)
  assert len(lines) == 20_000
  check(folders[kind], lines)


@pytest.mark.parametrize('kind', MODELS)
def test_what_we_save_gives_transformers_the_same_ids_and_us_the_same_tokenizer(
  folders, tmp_path, kind
):
  ours = Tokenizer.from_dir(folders[kind])
  ours.save(tmp_path / 'saved', max_length=512)
  shutil.copy(folders[kind] / 'config.json', tmp_path / 'saved')
  again, lines = Tokenizer.from_dir(tmp_path / 'saved'), real_lines(None, 60)
  assert again.fingerprint == ours.fingerprint
  assert (again.special, again.template) == (ours.special, ours.template)
  check(tmp_path / 'saved', lines)
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'saved')
  assert theirs.model_max_length == 512 and len(theirs) == ours.vocab_size
  for name, token in ours.special.items():
    assert getattr(theirs, f'{name}_token_id') == token
  ids = ours.encode(lines)
  assert list(map(ours.decode, ids)) == theirs.batch_decode(ids)
  assert 'token_type_ids' not in theirs('a', 'b') or ours.template.shared is not None
  read = Tokenizer.from_file(folders[kind] / 'tokenizer.json', lowercase=kind == 'wordpiece')
  assert read.encode(lines) == ids


@pytest.mark.parametrize('kind', MODELS)
def test_split_words_have_the_ids_of_transformers_with_a_space_before_each(folders, kind):
  transformers = pytest.importorskip('transformers')
  ours, sentence = Tokenizer.from_dir(folders[kind]), 'The Größe of 3,500 "naïve" U.S. 中文 words .'
  theirs = transformers.AutoTokenizer.from_pretrained(folders[kind])
  words = sentence.split()
  if kind == 'roberta':
    theirs = transformers.RobertaTokenizer(*bpe_files(folders[kind]), add_prefix_space=True)
  if kind != 'modern':
    expected = theirs(words, is_split_into_words=True, add_special_tokens=False).input_ids
    assert list(itertools.chain(*ours.encode_words(words))) == expected
  if ours.spaced:  # as in the text, but for the first word
    assert list(itertools.chain(*ours.encode_words(words))) == ours.encode(f' {sentence}')[0]


def bpe_files(folder) -> tuple[dict, list]:
  model = json.loads((folder / 'tokenizer.json').read_text())['model']
  return model['vocab'], [tuple(pair) for pair in model['merges']]


def word_starts(tokenizer, texts) -> list[list[int]]:
  """Where words begin in each text, by the flags of its tokens."""
  rows = []
  for text, ids, spans in zip(texts, *tokenizer.encode_offsets(texts, trim=True), strict=True):
    firsts = np.append(np.flatnonzero(words.firsts(np.array(ids), tokenizer.word_flags)), len(ids))
    parts = (spans[a:b] for a, b in itertools.pairwise(firsts))
    rows.append(
      [min(a for a, b in part if a < b) for part in parts if text and max(b - a for a, b in part)]
    )
  return rows


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('language', ['Russian', 'Arabic', 'lower-cased English', 'Chinese'])
def test_words_begin_at_spaces_punctuation_and_chinese_characters(folders, kind, language):
  """Also the first word of a text, which byte-level BPE does not mark."""
  tokenizer = Tokenizer.from_dir(folders[kind])
  lines = [line for text in articles.articles(language, 4, seed=1) for line in text.split('\n\n')]
  for text, starts in zip(lines, word_starts(tokenizer, lines), strict=True):
    expected = [start for start, _ in words.split(text)]
    if language == 'Chinese':  # where a token has several characters, it is a word
      assert set(starts) <= set(expected) and len(starts) > 0.05 * len(expected)
    else:
      assert starts == expected


def test_sentences_of_a_document_get_the_spaces_of_running_text(folders):
  bpe, xlm = (Tokenizer.from_dir(folders[kind]) for kind in ('roberta', 'xlm'))
  document = ['The first one.', 'The second one.', '第二句。', '第三句。']
  assert xlm.as_running_text(document) == document
  spaced = bpe.as_running_text(document)
  assert spaced == ['The first one.', ' The second one.', '第二句。', '第三句。']
  assert list(itertools.chain(*bpe.encode(spaced[:2]))) == bpe.encode(' '.join(document[:2]))[0]
  flags = words.firsts(np.array(bpe.encode(spaced[:2])[1]), bpe.word_flags)
  assert flags.sum() == 4  # The second one .


def prepared(tokenizer, documents, folder, **options) -> dict[str, np.ndarray]:
  for i, text in enumerate(documents):
    (folder / f'{i:02}.txt').write_text(text)
  settings = preprocess.Settings(length=64, heldout_fraction=0.3, **options)
  preprocess.prepare(str(folder / '*.txt'), tokenizer, settings, folder / 'rows', workers=0)
  rows = dataset.Dataset(folder / 'rows', 'train')
  return loader.expand(rows[np.arange(len(rows))])


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('packed', [1, 2])
def test_prepared_pairs_have_the_template_of_the_file(folders, documents, tmp_path, kind, packed):
  tokenizer = Tokenizer.from_dir(folders[kind])
  options = {'max_sequences_per_row': packed, 'short_seq_prob': 0.8 * (packed > 1)}
  batch = prepared(tokenizer, documents, tmp_path, kind='nsp', **options)
  first, last, between, shared = tokenizer.template
  assert len(between) == (2 if kind in ('roberta', 'xlm') else 1)
  ids, types, segments = (batch[f'{n}_ids'] for n in ('input', 'token_type', 'segment'))
  assert (ids[segments == 0] == tokenizer.pad_id).all() and segments.max() == packed
  for row in range(len(ids)):
    for number in range(1, segments[row].max() + 1):
      inside = segments[row] == number
      sequence, numbers = ids[row, inside].tolist(), types[row, inside].tolist()
      end = sequence.index(last)
      assert sequence[0] == first and sequence.count(first) == 1 and sequence[-1] == last
      assert (
        tuple(sequence[end : end + len(between)]) == between
        and end + len(between) < len(sequence) - 1
      )
      assert sequence.count(last) == len(between) + 1
      wanted = (
        [0] * len(sequence) if shared is None else [int(n > end) for n in range(len(sequence))]
      )
      assert numbers == wanted


def test_masks_cover_whole_words_of_byte_level_bpe(folders, documents, tmp_path):
  tokenizer = Tokenizer.from_dir(folders['roberta'])
  batch = prepared(tokenizer, documents, tmp_path, kind='doc_sentences')
  count = len(batch['input_ids'])
  masks = masking.Masking(unit='whole_word', max_predictions=20, mask_prob=1.0, random_prob=0.0)
  special = tokenizer.special
  masked = masking.mask_tokens(
    batch, np.zeros(count, int), np.arange(count), 0, masks, vocab_size=tokenizer.vocab_size,
    mask_id=special['mask'], never=(special['pad'], special['cls'], special['sep']),
    word_flags=tokenizer.word_flags,
  )['input_ids'] == special['mask']  # fmt: skip
  split = total = 0
  for ids, hidden in zip(batch['input_ids'], masked, strict=True):
    starts = np.flatnonzero(words.firsts(ids, tokenizer.word_flags))
    for word, text in zip(np.split(hidden, starts[1:]), np.split(ids, starts[1:]), strict=True):
      word = word[text != special['pad']]
      total += word.any()
      split += word.any() and not word.all()
  assert total > 3 * count and split <= 0.05 * total  # but for words longer than the budget


def test_answers_are_found_in_windows_without_the_space_before_them(folders, documents):
  for kind in MODELS:
    tokenizer = Tokenizer.from_dir(folders[kind])
    context = ' '.join(documents[1].split()[:150])
    at = context.index(' ', 300) + 1
    text = context[at : context.index(' ', at)].strip('.,;:')
    item = task.Example('q', ('Which word?', context), ((text, at),))
    encoded = question_answering.encode([item], tokenizer, 64, stride=16, max_query=20)
    found = False
    for row, (start, end) in enumerate(encoded.columns['labels']):
      logits = np.zeros((1, 64, 2))
      logits[0, start, 0] = logits[0, end, 1] = 9
      sequence = encoded.columns['input_ids'][row].tolist()
      query = tokenizer.encode('Which word?')[0]
      assert sequence[: len(query) + 1] == [tokenizer.cls_id, *query]
      if start:
        found = True
        one = encoded._replace(
          columns={name: array[row : row + 1] for name, array in encoded.columns.items()},
          alignment=encoded.alignment[row : row + 1],
        )
        [answer] = question_answering.decode([item], one, logits, version_2=False)
        assert text in answer.text and answer.text == answer.text.strip()
    assert found


@pytest.mark.e2e
def test_a_predictor_fills_tags_and_answers_with_byte_level_bpe(folders):
  tokenizer = Tokenizer.from_dir(folders['roberta'])
  config = EncoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=2,
                         mlp_size=32, max_positions=64)  # fmt: skip
  heads = ('mlm', 'tagging', 'span')
  model = Bert(config, heads=heads, num_labels=3)
  predictor = Predictor(
    model,
    jax.jit(init_params, static_argnums=0)(model, jax.random.key(0)),
    tokenizer,
    labels=('O', 'B-X', 'I-X'),
  )
  [[fills]] = predictor.fill_mask(['The <mask> ran.'], top_k=3)
  assert len(fills) == 3 and all(fill.text.startswith('The') for fill in fills)
  assert '<mask>' not in predictor.infill(['The <mask> ran and <mask>.'])[0]
  text = 'Dr. Größe met  Anna in Paris.'
  for rule in ('text', 'spaces', 'tokens'):
    for span in predictor.tag([text], words=rule)[0]:
      assert text[span.start : span.end] == span.text == span.text.strip() != ''
  answers = predictor.answer(['Who?'], [text])
  assert answers[0].text in text and answers[0].text == answers[0].text.strip()


def test_a_tokenizer_without_a_mask_token_is_refused_only_where_masks_are_made(
  folders, documents, tmp_path
):
  content = json.loads((folders['roberta'] / 'tokenizer.json').read_text())
  content['added_tokens'] = [t for t in content['added_tokens'] if t['content'] != '<mask>']
  vocab = content['model']['vocab']
  vocab['!!masked'] = vocab.pop('<mask>')
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  tokenizer = Tokenizer.from_file(tmp_path / 'tokenizer.json', lowercase=False)
  assert 'mask' not in tokenizer.special and tokenizer('a')['input_ids'].shape[0] == 1
  with pytest.raises(ValueError, match=r'tokenizer.json has no mask token, which this needs'):
    tokenizer.mask_id  # noqa: B018
  config = config_lib.load_recipe('bert_mini')
  config.data.vocab, config.data.lowercase = str(tmp_path / 'tokenizer.json'), False
  with pytest.raises(ValueError, match='has no mask token'):
    prepare.load_vocab(config)


def test_vocab_json_and_merges_are_roberta_s(folders, tmp_path):
  transformers = pytest.importorskip('transformers')
  vocab, merges = bpe_files(folders['roberta'])
  (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
  lines = [' '.join(pair) for pair in merges]
  (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *lines, '']))
  (tmp_path / 'config.json').write_text('{"model_type": "roberta"}')
  mask = {'content': '<mask>', 'lstrip': True, 'rstrip': False, 'normalized': False,
          'single_word': False, '__type': 'AddedToken'}  # fmt: skip
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'mask_token': mask}))
  check(tmp_path, real_lines(None, 100))
  (tmp_path / 'merges.txt').write_text('no pair of the vocabulary here')
  with pytest.raises(ValueError, match=r'vocab.json and merges.txt cannot be read'):
    Tokenizer.from_dir(tmp_path)
  assert transformers


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [{'type': 'Telepathy'}]}},
     r'cannot read its pre_tokenizer \(Sequence, Telepathy\)'),
    ({'normalizer': {'type': 'Telepathy'}}, r'cannot read its normalizer \(Telepathy\)'),
    ({'model': {'type': 'Telepathy', 'vocab': {}}}, 'is no tokenizer.json that can be read'),
    ({'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True}},
     'add_prefix_space=true in its pre_tokenizer is not the false of tokenizer_config.json'),
    ({'post_processor': None}, r"makes \['a'\] of a text and \['a', 'a'\] of a pair"),
  ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_refused_by_the_component(folders, tmp_path, change, message):
  shutil.copytree(folders['roberta'], tmp_path / 'folder')
  path = tmp_path / 'folder' / 'tokenizer.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ValueError, match=message):
    Tokenizer.from_dir(path.parent)
  path.write_text(path.read_text()[:-20])
  with pytest.raises(ValueError, match=r'tokenizer.json is corrupt'):
    Tokenizer.from_dir(path.parent)


@pytest.mark.parametrize('kind', ['roberta', 'xlm', 'modern'])
def test_no_tokenizer_json_becomes_a_graph(folders, kind):
  graph = pytest.importorskip('bertjax.data.tokenizer_tf')
  with pytest.raises(ValueError, match=r'the rules of a tokenizer.json .* --format=stablehlo'):
    graph.GraphTokenizer(Tokenizer.from_dir(folders[kind]))


def unigram_of(folder, special: list[str]) -> list[tuple[str, float]]:
  """The vocabulary of the Unigram model with other special tokens in front."""
  vocab = json.loads((folder / 'tokenizer.json').read_text())['model']['vocab']
  return [*((token, 0.0) for token in special), *map(tuple, vocab[len(ROBERTA) :])]


CAMEMBERT = ['<s>NOTUSED', '<pad>', '</s>NOTUSED', '<unk>', '<unk>NOTUSED', '<s>', '</s>', '<mask>']


@pytest.mark.parametrize(
  ('name', 'model', 'special'),
  [
    ('RobertaTokenizer', 'roberta', []),
    ('XLMRobertaTokenizer', 'xlm-roberta', ROBERTA),
    ('CamembertTokenizer', 'camembert', CAMEMBERT),
    ('AlbertTokenizer', 'albert', ['<pad>', '<unk>', '[CLS]', '[SEP]', '[MASK]']),
  ],
)
def test_files_that_the_classes_of_transformers_write_are_read(
  folders, tmp_path, name, model, special
):
  transformers = pytest.importorskip('transformers')
  if special:
    theirs = getattr(transformers, name)(vocab=unigram_of(folders['xlm'], special))
  else:
    theirs = transformers.RobertaTokenizer(*bpe_files(folders['roberta']), add_prefix_space=True)
  for folder in (tmp_path / 'theirs', tmp_path / 'ours'):
    if folder.name == 'theirs':
      theirs.save_pretrained(folder)
    else:
      Tokenizer.from_dir(tmp_path / 'theirs').save(folder)
    (folder / 'config.json').write_text(json.dumps({'model_type': model}))
    check(folder, real_lines(None, 150))
    ours = Tokenizer.from_dir(folder)
    assert not ours.spaced  # each puts a space or mark before every text
    for role in ('pad', 'unk', 'cls', 'sep', 'mask'):
      assert ours.special[role] == getattr(theirs, f'{role}_token_id')


@pytest.mark.parametrize(
  ('kind', 'name', 'normalizer'),
  [('roberta', 'RobertaTokenizer', 'NFC'), ('xlm', 'XLMRobertaTokenizer', 'NFKC'),
   ('xlm', 'CamembertTokenizer', 'NFKC')],
)  # fmt: skip
def test_a_normaliser_that_transformers_would_not_apply_is_refused(
  folders, tmp_path, kind, name, normalizer
):
  content = json.loads((folders[kind] / 'tokenizer.json').read_text())
  content |= {'normalizer': {'type': normalizer}}
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  config = CONFIG[kind] | {'tokenizer_class': name}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=f'normalizer={normalizer} is not the .*={name},'):
    Tokenizer.from_dir(tmp_path)


def test_words_that_end_with_a_mark_are_found_and_tokens_without_marks_refused(documents):
  lines = [line for text in documents[:5] for line in text.split('\n')]
  for suffix in ('</w>', ''):
    ending = {'end_of_word_suffix': suffix} if suffix else {}
    fast = tokenizers.Tokenizer(models.BPE(unk_token='[UNK]', **ending))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
      vocab_size=500, special_tokens=BERT, show_progress=False, **ending
    )
    fast.train_from_iterator(lines, trainer)
    fast.post_processor = processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
    tokenizer = Tokenizer(fast, special={'unk': '[UNK]'}, source='x.json')
    if suffix:
      text = 'The words that they wrote, and (some) more.'
      [starts] = word_starts(tokenizer, [text])
      assert starts == [start for start, _ in words.split(text)]
    else:
      with pytest.raises(ValueError, match=r'x.json do not show where words begin, .*subword'):
        tokenizer.word_flags  # noqa: B018
