"""The tiny run of `test_run.py`, as a config file outside `configs/`."""
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent))
from tiny import TINY  # noqa: E402  (the path above must be set first)

from lightclip_jax.config import replace, to_config_dict  # noqa: E402


def get_config(variant=''):
  return to_config_dict(replace(TINY, name='tiny', train=dict(steps=30), checkpoint=dict(every_steps=5),
                                evaluation=dict(every_steps=10), optimizer=dict(name='muon')))
