"""What the training loop adds to the bare step, what it waits for data, and how long a run takes to start.

    python -m benchmarks.loop_cost --out=docs/loop_cost.json [--config=configs/mbv2.py:quickstart]

A run is started in an empty folder. In each round a number of bare steps (the compiled function on a batch that lies on the
device) and as many of the loop's own (transfer, step, metrics, log) take turns, data at no cost; saves and evaluations are not
among them. "loop_adds" is the median over rounds of the loop's time by the bare steps', less one. "waits_for_data" is the share
of its first steps that the loop, with its real data, spends waiting for them. "seconds_to_first_step" are those
of two processes: the first without and the second with a compilation cache, data being prepared.
"""
import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import tqdm

from lightclip_jax import cli
from lightclip_jax import config as config_lib
from lightclip_jax.training import preemption
from lightclip_jax.training.loop import Run
from lightclip_jax.training.step import put_batch

FIRST = 'step 1/'   # how the loop's first line about a step begins


def main() -> None:
  """Measures, prints and writes JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/mbv2.py:quickstart')
  parser.add_argument('--rounds', type=cli.positive, default=9)
  parser.add_argument('--steps', type=cli.positive, default=10, help='in each half of a round')
  parser.add_argument('--out', type=pathlib.Path)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    result = {'machine': f'{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}'}
    result |= start_up(flags.config, pathlib.Path(folder))
    result |= measure(config_lib.load(flags.config), pathlib.Path(folder) / 'run', flags.rounds, flags.steps)
  text = json.dumps(result, indent=1)
  print(text)
  if flags.out:
    flags.out.write_text(text + '\n')


def start_up(config: str, folder: pathlib.Path) -> dict[str, list[float]]:
  """Seconds from the command to the end of the first step."""
  seconds = []
  for number in range(2):
    command = [sys.executable, '-m', 'lightclip_jax.main', f'--config={config}', f'--workdir={folder / str(number)}',
               '--config.train.log_every=1']
    environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache')}
    begun = time.monotonic()
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
      if not any(FIRST in line for line in process.stdout):
        raise SystemExit(f'{" ".join(command)} ended before its first step')
      seconds.append(time.monotonic() - begun)
      process.kill()
  return {'seconds_to_first_step': seconds}


class Ready:
  """What the loop needs of the data: one batch, again and again, at no cost."""

  def __init__(self, arrays: dict[str, np.ndarray]) -> None:
    self._arrays = arrays

  def __next__(self) -> dict[str, np.ndarray]:
    return self._arrays

  def faults(self) -> dict[str, int]:
    """None."""
    return {}

  def close(self) -> None:
    """Nothing is open."""


def measure(config: config_lib.Config, workdir: pathlib.Path, rounds: int, steps: int) -> dict[str, object]:
  """Seconds of the loop's steps and of bare ones, and the share of the loop's that waits for real data."""
  run = Run(config, workdir, preemption.Preemption())
  run.start()
  for _ in range(2 * steps):
    run._one_step()
    if run.step == steps:   # the first steps have an empty buffer before them
      run._clock.take(run.step)
  run._settle()
  waits = run._clock.take(run.step)['data_wait']
  arrays = next(run._batches)
  run._batches.close()
  run._batches = Ready(arrays)
  length = config.model.text.context
  step, batch = run._trainer.compile_step(length), put_batch(arrays, run._mesh, length)
  state = run._trainer.init_state()

  def bare() -> None:
    nonlocal state
    for _ in range(steps):
      state, metrics = step(state, batch)
    jax.block_until_ready(metrics)

  def loop() -> None:
    for _ in range(steps):
      run._one_step()
    run._settle()

  seconds = {'bare': [], 'loop': []}
  for number in tqdm.trange(rounds + 1):
    for turn in (bare, loop) if number % 2 else (loop, bare):
      begun = time.perf_counter()
      turn()
      seconds[turn.__name__].append((time.perf_counter() - begun) / steps)
  run.close()
  bare_seconds, loop_seconds = (np.array(seconds[name][1:]) for name in ('bare', 'loop'))   # the first round warms up
  return {'config': config.name, 'rounds': rounds, 'steps_a_round': steps,
          'seconds_a_bare_step': float(np.median(bare_seconds)),
          'loop_adds': float(np.median(loop_seconds / bare_seconds)) - 1, 'waits_for_data': waits}


if __name__ == '__main__':
  sys.exit(cli.run(main))
