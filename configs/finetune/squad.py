"""SQuAD (Rajpurkar et al. 2016, 2018): version 1.1, or with unanswerable questions `squad:squad2`.

  bertjax finetune --config=squad --workdir=DIR --config.init_from=MODEL --config.data.source=SQUAD

Windows of 384 tokens every 128 tokens, as run_squad.py. `--config.task.stride=`, `max_query`,
`nbest` and `max_answer` are its other numbers; `--config.task.scorer=cmrc2018` scores answers in
Chinese by characters, as CMRC 2018 does. The paper trained 3 epochs of batches of 32 at 5e-5 for
version 1.1, 2 epochs of 48 at 5e-5 for version 2.0.
"""

from bertjax.config import finetuning


def get_config(arg='squad1'):
  config = finetuning(arg or 'squad1')
  config.data.length, config.learning_rate = 384, 5e-5
  config.batch_size, config.num_train_epochs = (
    (48, 2.0) if config.task.name == 'squad2' else (32, 3.0)
  )
  config.data.test = ''
  return config
