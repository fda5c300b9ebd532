"""Sources of text: every format, what bad input gets, and the embedded corpus."""

import bz2
import gzip
import hashlib
import importlib.resources
import importlib.util
import json
import lzma
import os
import pathlib
import re
import subprocess
import sys

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from bertjax.data import text as text_lib


def zstd(text):
  return pa.compress(text.encode(), 'zstd', asbytes=True)


WIKI = ' \n = Dogs = \n They bark . \n = = Food = = \n Bones . \n = Cats = \n They meow . \n'


def read(source, format='prose', **options):
  return list(text_lib.read_documents(str(source), format, **options))


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return path


@pytest.mark.parametrize(
  'name, content, format, documents',
  [
    ('a.txt', 'One.\n\nTwo.\n', 'prose', ['One.\n\nTwo.\n']),
    ('[1].txt', 'a name, no glob', 'prose', ['a name, no glob']),
    ('bom.txt', '\ufeffHello.', 'prose', ['Hello.']),
    ('a.txt.gz', gzip.compress('Zürich.'.encode(), mtime=0), 'prose', ['Zürich.']),
    ('a.TXT.GZ', gzip.compress(b'Upper.', mtime=0), 'prose', ['Upper.']),
    ('a.bz2', bz2.compress(b'1.\n\n2.') + bz2.compress(b' 3.'), 'google', ['1.', '2. 3.']),
    ('a.xz', lzma.compress('Zürich.'.encode()), 'prose', ['Zürich.']),
    ('a.jsonl.zst', zstd('{"text": "字"}\n') + zstd('{"text": "b"}'), 'jsonl', ['字', 'b']),
    ('mac.txt', b'One.\rTwo.\r\rThree.', 'prose', ['One.\nTwo.\n\nThree.']),
    ('mac.txt', b'\xef\xbb\xbfOne.\rTwo.\r\rThree.\r', 'google', ['One.\nTwo.', 'Three.']),
    ('mac.jsonl', b'{"text": "a"}\r{"text": "b"}', 'jsonl', ['a', 'b']),
    ('a.txt', b'One.\r\r\nTwo.\r', 'prose', ['One.\r\r\nTwo.\r']),
    ('nul.txt', b'One \0 NUL byte.', 'prose', ['One \0 NUL byte.']),
    ('latin.txt', b'na\xefve', 'prose', ['na\ufffdve']),
    ('blank.txt', ' \n\n', 'prose', []),
    ('a.txt', 'One.\nTwo.\n \nThree.\n\n\n\n', 'google', ['One.\nTwo.', 'Three.']),
    ('dos.txt', 'One.\r\n\r\nTwo.', 'google', ['One.\r', 'Two.']),
    ('a.txt', WIKI, 'wikitext', [WIKI[2 : WIKI.index(' = Cats')], WIKI[WIKI.index(' = Cats') :]]),
    (
      'a.jsonl',
      '{"text": "a\\nb"}\n\n{"text": "c\u2028d", "id": 1}\n',
      'jsonl',
      ['a\nb', 'c\u2028d'],
    ),
  ],
)
def test_a_file_falls_into_its_documents(tmp_path, name, content, format, documents):
  assert read(write(tmp_path / name, content), format) == documents


@pytest.mark.parametrize(
  'source, names',
  [
    ('', ['a/z.txt', 'b.txt', 'c/d/e.txt', 'c/f.md']),  # all levels, by name, none hidden
    ('c', ['c/d/e.txt', 'c/f.md']),
    ('*.txt', ['b.txt']),
    ('**/*.txt', ['a/z.txt', 'b.txt', 'c/d/e.txt']),
    ('c/f.md, ROOT/a', ['c/f.md', 'a/z.txt']),  # several, in the order given
  ],
)
def test_folders_globs_and_lists_give_their_files_in_order(tmp_path, source, names):
  for name in ('b.txt', 'a/z.txt', 'a/.hidden', '.git/config.txt', 'c/d/e.txt', 'c/f.md'):
    write(tmp_path / name, name)
  assert read(f'{tmp_path}/{source}'.replace('ROOT', str(tmp_path))) == names


def test_a_key_of_one_s_own_is_read_from_json(tmp_path):
  path = write(tmp_path / 'a.jsonl', '{"body": "x", "text": "y"}')
  assert read(path, 'jsonl', text_key='body') == ['x']


