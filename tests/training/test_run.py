"""Whole runs as a user makes them: real processes, killed, stopped and started again."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lightclip_jax.training import preemption

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = pathlib.Path(__file__).with_name('tiny_config.py')
STEPS = 30


def command(workdir, *overrides):
  return [sys.executable, '-m', 'lightclip_jax.main', f'--config={CONFIG}:shallow', f'--workdir={workdir}', *overrides]


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  """One device, and one compilation cache for all runs of this file."""
  cache = tmp_path_factory.mktemp('cache')
  return os.environ | {'XLA_FLAGS': '', 'JAX_COMPILATION_CACHE_DIR': str(cache), 'PYTHONWARNINGS': 'ignore'}


def finish(workdir, environment, *overrides):
  return subprocess.run(command(workdir, *overrides), cwd=ROOT, env=environment, capture_output=True, text=True,
                        timeout=400)


def log_of(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines() if (workdir / 'metrics.jsonl').exists() else []
  return [json.loads(line) for line in lines if line.endswith('}')]


def stop_at(workdir, environment, step, number):
  """Starts or continues a run, signals it once `step` is logged, and returns its exit code and output."""
  process = subprocess.Popen(command(workdir), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
  deadline = time.monotonic() + 400
  while not any(row['step'] >= step for row in log_of(workdir)):
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
    time.sleep(0.05)
  process.send_signal(number)
  output = process.communicate(timeout=120)[0]
  return process.returncode, output


def arrays_of(workdir):
  options = ocp.CheckpointManagerOptions(read_only=True)
  with ocp.CheckpointManager((workdir / 'checkpoints').absolute(), options=options) as manager:
    assert manager.latest_step() == STEPS
    return manager.restore(STEPS, args=ocp.args.Composite(state=ocp.args.StandardRestore()))['state']


@pytest.mark.slow
def test_a_run_that_is_killed_and_stopped_continues_bit_for_bit(tmp_path, environment):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken run'   # a blank in the path is no trouble
  done = finish(whole, environment, '--config.checkpoint.best=eval/heldout_style/concept_top1')
  assert done.returncode == 0, done.stderr
  assert (whole / f'checkpoints/{STEPS}/metrics').exists(), 'the last step may be the best, also where a save is due'
  assert 'heldout_style/concept_top1' in done.stdout and (whole / 'report' / 'index.html').stat().st_size > 10_000

  assert stop_at(broken, environment, 7, signal.SIGKILL)[0] == -signal.SIGKILL
  code, output = stop_at(broken, environment, 15, signal.SIGINT)
  assert code == preemption.EXIT_PREEMPTED and 'the same command continues' in output and 'Traceback' not in output
  code, output = stop_at(broken, environment, 22, signal.SIGTERM)
  assert code == preemption.EXIT_PREEMPTED
  again = finish(broken, environment)
  assert again.returncode == 0, again.stderr

  timing = ('train/examples_per_second', 'train/data_wait', 'train/eta_seconds')
  strip = lambda row: {name: value for name, value in row.items() if name not in timing}  # noqa: E731
  assert [strip(row) for row in log_of(broken)] == [strip(row) for row in log_of(whole)]
  pairs = zip(jax.tree_util.tree_leaves_with_path(arrays_of(broken)), jax.tree.leaves(arrays_of(whole)), strict=True)
  for (path, a), b in pairs:
    assert np.array_equal(a, b), path

  other = finish(broken, environment, '--config.optimizer.learning_rate=0.5')
  assert other.returncode == 2 and 'another config' in other.stderr and other.stderr.count('\n') == 1

  out = tmp_path / 'results.json'
  program = ('import runpy, tiny_config; tiny_config.get_config("shallow"); '
             'runpy.run_module("lightclip_jax.evaluate", run_name="__main__")')
  evaluated = subprocess.run([sys.executable, '-c', program, f'--checkpoint={whole}', f'--out={out}'], capture_output=True,
                             cwd=ROOT, text=True, timeout=400, env=environment | {'PYTHONPATH': str(CONFIG.parent)})
  assert evaluated.returncode == 0, evaluated.stderr
  alone, at_end = (json.loads(path.read_text())['metrics'] for path in (out, whole / 'results.json'))
  assert [(m['name'], m['value']) for m in alone] == [(m['name'], m['value']) for m in at_end]


@pytest.mark.parametrize('arguments, parts', [
    (['--config.train.step=3'], ['config.train.step', "'steps'"]),
    (['--config.train.steps=three'], ['config.train.steps', "'three'"]),
    (['--config.data.dataset=/no/such/folder'], ['/no/such/folder', 'emoji']),
    (['--config.train.batch_size=33'], ['33']),
    (['--config.model.batch_norm=group:48'], ['48', '128']),
    (['--config.model.image.size=36'], ['36', '32', '40']),
    (['--config.model.text.vocab_size=99'], ['99', '45']),
    (['--config.mesh.data=3'], ['3', '1 devices']),
    (['--config.model.text.heads=0'], ['model.text.heads is 0', 'at least 1']),
    (['--config.data.prefetch=0'], ['data.prefetch is 0', 'at least 1']),
    (['--config.data.mosaic=2.0'], ['data.mosaic is 2.0']),   # found late, when batches are to be made
    (['--config.init.image=/no/such.safetensors'], ['/no/such.safetensors']),
    (['now'], ["'now'"]),
])
def test_bad_input_is_one_line(tmp_path, environment, arguments, parts):
  done = finish(tmp_path / 'run', environment, *arguments)
  assert done.returncode == 2, done.stdout + done.stderr
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
  assert all(part in done.stderr for part in parts), done.stderr
  assert not (tmp_path / 'run').exists(), 'nothing may be written before all is checked'


def test_a_bucket_is_not_a_folder_named_s3(environment):
  done = finish('s3://bucket/run', environment)
  assert done.returncode == 2 and 'docs/SCALE.md' in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('config, part', [('configs/mbv2.py:nope', 'quickstart'), ('configs/mbv.py', 'mbv2.py')])
def test_bad_configs_are_one_line(tmp_path, environment, config, part):
  done = subprocess.run([sys.executable, '-m', 'lightclip_jax.main', f'--config={config}', f'--workdir={tmp_path}'],
                        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and part in done.stderr and done.stderr.count('\n') == 1


def test_debug_shows_the_traceback(tmp_path, environment):
  done = finish(tmp_path / 'run', environment, '--config.train.steps=0', '--debug')
  assert done.returncode == 1 and 'Traceback' in done.stderr and 'train.steps is 0' in done.stderr


def test_help_has_an_example(environment):
  for module in ('main', 'evaluate', 'prepare', 'export'):
    done = subprocess.run([sys.executable, '-m', f'lightclip_jax.{module}', '--help'], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f'python -m lightclip_jax.{module}' in done.stdout
