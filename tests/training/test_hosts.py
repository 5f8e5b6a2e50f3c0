"""One run on other meshes, and what several processes agree on."""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import compiling
import jax
import numpy as np
import pytest
from tiny import TINY, random_batch

from lightclip_jax import config as config_lib
from lightclip_jax import distributed, sharding
from lightclip_jax.data import datasets, pipeline
from lightclip_jax.models import vit
from lightclip_jax.training import checkpoint as checkpoint_lib
from lightclip_jax.training.step import Trainer, put_batch

ROOT = pathlib.Path(__file__).parents[2]

WIDE = config_lib.replace(TINY, model=dict(text=dict(vocab_size=46)))   # a vocabulary that two devices can share


def trainer_on(count, config=WIDE, **mesh):
  return Trainer.create(config, sharding.make_mesh(config_lib.Mesh(**mesh), jax.devices()[:count]))


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh(monkeypatch):
  monkeypatch.setattr(vit, 'DEPTH', 1)   # has wide layers to split, and compiles in a fraction of the time
  monkeypatch.setattr(vit, 'MAPS_AFTER', (1,))
  monkeypatch.setattr(sharding, 'WHOLE_BELOW', 512)
  small = config_lib.replace(
      WIDE, model=dict(image=dict(name='vit_ti', patch_size=8, stem_stride=2, width=1.0), text=dict(depth=1),
                       fusion=dict(stages=((1, 1),))),
      objective=dict(token_matching=dict(weight=config_lib.constant(0.0))))
  losses = []
  for count, mesh in ((1, {}), (8, dict(fsdp=2)), (8, dict(fsdp=2, tensor=2))):
    trainer = trainer_on(count, small, **mesh)
    step, state = trainer.compile_step(), trainer.init_state()
    batches = [random_batch(trainer.mesh, seed)[1] for seed in range(4)]
    losses.append([])
    for k in range(20):
      state, metrics = step(state, batches[k % 4])
      losses[-1].append(float(metrics['loss']))
  np.testing.assert_allclose(losses[1:], np.broadcast_to(losses[0], (2, 20)), rtol=1e-5)


def test_parameters_are_really_split(monkeypatch):
  monkeypatch.setattr(sharding, 'WHOLE_BELOW', 512)   # this model is tiny throughout
  whole = sum(leaf.size for leaf in jax.tree.leaves(trainer_on(1).abstract_state()))
  state = trainer_on(8, fsdp=4, tensor=2).abstract_state()
  own = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(state))
  assert own < 0.5 * whole
  table = state.params['text']['token_embedding']['embedding'].sharding
  assert table.shard_shape((46, 32)) == (23, 8)
  assert state.ema['text']['token_embedding']['embedding'].sharding == table


def test_a_checkpoint_restores_on_other_meshes_bit_for_bit(tmp_path):
  state, wanted = None, None
  for number, (count, mesh) in enumerate(((8, dict(fsdp=2, tensor=2)), (4, dict(fsdp=4)), (1, {}))):
    trainer = trainer_on(count, **mesh)
    if state is None:
      state = trainer.init_state()
      wanted = jax.device_get(state)
    else:
      checkpointer = checkpoint_lib.Checkpointer(tmp_path, WIDE.checkpoint)
      state, run = checkpointer.restore(trainer.abstract_state())
      checkpointer.close()
      assert run.iterator == {'next_batch': 3}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), wanted)
    assert all(leaf.sharding == place for leaf, place in zip(*map(jax.tree.leaves, (state, trainer.places)), strict=True))
    checkpointer = checkpoint_lib.Checkpointer(tmp_path, WIDE.checkpoint)
    checkpointer.save(number, state, checkpoint_lib.RunState({'next_batch': 3}, {}, {}, {}, ''))
    checkpointer.close()


def rows_of(path):
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith(('}', ']'))]


def losses_alone(config, steps):
  """What one process on one device, here, learns from the same data; and its trainer."""
  trainer = trainer_on(1, config)
  batches = batches_of(config)
  step, state, losses = trainer.compile_step(), trainer.init_state(), []
  for _ in range(steps):
    state, metrics = step(state, put_batch(next(batches), trainer.mesh))
    losses.append(float(metrics['loss']))
  batches.close()
  return losses, trainer


