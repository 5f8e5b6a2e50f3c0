"""The recipe that all towers share. A config file names its tower; `get` builds one of the variants.

quickstart  emoji, 2 CPU cores, minutes
emoji       emoji, one GPU (the default)
icons       the large icon set, one GPU
cc3m        CC3M, one node of 8 accelerators
yfcc15m     YFCC15M, a pod
"""
from lightclip_jax.config import Config, replace
from lightclip_jax.errors import UserError


def get(variant: str, image: dict, **changes) -> Config:
  """The config of a variant for an image tower; `changes` are the tower's own, over the variant's.

  Raises:
    UserError: for a variant that does not exist.
  """
  if variant not in VARIANTS:
    raise UserError(f'unknown variant {variant!r}; there are: {", ".join(VARIANTS)}')
  config = replace(VARIANTS[variant](), name=f'{image["name"]}-{variant}', model=dict(image=image))
  return replace(config, **changes.get(variant, {}))


def quickstart() -> Config:
  """Small images and a small text tower."""
  return replace(
      Config(),
      model=dict(embed_dim=256, token_dim=64, batch_norm='group:32', image=dict(size=64),
                 text=dict(width=192, heads=4, depth=3, context=16, vocab_size=3072),
                 fusion=dict(stages=((3, 1), (4, 2)), heads=4)),
      data=dict(max_masked=3, first_caption=0.5),
      objective=dict(token_matching=dict(group_size=8)),
      train=dict(steps=1000, batch_size=128, log_every=20),
      optimizer=dict(learning_rate=1e-3),
      evaluation=dict(every_steps=500))


VARIANTS = {'quickstart': quickstart}
