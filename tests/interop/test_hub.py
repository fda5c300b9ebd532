"""Names on the hub: found in the cache by revision, errors in one sentence."""

import http.server
import os
import shutil
import subprocess
import sys
import threading

import pytest

from bertjax.interop import hub
from tests.interop.models import change_config


def in_cache(home, folder, revision, commit):
  """Puts a folder where huggingface_hub keeps what it downloaded."""
  repository = home / 'hub' / 'models--someone--some-bert'
  shutil.copytree(folder, repository / 'snapshots' / commit)
  (repository / 'refs').mkdir(exist_ok=True)
  (repository / 'refs' / revision).write_text(commit)


def run_python(code, **environment):
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True,
    env=os.environ | environment, check=False,
  )  # fmt: skip
  return out.stdout + out.stderr


@pytest.mark.e2e
def test_a_hub_name_is_read_from_the_cache_by_revision(saved, folder, tmp_path):
  change_config(folder, layer_norm_eps=1e-5)
  in_cache(tmp_path, saved[0], 'main', '1' * 40)
  in_cache(tmp_path, folder, 'v2', '2' * 40)
  code = (
    'import bertjax\n'
    "a = bertjax.load_model('someone/some-bert')[0].config.layer_norm_eps\n"
    "b = bertjax.load_model('someone/some-bert@v2')[0].config.layer_norm_eps\n"
    "print('read', a, b)\n"
    'try:\n'
    "  bertjax.load_model('someone/other-bert')\n"
    'except ValueError as error:\n'
    '  print(error)\n'
  )
  for offline, endpoint in (('1', 'https://huggingface.co'), ('0', 'http://127.0.0.1:9')):
    out = run_python(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE=offline, HF_ENDPOINT=endpoint)
    assert 'read 1e-12 1e-05' in out, out
    assert 'someone/other-bert is no folder with a config.json' in out, out


def test_an_error_of_the_hub_is_complete_and_says_what_to_do(tmp_path):
  answers = {
    'none': (404, 'RepoNotFound', 'Repository Not Found for url: ', 'check the name'),
    'gated': (403, 'GatedRepo', 'Cannot access gated repo for url ', 'ask for access'),
    'revision': (404, 'RevisionNotFound', 'Revision Not Found for url: ', 'check the revision'),
    'broken': (500, '', "Server error '500 Internal Server Error'", 'check the connection'),
  }

  class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      name = next((name for name in answers if f'/someone/{name}/' in self.path), 'broken')
      code, kind, *_ = answers[name]
      self.send_response(code)
      self.send_header('X-Error-Code', kind)
      self.send_header('X-Request-Id', 'abc')
      self.end_headers()

    def log_message(self, *words):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f'http://127.0.0.1:{server.server_port}'
  code = (
    'from bertjax.interop import hub\n'
    f'for name in {list(answers)}:\n'
    '  try:\n'
    "    hub.find_directory(f'someone/{name}')\n"
    '  except ValueError as error:\n'
    '    print(error)\n'
  )
  where = {'HF_HOME': str(tmp_path), 'HF_ENDPOINT': address}
  out = run_python(code, HF_HUB_OFFLINE='0', HF_HUB_ETAG_TIMEOUT='60', **where)
  server.shutdown()
  lines = [line for line in out.splitlines() if line.startswith('someone/')]
  for line, (name, (_, _, says, advice)) in zip(lines, answers.items(), strict=True):
    assert line.startswith(f'someone/{name} is no folder with a config.json'), line
    assert advice in line, line
    answer = line.partition('The hub says: ')[2].removeprefix('Got: HfHubHTTPError: ')
    if answer.startswith('An error happened while trying to locate the files'):  # hub 1.5, complete
      assert name == 'broken' and answer.endswith('your internet connection and try again.'), line
    else:
      assert answer.startswith(says) and f'someone/{name}' in answer, line


@pytest.mark.parametrize('name', ['no/such/folder', 'gs-no//x', '../x'])
def test_what_is_no_hub_name_is_not_looked_up(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match='no folder'):
    hub.find_directory(name)