@pytest.fixture
def bucket(monkeypatch):
  """The folder s3://bucket, which fsspec keeps in memory."""

  class Memory(MemoryFileSystem):
    protocol, store, pseudo_dirs = 's3', {}, ['']

    @classmethod
    def _strip_protocol(cls, path):
      return super()._strip_protocol(str(path).removeprefix('s3://')).lstrip('/')

  fsspec.register_implementation('s3', Memory, clobber=True)
  backend = epath.backend.fsspec_backend
  monkeypatch.setattr(epath.gpath, '_is_tf_installed', lambda: False)  # as by EPATH_USE_TF=false
  monkeypatch.setattr(type(backend), '_get_filesystem', lambda _, name: fsspec.filesystem(name))
  yield epath.Path('s3://bucket')
  Memory.clear_instance_cache()
  fsspec.register_implementation('s3', 's3fs.S3FileSystem', clobber=True)


def test_a_bucket_is_read_by_file_folder_and_glob(bucket):
  (bucket / 'texts' / 'deep').mkdir(parents=True)
  texts = {'a.txt': b'A.', 'b.txt.gz': gzip.compress(b'B.'), 'c.txt': b'C.', 'deep/d.txt': b'D.'}
  for name, content in texts.items():
    (bucket / 'texts' / name).write_bytes(content)
  assert read('s3://bucket/texts') == ['A.', 'B.', 'C.', 'D.']
  assert read('s3://bucket/texts/*.txt') == ['A.', 'C.']
  assert read('s3://bucket/*/[bc].txt*') == ['B.', 'C.']
  assert read('s3://bucket/texts/c.txt,s3://bucket/texts/*/*.txt') == ['C.', 'D.']
  assert text_lib.list_source('s3://bucket/texts/a*') == [('s3://bucket/texts/a.txt', 2, 0)]
  with pytest.raises(ValueError, match=r'no match of the glob: s3://bucket/x\*$'):
    read('s3://bucket/x*')
  with pytest.raises(ValueError, match=r'/\*\*/a\.txt cannot be read: \*\* is for files of a disk'):
    read('s3://bucket/**/a.txt')


def test_parquet_of_a_bucket_is_read_by_row_groups(bucket):
  bucket.mkdir()
  table = pa.table({'text': ['One.', 'Two.', 'Three.']})
  with (bucket / 'a.parquet').open('wb') as file:
    pa.parquet.write_table(table, file, row_group_size=1)
  assert read('s3://bucket/*.parquet', 'parquet') == ['One.', 'Two.', 'Three.']


def test_a_storage_without_its_package_is_named(bucket):
  with pytest.raises(ValueError, match=r'az://a/b cannot be read: .*az:// needs .* adlfs'):
    read('az://a/b')


@pytest.mark.parametrize(
  'source, format, options, message',
  [
    (' , ', 'prose', {}, 'data.input is empty'),
    ('/no/such.txt', 'prose', {}, 'no such file or folder.*: /no/such.txt$'),
    ('/no/*.txt', 'prose', {}, r'no match of the glob: /no/\*.txt$'),
    ('embedded', 'xml', {}, "data.format must be one of .*'jsonl'.* got 'xml'"),
    ('embedded', 'prose', {'binary': 'guess'}, "data.binary must be .* got 'guess'"),
    ('embedded', 'prose', {'on_bad_row': 'drop'}, "data.on_bad_row must be .* got 'drop'"),
    ('embedded', 'prose', {'encoding': 'gbk2'}, "data.encoding='gbk2' is no text encoding"),
    ('embedded', 'prose', {'encoding': 'base64'}, "data.encoding='base64' is no text encoding"),
    (__file__, 'tfds', {}, 'data.format=tfds goes with data.input=tfds:NAME'),
  ],
)
def test_a_wrong_source_or_option_is_named(source, format, options, message):
  with pytest.raises(ValueError, match=message):
    read(source, format, **options)


def test_a_folder_without_files_is_refused(tmp_path):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match=f'folder {tmp_path} holds no files'):
    read(tmp_path)


