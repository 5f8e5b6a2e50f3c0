"""The step: exact whatever the devices and micro-batches, and able to learn."""
import collections
import dataclasses
import os
import pathlib
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, random_batch

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.models import lightclip, norm
from lightclip_jax.training.step import Trainer, put_batch

TEACHER = dict(distillation=dict(weight=config_lib.constant(0.3), teacher_dim=6))


def gradients(trainer, state=None):
  """Loss, metrics, gradients and new running statistics of one step with all four terms, by one compiled function."""
  trainer = Trainer.create(config_lib.replace(trainer.config, objective=TEACHER), trainer.mesh)

  def run(state, batch):
    (loss, (metrics, statistics)), grads = jax.value_and_grad(trainer.loss, has_aux=True)(state.params, state, batch)
    return loss, metrics, grads, norm.update_running_statistics(state.batch_stats, statistics, 0.9)

  # Half-way: α and β are under way, and the dropout key is not the first.
  state = dataclasses.replace(trainer.init_state() if state is None else state, step=jnp.int32(100))
  return jax.device_get(jax.jit(run)(state, random_batch(trainer.mesh, teacher_dim=6)[1]))


@pytest.fixture(scope='module')
def reference(trainer_of):
  return gradients(trainer_of(1))


def errors(got, wanted, floor):
  """Path -> largest difference as a share of the tensor's largest entry, or of `floor` times the whole tree's."""
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
  pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
  scale = lambda leaf: max(np.abs(leaf).max(), floor * largest, 1e-30)  # noqa: E731
  return {sharding.path_name(path): np.abs(a - b).max() / scale(b) for (path, a), b in pairs}


@pytest.mark.slow
def test_gradients_do_not_depend_on_devices_or_micro_batches(tmp_path):
  """In double precision, where nothing hides behind rounding; the single precision's floor is in docs/OBJECTIVES.md."""
  here, cases = pathlib.Path(__file__).parent, ('1,1', '1,8', '2,4', '8,1')
  environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(here.parents[1]), str(here)]), 'PYTHONWARNINGS': 'ignore'}
  subprocess.run([sys.executable, here / 'double_precision.py', tmp_path / 'out', *cases], env=environment, check=True)
  found = pickle.loads((tmp_path / 'out').read_bytes())
  (loss, metrics, grads, statistics) = found.pop((1, 1))
  assert loss.dtype == np.float64 and {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype('float64')}
  for case, (own_loss, own_metrics, own_grads, own_statistics) in found.items():
    np.testing.assert_allclose(own_loss, loss, rtol=1e-12)
    for name in ('loss_contrastive', 'loss_token_matching', 'loss_masked_lm', 'loss_distillation', 'top1_image_to_text'):
      np.testing.assert_allclose(own_metrics[name], metrics[name], rtol=1e-12, err_msg=f'{name} {case}')
    # The floors are for what cancels to zero, such as the offset in front of a normalisation.
    assert max(errors(own_statistics, statistics, 1e-6).values()) < 1e-8, case
    assert max(errors(own_grads, grads, 1e-6).values()) < 1e-8, case


def test_every_parameter_gets_a_gradient(reference):
  without = [sharding.path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(reference[2]) if not leaf.any()]
  # The gates are zero at the start, so nothing behind them moves yet; the sigmoid loss's bias is not used.
  assert all('fusion' in name or name.endswith('logit_bias') for name in without), without


