"""Multiple choice (paper, section 4.4): SWAG (`choice`), or CODAH (`choice:codah`).

  bertjax finetune --config=choice --workdir=DIR --config.init_from=MODEL --config.data.source=SWAG

The paper: 3 epochs, batches of 16 questions, 2e-5. `choice:choice` reads any such table: its
`--config.data.options=` are prompt, endings (joined by |), label (the right one, counted from 0)
and start (of every ending), columns by name, or by number in files without a header; and
delimiter, encoding and on_bad_row as in `table`.
"""

from bertjax.config import finetuning


def get_config(arg='swag'):
  config = finetuning(arg or 'swag')
  config.batch_size = 16
  return config
