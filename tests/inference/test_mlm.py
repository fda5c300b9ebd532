"""Masked-LM predictions and continuations, against the model applied token by token."""

import dataclasses

import jax
import numpy as np
import pytest

from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.mlm import words_of
from bertjax.inference.predictor import Predictor
from bertjax.model.heads import Bert, init_params
from tests.models import LONG, TEXTS, applied, model


def log_probs(predictor, ids, place):
  """Log-probabilities at a place that is masked, by applying the model once."""
  tokenizer = predictor.tokenizer
  row = [tokenizer.cls_id, *ids, tokenizer.sep_id]
  row[place + 1] = tokenizer.mask_id
  out = applied(predictor.config, ('mlm',))(predictor.runner.params, {'input_ids': np.array([row])})
  return np.asarray(jax.nn.log_softmax(out['mlm_logits'][0, place + 1]))


@pytest.mark.e2e
def test_scores_are_natural_logs_with_one_mask_a_token(mlm):
  scores = mlm.score(TEXTS[:2])
  [ids] = mlm.tokenizer.encode(TEXTS[:1])
  logs = [log_probs(mlm, ids, place)[token] for place, token in enumerate(ids)]
  np.testing.assert_allclose([log for _, log in scores[0].tokens], logs, atol=1e-4)
  assert scores[0].log_likelihood == pytest.approx(sum(logs), abs=1e-3)
  assert scores[0].perplexity == pytest.approx(np.exp(-np.mean(logs)), rel=1e-3)
  again = mlm.score(TEXTS[1])
  assert scores[1].log_likelihood == pytest.approx(again.log_likelihood, abs=1e-3)


@pytest.mark.e2e
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


@pytest.mark.e2e
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


@pytest.mark.e2e
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


@pytest.mark.e2e
def test_rows_of_the_word_table_beyond_the_vocabulary_are_never_proposed(vocab):
  bert, _, tokenizer = model(vocab, 'mlm')
  config = dataclasses.replace(bert.config, vocab_size=tokenizer.vocab_size + 7)
  bert = Bert(config, heads=('mlm',), pooler=False)
  params = jax.jit(init_params, static_argnums=0)(bert, jax.random.key(0))
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


@pytest.mark.e2e
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


@pytest.mark.e2e
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
