"""What a chip can do at most, as published by its maker; and the devices of a topology that is only described.

The compiler for TPUs is in libtpu, that for GPUs in JAX's plugin for CUDA; both work where no such device is.

FLOP/s are dense bfloat16. Links: bytes a second that one chip can send to its neighbours, all links together, one way.
"""
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from lightclip_jax.errors import UserError

_CLOUD = 'https://cloud.google.com/tpu/docs/'


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of one chip; SI units."""
  name: str
  flops: float              # FLOP/s
  memory: float             # bytes
  bandwidth: float          # bytes/s
  links: float              # bytes/s
  source: str
  options: tuple[tuple[str, str], ...] = ()   # what libtpu needs to know to make one device of a chip's two cores
  usable: float = 0.97      # the share of the memory that a step can have: the rest is programs, stacks, the runtime


CHIPS = {
    'v4': Chip('TPU v4', 275e12, 32 * 2**30, 1200e9, 300e9, _CLOUD + 'v4', (('chip_config_name', 'megacore'),)),
    'v5e': Chip('TPU v5e', 197e12, 16e9, 819e9, 200e9, _CLOUD + 'v5e'),
    'v5p': Chip('TPU v5p', 459e12, 95e9, 2765e9, 600e9, _CLOUD + 'v5p'),
    'v6e': Chip('TPU v6e', 918e12, 32e9, 1600e9, 400e9, _CLOUD + 'v6e'),
    'gpu': Chip('H100 SXM', 989e12, 80e9, 3350e9, 450e9, 'https://www.nvidia.com/en-us/data-center/h100/',
                usable=0.75),   # what JAX takes when it starts
}
# What the GPU compiler asks a device for, in the words of its protocol buffer; versions of cuDNN and CUDA that any plugin has.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_GPUS_A_HOST = 8
# Nothing can be timed, which Triton's products need.
_NO_DEVICE = '--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false'


def how_to_get_the_gpu_compiler() -> str:
  """Two commands: in a folder of its own, since elsewhere JAX would look for the rest of CUDA whenever it starts."""
  version = importlib.metadata.version('jax')
  return (f'pip install --target=cuda --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} nvidia-cuda-nvcc '
          'nvidia-nvvm; PYTHONPATH=cuda python -m lightclip_jax.plan')


@dataclasses.dataclass(frozen=True)
class Topology:
  """`name` as given, `chip` None for CPUs, `count` devices; `compiles` is false where no compiler is at hand."""
  name: str
  kind: str
  count: int

  @property
  def chip(self) -> Chip | None:
    return CHIPS.get(self.kind)

  @property
  def compiles(self) -> bool:
    return self.kind != 'gpu' or any(importlib.util.find_spec(f'jax_cuda{version}_plugin') for version in (12, 13))

  @classmethod
  def parse(cls, name: str) -> 'Topology':
    """Of "v5e:16x16", "v4:4x4x4", "cpu:8" or "gpu:64".

    Raises:
      UserError: for anything else.
    """
    found = re.fullmatch(r'(\w+):(\d+(?:x\d+){0,2})', name)
    kinds = ['cpu', *CHIPS]
    if not found or found[1] not in kinds or (found[1] in ('cpu', 'gpu')) != found[2].isdigit():
      raise UserError(f'topology is {name!r}; it can be KIND:SHAPE such as v5e:16x16, v6e:8x8, v4:4x4x4, v5p:4x4x8, or '
                      f'cpu:8, gpu:64 (kinds: {", ".join(kinds)})')
    count = 1
    for side in found[2].split('x'):
      count *= int(side)
    if not 1 <= count <= 16_384:
      raise UserError(f'topology {name!r} has {count} devices; 1 to 16384 can be planned')
    return cls(name, found[1], count)

  def prepare(self) -> None:
    """Sets the environment that JAX reads when it is first used: no accelerator is touched."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if 'jax' in sys.modules:   # a config file may have imported it
      sys.modules['jax'].config.update('jax_platforms', 'cpu')
    if self.kind in ('cpu', 'gpu'):
      flag = f'--xla_force_host_platform_device_count={self.count}' + f' {_NO_DEVICE}' * (self.kind == 'gpu')
      os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()
    else:   # else libtpu asks the cloud's metadata server, for minutes where there is none, and loads in one process only
      for name, value in dict(TPU_SKIP_MDS_QUERY='1', TPU_ACCELERATOR_TYPE='v5litepod-256', TPU_WORKER_HOSTNAMES='localhost',
                              TPU_WORKER_ID='0', ALLOW_MULTIPLE_LIBTPU_LOAD='1').items():
        os.environ.setdefault(name, value)

  def devices(self) -> Sequence[Any]:
    """The devices to compile for; for TPUs they exist in the compiler only.

    Raises:
      UserError: without libtpu, with half of JAX for CUDA, or for a shape that the kind does not come in.
    """
    if self.kind == 'cpu' or not self.compiles:
      return self.stand_ins()
    import jax
    from jax.experimental import topologies
    if self.kind == 'gpu':
      hosts, each = -(-self.count // _GPUS_A_HOST), min(self.count, _GPUS_A_HOST)
      try:
        return topologies.get_topology_desc(self.name, platform='cuda', target_config=_H100,
                                            topology=f'1x{hosts}x{each}').devices[:self.count]
      except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"the compiler for {self.name!r} does not start: {str(error).splitlines()[0]}; of JAX's own "
                        f'version, it is: {how_to_get_the_gpu_compiler()}') from error
    if importlib.util.find_spec('libtpu') is None:
      raise UserError(f'the compiler for {self.name!r} is in the package libtpu, which is not installed: '
                      'pip install libtpu (it needs no TPU)')
    try:
      return topologies.get_topology_desc(self.name, platform='tpu', **dict(self.chip.options)).devices
    except jax.errors.JaxRuntimeError as error:
      raise UserError(f'{self.chip.name} does not come as {self.name!r}: {str(error).splitlines()[0]}') from error

  def stand_ins(self) -> Sequence[Any]:
    """As many simulated CPU devices."""
    import jax
    return jax.devices('cpu')[:self.count]
