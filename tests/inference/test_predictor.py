"""Predictions equal to transformers' on the same weights, and nothing is truncated."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from bertjax.data.tokenizer import Tokenizer
from bertjax.data.words import BEGINS
from bertjax.inference.mlm import words_of
from bertjax.inference.predictor import Predictor
from bertjax.inference.runner import LENGTHS, Runner
from bertjax.interop.loading import save_model
from bertjax.model import crf
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from bertjax.tasks import metrics

SIZES = {'hidden_size': 32, 'num_layers': 4, 'num_heads': 2, 'mlp_size': 48, 'max_positions': 48}
TEXTS = ['the file is open', 'A value, or None.', 'Returns the name of the module (or class)!']
LONG = ' '.join(TEXTS * 9)


@functools.cache
def model(vocab, *heads, labels=2, seed=0, std=0.3, **changes):
  """A tiny random model: (module, params, tokenizer)."""
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(vocab_size=tokenizer.vocab_size, initializer_range=std, **SIZES, **changes)
  pooler = bool({'nsp', 'classification', 'choice'} & set(heads))
  bert = Bert(config, heads=heads, pooler=pooler, num_labels=labels)
  params = jax.jit(lambda key: init_params(bert, key))(jax.random.key(seed))
  return bert, jax.device_get(params), tokenizer


@pytest.fixture(scope='module')
def mlm(vocab):
  return Predictor(*model(vocab, 'mlm', 'nsp'), batch_size=8)


@pytest.fixture(scope='module')
def classifier(vocab):
  parts = model(vocab, 'classification', labels=3)
  return Predictor(*parts, labels=('x', 'y', 'z'), batch_size=8, long='window')


@functools.cache
def applied(config, heads=(), labels=2, capture=()):
  """The model as one compiled function, for rows as they are."""
  pooler = bool({'nsp', 'classification', 'choice'} & set(heads))
  bert = Bert(config, heads=heads, pooler=pooler, num_labels=labels)
  return jax.jit(lambda params, batch: bert.apply({'params': params}, batch, capture=capture))


def log_probs(predictor, ids, place):
  """Log-probabilities at a place that is masked, by applying the model once."""
  tokenizer = predictor.tokenizer
  row = [tokenizer.cls_id, *ids, tokenizer.sep_id]
  row[place + 1] = tokenizer.mask_id
  out = applied(predictor.config, ('mlm',))(predictor.runner.params, {'input_ids': np.array([row])})
  return np.asarray(jax.nn.log_softmax(out['mlm_logits'][0, place + 1]))


def test_scores_are_natural_logs_with_one_mask_a_token(mlm):
  scores = mlm.score(TEXTS[:2])
  [ids] = mlm.tokenizer.encode(TEXTS[:1])
  logs = [log_probs(mlm, ids, place)[token] for place, token in enumerate(ids)]
  np.testing.assert_allclose([log for _, log in scores[0].tokens], logs, atol=1e-4)
  assert scores[0].log_likelihood == pytest.approx(sum(logs), abs=1e-3)
  assert scores[0].perplexity == pytest.approx(np.exp(-np.mean(logs)), rel=1e-3)
  again = mlm.score(TEXTS[1])
  assert scores[1].log_likelihood == pytest.approx(again.log_likelihood, abs=1e-3)


def test_in_a_long_text_a_token_is_scored_amid_its_neighbours(mlm, vocab):
  with pytest.raises(ValueError, match=r'the model takes at most 48'):
    mlm.score(LONG)
  wide = Predictor(*model(vocab, 'mlm', 'nsp'), batch_size=8, long='window')
  [ids], room = mlm.tokenizer.encode([LONG]), 46
  found = wide.score(LONG).tokens
  assert [piece for piece, _ in found] == [mlm.tokenizer.vocab[i] for i in ids]
  for place in (0, 60, len(ids) - 1):
    first = max(0, min(place - room // 2, len(ids) - room))
    expected = log_probs(mlm, ids[first : first + room], place - first)[ids[place]]
    assert found[place][1] == pytest.approx(expected, abs=1e-4)


def test_each_of_several_masks_is_filled_separately(mlm):
  text = 'the ' + '[MASK] ' * 11 + 'name'
  fills = mlm.fill_mask(text, top_k=3)
  assert len(fills) == 11
  [ids] = mlm.tokenizer.encode([text])
  logs = log_probs(mlm, ids, 11)  # all others are masked too
  best = np.argsort(-logs)[:3]
  assert [fill.token for fill in fills[10]] == [mlm.tokenizer.vocab[i] for i in best]
  np.testing.assert_allclose([f.probability for f in fills[10]], np.exp(logs[best]), atol=1e-5)
  assert [len(item) for item in mlm.fill_mask(['a [MASK]', text], top_k=3)] == [1, 11]
  with pytest.raises(ValueError, match=r'top_k must be in 1\.\.'):
    mlm.fill_mask('a [MASK]', top_k=0)


def test_infill_takes_the_surest_mask_first(mlm):
  text = 'the [MASK] of ' + '[MASK] ' * 9  # more than a row asks about
  ids = mlm.tokenizer.encode([text])[0]
  masked = [i for i, token in enumerate(ids) if token == mlm.tokenizer.mask_id]
  while mlm.tokenizer.mask_id in ids:
    places = [i for i, token in enumerate(ids) if token == mlm.tokenizer.mask_id]
    logs = [log_probs(mlm, ids, place) for place in places]
    surest = max(range(len(places)), key=lambda i: logs[i].max())
    ids[places[surest]] = int(logs[surest].argmax())
  expected = 'the [MASK] of ' + '[MASK] ' * 9
  for place in masked:
    piece = mlm.tokenizer.vocab[ids[place]]
    old = ' [MASK]' if piece.startswith('##') else '[MASK]'
    expected = expected.replace(old, piece.removeprefix('##'), 1)
  assert mlm.infill([text, 'No  mask']) == [expected, 'No  mask']


def tokens(predictor, text):
  return predictor.tokenizer.encode([text])[0]


def test_corrections_are_likelier_words_in_the_place_of_a_word(mlm):
  text = 'Returns the name, or None.'
  [found] = mlm.correct([text], ratio=1e-9, top_k=20)
  assert [c.word for c in found] == ['Returns', 'the', 'name', 'or', 'None']
  for item in found:
    assert text[item.start : item.end] == item.word
    for fill in item.replacements:
      assert fill.text == text[: item.start] + fill.token + text[item.end :]
      assert fill.token.isalpha() and fill.probability >= 1e-9 * item.probability
  ids, words = tokens(mlm, text), words_of(mlm.tokenizer, tokens(mlm, text))
  assert any(end - first > 1 for first, end in words[:5])
  for item, (first, end) in zip(found, words[:2] + words[2:3] + words[4:6], strict=True):
    whole = [*ids[:first], *[mlm.tokenizer.mask_id] * (end - first), *ids[end:]]
    logs = [log_probs(mlm, whole, place)[ids[place]] for place in range(first, end)]
    assert item.probability == pytest.approx(np.exp(sum(logs)), rel=1e-3)
    single = log_probs(mlm, [*ids[: first + 1], *ids[end:]], first)
    best = item.replacements[0]
    token = mlm.tokenizer.vocab.index(best.token)
    assert best.probability == pytest.approx(np.exp(single[token]), rel=1e-3)
  assert mlm.correct(text, ratio=1e9) == []


def test_next_sentence_reads_label_0_as_next(mlm):
  batch = mlm.tokenizer(TEXTS[:1], TEXTS[1:2])
  logits = applied(mlm.config, ('nsp',))(mlm.runner.params, batch)['nsp_logits'][0]
  expected = float(jax.nn.softmax(logits)[0])
  assert mlm.next_sentence(TEXTS[0], TEXTS[1]) == pytest.approx(expected, abs=1e-5)


def test_one_item_in_one_item_out_and_lists_in_order(classifier):
  results = classifier.classify(TEXTS)
  assert [classifier.classify(text).labels for text in TEXTS] == [r.labels for r in results]
  assert classifier.classify(TEXTS[0], TEXTS[1]).scores == pytest.approx(
    classifier.classify(TEXTS[:1], TEXTS[1:2])[0].scores
  )
  assert classifier.classify([]) == []


def test_long_texts_are_windowed_or_refused_and_never_truncated(classifier, vocab):
  strict = Predictor(*model(vocab, 'classification', labels=3), batch_size=8)
  for call in (strict.classify, strict.embed):
    with pytest.raises(
      ValueError, match=r'has \d+ tokens with its special ones, the model takes at most 48'
    ):
      call(['short', LONG])
  with pytest.raises(ValueError, match='takes at most 48'):
    classifier.classify(LONG, 'a pair cannot be windowed')
  [ids] = classifier.tokenizer.encode([LONG])
  parts = classifier.runner.split(ids)
  assert [token for part in parts for token in part] == ids and max(map(len, parts)) <= 46
  assert max(map(len, parts)) - min(map(len, parts)) <= 1
  batch = [[classifier.tokenizer.cls_id, *p, classifier.tokenizer.sep_id] for p in parts]
  apply = applied(classifier.config, ('classification',), 3)
  logits = [apply(classifier.runner.params, {'input_ids': np.array([row])}) for row in batch]
  each = [jax.nn.softmax(out['classification_logits'][0]) for out in logits]
  expected = np.average(each, axis=0, weights=[len(row) for row in batch])
  np.testing.assert_allclose([*classifier.classify(LONG).scores.values()], expected, atol=1e-5)


def test_the_number_of_programs_does_not_grow_with_the_texts(vocab):
  predictor = Predictor(*model(vocab), batch_size=4)
  rng = np.random.default_rng(0)
  for _ in range(6):
    predictor.embed([' '.join(['the'] * n) for n in rng.integers(1, 45, 9)])
  assert predictor.runner.lengths == (32, 48) and predictor.runner._apply._cache_size() == 2
  assert LENGTHS == (32, 64, 128, 256, 512)


def test_a_missing_head_is_named_with_those_there_are(mlm, classifier, vocab):
  with pytest.raises(ValueError, match=r'needs a model with a classification head; .* mlm, nsp'):
    mlm.classify('a')
  with pytest.raises(ValueError, match='mlm head; this one has the heads classification'):
    classifier.score('a')
  with pytest.raises(ValueError, match='the bare encoder'):
    Predictor(*model(vocab)).tag('a')
  causal = Predictor(*model(vocab, 'mlm', causal=True))
  with pytest.raises(ValueError, match='this one is causal'):
    causal.fill_mask('[MASK]')


def test_problem_types_decide_what_scores_are(vocab):
  parts = model(vocab, 'classification', labels=3)
  plain, several, number = (
    Predictor(*parts, problem_type=kind, batch_size=8).classify('the name')
    for kind in ('', 'multi_label_classification', 'regression')
  )
  logits = np.array([*number.scores.values()])
  assert number.labels == [] and list(plain.scores) == ['LABEL_0', 'LABEL_1', 'LABEL_2']
  np.testing.assert_allclose([*several.scores.values()], 1 / (1 + np.exp(-logits)), rtol=1e-5)
  assert several.labels == [f'LABEL_{i}' for i in np.flatnonzero(logits > 0)]
  weights = np.exp(logits)
  np.testing.assert_allclose([*plain.scores.values()], weights / weights.sum(), rtol=1e-5)
  assert plain.labels == [f'LABEL_{logits.argmax()}']
  one = model(vocab, 'classification', labels=1)
  number = Predictor(*one, problem_type='regression').classify('the name').scores['LABEL_0']
  score = Predictor(*one).classify('the name').scores['LABEL_0']  # as transformers' pipeline
  assert score == pytest.approx(1 / (1 + np.exp(-number)), rel=1e-5) != 1.0


def test_labels_of_a_directory_are_used(tmp_path, vocab):
  bert, params, tokenizer = model(vocab, 'classification', labels=2)
  save_model(tmp_path / 'm', bert, params, tokenizer, labels=['bad', 'good'])
  assert set(Predictor.from_dir(tmp_path / 'm').classify('the name').scores) == {'bad', 'good'}
  with pytest.raises(ValueError, match="has 2 labels, got the names \\['one'\\]"):
    Predictor(bert, params, tokenizer, labels=['one'])


def test_numbers_out_of_range_are_refused(mlm, vocab):
  spans = Predictor(*model(vocab, 'span'))
  for call, words in (
    (lambda: mlm.fill_mask('[MASK]', top_k=0), 'top_k must be in 1'),
    (lambda: mlm.correct('the name', ratio=float('nan')), 'ratio must be above 0, got nan'),
    (lambda: mlm.nearest('a', ['b', 'c'], top_k=-1), 'top_k must be at least 1, got -1'),
    (lambda: mlm.summarise('A name.', sentences=0), 'sentences must be at least 1, got 0'),
    (lambda: spans.answer('a', 'b', max_answer=0), 'top_k and max_answer must be at least 1'),
    (lambda: mlm.next_sentence(['a', 'b'], ['c']), r'must be as many, got \[2, 1\]'),
  ):
    with pytest.raises(ValueError, match=words):
      call()


def test_rows_of_the_word_table_beyond_the_vocabulary_are_never_proposed(vocab):
  bert, _, tokenizer = model(vocab, 'mlm')
  config = dataclasses.replace(bert.config, vocab_size=tokenizer.vocab_size + 7)
  bert = Bert(config, heads=('mlm',), pooler=False)
  params = init_params(bert, jax.random.key(0))
  params['mlm']['bias'] = params['mlm']['bias'].at[-7:].set(50.0)
  predictor = Predictor(bert, params, tokenizer)
  [fills] = predictor.fill_mask('the [MASK]', top_k=tokenizer.vocab_size)
  assert len({fill.token for fill in fills}) == tokenizer.vocab_size
  with pytest.raises(ValueError, match=f'top_k must be in 1..{tokenizer.vocab_size}'):
    predictor.fill_mask('the [MASK]', top_k=tokenizer.vocab_size + 1)


def test_masks_are_filled_under_googles_rules_too(mlm, vocab):
  google = Predictor(mlm.model, mlm.runner.params, Tokenizer.from_file(vocab, rules='google'))
  text = '[MASK] name, the [MASK]'
  assert google.fill_mask(text) == mlm.fill_mask(text)
  assert google.infill(text) == mlm.infill(text)


@pytest.fixture(scope='module')
def causal(vocab):
  return Predictor(*model(vocab, 'mlm', causal=True), batch_size=8, long='window')


def next_logs(predictor, ids):
  """Log-probabilities of what follows [CLS] and each token: [1 + tokens, V]."""
  row = [predictor.tokenizer.cls_id, *ids]
  out = applied(predictor.config, ('mlm',))(predictor.runner.params, {'input_ids': np.array([row])})
  return np.asarray(jax.nn.log_softmax(out['mlm_logits'][0]))


def test_a_left_to_right_model_gives_log_likelihoods(causal):
  texts = [*TEXTS, *TEXTS, *TEXTS]  # more than a batch: packed
  for text, score in zip(texts, causal.score(texts), strict=True):
    ids = tokens(causal, text)
    expected = next_logs(causal, ids)[np.arange(len(ids)), ids]
    np.testing.assert_allclose([log for _, log in score.tokens], expected, atol=1e-4)
    assert score.log_likelihood == pytest.approx(expected.sum(), abs=1e-3)
  ids, room = tokens(causal, LONG), 46
  found = causal.score(LONG).tokens
  assert [piece for piece, _ in found] == [causal.tokenizer.vocab[i] for i in ids]
  for place in (0, 45, 46, 60, len(ids) - 1):
    first = 0 if place < room else (place - room) // 23 * 23 + 23
    expected = next_logs(causal, ids[first : first + room])[place - first, ids[place]]
    assert found[place][1] == pytest.approx(expected, abs=1e-4)
  strict = Predictor(causal.model, causal.runner.params, causal.tokenizer)
  with pytest.raises(ValueError, match='the model takes at most 48'):
    strict.score(LONG)


def test_a_left_to_right_model_continues_texts_token_by_token(causal):
  special = list(set(causal.tokenizer.special.values()) - {causal.tokenizer.sep_id})
  ids, expected = tokens(causal, TEXTS[0]), TEXTS[0]
  for _ in range(4):
    logs = next_logs(causal, ids)[-1].copy()
    logs[special] = -np.inf
    if logs.argmax() == causal.tokenizer.sep_id:
      break
    ids.append(int(logs.argmax()))
    piece = causal.tokenizer.vocab[ids[-1]]
    expected += piece[2:] if piece.startswith('##') else f' {piece}' if piece.isalnum() else piece
  assert causal.continue_text(TEXTS, max_new_tokens=4)[0] == expected != TEXTS[0]
  options = {'max_new_tokens': 6, 'top_k': 20}
  samples = [causal.continue_text(TEXTS[0], seed=seed, **options) for seed in range(4)]
  assert len(set(samples)) > 1
  assert causal.continue_text([TEXTS[1], TEXTS[0]], seed=3, **options)[1] == samples[3]


def test_wrong_requests_to_continue_a_text_are_refused(mlm, causal):
  for call, words in (
    (lambda: mlm.continue_text('a'), 'this model is bidirectional'),
    (lambda: causal.continue_text('a', max_new_tokens=46), 'has 49 tokens'),
    (lambda: causal.continue_text('a', max_new_tokens=0), 'max_new_tokens must be at least 1'),
    (lambda: causal.continue_text('a', temperature=0.0), 'temperature above 0, got 32 and 0.0'),
    (lambda: causal.continue_text('a', top_k=0), 'top_k must be in 1'),
  ):
    with pytest.raises(ValueError, match=words):
      call()


def test_an_index_is_read_back_and_that_of_another_model_is_refused(mlm, vocab, tmp_path):
  path = tmp_path / 'faq.npz'
  mlm.index(TEXTS, 'cls').save(path)
  index = mlm.load_index(path)
  assert index.texts == TEXTS and index.pooling == 'cls'
  assert mlm.nearest(TEXTS[0], index)[0].similarity == pytest.approx(1)  # pooled as the index is
  with pytest.raises(ValueError, match='was made with another model'):
    Predictor(*model(vocab, 'mlm', 'nsp', seed=1)).load_index(path)
  path.write_bytes(b'x')
  with pytest.raises(ValueError, match=r'faq\.npz is no index of texts'):
    mlm.load_index(path)


def test_choices_are_scored_together(vocab):
  predictor = Predictor(*model(vocab, 'choice'), batch_size=4)
  endings = [['the end', 'a name', 'None'], ['one', 'two']]
  found = predictor.choose(['first', 'second'], endings)
  assert [len(item.probabilities) for item in found] == [3, 2]
  for item, options in zip(found, endings, strict=True):
    assert item.text == options[item.number] == options[np.argmax(item.probabilities)]
    assert sum(item.probabilities) == pytest.approx(1)
  batch = predictor.tokenizer(['second'] * 2, endings[1])
  logits = applied(predictor.config, ('choice',))(predictor.runner.params, batch)['choice_logits']
  np.testing.assert_allclose(found[1].probabilities, jax.nn.softmax(logits), atol=1e-5)
  with pytest.raises(ValueError, match='question 1 has no endings'):
    predictor.choose(['a', 'b'], [['c'], []])


def test_a_text_given_as_words_keeps_them(vocab):
  predictor = Predictor(
    *model(vocab, 'tagging', labels=3), labels=['O', 'B-X', 'I-X'], batch_size=4
  )
  words = ['the', 'U.S.', 'name', '(or', 'class)']
  [spans] = predictor.tag([words])
  text = ' '.join(words)
  for span in spans:
    assert text[span.start : span.end] == span.text
    assert set(span.text.split(' ')) <= set(words)
  long = predictor.tag(LONG)  # tagged in sequences of its words, all of them
  assert all(LONG[span.start : span.end] == span.text for span in long)
  types = Predictor(*model(vocab, 'tagging', labels=3), labels=['O', 'X', 'Y'], batch_size=4)
  assert {span.label for span in types.tag(LONG)} <= {'X', 'Y'}


def test_one_text_among_lists_is_refused_not_read_as_letters(vocab):
  predictor = Predictor(*model(vocab, 'classification', labels=2), batch_size=4)
  assert predictor.classify('the', 'name').scores == predictor.classify(['the'], ['name'])[0].scores
  for call in (
    lambda: predictor.classify(['the', 'a'], 'ab'), lambda: predictor.classify('the', ['a']),
    lambda: predictor.nearest('the', corpus='a file'), lambda: predictor.index('a file'),
  ):  # fmt: skip
    with pytest.raises(ValueError, match='one text'):
      call()
  choosing = Predictor(*model(vocab, 'choice'), batch_size=4)
  with pytest.raises(ValueError, match='one text'):
    choosing.choose('the', 'ab')


def test_embeddings_pool_as_they_say(vocab):
  predictor = Predictor(*model(vocab), batch_size=4)
  apply = applied(predictor.config, capture=('hidden',))
  out = apply(predictor.runner.params, predictor.tokenizer(TEXTS[:1]))
  layers = [np.asarray(layer[0]) for layer in out['all_hidden']]
  expected = {
    'cls': layers[-1][0], 'mean': layers[-1].mean(0),
    'last_four': np.concatenate([layer.mean(0) for layer in layers[-4:]]),
  }  # fmt: skip
  for pooling, vector in expected.items():
    found = predictor.embed(TEXTS, pooling=pooling, normalise=False)
    np.testing.assert_allclose(found[0], vector, atol=1e-5)
    unit = predictor.embed(TEXTS[0], pooling=pooling)
    np.testing.assert_allclose(unit, vector / np.linalg.norm(vector), atol=1e-5)
  with pytest.raises(ValueError, match=r"pooling must be one of .* got 'max'"):
    predictor.embed(TEXTS, pooling='max')


def test_a_window_counts_by_its_tokens_in_an_embedding(vocab):
  predictor = Predictor(*model(vocab), batch_size=4, long='window')
  tokenizer, text = predictor.tokenizer, LONG + ' the'
  parts = predictor.runner.split(tokens(predictor, text))
  rows = [[tokenizer.cls_id, *part, tokenizer.sep_id] for part in parts]
  assert len(rows) > 2 and len(set(map(len, rows))) == 2
  apply, params = applied(predictor.config), predictor.runner.params
  states = [apply(params, {'input_ids': np.array([row])})['hidden'][0] for row in rows]
  expected = np.concatenate(states).mean(0)  # over all tokens
  found = predictor.embed(text, normalise=False)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert np.abs(expected - np.mean([state.mean(0) for state in states], 0)).max() > 1e-4


def test_nearest_finds_a_text_itself_and_a_summary_keeps_the_order(vocab):
  predictor = Predictor(*model(vocab), batch_size=4)
  index = predictor.index(TEXTS)
  hits = predictor.nearest(TEXTS, index, top_k=2)
  assert [hit[0].number for hit in hits] == [0, 1, 2] and hits[0][0].text == TEXTS[0]
  assert hits[0][0].similarity == pytest.approx(1) and len(hits[0]) == 2
  assert predictor.nearest(TEXTS[1], TEXTS, top_k=1)[0].number == 1
  text = 'The file is open. It has a name. None is here. The class returns it.'
  summary = predictor.summarise(text, sentences=2)
  assert len(summary) == 2 and text.index(summary[0]) < text.index(summary[1])
  assert predictor.summarise([text, ' '], sentences=9)[1] == []
  with pytest.raises(ValueError, match='the corpus has no texts'):
    predictor.nearest('a', predictor.index([]))


def test_a_crf_chooses_the_tags_of_a_sentence_together(vocab):
  bert, params, tokenizer = model(vocab, 'tagging', labels=3)
  rng = np.random.default_rng(0)
  head = params['tagging'] | {
    name: rng.normal(0, 4, shape).astype(np.float32) for name, shape in crf.shapes(3).items()
  }
  chain = bert.clone(config=dataclasses.replace(bert.config, crf=True))
  labels, text = ['O', 'B-X', 'I-X'], 'the undocumented name of a class, or None'
  predictor = Predictor(chain, params | {'tagging': head}, tokenizer, labels=labels, batch_size=4)
  batch = tokenizer([text])
  logits = applied(bert.config, ('tagging',), 3)(params, batch)['tagging_logits']
  [ids] = batch['input_ids']
  starts = (
    (tokenizer.word_flags[ids] & BEGINS > 0) & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
  )
  [best] = np.asarray(crf.viterbi(head, logits, starts[None]))
  tags = [labels[i] for i in best[starts]]
  assert tags != [labels[i] for i in np.asarray(logits[0].argmax(-1))[starts]]
  spans = predictor.tag(text, words='tokens')
  _, [offsets] = tokenizer.encode_offsets([text])
  firsts = [*np.flatnonzero(starts) - 1, len(offsets)]  # without [CLS]
  assert [(s.label, s.start, s.end) for s in spans] == [
    (name, offsets[firsts[a]][0], offsets[firsts[b] - 1][1])
    for name, a, b in metrics.entities(tags)
  ]


@pytest.mark.parametrize('output', ['mean', 'cls', 'last_four', 'classification', 'nsp', 'choice',
                                    'tagging', 'span', 'mlm'])  # fmt: skip
def test_packed_rows_give_what_single_ones_give(vocab, output):
  bert, params, tokenizer = model(
    vocab, 'mlm', 'nsp', 'classification', 'choice', 'tagging', 'span', labels=3
  )
  rng = np.random.default_rng(0)
  words = LONG.split()
  texts = [' '.join(rng.choice(words, n)) for n in rng.integers(1, 14, 60)]
  batch = tokenizer(texts)
  if output == 'tagging':
    batch['labels'] = np.where(batch['segment_ids'] > 0, 0, -1)
  if output == 'mlm':
    batch['masked_lm_positions'] = np.ones((60, 2), np.int32)
    batch['masked_lm_ids'] = np.full((60, 2), 7)
  few = Runner(bert, params, tokenizer, batch_size=4)
  packed = [b for b, _ in few._batches(batch, batch['segment_ids'].sum(1)) if 'cls_positions' in b]
  assert len(packed) > 2 and packed[0]['input_ids'].shape == (4, 48)
  found = few.run(batch, output, top_k=3)
  unpacked = Runner(bert, params, tokenizer, batch_size=1000)
  alone = unpacked.run(batch, output, top_k=3)
  for one, other in zip(found, alone, strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, other)