@pytest.mark.parametrize(
  'content, format, documents',
  [
    ('\n\n\nA\n\n\n \n\nB\nC\n', 'google', ['A', 'B\nC']),  # wherever blank lines stand
    ('\ufeff{"text": "a"}', 'jsonl', ['a']),
    (b'a\xe2\x82\nb\xff\n\n\xef\xbf\xbd', 'google', ['a\ufffd\nb\ufffd', '\ufffd']),
    (' = A = \nx\n = B = \n = C = \n', 'wikitext', [' = A = \nx\n', ' = B = \n', ' = C = \n']),
    ('\n' * 1_000_000, 'google', []),
  ],
)
@pytest.mark.parametrize('zipped', [False, True])
def test_lines_fall_into_documents_as_they_are_read(tmp_path, content, format, documents, zipped):
  content = content.encode() if isinstance(content, str) else content
  name, content = ('a.gz', gzip.compress(content, mtime=0)) if zipped else ('a', content)
  assert read(write(tmp_path / name, content), format) == documents


CHINESE = '他说：“今天的天气很好，我们一起去公园吧！”\n我不知道这是不是真的。\n'
WORDS = {
  'gb18030': CHINESE, 'utf-16': CHINESE, 'utf-16-le': 'Plain English.', 'utf-32': 'Élan',
  'big5': '他說：「今天的天氣很好，我們一起去公園吧！」我不知道這是不是真的。',
  'shift_jis': '今日はとてもいい天気なので、公園に行きました。',
  'euc_kr': '오늘은 날씨가 좋아서 공원에 갔다.',
  'cp1251': 'Он пришёл домой поздно вечером и лёг спать.', 'cp1256': 'ذهب الولد إلى المدرسة',
  'cp1253': 'Το παιδί πήγε στο σχολείο',
}  # fmt: skip


@pytest.mark.parametrize('encoding', WORDS)
def test_text_of_another_encoding_is_recognised_and_read(tmp_path, encoding):
  path = write(tmp_path / 'a.txt', WORDS[encoding].encode(encoding))
  advice = f'pass --config.data.encoding={encoding} .vocab: --encoding={encoding}'
  with pytest.raises(
    ValueError, match=f'a.txt is not UTF-8 text; it looks like {encoding}: {advice}'
  ):
    read(path)
  report = text_lib.Report()
  assert read(path, encoding=encoding, report=report) == [WORDS[encoding]]
  assert report.invalid_utf8 == 0
  path = write(tmp_path / 'a.jsonl', json.dumps({'text': 'é字'}).encode(encoding))
  assert read(path, 'jsonl', encoding=encoding) == ['é字']


def test_skipped_text_of_another_encoding_and_latin_1_get_a_hint(tmp_path, caplog):
  write(tmp_path / 'a.txt', CHINESE.encode('gb18030'))
  write(tmp_path / 'b.txt', 'A long English text before a naïve café, a résumé.'.encode('latin-1'))
  for name, hint in (
    ('a.txt', '1 binary files were skipped, .*/a.txt among them: .*=gb18030'),
    ('b.txt', '4 invalid byte sequences .*; the text looks like cp1252: .*=cp1252'),
  ):
    report = text_lib.Report()
    read(tmp_path / name, binary='skip', report=report)
    caplog.clear()
    report.warn()
    assert re.search(hint, caplog.text)


def test_invalid_bytes_of_a_named_encoding_are_counted(tmp_path):
  path, report = write(tmp_path / 'a.txt', '好的'.encode('gb18030') + b'\xff!'), text_lib.Report()
  assert read(path, encoding='gb18030', report=report) == ['好的\ufffd!']
  assert report.invalid_utf8 == 1


def test_parquet_folders_are_read_by_column(tmp_path):
  (tmp_path / 'data').mkdir()
  write(tmp_path / 'README.md', 'A card.'), write(tmp_path / 'data' / '.cache', 'hidden')
  for i in range(2):
    texts = [f'文 {i}-{j}.' for j in range(1500)]
    table = pa.table({'body': pa.array(texts, pa.large_string()), 'id': range(1500)})
    pa.parquet.write_table(table, tmp_path / 'data' / f'train-{i}.parquet', row_group_size=400)
  expected = [f'文 {i}-{j}.' for i in range(2) for j in range(1500)]
  assert read(tmp_path, 'parquet', text_key='body') == expected
  assert read(f'{tmp_path}/*/train-1*', 'parquet', text_key='body') == expected[1500:]
  with pytest.raises(
    ValueError, match=r"-0.parquet has no column 'text'; .*'body', 'id'\] \(data.text_key\)"
  ):
    read(tmp_path, 'parquet')
  with pytest.raises(ValueError, match=r'-0.parquet is a Parquet file; .*data.format=parquet'):
    read(tmp_path / 'data')
  with pytest.raises(ValueError, match=r'holds no .parquet files'):
    read(write(tmp_path / 'x' / 'a.txt', 'a').parent, 'parquet')
  with pytest.raises(ValueError, match=r'README.md is not a complete Parquet file'):
    read(tmp_path / 'README.md', 'parquet')


