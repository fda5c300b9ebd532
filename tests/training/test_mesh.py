"""Meshes and sharding rules on 8 fake devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bertjax.model.encoder import PARAM_AXES
from bertjax.model.heads import Bert, init_params
from bertjax.training import mesh as mesh_lib
from bertjax.training.loop import TrainState
from bertjax.training.optimizer import make_optimizer
from tests.model.test_encoder import TINY


def state_shapes():
  bert = Bert(TINY)
  return jax.eval_shape(
    lambda: TrainState.create(
      init_params(bert, jax.random.key(0)), make_optimizer(), jax.random.key(1)
    )
  )


def specs(mesh):
  shardings = mesh_lib.tree_shardings(mesh, PARAM_AXES, state_shapes())
  leaves = jax.tree_util.tree_leaves_with_path(shardings)
  return {mesh_lib.path_name(path): sharding.spec for path, sharding in leaves}


def test_parameters_are_split_by_their_axes():
  by_path = specs(mesh_lib.make_mesh(2, 2, 2))
  layers = 'params/encoder/layers/'
  assert by_path[layers + 'attention/qkv/kernel'] == PartitionSpec(
    None, 'fsdp', None, 'tensor', None
  )
  assert by_path[layers + 'mlp/in/kernel'] == PartitionSpec(None, 'fsdp', 'tensor')
  assert by_path[layers + 'mlp/out/kernel'] == PartitionSpec(None, 'tensor', 'fsdp')
  assert by_path[layers + 'mlp_layer_norm/scale'] == PartitionSpec(None, None)
  assert by_path['step'] == PartitionSpec()


def test_moments_are_split_as_their_parameters():
  by_path = specs(mesh_lib.make_mesh(2, 2, 2))
  params = {k: v for k, v in by_path.items() if k.startswith('params/')}
  for moment in ('mu', 'nu'):
    for name, spec in params.items():
      (own,) = [
        v for k, v in by_path.items() if k.endswith(f'{moment}/{name.removeprefix("params/")}')
      ]
      assert own == spec, name


def test_an_axis_of_indivisible_size_stays_replicated_and_is_logged(caplog):
  with caplog.at_level('INFO', logger='bertjax.training.mesh'):
    by_path = specs(mesh_lib.make_mesh(1, 2, 4))  # vocabulary 97
  assert by_path['params/mlm/bias'] == PartitionSpec(None)
  assert 'params/mlm/bias' in caplog.text and '97' in caplog.text


def test_a_parameter_without_a_rule_raises():
  with pytest.raises(ValueError, match=r'no sharding rule.*strange/kernel'):
    mesh_lib.tree_shardings(
      mesh_lib.make_mesh(), PARAM_AXES, {'strange': {'kernel': np.zeros((2, 2))}}
    )


def test_an_unknown_logical_axis_raises():
  with pytest.raises(ValueError, match='unknown logical axis'):
    mesh_lib.tree_shardings(mesh_lib.make_mesh(), ((r'x$', ('width',)),), {'x': np.zeros(4)})


@pytest.mark.parametrize(
  ('sizes', 'words'),
  [((3, 1, 1), '8 devices'), ((-1, -1, 1), 'at most one -1'), ((-1, 3, 1), 'fit')],
)
def test_a_mesh_that_does_not_fit_says_the_numbers(sizes, words):
  with pytest.raises(ValueError, match=words):
    mesh_lib.make_mesh(*sizes)


@pytest.mark.parametrize(('batch', 'accumulation'), [(12, 1), (8, 2), (0, 1)])
def test_a_batch_that_devices_cannot_share_is_refused(batch, accumulation):
  with pytest.raises(ValueError, match='multiple of replicas'):
    mesh_lib.check_batch_size(mesh_lib.make_mesh(), batch, accumulation)


def test_a_batch_is_placed_row_by_row():
  mesh = mesh_lib.make_mesh(4, 2, 1)
  sharding = mesh_lib.batch_sharding(mesh)
  rows = mesh_lib.local_rows(sharding, 16)
  np.testing.assert_array_equal(rows, np.arange(16))
  value = np.arange(32).reshape(16, 2)
  placed = mesh_lib.shard_batch({'x': value}, sharding)['x']
  np.testing.assert_array_equal(placed, value)
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}


def test_the_tensor_axis_does_not_split_rows():
  sharding = mesh_lib.batch_sharding(mesh_lib.make_mesh(2, 1, 4))
  placed = mesh_lib.shard_batch({'x': np.arange(4)}, sharding)['x']
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2,)}


@pytest.mark.parametrize(('rows', 'devices'), [(8, 8), (16, 8), (12, 6), (7, 7), (1, 1), (11, 1)])
def test_an_evaluation_uses_the_most_devices_that_divide_its_batches(rows, devices):
  assert mesh_lib.make_dividing_mesh(rows, 'rows').shape == {
    'data': devices,
    'fsdp': 1,
    'tensor': 1,
  }
