"""With the same weights every tower agrees with timm's or open_clip's; launch/parity_env.sh makes their environment."""
import functools
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest

from lightclip_jax import config
from lightclip_jax.models import convert, image_towers, norm, text_transformer

TORCH_PYTHON = os.environ.get('LIGHTCLIP_TORCH_PYTHON')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not TORCH_PYTHON, reason='LIGHTCLIP_TORCH_PYTHON names no interpreter with PyTorch (launch/parity_env.sh)')]


def torch_side(tower, folder):
  script, out = pathlib.Path(__file__).with_name('torch_side.py'), folder / 'out.npz'
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  subprocess.run([TORCH_PYTHON, script, tower, out], check=True, env=environment)
  arrays = dict(np.load(out))
  weights = {k.removeprefix('weight/'): v for k, v in arrays.items() if k.startswith('weight/')}
  return weights, arrays['io/inputs'], arrays['io/pooled']


def assert_same_tree(ours, converted):
  """Every leaf of ours is there with its shape, and no other."""
  def shapes(tree):
    return {jax.tree_util.keystr(k): np.shape(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}
  assert shapes(ours) == shapes(converted)


@pytest.mark.parametrize('name', list(image_towers.TOWERS))
def test_image_tower_agrees_with_timm(name, tmp_path, record_property):
  weights, images, expected = torch_side(name, tmp_path)
  tower = image_towers.build(config.ImageTower(name=name), functools.partial(norm.BatchNorm))
  variables = {k: v for k, v in convert.convert(weights, convert.IMAGE_RULES[name]).items() if v}
  assert_same_tree(jax.eval_shape(functools.partial(tower.init, train=False), jax.random.key(0), images), variables)
  pooled = np.asarray(jax.jit(functools.partial(tower.apply, train=False))(variables, images).pooled_BxF)
  error = float(np.abs(pooled - expected).max())
  print(f'{name}: max difference {error:.2e} of values up to {np.abs(expected).max():.2f}, '
        f'standard deviation {expected.std():.2f}')
  assert expected.std() > 1e-2
  assert error < 1e-4 * max(1.0, np.abs(expected).max())


def test_text_tower_agrees_with_open_clip(tmp_path):
  weights, tokens, expected = torch_side('text', tmp_path)
  text = config.TextTower(width=64, heads=4, depth=3, context=20, vocab_size=100, end_id=99, causal=True)
  tower = text_transformer.TextTransformer(text)
  params = convert.convert(weights, convert.OPEN_CLIP_TEXT)['params']
  assert_same_tree(jax.eval_shape(tower.init, jax.random.key(0), tokens)['params'], params)
  pooled = np.asarray(tower.apply({'params': params}, tokens)[0]) @ weights['text_projection']
  error = float(np.abs(pooled - expected).max())
  print(f'text: max difference {error:.2e} of values up to {np.abs(expected).max():.2f}')
  assert expected.std() > 1e-2
  assert error < 1e-4 * max(1.0, np.abs(expected).max())
