"""`bertjax explain` writes one page that holds all of it."""

import base64
import json
import re

import numpy as np
import pytest

from bertjax.__main__ import main
from bertjax.inference import inspect
from bertjax.inference.predictor import Predictor
from bertjax.interop.loading import save_model
from tests.models import model

TEXT = 'the [MASK] of a class </script>'


@pytest.fixture(scope='module')
def mlm(vocab):
  return Predictor(*model(vocab, 'mlm'), batch_size=4)


@pytest.fixture(scope='module')
def explanation(mlm):
  return inspect.explain(mlm, TEXT, 'or None')


@pytest.mark.e2e
def test_the_page_holds_all_of_it_and_loads_nothing(tmp_path, vocab, explanation, caplog):
  bert, params, tokenizer = model(vocab, 'mlm')
  save_model(tmp_path / 'm', bert, params, tokenizer)
  arguments = [f'--text={TEXT}', '--pair=or None', f'--out={tmp_path}/deep/page.html']
  assert main(['explain', f'--model={tmp_path}/m', *arguments]) == 0
  assert 'replaced' not in caplog.text
  page = (tmp_path / 'deep' / 'page.html').read_text(encoding='utf-8')
  assert page.count('</script>') == 1  # the one in the text cannot end the script
  assert not re.search(r'(src|href)=|@import|fetch\(|https?://(?!www.w3.org/2000/svg)', page)
  data = json.loads(re.search('const data = (.*);\n', page)[1])
  assert data['tokens'] == explanation.tokens and data['layers'] == explanation.layers
  assert [word for word, _, _ in data['words']] == [word for word, _, _ in explanation.words]
  [attribution] = data['attributions']
  assert attribution['name'] == explanation.attributions[0].name
  raw = np.frombuffer(base64.b64decode(data['attention']), np.uint8)
  assert np.abs(raw.reshape(explanation.attention.shape) / 255 - explanation.attention).max() < 0.01
  assert main(['explain', f'--model={tmp_path}/m', *arguments]) == 0
  assert f'{tmp_path}/deep/page.html exists already and is replaced' in caplog.text
