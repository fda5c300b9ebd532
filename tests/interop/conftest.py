"""Fixtures of the tests of files."""

import pathlib
import shutil

import pytest

from bertjax.interop.huggingface import save_hf
from tests.interop.models import random_params, tiny


@pytest.fixture(scope='module')
def saved(tmp_path_factory, vocab):
  """(folder, config, params) of a tiny model for pre-training."""
  config, tokenizer = tiny(vocab)
  params = random_params(config)
  path = tmp_path_factory.mktemp('saved') / 'model'
  save_hf(path, config, params, tokenizer)
  return path, config, params


@pytest.fixture
def folder(saved, tmp_path):
  """A copy of the saved model, to change."""
  return pathlib.Path(shutil.copytree(saved[0], tmp_path / 'model'))
