"""Fixtures of the tests of inference."""

import pytest

from bertjax.inference.predictor import Predictor
from tests.models import model


@pytest.fixture(scope='session')
def mlm(vocab):
  return Predictor(*model(vocab, 'mlm', 'nsp'), batch_size=8)
