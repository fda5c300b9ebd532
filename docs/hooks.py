"""MkDocs hook: expands `::: bertjax.NAME` on the API page to the module that defines NAME.

The page lists public names only, in groups; the build fails where it and `bertjax.__all__` differ.
"""

import re

from mkdocs.exceptions import PluginError

import bertjax


def on_page_markdown(markdown, page, **kwargs):
  """Returns the page's text with the full path of every public name."""
  if page.file.src_uri != 'api.md':
    return markdown
  listed = set(re.findall(r'^::: bertjax\.(\w+)$', markdown, re.M))
  if listed != set(bertjax.__all__):
    raise PluginError(
      f'docs/api.md and bertjax.__all__ differ: {sorted(listed ^ set(bertjax.__all__))}; '
      'list each public name once, as `::: bertjax.NAME`.'
    )
  return re.sub(r'^::: bertjax\.(\w+)$', _directive, markdown, flags=re.M)


def _directive(match: re.Match) -> str:
  name = match[1]
  heading = f'{{heading: bertjax.{name}, toc_label: {name}}}'
  return f'::: {bertjax._PUBLIC[name]}.{name}\n    options: {heading}\n'
