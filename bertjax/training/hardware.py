"""Data sheets of the accelerators, per chip, for MFU and rooflines."""

from typing import NamedTuple


class Chip(NamedTuple):
  """Peak figures: bfloat16 FLOP/s, bytes of HBM, bytes/s of HBM, bytes/s a chip can send."""

  flops: float
  hbm: float
  hbm_bandwidth: float
  network: float


# By jax's `device_kind`; a part of the name is enough. TPUs: docs.cloud.google.com/tpu/docs, the
# interconnect's Gbps / 8. GPUs: NVIDIA's data sheets, dense, NVLink one way.
CHIPS = {
  'TPU v4': Chip(275e12, 32e9, 1200e9, 300e9),
  'TPU v5 lite': Chip(197e12, 16e9, 800e9, 200e9),
  'TPU v5': Chip(459e12, 95e9, 2765e9, 600e9),
  'TPU v6 lite': Chip(918e12, 32e9, 1600e9, 400e9),
  'A100': Chip(312e12, 80e9, 2039e9, 300e9),
  'H100': Chip(989e12, 80e9, 3350e9, 450e9),
  'H200': Chip(989e12, 141e9, 4800e9, 450e9),
}


def chip(kind: str) -> Chip | None:
  """The data sheet of a `device_kind`, or None for a device that the table lacks (a CPU)."""
  return next((sheet for name, sheet in CHIPS.items() if name in kind), None)
