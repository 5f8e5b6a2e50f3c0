"""What a fresh run starts from, where that is not chance: towers of others, or parts of an earlier run."""
import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lightclip_jax import config as config_lib
from lightclip_jax import storage
from lightclip_jax.inference import checkpoint
from lightclip_jax.models import pretrained
from lightclip_jax.training import optimizer
from lightclip_jax.training.state import TrainState


def initialise(config: config_lib.Config, state: TrainState) -> tuple[TrainState, list[str]]:
  """The state with what `config.init` names put in, in the order checkpoint, image, text; and a report, line by line, which
  also names the towers that stay frozen as they were drawn.

  Raises:
    UserError: for a file that cannot be read or does not fit the towers.
  """
  locked = optimizer.locked_towers(state.params, config.optimizer.freeze)
  if not any((config.init.checkpoint, config.init.image, config.init.text)):
    return state, _as_drawn(locked)
  old = {'params': state.params, 'batch_stats': state.batch_stats}
  whole = jax.tree.map(_whole, old)
  variables, lines = _apply(config, whole)
  placed = jax.tree.map(lambda new, was, leaf: leaf if new is was else jax.device_put(np.asarray(new), leaf.sharding),
                        variables, whole, old)
  ema = None if state.ema is None else jax.tree.map(jnp.copy, placed['params'])
  untouched = jax.tree.map(operator.is_, variables['params'], whole['params'])
  return dataclasses.replace(state, **placed, ema=ema), lines + _as_drawn(
      tower for tower in locked if all(jax.tree.leaves(untouched[tower])))


def _as_drawn(towers: Iterable[str]) -> list[str]:
  return [f'config.optimizer.freeze keeps the {tower} tower as it is drawn at random; config.init.{tower} or '
          'config.init.checkpoint gives it weights' for tower in towers]


def _whole(leaf: jax.Array) -> Any:
  """The array, also where other processes hold a part of it."""
  return leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)


def check(config: config_lib.Config, abstract: TrainState) -> None:
  """Raises what `initialise` would, before a run has written or compiled anything.

  Args:
    config: the run's.
    abstract: the shapes of its state.
  """
  shapes = {'params': abstract.params, 'batch_stats': abstract.batch_stats}
  _apply(config, jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes))


def _apply(config: config_lib.Config, variables: pretrained.Variables) -> tuple[pretrained.Variables, list[str]]:
  init, lines = config.init, []
  if init.checkpoint:
    source = checkpoint.load(storage.path(init.checkpoint)).variables
    variables, report = pretrained.restore_partially(source, variables, init.checkpoint_pattern, init.vocabulary)
    lines += [f'from {init.checkpoint!r}: {line}' for line in report.lines()]
  if init.image:
    variables, report = pretrained.image_tower(init.image, variables, config.model.image.name)
    lines += [f'image tower from {init.image!r}: {line}' for line in report.lines()]
  if init.text:
    variables, report = pretrained.text_tower(init.text, variables, init.vocabulary)
    lines += [f'text tower from {init.text!r}: {line}' for line in report.lines()]
  return variables, lines
