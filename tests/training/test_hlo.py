"""Costs read from compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from bertjax.training import hlo


def compiled(f, *shapes):
  return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def test_a_product_costs_two_operations_a_multiply_add():
  costs = hlo.costs(compiled(jnp.dot, (64, 32), (32, 16)).as_text())
  assert costs.product_flops == costs.flops == 2 * 64 * 32 * 16


def test_a_loop_counts_as_often_as_it_runs():
  def nested(x, w):
    def outer(x, _):
      return jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=3)[0], None

    return jax.lax.scan(outer, x, length=5)[0]

  costs = hlo.costs(compiled(nested, (64, 32), (32, 32)).as_text())
  assert costs.product_flops == 15 * 2 * 64 * 32 * 32


# What a TPU program looks like: matmuls are convolutions, batch axes windows that pad; loops have
# no note of their trips; S(1) is on the chip.
TPU_PROGRAM = """
HloModule jit_step, is_scheduled=true

%condition (p.0: (s32[], bf16[8,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p.0 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p.0), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%sliced (a: bf16[7,64,64], b: s32[]) -> bf16[1,64,64] {
  %a = bf16[7,64,64]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %slice = bf16[1,64,64]{2,1,0} dynamic-slice(%a, %b, %b, %b), dynamic_slice_sizes={1,64,64}
}

%body (p.1: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p.1 = (s32[], bf16[8,64]{1,0}, bf16[7,64,64]{2,1,0}) parameter(0)
  %j = s32[]{:T(128)S(1)} get-tuple-element(%p.1), index=0
  %all = bf16[7,64,64]{2,1,0} get-tuple-element(%p.1), index=2
  %one = bf16[1,64,64]{2,1,0:T(8,128)S(1)} fusion(%all, %j), kind=kLoop, calls=%sliced
  %sum = bf16[1,64,64]{2,1,0:T(8,128)S(1)} all-reduce(%one), channel_id=1, to_apply=%add
  ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%j, %sum)
}

ENTRY %main (q: f32[4,8,16], k: f32[4,32,16]) -> f32[4,8,32] {
  %q = f32[4,8,16]{2,1,0} parameter(0)
  %k = f32[4,32,16]{2,1,0} parameter(1)
  %loop = (s32[], bf16[8,64]{1,0}) while(%q), condition=%condition, body=%body
  ROOT %scores = f32[4,8,32]{2,1,0} convolution(%q, %k), WINDOW
}
""".replace('WINDOW', 'window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf')


def test_a_tpu_program_is_read_as_it_is_written():
  costs = hlo.costs(TPU_PROGRAM)
  assert costs.product_flops == 2 * 4 * 8 * 32 * 16  # a batch of 4 matmuls, not 4 * 4
  assert costs.collectives == {'all-reduce': [7, 7 * 64 * 64 * 2]}
  assert costs.bytes == 7 * 64 * 64 * 2 + 4 * (4 * 8 * 16 + 4 * 32 * 16 + 4 * 8 * 32)


def test_a_loop_without_a_bound_is_an_error():
  with pytest.raises(ValueError, match='the trip count of the loop is unknown'):
    hlo.costs(TPU_PROGRAM.replace('constant(7)', 'copy(%i)'))
