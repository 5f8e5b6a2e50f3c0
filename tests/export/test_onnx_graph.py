"""Graphs give what the JAX functions give, for every batch size; written for ONNX Runtime, which runs them here."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightclip_jax.errors import UserError
from lightclip_jax.export import onnx_graph
from lightclip_jax.models import convolution, layers, products, text_transformer

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

RNG = np.random.default_rng(0)
KERNEL, DEPTHWISE, MATRIX = (RNG.normal(size=shape).astype(np.float32) for shape in ((3, 3, 4, 6), (3, 3, 1, 4), (4, 5)))
TABLE = RNG.normal(size=(11, 4)).astype(np.float32)


def layer_norm(x):
  mean = x.mean(-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)


def attend(x):
  heads = x.reshape(*x.shape[:2], 3, 2, -1)
  return layers.attention(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2], jnp.tril(jnp.ones((1, 1, 5, 5))) - 1)


def class_token(x):
  token = jnp.broadcast_to(jnp.arange(4.0).reshape(1, 1, 4), (x.shape[0], 1, 4))
  return jnp.concatenate([token, x], axis=1)


def look_up(tokens):
  rows = jnp.take(jnp.asarray(TABLE), tokens, axis=0)
  valid = text_transformer.valid_positions(tokens, 3)
  end = jnp.sum(valid, axis=-1, dtype=jnp.int32)[..., None, None] - 1
  return jnp.take_along_axis(rows, end, axis=-2)[..., 0, :]


IMAGE, TEXT = ((6, 6, 4), jnp.float32), ((5, 12), jnp.float32)


@pytest.mark.parametrize('function, item', [
  (lambda x: convolution.conv(x, KERNEL, 2), IMAGE), (lambda x: convolution.conv(x, MATRIX[None, None], 2), IMAGE),
  (lambda x: convolution.depthwise_conv(x, DEPTHWISE, 2), IMAGE), (convolution.max_pool, IMAGE),
  (lambda x: jnp.roll(x, (-1, 2), (1, 2)), IMAGE), (lambda x: jax.nn.relu6(x.mean((1, 2)) * 9), IMAGE),
  (lambda x: x.reshape(x.shape[0], 2, 3, 2, 3, 4).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], 4, -1), IMAGE),
  (layer_norm, TEXT), (attend, TEXT), (layers.gelu, TEXT), (class_token, ((5, 4), jnp.float32)),
  (look_up, ((7,), jnp.int32)), (lambda x: x.astype(jnp.float32) / 255 - 0.5, ((2, 2, 3), jnp.uint8)),
], ids=['conv', 'conv1x1', 'depthwise', 'pool', 'roll', 'mean', 'windows', 'norm', 'attention', 'gelu', 'concatenate',
        'look_up', 'uint8'])
def test_graph_is_the_function(function, item):
  shape, dtype = item
  model = onnx_graph.convert(function, jax.ShapeDtypeStruct(shape, dtype), 'x', 'y')
  session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
  assert session.get_inputs()[0].shape[0] == 'batch'
  for batch in (1, 3):
    x = RNG.normal(size=(batch, *shape)).astype(dtype) if dtype == jnp.float32 else \
        RNG.integers(0, 11, (batch, *shape)).astype(dtype)
    got, expected = session.run(None, {'x': x})[0], np.asarray(jax.jit(function)(x))
    assert got.shape == expected.shape and expected.std() > 0
    np.testing.assert_allclose(got, expected, atol=2e-6 * max(1, np.abs(expected).max()))


def test_what_does_not_depend_on_the_input_is_stored():
  item = jax.ShapeDtypeStruct((5,), jnp.float32)
  model = onnx_graph.convert(lambda x: x * jnp.sqrt(jnp.asarray(MATRIX[:1]) ** 2 + 1), item, 'x', 'y')
  assert [node.op_type for node in model.graph.node] == ['Mul', 'Identity']
  assert model.opset_import[0].version == onnx_graph.OPSET


def test_factors_of_normalisations_are_folded_into_the_weights_before_them():
  factor = jnp.arange(1.0, 7.0).reshape(1, 1, 1, 6)

  def normed(x):
    x = jax.nn.relu6(convolution.conv(x, KERNEL, 1) * factor + factor)
    return products.dense(x, jnp.asarray(KERNEL[0, 0].T)) * factor[..., :4] + x[..., :4] * 2   # x is used twice: stays

  model = onnx_graph.convert(normed, jax.ShapeDtypeStruct((6, 6, 4), jnp.float32), 'x', 'y')
  assert sum(node.op_type == 'Mul' for node in model.graph.node) == 1
  session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
  x = RNG.normal(size=(2, 6, 6, 4)).astype(np.float32)
  np.testing.assert_allclose(session.run(None, {'x': x})[0], jax.jit(normed)(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('function, words', [
  (lambda x: jnp.sort(x, axis=-1), "no handler for the JAX primitive 'sort'"),
  (lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), 'depends on the input'),
])
def test_what_has_no_handler_is_named(function, words):
  with pytest.raises(UserError, match=words):
    onnx_graph.convert(function, jax.ShapeDtypeStruct((5,), jnp.float32), 'x', 'y')
