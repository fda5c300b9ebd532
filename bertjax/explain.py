"""Explain: what a model makes of a text, as one HTML page that loads nothing else.

  bertjax explain --model=DIR "The [MASK] statement raises an exception." --out=page.html
  bertjax explain --model=QA_MODEL "Who came?" --pair="Ada came, with a friend."

Shows the predicted outputs of every head (classes, labels, a number, tags, an answer, an ending,
the fill of each [MASK], whether the second text follows), with each word's share in the log-odds
of an output by integrated gradients; what the masked-LM head would predict from each layer; and
attention by layer and head and its roll-out.
"""

import logging
import pathlib

from bertjax import io, pages
from bertjax.inference import inspect
from bertjax.inference.predictor import Predictor

_log = logging.getLogger(__name__)


def run(*, model: str, text: str, pair: str = '', out: str = 'explain.html') -> None:
  """Writes the page.

  Raises:
    ValueError: if the text is empty or has more tokens than a page can show.
  """
  if not model or not text:
    raise ValueError('explain needs --model=DIR and a text.')
  path = pathlib.Path(out)
  if not out or '://' in out or path.is_dir():
    raise ValueError(f'--out must be a local file such as explain.html, got {out!r}.')
  explanation = inspect.explain(Predictor.from_dir(model), text, pair)
  page = inspect.to_html(explanation, pages.run_name(model))
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.exists():
    _log.warning('%s exists already and is replaced', path)
  io.write_text(path, page)
  _log.info('written to %s', path)
