"""The small run of the fault campaign: it tells a folder which examples it reads, and what it is doing.

`python -m lightclip_jax.main --config=benchmarks/faults_config.py:FOLDER`; FOLDER/PHASE-PROCESS exists while that lasts.
"""
import json
import pathlib
import sys

import jax

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / 'tests' / 'training')]
from tiny import SHALLOW, TINY  # noqa: E402  (the path above must be set first)

from lightclip_jax import config as config_lib  # noqa: E402
from lightclip_jax.data.pipeline import TrainBatches  # noqa: E402
from lightclip_jax.models import mobilenet_v2  # noqa: E402
from lightclip_jax.training.checkpoint import Checkpointer  # noqa: E402
from lightclip_jax.training.evaluator import Evaluator  # noqa: E402

STEPS, SAVE_EVERY = 40, 5


def get_config(variant=''):
  """The tests' tiny run with half of MobileNetV2's blocks, all objectives, moving average and two evaluations."""
  mobilenet_v2.STAGES = SHALLOW
  _note(pathlib.Path(variant))
  return config_lib.to_config_dict(config_lib.replace(
      TINY, name='faults', train=dict(steps=STEPS, batch_size=64), checkpoint=dict(every_steps=SAVE_EVERY),
      evaluation=dict(every_steps=15, splits=('heldout_style',))))


def _note(folder):
  read = TrainBatches.__next__

  def noted_read(self):
    number, batch = self.state()['next_batch'], read(self)
    with (folder / f'read-{jax.process_index()}.jsonl').open('a') as file:
      file.write(json.dumps([number, batch['example_id'].tolist()]) + '\n')
    return batch

  TrainBatches.__next__ = noted_read
  for owner, name, phase in ((Checkpointer, 'restore', 'restore'), (Evaluator, 'evaluate', 'evaluation'),
                             (Evaluator, 'finish', 'report')):
    setattr(owner, name, _during(getattr(owner, name), folder, phase))
  save, saved = Checkpointer.save, Checkpointer._note_history

  def noted_save(self, *args, **kwargs):
    _flag(folder, 'save').touch()
    save(self, *args, **kwargs)

  def noted_saved(self):   # in another thread, when all is on disk
    saved(self)
    _flag(folder, 'save').unlink(missing_ok=True)

  Checkpointer.save, Checkpointer._note_history = noted_save, noted_saved


def _during(function, folder, phase):
  def noted(*args, **kwargs):
    _flag(folder, phase).touch()
    try:
      return function(*args, **kwargs)
    finally:
      _flag(folder, phase).unlink(missing_ok=True)
  return noted


def _flag(folder, phase):
  return folder / f'{phase}-{jax.process_index()}'
