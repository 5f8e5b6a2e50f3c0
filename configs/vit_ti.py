"""LightCLIP with a ViT-Ti/16 image tower.

COMMAND   python -m lightclip_jax.main --config=configs/vit_ti.py:VARIANT --workdir=DIR
VARIANT     hardware                      reaches
quickstart  1 CPU core, 15 busy minutes   held-out images: top-1 2.8 % (300 steps, softened); held-out style 0.7 %
laptop      2 CPU cores                   not yet run
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
  return to_config_dict(recipe.get(variant, dict(name='vit_ti'), quickstart=dict(train=dict(steps=300))))
