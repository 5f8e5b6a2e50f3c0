"""All Sinkhorn iterations of a block of problems in one TPU kernel: costs are read once and potentials written once.

Letters: n rows and m columns with their slack items, x leading axes, L problems of one block (a vector unit's lanes).
"""
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LARGEST = 1024      # n · m of the largest problem: 50 × 17 compiles in seconds, 50 × 78 in more than two minutes
_LANES = 128        # problems of one block: the width of the vector unit
_INVALID = -1e30


def potentials(solve: Callable[..., tuple[jax.Array, jax.Array]], in_logs: bool, gain_xnxm: jax.Array,
               valid_xnxm: jax.Array, masses: tuple[jax.Array, jax.Array], rows_first_x1: jax.Array, *,
               interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """The potentials [..., n] and [..., m] that `solve(domain, gain, valid, masses, rows_first)` finds, block by block.

  Problems lie along the last axis inside, where a TPU's vector unit works on 128 of them at once; matrices as small as
  these along the last axes would leave nine tenths of it idle.
  """
  *leading, n, m = gain_xnxm.shape
  size = math.prod(leading)
  inputs = [x.astype(jnp.float32).reshape(size, *x.shape[len(leading):])
            for x in (jnp.where(valid_xnxm, gain_xnxm, _INVALID), *masses, rows_first_x1)]
  inputs = [jnp.moveaxis(jnp.pad(x, [(0, -size % _LANES)] + [(0, 0)] * (x.ndim - 1)), 0, -1) for x in inputs]
  domain = _log_domain if in_logs else _exp_domain

  def kernel(gain, row_mass, col_mass, rows_first, f, g):
    valid = gain[...] > _INVALID / 2
    f[...], g[...] = solve(domain, gain[...], valid, (row_mass[...], col_mass[...]), rows_first[...] > 0)

  spec = lambda *shape: pl.BlockSpec((*shape, _LANES), lambda i: (0,) * len(shape) + (i,))  # noqa: E731
  total = inputs[0].shape[-1]
  found = pl.pallas_call(
    kernel, grid=(total // _LANES,), in_specs=[spec(n, m), spec(n), spec(m), spec(1)],
    out_specs=[spec(n), spec(m)], interpret=interpret,
    out_shape=[jax.ShapeDtypeStruct((k, total), jnp.float32) for k in (n, m)])(*inputs)
  return tuple(x[:, :size].T.reshape(*leading, -1) for x in found)


def _exp_domain(exponent_nxmxL: jax.Array, valid_nxmxL: jax.Array) -> tuple[Callable, Callable]:
  kernel = jnp.where(valid_nxmxL, jnp.exp(exponent_nxmxL), 0.0)
  safe_log = lambda x: jnp.log(jnp.where(x > 0, x, 1.0))  # noqa: E731
  return (lambda g: safe_log(jnp.sum(kernel * jnp.exp(g)[None], 1)),
          lambda f: safe_log(jnp.sum(kernel * jnp.exp(f)[:, None], 0)))


def _log_domain(exponent_nxmxL: jax.Array, valid_nxmxL: jax.Array) -> tuple[Callable, Callable]:
  logits = jnp.where(valid_nxmxL, exponent_nxmxL, _INVALID)

  def log_sums(x: jax.Array, axis: int) -> jax.Array:
    best = jnp.max(x, axis, keepdims=True)
    return jnp.squeeze(best, axis) + jnp.log(jnp.sum(jnp.exp(x - best), axis))
  return lambda g: log_sums(logits + g[None], 1), lambda f: log_sums(logits + f[:, None], 0)
