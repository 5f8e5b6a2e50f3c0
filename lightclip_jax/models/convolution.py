"""Convolutions in the form that each platform runs fastest; values agree within float32 rounding.

Letters: B batch, H height, W width, C input channels, D output channels.
"""
import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def conv(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """A convolution padded by k // 2 on every side. kernel [k, k, C, D] -> [B, ⌈H/stride⌉, ⌈W/stride⌉, D] for odd k."""
  size = kernel.shape[0]
  if size == 1:
    return x_BxHxWxC[:, ::stride, ::stride] @ kernel[0, 0]
  return lax.conv_general_dilated(x_BxHxWxC, kernel, (stride, stride), [(size // 2, size // 2)] * 2,
                                  dimension_numbers=_LAYOUT)


def depthwise_conv(x_BxHxWxC: jax.Array, kernel_3x3x1xC: jax.Array, stride: int) -> jax.Array:
  """A 3×3 convolution of each channel by itself, padded by 1: [B, H, W, C] -> [B, ⌈H/stride⌉, ⌈W/stride⌉, C].

  XLA:CPU runs grouped convolutions some tens of times slower than nine shifted products; accelerators the reverse.
  """
  return lax.platform_dependent(x_BxHxWxC, kernel_3x3x1xC, cpu=lambda x, k: _shifted(x, k, stride),
                                default=lambda x, k: grouped_conv(x, k, stride))


def grouped_conv(x_BxHxWxC: jax.Array, kernel_3x3x1xC: jax.Array, stride: int) -> jax.Array:
  """The depthwise convolution as XLA's grouped convolution."""
  return lax.conv_general_dilated(x_BxHxWxC, kernel_3x3x1xC, (stride, stride), [(1, 1)] * 2,
                                  dimension_numbers=_LAYOUT, feature_group_count=x_BxHxWxC.shape[-1])


def _shifted(x_BxHxWxC: jax.Array, kernel_3x3x1xC: jax.Array, stride: int) -> jax.Array:
  """The depthwise convolution as a sum of nine shifted products."""
  height, width = x_BxHxWxC.shape[1:3]
  padded = jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return sum(padded[:, i:i + height:stride, j:j + width:stride] * kernel_3x3x1xC[None, i:i + 1, j:j + 1, 0]
             for i in range(3) for j in range(3))
