"""Layers that several towers share: convolutions padded as PyTorch pads, attention, the MLP, per-example dropout.

Letters: B batch, H height, W width, C channels, T query positions, S key positions, N heads, K width of a head.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lightclip_jax.errors import UserError
from lightclip_jax.models import convolution, products

fan_out_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
trunc_normal = nn.initializers.truncated_normal(0.02)


class ImageFeatures(NamedTuple):
  """What every image tower returns."""
  pooled_BxF: jax.Array                    # the global feature
  tokens_BxHxWxF: jax.Array                # the last token grid
  stages: tuple[jax.Array, ...]            # four feature maps [B, h, w, c], from fine to coarse


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, as PyTorch's default. Only x is kept for the backward pass: the rest is float32 and cheap."""
  return jax.nn.gelu(x, approximate=False)


class Conv(nn.Module):
  """A convolution without bias, padded by kernel // 2 on both sides as PyTorch does ("SAME" differs for strides)."""
  features: int
  kernel_size: int = 3
  stride: int = 1

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    shape = (self.kernel_size, self.kernel_size, x_BxHxWxC.shape[-1], self.features)
    kernel = self.param('kernel', fan_out_normal, shape).astype(x_BxHxWxC.dtype)
    return convolution.conv(x_BxHxWxC, kernel, self.stride)


class DepthwiseConv(nn.Module):
  """A 3×3 convolution of each channel by itself, without bias, padded by 1."""
  stride: int = 1

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    init = nn.initializers.normal((2 / 9) ** 0.5)
    kernel = self.param('kernel', init, (3, 3, 1, x_BxHxWxC.shape[-1])).astype(x_BxHxWxC.dtype)
    return convolution.depthwise_conv(x_BxHxWxC, kernel, self.stride)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """softmax(q kᵀ / √K + bias) v, float32 softmax: q [..., T, N, K]; k, v [..., S, N, K]; bias [..., N or 1, T, S].

  CPUs keep the weights for the backward pass; elsewhere they are computed again, which moves fewer bytes.
  """
  return jax.lax.platform_dependent(q, k, v, bias, cpu=_attention, default=jax.checkpoint(_attention))


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
  q, k, v = (jnp.swapaxes(x, -2, -3) for x in (q, k, v))   # XLA:CPU's products over heads in the middle are slow
  logits = jnp.einsum('...tk,...sk->...ts', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)
  return jnp.swapaxes(jnp.einsum('...ts,...sk->...tk', weights.astype(v.dtype), v), -2, -3)


class Dense(nn.Module):
  """x [B, ..., C] -> [B, ..., features]."""
  features: int
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = trunc_normal

  @nn.compact
  def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
    """x times these columns of the kernel, plus theirs of the bias."""
    kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features)).astype(x.dtype)
    bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(x.dtype) if self.use_bias else None
    return products.dense(x, kernel[:, columns], None if bias is None else bias[columns])


def take_positions(x: jax.Array, at: jax.Array) -> jax.Array:
  """x [..., S, C] at the positions int32 [..., T] -> [..., T, C]."""
  return jnp.take_along_axis(x, at[..., None], axis=-2)


class SelfAttention(nn.Module):
  """Multi-head self-attention with one product for queries, keys and values (in this order).

  x [..., S, C] -> [..., S, C], or [..., T, C] at the positions `at` (int32 [..., T]) alone; bias as `attention` has it.
  """
  heads: int
  kernel_init: nn.initializers.Initializer = trunc_normal
  out_init: nn.initializers.Initializer = trunc_normal

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array | None = None, at: jax.Array | None = None) -> jax.Array:
    width = x.shape[-1]
    qkv = Dense(3 * width, kernel_init=self.kernel_init, name='qkv')
    if at is None:
      q, k, v = jnp.split(qkv(x), 3, axis=-1)
    else:
      q = qkv(take_positions(x, at), slice(0, width))
      k, v = jnp.split(qkv(x, slice(width, None)), 2, axis=-1)
    out = attention(*(part.reshape(*part.shape[:-1], self.heads, -1) for part in (q, k, v)), bias)
    return Dense(width, kernel_init=self.out_init, name='out')(out.reshape(q.shape))


class MLP(nn.Module):
  """Dense to four times the width, exact GELU, Dense back."""
  hidden_init: nn.initializers.Initializer = trunc_normal
  out_init: nn.initializers.Initializer = trunc_normal

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = gelu(Dense(4 * x.shape[-1], kernel_init=self.hidden_init, name='hidden')(x))
    return Dense(x.shape[-1], kernel_init=self.out_init, name='out')(hidden)


