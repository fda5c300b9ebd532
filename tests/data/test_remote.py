"""Data sets of the hub and http addresses, from a server on loopback: listed, read in parts."""

import collections
import gzip
import http.server
import json
import re
import threading
import time
import urllib.parse

import pyarrow as pa
import pytest
from pyarrow import parquet

from bertjax.data import remote, tables
from bertjax.data import text as text_lib

COMMITS = {'main': 'a' * 40, 'v1': 'b' * 40, 'refs/convert/parquet': 'c' * 40}


class Hub:
  """Files of data sets, {(name, revision): {path: bytes}}, and what was asked for."""

  def __init__(self):
    self.files, self.cards, self.commits = collections.defaultdict(dict), {}, dict(COMMITS)
    self.refused = {}  # name -> (status, error code)
    self.trouble = []  # of the next answers: 'break', 'hang' or a status
    self.ranges = []  # (path, first byte, bytes)

  def answer(self, path: str, range_: str | None):
    """(status, headers, content)."""
    name = re.search('(?:datasets/)(me/[^/]+)', path)[1]
    if name in self.refused:
      status, code = self.refused[name]
      return status, {'X-Error-Code': code}, b''
    revisions = {sha: revision for revision, sha in self.commits.items()}
    if match := re.fullmatch(f'/api/datasets/{name}/revision/(.*)', path):
      revision = revisions.get(match[1], match[1])
      if (name, revision) not in self.files:
        code = 'RevisionNotFound' if any(name == n for n, _ in self.files) else 'RepoNotFound'
        return 404, {'X-Error-Code': code}, b''
      files = self.files[name, revision]
      info = {'id': name, 'sha': self.commits[revision], 'cardData': self.cards.get(name, {}),
              'siblings': [{'rfilename': p, 'size': len(b)} for p, b in files.items()]}  # fmt: skip
      return 200, {}, json.dumps(info).encode()
    commit, _, file = path.removeprefix(f'/datasets/{name}/resolve/').partition('/')
    content = self.files[name, revisions[commit]].get(file)
    if content is None:
      return 404, {'X-Error-Code': 'EntryNotFound'}, b''
    first, last = map(int, re.fullmatch(r'bytes=(\d+)-(\d+)', range_).groups())
    part = content[first : last + 1]
    self.ranges.append((file, first, len(part)))
    return 206, {'Content-Range': f'bytes {first}-{last}/{len(content)}'}, part

  def push(self, name: str, files: dict[str, bytes]):
    """Moves main of all data sets to a new commit, this one's with other files."""
    earlier = f'earlier{len(self.commits)}'
    for (of, revision), content in list(self.files.items()):
      if revision == 'main':
        self.files[of, earlier] = content
    self.files[name, 'main'] = files
    self.commits |= {earlier: self.commits['main'], 'main': f'{len(self.commits):040x}'}

  def fetched(self) -> int:
    return sum(count for *_, count in self.ranges)


