"""The tiny run of `test_run.py` and `test_borrowed.py`, as a config file outside `configs/`."""
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent))
from tiny import SHALLOW, TINY  # noqa: E402  (the path above must be set first)

from lightclip_jax.config import replace, to_config_dict  # noqa: E402
from lightclip_jax.models import mobilenet_v2  # noqa: E402


def get_config(variant=''):
  """With the variant 'shallow', this process's MobileNetV2 has half of the blocks, and starts sooner."""
  if variant == 'shallow':
    mobilenet_v2.STAGES = SHALLOW
  return to_config_dict(replace(TINY, name='tiny', train=dict(steps=30), checkpoint=dict(every_steps=5),
                                evaluation=dict(every_steps=10), optimizer=dict(name='muon')))
