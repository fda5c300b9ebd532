"""The train step compiled for a TPU v5e that is not here: what its products read, what it moves."""

import math
import os
import re

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from bertjax.model import losses
from bertjax.model.config import EncoderConfig
from bertjax.model.encoder import PARAM_AXES
from bertjax.model.heads import Bert, init_params
from bertjax.training import loop
from bertjax.training import mesh as mesh_lib
from bertjax.training.optimizer import make_optimizer, unit_schedule

pytest.importorskip('libtpu')

CONFIG = EncoderConfig(
  vocab_size=8192, hidden_size=256, num_layers=2, num_heads=4, mlp_size=1024, dtype='bfloat16'
)
ROWS = 32
STATES = ROWS // 4 * 512 * 256  # B*L*D elements on each of the 4 groups that share rows


def compiled(mesh, length, **changes):
  """The optimized HLO of a train step on the mesh."""
  config = CONFIG.__class__(**(vars(CONFIG) | changes))
  bert, transform = Bert(config), make_optimizer()

  def make_state():
    params = init_params(bert, jax.random.key(0))
    return loop.TrainState.create(params, transform, jax.random.key(1), 1e-4)

  shapes = jax.eval_shape(make_state)
  shardings = mesh_lib.sharder(mesh, PARAM_AXES)(shapes)
  step = loop.make_train_step(
    losses.pretraining_loss(bert), losses.pretraining_weights, transform,
    unit_schedule('google', 10, 1), mesh=mesh, state_shardings=shardings,
  )  # fmt: skip
  rows, slots = (ROWS, length), (ROWS, length * 3 // 20)
  columns = {
    'input_ids': (rows, jnp.int32), 'token_type_ids': (rows, jnp.int32),
    'segment_ids': (rows, jnp.int32), 'masked_lm_positions': (slots, jnp.int32),
    'masked_lm_ids': (slots, jnp.int32), 'masked_lm_weights': (slots, jnp.float32),
    'next_sentence_labels': ((ROWS,), jnp.int32),
  }  # fmt: skip
  batch = {name: jax.ShapeDtypeStruct(*value) for name, value in columns.items()}
  return step.lower(shapes, batch).compile().as_text()


def arrays(text):
  """{instruction: (dtype, sizes)} of a module, and its lines."""
  lines = re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\((.*)$', text, re.M)
  known = {name: (dtype, sizes) for name, dtype, sizes, _, _ in lines}
  return known, lines


def elements(sizes: str) -> int:
  return math.prod(int(n) for n in sizes.split(',') if n)


@pytest.fixture(scope='module')
def mesh():
  devices = topologies.get_topology_desc('v5e:2x4', 'tpu').devices
  return mesh_lib.make_mesh(2, 2, 2, devices=devices)


@pytest.fixture(scope='module')
def text(mesh):
  return compiled(mesh, 512, attention_dropout=0.0)


def test_dump(mesh):
  open('/tmp/dev/speed/tpu.hlo', 'w').write(compiled(mesh, 512, attention_dropout=0.0))
  open('/tmp/dev/speed/tpu128.hlo', 'w').write(compiled(mesh, 128))