@pytest.mark.parametrize(
  'row, what',
  [
    ('{"text": null}', "'text' but null. Mend"),
    ('{"text": ["a", "b"]}', r"""'text' but \["a", "b"\]"""),
    ('{"text": 5}', "'text' but 5"),
    ('{"body": "a"}', r"'text'; the line has \['body'\]"),
    ('["text"]', "'text'; the line has list"),
    ('x', 'not a JSON object'),
  ],
)
def test_a_row_without_a_text_is_named_or_skipped_and_counted(tmp_path, row, what, caplog):
  path, report = (
    write(tmp_path / 'a', f'{{"text": "x"}}\n{row}\n{{"text": "y"}}'),
    text_lib.Report(),
  )
  with pytest.raises(ValueError, match=f'a:2: .*{what}'):
    read(path, 'jsonl')
  assert read(path, 'jsonl', on_bad_row='skip', report=report) == ['x', 'y']
  assert report == text_lib.Report(files=1, documents=2, bad_rows=1)
  report.warn()
  assert '1 rows without a text were skipped' in caplog.text


def test_nulls_and_lists_in_parquet_are_bad_rows_too(tmp_path):
  path = tmp_path / 'a.parquet'
  pa.parquet.write_table(pa.table({'text': ['a', None, 'b'], 'n': [[1], [2], [3]]}), path)
  with pytest.raises(ValueError, match=r"a.parquet:2: no text under data.text_key='text' but null"):
    read(path, 'parquet')
  assert read(path, 'parquet', on_bad_row='skip') == ['a', 'b']
  with pytest.raises(ValueError, match=r"a.parquet:1: .*data.text_key='n' but \[1\]"):
    read(path, 'parquet', text_key='n')


@pytest.mark.parametrize(
  'text, letters',
  [
    ('Мой новый район', 'й'), ('วันนี้อากาศดี', 'วั, นี'), ('राम से मिलो', 'से'),
    ('これはペンですか', 'ペ, で'), ('今天天气很好', ''), ('Élan naïf', ''), ('한국어', ''),
  ],
)  # fmt: skip
def test_letters_that_an_uncased_tokenizer_mutilates_are_warned_about(
  tmp_path, text, letters, caplog
):
  report = text_lib.Report()
  read(write(tmp_path / 'a', text), report=report)
  assert report.stripped.startswith(letters) and bool(report.stripped) == bool(letters)
  report.warn()
  assert 'uncased' not in caplog.text
  report.warn(lowercase=True)
  assert (f'as in {letters}' in caplog.text) == bool(letters)


@pytest.mark.e2e
def test_a_million_empty_documents_do_no_harm(tmp_path):
  path, report = write(tmp_path / 'a', '{"text": ""}\n' * 1_000_000), text_lib.Report()
  assert read(path, 'jsonl', report=report) == [] and report.documents == 0


