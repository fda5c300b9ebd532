"""Search and summaries: texts by similarity."""

import pytest

from bertjax.inference.predictor import Predictor
from tests.models import TEXTS, model


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
