"""Damage that only one of several processes sees makes all of them go back to the checkpoint before."""
import pathlib
import sys

import jax
import numpy as np
import pytest
import workers
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightclip_jax import config as config_lib
from lightclip_jax import distributed
from lightclip_jax.training import checkpoint
from lightclip_jax.training.state import TrainState

VALUES = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32)


def state_of(step):
  """Each process has half of each matrix."""
  mesh = Mesh(np.asarray(jax.devices()), ('fsdp',))
  put = lambda values, *axes: jax.make_array_from_callback(  # noqa: E731
      np.shape(values), NamedSharding(mesh, PartitionSpec(*axes)), lambda index: np.asarray(values)[index])
  return TrainState(put(np.int32(step)), {'w': put(VALUES + step, 'fsdp')}, {}, {'m': put(VALUES, 'fsdp')}, None)


def work(folder):
  """Saves three checkpoints; process 1's arrays of the third and the text of the second are damaged, and it restores."""
  distributed.initialize()
  keeper = checkpoint.Checkpointer(folder, config_lib.Checkpoint(keep=3))
  for step in (1, 2, 3):
    keeper.save(step, state_of(step), checkpoint.RunState({'next_batch': step}, {}, {}, {}, ''), wait=True)
  with distributed.first_alone('damage'):
    if jax.process_index() == 0:
      own = (folder / 'checkpoints' / '3' / 'state' / 'ocdbt.process_1' / 'd').iterdir()
      max(own, key=lambda file: file.stat().st_size).write_bytes(b'')
  read = checkpoint._unsealed
  checkpoint._unsealed = lambda run: read(run if run['iterator']['next_batch'] != 2 or jax.process_index() == 0 else {})
  state, run = keeper.restore(state_of(0))
  own = state.params['w'].addressable_data(0)
  print('restored', int(state.step), run.iterator, np.array_equal(own, VALUES[32 * jax.process_index():][:32] + 1), flush=True)
  keeper.close()


@pytest.mark.slow
def test_all_go_back_together(tmp_path):
  both = workers.start(__file__, tmp_path)
  try:
    said = [worker.communicate(timeout=300) for worker in both]
    assert [worker.returncode for worker in both] == [0, 0], said
    assert all(out.endswith("restored 1 {'next_batch': 1} True\n") for out, _ in said), said
    assert 'checkpoint 3' in said[0][1] and 'checkpoint 2' in said[0][1] and 'its run state is not what was' in said[0][1]
    assert sorted(place.name[0] for place in (tmp_path / 'damaged').iterdir()) == ['2', '3']
  finally:
    for worker in both:
      worker.kill()


if __name__ == '__main__':
  work(pathlib.Path(sys.argv[1]))
