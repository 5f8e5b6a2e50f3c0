"""The training state: everything that a step reads and writes, as one tree."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.models import lightclip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """`step` counts batches, with those that were skipped; `ema` is None without a moving average."""
  step: jax.Array                  # int32 scalar
  params: Any
  batch_stats: Any
  optimizer: Any
  ema: Any

  @property
  def evaluation_variables(self) -> dict[str, Any]:
    """What evaluation and export use: the moving average where there is one."""
    params = self.params if self.ema is None else self.ema
    return {'params': params, 'batch_stats': self.batch_stats}


def create_state(config: config_lib.Config, optimizer: optax.GradientTransformation, rng: jax.Array) -> TrainState:
  """A fresh state; pure, so that it can be shaped with `jax.eval_shape` and created sharded under jit."""
  variables = lightclip.init_variables(config.model, rng)
  params = variables['params']
  ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
  return TrainState(jnp.zeros((), jnp.int32), params, variables.get('batch_stats', {}), optimizer.init(params), ema)


def abstract_state(create: Callable[[jax.Array], TrainState], mesh: jax.sharding.Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state. Moments and moving average live where their parameters do.

  Args:
    create: `create_state` with all but its last argument.
    mesh: the devices.

  Raises:
    UserError: if the model cannot be built from the config, or a rule does not fit the mesh.
  """
  shapes = jax.eval_shape(create, jax.random.key(0))
  params = sharding.tree_shardings(shapes.params, mesh, lightclip.SHARDING_RULES)
  places = sharding.follow(shapes, shapes.params, params, mesh)
  return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places)
