"""Products against numpy's in float64: values, gradients, and what rounding the factors may change."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightclip_jax.models import products


def rounded(x):
  return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


@pytest.mark.parametrize('rows, inner, columns', [(64, 32, 96), (77, 96, 32), (33, 40, 40), (128, 64, 512)])
def test_bfloat16_product_and_gradients_are_those_of_rounded_factors(rows, inner, columns):
  keys = jax.random.split(jax.random.key(0), 3)
  x, y, g = (jax.random.normal(key, shape) for key, shape in
             zip(keys, [(rows, inner), (inner, columns), (rows, columns)], strict=True))
  out, pull = jax.vjp(jax.jit(products.bfloat16_product), x, y)
  dx, dy = pull(g)
  a, b, c = rounded(x), rounded(y), rounded(g)
  for got, expected in ((out, a @ b), (dx, c @ b.T), (dy, a.T @ c)):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_dense_is_the_product_over_the_last_axis(dtype):
  x = jax.random.normal(jax.random.key(0), (3, 5, 7, 48), dtype)
  kernel = jax.random.normal(jax.random.key(1), (48, 40), dtype)
  bias = jnp.linspace(-1, 1, 40, dtype=dtype)
  out = products.dense(x, kernel, bias)
  tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == jnp.float32 else dict(rtol=1e-2, atol=2e-2)
  assert out.dtype == dtype and out.shape == (3, 5, 7, 40)
  np.testing.assert_allclose(np.asarray(out, np.float64), np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
                             + np.asarray(bias, np.float64), **tolerance)


def test_the_precision_decides_whether_float32_factors_are_rounded():
  x, kernel = jnp.full((4, 32), 1 + 2.0 ** -12), jnp.ones((32, 32))
  np.testing.assert_array_equal(products.dense(x, kernel), 32 * (1 + 2.0 ** -12))
  with jax.default_matmul_precision('bfloat16'):
    np.testing.assert_array_equal(products.dense(x, kernel), 32)


def test_an_infinite_factor_is_not_hidden():
  y = jnp.full((32, 32), jnp.inf)
  assert not np.isfinite(products.bfloat16_product(jnp.ones((4, 32)), y)).any()
