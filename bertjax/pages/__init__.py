"""HTML pages in one style. A page loads no other file, so it works offline and in a notebook."""

import html
import json
import pathlib
import re

_FOLDER = pathlib.Path(__file__).parent


def render(title: str, body: str = '', *, template: str = '', data=None) -> str:
  """Renders a page.

  Args:
    title: plain text of the browser's title.
    body: HTML of the page.
    template: a file of this folder in place of `body`.
    data: JSON value for the template's script.
  """
  if template:
    body = _read(template).replace('{{data}}', json.dumps(data).replace('<', '\\u003c'), 1)
  values = {'title': html.escape(title), 'style': _read('style.css'), 'body': body}
  return re.sub(r'\{\{(\w+)\}\}', lambda match: values[match[1]], _read('page.html'))


def run_name(path) -> str:
  """Returns the name of a run or model: 'RUN' of RUN/model.

  >>> run_name('runs/reviews/model'), run_name('runs/reviews'), run_name('bert-base-uncased')
  ('reviews', 'reviews', 'bert-base-uncased')
  """
  path = pathlib.Path(path).absolute()
  return path.parent.name if path.name == 'model' else path.name


def _read(name: str) -> str:
  return (_FOLDER / name).read_text(encoding='utf-8')
