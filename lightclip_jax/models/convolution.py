"""Convolutions in the form that each platform runs fastest; values agree within float32 rounding.

Letters: B batch, H height, W width, C input channels, D output channels.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from lightclip_jax.models import products

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')
_SMALL_GRID = 3
_TAPS = tuple((i, j) for i in range(3) for j in range(3))


def conv(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """A convolution padded by k // 2 on every side. kernel [k, k, C, D] -> [B, ⌈H/stride⌉, ⌈W/stride⌉, D] for odd k."""
  size = kernel.shape[0]
  if size == 1:
    x_BxHxWxC = x_BxHxWxC[:, ::stride, ::stride]
    return products.dense(x_BxHxWxC, kernel[0, 0])
  if kernel.shape[2] == 3 or -(-max(x_BxHxWxC.shape[1:3]) // stride) <= _SMALL_GRID:   # of an image, or to a few positions
    on_cpu = _conv_of_patches
  else:
    on_cpu = _conv_with_taps
  return lax.platform_dependent(x_BxHxWxC, kernel, cpu=lambda x, k: on_cpu(x, k, stride),
                                default=lambda x, k: _conv(x, k, stride))


def _conv(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  size = kernel.shape[0]
  return lax.conv_general_dilated(x_BxHxWxC, kernel, (stride, stride), [(size // 2, size // 2)] * 2,
                                  dimension_numbers=_LAYOUT)


def _conv_of_patches(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """The convolution as one matrix product: of few channels XLA:CPU's own takes 2.6 times as long, to 2×2 up to 48 times."""
  taps = _shifted_maps(x_BxHxWxC, kernel.shape[0], stride)
  return products.dense(jnp.concatenate(taps, axis=-1), kernel.reshape(-1, kernel.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_with_taps(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """The convolution, with a kernel gradient of one matrix product a tap: XLA:CPU's own takes 0.8 to 9 times as long."""
  return _conv(x_BxHxWxC, kernel, stride)


def _conv_with_taps_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _conv(x, kernel, stride), (x, kernel)


def _conv_with_taps_backward(stride: int, residuals: tuple[jax.Array, jax.Array],
                             gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _conv_gradients(*residuals, gradient, stride)


@functools.partial(jax.jit, static_argnames='stride')   # here and below: traced once for each shape, of which blocks share many
def _conv_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
  dx, = jax.linear_transpose(lambda x: _conv(x, kernel, stride), x)(gradient)
  gradient_NxD = gradient.reshape(-1, gradient.shape[-1])
  taps = [lax.dot_general(tap.reshape(-1, tap.shape[-1]), gradient_NxD, (((0,), (0,)), ((), ())),
                          preferred_element_type=jnp.float32) for tap in _shifted_maps(x, kernel.shape[0], stride)]
  return dx, jnp.stack(taps).reshape(kernel.shape).astype(kernel.dtype)


_conv_with_taps.defvjp(_conv_with_taps_forward, _conv_with_taps_backward)


def _shifted_maps(x: jax.Array, size: int, stride: int) -> list[jax.Array]:
  """What each of the size² numbers of a kernel is multiplied with: [B, ⌈H/stride⌉, ⌈W/stride⌉, C]."""
  (height, width), half = x.shape[1:3], size // 2
  padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
  return [padded[:, i:i + height:stride, j:j + width:stride] for i in range(size) for j in range(size)]


def max_pool(x_BxHxWxC: jax.Array) -> jax.Array:
  """The maximum of 3×3 neighbours at stride 2, padded by 1 (with −∞): [B, H, W, C] -> [B, ⌈H/2⌉, ⌈W/2⌉, C].

  Of equal neighbours the first one receives the gradient, as PyTorch has it.
  """
  return lax.platform_dependent(x_BxHxWxC, cpu=lambda x: _largest_tap(x, x.shape), default=_largest_of_window)


def _largest_of_window(x: jax.Array) -> jax.Array:
  return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _largest_tap(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The same by nine shifted maps: XLA:CPU runs the gradient of a window's maximum as scalar code on one core."""
  return _largest_tap_forward(x, shape)[0]


def _largest_tap_forward(x: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  del shape
  largest, *others = _pooled_taps(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf))
  winner = jnp.zeros(largest.shape, jnp.int8)
  for k, tap in enumerate(others, 1):
    winner = jnp.where(tap > largest, jnp.int8(k), winner)
    largest = jnp.maximum(largest, tap)
  return largest, winner


def _largest_tap_backward(shape: tuple[int, ...], winner: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
  batch, height, width, channels = shape
  padded = jax.ShapeDtypeStruct((batch, height + 2, width + 2, channels), gradient.dtype)
  dx, = jax.linear_transpose(_pooled_taps, padded)([jnp.where(winner == k, gradient, 0) for k in range(len(_TAPS))])
  return dx[:, 1:-1, 1:-1],


_largest_tap.defvjp(_largest_tap_forward, _largest_tap_backward)


def _pooled_taps(padded: jax.Array) -> list[jax.Array]:
  height, width = padded.shape[1] - 2, padded.shape[2] - 2
  return [padded[:, i:i + height:2, j:j + width:2] for i, j in _TAPS]


def depthwise_conv(x_BxHxWxC: jax.Array, kernel_3x3x1xC: jax.Array, stride: int) -> jax.Array:
  """A 3×3 convolution of each channel by itself, padded by 1: [B, H, W, C] -> [B, ⌈H/stride⌉, ⌈W/stride⌉, C].

  XLA:CPU runs grouped convolutions some tens of times slower than nine shifted products; accelerators the reverse.
  """
  return lax.platform_dependent(x_BxHxWxC, kernel_3x3x1xC, cpu=lambda x, k: shifted_conv(x, k, stride),
                                default=lambda x, k: grouped_conv(x, k, stride))


def grouped_conv(x_BxHxWxC: jax.Array, kernel_3x3x1xC: jax.Array, stride: int) -> jax.Array:
  """The depthwise convolution as XLA's grouped convolution."""
  return lax.conv_general_dilated(x_BxHxWxC, kernel_3x3x1xC, (stride, stride), [(1, 1)] * 2,
                                  dimension_numbers=_LAYOUT, feature_group_count=x_BxHxWxC.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def shifted_conv(x_BxHxWxC: jax.Array, kernel_3x3x1xC: jax.Array, stride: int) -> jax.Array:
  """The depthwise convolution as a sum of nine shifted products, with a weight gradient that XLA:CPU vectorises."""
  return _shifted_conv_forward(x_BxHxWxC, kernel_3x3x1xC, stride)[0]


def _shifted_conv_forward(x: jax.Array, kernel: jax.Array,
                          stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  padded = _pad(x)   # outside of `unfused`, so that what makes x writes it padded; kept, so that it is padded once
  return products.unfused(functools.partial(_shifted_sum, stride=stride), kernel, padded, kernel), (padded, kernel)


def _shifted_conv_backward(stride: int, residuals: tuple[jax.Array, jax.Array],
                           gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  return products.unfused(functools.partial(_shifted_gradients, stride=stride), residuals[1], *residuals, gradient)


@functools.partial(jax.jit, static_argnames='stride')
def _shifted_gradients(padded: jax.Array, kernel: jax.Array, gradient: jax.Array,
                       stride: int) -> tuple[jax.Array, jax.Array]:
  dx, = jax.vjp(lambda x: _shifted_sum(x, kernel, stride), padded)[1](gradient)
  return dx[:, 1:-1, 1:-1], _kernel_gradient(padded, gradient, stride).astype(kernel.dtype)


@functools.partial(jax.jit, static_argnames='stride')
def _shifted_sum(padded: jax.Array, kernel_3x3x1xC: jax.Array, stride: int) -> jax.Array:
  height, width = padded.shape[1] - 2, padded.shape[2] - 2
  return sum(padded[:, i:i + height:stride, j:j + width:stride] * kernel_3x3x1xC[None, i:i + 1, j:j + 1, 0]
             for i, j in _TAPS)


shifted_conv.defvjp(_shifted_conv_forward, _shifted_conv_backward)


def _kernel_gradient(padded: jax.Array, gradient_BxhxwxC: jax.Array, stride: int) -> jax.Array:
  """Float32 [3, 3, 1, C].

  A reduction straight over (B, h, w) leaves XLA:CPU with scalar code. Elementwise sums of up to 16 rows (of all
  positions where the grid is small), the nine taps side by side in the channel axis, are vector code, and leave little
  to reduce. The batch axis is not cut, so that a sharded batch needs no communication here.
  """
  height, width = gradient_BxhxwxC.shape[1:3]
  padded, gradient = padded.astype(jnp.float32), gradient_BxhxwxC.astype(jnp.float32)
  columns = [slice(w, w + 1) for w in range(width)] if height * width <= 16 else [slice(0, width)]
  chunks = -(-height // 16)
  rows = [range(c * height // chunks, (c + 1) * height // chunks) for c in range(chunks)]

  def shifted(i: int, j: int, row: int, column: slice) -> jax.Array:
    return padded[:, i + stride * row, j + stride * column.start:j + stride * (column.stop - 1) + 1:stride]

  def partial_sum(rows: range) -> jax.Array:
    taps = [sum(shifted(i, j, r, c) * gradient[:, r, c] for r in rows for c in columns) for i, j in _TAPS]
    return jnp.sum(jnp.concatenate(taps, axis=-1), axis=(0, 1))

  return sum(partial_sum(r) for r in rows).reshape(3, 3, 1, -1)


def _pad(x_BxHxWxC: jax.Array) -> jax.Array:
  return jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
