"""Costs of a compiled program, read from its HLO text: FLOPs, memory traffic, collectives.

XLA's own `cost_analysis` counts the body of a loop once, and the layers are a loop. Here every
computation counts as often as it runs: the trip count of a loop is in its condition.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')

# One operation an element, as XLA counts them (exp, log, tanh and the like it counts apart).
_ARITHMETIC = set(
  """abs add and clamp compare convert divide floor is-finite maximum minimum multiply negate not or
  power remainder round-nearest-even select shift-left shift-right-arithmetic shift-right-logical
  sign subtract xor""".split()  # noqa: SIM905
)
_FREE = set(
  """after-all bitcast conditional constant custom-call get-tuple-element iota opt-barrier parameter
  partition-id replica-id tuple while""".split()  # noqa: SIM905
)
_SLICES = ('dynamic-slice', 'slice', 'gather')
_BYTES = {'pred': 1, 'token': 0, 'opaque': 0, 'c64': 8, 'c128': 16}
_LINE = re.compile(r'\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*?)\)(.*)')
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
_CALLED = re.compile(r'(?:calls|body|to_apply|called_computations|branch_computations)=\{?([^,}]+)')


@dataclasses.dataclass(frozen=True)
class _Array:
  dtype: str
  dims: tuple[int, ...]
  on_chip: bool  # in the memory beside the compute units, S(1), and not in HBM

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    bits = re.search(r'\d+', self.dtype)
    return self.size * _BYTES.get(self.dtype, max(int(bits[0]) // 8, 1) if bits else 0)


@dataclasses.dataclass(frozen=True)
class _Op:
  kind: str
  arrays: tuple[_Array, ...]
  operands: tuple[str, ...]
  text: str  # what follows the operands
  literal: str  # the literal of a constant, or a parameter's number


@dataclasses.dataclass
class Costs:
  """Costs on one device.

  Attributes:
    flops: a multiply-add of a product counts 2, an element of any other arithmetic 1.
    product_flops: those of the matmuls, which the matrix units do.
    bytes: read from and written to device memory (HBM), once for each operation.
    collectives: kind -> [how often, bytes of payload on a device in total].
  """

  flops: float = 0
  product_flops: float = 0
  bytes: float = 0
  collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)

  def add(self, other: 'Costs', times: float = 1, memory: bool = True) -> None:
    self.flops += times * other.flops
    self.product_flops += times * other.product_flops
    self.bytes += times * other.bytes * memory
    for kind, (count, size) in other.collectives.items():
      mine = self.collectives.setdefault(kind, [0, 0])
      mine[0] += times * count
      mine[1] += times * size


def costs(text: str) -> Costs:
  """Costs of the entry computation of a compiled module, `compiled.as_text()`."""
  computations, entry = _parse(text)

  @functools.cache
  def of(name: str) -> Costs:
    total, ops = Costs(), computations[name]
    for op in ops.values():
      total.add(_own(op, ops, computations))
      times = _trips(op, computations) if op.kind == 'while' else 1
      if not op.kind.startswith(('reduce', 'all-', 'scatter', 'sort', 'select-and')):
        for called in _called(op):
          total.add(of(called), times, memory=op.kind != 'fusion')
    return total

  return of(entry)


def _parse(text: str):
  """Computations by name, each a dict of its operations; and the name of the entry."""
  computations, entry, ops = collections.defaultdict(dict), '', {}
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?%?([\w.-]+) .*\{$', line)
    if head and not line.startswith('HloModule'):
      ops = computations[head[2]]
      entry = head[2] if head[1] else entry
    elif found := _LINE.match(line):
      name, shape, kind, inside, rest = found.groups()
      arrays = tuple(
        _Array(dtype, tuple(map(int, filter(None, dims.split(',')))), 'S(1)' in (layout or ''))
        for dtype, dims, layout in _SHAPE.findall(shape)
      )
      ops[name] = _Op(kind, arrays, tuple(re.findall(r'%([\w.-]+)', inside)), rest, inside)
  return computations, entry


def _called(op: _Op) -> list[str]:
  return [name.strip().lstrip('%') for name in _CALLED.findall(op.text)]


def _trips(op: _Op, computations) -> int:
  """How often a loop runs: XLA's note, or the bound that its condition compares a counter with."""
  if known := re.search(r'known_trip_count\W+n\W+(\d+)', op.text):
    return int(known[1])
  condition = computations[re.search(r'condition=%?([\w.-]+)', op.text)[1]]
  bounds = [
    int(o.literal)
    for o in condition.values()
    if o.kind == 'constant' and not o.arrays[0].dims and o.arrays[0].dtype in ('s32', 'u32')
  ]
  if len(bounds) != 1:
    raise ValueError(f'the trip count of the loop is unknown: its condition has bounds {bounds}.')
  return bounds[0]


