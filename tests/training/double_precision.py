"""Gradients of the tiny model in float64, one process for it: `python double_precision.py OUT DEVICES,MICRO_BATCHES …`.

The code says float32 where it means it, so the name is given to float64 before the code is imported. What then differs
between device counts and micro-batches is more than rounding.
"""
import dataclasses
import pickle
import sys

import jax
import jax.numpy as jnp

single = jnp.float32
jax.config.update('jax_enable_x64', True)
jnp.float32 = jnp.float64
bernoulli = jax.random.bernoulli
jax.random.bernoulli = lambda key, p, shape: bernoulli(key, single(p), shape)   # draws the same dropout masks

import test_step  # noqa: E402  (the name above must be given first)
from tiny import TINY  # noqa: E402

from lightclip_jax import config as config_lib  # noqa: E402
from lightclip_jax import sharding  # noqa: E402
from lightclip_jax.training.step import Trainer  # noqa: E402


def double(leaf: jax.Array) -> jax.Array:
  return leaf.astype(jnp.float64) if leaf.dtype == single else leaf


def main() -> None:
  out, *cases = sys.argv[1:]
  found = {}
  for case in cases:
    devices, micro_batches = map(int, case.split(','))
    config = config_lib.replace(TINY, model=dict(compute_dtype='float64'), train=dict(accumulate=micro_batches))
    trainer = Trainer.create(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))
    state = dataclasses.replace(trainer.init_state(), optimizer=None, ema=None)
    found[devices, micro_batches] = test_step.gradients(trainer, jax.tree.map(double, state))
  with open(out, 'wb') as file:
    pickle.dump(found, file)


if __name__ == '__main__':
  main()