class PatchEmbed(nn.Module):
  """Non-overlapping patches, each projected: [B, H, W, 3] -> [B, H / patch, W / patch, features]."""
  features: int
  patch: int

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    batch, height, width, channels = x_BxHxWxC.shape
    p, h, w = self.patch, height // self.patch, width // self.patch
    init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
    kernel = self.param('kernel', init, (p, p, channels, self.features)).astype(x_BxHxWxC.dtype)
    bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(x_BxHxWxC.dtype)
    patches = x_BxHxWxC.reshape(batch, h, p, w, p, channels).transpose(0, 1, 3, 2, 4, 5).reshape(batch, h, w, -1)
    return products.dense(patches, kernel.reshape(-1, self.features), bias)


class TransformerBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); each branch may be dropped, whole or by element.

  x [..., S, C] -> [..., S, C], or [..., T, C] at the positions `at` (int32 [..., T]) alone: the others are attended to.
  """
  heads: int
  epsilon: float
  rate: float = 0.0
  whole: bool = True
  attention_inits: tuple[nn.initializers.Initializer, ...] = (trunc_normal, trunc_normal)
  mlp_inits: tuple[nn.initializers.Initializer, ...] = (trunc_normal, trunc_normal)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool, example_index: jax.Array | None,
               bias: jax.Array | None = None, at: jax.Array | None = None) -> jax.Array:
    y = nn.LayerNorm(self.epsilon, dtype=x.dtype, name='attention_norm')(x)
    y = SelfAttention(self.heads, *self.attention_inits, name='attention')(y, bias, at)
    x = x if at is None else take_positions(x, at)
    x = x + ExampleDropout(self.rate, self.whole, name='drop_attention')(y, example_index, train)
    y = nn.LayerNorm(self.epsilon, dtype=x.dtype, name='mlp_norm')(x)
    y = MLP(*self.mlp_inits, name='mlp')(y)
    return x + ExampleDropout(self.rate, self.whole, name='drop_mlp')(y, example_index, train)


class ExampleDropout(nn.Module):
  """Dropout whose mask depends on the example's index in the global batch, not on how the batch is cut up.

  Needs `rngs={'dropout': key}` in training. `whole=True` drops an example's whole activation (stochastic depth).
  """
  rate: float
  whole: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, example_index: jax.Array | None, train: bool) -> jax.Array:
    """x: [*batch, ...]; example_index: int32 [*batch], None for 0, 1, 2, …"""
    if not train or self.rate == 0:
      return x
    index = jnp.arange(x.shape[0]) if example_index is None else example_index
    keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng('dropout'), index.reshape(-1))
    shape = (1,) * (x.ndim - index.ndim) if self.whole else x.shape[index.ndim:]
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, shape))(keys).reshape(*index.shape, *shape)
    return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def check_unused(config: Any, default: Any, *names: str) -> None:
  """Raises UserError where an option that this tower has no use for differs from its default."""
  for name in names:
    if getattr(config, name) != getattr(default, name):
      raise UserError(f'model.image.{name} is {getattr(config, name)!r}, but {config.name} has no use for it; '
                      f'leave it at {getattr(default, name)!r}')


def check_size(size: int, fits: Callable[[int], bool], what: str) -> None:
  """Raises UserError unless the image size fits; the nearest sizes that do are named."""
  if size < 1 or not fits(size):
    below = next((s for s in range(size - 1, 0, -1) if fits(s)), None)
    above = next((s for s in range(max(size, 0) + 1, size + 4096) if fits(s)), None)
    nearest = ' and '.join(str(s) for s in (below, above) if s)
    raise UserError(f'model.image.size is {size}, which is not {what}; the nearest that fit: {nearest or "none"}')


def positive_patch(image: Any, default: int) -> int:
  """The patch size of the config, or the tower's own where it is 0. Raises UserError for a negative one."""
  if image.patch_size < 0:
    raise UserError(f'model.image.patch_size is {image.patch_size}; it can be 0 (the tower\'s own, {default}) or more')
  return image.patch_size or default


def drop_path_rates(last: float, depth: int) -> tuple[float, ...]:
  """Stochastic depth, linear from 0 in the first block to `last` in the last one."""
  return tuple(last * i / max(depth - 1, 1) for i in range(depth))


Norm = Callable[..., nn.Module]   # `BatchNorm` with its policy bound


def check_stem(image: Any) -> None:
  """Raises UserError for a stem stride other than 1 or 2, or a size that the whole stride does not divide."""
  if image.stem_stride not in (1, 2):
    raise UserError(f'model.image.stem_stride is {image.stem_stride}; it can be 1 or 2')
  if not image.width > 0:
    raise UserError(f'model.image.width is {image.width}; it must be above 0')
  stride = 8 * image.stem_stride   # the last of the strided layers pads an odd grid, as PyTorch's do
  check_size(image.size, lambda size: size % stride == 0, f'a multiple of the stride {stride} of {image.name}')