def _own(op: _Op, ops, computations) -> Costs:
  """Costs of one operation, without those of the computations it calls."""
  inputs = [ops[name].arrays[0] for name in op.operands if name in ops and ops[name].arrays]
  out = op.arrays[0] if op.arrays else _Array('token', (), True)
  result = Costs()
  if op.kind in ('convolution', 'dot') or (op.kind == 'custom-call' and 'gemm' in op.text):
    product = _convolution if op.kind == 'convolution' else _dot
    result.product_flops = result.flops = product(op.text, inputs, out)
  elif op.kind in _ARITHMETIC:
    result.flops = out.size
  elif op.kind in ('reduce', 'reduce-window'):
    result.flops = inputs[0].size
  kind = op.kind.removesuffix('-start')
  if kind in COLLECTIVES:
    sent = inputs if kind == 'reduce-scatter' or op.kind.endswith('-start') else op.arrays
    result.collectives[kind] = [1, sum(array.bytes for array in sent)]
  result.bytes = _traffic(op, inputs, ops, computations)
  return result


def _dot(text: str, inputs, out) -> int:
  """FLOPs of a matrix product; also of a GPU's gemm call, which names its axes the same way."""
  found = re.search(r'lhs_contracting_dim\w*"?[=:][\[{]([\d",]*)', text)
  axes = [int(axis) for axis in re.findall(r'\d+', found[1])]
  return 2 * out.size * math.prod(inputs[0].dims[axis] for axis in axes)


def _convolution(text: str, inputs, out) -> int:
  """FLOPs of a convolution. TPU programs write all matmuls so, the batch axes as windows whose
  positions are padding except for one; only positions inside the input count."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', text)
  window = dict(re.findall(r'(\w+)=([\dx_-]+)', (re.search(r'window={([^}]*)}', text) or ' ')[0]))
  left, right, result = labels.groups()
  rank = sum(label.isdigit() for label in left)

  def option(name, default):
    values = window[name].split('x') if name in window else [default] * rank
    return [[int(v) for v in value.split('_')] for value in values]

  valid = 1
  pads, strides = option('pad', '0_0'), option('stride', '1')
  spread, holes = option('lhs_dilate', '1'), option('rhs_dilate', '1')
  for axis in range(rank):
    size, kernel, places = (
      array.dims[names.index(str(axis))]
      for array, names in zip((*inputs[:2], out), (left, right, result), strict=True)
    )
    at = (
      np.arange(places)[:, None] * strides[axis][0]
      + np.arange(kernel) * holes[axis][0]
      - pads[axis][0]
    )
    inside = (at >= 0) & (at % spread[axis][0] == 0) & (at // spread[axis][0] < size)
    valid *= int(inside.sum())
  features = inputs[1].dims[right.index('i')] * out.dims[result.index('f')]
  return 2 * valid * features * out.dims[result.index('b')]


def _traffic(op: _Op, inputs, ops, computations) -> int:
  """Bytes an operation outside a fusion moves to and from HBM; copies count where they start."""
  if op.kind in _FREE or op.kind.endswith('-done') or not op.arrays:
    return 0
  if op.kind in ('copy-start', 'slice-start'):  # source and destination, in either order
    ends = op.arrays[:2]
    return min(end.bytes for end in ends) * sum(not end.on_chip for end in ends)
  if op.kind in _SLICES:
    return op.arrays[0].bytes * ((not op.arrays[0].on_chip) + (not inputs[0].on_chip))
  if op.kind == 'dynamic-update-slice':
    return inputs[1].bytes * ((not op.arrays[0].on_chip) + (not inputs[1].on_chip))
  total = sum(array.bytes for array in op.arrays if not array.on_chip)
  if op.kind != 'fusion':
    return total + sum(array.bytes for array in inputs if not array.on_chip)
  inner = computations[_called(op)[0]]
  for number, array in enumerate(inputs):
    if not array.on_chip:
      total += min(array.bytes, _read(_parameter(inner, number), inner, computations))
  return max(total - _not_written(inner, computations), 0)


def _parameter(inner, number: int) -> str:
  return next(n for n, o in inner.items() if o.kind == 'parameter' and o.literal == str(number))


def _read(name: str, inner, computations) -> float:
  """Bytes that a fusion reads of an array: of one that it only slices, or updates, the slices."""
  total = 0
  for user_name, user in inner.items():
    for place in (i for i, operand in enumerate(user.operands) if operand == name):
      if user.kind in _SLICES and place == 0:
        total += user.arrays[0].bytes
      elif user.kind == 'bitcast':
        total += _read(user_name, inner, computations)
      elif user.kind == 'fusion':
        nested = computations[_called(user)[0]]
        total += _read(_parameter(nested, place), nested, computations)
      elif user.kind != 'dynamic-update-slice' or place:  # one in place reads nothing
        return math.inf
  return total


def _not_written(inner, computations) -> int:
  """Bytes of a fusion's results that stay as they are, since it updates slices in place."""
  total = 0
  for op in inner.values():
    if op.kind == 'dynamic-update-slice' and not op.arrays[0].on_chip:
      total += op.arrays[0].bytes - inner[op.operands[1]].arrays[0].bytes
    elif op.kind == 'fusion':
      total += _not_written(computations[_called(op)[0]], computations)
  return total
