"""What a fresh run starts from, where that is not chance: towers of others, or parts of an earlier run."""
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lightclip_jax import config as config_lib
from lightclip_jax.inference import checkpoint
from lightclip_jax.models import pretrained
from lightclip_jax.training.state import TrainState


def initialise(config: config_lib.Config, state: TrainState) -> tuple[TrainState, list[str]]:
  """The state with what `config.init` names put in, in the order checkpoint, image, text; and a report, line by line.

  Raises:
    UserError: for a file that cannot be read or does not fit the towers.
  """
  init, lines = config.init, []
  if not (init.checkpoint or init.image or init.text):
    return state, lines
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  if init.checkpoint:
    source = checkpoint.load(pathlib.Path(init.checkpoint)).variables
    variables, report = pretrained.restore_partially(source, variables, init.checkpoint_pattern)
    lines += [f'from {init.checkpoint!r}: {line}' for line in report.lines()]
  if init.image:
    variables, report = pretrained.image_tower(init.image, variables, config.model.image.name)
    lines += [f'image tower from {init.image!r}: {line}' for line in report.lines()]
  if init.text:
    variables, report = pretrained.text_tower(init.text, variables, init.vocabulary)
    lines += [f'text tower from {init.text!r}: {line}' for line in report.lines()]
  old = {'params': state.params, 'batch_stats': state.batch_stats}
  placed = jax.tree.map(lambda new, leaf: new if new is leaf else jax.device_put(np.asarray(new), leaf.sharding),
                        variables, old)
  ema = None if state.ema is None else jax.tree.map(jnp.copy, placed['params'])
  return dataclasses.replace(state, **placed, ema=ema), lines
