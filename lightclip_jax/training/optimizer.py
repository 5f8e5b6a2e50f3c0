"""AdamW, or Muon for the matrices; warm-up and cosine decay, clipping, and no weight decay where it does harm."""
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.errors import UserError

# Decay would only shrink what these learn: offsets, scales, tables of positions and the temperatures.
NO_DECAY = re.compile(r'(^|/)(bias|scale|gate|logit_\w+|token_logit_scale|\w*position\w*|class_token)$')
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5   # of Muon


def learning_rate(config: config_lib.Optimizer, steps: int) -> optax.Schedule:
  """Step -> learning rate: linear from 0 during `warmup_fraction` of `steps`, then a cosine to 0."""
  return _schedule(config.learning_rate, config, steps)


def _schedule(peak: float, config: config_lib.Optimizer, steps: int) -> optax.Schedule:
  warmup = max(1, round(config.warmup_fraction * steps))
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def decay_mask(params: Any) -> Any:
  """True for the parameters that weight decay applies to: matrices and kernels whose name is not in NO_DECAY."""
  def decays(path: tuple[Any, ...], leaf: Any) -> bool:
    return leaf.ndim > 1 and not NO_DECAY.search(sharding.path_name(path))
  return jax.tree_util.tree_map_with_path(decays, params)


def matrices(params: Any) -> Any:
  """Which axes Muon takes for rows and columns of each parameter; None for those that AdamW learns.

  Those are all vectors and tables, and kernels that read raw pixels or one channel: their few rows are no matrix.
  """
  def dimensions(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    if not sharding.path_name(path).endswith('kernel') or leaf.shape[-2] <= 3:
      return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
  return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(config: config_lib.Optimizer, steps: int) -> optax.GradientTransformationExtraArgs:
  """Clipping by the global norm, which `update` takes as `gradient_norm`; then AdamW, or Muon for the matrices and AdamW for
  the rest. Frozen parameters have no moments; that they count in no norm is up to `stop_frozen`.
  """
  clip = _clip(config.clip_norm) if config.clip_norm else optax.identity()
  optimizer = optax.chain(clip, _adamw(config, steps) if config.name == 'adamw' else _muon(config, steps))
  if not config.freeze:
    return optimizer
  return optax.partition({'trained': optimizer, 'frozen': optax.set_to_zero()},
                         lambda params: frozen_labels(params, config.freeze))


def _clip(limit: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm` with a norm that is known, where that one would be a second reading of all gradients."""
  def update(updates: Any, state: Any, params: Any = None, *, gradient_norm: jax.Array, **_: Any) -> tuple[Any, Any]:
    factor = jnp.minimum(1.0, limit / gradient_norm)
    return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), updates), state
  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _adamw(config: config_lib.Optimizer, steps: int) -> optax.GradientTransformation:
  return optax.adamw(learning_rate(config, steps), b1=config.b1, b2=config.b2, eps=config.eps,
                     weight_decay=config.weight_decay, mask=decay_mask)


def _muon(config: config_lib.Optimizer, steps: int) -> optax.GradientTransformation:
  # consistent_rms: updates of the size that AdamW's have, whatever the matrix's shape (arXiv:2502.16982). Optax's own
  # coefficients, written out for each iteration: of these Optax makes a loop, of one triple five copies, which compile slowly.
  muon = optax.contrib.muon(_schedule(config.matrix_learning_rate, config, steps), ns_coeffs=(NEWTON_SCHULZ,) * ITERATIONS,
                            weight_decay=config.weight_decay, consistent_rms=0.2, muon_weight_dimension_numbers=matrices)

  def labels(params: Any) -> Any:
    return jax.tree.map(lambda dimensions: 'muon' if dimensions else 'adamw', matrices(params),
                        is_leaf=lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers))
  return optax.partition({'muon': muon, 'adamw': _adamw(config, steps)}, labels)


def at_step(state: Any, step: jax.Array) -> Any:
  """The optimizer's state with its schedules at `step`: by itself it counts updates, and not the steps that were skipped."""
  def is_schedule(path: tuple[Any, ...], _: Any) -> bool:
    return getattr(path[-1], 'tuple_name', '') == 'ScaleByScheduleState'
  return optax.tree.set(state, is_schedule, count=step)


def stop_frozen(params: Any, pattern: str) -> Any:
  """The same parameters; those that stay as they are have no gradient, and nothing is computed for one."""
  if not pattern:
    return params
  return jax.tree.map(lambda leaf, label: jax.lax.stop_gradient(leaf) if label == 'frozen' else leaf, params,
                      frozen_labels(params, pattern))


def locked_towers(params: Any, pattern: str) -> list[str]:
  """Of 'image' and 'text', the towers that stay as they are whole."""
  if not pattern:
    return []
  labels = frozen_labels(params, pattern)
  return [tower for tower in ('image', 'text') if set(jax.tree.leaves(labels[tower])) == {'frozen'}]


def frozen_labels(params: Any, pattern: str) -> Any:
  """'frozen' for the parameters whose path the regular expression finds, 'trained' for the others.

  Raises:
    UserError: for a pattern that is no regular expression, or finds none or all of the parameters.
  """
  try:
    expression = re.compile(pattern)
  except re.error as error:
    raise UserError(f'config.optimizer.freeze {pattern!r} is no regular expression: {error}') from error
  labels = jax.tree_util.tree_map_with_path(
    lambda path, _: 'frozen' if expression.search(sharding.path_name(path)) else 'trained', params)
  if len(set(jax.tree.leaves(labels))) < 2:
    which = jax.tree.leaves(labels)[0]
    paths = [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    raise UserError(f'config.optimizer.freeze {pattern!r} leaves all parameters {which}; they are named like {paths[0]!r}')
  return labels
