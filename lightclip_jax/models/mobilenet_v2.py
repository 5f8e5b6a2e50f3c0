"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381); structure and numbers of timm's `mobilenetv2_100`.

Letters: B batch, H height, W width, C channels, F features.
"""
import jax
from flax import linen as nn

from lightclip_jax import config
from lightclip_jax.models import layers

# (expansion, channels, blocks, stride); a stage feature map is taken before each of the strides and at the end.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
MAPS_AFTER = (1, 2, 4, 6)


def round_channels(channels: float) -> int:
  """The nearest multiple of 8, at least 8 and at least 90 % of `channels`."""
  rounded = max(8, int(channels + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
  """Expand (1×1), filter each channel (3×3), project (1×1); a shortcut where the shape stays."""
  features: int
  expansion: int
  stride: int
  norm: layers.Norm

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
    x, channels = x_BxHxWxC, x_BxHxWxC.shape[-1]
    if self.expansion != 1:
      x = layers.Conv(channels * self.expansion, 1, name='expand')(x)
      x = self.norm(activation='relu6', name='expand_norm')(x, train)
    x = layers.DepthwiseConv(self.stride, name='depthwise')(x)
    x = self.norm(activation='relu6', name='depthwise_norm')(x, train)
    x = self.norm(name='project_norm')(layers.Conv(self.features, 1, name='project')(x), train)
    return x + x_BxHxWxC if self.stride == 1 and channels == self.features else x


class MobileNetV2(nn.Module):
  """The tower: stage maps at strides 4, 8, 16, 32 (halved by `stem_stride=1`), tokens are the head's output."""
  norm: layers.Norm
  width: float = 1.0
  stem_stride: int = 2

  @nn.compact
  def __call__(self, x_BxHxWx3: jax.Array, train: bool,
               example_index_B: jax.Array | None = None) -> layers.ImageFeatures:
    del example_index_B   # no dropout in this tower
    def scaled(channels: int) -> int:
      return round_channels(channels * self.width)

    x = layers.Conv(scaled(32), 3, self.stem_stride, name='stem')(x_BxHxWx3)
    x = self.norm(activation='relu6', name='stem_norm')(x, train)
    maps = []
    for s, (expansion, channels, blocks, stride) in enumerate(STAGES):
      for b in range(blocks):
        block = InvertedResidual(scaled(channels), expansion, 1 if b else stride, self.norm, name=f'block{s}_{b}')
        x = block(x, train)
      if s in MAPS_AFTER:
        maps.append(x)
    x = layers.Conv(max(1280, scaled(1280)), 1, name='head')(x)
    x = self.norm(activation='relu6', name='head_norm')(x, train)
    return layers.ImageFeatures(x.mean((1, 2)), x, tuple(maps))


def build(image: config.ImageTower, norm: layers.Norm) -> MobileNetV2:
  """The tower of this config. Raises UserError for an option it has no use for, or a size its stride cannot divide."""
  layers.check_unused(image, config.ImageTower(), 'patch_size', 'window', 'drop_path')
  layers.check_stem(image)
  return MobileNetV2(norm, image.width, image.stem_stride)
