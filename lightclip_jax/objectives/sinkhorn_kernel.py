"""All Sinkhorn iterations of a block of problems in one TPU kernel: costs are read once and potentials written once.

Letters: n rows and m columns with their slack items, x leading axes, L problems of one block (a vector unit's lanes).
"""
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LARGEST = 16_384     # n · m of the largest problem (m a multiple of 8): three such blocks, 24 MiB, lie in fast memory
_LANES = 128         # problems of one block: the width of the vector unit
_ROWS = 8            # rows of one step of a loop; with all of them written out, 50 × 78 take minutes to compile
_MEMORY = 32 << 20   # bytes of fast memory that the kernel may use
_INVALID = -1e30


def fits(n: int, m: int) -> bool:
  """Whether a block of problems of n × m entries, slack items included, finds room in the fast memory."""
  return n * (-(-m // 8) * 8) <= LARGEST


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

  def kernel(gain, row_mass, col_mass, rows_first, f, g, matrix, rows):
    domain = functools.partial(_log_domain if in_logs else _exp_domain, matrix, rows)
    f[...], g[...] = solve(domain, gain, None, (row_mass[...], col_mass[...]), rows_first[...] > 0)

  spec = lambda *shape: pl.BlockSpec((*shape, _LANES), lambda i: (0,) * len(shape) + (i,))  # noqa: E731
  total = inputs[0].shape[-1]
  found = pl.pallas_call(
    kernel, grid=(total // _LANES,), in_specs=[spec(n, m), spec(n), spec(m), spec(1)],
    out_specs=[spec(n), spec(m)], interpret=interpret,
    scratch_shapes=[pltpu.VMEM((n, m, _LANES), jnp.float32), pltpu.VMEM((n, _LANES), jnp.float32)],
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_MEMORY),
    out_shape=[jax.ShapeDtypeStruct((k, total), jnp.float32) for k in (n, m)])(*inputs)
  return tuple(x[:, :size].T.reshape(*leading, -1) for x in found)


def _exp_domain(matrix: Any, rows: Any, gain: Any, _: None, temperature: float) -> tuple[Callable, Callable]:
  """As `sinkhorn._exp_domain`, on references: `matrix` [n, m, L] and `rows` [n, L] are room to write in."""
  def fill(at: Any, _: None) -> None:
    matrix[at] = jnp.where(gain[at] > _INVALID / 2, jnp.exp(gain[at] / temperature), 0.0)

  def over_columns(g: jax.Array) -> jax.Array:
    v = jnp.exp(g)[None]

    def step(at: Any, _: None) -> None:
      rows[at] = jnp.sum(matrix[at] * v, 1)
    _each(len(rows), step)
    return _safe_log(rows[...])

  def over_rows(f: jax.Array) -> jax.Array:
    rows[...] = jnp.exp(f)
    return _safe_log(_each(len(rows), lambda at, total: total + jnp.sum(matrix[at] * rows[at][:, None], 0),
                           jnp.zeros(matrix.shape[1:], jnp.float32)))

  _each(len(rows), fill)
  return over_columns, over_rows


def _log_domain(matrix: Any, rows: Any, gain: Any, _: None, temperature: float) -> tuple[Callable, Callable]:
  """As `sinkhorn._log_domain`, on references."""
  def fill(at: Any, _: None) -> None:
    matrix[at] = jnp.where(gain[at] > _INVALID / 2, gain[at] / temperature, _INVALID)

  def over_columns(g: jax.Array) -> jax.Array:
    def step(at: Any, _: None) -> None:
      x = matrix[at] + g[None]
      best = jnp.max(x, 1)
      rows[at] = best + jnp.log(jnp.sum(jnp.exp(x - best[:, None]), 1))
    _each(len(rows), step)
    return rows[...]

  def over_rows(f: jax.Array) -> jax.Array:
    rows[...] = f
    start = jnp.full(matrix.shape[1:], _INVALID, jnp.float32)
    best = _each(len(rows), lambda at, best: jnp.maximum(best, jnp.max(matrix[at] + rows[at][:, None], 0)), start)
    total = _each(len(rows), lambda at, total: total + jnp.sum(jnp.exp(matrix[at] + rows[at][:, None] - best[None]), 0),
                  jnp.zeros_like(best))
    return best + jnp.log(total)

  _each(len(rows), fill)
  return over_columns, over_rows


def _safe_log(x: jax.Array) -> jax.Array:
  return jnp.log(jnp.where(x > 0, x, 1.0))


def _each(count: int, step: Callable[[Any, Any], Any], carry: Any = None) -> Any:
  """carry = step(rows, carry) over `count` rows, `_ROWS` at a time and once for the few that are left."""
  even = count // _ROWS * _ROWS
  if even:
    start = lambda i: pl.multiple_of(i * _ROWS, _ROWS)  # noqa: E731
    carry = jax.lax.fori_loop(0, even // _ROWS, lambda i, c: step(pl.ds(start(i), _ROWS), c), carry)
  return step(pl.ds(even, count % _ROWS), carry) if even < count else carry
