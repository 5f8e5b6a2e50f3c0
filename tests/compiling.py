"""XLA's flags for tests, most of whose time is compiling; the runs of `test_run.py` are compiled as a user's are."""
from importlib import metadata

QUICKLY = '--xla_backend_optimization_level=0'
if metadata.version('jaxlib').startswith('0.10.'):   # XLA ends at a flag that it does not know, as 0.11's does
  QUICKLY += ' --xla_cpu_use_fusion_emitters=false'
