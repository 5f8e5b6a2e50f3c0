"""Image towers: shapes, stage maps, sizes, and errors."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightclip_jax import config
from lightclip_jax.errors import UserError
from lightclip_jax.models import image_towers, norm

NORM = functools.partial(norm.BatchNorm, policy='global')


def shapes_of(image, batch=2):
  tower = image_towers.build(image, NORM)
  x = jax.ShapeDtypeStruct((batch, image.size, image.size, 3), jnp.float32)
  variables = jax.eval_shape(functools.partial(tower.init, train=False), jax.random.key(0), x)
  features = jax.eval_shape(functools.partial(tower.apply, train=False), variables, x)
  return variables, features


@pytest.mark.parametrize('name, parameters', [
    ('mobilenet_v2', 2_223_872), ('resnet18', 11_176_512), ('vit_ti', 5_524_416)])
def test_parameter_counts_are_timms(name, parameters):
  variables, _ = shapes_of(config.ImageTower(name=name))
  assert sum(x.size for x in jax.tree.leaves(variables['params'])) == parameters


@pytest.mark.parametrize('options, pooled, grid, stages', [
    (dict(name='mobilenet_v2', size=224), 1280, 7, [(56, 24), (28, 32), (14, 96), (7, 320)]),
    (dict(name='mobilenet_v2', size=48, stem_stride=1, width=0.5), 1280, 3, [(24, 16), (12, 16), (6, 48), (3, 160)]),
    (dict(name='resnet18', size=224), 512, 7, [(56, 64), (28, 128), (14, 256), (7, 512)]),
    (dict(name='resnet18', size=32, stem_stride=1), 512, 2, [(16, 64), (8, 128), (4, 256), (2, 512)]),
    (dict(name='resnet18', size=48, stem_stride=1, width=0.5), 256, 3, [(24, 32), (12, 64), (6, 128), (3, 256)]),
    (dict(name='swin_nano', size=224), 384, 7, [(56, 48), (28, 96), (14, 192), (7, 384)]),
    (dict(name='swin_nano', size=64, window=4), 384, 2, [(16, 48), (8, 96), (4, 192), (2, 384)]),
    (dict(name='vit_ti', size=224), 192, 14, [(14, 192)] * 4),
    (dict(name='vit_ti', size=48, patch_size=8), 192, 6, [(6, 192)] * 4),
])
def test_shapes(options, pooled, grid, stages):
  _, features = shapes_of(config.ImageTower(**options))
  assert features.pooled_BxF.shape == (2, pooled)
  assert features.tokens_BxHxWxF.shape == (2, grid, grid, pooled)
  assert [f.shape for f in features.stages] == [(2, side, side, channels) for side, channels in stages]


@pytest.mark.parametrize('options, words', [
    (dict(name='mobilenet_v2', size=100), ['100', '96', '112']),
    (dict(name='mobilenet_v2', size=10), ['10', '16']),
    (dict(name='mobilenet_v2', size=64, stem_stride=3), ['stem_stride', '3', '1 or 2']),
    (dict(name='mobilenet_v2', size=64, width=0.0), ['width', '0.0']),
    (dict(name='mobilenet_v2', size=64, drop_path=0.1), ['drop_path', '0.1', 'mobilenet_v2']),
    (dict(name='resnet18', size=64, width=-1.0), ['width', '-1.0']),
    (dict(name='vit_ti', size=100), ['100', '96', '112']),
    (dict(name='vit_ti', size=64, stem_stride=1), ['stem_stride', 'vit_ti']),
    (dict(name='vit_ti', size=64, patch_size=-4), ['patch_size', '-4']),
    (dict(name='swin_nano', size=64), ['64', '32', '224']),
    (dict(name='swin_nano', size=72, window=4), ['72', '64', '128']),
    (dict(name='swin_nano', size=64, width=2.0), ['width', '2.0']),
])
def test_what_does_not_fit_is_named(options, words):
  with pytest.raises(UserError) as error:
    image_towers.build(config.ImageTower(**options), NORM)
  assert '\n' not in str(error.value)
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.slow
@pytest.mark.parametrize('name, window', [('swin_nano', 4), ('vit_ti', 7)])
def test_drop_path_follows_the_example_and_not_the_batch(name, window):
  tower = image_towers.build(config.ImageTower(name=name, size=32, drop_path=0.5, window=window), NORM)
  x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
  variables = jax.jit(functools.partial(tower.init, train=False))(jax.random.key(0), x)

  @functools.partial(jax.jit, static_argnums=3)
  def pooled(x, index, seed, train=True):
    return tower.apply(variables, x, train, index, rngs={'dropout': jax.random.key(seed)}).pooled_BxF

  whole = pooled(x, jnp.arange(4), 0)
  halves = jnp.concatenate([pooled(x[:2], jnp.arange(2), 0), pooled(x[2:], jnp.arange(2, 4), 0)])
  np.testing.assert_allclose(whole, halves, atol=1e-5)
  assert np.abs(whole - pooled(x, jnp.arange(4) + 4, 0)).max() > 1e-3   # other examples, other masks
  assert np.abs(whole - pooled(x, jnp.arange(4), 1)).max() > 1e-3       # another key
  assert np.abs(whole - pooled(x, jnp.arange(4), 0, False)).max() > 1e-3


def test_swin_shift_connects_windows_but_not_opposite_borders():
  from lightclip_jax.models import swin
  attention = swin.WindowAttention(heads=1, window=4, shift=2)
  x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
  variables = attention.init(jax.random.key(1), x)
  reach = jax.jacobian(lambda x: attention.apply(variables, x)[0, 4, 4].sum())(x)[0]
  seen = np.abs(reach).max(-1) > 0
  assert seen[2:6, 2:6].all() and seen.sum() == 16
  corner = jax.jacobian(lambda x: attention.apply(variables, x)[0, 0, 0].sum())(x)[0]
  assert (np.abs(corner).max(-1) > 0)[:2, :2].all() and (np.abs(corner).max(-1) > 0).sum() == 4


def test_every_tower_of_the_config_is_registered():
  names = dataclasses.fields(config.ImageTower)[0].type.__args__
  assert set(names) == set(image_towers.TOWERS)
