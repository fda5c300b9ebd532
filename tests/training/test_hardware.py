"""Data sheets of accelerators."""

from bertjax.training.hardware import chip


def test_a_device_is_found_by_a_part_of_its_name():
  assert chip('TPU v5 lite').hbm == 16e9 and chip('TPU v5').hbm == 95e9
  assert chip('NVIDIA H200').hbm == 141e9 and chip('cpu') is None
