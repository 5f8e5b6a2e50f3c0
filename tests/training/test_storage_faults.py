"""Storage that fails for a while, or for good: the last good save stays, and the run says what it does."""
import contextlib
import errno
import io
import json
import pathlib
import re
import struct
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto import event_pb2

from lightclip_jax import cli, storage
from lightclip_jax import config as config_lib
from lightclip_jax.training import checkpoint, metrics
from lightclip_jax.training.state import TrainState

EIO = OSError(errno.EIO, 'Input/output error')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(storage, 'WAITS', (0.01, 0.02))


def failing(times, then=lambda *_: 'done', error=EIO):
  """A function that fails so often; its list `calls` grows."""
  def call(*args, **kwargs):
    call.calls.append(args)
    if len(call.calls) <= times:
      raise type(error)(*error.args)
    return then(*args, **kwargs)
  call.calls = []
  return call


def failing_in_background(times):
  """The JSON half of a checkpoint, which cannot be written so often."""
  call, save = failing(times), ocp.JsonCheckpointHandler._save_fn

  async def save_fn(self, *args):
    call()
    await save(self, *args)
  return save_fn


def state_of(step):
  return TrainState(jnp.int32(step), {'w': jnp.arange(8.0) + step}, {}, {'m': jnp.ones(3)}, None)


def run_of(step):
  return checkpoint.RunState({'next_batch': step}, {}, {}, {}, '')


@contextlib.contextmanager
def keeper_of(folder, **options):
  keeper = checkpoint.Checkpointer(folder, config_lib.Checkpoint(**options))
  yield keeper
  keeper.close()


def restored(folder):
  with keeper_of(folder) as keeper:
    state, run = keeper.restore(state_of(0))
  jax.tree.map(np.testing.assert_array_equal, state, state_of(int(state.step)))
  return run.iterator['next_batch']


@pytest.mark.parametrize('error', [EIO, TimeoutError('late'), ConnectionResetError('gone')])
def test_what_passes_is_tried_again_and_told(capsys, error):
  assert storage.patiently(twice := failing(2, error=error)) == 'done' and len(twice.calls) == 3
  said = capsys.readouterr().err.splitlines()
  assert [line.rpartition('; ')[2] for line in said] == ['tried again in 0.01 s', 'tried again in 0.02 s']
  with pytest.raises(type(error)):
    storage.patiently(always := failing(9, error=error))
  assert len(always.calls) == 3


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'full'), OSError(errno.EROFS, 'read-only'), FileNotFoundError('x')])
def test_what_does_not_pass_is_not_tried_again(error):
  with pytest.raises(type(error)):
    storage.patiently(once := failing(1, error=error))
  assert len(once.calls) == 1


def test_a_text_is_written_at_the_third_attempt(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, '_write_text', failing(2, storage._write_text))
  storage.write_text(tmp_path / 'x', 'text')
  assert (tmp_path / 'x').read_text() == 'text'


