"""The documentation builds without warnings, and its pages need no other host."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from bertjax.__main__ import parse
from bertjax.config import flat, load_recipe
from bertjax.flags import VERBS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / 'docs').glob('**/*.md'))


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The built site."""
  pytest.importorskip('mkdocs', reason="needs pip install -e '.[docs]'")
  folder = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', f'--site-dir={folder}']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return folder


def test_every_page_is_in_the_navigation(site):
  built = {str(path.relative_to(site).parent) for path in site.glob('**/index.html')}
  assert built == {'.' if page.stem == 'index' else page.stem for page in PAGES}
  home = (site / 'index.html').read_text()
  for name in built - {'.'}:
    assert re.search(rf'href="?(\./)?{name}/', home), name


def test_pages_request_nothing_from_other_hosts(site):
  for path in site.glob('**/*.html'):
    text = path.read_text()
    requests = re.findall(
      r'<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)="?([^" >]+)', text
    )
    outside = [url for url in requests if re.match(r'(\w+:)?//', url)]
    assert not outside, f'{path}: {outside}'
    assert not re.search(r'@import|url\((https?:)?//', text), path


def test_api_page_documents_every_public_name(site):
  text = (site / 'api' / 'index.html').read_text()
  import bertjax

  for name in bertjax.__all__:
    assert re.search(rf'id="?bertjax\.([\w.]+\.)?{name}"?[ >]', text), name


@pytest.mark.parametrize('page', [ROOT / 'README.md', *PAGES], ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
  """Tests, modules, launchers and benchmarks by path, and `python -m benchmarks NAME`."""
  text = page.read_text()
  for path in re.findall(
    r'(?<![\w/])(?:tests|configs|launch|benchmarks|docs|notebooks)/[\w./-]*\w', text
  ):
    assert (ROOT / path).exists(), path
  for name in re.findall(r'python -m benchmarks ([a-z_]+)', text):
    assert (ROOT / 'benchmarks' / f'{name}.py').exists(), name


RECIPES = ('bert_mini:three_stages', 'glue', 'squad', 'tagging:conll', 'choice:choice', 'table',
           'embed', 'rerank')  # fmt: skip


@pytest.mark.parametrize('page', [ROOT / 'README.md', *PAGES], ids=lambda page: page.stem)
def test_config_fields_that_a_page_names_exist(page):
  known = set().union(*(flat(load_recipe(name)) for name in RECIPES))
  sections = {name.rpartition('.')[0] for name in known}
  for name in re.findall(r'--config\.([a-z_0-9.\[\]]*[a-z_0-9])', page.read_text()):
    assert name in known | sections, name


def printed(page: pathlib.Path):
  """The `bertjax VERB ...` lines of shell blocks, and those in sentences with two flags."""
  text = re.sub(r'\\\n\s*', ' ', page.read_text())
  for language, block in re.findall(r'^```(\w*)\n(.*?)^```$', text, re.M | re.S):
    if language in ('', 'sh'):
      yield from re.findall(r'^(?:pip install .* && )?(bertjax .*)$', block, re.M)
  prose = re.sub(r'^```.*?^```$|^\|.*?$', '', text, flags=re.M | re.S)
  for line in re.findall(r'`(bertjax [^`]*? --[^`]*? [-"][^`]*)`', prose):
    yield ' '.join(line.split())


@pytest.mark.parametrize('page', [ROOT / 'README.md', *PAGES], ids=lambda page: page.stem)
def test_commands_of_a_page_have_flags_that_exist(page):
  for line in printed(page):
    _, verb, *arguments = shlex.split(line.replace('...', ''), comments=True)
    assert set(parse(verb, arguments)) == set(VERBS[verb].flags), line


# Flags of pytest, launchers, sbatch, mkdocs, ruff and TensorBoard.
OTHERS = {'slow', 'full', 'dry-run', 'nodes', 'signal', 'cpus-per-task', 'strict', 'check',
          'logdir', 'help', 'flag', 'noflag'}  # fmt: skip


@pytest.mark.parametrize('page', [ROOT / 'README.md', *PAGES], ids=lambda page: page.stem)
def test_flags_that_a_page_names_exist(page):
  known = set(OTHERS)
  for verb in VERBS.values():
    known |= {*verb.flags, *verb.short}
  for path in (ROOT / 'benchmarks').glob('[a-z]*.py'):
    known |= set(re.findall(r"^  '(\w+)': \(", path.read_text(), re.M))  # some import torch
  named = set(re.findall(r'(?<![\w-])--([a-z][\w-]*)(?![\w.-])', page.read_text()))
  named -= {'config'} - known
  assert named <= known, named - known