@pytest.mark.slow
def test_overfits_one_batch():
  config = config_lib.replace(TINY, model=dict(text=dict(dropout=0.0)), train=dict(steps=150),
                              optimizer=dict(weight_decay=0.0),
                              objective=dict(contrastive=dict(duplicates='negative', alpha=config_lib.constant(0.0))))
  trainer = Trainer.create(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
  arrays, _ = random_batch(trainer.mesh)
  batch = put_batch(arrays | {'caption_id': np.arange(128, dtype=np.int32)}, trainer.mesh)
  step, state = trainer.compile_step(), trainer.init_state()
  first = None
  for _ in range(config.train.steps):
    state, metrics = step(state, batch)
    first = metrics if first is None else first
  first, metrics = jax.device_get((first, metrics))
  assert metrics['top1_image_to_text'] > 0.99 and metrics['top1_text_to_image'] > 0.99
  for name in ('loss_contrastive', 'loss_token_matching', 'loss_masked_lm'):
    assert metrics[name] < 0.7 * first[name], name


def test_moving_average_follows_and_is_what_evaluation_uses(trainer_of):
  trainer = trainer_of(1)
  state = trainer.init_state()
  _, batch = random_batch(trainer.mesh)
  after, _ = jax.jit(trainer.step)(dataclasses.replace(state, step=jnp.int32(100)), batch)
  kernel = lambda params: np.asarray(params['image']['stem']['kernel'])  # noqa: E731
  wanted = 0.9 * kernel(state.params) + 0.1 * kernel(after.params)
  np.testing.assert_allclose(kernel(after.ema), wanted, rtol=1e-5)
  assert after.evaluation_variables['params'] is after.ema
  assert dataclasses.replace(after, ema=None).evaluation_variables['params'] is after.params


def test_terms_with_weight_zero_are_not_computed(trainer_of):
  off = dict(weight=config_lib.constant(0.0))
  plain = config_lib.replace(TINY, objective=dict(token_matching=off, masked_lm=off))
  plain = Trainer.create(plain, trainer_of(1).mesh)
  flops = [jax.jit(t.loss).lower(*_abstract(t)).cost_analysis()['flops'] for t in (plain, trainer_of(1))]
  assert flops[0] < 0.9 * flops[1]   # the image tower, which both need, is most of it
  metrics = jax.eval_shape(plain.loss, *_abstract(plain))[1][0]
  assert 'loss_contrastive' in metrics and not {'loss_token_matching', 'loss_masked_lm'} & set(metrics)


def test_a_teacher_is_in_the_batch_where_it_is_needed_and_in_no_micro_batch(trainer_of):
  plain = trainer_of(1, 4)
  trainer = Trainer.create(config_lib.replace(plain.config, objective=TEACHER), plain.mesh)
  params, state, batch = _abstract(trainer)
  assert (batch.teacher_image.shape, batch.teacher_text.dtype) == ((128, 6), np.float16)
  assert 'loss_distillation' in jax.eval_shape(trainer.loss, params, state, batch)[1][0]
  assert 'f16[' not in str(jax.make_jaxpr(trainer.encode)(params, state, batch)).replace('bf16[', '').replace('f16[128,6]', '')
  assert jax.tree.map(lambda x: (x.shape, x.dtype), random_batch(plain.mesh, teacher_dim=6)[1]) == jax.tree.map(
      lambda x: (x.shape, x.dtype), batch)
  assert _abstract(plain)[2].teacher_text is None and random_batch(plain.mesh)[1].teacher_text is None


def _abstract(trainer):
  from lightclip_jax.training.step import abstract_batch
  state = trainer.abstract_state()
  return state.params, state, abstract_batch(trainer.config, trainer.mesh)


def test_training_only_parameters_do_not_change_inference(trainer_of):
  params = trainer_of(1).abstract_state().params
  inference = lightclip.inference_parameters(params)
  assert set(inference) == {'image', 'text', 'image_projection', 'text_projection', 'logit_scale'}
  other = config_lib.replace(TINY, model=dict(token_dim=8, fusion=dict(stages=((1, 1),))))
  again = lightclip.inference_parameters(Trainer.create(other, trainer_of(1).mesh).abstract_state().params)
  assert jax.tree.map(lambda x: x.shape, inference) == jax.tree.map(lambda x: x.shape, again)


@pytest.mark.slow
def test_the_sharded_step_gathers_nothing(trainer_of):
  hlo = trainer_of(8).compile_step().as_text()
  operations = collections.Counter(re.findall(r'= \S+ (all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(', hlo))
  assert operations['collective-permute'] > 0, 'the loss travels a ring'
  assert operations['all-gather'] == operations['all-to-all'] == 0, operations
  assert not re.search(r'f32\[128,128\]', hlo), 'no device holds B×B'
