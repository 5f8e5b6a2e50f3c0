"""Prepared folders are whole or not there; records and manifests are read back as they were, or refused in one line."""
import concurrent.futures
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightclip_jax.data import datasets, manifest, records, writer
from lightclip_jax.data.datasets import shapes
from lightclip_jax.data.sources import array_record
from lightclip_jax.errors import UserError

_TEXT = st.text(max_size=20)


@given(st.builds(records.Record, _TEXT, st.binary(max_size=50), st.lists(_TEXT).map(tuple), _TEXT, _TEXT, _TEXT, _TEXT))
def test_record_round_trip(record):
  assert records.decode(records.encode(record)) == record


@given(st.binary(max_size=60))
def test_foreign_bytes_are_no_record(data):
  try:
    assert isinstance(records.decode(data), records.Record)
  except UserError as error:
    assert '\n' not in str(error)


def _many(count):
  return [records.Record(f'k{i}', bytes([i % 256]), (f'caption {i}',)) for i in range(count)]


def test_shards_are_read_in_order(tmp_path, monkeypatch):
  monkeypatch.setattr(writer, 'RECORDS_PER_SHARD', 7)
  made = writer.write(tmp_path, {'train': _many(30), 'empty': []}, writer.About('t', 8, 64))
  assert len(made.splits['train'].shards) == 5 and made == manifest.load(tmp_path)
  source = array_record.ArrayRecordSource(tmp_path, 'train')
  assert [source[i] for i in range(len(source))] == _many(30)
  assert len(array_record.ArrayRecordSource(tmp_path, 'empty')) == 0


def test_a_full_disk_is_an_os_error(tmp_path):
  (tmp_path / 'train-00000.array_record').symlink_to('/dev/full')
  with pytest.raises(OSError, match='^No space left on device$'):
    writer.write(tmp_path, {'train': _many(3)}, writer.About('t', 8, 64))


def test_missing_shard_split_and_count_are_named(tmp_path):
  made = writer.write(tmp_path, {'train': _many(3)}, writer.About('t', 8, 64))
  with pytest.raises(UserError, match="no split 'test'; it has: train"):
    array_record.ArrayRecordSource(tmp_path, 'test')
  text = (tmp_path / 'manifest.json').read_text()
  (tmp_path / 'manifest.json').write_text(text.replace('"count": 3', '"count": 4'))
  with pytest.raises(UserError, match='manifest says 4'):
    array_record.ArrayRecordSource(tmp_path, 'train')
  (tmp_path / made.splits['train'].shards[0]).unlink()
  with pytest.raises(UserError, match='train-00000.array_record.* is missing'):
    array_record.ArrayRecordSource(tmp_path, 'train')


@pytest.mark.parametrize(('text', 'said'), [
    ('', 'is not a manifest'), ('[]', 'is not a manifest'), ('{"format": 1}', 'is not a manifest'),
    ('{"format": 99}', 'has format 99'),
    ('{"format": 1, "splits": {}, "concepts": [], "groups": [], "teacher": {"name": "t", "dim": "512", "sha256": ""}}',
     "is not a manifest .*dim is '512'")])
def test_bad_manifests(tmp_path, text, said):
  (tmp_path / 'manifest.json').write_text(text)
  with pytest.raises(UserError, match=said) as error:
    manifest.load(tmp_path)
  assert '\n' not in str(error.value)


def test_missing_empty_and_foreign_folders(tmp_path):
  with pytest.raises(UserError, match='is not a folder'):
    manifest.load(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='is empty'):
    manifest.load(tmp_path)
  (tmp_path / 'photo.jpg').touch()
  with pytest.raises(UserError, match='has no manifest.json'):
    manifest.load(tmp_path)
  with pytest.raises(UserError, match='is not a prepared data set'):
    shapes.prepare(tmp_path)
  assert os.listdir(tmp_path) == ['photo.jpg']


