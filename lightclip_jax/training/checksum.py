"""A checksum of each array of the state, computed where the array is: the same on any mesh, whatever order sums are taken in.

It is taken before a save and again after a restore, so that nothing between the two devices has to be trusted.
"""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightclip_jax import sharding

_PRIMES = np.uint32([2_654_435_761, 2_246_822_519, 3_266_489_917, 668_265_263, 374_761_393])   # one an axis


def checksums(state: Any) -> dict[str, int]:
  """The checksum of each array by its path, 0 to 2^32 - 1; any single changed element changes its array's."""
  sums = jax.device_get(_all(jax.tree.leaves(state)))
  return {sharding.path_name(path): int(value)
          for (path, _), value in zip(jax.tree_util.tree_leaves_with_path(state), sums, strict=True)}


def not_finite(state: Any) -> list[str]:
  """The paths of the arrays that hold a number that is not finite."""
  finite = jax.device_get(_finite(jax.tree.leaves(state)))
  return [sharding.path_name(path)
          for (path, _), good in zip(jax.tree_util.tree_leaves_with_path(state), finite, strict=True) if not good]


@jax.jit
def _all(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_checksum(leaf) for leaf in leaves]


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[jax.Array]:
  return [jnp.isfinite(leaf).all() for leaf in leaves]


def _checksum(array: jax.Array) -> jax.Array:
  """uint32: the elements' bits, each times an odd number that follows from its place, summed modulo 2^32."""
  bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f'uint{8 * array.dtype.itemsize}'))
  bits = bits.astype(jnp.uint32)   # no array here has elements of 8 bytes, which this would cut
  place = jnp.zeros(array.shape, jnp.uint32)
  for axis, prime in zip(range(array.ndim), _PRIMES, strict=False):
    place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * prime
  return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
