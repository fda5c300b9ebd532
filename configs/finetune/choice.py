"""Multiple choice (paper, section 4.4): SWAG (`choice`), or CODAH (`choice:codah`).

  bertjax finetune --config=choice --workdir=DIR --config.init_from=MODEL --config.data.source=SWAG

The paper: 3 epochs, batches of 16 questions, 2e-5. `choice:choice` reads any such table: name its
columns in `--config.task.prompt=`, `endings` (joined by '|'), `label` (the correct ending, counted
from 0) and `start` (text before every ending); `delimiter`, `encoding` and `on_bad_row` as in
`table`. Columns of a file without a header are numbers from 0.
"""

from bertjax.config import finetuning


def get_config(arg='swag'):
  config = finetuning(arg or 'swag')
  config.batch_size = 16
  return config
