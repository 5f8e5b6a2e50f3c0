"""Eight simulated CPU devices, strict ranks, and a compilation cache shared by all tests of a machine."""
import os
import pathlib
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join((os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8',
                                    '--xla_cpu_collective_call_terminate_timeout_seconds=300'))   # not 40: slow machines
# Collectives that do not depend on each other may start in another order on each device: with one thread a device
# (the default where there are fewer cores) they then wait for each other for ever.
os.environ['PJRT_NPROC'] = '32'
os.environ.setdefault('LIGHTCLIP_DATA', str(pathlib.Path(tempfile.gettempdir()) / 'lightclip_jax_tests'))

import jax  # noqa: E402  (the flags above must be set first)

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_compilation_cache_dir', os.path.join(tempfile.gettempdir(), 'lightclip_jax_test_cache'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
