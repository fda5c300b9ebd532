"""Fixtures of the tests of objectives."""

import pytest

from bertjax.data import dataset, loader
from bertjax.data.masking import Masking
from bertjax.data.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def batch(tiny_rows, vocab):
  """16 masked rows."""
  rows, special = dataset.Dataset(tiny_rows, 'train'), Tokenizer.from_file(vocab).special
  return loader.Batches(rows, 16, 0, Masking(max_predictions=10), 600, special).training(3)
