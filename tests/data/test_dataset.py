"""Prepared rows on disk: what is written comes back, and damage is named."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from etils.epath import backend, gpath
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data import dataset

COLUMNS = {'input_ids': ('uint16', (5,)), 'label': ('uint8', ())}
NUMBERS = {
  'input_ids': np.arange(30_000, 30_100, dtype=np.uint16).reshape(20, 5),
  'label': np.arange(20, dtype=np.uint8),
}
FILE = 'train/00002.input_ids.bin'
PLAN = {'settings': {'length': 5}, 'source': [('a.txt', 7)], 'tokenizer': 'abc'}


def cut(start, stop):
  return {name: array[start:stop] for name, array in NUMBERS.items()}


def add(writer, number, start, stop):
  """Writes a shard, row by row."""
  rows = (cut(i, i + 1) for i in range(start, stop))
  return writer.add_shard('train', number, rows, tally={'tokens': 5})


def write(folder, cuts=((0, 7), (7, 7), (7, 20)), **facts):
  """Writes one shard per slice."""
  writer = dataset.Writer(folder, PLAN, COLUMNS)
  for number, (start, stop) in enumerate(cuts):
    assert add(writer, number, start, stop)['rows'] == stop - start
  assert writer.finish({'train': len(cuts), 'heldout': 0}, **{'tokenizer': 'abc'} | facts)
  return folder


@pytest.fixture(scope='module', params=[((0, 7), (7, 7), (7, 20)), ((0, 20),)])
def whole(tmp_path_factory, request):
  return write(tmp_path_factory.mktemp('store') / 'rows', request.param)


@pytest.fixture
def folder(tmp_path):
  return write(tmp_path / 'rows')


@given(st.lists(st.integers(0, 19)))
@settings(deadline=None, max_examples=50)
def test_rows_come_back_from_one_shard_or_several_in_any_order(whole, indices):
  rows = dataset.Dataset(whole, 'train')
  found = rows[np.array(indices, np.int64)]
  assert len(rows) == 20 and set(found) == set(NUMBERS)
  for name, array in NUMBERS.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array[np.array(indices, np.int64)])


def test_a_split_without_shards_has_no_rows(folder):
  rows = dataset.Dataset(folder, 'heldout')
  assert len(rows) == 0 and rows[np.array([], np.int64)]['input_ids'].shape == (0, 5)


def test_the_manifest_keeps_the_facts_and_nothing_temporary_stays(tmp_path):
  folder = write(tmp_path / 'rows', source='here', counts={'files': 1})
  manifest = dataset.read_manifest(folder)
  assert manifest['source'] == 'here'
  assert manifest['counts'] == {
    'files': 1, 'train_documents': 0, 'train_tokens': 15, 'train_rows': 20,
    'heldout_documents': 0, 'heldout_tokens': 0, 'heldout_rows': 0,
  }  # fmt: skip
  assert [path.name for path in tmp_path.iterdir()] == ['rows']
  found = {path.name for path in folder.rglob('*') if path.is_file()}
  assert found == {'manifest.json'} | {f'{n:05d}.{c}.bin' for n in range(3) for c in COLUMNS}


def test_one_flipped_bit_is_found_and_its_file_named(folder):
  data = bytearray((folder / FILE).read_bytes())
  data[33] ^= 4
  (folder / FILE).write_bytes(data)
  with pytest.raises(dataset.DatasetError, match=f'{folder / FILE} is corrupt: its checksum'):
    dataset.Dataset(folder, 'train')
  assert len(dataset.Dataset(folder, 'train', verify=False)) == 20


@pytest.mark.parametrize('size', [0, 129, 131])
def test_a_file_of_another_size_is_named_with_both_sizes(folder, size):
  (folder / FILE).write_bytes((folder / FILE).read_bytes().ljust(size, b'\0')[:size])
  with pytest.raises(
    dataset.DatasetError, match=f'{folder / FILE} is corrupt: {size} bytes .* 130'
  ):
    dataset.Dataset(folder, 'train', verify=False)


def test_a_missing_file_is_named(folder):
  (folder / FILE).unlink()
  with pytest.raises(dataset.DatasetError, match=f'{folder / FILE} is missing'):
    dataset.Dataset(folder, 'train')


def test_a_folder_without_manifest_is_no_prepared_folder(tmp_path):
  for name in ('.', 'none'):
    with pytest.raises(dataset.DatasetError, match=r'is not a prepared folder: it has no manifest'):
      dataset.Dataset(tmp_path / name, 'train')


def test_a_corrupt_manifest_or_another_version_is_refused(folder):
  path = folder / 'manifest.json'
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps(manifest | {'version': dataset.VERSION + 1}))
  with pytest.raises(
    dataset.DatasetError, match=r'has version 3, this program reads 2; prepare again'
  ):
    dataset.read_manifest(folder)
  path.write_text(json.dumps(manifest)[:-20])
  with pytest.raises(dataset.DatasetError, match=f'{path} is corrupt'):
    dataset.read_manifest(folder)


def test_a_killed_writer_leaves_no_folder_under_the_final_name_and_the_next_resumes(tmp_path):
  script = """if True:
    import json, os, signal, sys
    import numpy as np
    from bertjax.data import dataset
    def batches():
      yield row
      os.kill(os.getpid(), signal.SIGKILL)
    row = {'input_ids': np.zeros((1, 5)), 'label': np.zeros(1)}
    writer = dataset.Writer(sys.argv[1], *json.loads(sys.argv[2]))
    writer.add_shard('train', 0, [row] * 9)
    writer.add_shard('train', 1, batches())"""
  folder = tmp_path / 'rows'
  arguments = [str(folder), json.dumps([PLAN, COLUMNS])]
  killed = subprocess.run([sys.executable, '-c', script, *arguments], check=False)
  assert killed.returncode == -signal.SIGKILL
  assert [path.name for path in tmp_path.iterdir()] == ['rows.incomplete']
  writer = dataset.Writer(folder, PLAN, COLUMNS)
  assert writer.shard('train', 0)['rows'] == 9 and writer.shard('train', 1) is None
  assert not writer.finish({'train': 2, 'heldout': 0}) and not folder.exists()
  add(writer, 1, 0, 20)
  assert writer.finish({'train': 2, 'heldout': 0})
  assert [path.name for path in tmp_path.iterdir()] == ['rows']
  rows = dataset.Dataset(folder, 'train')[np.arange(29)]
  assert not rows['input_ids'][:9].any()
  np.testing.assert_array_equal(rows['input_ids'][9:], NUMBERS['input_ids'])


def test_a_shard_whose_rows_broke_off_is_not_there(tmp_path):
  def batches():
    yield cut(0, 7)
    raise RuntimeError('no more text')

  writer = dataset.Writer(tmp_path / 'rows', PLAN, COLUMNS)
  with pytest.raises(RuntimeError):
    writer.add_shard('train', 0, batches())
  assert writer.shard('train', 0) is None and not writer.finish({'train': 1, 'heldout': 0})


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'settings': {'length': 6}}, 'settings'),
    ({'source': [('a.txt', 8)], 'tokenizer': 'abd'}, 'source, tokenizer'),
  ],
)
def test_shards_of_two_preparations_do_not_come_into_one_folder(tmp_path, changes, named):
  add(dataset.Writer(tmp_path / 'rows', PLAN, COLUMNS), 0, 0, 20)
  with pytest.raises(dataset.DatasetError, match=f'rows.incomplete was begun with other {named}; '):
    dataset.Writer(tmp_path / 'rows', PLAN | changes, COLUMNS)
  assert dataset.Writer(tmp_path / 'rows', PLAN, COLUMNS).shard('train', 0)['rows'] == 20


def test_a_shard_of_another_preparation_is_found_by_its_checksum(folder, tmp_path):
  other = write(tmp_path / 'other', ((0, 7), (7, 7), (6, 19)))
  (folder / FILE).write_bytes((other / FILE).read_bytes())
  with pytest.raises(dataset.DatasetError, match=f'{folder / FILE} is corrupt: its checksum'):
    dataset.Dataset(folder, 'train')


def test_a_folder_that_holds_something_is_refused_and_kept(folder):
  with pytest.raises(dataset.DatasetError, match=f'{folder} exists and is not empty'):
    dataset.Writer(folder, PLAN, COLUMNS)
  assert len(dataset.Dataset(folder, 'train')) == 20


def test_an_empty_folder_is_filled(tmp_path):
  (tmp_path / 'rows').mkdir()
  assert len(dataset.Dataset(write(tmp_path / 'rows'), 'train')) == 20


def test_a_remote_folder_is_refused():
  with pytest.raises(
    dataset.DatasetError, match='memory-mapped from a local disk, got gs://bucket'
  ):
    dataset.Writer('gs://bucket/rows', PLAN, COLUMNS)


def test_the_hash_is_of_the_rows_and_not_of_the_folder(folder, tmp_path):
  same, words = write(tmp_path / '1', source='elsewhere'), write(tmp_path / '2', tokenizer='abd')
  rows = write(tmp_path / '3', ((0, 7), (7, 7), (6, 19)))  # as many, others
  one, *others = (
    dataset.manifest_hash(dataset.read_manifest(f)) for f in (folder, same, words, rows)
  )
  assert [other == one for other in others] == [True, False, False]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A stand-in for remote storage: the folder behind 'gs://bucket'."""
  root = tmp_path / 'remote'

  class Backend:
    def __getattr__(self, name):
      function = getattr(backend.os_backend, name)

      def call(*args, **options):
        found = function(*map(local, args), **options)
        return [remote(path) for path in found] if name == 'glob' else found

      return call

  def local(arg):
    text = os.fspath(arg) if isinstance(arg, os.PathLike) else arg
    is_remote = isinstance(text, str) and text.startswith('gs://')
    return str(root / text.removeprefix('gs://')) if is_remote else arg

  def remote(path):
    return f'gs://{pathlib.Path(path).relative_to(root)}'

  ours = gpath._GPath._backend.fget
  here = property(lambda path: Backend() if path._uri_scheme == 'gs' else ours(path))
  monkeypatch.setattr(gpath._GPath, '_backend', here)
  monkeypatch.setattr(gpath, '_get_backend', lambda *paths: Backend())  # of a copy between two
  (root / 'bucket').mkdir(parents=True)
  return root / 'bucket'


