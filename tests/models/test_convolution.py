"""Convolutions against XLA's own: values and gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightclip_jax.models import convolution


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('height, width', [(3, 3), (4, 4), (7, 5), (8, 17), (33, 6), (1, 1)])
def test_depthwise_and_its_gradients_are_the_grouped_convolutions(stride, height, width):
  x = jax.random.normal(jax.random.key(0), (3, height, width, 5))
  kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 5))
  weights = jax.random.normal(jax.random.key(2), (3, -(-height // stride), -(-width // stride), 5))

  def value_and_gradients(conv):
    return jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(conv(x, k, stride) * weights), (0, 1)))(x, kernel)

  ours = value_and_gradients(convolution.shifted_conv)
  reference = value_and_gradients(convolution.grouped_conv)
  public = value_and_gradients(convolution.depthwise_conv)
  for a, b, c in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), jax.tree.leaves(public), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(c, b, rtol=1e-5, atol=2e-5)


def test_one_platform_compiles_no_grouped_convolution():
  x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 1, 4))
  text = jax.jit(lambda x, k: convolution.depthwise_conv(x, k, 1)).lower(x, kernel).compile().as_text()
  assert 'convolution(' not in text


def test_accelerators_get_the_grouped_convolution():
  x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 1, 4))
  traced = jax.jit(lambda x, k: convolution.depthwise_conv(x, k, 1)).trace(x, kernel)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'feature_group_count = 4' in text


def test_depthwise_of_an_infinite_kernel_is_not_hidden():
  kernel = jnp.full((3, 3, 1, 2), jnp.inf)
  assert not np.isfinite(convolution.depthwise_conv(jnp.ones((1, 4, 4, 2)), kernel, 1)).any()


@pytest.mark.parametrize('conv, inputs', [(convolution.shifted_conv, 1), (convolution.conv, 8)])
def test_bfloat16_kernel_gradient_is_summed_in_float32(conv, inputs):
  x = jnp.ones((16, 16, 16, 8), jnp.bfloat16)
  gradient = jax.grad(lambda k: jnp.sum(conv(x, k, 1).astype(jnp.float32)))(jnp.ones((3, 3, inputs, 8), jnp.bfloat16))
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient[1, 1].astype(jnp.float32), 16.0 ** 3)


@pytest.mark.parametrize('height, width, size, stride, channels', [
    (8, 8, 3, 2, 3), (9, 6, 3, 2, 3), (5, 7, 3, 1, 3), (16, 15, 7, 2, 3),
    (1, 1, 3, 1, 5), (2, 2, 3, 1, 5), (3, 2, 3, 2, 5), (6, 5, 3, 2, 5),
    (4, 9, 3, 1, 5), (8, 7, 3, 2, 5), (9, 8, 5, 1, 5), (15, 16, 7, 2, 5)])
def test_a_convolution_and_its_gradients_are_xlas(height, width, size, stride, channels):
  x = jax.random.normal(jax.random.key(0), (2, height, width, channels))
  kernel = jax.random.normal(jax.random.key(1), (size, size, channels, 4))
  weights = jax.random.normal(jax.random.key(2), (2, -(-height // stride), -(-width // stride), 4))

  def value_and_gradients(conv):
    return jax.value_and_grad(lambda x, k: jnp.sum(conv(x, k, stride) * weights), (0, 1))(x, kernel)

  for a, b in zip(jax.tree.leaves(value_and_gradients(convolution.conv)),
                  jax.tree.leaves(value_and_gradients(convolution._conv)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize('side, channels', [(8, 3), (6, 16)])
def test_only_cpus_get_a_convolution_of_patches(side, channels):
  kernel = jnp.ones((3, 3, channels, 4))
  traced = jax.jit(lambda x, k: convolution.conv(x, k, 2)).trace(jnp.ones((2, side, side, channels)), kernel)
  assert 'convolution' in traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'convolution' not in traced.lower(lowering_platforms=('cpu',)).as_text()


def test_only_cpus_get_the_kernels_gradient_as_products():
  kernel = jnp.ones((3, 3, 8, 4))
  traced = jax.jit(jax.grad(lambda x, k: jnp.sum(convolution.conv(x, k, 1) ** 2), (0, 1))).trace(jnp.ones((2, 8, 8, 8)), kernel)
  counts = [[traced.lower(lowering_platforms=(platform,)).as_text().count(f'stablehlo.{name}')
             for name in ('convolution', 'dot_general')] for platform in ('tpu', 'cpu')]
  assert counts == [[3, 0], [2, 9]]


def test_only_cpus_get_shifted_maps_for_the_maximum():
  traced = jax.jit(jax.grad(lambda x: jnp.sum(convolution.max_pool(x)))).trace(jnp.ones((2, 8, 8, 4)))
  assert 'select_and_scatter' in traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'select_and_scatter' not in traced.lower(lowering_platforms=('cpu',)).as_text()


@pytest.mark.parametrize('size, stride', [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_conv_pads_as_pytorch(size, stride):
  x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
  kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 4))
  out = np.asarray(convolution.conv(x, kernel, stride))
  padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
  for row, column in [(0, 0), (1, 2), (out.shape[1] - 1, out.shape[2] - 1)]:
    patch = padded[:, row * stride:row * stride + size, column * stride:column * stride + size]
    np.testing.assert_allclose(out[:, row, column], np.einsum('bijc,ijcd->bd', patch, kernel), rtol=1e-4, atol=1e-4)


def test_max_pool_takes_the_largest_neighbour_also_of_negative_numbers():
  x = -1 - jax.random.uniform(jax.random.key(0), (1, 6, 6, 2))
  out = np.asarray(convolution.max_pool(x))
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  expected = [[padded[0, 2 * i:2 * i + 3, 2 * j:2 * j + 3].max((0, 1)) for j in range(3)] for i in range(3)]
  np.testing.assert_array_equal(out[0], expected)


@pytest.mark.parametrize('height, width', [(1, 1), (6, 6), (5, 8), (2, 7)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_max_pool_and_its_gradient_are_xlas_also_of_equal_neighbours(height, width, dtype):
  x = jnp.round(jax.random.normal(jax.random.key(0), (2, height, width, 3))).astype(dtype)   # many are equal
  weights = jax.random.normal(jax.random.key(1), (2, -(-height // 2), -(-width // 2), 3)).astype(dtype)
  pair = [jax.value_and_grad(lambda x, pool=pool: jnp.sum((pool(x) * weights).astype(jnp.float32)))(x)
          for pool in (convolution.max_pool, convolution._largest_of_window)]
  for a, b in zip(*pair, strict=True):
    rtol = 2e-2 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=rtol, atol=1e-6)
  assert pair[0][1].dtype == dtype
