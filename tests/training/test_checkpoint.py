"""Checkpoints: complete, verified, the newest and the best kept; a full disk loses nothing."""

import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bertjax.training import checkpoint
from bertjax.training import mesh as mesh_lib
from bertjax.training.checkpoint import CheckpointError, Checkpoints, checksums


def state_at(step):
  rng = np.random.default_rng(step)
  return {
    'w': jnp.asarray(rng.normal(size=(64, 48)), jnp.float32),
    'half': jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16),
    'rng': jax.random.key(step),
    'step': jnp.asarray(step, jnp.int32),
  }


def abstract(state, sharding=None):
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding if x.ndim == 2 else _whole(sharding)
    ),
    state,
  )


def _whole(sharding):
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec())
  return sharding


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def saved(folder, losses, keep=2):
  checkpoints = Checkpoints(folder, keep=keep)
  for step, loss in losses.items():
    metrics = None if loss is None else {'loss': loss}
    checkpoints.save(step, state_at(step), {'next_batch': step}, metrics)
  checkpoints.wait()
  return checkpoints


def test_a_state_returns_bit_for_bit_with_its_meta(tmp_path):
  checkpoints = saved(tmp_path, {3: 1.0})
  state, meta = checkpoints.restore(3, abstract(state_at(0)))
  same(state, state_at(3))
  assert meta['next_batch'] == 3


def test_the_newest_and_the_best_are_kept(tmp_path):
  checkpoints = saved(tmp_path, {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 3.0})
  assert checkpoints.steps() == [2, 4, 5]
  assert checkpoints.best_step() == 2
  assert saved(tmp_path, {6: 2.0}).best_step() == 2  # by another process too


def test_without_evaluations_the_best_is_the_newest(tmp_path):
  assert saved(tmp_path, {1: None, 2: None}).best_step() == 2


def test_checksums_do_not_depend_on_the_sharding():
  mesh = mesh_lib.make_mesh(4, 2, 1)
  value = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
  split = jax.device_put(value, NamedSharding(mesh, PartitionSpec('data', 'fsdp')))
  assert checksums({'w': split}) == checksums({'w': jnp.asarray(value)})


@pytest.mark.parametrize('place', [0, 1535, 3071])
def test_a_checksum_detects_one_flipped_bit_and_a_swap(place):
  value = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
  flipped = value.copy()
  flipped.view(np.uint32).reshape(-1)[place] ^= 1 << 31
  assert checksums({'w': jnp.asarray(value)}) != checksums({'w': jnp.asarray(flipped)})
  assert checksums({'w': jnp.asarray(value)}) != checksums({'w': jnp.asarray(value[::-1])})


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
  checkpoints = saved(tmp_path, {1: 1.0})
  sharding = NamedSharding(mesh_lib.make_mesh(4, 2, 1), PartitionSpec('data', 'fsdp'))
  state, _ = checkpoints.restore(1, abstract(state_at(0), sharding))
  assert state['w'].sharding == sharding
  same(state, state_at(1))


def damage(folder, step):
  """Flips a bit in the middle of the largest file of a checkpoint."""
  files = [p for p in (folder / str(step) / 'state').rglob('*') if p.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(tmp_path, caplog):
  checkpoints = saved(tmp_path, {1: None, 2: None})
  damage(tmp_path, 2)
  with pytest.raises(CheckpointError, match=str(tmp_path / '2')):
    checkpoints.restore(2, abstract(state_at(0)))
  state, meta = checkpoints.restore_newest(abstract(state_at(0)))
  same(state, state_at(1))
  assert meta['next_batch'] == 1 and str(tmp_path / '2') in caplog.text


def test_the_step_of_a_corrupt_checkpoint_can_be_saved_again(tmp_path):
  checkpoints = saved(tmp_path, {1: None, 3: None})
  damage(tmp_path, 3)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.restore_newest(abstract(state_at(0)))
  assert (tmp_path / '3.corrupt').exists()
  checkpoints.save(2, state_at(2), {})
  checkpoints.save(3, state_at(3), {})
  checkpoints.wait()
  assert checkpoints.steps() == [2, 3]
  same(checkpoints.restore(3, abstract(state_at(0)))[0], state_at(3))


def test_a_save_behind_the_newest_checkpoint_is_refused_and_not_passed_over(tmp_path):
  checkpoints = saved(tmp_path, {5: None})
  with pytest.raises(CheckpointError, match='newer than step 3'):
    checkpoints.save(3, state_at(3), {})


def test_no_complete_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path):
  checkpoints = saved(tmp_path, {1: None})
  damage(tmp_path, 1)
  with pytest.raises(CheckpointError, match='no checkpoint'):
    checkpoints.restore_newest(abstract(state_at(0)))


