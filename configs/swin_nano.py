"""LightCLIP with a Swin-Nano image tower.

COMMAND   python -m lightclip_jax.main --config=configs/swin_nano.py:VARIANT --workdir=DIR
VARIANT     hardware                      reaches
quickstart  1 CPU core, 8 busy minutes    held-out images: top-1 4.5 ± 1.2 % (300 steps, 3 seeds); held-out style 1.4 ± 0.2 %
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
  small = dict(model=dict(image=dict(window=8)))  # 64 and 128 px make grids of 2 to 32, which windows of 7 do not divide
  return to_config_dict(recipe.get(variant, dict(name='swin_nano'), laptop=small, emoji=small, icons=small,
                                   quickstart=dict(model=dict(image=dict(size=64, window=8)), train=dict(steps=300))))
