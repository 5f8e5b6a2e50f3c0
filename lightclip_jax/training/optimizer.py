"""AdamW with warm-up and cosine decay, clipping, and no weight decay where it does harm."""
import re
from typing import Any

import jax
import optax

from lightclip_jax import config as config_lib
from lightclip_jax import sharding

# Decay would only shrink what these learn: offsets, scales, tables of positions and the temperatures.
NO_DECAY = re.compile(r'(^|/)(bias|scale|gate|logit_\w+|token_logit_scale|\w*position\w*|class_token)$')


def learning_rate(config: config_lib.Optimizer, steps: int) -> optax.Schedule:
  """Step -> learning rate: linear from 0 during `warmup_fraction` of `steps`, then a cosine to 0."""
  warmup = max(1, round(config.warmup_fraction * steps))
  return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(steps, warmup + 1))


def decay_mask(params: Any) -> Any:
  """True for the parameters that weight decay applies to: matrices and kernels whose name is not in NO_DECAY."""
  def decays(path: tuple[Any, ...], leaf: Any) -> bool:
    return leaf.ndim > 1 and not NO_DECAY.search(sharding.path_name(path))
  return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: config_lib.Optimizer, steps: int) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW."""
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(clip, optax.adamw(learning_rate(config, steps), b1=config.b1, b2=config.b2, eps=config.eps,
                                       weight_decay=config.weight_decay, mask=decay_mask))
