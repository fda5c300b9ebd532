"""XLA's flags for tests, most of whose time is compilation, which they shorten."""

import importlib.metadata

QUICK = '--xla_backend_optimization_level=0'
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # later ones have no such flag
  QUICK += ' --xla_cpu_use_fusion_emitters=false'
