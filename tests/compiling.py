"""XLA's flags for tests, most of whose time is compiling; the runs of `test_run.py` are compiled as a user's are."""
QUICKLY = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