def test_rows_travel_to_remote_storage_and_back(folder, bucket, tmp_path, caplog):
  caplog.set_level('INFO', logger='bertjax')
  dataset.copy(folder, 'gs://bucket/rows')
  assert (bucket / 'rows' / FILE).read_bytes() == (folder / FILE).read_bytes()
  copies = [dataset.local('gs://bucket/rows', tmp_path / 'cache') for _ in range(2)]
  assert (
    copies[0] == copies[1] and caplog.text.count('copying 0.00 GB') == 2
  )  # there, and back once
  rows = dataset.Dataset(copies[0], 'train')
  np.testing.assert_array_equal(rows[np.arange(20)]['label'], NUMBERS['label'])
  assert dataset.local(folder, tmp_path / 'cache') == folder


def test_a_corrupt_copy_is_named_and_not_used(folder, bucket, tmp_path):
  dataset.copy(folder, 'gs://bucket/rows')
  (bucket / 'rows' / FILE).write_bytes(b'\0' * 130)
  for _ in range(2):
    with pytest.raises(dataset.DatasetError, match=r'is corrupt: its checksum'):
      dataset.local('gs://bucket/rows', tmp_path / 'cache')


def test_a_copy_larger_than_the_disk_is_refused(folder, bucket, tmp_path, monkeypatch):
  dataset.copy(folder, 'gs://bucket/rows')
  usage = type('Usage', (), {'free': 100})
  monkeypatch.setattr(dataset.shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(dataset.DatasetError, match=r'only 0.00 GB left; name another data.cache_dir'):
    dataset.local('gs://bucket/rows', tmp_path / 'cache')


def test_rows_are_not_mapped_from_remote_storage(bucket):
  with pytest.raises(dataset.DatasetError, match='memory-mapped from a local disk'):
    dataset.Dataset('gs://bucket/rows', 'train')
