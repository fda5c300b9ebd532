"""Prepared rows on disk: what is written comes back, and damage is named."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data import store

COLUMNS = {'input_ids': ('uint16', (5,)), 'label': ('uint8', ())}
NUMBERS = {
  'input_ids': np.arange(30_000, 30_100, dtype=np.uint16).reshape(20, 5),
  'label': np.arange(20, dtype=np.uint8),
}
FILE = 'train/00002.input_ids.bin'


def cut(start, stop):
  return {name: array[start:stop] for name, array in NUMBERS.items()}


def write(folder, cuts=((0, 7), (7, 7), (7, 20)), **facts):
  """Writes a shard for each cut, row by row."""
  with store.Writer(folder, COLUMNS) as writer:
    for start, stop in cuts:
      assert writer.add_shard('train', (cut(i, i + 1) for i in range(start, stop))) == stop - start
    writer.finish({'tokenizer': 'abc'} | facts)
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
  rows = store.Rows(whole, 'train')
  found = rows[np.array(indices, np.int64)]
  assert len(rows) == 20 and set(found) == set(NUMBERS)
  for name, array in NUMBERS.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array[np.array(indices, np.int64)])


def test_a_split_without_shards_has_no_rows(folder):
  rows = store.Rows(folder, 'heldout')
  assert len(rows) == 0 and rows[np.array([], np.int64)]['input_ids'].shape == (0, 5)


def test_the_manifest_keeps_the_facts_and_nothing_temporary_stays(tmp_path):
  write(tmp_path / 'rows', source='here')
  assert store.read_manifest(tmp_path / 'rows')['source'] == 'here'
  assert [path.name for path in tmp_path.iterdir()] == ['rows']


def test_one_flipped_bit_is_found_and_its_file_named(folder):
  data = bytearray((folder / FILE).read_bytes())
  data[33] ^= 4
  (folder / FILE).write_bytes(data)
  with pytest.raises(store.StoreError, match=f'{folder / FILE} is damaged: its checksum'):
    store.Rows(folder, 'train')
  assert len(store.Rows(folder, 'train', verify=False)) == 20


@pytest.mark.parametrize('size', [0, 129, 131])
def test_a_file_of_another_size_is_named_with_both_sizes(folder, size):
  (folder / FILE).write_bytes((folder / FILE).read_bytes().ljust(size, b'\0')[:size])
  with pytest.raises(store.StoreError, match=f'{folder / FILE} is damaged: {size} bytes .* 130'):
    store.Rows(folder, 'train', verify=False)


def test_a_missing_file_is_named(folder):
  (folder / FILE).unlink()
  with pytest.raises(store.StoreError, match=f'{folder / FILE} is missing'):
    store.Rows(folder, 'train')


def test_a_folder_without_manifest_is_no_prepared_folder(tmp_path):
  for name in ('.', 'none'):
    with pytest.raises(store.StoreError, match=r'is not a prepared folder: it has no manifest'):
      store.Rows(tmp_path / name, 'train')


def test_a_damaged_manifest_or_another_version_is_refused(folder):
  path = folder / 'manifest.json'
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps(manifest | {'version': store.VERSION + 1}))
  with pytest.raises(store.StoreError, match=r'has version 2, this program reads 1; prepare again'):
    store.read_manifest(folder)
  path.write_text(json.dumps(manifest)[:-20])
  with pytest.raises(store.StoreError, match=f'{path} is damaged'):
    store.read_manifest(folder)


def test_a_killed_writer_leaves_no_folder_under_the_final_name(tmp_path):
  script = """if True:
    import os, signal, sys
    import numpy as np
    from bertjax.data import store
    with store.Writer(sys.argv[1], {'label': ('uint8', ())}) as writer:
      writer.add_shard('train', [{'label': np.zeros(9)}])
      os.kill(os.getpid(), signal.SIGKILL)"""
  folder = tmp_path / 'rows'
  killed = subprocess.run([sys.executable, '-c', script, str(folder)], check=False)
  assert killed.returncode == -signal.SIGKILL
  assert not folder.exists() and [path.name for path in tmp_path.iterdir()] != []
  assert len(store.Rows(write(folder), 'train')) == 20
  assert [path.name for path in tmp_path.iterdir()] == ['rows']  # and nothing of the killed one


def test_an_exception_leaves_nothing_behind(tmp_path):
  def batches():
    yield cut(0, 7)
    raise RuntimeError('no more text')

  with pytest.raises(RuntimeError), store.Writer(tmp_path / 'rows', COLUMNS) as writer:
    writer.add_shard('train', batches())
  assert list(tmp_path.iterdir()) == []


def test_a_preparation_is_replaced_and_any_other_folder_kept(folder):
  write(folder, source='again')
  assert store.read_manifest(folder)['source'] == 'again'
  (folder / 'manifest.json').unlink()
  with pytest.raises(store.StoreError, match=r'exists and is no prepared folder'):
    store.Writer(folder, COLUMNS)
  assert (folder / FILE).exists()


def test_the_hash_is_of_the_rows_and_not_of_the_folder(folder, tmp_path):
  same, words = write(tmp_path / '1', source='elsewhere'), write(tmp_path / '2', tokenizer='abd')
  rows = write(tmp_path / '3', ((0, 7), (7, 7), (6, 19)))  # as many, others
  one, *others = (store.manifest_hash(store.read_manifest(f)) for f in (folder, same, words, rows))
  assert [other == one for other in others] == [True, False, False]
