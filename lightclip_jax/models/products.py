"""Matrix products in the form that each platform runs fastest.

Letters: N rows, C columns and rows that are summed over, D columns.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def dense(x: jax.Array, kernel_CxD: jax.Array, bias_D: jax.Array | None = None) -> jax.Array:
  """x [B, ..., C] times the kernel, plus the bias, in the dtype of x.

  XLA:CPU transposes copies of x and of the gradient for the kernel's gradient, unless x is a matrix. On a TPU to make it one is
  a copy: rows are stored in eights, which 77 positions or 14 pixels do not fill.

  Where x is bfloat16, or `jax.default_matmul_precision` is 'bfloat16', CPUs round both factors to bfloat16 and sum in float32,
  as TPUs do.
  """
  return lax.platform_dependent(x, kernel_CxD, bias_D, cpu=_dense_of_matrix, default=_dense)


def _dense(x: jax.Array, kernel_CxD: jax.Array, bias_D: jax.Array | None,
           product: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul) -> jax.Array:
  y = product(x, kernel_CxD)
  return y if bias_D is None else y + jnp.broadcast_to(bias_D, y.shape)


def _dense_of_matrix(x: jax.Array, kernel_CxD: jax.Array, bias_D: jax.Array | None) -> jax.Array:
  rounds = x.dtype == jnp.bfloat16 or jax.config.jax_default_matmul_precision == 'bfloat16'
  product = bfloat16_product if rounds and min(kernel_CxD.shape) >= 32 else jnp.matmul   # narrow ones gain nothing
  return _dense(x.reshape(-1, x.shape[-1]), kernel_CxD, bias_D, product).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def bfloat16_product(x_NxC: jax.Array, y_CxD: jax.Array) -> jax.Array:
  """x y in the dtype of x: factors, and in the backward pass the gradient, rounded to bfloat16, sums in float32.

  That is what a CPU's matrix unit (AMX) computes, several times as fast as float32. XLA:CPU (jaxlib 0.10) uses it for products
  whose left factor lies as it is read and whose result is float32 and plain; every other one it computes in float32.
  """
  return _forward(x_NxC, y_CxD)[0]


def _forward(x_NxC: jax.Array, y_CxD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  factors = x_NxC.astype(jnp.bfloat16), y_CxD.astype(jnp.bfloat16)   # here, so that the loops that make them round them
  return unfused(_times, y_CxD, *factors).astype(x_NxC.dtype), factors


@jax.jit   # traced once for each shape
def _backward(factors: tuple[jax.Array, jax.Array], gradient_NxD: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_NxC, y_CxD = factors
  dtype, gradient_NxD = gradient_NxD.dtype, gradient_NxD.astype(jnp.bfloat16)
  dx_NxC = unfused(_times_transposed, y_CxD, gradient_NxD, y_CxD)
  if y_CxD.shape[0] <= y_CxD.shape[1]:   # the narrower factor is transposed
    dy_CxD = unfused(_times, y_CxD, unfused(_transposed, y_CxD, x_NxC), gradient_NxD)
  else:
    dy_CxD = unfused(_times, y_CxD, unfused(_transposed, y_CxD, gradient_NxD), x_NxC).T
  return dx_NxC.astype(dtype), dy_CxD.astype(dtype)


bfloat16_product.defvjp(_forward, _backward)


def _times(x_NxC: jax.Array, y_CxD: jax.Array) -> jax.Array:
  return _bfloat16_dot(x_NxC, y_CxD, 0)


def _times_transposed(x_NxC: jax.Array, y_DxC: jax.Array) -> jax.Array:
  return _bfloat16_dot(x_NxC, y_DxC, 1)


def _bfloat16_dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
  return lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _transposed(x_NxC: jax.Array) -> jax.Array:
  """xᵀ as the product I xᵀ, which is exact; XLA:CPU's loop that transposes takes longer than such products."""
  return _times_transposed(jnp.eye(x_NxC.shape[1], dtype=jnp.bfloat16), x_NxC).astype(jnp.bfloat16)


def unfused(function: Callable[..., Any], number: jax.Array, *operands: jax.Array) -> Any:
  """function(*operands), which XLA:CPU computes once and stores, operands and results laid out plainly.

  It would otherwise copy cheap but long expressions into every loop that reads them: the backward pass of one block of
  shifted convolutions then computed its forward convolution 81 times an element. An optimization barrier does not help,
  since XLA:CPU removes it before it fuses; a branch that depends on a value does. The other branch, for a `number` whose
  first element is not finite, gives what comes out then anyway.
  """
  shapes = jax.eval_shape(function, *operands)
  return lax.cond(number[(0,) * number.ndim] < jnp.inf, function,
                  lambda *_: jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes), *operands)
