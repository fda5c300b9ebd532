"""Spans of texts: tagged words, in their own characters."""

import dataclasses

import numpy as np
import pytest

from bertjax.data.words import BEGINS
from bertjax.inference.predictor import Predictor
from bertjax.model import crf
from bertjax.tasks import metrics
from tests.models import LONG, applied, model


@pytest.mark.e2e
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


@pytest.mark.e2e
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
