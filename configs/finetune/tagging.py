"""Named entities of CoNLL-2003 (paper, section 5.3), or any file of that shape: `tagging:conll`.

  bertjax finetune --config=tagging --workdir=DIR --config.init_from=MODEL \\
      --config.data.source=CONLL2003

Cased models do better here. The first token of a word carries its tag.
`--config.task.context=True` fills each sequence with the sentences around it in its document, as
the paper did. For `tagging:conll`, `--config.task.types=PER|LOC` names the entity types (default:
those of the training split); `word` and `tag` are columns, 0 and -1.
"""

from bertjax.config import finetuning


def get_config(arg='conll2003'):
  config = finetuning(arg or 'conll2003')
  config.learning_rate = 5e-5
  return config
