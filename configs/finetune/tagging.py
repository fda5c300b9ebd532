"""Named entities of CoNLL-2003 (paper, section 5.3), or any file of that shape: `tagging:conll`.

  bertjax finetune --config=tagging --workdir=DIR --config.init_from=MODEL \\
      --config.data.source=CONLL2003

Cased models do better here. First pieces of words carry the tags.
"""

from bertjax import finetune


def get_config(arg='conll2003'):
  config = finetune.default_config(arg or 'conll2003')
  config.learning_rate = 5e-5
  return config
