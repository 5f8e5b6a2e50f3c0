"""Whatever is done to the newest checkpoint, it is noticed, kept aside, and the one before is used."""
import dataclasses
import errno
import gc
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lightclip_jax import config as config_lib
from lightclip_jax import storage
from lightclip_jax.errors import UserError
from lightclip_jax.training import checkpoint, checksum
from lightclip_jax.training.state import TrainState

# Orbax leaves the reads of other arrays unfinished when one fails.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning', 'ignore:coroutine')
VALUES = np.random.default_rng(0).normal(size=(300, 40)).astype(np.float32)


@pytest.fixture(autouse=True)
def collected():
  """Those reads are complained of here, and not in some later test."""
  yield
  gc.collect()


def state_of(step):
  return TrainState(jnp.int32(step), {'w': jnp.asarray(VALUES) + step, 'b': jnp.arange(3.0)}, {'n': {'mean': jnp.ones(5)}},
                    {'count': jnp.int32(step), 'm': jnp.asarray(VALUES)}, {'w': jnp.asarray(VALUES), 'b': jnp.zeros(3)})


def run_of(step):
  return checkpoint.RunState({'next_batch': step}, {'sums': {'loss': 0.1}, 'count': 1}, {'name': 'x'}, {}, 'dG9rZW4=')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with checkpoints 1 and 2."""
  folder = tmp_path_factory.mktemp('saved') / 'run'
  keeper = checkpoint.Checkpointer(folder, config_lib.Checkpoint(keep=3))
  for step in (1, 2):
    keeper.save(step, state_of(step), run_of(step))
  keeper.close()
  return folder


def restore(folder):
  keeper = checkpoint.Checkpointer(folder, config_lib.Checkpoint(keep=3))
  try:
    return keeper.restore(state_of(0))
  finally:
    keeper.close()


def largest(folder):
  return max((file for file in folder.rglob('*') if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file, place, bits=255):
  data = bytearray(file.read_bytes())
  data[int(place * (len(data) - 1))] ^= bits
  file.write_bytes(data)


def edit(folder, change):
  file = folder / 'run' / 'metadata'
  values = json.loads(file.read_text())
  change(values)
  file.write_text(json.dumps(values))


def cut(file, share):
  data = file.read_bytes()
  file.write_bytes(data[:int(share * len(data))])


DAMAGE = {
    'arrays are gone': lambda folder: shutil.rmtree(folder / 'state'),
    'run state is gone': lambda folder: shutil.rmtree(folder / 'run'),
    'the file of the run state is gone': lambda folder: (folder / 'run' / 'metadata').unlink(),
    'run state is empty': lambda folder: (folder / 'run' / 'metadata').write_text(''),
    'run state is cut': lambda folder: cut(folder / 'run' / 'metadata', 0.5),
    'run state is another type': lambda folder: (folder / 'run' / 'metadata').write_text('[1, 2]'),
    'no iterator': lambda folder: edit(folder, lambda run: run.pop('iterator')),
    'another iterator': lambda folder: edit(folder, lambda run: run['iterator'].update(next_batch=7)),
    'another config': lambda folder: edit(folder, lambda run: run['config'].update(name='y')),
    'another tokenizer': lambda folder: edit(folder, lambda run: run.update(tokenizer='AAAA')),
    'another checksum': lambda folder: edit(folder, lambda run: run['checksums'].update({'params/w': 1})),
    'largest file cut in half': lambda folder: cut(largest(folder / 'state'), 0.5),
    'largest file empty': lambda folder: cut(largest(folder / 'state'), 0),
    'largest file gone': lambda folder: largest(folder / 'state').unlink(),
    'first byte': lambda folder: flip(largest(folder / 'state'), 0),
    'a byte of a third': lambda folder: flip(largest(folder / 'state'), 0.3),
    'one bit in the middle': lambda folder: flip(largest(folder / 'state'), 0.5, 1),
    'array metadata empty': lambda folder: (folder / 'state' / '_METADATA').write_text(''),
    'manifest gone': lambda folder: [file.unlink() for file in folder.rglob('manifest.ocdbt')],
    'all files empty': lambda folder: [cut(file, 0) for file in folder.rglob('*') if file.is_file()],
    'arrays of an older step': lambda folder: (shutil.rmtree(folder / 'state'),
                                               shutil.copytree(folder.parent / '1' / 'state', folder / 'state')),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damage_is_noticed_and_the_checkpoint_before_is_used(saved, tmp_path, capsys, name):
  folder = tmp_path / 'run'
  shutil.copytree(saved, folder)
  DAMAGE[name](folder / 'checkpoints' / '2')
  state, run = restore(folder)
  assert int(state.step) == 1 and run == run_of(1)
  np.testing.assert_array_equal(state.params['w'], VALUES + 1)
  said = [line for line in capsys.readouterr().err.splitlines() if 'is damaged' in line]
  assert len(said) == 1 and 'checkpoint 2' in said[0] and str(folder / 'damaged') in said[0]
  assert [place.name.split('-')[0] for place in (folder / 'damaged').iterdir()] == ['2']


def test_what_is_restored_is_what_was_saved_whichever_byte_flips(saved, tmp_path):
  """Some bytes matter to nobody; then the newest is used, and is right."""
  steps = []
  for number in range(12):
    folder = tmp_path / f'run{number}'
    shutil.copytree(saved, folder)
    flip(largest(folder / 'checkpoints' / '2' / 'state'), number / 11, 1 << number % 8)
    state, run = restore(folder)
    steps.append(int(state.step))
    wanted = state_of(steps[-1])
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    assert run == run_of(steps[-1])
  assert steps.count(1) > 8


def test_a_checkpoint_that_is_whole_is_used_as_it_is(saved, tmp_path, capsys):
  folder = tmp_path / 'run'
  shutil.copytree(saved, folder)
  state, run = restore(folder)
  assert int(state.step) == 2 and run == run_of(2) and not (folder / 'damaged').exists()
  said = capsys.readouterr()
  assert not said.out and 'damaged' not in said.err


def test_one_that_is_gone_is_said(saved, tmp_path, capsys):
  folder = tmp_path / 'run'
  shutil.copytree(saved, folder)
  shutil.rmtree(folder / 'checkpoints' / '2')
  assert int(restore(folder)[0].step) == 1
  assert 'checkpoint 2 was saved, but the newest that is there is 1' in capsys.readouterr().out


@pytest.mark.parametrize('destroy', [
    lambda folder: shutil.rmtree(folder / 'checkpoints'),
    lambda folder: [cut(file, 0) for file in (folder / 'checkpoints').rglob('*') if file.is_file()],
])
def test_a_run_with_history_is_not_started_anew(saved, tmp_path, destroy):
  folder = tmp_path / 'run'
  shutil.copytree(saved, folder)
  destroy(folder)
  for _ in range(2):   # the second time, too
    with pytest.raises(UserError, match='saved at step 2.*no checkpoint of it that is whole.*another --workdir'):
      restore(folder)
  assert pathlib.Path(folder / checkpoint.HISTORY).exists()


def test_what_says_nothing_of_the_checkpoints_moves_none(saved, tmp_path, monkeypatch):
  """A network that is down, or a program whose state has other arrays: each made all of them 'damaged'."""
  folder = tmp_path / 'run'
  shutil.copytree(saved, folder)
  monkeypatch.setattr(storage, 'WAITS', (0.01,))
  unavailable = ValueError('UNAVAILABLE: Error reading "gs://bucket/x"')
  for error in (OSError(errno.ETIMEDOUT, 'timed out'), PermissionError(errno.EACCES, 'denied'), unavailable):
    with monkeypatch.context() as patch, pytest.raises(OSError, match='run'):
      patch.setattr(ocp.Checkpointer, 'restore', lambda *_, error=error, **__: (_ for _ in ()).throw(error))
      restore(folder)
  keeper = checkpoint.Checkpointer(folder, config_lib.Checkpoint())
  other = dataclasses.replace(state_of(0), params={'another': jnp.zeros(3)})
  with pytest.raises(UserError, match='no checkpoint of it that is whole .2: .*, 1: '):
    keeper.restore(other)
  keeper.close()
  assert int(restore(folder)[0].step) == 2 and not (folder / 'damaged').exists()


def test_a_new_workdir_has_nothing_to_restore(tmp_path):
  assert restore(tmp_path / 'run') is None


def test_numbers_that_are_not_finite_are_not_restored(tmp_path, capsys):
  keeper = checkpoint.Checkpointer(tmp_path, config_lib.Checkpoint())
  keeper.save(1, state_of(1), run_of(1))
  keeper.save(2, TrainState(**{**vars(state_of(2)), 'ema': {'w': jnp.asarray(VALUES), 'b': jnp.array([0, jnp.nan, 1])}}),
              run_of(2))
  keeper.close()
  assert int(restore(tmp_path)[0].step) == 1 and 'not finite, such as ema/b' in capsys.readouterr().err


def test_the_checksum_sees_every_change():
  before = checksum.checksums({'x': jnp.asarray(VALUES)})['x']
  rng = np.random.default_rng(1)
  for _ in range(100):
    changed = VALUES.copy()
    row, column = rng.integers(300), rng.integers(40)
    changed[row, column] = np.nextafter(changed[row, column], np.float32(9))
    assert checksum.checksums({'x': jnp.asarray(changed)})['x'] != before
  swapped = VALUES[[1, 0, *range(2, 300)]]
  assert checksum.checksums({'x': jnp.asarray(swapped)})['x'] != before
  assert checksum.checksums({'x': jnp.asarray(VALUES.T)})['x'] != before
