"""What saving costs a run: seconds that a checkpoint takes from training, as a share of 500 steps.

    python -m benchmarks.save_cost --out=docs/save_cost.json [--config=configs/mbv2.py:quickstart]

In each round a number of steps is timed alone, and as many with a save before the first of them: the copy off the devices
that training waits for, and the writing behind it, which takes cores and disk from the steps, are in the difference. The
steps of a round are more than the writing lasts. Medians over rounds.
"""
import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

import jax
import numpy as np

from lightclip_jax import cli, sharding
from lightclip_jax import config as config_lib
from lightclip_jax.data import datasets, pipeline
from lightclip_jax.training import checkpoint
from lightclip_jax.training.step import Trainer, put_batch

EVERY = 500   # steps


def main() -> None:
  """Measures, prints and writes JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/mbv2.py:quickstart')
  parser.add_argument('--rounds', type=cli.positive, default=7)
  parser.add_argument('--steps', type=cli.positive, default=6, help='in each half of a round')
  parser.add_argument('--out', type=pathlib.Path)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    text = json.dumps(measure(config_lib.load(flags.config), pathlib.Path(folder), flags.rounds, flags.steps), indent=1)
  print(text)
  if flags.out:
    flags.out.write_text(text + '\n')


def measure(config: config_lib.Config, workdir: pathlib.Path, rounds: int, steps: int) -> dict[str, object]:
  """Seconds of a step, of what a save takes from training, and of the part of it that training stands still."""
  trainer = Trainer.create(config, sharding.make_mesh(config.mesh))
  batches = pipeline.train_batches(
    datasets.resolve(config.data.dataset, config.data), config.data, image_size=config.model.image.size,
    context=config.model.text.context, batch_size=config.train.batch_size, seed=0)
  batch, step = put_batch(next(batches), trainer.mesh), trainer.compile_step()
  batches.close()
  keeper = checkpoint.Checkpointer(workdir, config.checkpoint)
  state, seconds = trainer.init_state(), {'alone': [], 'with_save': [], 'standing_still': []}

  def run(save: bool) -> float:
    nonlocal state
    begun = time.perf_counter()
    if save:
      keeper.save(int(state.step), state, checkpoint.RunState({}, {}, {}, {}, ''))
      seconds['standing_still'].append(time.perf_counter() - begun)
    for _ in range(steps):
      state, metrics = step(state, batch)
      jax.block_until_ready(metrics)
    return time.perf_counter() - begun

  run(save=True)   # the first of each is slower
  keeper.close()
  keeper = checkpoint.Checkpointer(workdir, config.checkpoint)
  for times in seconds.values():
    times.clear()
  for number in range(rounds):
    for save in (number % 2 == 0, number % 2 == 1):
      seconds['with_save' if save else 'alone'].append(run(save))
  keeper.close()
  per_step = float(np.median(seconds['alone'])) / steps
  cost = float(np.median(np.subtract(seconds['with_save'], seconds['alone'])))
  return {'machine': f'{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}', 'config': config.name,
          'megabytes': sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6, 'rounds': rounds,
          'seconds_a_step': per_step, 'seconds_a_save': cost,
          'of_which_standing_still': float(np.median(seconds['standing_still'])),
          'share_of_500_steps': cost / (EVERY * per_step)}


if __name__ == '__main__':
  sys.exit(cli.run(main))
