"""The command: one sentence for each mistake, the flags of every verb, what a model may be."""

import pytest

from bertjax.interop import directory
from tests.test_predictor import model


@pytest.fixture(scope='module')
def run(tmp_path_factory, vocab):
  """The workdir of a finished fine-tuning run, as far as programs that take a model read it."""
  folder = tmp_path_factory.mktemp('run')
  config, params, tokenizer = model(vocab, 'classification')
  directory.save_model(folder / 'model', config, params, tokenizer, labels=['bad', 'good'])
  (folder / 'run.json').write_text('{}')
  return folder


def test_a_workdir_is_a_model(run, tmp_path):
  assert directory.find_model(str(run)) == run / 'model'
  assert directory.find_model(run / 'model') == run / 'model'
  assert directory.find_model('bert-base-uncased') == 'bert-base-uncased'
  config, params = directory.load_weights(str(run))
  assert config.num_layers == 4 and 'classification' in params
  assert directory.read_labels(run)[0] == ['bad', 'good']
  assert directory.load_tokenizer(run).fingerprint
  (tmp_path / 'run.json').write_text('{}')
  with pytest.raises(ValueError, match='has not written its model/ yet'):
    directory.load_model(tmp_path)
