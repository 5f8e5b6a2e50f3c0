"""BatchNorm over groups: against numpy, on any number of devices, without communication."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lightclip_jax.errors import UserError
from lightclip_jax.models import layers, mobilenet_v2, norm

COLLECTIVES = re.compile(r'(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)[\w-]*\(')


def apply(layer, x, train=True):
  variables = layer.init(jax.random.key(0), x, train=False)
  variables['params'] = {'scale': jnp.linspace(0.5, 2, x.shape[-1]), 'bias': jnp.linspace(-1, 1, x.shape[-1])}
  return layer.apply(variables, x, train, mutable=[norm.STATISTICS]), variables


@pytest.mark.parametrize('policy, local_groups, groups', [('group:4', 1, 3), ('global', 1, 1), ('local', 2, 2)])
@pytest.mark.parametrize('activation, function', [
    (None, lambda y: y), ('relu', lambda y: np.maximum(y, 0)), ('relu6', lambda y: np.clip(y, 0, 6))])
def test_each_group_is_normalised_by_its_own_statistics(policy, local_groups, groups, activation, function):
  x = np.random.default_rng(0).normal(3, 2, (12, 5, 4, 6)).astype(np.float32)
  (out, sown), variables = apply(norm.BatchNorm(policy, local_groups, activation=activation), x)
  parts = x.reshape(groups, -1, *x.shape[1:]).astype(np.float64)
  mean, var = parts.mean((1, 2, 3), keepdims=True), parts.var((1, 2, 3), keepdims=True)
  y = (parts - mean) / np.sqrt(var + 1e-5) * np.asarray(variables['params']['scale'])
  y += np.asarray(variables['params']['bias'])
  np.testing.assert_allclose(out, function(y).reshape(x.shape), atol=2e-5)
  np.testing.assert_allclose(sown[norm.STATISTICS]['mean'], mean[:, 0, 0, 0], rtol=1e-5)
  np.testing.assert_allclose(sown[norm.STATISTICS]['var'], var[:, 0, 0, 0], rtol=1e-4)


def test_evaluation_uses_the_running_statistics_and_any_batch():
  x = np.random.default_rng(0).normal(size=(3, 2, 2, 4)).astype(np.float32)
  layer = norm.BatchNorm('group:64')
  variables = layer.init(jax.random.key(0), x, train=False)
  variables['batch_stats'] = {'mean': jnp.arange(4.0), 'var': jnp.arange(1.0, 5.0)}
  np.testing.assert_allclose(layer.apply(variables, x, False), (x - np.arange(4)) / np.sqrt(np.arange(1, 5) + 1e-5),
                             atol=1e-5)


def test_bfloat16_has_float32_statistics():
  x = jnp.asarray(np.random.default_rng(0).normal(5, 1, (8, 16, 16, 4)), jnp.bfloat16)
  (out, sown), _ = apply(norm.BatchNorm('group:4'), x)
  assert out.dtype == jnp.bfloat16
  exact = np.asarray(x, np.float64).reshape(2, -1, 4)
  assert sown[norm.STATISTICS]['var'].dtype == jnp.float32
  np.testing.assert_allclose(sown[norm.STATISTICS]['var'], exact.var(1), rtol=1e-3)


def test_running_update_is_the_mean_over_groups_and_micro_batches():
  rng = np.random.default_rng(0)
  old = {name: {'mean': rng.normal(size=size), 'var': rng.random(size)} for name, size in (('a', 3), ('b', 5))}
  old = jax.tree.map(lambda x: x.astype(np.float32), old)
  new = jax.tree.map(lambda x: rng.normal(size=(2, 4, *x.shape)).astype(np.float32), old)
  updated = norm.update_running_statistics(old, new, 0.9)
  expected = jax.tree.map(lambda o, n: 0.9 * o + 0.1 * n.mean((0, 1)), old, new)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), updated, expected)
  assert norm.update_running_statistics({}, {}, 0.9) == {}


@pytest.mark.parametrize('policy, batch, words', [
    ('group:64', 96, ['96', '64']), ('group:0', 8, ['group:0']), ('groups', 8, ['groups', 'group:N'])])
def test_bad_groups_are_named(policy, batch, words):
  with pytest.raises(UserError) as error:
    norm.group_count(policy, batch)
  assert all(word in str(error.value) for word in words)
  with pytest.raises(UserError, match='6.*4'):
    norm.group_count('local', 6, 4)


class Blocks(nn.Module):
  """A little MobileNetV2: a stem, one block with stride, one with a shortcut."""

  @nn.compact
  def __call__(self, x, train):
    layer = functools.partial(norm.BatchNorm, 'group:2')
    x = layer(activation='relu6', name='stem_norm')(layers.Conv(8, 3, 2, name='stem')(x), train)
    for i, stride in enumerate((2, 1)):
      x = mobilenet_v2.InvertedResidual(8, 2, stride, layer, name=f'block{i}')(x, train)
    return x.mean((1, 2))


@pytest.mark.slow
def test_groups_need_no_communication_and_do_not_depend_on_devices():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  images = jax.random.normal(jax.random.key(0), (16, 16, 16, 3))
  variables = Blocks().init(jax.random.key(1), images[:1], False)

  def forward_and_backward(images):
    def per_example(images):
      pooled, sown = Blocks().apply(variables, images, True, mutable=[norm.STATISTICS])
      return jnp.sum(pooled ** 2, 1), sown

    losses, vjp, sown = jax.vjp(per_example, images, has_aux=True)
    return losses, vjp(jnp.ones(16))[0], sown[norm.STATISTICS]

  def with_update(images):
    losses, gradient, sown = forward_and_backward(images)
    return losses, gradient, norm.update_running_statistics(variables['batch_stats'], sown, 0.9)

  by_batch = NamedSharding(mesh, PartitionSpec('data'))
  inner = jax.jit(forward_and_backward, in_shardings=by_batch, out_shardings=by_batch)
  assert not COLLECTIVES.findall(inner.lower(images).compile().as_text())
  whole = jax.jit(with_update, in_shardings=by_batch,
                  out_shardings=(by_batch, by_batch, NamedSharding(mesh, PartitionSpec())))
  found = COLLECTIVES.findall(whole.lower(images).compile().as_text())
  assert found == ['all-reduce'], found   # of all running statistics at once
  for a, b in zip(jax.tree.leaves(whole(images)), jax.tree.leaves(jax.jit(with_update)(images)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
