"""Storage that fails for a moment, or for good, while a checkpoint or a log is written."""
import errno
import json
import os

import jax.numpy as jnp
import pytest

from lightclip_jax import cli, storage
from lightclip_jax import config as config_lib
from lightclip_jax.training import checkpoint, metrics
from lightclip_jax.training.state import TrainState


@pytest.fixture
def failures(monkeypatch):
  """[n]: the next n times that Orbax brings a checkpoint into its place, or anything replaces a file, storage fails."""
  left, real = [0], {name: getattr(os, name) for name in ('rename', 'replace')}

  def failing(name, source, target):
    if left[0] and 'tmp' in os.fspath(source):
      left[0] -= 1
      raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(source))
    return real[name](source, target)

  for name in real:
    monkeypatch.setattr(os, name, lambda source, target, name=name: failing(name, source, target))
  monkeypatch.setattr(storage, 'PAUSES', (0, 0))
  return left


def state_of(step):
  return TrainState(jnp.int32(step), {'w': jnp.full((3,), float(step))}, {}, {'m': jnp.zeros(2)}, None)


def save(keeper, step, **options):
  keeper.save(step, state_of(step), checkpoint.RunState({'next_batch': step}, {}, {}, {}, ''), **options)


def newest(folder):
  keeper = checkpoint.Checkpointer(folder, config_lib.Checkpoint())
  found = keeper.restore(state_of(0))
  keeper.close()
  return found and (int(found[0].step), found[1].iterator['next_batch'])


def test_the_last_save_is_tried_again(tmp_path, failures, capsys):
  keeper = checkpoint.Checkpointer(tmp_path, config_lib.Checkpoint())
  failures[0] = 2
  save(keeper, 7, wait=True)
  keeper.close()
  assert capsys.readouterr().err.count('checkpoint 7: [Errno 5] Input/output error') == 2 and newest(tmp_path) == (7, 7)


def test_training_goes_on_after_a_save_that_failed(tmp_path, failures, capsys):
  keeper = checkpoint.Checkpointer(tmp_path, config_lib.Checkpoint())
  save(keeper, 1, wait=True)
  failures[0] = 1
  save(keeper, 2)   # in the background
  save(keeper, 3)
  keeper.close()
  assert 'checkpoint 2 could not be written: [Errno 5]' in capsys.readouterr().out
  assert newest(tmp_path) == (3, 3) and not (tmp_path / 'checkpoints' / '2').exists()


def test_storage_that_stays_broken_ends_with_one_line(tmp_path, failures, capsys):
  keeper = checkpoint.Checkpointer(tmp_path, config_lib.Checkpoint())
  save(keeper, 1, wait=True)
  failures[0] = 99
  assert cli.run(lambda: save(keeper, 2, wait=True)) == 1
  failures[0] = 0
  keeper.close()
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith('error: Input/output error: ') and str(tmp_path / 'checkpoints') in last and newest(tmp_path) == (1, 1)


@pytest.mark.parametrize('number, passes', [
  (errno.EIO, True), (errno.ETIMEDOUT, True), (errno.ENOSPC, False), (errno.EROFS, False)])
def test_only_what_may_pass_is_waited_for(monkeypatch, number, passes):
  monkeypatch.setattr(storage, 'PAUSES', (0, 0, 0))
  calls = []

  def attempt():
    calls.append(1)
    raise OSError(number, 'x')

  with pytest.raises(OSError, match='x'):
    storage.persistently(attempt, 'a file')
  assert len(calls) == (4 if passes else 1)


def test_files_and_logs_are_written_again(tmp_path, failures, monkeypatch):
  failures[0] = 2
  storage.write_text(tmp_path / 'a.json', '1')
  assert (tmp_path / 'a.json').read_text() == '1'
  writer = metrics.MetricWriter(tmp_path, 0)
  real, broken = writer._file, [2]

  class Broken:
    def write(self, line):
      if broken[0]:
        broken[0] -= 1
        raise OSError(errno.EIO, 'x')
      return real.write(line)

    close = real.close

  monkeypatch.setattr(writer, '_file', Broken())
  writer.write(1, {'train/loss': 2.0})
  writer.close()
  assert json.loads((tmp_path / 'metrics.jsonl').read_text()) == {'step': 1, 'train/loss': 2.0}
