"""XLA's flags for tests, most of whose time is compilation, which they shorten."""

import importlib.metadata
import platform

QUICK = '--xla_backend_optimization_level=0'
if importlib.metadata.version('jaxlib').startswith('0.10.') and platform.machine() == 'x86_64':
  # Less than half of the time; later versions have not the first flag. Without fused multiply-adds,
  # programs that differ in what is fused round alike, which tests of equality need.
  QUICK += ' --xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX'
