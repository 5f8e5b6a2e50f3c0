"""ResNet-18 (He et al. 2015, arXiv:1512.03385); structure and numbers of timm's `resnet18`.

Letters: B batch, H height, W width, C channels.
"""
import jax
from flax import linen as nn

from lightclip_jax import config
from lightclip_jax.models import convolution, layers

STAGE_CHANNELS = (64, 128, 256, 512)
BLOCKS = 2


class BasicBlock(nn.Module):
  """Two 3×3 convolutions and a shortcut; the last norm's scale starts at zero, as in timm."""
  features: int
  stride: int
  norm: layers.Norm

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
    y = layers.Conv(self.features, 3, self.stride, name='conv1')(x_BxHxWxC)
    y = self.norm(activation='relu', name='norm1')(y, train)
    y = layers.Conv(self.features, 3, name='conv2')(y)
    y = self.norm(scale_init=nn.initializers.zeros, name='norm2')(y, train)
    shortcut = x_BxHxWxC
    if self.stride != 1 or self.features != shortcut.shape[-1]:
      shortcut = layers.Conv(self.features, 1, self.stride, name='shortcut')(shortcut)
      shortcut = self.norm(name='shortcut_norm')(shortcut, train)
    return nn.relu(y + shortcut)


class ResNet18(nn.Module):
  """The tower: stage maps at strides 4, 8, 16, 32 (halved by `stem_stride=1`); the last one is the token grid.

  `width` multiplies the channels of the stages, not the stem's 64, as timm's `channels` do.
  """
  norm: layers.Norm
  width: float = 1.0
  stem_stride: int = 2

  @nn.compact
  def __call__(self, x_BxHxWx3: jax.Array, train: bool,
               example_index_B: jax.Array | None = None) -> layers.ImageFeatures:
    del example_index_B   # no dropout in this tower
    x = layers.Conv(64, 7, self.stem_stride, name='stem')(x_BxHxWx3)
    x = self.norm(activation='relu', name='stem_norm')(x, train)
    x = convolution.max_pool(x)
    maps = []
    for s, features in enumerate(stage_channels(self.width)):
      for b in range(BLOCKS):
        x = BasicBlock(features, 2 if s > 0 and b == 0 else 1, self.norm, name=f'block{s}_{b}')(x, train)
      maps.append(x)
    return layers.ImageFeatures(x.mean((1, 2)), x, tuple(maps))


def stage_channels(width: float) -> tuple[int, ...]:
  """Of the four stages: each twice the one before, the first a multiple of 8."""
  first = max(8, 8 * round(STAGE_CHANNELS[0] * width / 8))
  return tuple(first * channels // STAGE_CHANNELS[0] for channels in STAGE_CHANNELS)


def build(image: config.ImageTower, norm: layers.Norm) -> ResNet18:
  """The tower of this config. Raises UserError for an option it has no use for, or a size its stride cannot divide."""
  layers.check_unused(image, config.ImageTower(), 'patch_size', 'window', 'drop_path')
  layers.check_stem(image)
  return ResNet18(norm, image.width, image.stem_stride)