@pytest.fixture
def hub(monkeypatch):
  from huggingface_hub import constants

  state = Hub()

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
      path = urllib.parse.unquote(self.path.partition('?')[0])
      trouble = state.trouble.pop(0) if state.trouble and '/resolve/' in path else None
      if isinstance(trouble, int):
        status, headers, content = trouble, {}, b''
      else:
        status, headers, content = state.answer(path, self.headers.get('Range'))
      self.send_response(status)
      for key, value in {**headers, 'Content-Length': len(content)}.items():
        self.send_header(key, str(value))
      self.end_headers()
      if trouble == 'hang':
        time.sleep(1)
      elif trouble == 'break':
        content, self.close_connection = content[: len(content) // 2], True
      self.wfile.write(content)

    def log_message(self, *words):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  state.address = f'http://127.0.0.1:{server.server_port}'
  monkeypatch.setattr(constants, 'ENDPOINT', state.address)
  template = state.address + '/{repo_id}/resolve/{revision}/{filename}'
  monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  monkeypatch.setattr(remote, '_WAITS', (0.01, 0.01))
  remote.list_data_set.cache_clear()
  yield state
  remote.list_data_set.cache_clear()
  server.shutdown()
  server.server_close()


def table(texts, group: int = 1000, **columns) -> bytes:
  sink = pa.BufferOutputStream()
  columns |= {n: [v] * len(texts) for n, v in columns.items() if not isinstance(v, list)}
  columns = {'text': list(texts)} | columns
  parquet.write_table(pa.table(columns), sink, row_group_size=group, compression='none')
  return sink.getvalue().to_pybytes()


def read(source, format='prose', **options):
  return list(text_lib.read_documents(source, format, **options))


def names(source) -> list[str]:
  return [str(path).rpartition('/resolve/')[2] for path in remote.list_data_set(source)]


def test_files_of_a_split_are_found_by_their_names(hub):
  files = ['README.md', 'data/train-00000-of-00002.parquet', 'data/train-00001-of-00002.parquet',
           'data/test-00000-of-00001-0a1b.parquet', 'en/train-00000-of-00001.parquet',
           'de/train/0000.parquet', 'de/dev.jsonl.gz', 'de/dev.parquet', 'logs.tar']  # fmt: skip
  hub.files['me/texts', 'main'] = dict.fromkeys(files, b'')
  main = COMMITS['main']
  assert names('hf:me/texts') == names('hf:me/texts:train') == names('hf:me/texts:default/train')
  assert names('hf:me/texts') == [f'{main}/data/train-0000{i}-of-00002.parquet' for i in (0, 1)]
  assert names('hf:me/texts:test') == [f'{main}/data/test-00000-of-00001-0a1b.parquet']
  assert names('hf:me/texts/en:train') == [f'{main}/en/train-00000-of-00001.parquet']
  assert names('hf:me/texts:de/train') == [f'{main}/de/train/0000.parquet']
  assert names('hf:me/texts/de:dev') == [f'{main}/de/dev.parquet']
  choices = 'hf:me/texts/de:dev, hf:me/texts/de:train, hf:me/texts/default:test'
  with pytest.raises(ValueError, match=f'hf:me/texts:valid names no split .* one of {choices}'):
    names('hf:me/texts:valid')


def test_files_that_the_card_declares_go_before_their_names(hub):
  files = ['sample/10B/000_0.parquet', 'sample/10B/001_0.parquet', 'all/x/000_0.parquet']
  hub.files['me/web', 'main'] = dict.fromkeys(files, b'')
  hub.cards['me/web'] = {'configs': [
    {'config_name': 'default',
     'data_files': [{'split': 'train', 'path': ['all/*/*', 'sample/*/*']}]},
    {'config_name': 'small', 'data_files': [{'split': 'train', 'path': 'sample/10B/*'}]},
    {'config_name': 'deep', 'data_files': '**/*.parquet'},
    {'config_name': 'top', 'data_files': 'sample/*.parquet'},  # crosses no folder
  ]}  # fmt: skip
  assert len(names('hf:me/web/small:train')) == 2
  assert len(names('hf:me/web:train')) == len(names('hf:me/web/deep')) == 3
  with pytest.raises(ValueError, match='names no split'):
    names('hf:me/web/top:train')


def test_a_data_set_in_another_format_is_read_from_the_hub_s_copy(hub):
  hub.files['me/zip', 'main'] = {'texts.zip': b'', 'requirements.txt': b''}
  hub.files['me/zip', 'refs/convert/parquet'] = {'default/train/0000.parquet': table(['A b.'])}
  assert read('hf:me/zip:train') == ['A b.']
  hub.files['me/rows', 'main'] = {'train.csv': b'text\nA b.\n'}
  assert [row.values for row in tables.read_table('hf:me/rows:train', ['text'])] == [
    {'text': 'A b.'}
  ]
  with pytest.raises(ValueError, match=r'train.csv: text of the hub .*@refs/convert/parquet'):
    read('hf:me/rows:train')


def test_columns_are_read_by_name_from_every_shard(hub):
  hub.files['me/texts', 'main'] = {
    'data/train-00000-of-00002.parquet': table(['One.', 'Two.'], body='x', label=1),
    'data/train-00001-of-00002.parquet': table(['Three.'], body='y', label=2),
    'test.jsonl.gz': gzip.compress(b'{"text": "Four."}\n'),
    'dev.txt': b'Five.',
  }
  assert read('hf:me/texts:train') == ['One.', 'Two.', 'Three.']
  assert read('hf:me/texts:train', text_key='body') == ['x', 'x', 'y']
  assert read('hf:me/texts:test,hf:me/texts:dev', 'parquet') == ['Four.', 'Five.']
  rows = tables.read_table('hf:me/texts:train', ['text', 'label'])
  assert [row.values['label'] for row in rows] == [1, 1, 2]
  with pytest.raises(ValueError, match=r"train-0.* has no column 'txt'; it has \['body', 'label'"):
    read('hf:me/texts:train', text_key='txt')


def test_only_the_row_groups_and_columns_that_are_needed_are_fetched(hub):
  texts = [f'{i} ' + 'x' * 50_000 for i in range(40)]
  content = table(texts, group=10, other=[f'{i}' + 'y' * 50_000 for i in range(40)])
  hub.files['me/big', 'main'] = {'train.parquet': content}
  (path,) = remote.list_data_set('hf:me/big')
  rows = list(tables.parquet_rows(path, ['text'], skip=25))
  assert [row['text'] for _, row in rows] == texts[25:]
  assert rows[0][0] == 26
  metadata = parquet.ParquetFile(pa.BufferReader(content)).metadata
  columns = [metadata.row_group(i).column(0) for i in range(4)]
  needed = sum(column.total_compressed_size for column in columns[2:])
  assert needed <= hub.fetched() < needed + 2 * 2**16  # and the footer
  starts = [first for _, first, count in hub.ranges if count > 2**17]
  assert starts == [column.dictionary_page_offset for column in columns[2:]]


def test_reading_begins_before_the_file_has_come(hub):
  texts = [f'{i} ' + 'x' * 100_000 for i in range(100)]
  hub.files['me/big', 'main'] = {'train.parquet': table(texts, group=10)}
  assert next(text_lib.read_documents('hf:me/big', 'parquet'))
  assert hub.fetched() < 0.2 * sum(map(len, texts))


def test_a_revision_is_resolved_once_and_its_commit_read(hub):
  hub.files['me/texts', 'main'] = {'train.parquet': table(['New.'])}
  hub.files['me/texts', 'v1'] = {'train.parquet': table(['Old.'])}
  assert read('hf:me/texts:train@v1') == ['Old.']
  (path,) = remote.list_data_set('hf:me/texts:train')
  assert path.commit == COMMITS['main']
  hub.files['me/texts', 'v1'] |= {'test.parquet': table(['x'])}
  hub.commits |= {'main': 'd' * 40}  # somebody pushes
  assert remote.list_data_set('hf:me/texts:train') == (path,)
  with pytest.raises(ValueError, match=r'Revision Not Found.* Check the revision after the @'):
    read('hf:me/texts@v9')


def test_sources_are_pinned_to_the_commit_that_is_known_or_newest(hub):
  for revision in ('main', 'v1'):
    hub.files['me/texts', revision] = {'train.txt': b'One.', 'a/train.txt': b'Two.'}
  known = {'hf:me/texts/a': 'f' * 40}
  sources, commits = remote.pin('x=hf:me/texts/a, y=hf:me/texts@v1,z=/texts,tfds:c4', known)
  assert sources == f'x=hf:me/texts/a@{"f" * 40}, y=hf:me/texts@{"b" * 40},z=/texts,tfds:c4'
  assert commits == {'hf:me/texts/a': 'f' * 40, 'hf:me/texts@v1': 'b' * 40}
  assert remote.pin('hf:me/texts:train', {})[0] == f'hf:me/texts:train@{COMMITS["main"]}'
  assert remote.pin('/a/hf:b', {}) == ('/a/hf:b', {})
  gone, _ = remote.pin('hf:me/texts/a', known)
  with pytest.raises(ValueError, match=r'ffff cannot be read.* whose commit is gone cannot be res'):
    read(gone)


@pytest.mark.parametrize('trouble', [['break'], [503, 'break']])
def test_a_connection_that_breaks_is_tried_again(hub, trouble):
  hub.files['me/texts', 'main'] = {'train.parquet': table(['One.'] * 100)}
  hub.trouble = list(trouble)
  assert read('hf:me/texts') == ['One.'] * 100
  assert not hub.trouble


@pytest.mark.parametrize('trouble', ['break', 500])
def test_a_server_that_fails_every_time_gets_one_sentence(hub, trouble):
  hub.files['me/texts', 'main'] = {'train.parquet': table(['One.'] * 100)}
  hub.trouble = [trouble] * 9
  with pytest.raises(ValueError, match=r'train.parquet cannot be read after 3 tries: .*again') as e:
    read('hf:me/texts')
  assert e.value.exit_code == 75


@pytest.mark.parametrize(('status', 'code', 'message'), [
  (401, 'GatedRepo', r'Ask for access on its page'), (403, 'GatedRepo', r'Ask for access'),
  (404, 'RepoNotFound', r'Repository Not Found.* needs `hf auth login`'),
])  # fmt: skip
def test_a_refused_data_set_gets_one_sentence(hub, status, code, message):
  hub.refused['me/closed'] = status, code
  with pytest.raises(ValueError, match=f'hf:me/closed cannot be read: .*{message}') as error:
    read('hf:me/closed')
  assert '\n' not in str(error.value)


def test_a_file_that_is_gone_or_closed_meanwhile_is_named(hub):
  hub.files['me/texts', 'main'] = {'train.parquet': table(['One.'])}
  (path,) = remote.list_data_set('hf:me/texts')
  hub.refused['me/texts'] = 403, 'GatedRepo'
  with pytest.raises(ValueError, match=r'train.parquet cannot be read: .*Ask for access'):
    list(tables.parquet_rows(path, ['text']))


def test_a_truncated_file_is_named(hub):
  hub.files['me/texts', 'main'] = {
    'train.parquet': table(['One.'] * 1000)[:-100],
    'test.jsonl.gz': gzip.compress(b'{"text": "Four."}\n')[:-9],
  }
  with pytest.raises(ValueError, match=r'train.parquet is not a complete Parquet file'):
    read('hf:me/texts')
  with pytest.raises(ValueError, match=r'test.jsonl.gz is not a complete .gz file'):
    read('hf:me/texts:test')


def test_offline_gets_one_sentence(hub, monkeypatch):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  with pytest.raises(ValueError, match=r'hf:me/texts cannot be read: .*Unset HF_HUB_OFFLINE'):
    read('hf:me/texts')


def test_the_token_goes_to_the_hub_only(hub, monkeypatch):
  from huggingface_hub import constants, utils

  sent = []
  hub.files['me/texts', 'main'] = {'train.txt': b'One.'}
  monkeypatch.setenv('HF_TOKEN', 'hf_secret')
  get = utils.get_session().get

  def noting(url, headers, **options):
    sent.append(headers)
    return get(url, headers=headers)

  monkeypatch.setattr(utils.get_session(), 'get', noting, raising=False)
  address = str(remote.list_data_set('hf:me/texts')[0])
  assert read(address) == ['One.']
  assert sent[-1]['authorization'] == 'Bearer hf_secret'
  monkeypatch.setattr(constants, 'ENDPOINT', 'https://huggingface.co')
  assert read(address) == ['One.']
  assert 'authorization' not in sent[-1]


def test_an_address_of_another_kind_is_refused():
  with pytest.raises(ValueError, match='memory://a cannot be read: addresses begin with hf: or'):
    read('memory://a')
