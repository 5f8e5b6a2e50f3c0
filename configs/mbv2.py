"""LightCLIP with a MobileNetV2 image tower.

COMMAND   python -m lightclip_jax.main --config=configs/mbv2.py:VARIANT --workdir=DIR
VARIANT     hardware                      reaches
quickstart  2 CPU cores, 5 to 10 minutes  held-out style: concept top-1 5.9 %, 9-group 42.9 %; held-out images: top-1 19.5 %
laptop      1 CPU core, 70 minutes        held-out style: concept top-1 25.9 %, 9-group 62.1 %; held-out images: top-1 51.4 %
emoji       one GPU (the default)         not yet run
icons       one GPU                       not yet run
cc3m        one node of 8 accelerators    not yet run
yfcc15m     v5e 16×16                     not yet run; by plan it fits, at most 4,131 examples/s/chip (docs/SCALE.md)
"""
from ml_collections import config_dict

from configs import recipe
from lightclip_jax.config import to_config_dict


def get_config(variant: str = 'emoji') -> config_dict.ConfigDict:
  """The config of one variant."""
  half = dict(model=dict(image=dict(width=0.5)))
  return to_config_dict(recipe.get(variant, dict(name='mobilenet_v2'), quickstart=half, laptop=half))
