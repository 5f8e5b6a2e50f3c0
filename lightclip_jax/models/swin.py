"""Swin-Nano: a Swin Transformer (Liu et al. 2021, arXiv:2103.14030) of width 48; structure and numbers of timm's.

Letters: B batch, H height, W width, C channels, N heads, w window side, T = w² tokens of a window, n windows.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lightclip_jax import config
from lightclip_jax.models import layers

WIDTH, DEPTHS, HEADS, PATCH = 48, (2, 2, 6, 2), (3, 6, 12, 24), 4
BLOCKED = -100.0   # added to the logits of tokens that were not neighbours before the shift, as in Swin's own code


class WindowAttention(nn.Module):
  """Self-attention inside windows with a learned bias for each relative position."""
  heads: int
  window: int
  shift: int

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    batch, height, width, channels = x_BxHxWxC.shape
    table = self.param('relative_position_bias', layers.trunc_normal, ((2 * self.window - 1) ** 2, self.heads))
    bias_NxTxT = jnp.transpose(table[_relative_positions(self.window)], (2, 0, 1))
    bias_nxNxTxT = bias_NxTxT[None] + _shift_mask(height, width, self.window, self.shift)
    x = jnp.roll(x_BxHxWxC, (-self.shift, -self.shift), (1, 2)) if self.shift else x_BxHxWxC
    w = self.window
    x = x.reshape(batch, height // w, w, width // w, w, channels).transpose(0, 1, 3, 2, 4, 5)
    x = layers.SelfAttention(self.heads, name='attention')(x.reshape(batch, -1, w * w, channels), bias_nxNxTxT[None])
    x = x.reshape(batch, height // w, width // w, w, w, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(x_BxHxWxC.shape)
    return jnp.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class SwinBlock(nn.Module):
  """x + window attention(norm(x)), then x + mlp(norm(x))."""
  heads: int
  window: int
  shift: int
  drop_path: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool, example_index_B: jax.Array | None) -> jax.Array:
    drop = functools.partial(layers.ExampleDropout, self.drop_path, whole=True)
    y = nn.LayerNorm(1e-5, dtype=x.dtype, name='attention_norm')(x)
    y = WindowAttention(self.heads, self.window, self.shift, name='window')(y)
    x = x + drop(name='drop_attention')(y, example_index_B, train)
    y = layers.MLP(name='mlp')(nn.LayerNorm(1e-5, dtype=x.dtype, name='mlp_norm')(x))
    return x + drop(name='drop_mlp')(y, example_index_B, train)


class PatchMerging(nn.Module):
  """Joins 2×2 neighbours: half the resolution, twice the channels."""

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    batch, height, width, channels = x_BxHxWxC.shape
    x = x_BxHxWxC.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
    x = nn.LayerNorm(1e-5, dtype=x.dtype, name='norm')(x.reshape(batch, height // 2, width // 2, 4 * channels))
    return layers.Dense(2 * channels, use_bias=False, name='reduce')(x)


class SwinNano(nn.Module):
  """The tower: stage maps at strides 4, 8, 16, 32; the last one normed is the token grid, whose mean is pooled."""
  patch_size: int = PATCH
  window: int = 7
  drop_path: float = 0.0

  @nn.compact
  def __call__(self, x_BxHxWx3: jax.Array, train: bool,
               example_index_B: jax.Array | None = None) -> layers.ImageFeatures:
    x = layers.PatchEmbed(WIDTH, self.patch_size, name='patch_embedding')(x_BxHxWx3)
    x = nn.LayerNorm(1e-5, dtype=x.dtype, name='patch_norm')(x)
    rates = iter(layers.drop_path_rates(self.drop_path, sum(DEPTHS)))
    maps = []
    for s, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
      x = PatchMerging(name=f'merge{s}')(x) if s else x
      window = min(self.window, x.shape[1])
      for b in range(depth):
        shift = window // 2 if b % 2 and window < x.shape[1] else 0
        x = SwinBlock(heads, window, shift, next(rates), name=f'block{s}_{b}')(x, train, example_index_B)
      maps.append(x)
    x = nn.LayerNorm(1e-5, dtype=x.dtype, name='final_norm')(x)
    return layers.ImageFeatures(x.mean((1, 2)), x, tuple(maps))


def build(image: config.ImageTower, norm: layers.Norm) -> SwinNano:
  """The tower of this config. Raises UserError for an option it has no use for, or a size that windows cannot tile."""
  del norm   # LayerNorm only
  layers.check_unused(image, config.ImageTower(), 'width', 'stem_stride')
  patch = layers.positive_patch(image, PATCH)
  layers.check_size(image.size, functools.partial(_tiles, patch=patch, window=image.window),
                    f'a size whose grids windows of {image.window} tile at strides {patch} to {8 * patch}')
  return SwinNano(patch, image.window, image.drop_path)


def _tiles(size: int, patch: int, window: int) -> bool:
  """Whether every stage's grid is whole, and no larger than the window or a multiple of it."""
  grids = [size // (patch * 2 ** s) for s in range(4)]
  return size % (8 * patch) == 0 and window > 0 and all(g <= window or g % window == 0 for g in grids)


def _relative_positions(window: int) -> np.ndarray:
  """The table row for each pair of tokens of a window: int [T, T]."""
  row, column = np.divmod(np.arange(window * window), window)
  across, down = (c[:, None] - c[None, :] + window - 1 for c in (column, row))
  return down * (2 * window - 1) + across


def _shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
  """`BLOCKED` between tokens that only the shift brought into one window: float32 [n, 1, T, T]; n = 1 without."""
  if shift == 0:
    return np.zeros((1, 1, window * window, window * window), np.float32)

  def regions(size: int) -> np.ndarray:
    return np.digitize(np.arange(size), [size - window, size - shift])
  region = 3 * regions(height)[:, None] + regions(width)[None, :]
  region = region.reshape(height // window, window, width // window, window).transpose(0, 2, 1, 3)
  region_nxT = region.reshape(-1, window * window)
  return np.where(region_nxT[:, None, :, None] == region_nxT[:, None, None, :], 0, BLOCKED).astype(np.float32)
