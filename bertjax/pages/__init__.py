"""HTML pages in one style. A page loads no other file, so it works offline and in a notebook."""

import html
import io
import json
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

_FOLDER = pathlib.Path(__file__).parent
_REPORT = """<style>
  svg { max-width: 100%; height: auto; } td { min-width: 3em; } td.text { min-width: 16em; }
  .flow > p { width: 100%; }
  p > strong { color: #b42318; }
</style>"""


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


def report(
  title: str, kind: str, sections: Mapping[str, str], summary: str = '', notes: Sequence[str] = ()
) -> str:
  """Renders a page of sections {heading: HTML}, without empty ones, below a summary and notes."""
  body = [_REPORT, f'<h1>{html.escape(title)}</h1>']
  body += [f'<p>{html.escape(summary)}.</p>'] if summary else []
  body += [f'<p><strong>{html.escape(note)}.</strong></p>' for note in notes]
  body += [
    f'<section><h2>{heading}</h2><div class="flow scroll">{content}</div></section>'
    for heading, content in sections.items() if content
  ]  # fmt: skip
  return render(f'{title}: {kind}', ''.join(body))


def run_name(path) -> str:
  """Returns the name of a run or model: 'RUN' of RUN/model.

  >>> run_name('runs/reviews/model'), run_name('runs/reviews'), run_name('bert-base-uncased')
  ('reviews', 'reviews', 'bert-base-uncased')
  """
  path = pathlib.Path(path).absolute()
  return path.parent.name if path.name == 'model' else path.name


def table(rows: Iterable, head: Sequence[str] = ()) -> str:
  """An HTML table; columns of numbers only are aligned right. Without a head, facts by name."""
  lines = [''.join(f'<th>{html.escape(cell)}</th>' for cell in head)] if head else []
  rows = [[f'{cell:g}' if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
  numeric = [all(map(_is_number, column)) for column in zip(*rows, strict=True)]
  for cells in rows:
    kinds = ['n' if number else 'text' * (len(cell) > 40)
             for number, cell in zip(numeric, cells, strict=True)]  # fmt: skip
    lines.append(''.join(f'<td class="{kind}">{html.escape(cell)}</td>' if kind else
                         f'<td>{html.escape(cell)}</td>'
                         for kind, cell in zip(kinds, cells, strict=True)))  # fmt: skip
  kind = '' if head else ' class="facts"'
  return f'<table{kind}>{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def _is_number(cell: str) -> bool:
  return cell.replace('.', '', 1).lstrip('-').isdecimal()


def axes(width: float = 4.8, height: float = 3.4, **labels):
  """Matplotlib axes with a grid, the only ones of a figure of width x height inches."""
  from matplotlib.figure import Figure

  made = Figure(figsize=(width, height), layout='constrained').add_subplot()
  made.grid(alpha=0.3)
  made.set(**labels)
  return made


def svg(axes) -> str:
  """The figure of these axes. Text stays text, so that the reader's fonts show labels of any
  language."""
  import matplotlib

  if 0 < len(axes.get_legend_handles_labels()[1]) <= 12:
    axes.legend(fontsize=8)
  out = io.StringIO()
  with matplotlib.rc_context({'svg.fonttype': 'none'}), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing from font')
    axes.figure.savefig(out, format='svg')
  return out.getvalue().partition('?>')[2].partition('>')[2]  # without the XML head and doctype


def _read(name: str) -> str:
  return (_FOLDER / name).read_text(encoding='utf-8')
