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
import numpy as np
import pytest
from tiny import SHALLOW, TEACHER, TINY, random_batch

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.models import lightclip, mobilenet_v2
from lightclip_jax.training import optimizer
from lightclip_jax.training.step import Trainer, put_batch


@pytest.fixture(scope='module', autouse=True)
def shallow():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mobilenet_v2, 'STAGES', SHALLOW)
    yield


def gradients(folder, precision, *cases):
  """(devices, micro-batches) -> loss, metrics, gradients, running statistics, from the state in `folder`."""
  here, out = pathlib.Path(__file__).parent, folder / precision
  environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(here.parents[1]), str(here)]), 'PYTHONWARNINGS': 'ignore'}
  subprocess.run([sys.executable, here / 'gradients.py', folder / 'state', out, precision, *cases], env=environment, check=True)
  return pickle.loads(out.read_bytes())


@pytest.fixture(scope='module')
def folder(tmp_path_factory, trainer_of):
  folder = tmp_path_factory.mktemp('gradients')
  (folder / 'state').write_bytes(pickle.dumps(jax.device_get(trainer_of(1).init_state())))
  return folder


@pytest.fixture(scope='module')
def double(folder):
  return gradients(folder, 'float64', '1,1', '2,4', '8,1')


def errors(got, wanted, floor):
  """Path -> largest difference as a share of the tensor's largest entry, or of `floor` times the whole tree's."""
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
  pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
  scale = lambda leaf: max(np.abs(leaf).max(), floor * largest, 1e-30)  # noqa: E731
  return {sharding.path_name(path): np.abs(a - b).max() / scale(b) for (path, a), b in pairs}


@pytest.mark.slow
def test_gradients_do_not_depend_on_devices_or_micro_batches(double):
  """In double precision, where nothing hides behind rounding."""
  (loss, metrics, grads, statistics) = double[1, 1]
  assert loss.dtype == np.float64 and {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype('float64')}
  assert len(double) == 3
  for case, (own_loss, own_metrics, own_grads, own_statistics) in double.items():
    np.testing.assert_allclose(own_loss, loss, rtol=1e-12)
    for name in ('loss_contrastive', 'loss_token_matching', 'loss_masked_lm', 'loss_distillation', 'top1_image_to_text'):
      np.testing.assert_allclose(own_metrics[name], metrics[name], rtol=1e-12, err_msg=f'{name} {case}')
    # The floors are for what cancels to zero, such as the offset in front of a normalisation.
    assert max(errors(own_statistics, statistics, 1e-6).values()) < 1e-8, case
    assert max(errors(own_grads, grads, 1e-6).values()) < 1e-8, case


@pytest.mark.slow
def test_single_precision_only_rounds(double, folder):
  """Half of the tensors are this near; what rounding does to the others at ReLU6's kinks is in docs/OBJECTIVES.md."""
  loss, _, grads, statistics = gradients(folder, 'float32', '1,8')[1, 8]
  np.testing.assert_allclose(loss, double[1, 1][0], rtol=1e-6)
  assert max(errors(statistics, double[1, 1][3], 1e-2).values()) < 1e-5
  assert np.median(list(errors(grads, double[1, 1][2], 1e-6).values())) < 1e-5


@pytest.mark.slow
def test_every_parameter_gets_a_gradient(double):
  grads = double[1, 1][2]
  without = [sharding.path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if not leaf.any()]
  # The gates are zero at the start, so nothing behind them moves yet; the sigmoid loss's bias is not used.
  assert all('fusion' in name or name.endswith('logit_bias') for name in without), without


@pytest.fixture(scope='module')
def overfitted():
  """Metrics of the first and the last of 150 steps on one batch, and the states before and after the hundredth."""
  config = config_lib.replace(TINY, model=dict(text=dict(dropout=0.0)), train=dict(steps=150),
                              optimizer=dict(weight_decay=0.0),
                              objective=dict(contrastive=dict(duplicates='negative', alpha=config_lib.constant(0.0))))
  trainer = Trainer.create(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
  arrays, _ = random_batch(trainer.mesh)
  batch = put_batch(arrays | {'caption_id': np.arange(128, dtype=np.int32)}, trainer.mesh)
  step = trainer.lower_step().compile({'xla_backend_optimization_level': 1})   # without any, many steps take longer
  state = trainer.init_state()
  metrics, states = [], []
  for k in range(config.train.steps):
    states += [jax.tree.map(np.array, state)] if k in (100, 101) else []   # copies: the step reuses the buffers
    state, now = step(state, batch)
    metrics.append(now)
  return *jax.device_get((metrics[0], metrics[-1])), *states


@pytest.mark.slow
def test_overfits_one_batch(overfitted):
  first, metrics, _, _ = overfitted
  assert metrics['top1_image_to_text'] > 0.99 and metrics['top1_text_to_image'] > 0.99
  for name in ('loss_contrastive', 'loss_token_matching', 'loss_masked_lm'):
    assert metrics[name] < 0.7 * first[name], name


@pytest.mark.slow
def test_moving_average_follows_and_is_what_evaluation_uses(overfitted):
  _, _, before, after = overfitted
  wanted = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before.ema, after.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.ema, wanted)
  assert not np.array_equal(after.ema['image']['stem']['kernel'], after.params['image']['stem']['kernel'])
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


@pytest.mark.parametrize('accumulate', [1, 4])
def test_what_is_frozen_has_no_backward_pass(trainer_of, accumulate):
  whole = trainer_of(1, accumulate)
  frozen = Trainer.create(config_lib.replace(whole.config, optimizer=dict(freeze='^image/')), whole.mesh)
  flops = [jax.jit(jax.grad(t.loss, has_aux=True)).lower(*_abstract(t)).cost_analysis()['flops'] for t in (frozen, whole)]
  assert flops[0] < 0.7 * flops[1]


def test_a_frozen_tower_works_as_at_inference_where_it_is_frozen_whole(trainer_of):
  config, mesh = trainer_of(1).config, trainer_of(1).mesh

  def statistics(freeze):
    trainer = Trainer.create(config_lib.replace(config, optimizer=dict(freeze=freeze)), mesh)
    _, state, batch = _abstract(trainer)
    assert jax.tree.structure(jax.eval_shape(trainer.step, state, batch)[0]) == jax.tree.structure(state)
    return jax.tree.leaves(jax.eval_shape(trainer.loss, *_abstract(trainer))[1][1])
  assert not statistics('^image/') and statistics('^image/stem')
  params = trainer_of(1).abstract_state().params
  locked = [optimizer.locked_towers(params, pattern) for pattern in ('^(image|text)/', '^text/', '^text/block', '')]
  assert locked == [['image', 'text'], ['text'], [], []]


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
