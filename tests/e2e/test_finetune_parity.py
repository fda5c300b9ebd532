"""The losses of fine-tuning, step by step, beside a plain transformers loop on the same batches."""

import numpy as np
import pytest

from tests.test_finetune import make, model  # noqa: F401 (fixtures)

pytest.importorskip('transformers')
pytest.importorskip('torch')


@pytest.mark.parametrize(
  ('task', 'recipe'),
  [('sst2', 'glue'), ('stsb', 'glue'), ('conll2003', 'tagging'), ('squad1', 'squad'),
   ('codah', 'choice')],
)  # fmt: skip
def test_losses_follow_transformers(make, task, recipe):  # noqa: F811
  from benchmarks.finetune import losses_side_by_side

  config = make(task, recipe)
  config.optimizer.name, config.learning_rate = 'adamw', 1e-3
  found = losses_side_by_side(config, 8)
  np.testing.assert_allclose(found['ours'], found['theirs'], rtol=1e-4, atol=1e-6)
  assert found['ours'][-1] != found['ours'][0]
