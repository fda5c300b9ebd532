"""Explanations: attributions equal PyTorch's, roll-out by hand, a page that loads nothing."""

import base64
import json
import re

import jax
import numpy as np
import pytest

from bertjax.__main__ import main
from bertjax.inference import attributions
from bertjax.inference.predictor import Predictor
from bertjax.interop.directory import save_model
from tests.test_predictor import applied, model

TEXT = 'the [MASK] of a class </script>'


@pytest.fixture(scope='module')
def mlm(vocab):
  return Predictor(*model(vocab, 'mlm'), batch_size=4)


@pytest.fixture(scope='module')
def explanation(mlm):
  return attributions.explain(mlm, TEXT, 'or None')


def test_attention_and_layers_are_the_models(mlm, explanation):
  batch = mlm.tokenizer([TEXT], ['or None'])
  out = applied(mlm.config, ('mlm',), capture=('attention',))(mlm.forward.params, batch)
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
  np.testing.assert_allclose(attributions.rollout(attention), expected)
  np.testing.assert_allclose(attributions.rollout(attention).sum(1), 1)


@pytest.mark.parametrize('head', ['classification', 'mlm'])
def test_attributions_equal_pytorchs(tmp_path, vocab, head):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  config, params, tokenizer = model(vocab, head, labels=3)
  names = ['x', 'y', 'z'] if head == 'classification' else []
  save_model(tmp_path, config, params, tokenizer, labels=names)
  found = attributions.explain(Predictor.from_dir(tmp_path), 'the [MASK] of a class').attributions
  kind = 'SequenceClassification' if names else 'MaskedLM'
  theirs = getattr(transformers, f'BertFor{kind}').from_pretrained(tmp_path).eval()
  ids = torch.tensor(tokenizer(['the [MASK] of a class'])['input_ids']).long()
  embedded = theirs.bert.embeddings.word_embeddings(ids).detach().requires_grad_()
  logits = theirs(inputs_embeds=embedded).logits[0]
  assert len(found) == (3 if names else 1)
  for name, values in found:
    target = logits[names.index(name)] if names else logits[2].max()
    [gradient] = torch.autograd.grad(target, embedded, retain_graph=True)
    expected = (gradient * embedded).sum(-1)[0].detach().numpy()
    np.testing.assert_allclose(values, expected, atol=1e-4 * np.abs(expected).max())
  if not names:
    assert found[0][0] == f'{tokenizer.vocab[int(logits[2].argmax())]} at token 2'


def test_the_page_holds_all_of_it_and_loads_nothing(tmp_path, vocab, explanation):
  config, params, tokenizer = model(vocab, 'mlm')
  save_model(tmp_path / 'm', config, params, tokenizer)
  arguments = [f'--text={TEXT}', '--pair=or None', f'--to={tmp_path}/deep/page.html']
  assert main(['explain', f'--model={tmp_path}/m', *arguments]) == 0
  page = (tmp_path / 'deep' / 'page.html').read_text()
  assert page.count('</script>') == 1  # the one in the text cannot end the script
  assert not re.search(r'(src|href)=|@import|fetch\(|https?://(?!www.w3.org/2000/svg)', page)
  data = json.loads(re.search('const data = (.*);\n', page)[1])
  assert data['tokens'] == explanation.tokens and data['layers'] == explanation.layers
  raw = np.frombuffer(base64.b64decode(data['attention']), np.uint8)
  assert np.abs(raw.reshape(explanation.attention.shape) / 255 - explanation.attention).max() < 0.01


def test_what_has_no_heads_is_explained_by_its_attention(vocab):
  found = attributions.explain(Predictor(*model(vocab), batch_size=4), 'the name')
  assert found.layers == [] and found.attributions == [] and found.attention.shape[0] == 4


def test_long_texts_are_refused(mlm):
  with pytest.raises(ValueError, match='shows at most 48 tokens, the text has 62'):
    attributions.explain(mlm, 'the ' * 60)
