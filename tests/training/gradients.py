"""Gradients of the shallow tiny model with all four terms, from a pickled state:
`python gradients.py STATE OUT float64|float32 DEVICES,MICRO_BATCHES …`.

The code says float32 where it means it, so for float64 the name is given to float64 before the code is imported. What
then differs between device counts and micro-batches is more than rounding.
"""
import dataclasses
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np

STATE, OUT, PRECISION, *CASES = sys.argv[1:]
single, bernoulli = jnp.float32, jax.random.bernoulli
if PRECISION == 'float64':
  jax.config.update('jax_enable_x64', True)
  jnp.float32 = jnp.float64
  jax.random.bernoulli = lambda key, p, shape: bernoulli(key, single(p), shape)   # draws the same dropout masks

from tiny import SHALLOW, TEACHER, TINY, random_batch  # noqa: E402  (the name above must be given first)

from lightclip_jax import config as config_lib  # noqa: E402
from lightclip_jax import sharding  # noqa: E402
from lightclip_jax.models import mobilenet_v2, norm  # noqa: E402
from lightclip_jax.training.step import Trainer  # noqa: E402


def gradients(trainer, state):
  """Loss, metrics, gradients and new running statistics of one step."""
  def run(state, batch):
    (loss, (metrics, statistics)), grads = jax.value_and_grad(trainer.loss, has_aux=True)(state.params, state, batch)
    return loss, metrics, grads, norm.update_running_statistics(state.batch_stats, statistics, 0.9)

  return jax.device_get(jax.jit(run)(state, random_batch(trainer.mesh, teacher_dim=6)[1]))


def main():
  mobilenet_v2.STAGES = SHALLOW
  with open(STATE, 'rb') as file:
    state = pickle.load(file)
  # Half-way: α and β are under way, and the dropout key is not the first.
  state = dataclasses.replace(state, step=np.int32(100), optimizer=None, ema=None)
  state = jax.tree.map(lambda leaf: leaf.astype(PRECISION) if leaf.dtype == np.float32 else leaf, state)
  found = {}
  for case in CASES:
    devices, micro_batches = map(int, case.split(','))
    config = config_lib.replace(TINY, model=dict(compute_dtype=PRECISION), train=dict(accumulate=micro_batches),
                                objective=TEACHER)
    found[devices, micro_batches] = gradients(
        Trainer.create(config, sharding.make_mesh(config.mesh, jax.devices()[:devices])), state)
  with open(OUT, 'wb') as file:
    pickle.dump(found, file)


if __name__ == '__main__':
  main()
