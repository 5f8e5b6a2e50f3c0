"""Trainers that the tests of a file share."""
import functools
import pathlib
import sys

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from tiny import TINY  # noqa: E402  (the path above must be set first)

from lightclip_jax import config as config_lib  # noqa: E402
from lightclip_jax import sharding  # noqa: E402
from lightclip_jax.training import step  # noqa: E402
from lightclip_jax.training.step import Trainer  # noqa: E402

step.INITIAL_OPTIONS.clear()   # its one run is compiled as quickly as all else


@pytest.fixture(scope='module')
def trainer_of():
  """(devices, micro-batches) -> Trainer; equal arguments share one."""
  @functools.cache
  def make(devices: int, accumulate: int = 1) -> Trainer:
    config = config_lib.replace(TINY, train=dict(accumulate=accumulate))
    return Trainer.create(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))
  return make
