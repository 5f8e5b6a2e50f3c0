"""How near the training step comes to what this machine can do: its arithmetic and traffic against measured peaks.

    python -m benchmarks.roofline --config=configs/mbv2.py:quickstart [--out=docs/roofline.json] [--config.…=…]

FLOPs and bytes are those that the compiler counts in the step, of one device. The peaks are measured beside it, in turn: a
large matrix product in the step's dtype, and a large copy (read and write). "arithmetic" (MFU) and "memory" are shares of the
step's median time that either would need alone at its peak; "roofline" is the larger one.
Where the compiler counts bytes that a cache serves, "memory" may exceed 1. On random examples.
"""
import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from benchmarks import noise
from lightclip_jax import cli, sharding
from lightclip_jax import config as config_lib
from lightclip_jax.training.step import Trainer, put_batch

PRODUCT = {'cpu': 2048, 'gpu': 16_384, 'tpu': 8192}   # rows and columns of the matrices
COPIED = {'cpu': 2**28, 'gpu': 2**32, 'tpu': 2**30}   # bytes


def main() -> None:
  """Measures, prints and writes JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/mbv2.py:quickstart')
  parser.add_argument('--rounds', type=cli.positive, default=7)
  parser.add_argument('--out', type=pathlib.Path)
  flags, rest = parser.parse_known_args()
  text = json.dumps(measure(config_lib.load(flags.config, cli.config_overrides(rest)), flags.rounds), indent=1)
  print(text)
  if flags.out:
    flags.out.write_text(text + '\n')


def measure(config: config_lib.Config, rounds: int) -> dict[str, object]:
  """The step's work, its time, the peaks, and the shares."""
  trainer = Trainer.create(config, sharding.make_mesh(config.mesh))
  compiled = trainer.compile_step()
  cost = compiled.cost_analysis()
  state, batch = trainer.init_state(), put_batch(noise.examples(config, trainer.mesh), trainer.mesh)

  def step() -> float:
    nonlocal state
    begun = time.perf_counter()
    state, metrics = compiled(state, batch)
    assert np.isfinite(jax.device_get(metrics['loss']))
    return time.perf_counter() - begun

  kind = jax.default_backend()
  side, copied = PRODUCT[kind], COPIED[kind]
  matrix = jnp.ones((side, side), config.model.compute_dtype)
  block = jnp.ones(copied // 4, jnp.float32)
  turns = {'step': step, 'product': timed(jax.jit(jnp.matmul), matrix, matrix), 'copy': timed(jax.jit(jnp.negative), block)}
  seconds = {name: [] for name in turns}
  for turn in turns.values():   # the first of each compiles
    turn()
  for _ in tqdm.trange(rounds):
    for name, turn in turns.items():
      seconds[name].append(turn())
  median = {name: float(np.median(values)) for name, values in seconds.items()}
  peaks = {'flops_a_second': 2 * side**3 / median['product'], 'bytes_a_second': 2 * copied / median['copy']}
  shares = {'arithmetic': cost['flops'] / peaks['flops_a_second'] / median['step'],
            'memory': cost['bytes accessed'] / peaks['bytes_a_second'] / median['step']}
  return {'machine': f'{platform.machine()}, {os.cpu_count()} cores, {jax.device_count()} × {jax.devices()[0].device_kind}',
          'config': config.name, 'batch': config.train.batch_size, 'dtype': config.model.compute_dtype, 'rounds': rounds,
          'flops': cost['flops'], 'bytes': cost['bytes accessed'], 'seconds_a_step': median['step'], 'peaks': peaks,
          'shares': shares, 'roofline': max(shares.values())}


def timed(function: Callable[..., jax.Array], *arguments: jax.Array) -> Callable[[], float]:
  """Seconds of one call."""
  def call() -> float:
    begun = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begun
  return call


if __name__ == '__main__':
  sys.exit(cli.run(main))
