"""The order of examples: what it depends on, what it must not depend on, and how it continues."""
import collections
import errno
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time
import types

import grain
import numpy as np
import pytest

import lightclip_jax
from lightclip_jax import config
from lightclip_jax.data import faults, manifest, pipeline, processes, sources
from lightclip_jax.data.datasets import shapes
from lightclip_jax.data.sources import mixture
from lightclip_jax.errors import UserError

OPTIONS = config.replace(config.Data(), workers=0, max_masked=4, color_jitter=0.2, flip=0.5, mosaic=0.3)


def _batches(folder, *, workers=0, batch_size=16, seed=1, **more):
  options = config.replace(OPTIONS, workers=workers)
  return pipeline.train_batches(folder, options, image_size=16, context=20, batch_size=batch_size, seed=seed, **more)


def _take(batches, count):
  out = list(itertools.islice(batches, count))
  batches.close()
  return out


def _assert_equal(got, expected):
  assert len(got) == len(expected)
  for a, b in zip(got, expected, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_shapes_dtypes_and_meaning(shapes_folder):
  batch = _take(_batches(shapes_folder), 1)[0]
  expected = {
      'image': ((16, 16, 16, 3), np.uint8), 'tokens': ((16, 20), np.int32), 'word_mask': ((16, 20), np.bool_),
      'masked_tokens': ((16, 20), np.int32), 'masked_positions': ((16, 4), np.int32),
      'masked_labels': ((16, 4), np.int32), 'masked_weights': ((16, 4), np.float32), 'caption_id': ((16,), np.int32),
      'caption_number': ((16,), np.int32),
      'example_id': ((16,), np.int64)}
  assert {name: (v.shape, v.dtype.type) for name, v in batch.items()} == expected
  tokenizer = pipeline.load_tokenizer(shapes_folder)
  records = pipeline.evaluation_records(shapes_folder, 'train')
  for row, record in zip(batch['tokens'], batch['example_id'], strict=True):
    assert set(tokenizer.decode(row).split(' and ')) & set(records[record].captions)   # a part of them are mosaics
  np.testing.assert_array_equal(batch['word_mask'], tokenizer.word_mask(batch['tokens']))
  picked = np.take_along_axis(batch['tokens'], batch['masked_positions'], 1)
  np.testing.assert_array_equal(batch['masked_labels'], picked * (batch['masked_weights'] > 0))
  same = (batch['tokens'][:, None] == batch['tokens'][None]).all(-1)
  np.testing.assert_array_equal(batch['caption_id'][:, None] == batch['caption_id'][None], same)


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_do_not_matter(shapes_folder, workers):
  _assert_equal(_take(_batches(shapes_folder, workers=workers), 6), _take(_batches(shapes_folder), 6))


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_do_not_matter(shapes_folder, hosts):
  parts = [_take(_batches(shapes_folder, process_index=h, process_count=hosts), 20) for h in range(hosts)]
  joined = [{name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)]
  _assert_equal(joined, _take(_batches(shapes_folder), 20))


def test_every_epoch_covers_every_record_once_in_another_order(shapes_folder):
  count = manifest.load(shapes_folder).split('train').count
  assert count % 16 == 0 and count % 7
  ids = np.concatenate([b['example_id'] for b in _take(_batches(shapes_folder, batch_size=7), 3 * count // 7 + 1)])
  epochs = [ids[i * count:(i + 1) * count] for i in range(3)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
  assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
  assert np.abs(np.diff(epochs[0])).mean() > count / 5                      # a shuffle, not a rotation


def test_an_example_changes_with_the_epoch(shapes_folder):
  count = manifest.load(shapes_folder).split('train').count
  first, second = _take(_batches(shapes_folder, batch_size=count), 2)
  a, b = np.argsort(first['example_id']), np.argsort(second['example_id'])
  assert (first['image'][a] != second['image'][b]).any((1, 2, 3)).mean() > 0.9
  assert (first['caption_id'][a] != second['caption_id'][b]).mean() > 0.5


def test_seeds_differ(shapes_folder):
  one, two = (_take(_batches(shapes_folder, seed=seed), 1)[0]['example_id'] for seed in (1, 2))
  assert (one != two).any()


@pytest.mark.parametrize('stop', [0, 1, 5, 15, 16, 31])
def test_resume_at_any_batch(shapes_folder, stop):
  whole = _take(_batches(shapes_folder), stop + 3)
  first = _batches(shapes_folder)
  for _ in range(stop):
    next(first)
  state = json.loads(json.dumps(first.state()))
  first.close()
  second = _batches(shapes_folder)
  second.restore(state)
  assert second.state() == state
  _assert_equal(_take(second, 3), whole[stop:])


def test_resume_on_other_workers_and_hosts_and_after_use(shapes_folder):
  whole = _take(_batches(shapes_folder), 9)
  one = _batches(shapes_folder, workers=2)
  for _ in range(5):
    next(one)
  state = one.state()
  one.close()
  halves = []
  for host in range(2):
    half = _batches(shapes_folder, process_index=host, process_count=2)
    next(half)                                              # already running: what it has prefetched must not appear
    half.restore(state)
    halves.append(_take(half, 4))
  joined = [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)]
  _assert_equal(joined, whole[5:])


def test_foreign_states_are_refused(shapes_folder, tmp_path):
  state = _batches(shapes_folder).state()
  shapes.prepare(tmp_path / 'other', size=16)
  with pytest.raises(UserError, match='was made with data'):
    _batches(tmp_path / 'other').restore(state)
  with pytest.raises(UserError, match='was made with seed 1, this run has 2'):
    _batches(shapes_folder, seed=2).restore(state)
  with pytest.raises(UserError, match='was made with batch_size 16'):
    _batches(shapes_folder, batch_size=8).restore(state)


def test_grain_checkpoint_equivalence(shapes_folder):
  dataset = pipeline.train_dataset(shapes_folder, OPTIONS, image_size=16, context=20, batch_size=8, seed=0)
  grain.experimental.assert_equal_output_after_checkpoint(_Limited(dataset, 12))


class _Limited(grain.IterDataset):
  """The first batches of an endless data set."""

  def __init__(self, parent, count):
    super().__init__(parent)
    self._count = count

  def __iter__(self):
    return _LimitedIterator(self._parent.__iter__(), self._count)


class _LimitedIterator(grain.DatasetIterator):

  def __init__(self, parent, count):
    super().__init__(parent)
    self._done, self._count = 0, count

  def __next__(self):
    if self._done == self._count:
      raise StopIteration
    self._done += 1
    return next(self._parent)

  def get_state(self):
    return {'parent': self._parent.get_state(), 'done': self._done}

  def set_state(self, state):
    self._parent.set_state(state['parent'])
    self._done = state['done']


def test_evaluation_covers_a_split_once_over_all_hosts(shapes_folder):
  records = pipeline.evaluation_records(shapes_folder, 'heldout_style')
  whole = list(pipeline.evaluation_batches(shapes_folder, 'heldout_style', image_size=16, batch_size=10))
  index = np.concatenate([b['index'] for b in whole])
  np.testing.assert_array_equal(index[:len(records)], np.arange(len(records)))
  assert (index[len(records):] == -1).all() and len(index) % 10 == 0
  hosts = [list(pipeline.evaluation_batches(shapes_folder, 'heldout_style', image_size=16, batch_size=10,
                                            process_index=h, process_count=2)) for h in range(2)]
  assert len(hosts[0]) == len(hosts[1]) == len(whole)
  _assert_equal([{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*hosts, strict=True)], whole)


def test_an_image_that_cannot_be_read_is_black_and_its_index_says_so():
  read = lambda i: None if i == 2 else np.full((8, 8, 3), 10 + i, np.uint8)  # noqa: E731
  for host in range(2):
    batches = list(pipeline.padded_batches(read, 5, image_size=4, batch_size=4, process_index=host, process_count=2))
    assert [b['index'].tolist() for b in batches] == [[[0, 1], [4, -1]], [[-4, 3], [-1, -1]]][host]
    assert [b['image'][:, 0, 0, 0].tolist() for b in batches] == [[[10, 11], [14, 0]], [[0, 13], [0, 0]]][host]


WHOLE = config.replace(config.Data(), max_masked=4, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))   # images as they are


def _examples(source, folder, mosaic, size=16, context=96):
  tokenizer = pipeline.load_tokenizer(folder)
  return pipeline._Example(source, tokenizer, config.replace(WHOLE, mosaic=mosaic), size, context, seed=3), tokenizer


def _quarters(picture):
  near = len(picture) // 2
  cells = [picture[top:top + near, left:left + near] for top in (0, len(picture) - near) for left in (0, len(picture) - near)]
  return [cell for cell in cells if not (cell == 255).all()]


@pytest.mark.parametrize('context', [14, 96])
def test_a_mosaic_is_whole_records_with_their_whole_captions(shapes_folder, context):
  source = sources.open_split(shapes_folder, 'train')
  alone, tokenizer = _examples(source, shapes_folder, 0.0, 8)
  captions_of = collections.defaultdict(set)   # equal pictures, equal captions or not
  for index in range(len(source)):
    captions_of[alone(index)['image'].tobytes()] |= set(source[index].captions)
  example, _ = _examples(source, shapes_folder, 1.0, 16, context)
  counts = collections.Counter()
  for index in range(80):
    found = example(index)
    captions = tokenizer.decode(found['tokens']).split(' and ')
    counts[len(captions)] += 1
    if len(captions) == 1:   # no other fits
      continue
    quarters = _quarters(found['image'])
    assert len(quarters) == len(captions)
    pictured = [captions_of[quarter.tobytes()] for quarter in quarters]
    assert any(all(caption in names for caption, names in zip(order, pictured, strict=True))
               for order in itertools.permutations(captions)), 'each caption has its picture'
    assert source[index].captions[found['caption_number']] in captions
    assert alone(index)['image'].tobytes() in {quarter.tobytes() for quarter in quarters}
  assert set(counts) == ({1, 2} if context == 14 else {2, 3, 4}), counts


def test_what_is_not_mixed_is_the_same_as_without_mosaics(shapes_folder):
  source = sources.open_split(shapes_folder, 'train')
  (example, tokenizer), (plain, _) = (_examples(source, shapes_folder, share) for share in (0.3, 0.0))
  mixed = [' and ' in tokenizer.decode(example(index)['tokens']) for index in range(400)]
  assert 0.2 < np.mean(mixed) < 0.4
  for index in np.flatnonzero(np.logical_not(mixed))[:50]:
    _assert_equal([example(int(index))], [plain(int(index))])


class Watched:
  """Of which only each `good`-th record can be used."""

  def __init__(self, source, good):
    self._source, self._good, self.fingerprint, self.asked = source, good, 'x', []

  def __len__(self):
    return len(self._source)

  def name(self, index):
    return str(index)

  def __getitem__(self, index):
    self.asked.append(index)
    if index % self._good:
      raise faults.BadRecord('truncated')
    return self._source[index]


@pytest.mark.parametrize('part', [0, 1])
def test_a_bad_record_is_replaced_from_its_part_of_a_mixture(shapes_folder, part):
  """From all parts, a part of few records, many of them bad, would be seen less often than its weight says."""
  parts = [Watched(sources.open_split(shapes_folder, 'train'), good=2) for _ in range(2)]
  example, _ = _examples(mixture.MixtureSource(parts), shapes_folder, 0.0)
  for index in range(1, 40, 2):
    place = int(example(part * len(parts[0]) + index)['example_id'])
    assert place // len(parts[0]) == part and place % len(parts[0]) % 2 == 0
  assert not parts[1 - part].asked


@pytest.mark.parametrize('part', [0, 1])
def test_a_mosaic_leaves_out_what_cannot_be_used_and_stays_in_its_part(shapes_folder, part):
  parts = [Watched(sources.open_split(shapes_folder, 'train'), good=3) for _ in range(2)]
  example, tokenizer = _examples(mixture.MixtureSource(parts), shapes_folder, 1.0)
  for index in range(0, 60, 3):
    found = example(part * len(parts[0]) + index)
    captions = tokenizer.decode(found['tokens']).split(' and ')
    assert len(captions) == 1 or len(_quarters(found['image'])) == len(captions)
    assert (found['faults'] == faults.blank()).all(), 'a record is counted when it is its turn'
  assert any(index % 3 for index in parts[part].asked) and not parts[1 - part].asked


def test_bad_arguments(shapes_folder, tmp_path):
  for mosaic, teacher in ((1.5, False), (-0.1, False), (0.5, True)):
    with pytest.raises(UserError, match=f'data.mosaic is {mosaic}; it must be 0 to 1, and 0 with a teacher'):
      pipeline.train_dataset(shapes_folder, config.replace(OPTIONS, mosaic=mosaic), image_size=16, context=20, batch_size=16,
                             seed=1, with_teacher=teacher)
  with pytest.raises(UserError, match='train.batch_size is 9; it must be a multiple of the 2 hosts'):
    _batches(shapes_folder, batch_size=9, process_count=2)
  with pytest.raises(UserError, match='evaluation.batch_size is 3'):
    next(pipeline.evaluation_batches(shapes_folder, 'train', image_size=8, batch_size=3, process_count=2))
  with pytest.raises(UserError, match='is empty'):
    _batches(tmp_path)


def test_worker_count(monkeypatch):
  monkeypatch.setattr(os, 'cpu_count', lambda: 2)
  assert [pipeline.worker_count(n) for n in (-1, 0, 3)] == [0, 0, 3]
  monkeypatch.setattr(os, 'cpu_count', lambda: 8)
  assert pipeline.worker_count(-1) == 7
  monkeypatch.setattr(os, 'cpu_count', lambda: 64)
  assert pipeline.worker_count(-1) == 16


def _environment():
  return {**os.environ, 'PYTHONPATH': str(pathlib.Path(lightclip_jax.__file__).parents[1])}


def _alive(pid):
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def test_a_worker_that_died_is_named_and_replaced(shapes_folder, capfd):
  batches, expected = _batches(shapes_folder, workers=1), _take(_batches(shapes_folder), 30)
  seen = [next(batches) for _ in range(2)]
  os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
  seen += _take(batches, 28)   # more than were ready
  _assert_equal(seen, expected)
  said = r'a data worker of process 0 died \(exit code -9\) before batch \d+; new ones start there'
  assert re.search(said, capfd.readouterr().err)


def test_workers_that_die_again_and_again_end_the_run(shapes_folder, monkeypatch):
  class Dead:
    def __iter__(self):
      return self

    def __next__(self):
      raise RuntimeError('Worker process was terminated unexpectedly with exit code -9. Search the logs above')

    def close(self):
      pass

  batches = _batches(shapes_folder)
  monkeypatch.setattr(pipeline, 'train_dataset', lambda *_, **__: Dead())
  with pytest.raises(UserError, match='a data worker of process 0 died .exit code -9. before batch 0, 3 times'):
    next(batches)


FULL = r'^/dev/shm is full: it has 64.0 MB, .* need up to 0.1 MB; make it larger .*--shm-size.* data.workers=0$'
NO_SPACE = OSError(errno.ENOSPC, 'No space left on device')
DIED = 'Worker process was terminated unexpectedly with exit code '


@pytest.mark.parametrize('error, free, raised, said', [
    (NO_SPACE, 1, UserError, FULL), (NO_SPACE, 1 << 30, OSError, 'No space'),
    (OSError(errno.ENOSPC, 'No space left on device', '/tmp/x'), 1, OSError, 'No space'),
    (OSError(errno.EIO, 'I/O'), 1, OSError, 'I/O'),
    (RuntimeError(f'{DIED}-7'), 1, UserError, FULL), (RuntimeError(f'{DIED}-7'), 1 << 30, UserError, '3 times; see'),
    (RuntimeError(f'{DIED}-9'), 1, UserError, '3 times; see')])
@pytest.mark.skipif(not os.path.isdir('/dev/shm'), reason='shared memory that is no folder')
def test_a_full_dev_shm_is_named(shapes_folder, monkeypatch, error, free, raised, said):
  """As a mistake, at once: new workers would find it as full."""
  def fail(*_, **__):
    raise error
  monkeypatch.setattr(processes.shutil, 'disk_usage', lambda path: types.SimpleNamespace(total=64_000_000, free=free))
  batches = _batches(shapes_folder, workers=2)
  monkeypatch.setattr(pipeline, 'train_dataset', fail)
  with pytest.raises(raised, match=said):
    next(batches)


@pytest.mark.slow
def test_workers_whose_dev_shm_is_too_small(shapes_folder, tmp_path):
  program = tmp_path / 'program.py'
  program.write_text(textwrap.dedent(f'''
    import sys
    from lightclip_jax import cli, config
    from lightclip_jax.data import pipeline
    def main():
      batches = pipeline.train_batches({str(shapes_folder)!r}, config.replace(config.Data(), workers=2), image_size=64,
                                       context=20, batch_size=64, seed=0)
      for _ in range(9):
        next(batches)
    if __name__ == '__main__':
      sys.exit(cli.run(main))
  '''))
  alone = ['unshare', '--mount', '--map-root-user', 'bash', '-c']
  small = 'mount -t tmpfs -o size=1m tmpfs /dev/shm'
  if subprocess.run([*alone, small], capture_output=True).returncode:
    pytest.skip('nothing can be mounted here')
  done = subprocess.run([*alone, f'{small} && exec "$@"', '-', sys.executable, program], env=_environment(), text=True,
                        capture_output=True, timeout=300)
  assert done.returncode == 2 and 'error: /dev/shm is full: it has 1.0 MB, ' in done.stderr, done.stderr


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent_and_quietly(shapes_folder, tmp_path, how):
  program = tmp_path / 'program.py'
  program.write_text(textwrap.dedent(f'''
    import multiprocessing, signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background jobs ignore it
    from lightclip_jax import cli, config
    from lightclip_jax.data import pipeline
    def main():
      batches = pipeline.train_batches({str(shapes_folder)!r}, config.replace(config.Data(), workers=2), image_size=16,
                                       context=20, batch_size=8, seed=0)
      for _ in range(4):
        next(batches)
      print(*(child.pid for child in multiprocessing.active_children()), flush=True)
      time.sleep(600)   # while the workers go on; an interrupt inside the release of a batch would be lost
    if __name__ == '__main__':
      sys.exit(cli.run(main))
  '''))
  with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                        start_new_session=True, env=_environment()) as child:
    try:
      pids = [int(pid) for pid in child.stdout.readline().split()]
      assert len(pids) == 2
      if how == signal.SIGINT:
        os.killpg(child.pid, how)                           # as the terminal does: to the workers too
      else:
        child.send_signal(how)
      errors = child.communicate(timeout=300)[1]
    finally:
      child.kill()
  if how == signal.SIGINT:
    assert (child.returncode, errors) == (130, 'stopped\n')
  deadline = time.monotonic() + 20
  while any(map(_alive, pids)) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not any(map(_alive, pids))


@pytest.mark.parametrize('first', ['', 'import jax'])
def test_workers_leave_the_accelerator_alone(first):
  program = f'''
{first}
import os
from lightclip_jax.data import processes
processes.start_worker(os.getppid())
import jax
print(jax.config.jax_platforms)
'''
  environment = _environment()
  environment.pop('JAX_PLATFORMS', None)
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True, env=environment)
  assert done.stdout == 'cpu\n'


def test_no_file_of_the_data_part_imports_jax():
  folder = pathlib.Path(pipeline.__file__).parent
  lines = [line for file in folder.rglob('*.py') for line in file.read_text().splitlines()]
  assert len(lines) > 500 and not [line for line in lines if line.split()[:2] in (['import', 'jax'], ['from', 'jax'])]
