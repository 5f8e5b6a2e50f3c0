"""Relaxed one-to-one matching: entropic optimal transport in the log domain (docs/OBJECTIVES.md, 2).

Letters: N rows, M columns of one cost matrix.
"""
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lightclip_jax.errors import UserError

_NEVER = -1e30   # stands for -inf where inf - inf would be NaN


def sinkhorn_plan(cost_xNxM: jax.Array, row_mask_xN: jax.Array, col_mask_xM: jax.Array, *, epsilon: float = 0.05,
                  num_iterations: int = 20, gradient: Literal['envelope', 'unroll'] = 'envelope') -> jax.Array:
  """The plan pi >= 0 that minimises <pi, cost> - epsilon * entropy(pi), one-to-one on the smaller side.

  Every valid item of the smaller side is matched exactly once, every item of the larger side at most once; the rest of
  the larger side goes to a slack item of zero cost, whose entries count in the entropy.

  Args:
    cost_xNxM: [..., N, M], any float type; computed in float32.
    row_mask_xN, col_mask_xM: bool [..., N] and [..., M], valid items in any pattern; leading axes broadcast.
    epsilon: temperature, in units of the cost. num_iterations: pairs of updates.
    gradient: "envelope" holds the plan constant in the backward pass, which is exact for the converged objective;
      "unroll" differentiates through the iterations.

  Returns:
    float32 [..., N, M], zero where masked; all zero when a side has no valid item.

  Raises:
    UserError: for shapes that do not fit or an unknown `gradient`.
  """
  _check(cost_xNxM, row_mask_xN, col_mask_xM, gradient)
  cost = cost_xNxM.astype(jnp.float32)
  if gradient == 'envelope':
    cost = jax.lax.stop_gradient(cost)
  rows = jnp.broadcast_to(row_mask_xN, cost.shape[:-1])
  cols = jnp.broadcast_to(col_mask_xM, cost.shape[:-2] + cost.shape[-1:])
  return _solve(cost, rows, cols, epsilon, num_iterations)


def _check(cost: jax.Array, rows: jax.Array, cols: jax.Array, gradient: str) -> None:
  if jnp.ndim(cost) < 2 or jnp.shape(rows)[-1:] != cost.shape[-2:-1] or jnp.shape(cols)[-1:] != cost.shape[-1:]:
    raise UserError(f'cost {jnp.shape(cost)} needs masks of its last two axes; '
                    f'row_mask has {jnp.shape(rows)}, col_mask {jnp.shape(cols)}')
  if gradient not in ('envelope', 'unroll'):
    raise UserError(f"gradient is {gradient!r}; it can be one of 'envelope', 'unroll'")


@functools.partial(jax.jit, static_argnums=(3, 4))
def _solve(cost: jax.Array, rows: jax.Array, cols: jax.Array, epsilon: float, num_iterations: int) -> jax.Array:
  n, m = (jnp.sum(x, -1, dtype=jnp.float32)[..., None] for x in (rows, cols))
  valid = rows[..., :, None] & cols[..., None, :]
  logits = jnp.where(valid, -cost / epsilon, _NEVER)
  spare = [jnp.where(x > 0, jnp.log(jnp.maximum(x, 1.0)), _NEVER) for x in (n - m, m - n)]   # mass of slack column, row
  lse = jax.nn.logsumexp

  def update(mask: jax.Array, logits: jax.Array, other: jax.Array, other_slack: jax.Array, spare: jax.Array):
    """Potentials of one side and its slack item, so that its sums are right; logits are [..., this, other]."""
    new = -jnp.logaddexp(lse(logits + other[..., None, :], axis=-1), other_slack)
    slack = spare - lse(jnp.where(mask_other(mask), other, _NEVER), axis=-1, keepdims=True)
    return jnp.where(mask, new, 0.0), jnp.maximum(slack, _NEVER)

  mask_other = lambda mask: cols if mask is rows else rows  # noqa: E731
  transposed = jnp.swapaxes(logits, -1, -2)

  def iterate(state, _):
    f, g, f_slack, g_slack = state
    f, f_slack = update(rows, logits, g, g_slack, spare[1])
    g, g_slack = update(cols, transposed, f, f_slack, spare[0])
    return (f, g, f_slack, g_slack), None

  zeros = jnp.zeros_like(cost[..., :, 0]), jnp.zeros_like(cost[..., 0, :])
  (f, g, _, _), _ = jax.lax.scan(iterate, (*zeros, *spare[::-1]), length=num_iterations)
  return jnp.where(valid, jnp.exp(jnp.where(valid, logits + f[..., :, None] + g[..., None, :], _NEVER)), 0.0)
