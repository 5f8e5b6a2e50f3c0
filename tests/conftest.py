"""Eight simulated CPU devices, strict ranks, and a compilation cache shared by all tests of a machine."""
import os
import pathlib
import tempfile

import compiling

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join((
    os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8',
    compiling.QUICKLY,
    '--xla_cpu_collective_call_terminate_timeout_seconds=300',   # not 40: slow machines
    # One order of work on all devices: collectives that start in another order on each wait for each other for ever.
    '--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'))
os.environ['PJRT_NPROC'] = '32'   # nor may they wait for each other's threads: by default, one a device
os.environ.setdefault('LIGHTCLIP_DATA', str(pathlib.Path(tempfile.gettempdir()) / 'lightclip_jax_tests'))

import jax  # noqa: E402  (the flags above must be set first)

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_compilation_cache_dir', os.path.join(tempfile.gettempdir(), 'lightclip_jax_tests_compiled'))
jax.config.update('jax_compilation_cache_max_size', 16 * 2**30)   # with a bound, JAX locks it: several processes read and write
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
