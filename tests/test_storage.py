"""A run whose data and workdir lie in a bucket: the libraries' own clients against a stand-in for Cloud Storage."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import Gcs, Server
from jax.experimental.compilation_cache import compilation_cache
from orbax.checkpoint._src.path import gcs_utils

from lightclip_jax import config as config_lib
from lightclip_jax import main, sharding, storage
from lightclip_jax.data import datasets, pipeline, writer
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import report, results
from lightclip_jax.training import checkpoint, checks, metrics
from lightclip_jax.training.state import TrainState

CONFIG = config_lib.Config()


@pytest.fixture(scope='module', autouse=True)
def bucket():
  server = Server()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', server.address)
    patch.setenv('CLOUD_STORAGE_EMULATOR_ENDPOINT', server.address)
    patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'nobody')
    patch.setattr(gcs_utils, 'get_bucket', lambda name: None)   # Orbax asks Google's own client for one special kind
    yield
  server.shutdown()
  server.server_close()


def test_paths(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert storage.path('~/runs') == tmp_path / 'runs'
  assert storage.path(str(tmp_path)) == tmp_path and not storage.in_bucket(tmp_path)
  path = storage.path('gs://clip/a b/c')
  assert storage.in_bucket(path) and str(storage.absolute(path)) == str(storage.path(path)) == 'gs://clip/a b/c'
  for folder in (path, tmp_path):
    for text in ('one', 'zwölf'):
      storage.write_text(folder / 'file', text)
      assert (folder / 'file').read_text(encoding='utf-8') == text and [f.name for f in folder.iterdir()] == ['file']


@pytest.mark.parametrize('name, part', [('s3://clip/run', 'only gs://'), ('https://clip', 'only gs://')])
def test_other_buckets_are_refused(name, part):
  with pytest.raises(UserError, match=part):
    main.parse(['--config=configs/mbv2.py', f'--workdir={name}'])


def test_without_the_package(monkeypatch):
  def missing(name):
    raise ImportError(name)
  monkeypatch.setattr(storage.fsspec, 'get_filesystem_class', missing)
  with pytest.raises(UserError, match='pip install gcsfs'):
    storage.path('gs://clip/run')


def test_records_are_read_where_they_lie():
  local = datasets.resolve('shapes')
  for file in local.iterdir():
    Gcs().pipe_file(f'gs://clip/shapes/{file.name}', file.read_bytes())
  options = dict(image_size=32, context=12, batch_size=8, seed=3)
  threads = config_lib.replace(CONFIG.data, workers=0)
  both = [pipeline.train_batches(folder, threads, **options) for folder in (local, datasets.resolve('gs://clip/shapes'))]
  for _ in range(2):
    jax.tree.map(np.testing.assert_array_equal, *map(next, both))
  for batches in both:
    batches.close()
  assert both[0].state() == both[1].state()

  Gcs().rm(next(path for path in Gcs.store if path.endswith('.array_record') and 'train' in path))
  with pytest.raises(UserError, match='gs://clip/shapes/train-.* is missing'):
    pipeline.train_batches('gs://clip/shapes', threads, **options)
  for name in ('gs://clip/nothing', 'gs://clip/shapes/manifest'):
    with pytest.raises(UserError, match=name):
      datasets.resolve(name)


def test_a_run_continues_from_its_bucket():
  workdir = storage.path('gs://clip/runs/one')
  checks.claim_workdir(workdir, CONFIG)
  checks.claim_workdir(workdir, CONFIG)
  with pytest.raises(UserError, match='another config'):
    checks.claim_workdir(workdir, config_lib.replace(CONFIG, train=dict(steps=7)))

  state = state_of_three()
  for step in (3, 4):
    saver = checkpoint.Checkpointer(workdir, config_lib.Checkpoint(keep=1))
    saver.save(step, state, checkpoint.RunState({'next_batch': step}, {}, {}, {}, ''))
    saver.close()
  restored, run = restore(workdir, state)
  assert run.iterator == {'next_batch': 4}
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  assert sorted(child.name for child in (workdir / 'checkpoints').iterdir()) == ['4'], 'the oldest is deleted'


def state_of_three():
  """A state on all devices, of step 3."""
  place = sharding.batch_sharding(mesh := sharding.make_mesh(config_lib.Mesh()))
  step, moment = jax.device_put((jnp.int32(3), jnp.ones((3, 2))), jax.sharding.NamedSharding(mesh, jax.P()))
  return TrainState(step, {'w': jax.device_put(jnp.arange(16.0), place)}, {}, {'m': moment}, None)


def restore(workdir, state):
  saver = checkpoint.Checkpointer(workdir, config_lib.Checkpoint(keep=2))
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
  found = saver.restore(like)
  saver.close()
  return found


def test_a_damaged_checkpoint_is_kept_aside_in_its_bucket(capsys):
  """A bucket has no folder `damaged` before something is in it."""
  workdir, state = storage.path('gs://clip/runs/damaged'), state_of_three()
  saver = checkpoint.Checkpointer(workdir, config_lib.Checkpoint(keep=2))
  for step in (3, 4):
    saver.save(step, state, checkpoint.RunState({'next_batch': step}, {}, {}, {}, ''))
  saver.close()
  Gcs().rm(next(name for name in Gcs.store if name.startswith('/clip/runs/damaged/checkpoints/4/run/')))
  for _ in range(2):
    assert restore(workdir, state)[1].iterator == {'next_batch': 3}
  said = [line for line in capsys.readouterr().err.splitlines() if 'is damaged' in line]
  place, = [child for child in (workdir / 'damaged').iterdir() if child.name.startswith('4-')]
  assert len(said) == 1 and str(place) in said[0] and (place / 'state').is_dir()
  assert [child.name for child in (workdir / 'checkpoints').iterdir()] == ['3']


def test_logs_and_report_reach_the_bucket(monkeypatch):
  workdir = storage.path('gs://clip/runs/logged')
  log = workdir / 'metrics.jsonl'
  lines = lambda: [json.loads(line)['step'] for line in log.read_text().splitlines()]  # noqa: E731
  log_writer = metrics.MetricWriter(workdir, 0)
  log_writer.write(1, {'train/loss': 2.0})
  assert not log.exists(), 'not a copy for each line'
  monkeypatch.setattr(metrics, 'COPY_SECONDS', 0)
  log_writer.write(2, {'train/loss': 1.5})
  assert lines() == [1, 2]
  log_writer.close()
  log_writer = metrics.MetricWriter(workdir, 1)   # the run was killed, and continues at step 1
  log_writer.write(2, {'train/loss': 1.25})
  log_writer.close()
  assert lines() == [1, 2] and '1.25' in log.read_text() and any((workdir / 'tensorboard').iterdir())
  assert str(report.write_report(workdir, [], [], [], CONFIG)) == 'gs://clip/runs/logged/report/index.html'
  assert '<svg' in (workdir / 'report' / 'index.html').read_text()
  results.write_json(workdir / 'results.json', [], step=2)
  assert json.loads((workdir / 'results.json').read_text()) == {'step': 2, 'metrics': []}


def test_preparing_needs_a_disk():
  with pytest.raises(UserError, match='prepare on a disk'), writer.new_folder(pathlib.Path('gs://clip/data')):
    pass


def test_compiled_programs_are_kept_in_the_bucket():
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}
  try:
    for name, value in zip(before, ('gs://clip/compiled', 0.0), strict=True):
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7)).block_until_ready()
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
  assert any(path.startswith('/clip/compiled/jit') for path in Gcs.store)
