"""LightCLIP with a ResNet-18 image tower.

COMMAND   python -m lightclip_jax.main --config=configs/rn18.py:VARIANT --workdir=DIR
VARIANT     hardware                      reaches
quickstart  1 slow CPU core, 41 minutes   held-out style: concept top-1 12.0 %, 9-group 53.4 %; held-out images: top-1 36.7 %
laptop      1 CPU core, 46 minutes        held-out style: concept top-1 19.3 %, 9-group 56.7 %; held-out images: top-1 46.5 %
emoji       one GPU (the default)         not yet run
icons       one GPU                       not yet run
cc3m        one node of 8 accelerators    not yet run
yfcc15m     v5e 16×16                     not yet run
"""
from ml_collections import config_dict

from configs import recipe
from lightclip_jax.config import to_config_dict


def get_config(variant: str = 'emoji') -> config_dict.ConfigDict:
  """The config of one variant."""
  half = dict(model=dict(image=dict(width=0.5)))
  shorter = dict(**half, train=dict(steps=4500), evaluation=dict(every_steps=1500))   # as many minutes as MobileNetV2's 13,500
  return to_config_dict(recipe.get(variant, dict(name='resnet18'), quickstart=half, laptop=shorter))
