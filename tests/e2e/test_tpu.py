"""The train step AOT-compiled for a TPU v5e: what its matmuls read, what it copies."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from bertjax import compile as compile_lib
from bertjax.model.config import EncoderConfig
from bertjax.model.encoder import PARAM_AXES
from bertjax.model.heads import Bert, init_params
from bertjax.objectives import mlm
from bertjax.training import loop
from bertjax.training import mesh as mesh_lib
from bertjax.training.optimizer import make_optimizer, make_schedule

pytest.importorskip('libtpu')

CONFIG = EncoderConfig(
  vocab_size=8192, hidden_size=256, num_layers=2, num_heads=4, mlp_size=1024, dtype='bfloat16'
)
ROWS = 32


def compiled(mesh, length, **changes):
  """The optimized HLO of a train step on the mesh."""
  bert = Bert(dataclasses.replace(CONFIG, **changes))
  transform = make_optimizer(learning_rate=1e-4, schedule=make_schedule('google', 10, 1))

  def make_state():
    params = init_params(bert, jax.random.key(0))
    return loop.TrainState.create(params, transform, jax.random.key(1))

  shapes = jax.eval_shape(make_state)
  shardings = mesh_lib.sharder(mesh, PARAM_AXES)(shapes)
  objective = mlm.pretraining(bert)
  step = loop.make_train_step(
    objective.loss, objective.weights, transform, mesh=mesh, state_shardings=shardings
  )
  rows, slots = (ROWS, length), (ROWS, length * 3 // 20)
  columns = {
    'input_ids': (rows, jnp.int32), 'token_type_ids': (rows, jnp.int32),
    'segment_ids': (rows, jnp.int32), 'masked_lm_positions': (slots, jnp.int32),
    'masked_lm_ids': (slots, jnp.int32), 'masked_lm_weights': (slots, jnp.float32),
    'next_sentence_labels': ((ROWS,), jnp.int32),
  }  # fmt: skip
  batch = {name: jax.ShapeDtypeStruct(*value) for name, value in columns.items()}
  return step.lower(shapes, batch).compile().as_text()


@pytest.fixture(scope='module')
def mesh():
  devices = compile_lib.slice_devices('v5e:2x4')
  return mesh_lib.make_mesh(2, 2, 2, devices=devices)


PROGRAMS = [
  pytest.param((128, 0.1), id='xla', marks=pytest.mark.stack),
  pytest.param((512, 0.0), id='splash'),
]


@pytest.fixture(scope='module', params=PROGRAMS)
def program(mesh, request):
  """(length, attention dropout, optimized HLO)."""
  length, rate = request.param
  return length, rate, compiled(mesh, length, attention_dropout=rate)


def instructions(text):
  """(name, dtype, sizes, operation, the rest of its line) of everything but tuples."""
  pattern = r'^\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\((.*)$'
  return re.findall(pattern, text, re.MULTILINE)


def test_matmuls_read_bfloat16(program):
  found = instructions(program[2])
  dtypes = {name: dtype for name, dtype, *_ in found}
  products = [line for line in found if line[3] in ('convolution', 'dot')]
  assert len(products) > 20
  for name, *_, rest in products:
    operands = re.findall(r'%([\w.-]+)', rest.split(')')[0])
    assert {dtypes[o] for o in operands} <= {'bf16', 'pred'}, name  # pred: token types, 0 or 1


def test_states_are_hardly_copied(program):
  length, rate, text = program
  states = ROWS // 4 * length * CONFIG.hidden_size  # B*L*D on each of the 4 groups that share rows
  moved = [
    (name, dtype, sizes) for name, dtype, sizes, operation, _ in instructions(text)
    if operation in ('copy', 'transpose') and dtype != 'pred'
    and math.prod(int(n) for n in sizes.split(',') if n) >= states
  ]  # fmt: skip
  assert len(moved) <= 7, moved
  # Float32: the sum of embeddings after the look-up, its gradient before it is added up, and, where
  # attention forms them, the kept probabilities; at one length another one of the size of states.
  assert len([dtype for _, dtype, _ in moved if dtype == 'f32']) <= (4 if rate else 2), moved


def test_flash_attention_is_taken_at_its_length_without_dropout(program):
  _, rate, text = program
  assert text.count('tpu_custom_call') == (0 if rate else 3)  # forwards, for q, for k and v