def test_a_checkpoint_that_does_not_fit_is_refused_before_writing(tmp_path, monkeypatch):
  checkpoints = saved(tmp_path, {1: None})
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1000))
  with pytest.raises(CheckpointError, match=r'0\.0 MB are free.*\[1\]'):
    checkpoints.save(2, state_at(2), {})
  assert [path.name for path in tmp_path.iterdir()] == ['1']


def test_a_reader_does_not_touch_the_unfinished_files_of_a_trainer(tmp_path):
  saved(tmp_path, {1: None})
  unfinished = tmp_path / '2.orbax-checkpoint-tmp'
  unfinished.mkdir()
  assert Checkpoints(tmp_path, read_only=True).steps() == [1] and unfinished.exists()


def test_a_failed_save_is_reported_and_keeps_the_earlier_ones(tmp_path, monkeypatch):
  checkpoints = saved(tmp_path, {1: None})

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoints._manager, 'save', full)
  with pytest.raises(CheckpointError, match=r'No space left.*\[1\]'):
    checkpoints.save(2, state_at(2), {})
  state, _ = Checkpoints(tmp_path).restore_newest(abstract(state_at(0)))
  same(state, state_at(1))


@pytest.mark.parametrize(
  'name',
  ['a b', "it's", 'x=1,y=2', 'a{b}', '100%', 'a%20b', '#1', 'a&b;c|d', 'é', '模型', '~x', '$HOME',
   'a:b', '-dash', 'new\nline', 'trailing '],
)  # fmt: skip
def test_a_folder_of_any_other_name_reads_back(name, tmp_path):
  saved(tmp_path / name, {1: 1.0}).close()
  state, _ = Checkpoints(tmp_path / name, read_only=True).restore(1, abstract(state_at(0)))
  same(state, state_at(1))


@pytest.mark.parametrize(
  'name', ['lr=[1e-4]', 'a[b', 'a*b', 'what?', '**', 'back\\slash', '\udcff']
)
def test_a_folder_whose_checkpoints_would_be_lost_is_refused(name, tmp_path):
  with pytest.raises(ValueError, match='could not be read again'):
    Checkpoints(tmp_path / name / 'checkpoints')
  assert not list(tmp_path.iterdir())


def test_a_relative_folder_below_brackets_is_refused(tmp_path, monkeypatch):
  (tmp_path / '[2026] bert').mkdir()
  monkeypatch.chdir(tmp_path / '[2026] bert')
  with pytest.raises(ValueError, match=r'contains \[ \]; choose a folder'):
    Checkpoints('runs')


def test_a_path_beyond_ascii_is_refused_where_the_locale_has_no_utf_8(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint.sys, 'getfilesystemencoding', lambda: 'iso8859-1')
  with pytest.raises(ValueError, match=r'LC_ALL=C\.UTF-8'):
    Checkpoints(tmp_path / 'modèle')


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert checkpoint.check_path('~/runs') == tmp_path / 'runs'
  with pytest.raises(ValueError, match="no home directory for '~nobody-of-this-name'"):
    checkpoint.check_path('~nobody-of-this-name/runs')


def test_a_save_that_fails_gives_the_reason(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)

  def save(*_, **__):
    raise ValueError(f'Error writing "a" at "{"/folder" * 60}": No space left on device\nat b.cc')

  monkeypatch.setattr(checkpoints._manager, 'save', save)
  with pytest.raises(CheckpointError, match=r'Error writing "a" at .*No space left on device\)\.'):
    checkpoints.save(1, state_at(1), {})


@pytest.mark.parametrize('name', ['lr=[1e-4]', 'back\\slash'])
def test_a_commit_that_cannot_be_read_again_stops_the_run(name, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, 'check_path', lambda path: path)
  checkpoints = Checkpoints(tmp_path / name)
  checkpoints.save(1, state_at(1), {})
  with pytest.raises(CheckpointError, match='written, but it cannot be read again'):
    checkpoints.save(2, state_at(2), {})
  checkpoints = Checkpoints(tmp_path / name / 'two')
  checkpoints.save(1, state_at(1), {})
  with pytest.raises(CheckpointError, match='written, but it cannot be read again'):
    checkpoints.close()


def test_callbacks_into_a_closed_loop_are_not_printed(tmp_path, monkeypatch):
  told = []
  monkeypatch.setattr(sys, 'unraisablehook', told.append)
  for _ in range(2):
    Checkpoints(tmp_path).close()
  for text in ('Event loop is closed', 'something else'):
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
  assert [str(one.exc_value) for one in told] == ['something else']