def until(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_training_goes_on_when_a_save_fails_and_a_later_step_is_saved(tmp_path, monkeypatch, capsys):
  """In the background, as steps go on; then at once, when the save is begun."""
  with keeper_of(tmp_path, every_minutes=0, keep=1) as keeper:
    keeper.save(1, state_of(1), run_of(1), wait=True)
    assert not keeper.late
    with monkeypatch.context() as patch:
      patch.setattr(ocp.JsonCheckpointHandler, '_save_fn', failing_in_background(1))
      keeper.save(2, state_of(2), run_of(2))
      until(lambda: keeper.late)
    keeper.save(3, state_of(3), run_of(3))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith('step 3: checkpoint 2 is not saved ') and 'last good one is 1;' in said and 'in 1 s' in said
    assert 'Input/output error' in said and str(tmp_path) in said
    with monkeypatch.context() as patch:
      patch.setattr(keeper._manager, 'save', failing(1))
      keeper.save(4, state_of(4), run_of(4))
    assert 'checkpoint 4 is not saved' in (said := capsys.readouterr().err) and 'in 2 s' in said
    assert not keeper.late, 'not before those 2 seconds'
    assert (tmp_path / 'checkpoints' / '1').is_dir()
    until(lambda: keeper.late)
    keeper.save(5, state_of(5), run_of(5), wait=True)
    assert not keeper.late
  assert restored(tmp_path) == 5


def test_the_last_save_is_patient_and_then_one_line(tmp_path, monkeypatch, capsys):
  with keeper_of(tmp_path) as keeper:
    keeper.save(1, state_of(1), run_of(1), wait=True)
    monkeypatch.setattr(storage, 'WAITS', (0.5,) * 4)   # the other writes of a save that failed still go on for a moment
    monkeypatch.setattr(ocp.JsonCheckpointHandler, '_save_fn', failing_in_background(2))
    keeper.save(2, state_of(2), run_of(2), wait=True)
    assert capsys.readouterr().err.count('tried again in') >= 2
    monkeypatch.setattr(ocp.JsonCheckpointHandler, '_save_fn', failing_in_background(9))
    assert cli.run(lambda: keeper.save(3, state_of(3), run_of(3), wait=True)) == 1
    said, = re.findall('^error: .*', capsys.readouterr().err, re.MULTILINE)
    assert re.fullmatch(f'error: .*: {tmp_path}/checkpoints.*; when it answers again, start the same command again', said)
  monkeypatch.undo()
  assert restored(tmp_path) == 2


def test_tensorstore_names_the_system_s_error(tmp_path):
  """Its own words, of a write that got EIO, ETIMEDOUT and ENOSPC."""
  text = 'UNKNOWN: Error writing local file "x": Failed to write 211 bytes to file 3: no [os_error_code=\'{}\']'
  with keeper_of(tmp_path) as keeper:
    for code in (errno.EIO, errno.ETIMEDOUT, errno.ENOSPC):
      with pytest.raises(OSError, match=str(tmp_path)) as raised, keeper._failures_by_name():
        raise ValueError(text.format(code))
      assert raised.value.errno == code and storage.passes(raised.value) == (code != errno.ENOSPC)
    with pytest.raises(OSError) as raised, keeper._failures_by_name():
      raise ValueError('UNAVAILABLE: Error writing "gs://b/x": CURL error')
    assert storage.passes(raised.value)


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_damaged(tmp_path, monkeypatch):
  with keeper_of(tmp_path) as keeper:
    for step in (1, 2):
      keeper.save(step, state_of(step), run_of(step))
  with keeper_of(tmp_path) as keeper:
    read = ocp.Checkpointer.restore
    monkeypatch.setattr(ocp.Checkpointer, 'restore', lambda *args: twice(*args))
    twice = failing(2, read)
    state, _ = keeper.restore(state_of(0))
  assert int(state.step) == 2 and len(twice.calls) == 3 and not (tmp_path / 'damaged').exists()


class Failing(io.FileIO):
  """A file on storage that fails while `storage_fails`."""
  storage_fails = False

  def write(self, data):
    if self.storage_fails:
      raise OSError(errno.EIO, 'Input/output error')
    return super().write(data)


def test_lines_wait_in_memory_while_the_log_cannot_be_written(tmp_path, monkeypatch, capsys):
  writer, path = metrics.MetricWriter(tmp_path, 0), tmp_path / 'metrics.jsonl'
  steps = lambda: [json.loads(line)['step'] for line in path.read_text().splitlines()]  # noqa: E731
  for log in (writer._file, writer._board):
    log._file.close()
    log._file = io.BufferedWriter(Failing(log._path, 'a'), metrics._KEPT)
  writer.write(1, {'train/loss': 1.0})
  monkeypatch.setattr(Failing, 'storage_fails', True)
  for step in range(2, 200):   # more than the usual 8 KB
    writer.write(step, {'train/loss': 1.0, 'train/a_metric_with_a_longer_name': 0.123456789})
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 2 and all('Input/output error' in line and 'training goes on' in line for line in said)
  assert str(path) in said[0] and steps() == [1]
  monkeypatch.setattr(Failing, 'storage_fails', False)
  writer.write(200, {'train/loss': 1.0})
  assert steps() == list(range(1, 201))
  monkeypatch.setattr(Failing, 'storage_fails', True)
  writer.write(201, {'train/loss': 1.0})
  capsys.readouterr()
  assert cli.run(writer.close) == 1
  assert f'error: Input/output error: {path}; when it answers' in capsys.readouterr().err
  monkeypatch.setattr(Failing, 'storage_fails', False)
  writer.close()
  assert steps()[-1] == 201


def test_the_logs_reach_a_bucket_at_the_third_attempt(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(storage, 'in_bucket', lambda path: path == tmp_path)   # a folder that nothing is appended to
    writer = metrics.MetricWriter(tmp_path, 0)
    writer.write(1, {'train/loss': 1.0})
    assert not (tmp_path / 'metrics.jsonl').exists()
    patch.setattr(pathlib.Path, 'write_bytes', twice := failing(2, pathlib.Path.write_bytes))
    writer.flush()
    assert len(twice.calls) == 4, 'two files, one of them at the third attempt'
    writer.close()
  assert json.loads((tmp_path / 'metrics.jsonl').read_text()) == {'step': 1, 'train/loss': 1.0}


def test_training_goes_on_while_the_bucket_takes_no_log(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(storage, 'in_bucket', lambda path: path == tmp_path)
  monkeypatch.setattr(metrics, 'COPY_SECONDS', -1)
  writer = metrics.MetricWriter(tmp_path, 0)
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'write_bytes', always := failing(99, error=TimeoutError('late')))
    for step in (1, 2):
      writer.write(step, {'train/loss': 1.0})
    assert len(always.calls) == 2, 'not patiently: a step waits'
    writer.flush()
    said = [line for line in capsys.readouterr().err.splitlines() if 'tried again in' not in line]
    assert len(said) == 1 and 'late' in said[0] and str(tmp_path) in said[0] and str(writer._local) in said[0]
  writer.write(3, {'train/loss': 1.0})
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'write_bytes', failing(1, error=OSError(errno.EACCES, 'not allowed')))
    with pytest.raises(PermissionError):   # which does not pass
      writer.write(4, {'train/loss': 1.0})
    patch.setattr(pathlib.Path, 'write_bytes', failing(99, error=TimeoutError('late')))
    assert cli.run(writer.close) == 1 and (writer._local / 'metrics.jsonl').exists()
  assert [json.loads(line)['step'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == [1, 2, 3]


class HttpError(Exception):
  """As gcsfs's, which is no OSError."""


@pytest.fixture
def gcsfs(monkeypatch):
  """As much of it as is asked; it need not be installed."""
  retry = types.SimpleNamespace(is_retriable=lambda error: isinstance(error, HttpError) and error.args == ('busy, 503',))
  monkeypatch.setitem(sys.modules, 'gcsfs.retry', retry)


@pytest.mark.usefixtures('gcsfs')
def test_a_bucket_that_is_busy_is_asked_again(capsys):
  assert storage.patiently(twice := failing(2, error=HttpError('busy, 503'))) == 'done' and len(twice.calls) == 3
  assert 'the bucket does not answer (busy, 503); tried again in' in capsys.readouterr().err
  with pytest.raises(HttpError, match='400'):
    storage.patiently(once := failing(1, error=HttpError('wrong, 400')))
  assert len(once.calls) == 1
  assert cli.run(failing(1, error=HttpError('busy, 503'))) == 1
  said = capsys.readouterr().err
  assert said.startswith('error: the bucket does not answer (busy, 503): that of the workdir or') and said.count('\n') == 1


@pytest.mark.usefixtures('gcsfs')
def test_a_save_into_a_bucket_that_is_busy_is_tried_again(tmp_path, monkeypatch, capsys):
  with keeper_of(tmp_path) as keeper:
    monkeypatch.setattr(keeper._manager, 'save', failing(1, keeper._manager.save, HttpError('busy, 503')))
    keeper.save(1, state_of(1), run_of(1))
    assert 'checkpoint 1 is not saved' in capsys.readouterr().err
    keeper.save(2, state_of(2), run_of(2), wait=True)
  assert restored(tmp_path) == 2


def test_tensorboard_s_records_are_whole(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 6)
  writer.write(7, {'train/loss': 1.5, 'eval/x': 2.0})
  writer.close()
  assert crc32c(b'123456789') == 0xe3069283
  path, = (tmp_path / 'tensorboard').iterdir()
  start, purge, event = tf_events(path)
  assert start.file_version == 'brain.Event:2' and purge.step == 7 and purge.session_log.status == 1
  assert event.step == 7 and {v.tag: v.simple_value for v in event.summary.value} == {'train/loss': 1.5, 'eval/x': 2.0}


def crc32c(data):
  """Bit by bit, as RFC 3720 defines it."""
  value = 0xffffffff
  for byte in data:
    value ^= byte
    for _ in range(8):
      value = value >> 1 ^ (0x82f63b78 if value & 1 else 0)
  return value ^ 0xffffffff


def tf_events(path):
  """By the format's description: uint64 length, its masked CRC-32C, content, its masked CRC-32C."""
  data = path.read_bytes()
  while data:
    length, = struct.unpack('<Q', data[:8])
    for part, crc in ((data[:8], data[8:12]), (data[12:12 + length], data[12 + length:16 + length])):
      plain = crc32c(part)
      assert struct.unpack('<I', crc)[0] == ((plain >> 15 | plain << 17) + 0xa282ead8) & 0xffffffff
    yield event_pb2.Event.FromString(data[12:12 + length])
    data = data[16 + length:]
