"""The Embedder on one and eight devices: the same rows, in order, each example once."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightclip_jax import config
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import embed

MODEL = config.replace(config.Model(), image=dict(size=4), text=dict(context=6))


class Toy(nn.Module):
  """Sums that no rounding disturbs, times one parameter; and how often it was traced."""
  traces = []

  def setup(self):
    self.scale = self.param('scale', nn.initializers.ones, ())

  def encode_image(self, images):
    Toy.traces.append(images.shape)
    return self.scale * images.astype(jnp.float32).sum(axis=(1, 2))

  def encode_text(self, tokens):
    return self.scale * tokens.astype(jnp.float32)[:, :4]

  def encode_tokens(self, images, tokens):
    return images.reshape(len(images), -1, 3) * self.scale, tokens[..., None] * self.scale


class Letters:
  """A tokenizer: one id a letter."""

  def encode(self, texts, context):
    return np.array([[ord(c) for c in text.ljust(context)[:context]] for text in texts], np.int32)


def sharding(devices, shape=None):
  mesh = np.asarray(jax.devices()[:devices]).reshape(shape or (devices, 1))
  return NamedSharding(Mesh(mesh, ('data', 'fsdp')), PartitionSpec(('data', 'fsdp')))


def make(batch_size=16, scale=1.0, on=None):
  variables = {'params': {'scale': jnp.float32(scale)}}
  if on is not None:
    variables = jax.device_put(variables, NamedSharding(on.mesh, PartitionSpec()))
  return embed.Embedder(Toy(), MODEL, variables, Letters(), sharding=on, batch_size=batch_size)


def batches(images, size, order, pad=True):
  for start in range(0, len(order), size):
    index = order[start:start + size]
    missing = size - len(index) if pad else 0
    yield {'image': np.concatenate([images[index], np.full((missing, 4, 4, 3), 255, np.uint8)]),
           'index': np.concatenate([index, np.full(missing, -1)])}


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (37, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize('size', [1, 5, 8, 16, 64])
@pytest.mark.parametrize('pad', [True, False])
def test_images_are_the_same_on_one_and_eight_devices(images, size, pad):
  order = np.random.default_rng(1).permutation(37)
  expected = images.astype(np.float32).sum(axis=(1, 2))
  for on in (sharding(1), sharding(8), sharding(8, (2, 4)), None):
    got = make(on=on).images(batches(images, size, order, pad))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize('count', [1, 7, 16, 33])
@pytest.mark.parametrize('batch_size', [3, 16])
def test_texts_keep_their_order(count, batch_size):
  texts = [f'{i:04d}' for i in range(count)]
  for on in (sharding(1), sharding(8)):
    np.testing.assert_array_equal(make(batch_size, 2.0, on).texts(texts), 2.0 * Letters().encode(texts, 4))


def test_a_new_embedder_with_new_weights_compiles_nothing(images):
  order = np.arange(37)
  first = make(scale=1.0).images(batches(images, 24, order))
  before = len(Toy.traces)
  np.testing.assert_array_equal(make(scale=2.0).images(batches(images, 24, order)), 2 * first)
  assert len(Toy.traces) == before


def test_text_batches_have_one_shape():
  rows = list(make(8)._shares(np.arange(20)[:, None], batch_size=8))
  assert [len(tokens) for (tokens,), _ in rows] == [8, 8, 8]
  assert [i for _, index in rows for i in index if i >= 0] == list(range(20))


def test_processes_share_the_texts(monkeypatch):
  seen = []
  for share in ((0, 2), (1, 2)):
    monkeypatch.setattr(embed, 'process_share', lambda place, share=share: share)
    rows = list(make(8)._shares(np.arange(10)[:, None], batch_size=8))
    assert [len(tokens) for (tokens,), _ in rows] == [4, 4]   # as many in each, or collectives hang
    seen += [i for _, index in rows for i in index if i >= 0]
  assert sorted(seen) == list(range(10))


def test_an_image_that_could_not_be_read_keeps_its_place_with_a_row_of_zeros(images):
  order = np.random.default_rng(1).permutation(37)
  expected = images.astype(np.float32).sum(axis=(1, 2))
  expected[[0, 5]] = 0
  for on in (sharding(1), sharding(8)):
    fed = [{**batch, 'index': index} for batch in batches(images, 16, order)
           for index in [np.where(np.isin(batch['index'], (0, 5)), -2 - batch['index'], batch['index'])]]
    np.testing.assert_array_equal(make(on=on).images(fed), expected)


@pytest.mark.parametrize('index', [[0, 1, 1], [0, 2, 3], [1, 2, 3]])
def test_a_lost_or_repeated_example_is_an_error(images, index):
  with pytest.raises(ValueError, match='each once'):
    make().images([{'image': images[:3], 'index': np.array(index)}])


def test_tokens(images):
  image_tokens, text_tokens = make(scale=3.0).tokens(images[:2], np.ones((2, 6), np.int32))
  assert image_tokens.shape == (2, 16, 3) and text_tokens.shape == (2, 6, 1)
  np.testing.assert_array_equal(image_tokens, 3.0 * images[:2].reshape(2, 16, 3))


def test_errors():
  with pytest.raises(UserError, match='batch size is 0'):
    make(0)
  with pytest.raises(UserError, match='no texts'):
    make().texts([])
  with pytest.raises(UserError, match='empty'):
    make().images([])
