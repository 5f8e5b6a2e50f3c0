"""Frozen parameters stay as they are, and a fresh state starts from what the config names."""
import dataclasses

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


def steps(config, gradients, count=3):
  made, params = optimizer.make_optimizer(config, 10), PARAMS
  state = made.init(params)
  for _ in range(count):
    updates, state = made.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_frozen_parameters_stay_and_take_no_part_in_clipping(name):
  gradients = jax.tree.map(lambda x: jnp.full(x.shape, 0.01), PARAMS)
  gradients['image']['kernel'] *= 1e6   # would clip the text tower's gradient to nothing
  config = config_lib.Optimizer(name=name, freeze='^image/', eps=1e-3)
  got, state = steps(config, gradients)
  jax.tree.map(np.testing.assert_array_equal, got['image'], PARAMS['image'])
  alone, _ = steps(config, gradients | {'image': jax.tree.map(jnp.zeros_like, PARAMS['image'])})
  np.testing.assert_array_equal(got['text']['kernel'], alone['text']['kernel'])
  assert np.abs(np.asarray(got['text']['kernel']) - 1).min() > 1e-5
  _, whole = steps(dataclasses.replace(config, freeze=''), gradients)
  assert size(state) + size(PARAMS['image']) <= size(whole)   # no moments of what stays


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