def batches_of(config):
  return pipeline.train_batches(datasets.resolve('shapes'), config.data, image_size=config.model.image.size,
                                context=config.model.text.context, batch_size=config.train.batch_size, seed=0)


@pytest.mark.slow
def test_two_processes_train_as_one_and_survive_a_loss(tmp_path, monkeypatch):
  config = pathlib.Path(__file__).with_name('hosts_config.py')
  workdir = tmp_path / 'two processes'
  command = ['bash', str(ROOT / 'launch' / 'local_multihost.sh'), '2', f'--config={config}:{tmp_path}',
             f'--workdir={workdir}', '--config.mesh.fsdp=2']
  environment = os.environ | {'XLA_FLAGS': compiling.QUICKLY, 'PYTHONWARNINGS': 'ignore',
                              'PYTHON': sys.executable, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache')}
  options = dict(cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  for number, step in ((signal.SIGSTOP, 6), (signal.SIGKILL, 10)):
    said = lose_one(subprocess.Popen(command, **options), number, workdir / 'metrics.jsonl', step)
    assert 'lost another process' in said or 'another task died' in said, said

  again = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=900)
  assert again.returncode == 0, again.stderr
  assert len(re.findall(r'continues at step (4|8|12) ', again.stdout)) == 1, again.stdout
  assert again.stdout.count('heldout_style/concept_top1') == 1, 'only one process speaks'

  monkeypatch.setattr(sharding, 'WHOLE_BELOW', sharding.WHOLE_BELOW)   # the config file changes these three
  monkeypatch.setattr(vit, 'DEPTH', vit.DEPTH)
  monkeypatch.setattr(vit, 'MAPS_AFTER', vit.MAPS_AFTER)
  hosts = config_lib.load(str(config))
  losses, trainer = losses_alone(hosts, hosts.train.steps)
  logged = {row['step']: row['train/loss'] for row in rows_of(workdir / 'metrics.jsonl') if 'train/loss' in row}
  np.testing.assert_allclose(list(logged.values()), losses, rtol=1e-5)
  for later in (16, 20):
    shutil.rmtree(workdir / 'checkpoints' / str(later))
  check_restore(workdir, tmp_path, trainer, step=12)


def lose_one(launcher, number, log, step):
  """What is said when the second of two processes gets a signal after `step`: the first ends, with an error."""
  deadline = time.monotonic() + 900
  while not any(row['step'] >= step for row in rows_of(log)):
    assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()
    time.sleep(0.01)
  first, second = map(int, pathlib.Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()[:2])
  os.kill(second, number)
  lost = time.monotonic()
  while running(first):
    assert time.monotonic() - lost < 60, 'the other one must not wait for ever'
    time.sleep(0.1)
  if running(second):
    os.kill(second, signal.SIGKILL)   # a stopped one heeds nothing else
  said = launcher.communicate(timeout=60)[1]
  assert launcher.returncode != 0
  return said


def running(process):
  try:
    return pathlib.Path(f'/proc/{process}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def check_restore(workdir, notes, trainer, step):
  """One process restores what two have saved bit for bit, and reads next what they read next."""
  checkpointer = checkpoint_lib.Checkpointer(workdir, trainer.config.checkpoint)
  like = trainer.abstract_state()
  state, run = checkpointer.restore(like)
  checkpointer.close()
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
  with np.load(notes / f'state-{step}.npz') as saved:
    for leaf, name in zip(jax.tree.leaves(state), saved.files, strict=True):
      np.testing.assert_array_equal(leaf, saved[name])
  batches = batches_of(trainer.config)
  batches.restore(run.iterator)
  shares = [dict(rows_of(notes / f'read-{process}.jsonl'))[step] for process in range(2)]
  assert next(batches)['example_id'].tolist() == shares[0] + shares[1]
  batches.close()


def test_agreement_is_asked_for_at_some_steps_only(monkeypatch):
  asked = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed.multihost_utils, 'process_allgather',
                      lambda flags: asked.append(flags) or np.array([flags, [False, True]]))
  answers = {step: distributed.agree(step, False, False) for step in range(1, 21)}
  assert len(asked) == 2 and [step for step, answer in answers.items() if answer == (False, True)] == [10, 20]
