"""Bad numbers change nothing and are counted; a run that stands still says where."""
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, random_batch

from lightclip_jax.errors import UserError
from lightclip_jax.training import health
from lightclip_jax.training import step as step_lib
from lightclip_jax.training.step import put_batch

GOOD = {'loss': 1.0, 'gradient_norm': 2.0, 'skipped': 0.0}
BAD = {'loss': float('nan'), 'gradient_norm': float('inf'), 'skipped': 1.0}
IDS = np.arange(3)


def test_a_poisoned_batch_changes_nothing_but_the_step(trainer_of):
  trainer = trainer_of(8)
  step = trainer.compile_step()
  arrays, good = random_batch(trainer.mesh)
  state, _ = step(trainer.init_state(), good)
  for poison in (np.nan, np.inf):   # by the devices' own path into a loss term
    before = jax.device_get(state)
    weights = arrays['masked_weights'].copy()   # the devices may share the memory of the good one
    weights[5, 0] = poison
    state, metrics = step(state, put_batch(arrays | {'masked_weights': weights}, trainer.mesh))
    assert metrics['skipped'] == 1 and not np.isfinite(metrics['gradient_norm'])
    assert state.step == before.step + 1
    pairs = zip(jax.tree_util.tree_leaves_with_path(jax.device_get(state)), jax.tree.leaves(before), strict=True)
    assert all(np.array_equal(a, b) for (path, a), b in pairs if jax.tree_util.keystr(path) != '.step')
  _, metrics = step(state, good)
  assert metrics['skipped'] == 0 and np.isfinite(metrics['loss'])


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_an_update_is_taken_whole_or_left(platform):
  @jax.jit
  def step(good, state, more):
    return step_lib.update_if(good, lambda state, more: (state[0] + more, state[1] / more), state, more, platform=platform)
  for good, wanted in ((True, ([2, 3, 4], 3)), (False, ([0, 1, 2], 6))):
    counts, ratio = step(good, (np.arange(3), 6.0), 2)
    assert (counts.tolist(), ratio) == wanted


def test_counts_are_exact_and_travel(tmp_path, capsys):
  monitor = health.Health(tmp_path, 3)
  applied = [monitor.add(step, BAD if step in (2, 3, 5) else GOOD, IDS) for step in range(1, 7)]
  assert applied == [True, False, False, True, False, True] and monitor.skipped == 3
  assert capsys.readouterr().err.splitlines()[0] == 'step 2 was skipped: loss nan, gradient norm inf [skipped 1]'
  again = health.Health(tmp_path, 3, json.loads(json.dumps(monitor.state())))
  again.add(7, BAD, IDS)
  assert again.skipped == 4 and again.in_a_row == 1 and not list(tmp_path.iterdir())


def test_too_many_in_a_row_stop_the_run_and_name_their_batches(tmp_path):
  monitor = health.Health(tmp_path, 3)
  for step in (1, 2):
    monitor.add(step, BAD, IDS + step)
  with pytest.raises(UserError, match='3 steps in a row.*up to step 3.*skipped-0.json.*name_nans'):
    monitor.add(3, BAD, IDS + 3)
  assert json.loads((tmp_path / 'skipped-0.json').read_text()) == [
      {'step': step, 'example_ids': [step, step + 1, step + 2]} for step in (1, 2, 3)]


def test_a_jump_of_the_loss_is_told(tmp_path, capsys):
  monitor, rng = health.Health(tmp_path, 3), np.random.default_rng(0)
  for step in range(300):
    monitor.add(step, GOOD | {'loss': 5 + 0.1 * rng.normal()}, IDS)
  assert not capsys.readouterr().err
  monitor.add(300, GOOD | {'loss': 7.0}, IDS)
  said = capsys.readouterr().err
  assert said.startswith('step 300: the loss jumped to 7.000 (mean ') and '\n' == said[-1] and said.count('\n') == 1


def test_the_operation_that_makes_a_nan_is_named():
  with pytest.raises(UserError, match='nan.* log'):
    health.name_nans(lambda x: jnp.sqrt(jnp.log(x)), jnp.float32(-1))
  health.name_nans(lambda x: jnp.log(x), jnp.float32(1))


def test_a_standstill_is_told_with_its_cause(tmp_path, capfd):
  with health.Watchdog(tmp_path, minutes=0.5 / 60) as watchdog:
    for _ in range(10):   # slow, but it moves
      time.sleep(0.1)
      watchdog.moved()
    assert not capfd.readouterr().err
    with watchdog.waiting_for('data'):
      time.sleep(1.5)
    said = capfd.readouterr().err
  assert said.count('\n') == 1 and 'no step for' in said and 'waiting for data' in said and 'stacks-0.txt' in said
  stacks = (tmp_path / 'stacks-0.txt').read_text()
  assert 'test_a_standstill_is_told_with_its_cause' in stacks


@pytest.mark.parametrize('blocks', [False, True])
def test_a_standstill_ends_also_where_its_stacks_cannot_be_written(tmp_path, monkeypatch, capfd, blocks):
  ended = threading.Event()
  monkeypatch.setattr(health, '_WRITING', 0.1)
  monkeypatch.setattr(health.os, '_exit', lambda code: code == health.EXIT_STUCK and ended.set())
  if blocks:
    monkeypatch.setattr(health, '_write_stacks', lambda place: ended.wait(10))
  with health.Watchdog(tmp_path / 'gone', minutes=0.1 / 60, end=True):
    assert ended.wait(5)
  assert blocks or 'the stacks are not written' in capfd.readouterr().err


def test_limits_are_those_of_the_config():
  assert TINY.train.max_skipped == 10 and TINY.train.watchdog_minutes == 20 and not TINY.train.watchdog_exit
