"""Text for people uses the field's terms: docs, pages, help, errors, docstrings, comments, names.

The left column is what an earlier dialect of this project said, the right one what to say instead.
"""

import ast
import contextlib
import inspect
import io
import json
import pathlib
import re
import tokenize

import pytest

import bertjax

ROOT = pathlib.Path(__file__).parent.parent

WORDS = {
  r'tells?|told|telling': 'log, warn, report, raise',
  r'go(es|ing)? on( with)?|went on': 'resume, continue',
  r'anew|afresh|for good': 're-sampled each epoch, re-initialised, static',
  r'sees|do(es)? not see|none sees': 'attends to',
  r'(stands?|stood|lies?|lay) (in|on|at|there|beside|behind|between|ready)': 'is in, is stored in',
  r'by (itself|themselves)|of (its|their) own|alone': 'separately, standalone, only',
  r'mask_share|random_share|warmup_share|long\.share|held-?out share|share of': 'fraction, ratio',
  r'(?<!-)whole(?![- _](word|span))|half-written|damaged': 'complete, partial, corrupt',
  r'pieces?|masked places?|places|slots?': 'tokens, positions, indices',
  r'(matrix )?products|products? of matrices': 'matmuls',
  r'cuts?|cutting|left out|leaves? out|leaving out|falls? to|fell to': 'truncate, skip, assign',
  r'at best': 'roofline bound, upper bound',
  r'twins?|peers?': 'reference implementation, baseline',
  r'folds?|folded|folding': 'normalise, normalisation',
  r'spill(s|ed)?|vouch(es|ed)?|journal': 'intermediate shards, commit, committed length',
  r'roll call|blames?|(has|have|did) not come': 'handshake, join, stragglers',
  r'hindrances?|whoever|gists?|golds': 'reason, the caller, summary, references',
  r'passes over|data\.passes|--passes': 'dupe_factor',
  r'config\.(steps|accumulation|keep|spike|epochs|seeds|eval_rows)|redraw\w*|head_factor|fresh_head'
  r'|--process(es)?\b|--coordinator\b': 'the names of transformers and jax.distributed',
}

# Words of the list in another sense.
ALLOWED = re.compile(r'whole[- ]words?|whole_word|case[- ]fold\w*|let alone|vouch\w*\.py', re.I)
PATTERN = {re.compile(rf'\b({left})\b', re.I): right for left, right in WORDS.items()}


def hits(text: str):
  """(word, what to say instead) for each word of the list in a text."""
  text = ALLOWED.sub(' ', text)
  for pattern, right in PATTERN.items():
    for match in pattern.finditer(text):
      yield match[0], right


def markdown(path: pathlib.Path):
  """(line number, text) of a page, or of a notebook's Markdown cells."""
  text = path.read_text()
  if path.suffix == '.ipynb':
    cells = [c['source'] for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown']
    text = '\n'.join(''.join(cell) for cell in cells)
  yield from enumerate(text.splitlines(), 1)


def python(path: pathlib.Path):
  """(line number, text) of comments, docstrings and test names; outside tests/ of all strings with
  a blank, which are help and errors."""
  source = path.read_text()
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      yield token.start[0], token.string
  data = path.is_relative_to(ROOT / 'tests')
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef) and node.name.startswith('test_'):
      yield node.lineno, node.name.replace('_', ' ')
    if data and isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
      yield from enumerate((ast.get_docstring(node) or '').splitlines(), 1)
    elif not data and isinstance(node, ast.Constant) and ' ' in str(node.value):
      yield from enumerate(str(node.value).splitlines(), node.lineno)


def html(path: pathlib.Path):
  """(line number, text) of a template: all but styles, and of scripts the strings and comments."""
  inside = None
  for number, line in enumerate(path.read_text().splitlines(), 1):
    if tag := re.match('<(script|style)>', line):
      inside = tag[1]
    elif re.search('</(script|style)>', line):
      inside = None
    elif inside == 'script':
      strings = re.findall(r"'[^']*'|`[^`]*`|//.*", re.sub(r'\$\{[^}]*\}', '', line))
      yield number, ' '.join(strings)
    elif inside is None:
      yield number, line


def names(value, name: str):
  """A public name, those of its parameters, and of its attributes if it is a class or a module."""
  yield name
  if callable(value):
    with contextlib.suppress(ValueError):  # built-in
      yield from inspect.signature(value).parameters
  if inspect.isclass(value) or inspect.ismodule(value):
    for key, member in vars(value).items():
      if not key.startswith('_') and not inspect.ismodule(member):
        yield from names(member if inspect.isroutine(member) else None, key)


PAGES = [ROOT / 'README.md', ROOT / 'CHANGELOG.md', ROOT / 'CONTRIBUTING.md',
         *ROOT.glob('docs/**/*.md'), *ROOT.glob('notebooks/*.ipynb'),
         *ROOT.glob('launch/*'), *ROOT.glob('bertjax/pages/*.html')]  # fmt: skip
CODE = [path for folder in ('bertjax', 'configs', 'benchmarks', 'docs', 'tests')
        for path in ROOT.glob(f'{folder}/**/*.py') if path != pathlib.Path(__file__)]  # fmt: skip


@pytest.mark.parametrize('path', PAGES + CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_uses_the_terms_of_the_field(path):
  lines = {'.py': python, '.html': html}.get(path.suffix, markdown)(path)
  wrong = [
    f'{path.relative_to(ROOT)}:{number}: {word!r}: say {right}'
    for number, line in lines
    for word, right in hits(line)
  ]
  assert not wrong, '\n' + '\n'.join(wrong)


@pytest.mark.parametrize('name', sorted(bertjax.__all__))
def test_public_names_are_terms_of_the_field(name):
  for found in names(getattr(bertjax, name), name):
    words = re.sub('(?<=[a-z])(?=[A-Z])', ' ', found).replace('_', ' ')
    assert not list(hits(words)), found
