"""Explain: what a model makes of a text, as one HTML page that needs nothing else.

  bertjax explain --model=DIR "The [MASK] statement raises an exception." --to=page.html

Shows attention by layer and head on the tokens and its roll-out; what the masked-LM head would
predict from each layer; and the share of each token, gradient times input, in the classes or in
what is predicted at each [MASK].
"""

import logging
import pathlib

from bertjax.inference import attributions
from bertjax.inference.predictor import Predictor

_log = logging.getLogger(__name__)

ARGUMENT = 'text'
FLAGS = {
  'model': ('', 'a model directory, a folder of another library, or a hub name'),
  'text': ('', 'the text'),
  'pair': ('', 'a second text'),
  'to': ('explain.html', 'the page to write'),
}


def run(*, model: str, text: str, pair: str = '', to: str = 'explain.html') -> None:
  """Writes the page.

  Raises:
    ValueError: if the text has more tokens than a page can show.
  """
  if not model or not text:
    raise ValueError('explain needs --model=DIR and a text.')
  if '://' in to:
    raise ValueError(f'--to must be a local file, got {to}.')
  explanation = attributions.explain(Predictor.from_dir(model), text, pair)
  page = attributions.to_html(explanation, pathlib.Path(model).name)
  path = pathlib.Path(to)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(page, encoding='utf-8')
  temporary.replace(path)
  _log.info('written to %s', path)
