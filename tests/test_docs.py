"""The documentation builds without warnings, and its pages need no other host."""

import pathlib
import re
import subprocess
import sys

import pytest

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
    assert re.search(rf'id="?bertjax\.[\w.]+\.{name}"?[ >]', text), name


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
  """Tests, modules, launchers and benchmarks by path, and `python -m benchmarks NAME`."""
  text = page.read_text()
  for path in re.findall(
    r'(?<![\w/])(?:tests|configs|launch|benchmarks|docs|notebooks)/[\w./-]*\w', text
  ):
    assert (ROOT / path).exists(), path
  for name in re.findall(r'python -m benchmarks ([a-z_]+)', text):
    assert (ROOT / 'benchmarks' / f'{name}.py').exists(), name
