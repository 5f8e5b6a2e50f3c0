"""ViT-Ti/16 (Dosovitskiy et al. 2020; Touvron et al. 2020); structure and numbers of timm's `vit_tiny_patch16_224`.

Letters: B batch, H height, W width, T tokens (class token first), C channels.
"""
import jax
import jax.numpy as jnp
from flax import linen as nn

from lightclip_jax import config
from lightclip_jax.models import layers

WIDTH, DEPTH, HEADS, PATCH = 192, 12, 3, 16
MAPS_AFTER = (3, 6, 9, 12)


class ViT(nn.Module):
  """The tower: pooled is the class token, tokens are the other ones, stage maps follow blocks 3, 6, 9 and 12."""
  patch_size: int = PATCH
  drop_path: float = 0.0

  @nn.compact
  def __call__(self, x_BxHxWx3: jax.Array, train: bool,
               example_index_B: jax.Array | None = None) -> layers.ImageFeatures:
    x_BxHxWxC = layers.PatchEmbed(WIDTH, self.patch_size, name='patch_embedding')(x_BxHxWx3)
    batch, height, width, _ = x_BxHxWxC.shape
    patches = x_BxHxWxC.reshape(batch, -1, WIDTH)
    class_token = self.param('class_token', nn.initializers.normal(1e-6), (1, 1, WIDTH)).astype(patches.dtype)
    x = jnp.concatenate([jnp.broadcast_to(class_token, (batch, 1, WIDTH)), patches], axis=1)
    x = x + self.param('position_embedding', layers.trunc_normal, (1, *x.shape[1:])).astype(x.dtype)

    def grid(x_BxTxC: jax.Array) -> jax.Array:
      return x_BxTxC[:, 1:].reshape(batch, height, width, WIDTH)

    maps = []
    for i, rate in enumerate(layers.drop_path_rates(self.drop_path, DEPTH)):
      x = layers.TransformerBlock(HEADS, 1e-6, rate, name=f'block{i}')(x, train, example_index_B)
      if i + 1 in MAPS_AFTER:
        maps.append(grid(x))
    x = nn.LayerNorm(1e-6, dtype=x.dtype, name='final_norm')(x)
    return layers.ImageFeatures(x[:, 0], grid(x), tuple(maps))


def build(image: config.ImageTower, norm: layers.Norm) -> ViT:
  """The tower of this config. Raises UserError for an option it has no use for, or a size its patch cannot divide."""
  del norm   # LayerNorm only
  layers.check_unused(image, config.ImageTower(), 'width', 'stem_stride', 'window')
  patch = layers.positive_patch(image, PATCH)
  layers.check_size(image.size, lambda size: size % patch == 0, f'a multiple of the patch size {patch}')
  return ViT(patch, image.drop_path)
