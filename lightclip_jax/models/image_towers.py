"""The image towers by name. A new tower is one new file and one line here."""
from flax import linen as nn

from lightclip_jax import config
from lightclip_jax.models import layers, mobilenet_v2, resnet, swin, vit

TOWERS = {
    'mobilenet_v2': mobilenet_v2.build,
    'resnet18': resnet.build,
    'swin_nano': swin.build,
    'vit_ti': vit.build,
}
BATCH_NORM = ('mobilenet_v2', 'resnet18')   # those that normalise over groups of a batch


def build(image: config.ImageTower, norm: layers.Norm) -> nn.Module:
  """The tower that `image.name` names: `tower(images_BxHxWx3, train, example_index_B) -> layers.ImageFeatures`.

  Raises:
    UserError: for an option that the tower has no use for, or an image size that it cannot divide.
  """
  return TOWERS[image.name](image, norm)