def test_an_error_leaves_nothing(tmp_path):
  with pytest.raises(ZeroDivisionError), writer.new_folder(tmp_path / 'out') as folder:
    (folder / 'half').touch()
    raise ZeroDivisionError
  assert os.listdir(tmp_path) == []


def test_killed_preparation_is_cleaned_up_by_the_next(tmp_path):
  program = textwrap.dedent(f'''
    import pathlib, time
    from lightclip_jax.data import writer
    with writer.new_folder(pathlib.Path({str(tmp_path / "out")!r})) as folder:
      (folder / 'rubbish').mkdir()
      print('ready', flush=True)
      time.sleep(60)
  ''')
  child = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True)
  assert child.stdout.readline() == 'ready\n'
  child.send_signal(signal.SIGKILL)
  child.communicate()
  assert not (tmp_path / 'out').exists()
  shapes.prepare(tmp_path / 'out', size=16)
  assert os.listdir(tmp_path) == ['out'] and 'rubbish' not in os.listdir(tmp_path / 'out')
  manifest.load(tmp_path / 'out')


def _prepare_slowly(out, queue):
  with writer.new_folder(out) as folder:
    queue.put(folder is not None)
    if folder is not None:
      time.sleep(0.3)
      writer.write(folder, {'train': _many(3)}, writer.About('t', 8, 64))


def test_of_several_processes_one_writes(tmp_path):
  context = multiprocessing.get_context('spawn')
  queue = context.Queue()
  processes = [context.Process(target=_prepare_slowly, args=(tmp_path / 'out', queue)) for _ in range(3)]
  for process in processes:
    process.start()
  wrote = [queue.get(timeout=300) for _ in processes]
  for process in processes:
    process.join()
  assert sorted(wrote) == [False, False, True] and [p.exitcode for p in processes] == [0, 0, 0]
  assert os.listdir(tmp_path) == ['out']
  assert manifest.load(tmp_path / 'out').splits['train'].count == 3


def test_they_never_meet_while_the_folder_is_made_renamed_and_deleted(tmp_path):
  def prepare(number):
    with writer.new_folder(tmp_path / f'out-{number // 8}') as folder:
      if folder is not None:
        (folder / 'manifest.json').touch()
    return folder is not None

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    wrote = list(pool.map(prepare, range(8 * 200)))
  assert [sum(wrote[start:start + 8]) for start in range(0, len(wrote), 8)] == 200 * [1]
  assert sorted(os.listdir(tmp_path)) == sorted(f'out-{number}' for number in range(200))


def test_resolve_prepares_once_in_the_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LIGHTCLIP_DATA', str(tmp_path))
  folder = datasets.resolve('shapes')
  assert folder == tmp_path / 'shapes-1' == datasets.folder_of('shapes')
  before = (folder / 'manifest.json').stat().st_mtime_ns
  assert datasets.resolve('shapes') == folder and (folder / 'manifest.json').stat().st_mtime_ns == before
  assert datasets.resolve(str(folder)) == folder
  with pytest.raises(UserError, match=r"'shape' is neither a folder nor a built-in name \(emoji, icons, shapes\)"):
    datasets.resolve('shape')
  monkeypatch.delenv('LIGHTCLIP_DATA')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'c'))
  assert datasets.cache() == tmp_path / 'c/lightclip_jax'


def test_a_data_set_needs_training_captions(tmp_path):
  with pytest.raises(UserError, match='needs a split train'):
    writer.write(tmp_path, {'test': _many(2)}, writer.About('t', 8, 64))
  with pytest.raises(UserError, match='needs captions'):
    writer.write(tmp_path, {'train': []}, writer.About('t', 8, 64))
  assert 'manifest.json' not in os.listdir(tmp_path)


def test_manifest_is_plain_json(shapes_folder):
  values = json.loads((shapes_folder / 'manifest.json').read_text())
  assert values['name'] == 'shapes'
  assert values['splits']['train']['count'] == manifest.load(shapes_folder).split('train').count
