"""Texts cut to the length of a batch's longest: the same loss and gradients, from less work."""
import jax
import numpy as np
import pytest
from tiny import TINY, random_batch

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.errors import UserError
from lightclip_jax.models import vit
from lightclip_jax.training import checks
from lightclip_jax.training.step import Trainer, fitting_length, put_batch


def test_the_shortest_that_holds_every_text():
  tokens = np.zeros((3, 12), np.int32)
  tokens[0, 4] = tokens[1, 2] = tokens[2, 6] = 3
  assert [fitting_length(tokens, 3, lengths) for lengths in ((4, 7, 9, 12), (9, 7), (6,), ())] == [7, 7, 12, 12]
  tokens[1, 2] = 0   # a text without an end
  assert fitting_length(tokens, 3, (7, 9)) == 12


@pytest.fixture(scope='module')
def gradients():
  """length -> loss, metrics and gradients of the same batch, whose longest text has 8 positions; every objective is on."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(vit, 'DEPTH', 1)
    patch.setattr(vit, 'MAPS_AFTER', (1,))
    config = config_lib.replace(
      TINY, model=dict(image=dict(name='vit_ti', stem_stride=2, width=1.0), fusion=dict(stages=((1, 2),)),
                       text=dict(dropout=0.0)), objective=dict(token_matching=dict(num_iterations=3)))
    trainer = Trainer.create(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    arrays, _ = random_batch(trainer.mesh)
    short = arrays['tokens'][:, 8:].any(1)
    for name in ('image', 'tokens', 'word_mask', 'masked_tokens', 'masked_positions', 'masked_labels', 'masked_weights'):
      arrays[name][short] = arrays[name][~short][:1]   # long ones become copies of a short one
    state, gradient = trainer.init_state(), jax.jit(jax.value_and_grad(trainer.loss, has_aux=True))
    yield {length: gradient(state.params, state, put_batch(arrays, trainer.mesh, length)) for length in (8, 10, 12)}


@pytest.mark.parametrize('length', [8, 10])
def test_loss_and_gradients_are_those_of_the_whole_context(gradients, length):
  (loss, (metrics, _)), grads = gradients[length]
  (whole, (whole_metrics, _)), whole_grads = gradients[12]
  assert {'loss_contrastive', 'loss_token_matching', 'loss_masked_lm'} <= metrics.keys()
  np.testing.assert_allclose(loss, whole, rtol=1e-6)
  for name in metrics:
    np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole_grads))
  for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(whole_grads), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6 * largest)


@pytest.mark.parametrize('length', [1, 13])
def test_lengths_beyond_the_context_are_one_line(length):
  with pytest.raises(UserError, match=f'train.text_lengths has {length}; a text has 2 to model.text.context 12'):
    checks.check_steps(config_lib.replace(TINY, train=dict(text_lengths=(4, length))))
