"""tmp"""
from lightclip_jax.config import to_config_dict
from configs import recipe

def get_config(variant='emoji'):
  return to_config_dict(recipe.get(variant, dict(name='mobilenet_v2', width=0.5, size=64)))
