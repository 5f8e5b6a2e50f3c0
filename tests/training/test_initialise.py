"""Frozen parameters stay as they are, and a fresh state starts from what the config names."""
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import TINY

from lightclip_jax import config as config_lib
from lightclip_jax.errors import UserError
from lightclip_jax.models import weight_files
from lightclip_jax.training import initialise, optimizer
from lightclip_jax.training.state import TrainState

PARAMS = {'image': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}, 'text': {'kernel': jnp.ones((3, 2))}}


def steps(config, slopes, count=3):
  """Some steps down a plane with these slopes."""
  def loss(params):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slopes, optimizer.stop_frozen(params, config.freeze))))
  made, params = optimizer.make_optimizer(config, 10), PARAMS
  state = made.init(params)
  for _ in range(count):
    gradients = jax.grad(loss)(params)
    updates, state = made.update(gradients, state, params, gradient_norm=optax.tree.norm(gradients))
    params = optax.apply_updates(params, updates)
  return params, state


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_frozen_parameters_stay_and_take_no_part_in_clipping(name):
  slopes = jax.tree.map(lambda x: jnp.full(x.shape, 0.01), PARAMS)
  slopes['image']['kernel'] *= 1e6   # would clip the text tower's slope to nothing
  config = config_lib.Optimizer(name=name, freeze='^image/', eps=1e-3)
  got, state = steps(config, slopes)
  jax.tree.map(np.testing.assert_array_equal, got['image'], PARAMS['image'])
  alone, _ = steps(config, slopes | {'image': jax.tree.map(jnp.zeros_like, PARAMS['image'])})
  np.testing.assert_array_equal(got['text']['kernel'], alone['text']['kernel'])
  assert np.abs(np.asarray(got['text']['kernel']) - 1).min() > 1e-5
  _, whole = steps(dataclasses.replace(config, freeze=''), slopes)
  assert size(state) + size(PARAMS['image']) <= size(whole)   # no moments of what stays


@pytest.mark.parametrize('steepness', [0.1, 10.0])
def test_clipping_is_optax_own(steepness):
  config = config_lib.Optimizer(eps=1e-2, clip_norm=0.5)   # a large eps: AdamW's steps depend on the gradient's size
  slopes = jax.tree.map(lambda x: steepness * jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) / 10, PARAMS)
  got, _ = steps(config, slopes)
  unclipped = config_lib.replace(config, clip_norm=0.0)
  clipped_slopes, _ = optax.clip_by_global_norm(0.5).update(slopes, optax.EmptyState())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, steps(unclipped, clipped_slopes)[0])
  same = np.array_equal(got['image']['kernel'], steps(unclipped, slopes)[0]['image']['kernel'])
  assert same == (optax.tree.norm(slopes) < 0.5)


@pytest.mark.parametrize('pattern, words', [
  ('(', 'is no regular expression'), ('^picture', 'leaves all parameters trained'), ('.', 'leaves all parameters frozen')])
def test_a_freeze_that_cannot_be_meant(pattern, words):
  with pytest.raises(UserError, match=words):
    optimizer.make_optimizer(config_lib.Optimizer(freeze=pattern), 10).init(PARAMS)


def test_a_state_starts_from_a_file(monkeypatch):
  text = {'final_norm': {'scale': jnp.zeros(4), 'bias': jnp.zeros(4)}}
  params = {'text': text, 'text_projection': {'kernel': jnp.zeros((4, 8))}, 'image': {'kernel': jnp.zeros(3)}}
  state = TrainState(jnp.zeros((), jnp.int32), params, {}, {}, params)
  assert initialise.initialise(TINY, state) == (state, [])
  monkeypatch.setattr(weight_files, 'read', lambda path: {'ln_final.weight': np.arange(4.0), 'ln_final.bias': np.ones(4)})
  config = dataclasses.replace(TINY, init=config_lib.Initialise(text='clip.pth'))
  new, lines = initialise.initialise(config, state)
  for tree in (new.params, new.ema):
    np.testing.assert_array_equal(tree['text']['final_norm']['scale'], np.arange(4.0))
    np.testing.assert_array_equal(tree['image']['kernel'], np.zeros(3))
  assert isinstance(new.params['text']['final_norm']['scale'], jax.Array)
  assert lines[0] == "text tower from 'clip.pth': 2 tensors matched"
  initialise.check(config, state)
  monkeypatch.undo()
  with pytest.raises(UserError, match="there is no weight file 'clip.pth'"):
    initialise.check(config, state)


@pytest.mark.parametrize('pattern, said', [(None, ['image']), ('^params/text/', ['image']), ('^params/', [])])
def test_a_tower_frozen_as_it_was_drawn_is_named(monkeypatch, pattern, said):
  theirs = {'params': jax.tree.map(lambda x: x + 1, PARAMS), 'batch_stats': {}}
  monkeypatch.setattr(initialise.checkpoint, 'load', lambda path: types.SimpleNamespace(variables=theirs))
  init = dict(checkpoint='old', checkpoint_pattern=pattern) if pattern else {}
  config = config_lib.replace(TINY, optimizer=dict(freeze='^image/'), init=init)
  new, lines = initialise.initialise(config, TrainState(jnp.zeros((), jnp.int32), PARAMS, {}, {}, None))
  assert (new.params['image']['bias'][0] == 1) == bool(said)
  assert [line.split(' tower')[0] for line in lines if 'at random' in line] == [
      f'config.optimizer.freeze keeps the {tower}' for tower in said]
