"""Named entities of CoNLL-2003 (paper, section 5.3), or any file of that shape: `tagging:conll`.

  bertjax finetune --config=tagging --workdir=DIR --config.init_from=MODEL \\
      --config.data.source=CONLL2003

Cased models do better here. First pieces of words carry the tags. `--config.data.options=`
context=True fills each row with the sentences around it in its document, as the paper did;
`tagging:conll` also takes types (PER|LOC|..., else found), word and tag (their columns, 0 and -1).
"""

from bertjax.config import finetuning


def get_config(arg='conll2003'):
  config = finetuning(arg or 'conll2003')
  config.learning_rate = 5e-5
  return config