@pytest.mark.parametrize(
  'document, format, name',
  [
    ('A line of text.\n' * 20 + '\n', 'google', 'a.txt'),
    ('A line of text.\n' * 20 + '\n', 'google', 'a.txt.gz'),
    (' = Title = \n' + ' Some words . ' * 20 + '\n', 'wikitext', 'a.txt'),
    ('{"text": "' + 'A line. ' * 40 + '"}\n', 'jsonl', 'a.jsonl'),
  ],
)
def test_a_large_file_is_read_in_constant_memory(tmp_path, document, format, name):
  data = document.encode() * (50_000_000 // len(document))
  path = write(tmp_path / name, gzip.compress(data, 1, mtime=0) if name.endswith('.gz') else data)
  script = """if True:
    import resource, sys
    from bertjax.data import text as text_lib
    def peak():
      return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB
    before = peak()
    count = sum(1 for _ in text_lib.read_documents(sys.argv[1], sys.argv[2]))
    print(count, peak() - before)"""
  command = [sys.executable, '-c', script, str(path), format]
  count, grown = subprocess.check_output(command, text=True).split()
  assert int(count) == 50_000_000 // len(document) and float(grown) < 20


ZIP = gzip.compress(json.dumps(list(range(2000))).encode(), mtime=0)
FLIPPED = ZIP[:40] + bytes(byte ^ 255 for byte in ZIP[40:60]) + ZIP[60:]


@pytest.mark.parametrize(
  'content, name, message',
  [
    (b'\x89PNG\r\n\0\0', 'a.png', ' is a binary file.*data.binary=skip'),
    (bytes(range(128, 256)) * 9, 'a.txt', ' is a binary file'),
    (ZIP[:9], 'a.txt.gz', ' is not a complete .gz file'),
    (ZIP[:-20], 'a.txt.gz', ' is not a complete .gz file'),
    (FLIPPED, 'a.txt.gz', ' is not a complete .gz file'),
    (bz2.compress(b'text' * 99)[:-20], 'a.bz2', ' is not a complete .bz2 file'),
    (b'no bzip2', 'a.bz2', ' is not a complete .bz2 file'),
    (lzma.compress(b'text' * 99)[:-20], 'a.xz', ' is not a complete .xz file'),
    (zstd('text' * 99)[:-5], 'a.zst', ' is not a complete .zst file'),
    (b'no zstd at all', 'a.zst', ' is not a complete .zst file'),
    ('{"text": "x"}\n\n{"text": "cut', 'a.jsonl', ':3: not a JSON object'),
    (
      '{"text": "x"}\n{"body": 1}',
      'a.jsonl',
      r":2: no text under data.text_key='text'.*\['body'\]",
    ),
    ('{"text": 5}', 'a.jsonl', ":1: no text under data.text_key='text'"),
    ('[' * 200_000, 'a.jsonl', ':1: not a JSON object'),
    ('{"n": ' + '9' * 5000 + '}', 'a.jsonl', ':1: not a JSON object'),
    ('["text"]', 'a.jsonl', ":1: no text under data.text_key='text'.*list"),
  ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, content, name, message):
  path = write(tmp_path / name, content)
  with pytest.raises(ValueError, match=str(path) + message):
    read(tmp_path, 'jsonl' if 'json' in name else 'prose')


def test_what_was_skipped_or_replaced_is_counted(tmp_path):
  write(tmp_path / 'a.png', b'\x89PNG\r\n\0\0'), write(tmp_path / 'b.txt', ' ')
  write(tmp_path / 'c.txt', b'caf\xe9, na\xefve, not \xef\xbf\xbd')  # the last is U+FFFD itself
  report = text_lib.Report()
  assert read(tmp_path, binary='skip', report=report) == ['caf\ufffd, na\ufffdve, not \ufffd']
  assert report == text_lib.Report(files=2, documents=1, invalid_utf8=2, binary_skipped=1)


def test_half_a_surrogate_pair_in_json_is_replaced_and_counted(tmp_path):
  path, report = write(tmp_path / 'a', r'{"text": "a\ud800 \ud83d\ude00"}'), text_lib.Report()
  assert read(path, 'jsonl', report=report) == ['a\ufffd \U0001f600']
  assert report.invalid_utf8 == 1


@pytest.fixture(scope='module')
def tfds_source(tmp_path_factory):
  """A TensorFlow data set of our own, as TFDS itself writes it."""
  import tensorflow_datasets as tfds

  splits = {'train': [f'Text {i}.' for i in range(20)], 'test': ['Zürich.', b'bad \xff byte', ' ']}
  source = write_tfds(folder := tmp_path_factory.mktemp('tfds'), splits)
  tfds.core.add_data_dir(folder)  # finds it by name
  return source


def write_tfds(folder, splits: dict) -> str:
  """Writes texts as a TFDS data set of three shards a split; returns it as a source."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  if not importlib.util.find_spec('importlib_resources'):
    # tensorflow-datasets 4.9.10 writes with it and does not require it; this is the same code.
    sys.modules['importlib_resources'] = importlib.resources
  builder = tfds.dataset_builders.store_as_tfds_dataset(
    name='tiny',
    version='1.0.0',
    features=tfds.features.FeaturesDict({'text': tfds.features.Text(), 'label': tf.int64}),
    split_datasets={
      name: tf.data.Dataset.from_tensor_slices({'text': texts, 'label': [7] * len(texts)})
      for name, texts in splits.items()
    },
    data_dir=folder,
    download_config=tfds.download.DownloadConfig(num_shards=3),
  )
  return f'tfds:{builder.data_path}'


def test_tfds_gives_the_shards_of_the_training_split_one_after_the_other(tfds_source):
  import tensorflow as tf

  folder = pathlib.Path(tfds_source.removeprefix('tfds:'))
  shards = sorted(folder.glob('tiny-train.tfrecord-*'))
  assert len(shards) == 3
  stored = [tf.train.Example.FromString(record) for shard in shards for record in raw(shard)]
  texts = [example.features.feature['text'].bytes_list.value[0].decode() for example in stored]
  assert sorted(texts) == sorted(f'Text {i}.' for i in range(20))
  assert read(tfds_source) == read(f'{tfds_source}:train', 'tfds') == texts


def raw(shard):
  import tensorflow as tf

  return tf.data.TFRecordDataset(str(shard)).as_numpy_iterator()


def test_tfds_finds_a_data_set_and_its_parts_by_name(tfds_source):
  texts = read(tfds_source)
  assert read('tfds:tiny') == read('tfds:tiny:1.0.0') == read('tfds:tiny:1.0.0:train') == texts
  assert read('tfds:tiny:train[:5]') == texts[:5]
  assert read('tfds:tiny:train+test')[:20] == texts
  assert read('tfds:tiny:test, tfds:tiny:train[5:7]')[2:] == texts[5:7]


def test_tfds_gives_a_named_split_and_counts_invalid_utf8(tfds_source):
  report = text_lib.Report()
  assert sorted(read(f'{tfds_source}:test', report=report)) == ['Zürich.', 'bad \ufffd byte']
  assert (report.documents, report.invalid_utf8) == (2, 1)


@pytest.mark.parametrize('name', ['tfds:no_such_set', 'tfds:tiny:9.9.9', 'tfds:/no/folder'])
def test_a_data_set_that_tfds_does_not_have_is_named(tfds_source, name):
  with pytest.raises(ValueError, match=name):
    read(name)


@pytest.mark.parametrize(
  'suffix, key, message',
  [
    ('', 'body', r"no text under data.text_key='body'; it has \['text'\]"),
    ('', 'label', r"no text under data.text_key='label'; it has \['text'\]"),
    (':dev', 'text', 'tfds:.*dev'),
  ],
)
def test_a_wrong_tfds_key_or_split_is_named(tfds_source, suffix, key, message):
  with pytest.raises(ValueError, match=message):
    read(tfds_source + suffix, text_key=key)


@pytest.fixture(scope='module')
def embedded():
  return list(text_lib.embedded_documents())


@pytest.mark.e2e
def test_the_embedded_corpus_is_large_enough_to_learn_from(embedded):
  assert len(embedded) > 300 and sum(map(len, embedded)) > 2_000_000
  assert all(text.strip() for text in embedded)


@pytest.mark.e2e
def test_the_embedded_corpus_is_the_same_in_any_process_and_imports_nothing_it_parses(embedded):
  script = """if True:
    import hashlib, sys
    from bertjax.data import text as text_lib
    text = '|'.join(text_lib.embedded_documents())
    parsed = ('antigravity', 'this', 'turtle', 'idlelib', 'pydoc_data.topics')
    print(hashlib.sha256(text.encode()).hexdigest(), [m for m in parsed if m in sys.modules])"""
  environment = os.environ | {'PYTHONHASHSEED': '7'}
  output = subprocess.check_output([sys.executable, '-c', script], env=environment, text=True)
  assert output == hashlib.sha256('|'.join(embedded).encode()).hexdigest() + ' []\n'


@pytest.mark.data
def test_google_s_sample_and_wikitext_have_their_known_documents(data_dir):
  sample = read(data_dir / 'google_sample' / 'sample_text.txt', 'google')
  assert len(sample) == 3 and sample[0].startswith('This text is included')
  assert len(read(data_dir / 'wikitext-2' / 'valid.txt', 'wikitext')) == 60  # Merity et al. 2016
