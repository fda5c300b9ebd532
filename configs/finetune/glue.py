"""GLUE (Wang et al. 2018) as the paper fine-tuned it: 3 epochs of batches of 32, best of 4 rates.

  bertjax finetune --config=glue:sst2 --workdir=DIR --config.init_from=MODEL \\
      --config.data.source=GLUE/SST-2

After the colon the task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli. The paper chose the
learning rate on the dev split among 5e-5, 4e-5, 3e-5 and 2e-5 (`--config.learning_rate`), and took
the best of some random restarts (`--config.seed`) on small sets.
"""

from bertjax.config import finetuning


def get_config(arg='sst2'):
  config = finetuning(arg or 'sst2')
  config.data.length = 128
  return config
