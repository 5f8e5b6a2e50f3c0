"""A tiny run that notes, beside its log, which examples each process reads and what all of them together save."""
import json
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

sys.path.append(str(pathlib.Path(__file__).parent))
from tiny import TINY  # noqa: E402  (the path above must be set first)

from lightclip_jax import config as config_lib  # noqa: E402
from lightclip_jax import sharding  # noqa: E402
from lightclip_jax.data.pipeline import TrainBatches  # noqa: E402
from lightclip_jax.models import vit  # noqa: E402
from lightclip_jax.training.checkpoint import Checkpointer  # noqa: E402

vit.DEPTH, vit.MAPS_AFTER = 1, (1,)     # wide layers to split, compiled in seconds
sharding.WHOLE_BELOW = 512              # this model is small throughout
STEPS = 20
HOSTS = config_lib.replace(
    TINY, name='hosts', train=dict(steps=STEPS, batch_size=32), checkpoint=dict(every_steps=4, keep=10),
    model=dict(image=dict(name='vit_ti', stem_stride=2, width=1.0), text=dict(depth=1), fusion=dict(stages=((1, 1),))),
    objective=dict(token_matching=dict(num_iterations=3)),
    evaluation=dict(splits=('heldout_style',)))


def get_config(variant=''):
  """HOSTS; with the name of a folder as the variant, this process leaves its notes there."""
  if variant:
    _note(pathlib.Path(variant))
  return config_lib.to_config_dict(HOSTS)


def _note(folder):
  read, save = TrainBatches.__next__, Checkpointer.save

  def noted_read(self):
    number, batch = self.state()['next_batch'], read(self)
    with (folder / f'read-{jax.process_index()}.jsonl').open('a') as file:
      file.write(json.dumps([number, batch['example_id'].tolist()]) + '\n')
    return batch

  def noted_save(self, step, state, run, **more):
    whole = multihost_utils.process_allgather(jax.tree.leaves(state), tiled=True)
    if jax.process_index() == 0:
      np.savez(folder / f'state-{step}.npz', *whole)
    save(self, step, state, run, **more)

  TrainBatches.__next__, Checkpointer.save = noted_read, noted_save
