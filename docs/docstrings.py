"""Griffe extension: shows doctests as code, and the help of `EncoderConfig`'s fields as a table."""

import ast
import re

import griffe

_DOCTEST = re.compile(r'^(?:>>> .*\n?)(?:.+\n?)*', re.M)


class Docstrings(griffe.Extension):
  """Changes docstrings for the site; the source has no Markdown."""

  def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
    """Fences doctests, which Markdown reads as quotations."""
    if obj.docstring:
      fence = lambda match: f'```pycon\n{match[0].rstrip()}\n```\n'  # noqa: E731
      obj.docstring.value = _DOCTEST.sub(fence, obj.docstring.value)

  def on_class_members(self, *, cls: griffe.Class, **kwargs) -> None:
    """Turns `name: type = _field(default, help)` into a default and a line of the docstring."""
    lines = []
    for name, attribute in cls.attributes.items():
      if str(attribute.value).startswith('_field('):
        attribute.value, text = attribute.value.arguments[0], attribute.value.arguments[1]
        lines.append(f'  {name}: {ast.literal_eval(str(text))}')
    if lines:
      cls.docstring.value += '\n\nAttributes:\n' + '\n'.join(lines) + '\n'
