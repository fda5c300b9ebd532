"""Costs of a compiled program, read from its HLO text: FLOPs, memory traffic, collectives.

XLA's own `cost_analysis` counts the body of a loop once, and the layers are a loop; it also counts
what stays on a TPU's chip as traffic. Here every computation counts as often as it runs: the trip
count of a loop is in its condition.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

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


class _Array(NamedTuple):
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


class _Op(NamedTuple):
  kind: str
  arrays: list[_Array]  # the result, several of a tuple
  inside: str  # the operands, the literal of a constant or a parameter's number
  text: str  # what follows

  @property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.-]+)', self.inside)

  @property
  def called(self) -> list[str]:
    return [name.strip().lstrip('%') for name in _CALLED.findall(self.text)]


_Computations = dict[str, dict[str, _Op]]


@dataclasses.dataclass
class Costs:
  """Costs on one device.

  Attributes:
    flops: a multiply-add of a matmul counts 2, an element of any other arithmetic 1.
    product_flops: those of the matmuls, which the matrix units do.
    bytes: read from and written to device memory (HBM), once for each operation.
    collectives: kind -> [how often, bytes of payload on a device in total].
  """

  flops: float = 0
  product_flops: float = 0
  bytes: float = 0
  collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)


def costs(text: str) -> Costs:
  """Costs of the entry computation of a compiled module, `compiled.as_text()`."""
  computations, entry = _parse(text)
  total = Costs()

  def add(name: str, times: int, fused: bool) -> None:
    ops = computations[name]
    for op in ops.values():
      inputs = [ops[operand].arrays[0] for operand in op.operands if operand in ops]
      matmul = _matmul_flops(op, inputs)
      total.product_flops += times * matmul
      total.flops += times * (matmul + _elementwise_flops(op, inputs))
      if not fused:
        total.bytes += times * _traffic(op, inputs, ops, computations)
      kind = op.kind.removesuffix('-start')
      if kind in COLLECTIVES:
        sent = inputs if kind == 'reduce-scatter' or op.kind != kind else op.arrays
        entry = total.collectives.setdefault(kind, [0, 0])
        entry[0] += times
        entry[1] += times * sum(array.bytes for array in sent)
      if not op.kind.startswith(('reduce', 'all-', 'scatter', 'sort', 'select-and')):
        trips = _trips(op, computations) if op.kind == 'while' else 1
        for called in op.called:
          add(called, times * trips, fused or op.kind == 'fusion')

  add(entry, 1, False)
  return total


def _parse(text: str) -> tuple[_Computations, str]:
  """Computations by name, each a dict of its operations; and the name of the entry."""
  computations, entry, ops = collections.defaultdict(dict), '', {}
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?%?([\w.-]+) .*\{$', line)
    if head and not line.startswith('HloModule'):
      ops = computations[head[2]]
      entry = head[2] if head[1] else entry
    elif found := _LINE.match(line):
      name, shape, kind, inside, rest = found.groups()
      arrays = [
        _Array(dtype, tuple(map(int, filter(None, dims.split(',')))), 'S(1)' in layout)
        for dtype, dims, layout in _SHAPE.findall(shape)
      ]
      ops[name] = _Op(kind, arrays or [_Array('token', (), True)], inside, rest)
  return computations, entry


def _trips(op: _Op, computations: _Computations) -> int:
  """How often a loop runs: XLA's note, or the bound that its condition compares a counter with."""
  if known := re.search(r'known_trip_count\W+n\W+(\d+)', op.text):
    return int(known[1])
  condition = computations[re.search(r'condition=%?([\w.-]+)', op.text)[1]]
  bounds = [
    int(o.inside)
    for o in condition.values()
    if o.kind == 'constant' and not o.arrays[0].dims and o.arrays[0].dtype in ('s32', 'u32')
  ]
  if len(bounds) != 1:
    raise ValueError(f'the trip count of the loop is unknown: its condition has bounds {bounds}.')
  return bounds[0]


def _matmul_flops(op: _Op, inputs: list[_Array]) -> int:
  """FLOPs of a matmul; 0 for another operation.

  A GPU's gemm call names its axes as a dot does. TPU programs write matmuls as convolutions whose
  windows are the batch axes; every axis is in two of the three arrays, a batch axis in all three.
  """
  out = op.arrays[0]
  if op.kind == 'dot' or (op.kind == 'custom-call' and 'gemm' in op.text):
    axes = re.search(r'lhs_contracting_dim\w*"?[=:][\[{]([\d",]*)', op.text)[1]
    return 2 * out.size * math.prod(inputs[0].dims[int(axis)] for axis in re.findall(r'\d+', axes))
  if op.kind != 'convolution':
    return 0
  arrays = (*inputs[:2], out)
  names = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', op.text).groups()
  batch = 1
  for axis in filter(str.isdigit, names[0]):
    sizes = {array.dims[name.index(axis)] for array, name in zip(arrays, names, strict=True)}
    batch *= sizes.pop() if len(sizes) == 1 else 1
  return 2 * math.isqrt(math.prod(array.size for array in arrays) // batch)


def _elementwise_flops(op: _Op, inputs: list[_Array]) -> int:
  if op.kind in ('reduce', 'reduce-window'):
    return inputs[0].size
  return op.arrays[0].size if op.kind in _ARITHMETIC else 0


def _traffic(op: _Op, inputs: list[_Array], ops, computations: _Computations) -> float:
  """Bytes an operation outside a fusion moves to and from HBM; copies count where they start."""
  if op.kind in _FREE or op.kind.endswith('-done'):
    return 0
  if op.kind in ('copy-start', 'slice-start'):  # source and destination, in either order
    ends = op.arrays[:2]
    return min(end.bytes for end in ends) * sum(not end.on_chip for end in ends)
  read = sum(
    min(array.bytes, _read(op, place, computations))
    for place, array in enumerate(inputs) if not array.on_chip
  )  # fmt: skip
  written = sum(array.bytes for array in op.arrays if not array.on_chip)
  return max(read + written - _kept(op, ops, computations), 0)


def _read(op: _Op, place: int, computations: _Computations) -> float:
  """Bytes that an operation reads of an operand: of one that it only slices, or updates, the
  slices; infinite for all of it."""
  if op.kind in _SLICES and place == 0:
    return op.arrays[0].bytes
  if op.kind == 'dynamic-update-slice' and place == 0:
    return 0  # in place
  if op.kind != 'fusion':
    return math.inf
  inner = computations[op.called[0]]
  name = next(n for n, o in inner.items() if o.kind == 'parameter' and o.inside == str(place))
  return sum(_read(user, at, computations) for user, at in _users(name, inner))


def _users(name: str, ops: dict[str, _Op]) -> Iterator[tuple[_Op, int]]:
  """The operations that read an array, and which of their operands it is."""
  for other, op in ops.items():
    for place in (i for i, operand in enumerate(op.operands) if operand == name):
      if op.kind == 'bitcast':
        yield from _users(other, ops)
      else:
        yield op, place


def _kept(op: _Op, ops: dict[str, _Op], computations: _Computations) -> int:
  """Bytes of a result that stay as they are, since slices of it are updated in place."""
  if op.kind == 'fusion':
    inner = computations[op.called[0]]
    return sum(_kept(o, inner, computations) for o in inner.values())
  if op.kind == 'dynamic-update-slice' and not op.arrays[0].on_chip:
    return op.arrays[0].bytes - ops[op.operands[1]].arrays[0].bytes
  return 0
