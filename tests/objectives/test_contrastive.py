"""The softened contrastive and the sigmoid loss: exact against float64 at every number of devices, linear in memory."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import objectives_reference as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lightclip_jax.objectives import (
    distillation_loss, ring, sigmoid_contrastive_loss, softened_contrastive_loss, token_matching_loss)

D = 32
PERMUTES = re.compile(r' collective-permute(?:-start)?\(')
MODES = ('negative', 'positive', 'ignore')


def make_mesh(*shape, kind=AxisType.Auto):
  names = ('data', 'fsdp', 'tensor')[:len(shape)]
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[:int(np.prod(shape))])


@functools.cache
def compiled(mesh, axes, source, mode):
  """Loss, aux and the three gradients as one jitted function of (image, text, scale, alpha, beta, ids)."""
  def loss(image, text, scale, alpha, beta, ids):
    return softened_contrastive_loss(image, text, scale, alpha=alpha, beta=beta, target_source=source,
                                     duplicate_ids=ids, duplicates=mode, mesh=mesh, axes=axes)
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def check(mesh, axes, source, mode, size, seed=0, scale=None):
  """One random problem with repeated captions and one without, against the reference."""
  rng = np.random.default_rng(seed)
  image, text = reference.unit(seed, size, D), reference.unit(seed + 1, size, D)
  for ids in (rng.integers(0, max(2, size // 2), size).astype(np.int32), np.arange(size, dtype=np.int32)):
    alpha, beta, s = rng.uniform(), rng.uniform(), scale or rng.uniform(1, 20)
    args = image, text, ids
    if mesh is not None:
      args = jax.device_put(args, NamedSharding(mesh, PartitionSpec(axes)))
    (loss, _), grads = compiled(mesh, axes, source, mode)(*args[:2], np.float32(s), alpha, beta, args[2])
    expected, *expected_grads = reference.softened(image, text, s, alpha, beta, 0.1, source, ids, mode)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('source', ['cross', 'intra'])
@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_equals_the_reference_on_any_number_of_devices(devices, source, mode):
  for size in {1: (8, 25), 2: (64,), 4: (20,), 8: (8, 64)}[devices]:
    check(make_mesh(devices), ('data',), source, mode, size, seed=size)


@pytest.mark.slow
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('source', ['cross', 'intra'])
@pytest.mark.parametrize(('devices', 'size'), [(1, 512), (2, 512), (4, 512), (8, 200), (8, 512)])
def test_equals_the_reference_on_large_batches(devices, size, source, mode):
  check(make_mesh(devices), ('data',), source, mode, size, seed=size)


@pytest.mark.parametrize(('mesh', 'axes'), [(None, None), (make_mesh(2, 4), ('data', 'fsdp')),
                                            (make_mesh(4, 2), 'data'),
                                            (make_mesh(2, 2, 2), ('data', 'fsdp')),
                                            (make_mesh(2, 4, kind=AxisType.Explicit), ('data', 'fsdp')),
                                            (make_mesh(2, 4, kind=AxisType.Explicit), 'fsdp')])
def test_any_axes_of_any_mesh(mesh, axes):
  check(mesh, axes, 'intra', 'positive', 16)


@pytest.mark.parametrize('source', ['cross', 'intra'])
def test_blocks_of_rows_with_a_remainder(source, monkeypatch):
  monkeypatch.setattr(ring, 'BLOCK_ELEMENTS', 37 * 9)
  compiled.cache_clear()
  check(None, None, source, 'ignore', 37)
  check(make_mesh(2), 'data', source, 'ignore', 74)
  compiled.cache_clear()


def test_both_directions_of_the_ring(monkeypatch):
  monkeypatch.setattr(ring.Ring, 'both_ways', property(lambda self: self.size > 2))
  compiled.cache_clear()
  check(make_mesh(8), 'data', 'intra', 'positive', 40)   # a share of 5 has no even halves
  assert len(PERMUTES.findall(memory_and_text(80, alpha=0.1, beta=0.5, duplicates='positive', ids=True)[1])) == 8
  compiled.cache_clear()


def test_reference_gradient_is_the_slope_of_its_loss():
  image, text = reference.unit(0, 6, 4).astype(np.float64), reference.unit(1, 6, 4).astype(np.float64)
  for mode in MODES:   # "hard" targets, since the derivative takes targets as constants
    value = functools.partial(reference.softened, alpha=0.3, ids=np.array([0, 1, 1, 2, 3, 0]), mode=mode)
    _, d_image, d_text, d_scale = value(image, text, 3.0)
    step = np.random.default_rng(2).normal(size=(2, 6, 4)) * 1e-5
    moved = [value(image + k * step[0], text + k * step[1], 3.0 + k * 1e-5)[0] for k in (1, -1)]
    expected = (d_image * step[0]).sum() + (d_text * step[1]).sum() + d_scale * 1e-5
    np.testing.assert_allclose((moved[0] - moved[1]) / 2, expected, rtol=1e-6)


@pytest.mark.parametrize('dtype', [np.int8, np.uint16])
def test_ids_of_any_width_travel(dtype):
  image, text, ids = reference.unit(0, 16, D), reference.unit(1, 16, D), np.arange(16) // 2
  f = compiled(make_mesh(2), 'data', 'cross', 'positive')
  both = (f(image, text, 10.0, 0.3, 0.5, ids.astype(kind)) for kind in (dtype, np.int32))
  jax.tree.map(np.testing.assert_array_equal, *both)


def test_alpha_0_is_clip():
  image, text = reference.unit(0, 48, D), reference.unit(1, 48, D)
  logits = 10 * image.astype(np.float64) @ text.T
  clip = sum(np.mean(np.log(np.exp(x).sum(1)) - np.diag(x)) for x in (logits, logits.T)) / 2
  for alpha in (0.0, jnp.float32(0)):
    np.testing.assert_allclose(softened_contrastive_loss(image, text, 10.0, alpha=alpha)[0], clip, rtol=1e-6)


def test_aux_measures_the_batch():
  image = reference.unit(0, 8, D)
  loss, aux = softened_contrastive_loss(image, image, 50.0)
  assert aux.top1_image_to_text == aux.top1_text_to_image == 1 and aux.duplicate_fraction == 0
  np.testing.assert_allclose(aux.loss_over_log_batch, loss / np.log(8), rtol=1e-6)
  np.testing.assert_allclose((aux.loss_image_to_text + aux.loss_text_to_image) / 2, loss, rtol=1e-6)
  ids = np.array([0, 0, 1, 2, 3, 4, 5, 6], np.int32)
  swapped = image[[1, 0, 3, 2, 4, 5, 6, 7]]   # rows 0 and 1 share a caption, rows 2 and 3 do not
  _, aux = softened_contrastive_loss(image, swapped, 50.0, duplicate_ids=ids, duplicates='positive')
  assert aux.top1_image_to_text == 6 / 8 and aux.duplicate_fraction == 2 / 8


def test_numbers_may_have_an_axis_of_one():
  image, text = reference.unit(0, 8, D), reference.unit(1, 8, D)
  loss = functools.partial(softened_contrastive_loss, image, text)
  for alpha, beta in ((0.2, 0.5), (0.0, 0.0), (0.2, 0.0)):
    expected = loss(10.0, alpha=alpha, beta=beta, target_temperature=0.1)[0]
    for array in (np.array, jnp.array):
      scale, *others = (array([x], np.float32) for x in (10, alpha, beta, 0.1))
      assert loss(scale, **dict(zip(('alpha', 'beta', 'target_temperature'), others, strict=True)))[0] == expected


def test_targets_get_no_gradient():
  image, text = reference.unit(0, 8, D), reference.unit(1, 8, D)

  def loss(alpha, beta, temperature):
    return softened_contrastive_loss(image, text, 9.0, alpha=alpha, beta=beta, target_temperature=temperature)[0]
  grads = jax.grad(loss, argnums=(0, 1, 2))(0.5, 0.5, 0.1)
  assert grads == (0, 0, 0)


@pytest.mark.parametrize('scale', [1.0, 100.0])
@pytest.mark.parametrize('mode', MODES)
def test_degenerate_batches_are_finite(mode, scale):
  same = np.broadcast_to(reference.unit(0, 1, D), (8, D))
  opposite = same * np.where(np.arange(8) < 4, 1, -1)[:, None].astype(np.float32)
  one_caption = np.zeros(8, np.int32)
  for image, text in ((same, same), (same, opposite), (np.zeros_like(same), same)):
    (loss, aux), grads = compiled(None, None, 'intra', mode)(image, text, scale, 1.0, 1.0, one_caption)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, aux, grads)))
    expected = reference.softened(image, text, scale, 1.0, 1.0, 0.1, 'intra', one_caption, mode)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5, atol=1e-5)
  (_, aux), _ = compiled(None, None, 'intra', mode)(same, same, scale, 0.0, 0.0, np.arange(8, dtype=np.int32))
  assert aux.top1_image_to_text == aux.top1_text_to_image == 0   # a collapsed model has found nothing


def test_a_small_temperature_neither_overflows_nor_vanishes():
  image, text = reference.unit(0, 16, D), reference.unit(1, 16, D)
  loss, _ = softened_contrastive_loss(image, text, 10.0, alpha=0.5, beta=1.0, target_temperature=1e-3)
  np.testing.assert_allclose(loss, reference.softened(image, text, 10.0, 0.5, 1.0, 1e-3)[0], rtol=1e-5)


def test_one_pair_has_nothing_to_tell_apart():
  one = reference.unit(0, 1, D)
  (loss, aux), grads = compiled(None, None, 'intra', 'negative')(one, -one, 30.0, 0.5, 0.5, np.zeros(1, np.int32))
  assert loss == 0 and all(np.abs(g).max() == 0 for g in grads) and np.isfinite(aux.loss_over_log_batch)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), alpha=st.floats(0, 1), beta=st.floats(0, 1), scale=st.floats(0.5, 100))
def test_the_order_of_pairs_does_not_matter(seed, alpha, beta, scale):
  rng = np.random.default_rng(seed)
  image, text = reference.unit(seed, 24, D), reference.unit(seed + 1, 24, D)
  ids = rng.integers(0, 12, 24).astype(np.int32)
  order = rng.permutation(24)
  f = compiled(None, None, 'intra', 'positive')
  (loss, _), (d_image, d_text, d_scale) = f(image, text, scale, alpha, beta, ids)
  (moved, _), (m_image, m_text, m_scale) = f(image[order], text[order], scale, alpha, beta, ids[order])
  for got, want in ((moved, loss), (m_image, d_image[order]), (m_text, d_text[order]), (m_scale, d_scale)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * max(1, np.abs(want).max()))


def test_bfloat16_inputs_are_computed_in_float32():
  image, text = (jnp.asarray(reference.unit(k, 32, D), jnp.bfloat16) for k in (0, 1))
  f = jax.value_and_grad(lambda *x: softened_contrastive_loss(*x, 20.0, alpha=0.3, beta=0.5)[0], (0, 1))
  loss, grads = f(image, text)
  expected, d_image, _, _ = reference.softened(*(np.asarray(x, np.float32) for x in (image, text)), 20.0, 0.3, 0.5)
  assert loss.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(grads[0].astype(jnp.float32), d_image, atol=1e-2 * np.abs(d_image).max())


@pytest.mark.parametrize('devices', [0, 1, 4, 8])
def test_sigmoid_equals_the_reference(devices):
  mesh, axes = (make_mesh(devices), 'data') if devices else (None, None)
  f = jax.jit(jax.value_and_grad(lambda *x: sigmoid_contrastive_loss(*x, mesh=mesh, axes=axes)[0], (0, 1, 2, 3)))
  for size, scale, bias in ((8, 10.0, -3.0), (40, 100.0, -10.0)):
    image, text = reference.unit(size, size, D), reference.unit(1, size, D)
    expected, *expected_grads = reference.sigmoid(image, text, scale, bias)
    loss, grads = f(image, text, scale, bias)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1.0, 10.0, 100.0]), bias=st.floats(-20, 0), same=st.booleans(),
       half=st.booleans())
def test_sigmoid_is_finite_and_the_order_of_pairs_does_not_matter(seed, scale, bias, same, half):
  image, text = (reference.unit(seed + k, 8, D) for k in (0, 1))
  if same:
    image, text = np.broadcast_to(image[:1], image.shape), np.broadcast_to(image[:1], text.shape)
  if half:
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in (image, text))
  order = np.random.default_rng(seed).permutation(8)
  f = jax.value_and_grad(lambda *x: sigmoid_contrastive_loss(*x)[0], (0, 1, 2, 3))
  loss, grads = f(image, text, scale, bias)
  moved, moved_grads = f(image[order], text[order], scale, bias)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (loss, *grads))
  np.testing.assert_allclose(moved, loss, rtol=1e-5)
  for got, want in zip(moved_grads, (grads[0][order], grads[1][order], *grads[2:]), strict=True):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, rtol=1e-2 if half else 1e-4, atol=1e-5 * np.abs(want).max())


def test_sigmoid_top1():
  image = reference.unit(0, 8, D)
  _, aux = sigmoid_contrastive_loss(image, image[[1, 0, 2, 3, 4, 5, 6, 7]], 10.0, -5.0)
  assert aux.top1_image_to_text == aux.top1_text_to_image == 6 / 8


def memory_and_text(size, **options):
  mesh = make_mesh(8)
  place = NamedSharding(mesh, PartitionSpec('data'))
  embeddings = jax.ShapeDtypeStruct((size, 512), jnp.float32, sharding=place)
  traced = {name: options.pop(name) for name in ('alpha', 'beta') if name in options}
  if options.pop('ids', False):
    traced['duplicate_ids'] = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=place)

  def loss(image, text, scale, traced):
    return softened_contrastive_loss(image, text, scale, mesh=mesh, axes='data', **traced, **options)[0]
  done = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(embeddings, embeddings, 1.0, traced).compile()
  return done.memory_analysis().temp_size_in_bytes, done.as_text()


@pytest.mark.parametrize(('mebibytes', 'options'), [
  (64, dict(alpha=0.1, beta=0.5, target_source='intra', duplicates='positive', ids=True)),
  (64, dict(alpha=0.1, beta=0.5, target_source='cross', duplicates='ignore', ids=True)),
  (32, dict(alpha=0.1)),
  (32, dict()),
])
def test_memory_is_linear_and_no_batch_is_gathered(mebibytes, options):
  used, text = memory_and_text(8192, **options)
  assert used <= mebibytes * 2 ** 20
  assert memory_and_text(16384, **options)[0] <= 2 * used
  assert 'all-gather' not in text
  # All that travels goes at once: one transfer in the loop and one home, forward and backward.
  assert len(PERMUTES.findall(text)) == 4
  assert not re.search(r'\[8192,(8192|512)\]', text)   # neither the matrix nor a whole batch of embeddings


@pytest.mark.parametrize('size', [2047, 1025])
def test_blocks_are_as_small_where_they_do_not_divide_the_batch(size, monkeypatch):
  monkeypatch.setattr(ring, 'BLOCK_ELEMENTS', 8 * 2048)   # a last block of 255 rows needed 30 times as much

  def temporaries(size):
    pair = [jax.ShapeDtypeStruct((size, D), jnp.float32)] * 2
    f = jax.jit(jax.grad(lambda *pair: softened_contrastive_loss(*pair, 10.0)[0]))
    return f.lower(*pair).compile().memory_analysis().temp_size_in_bytes
  assert temporaries(size) <= 1.5 * temporaries(2048)


@pytest.mark.parametrize(('length', 'most', 'runs'), [
  (6, 8, {6}), (12, 4, {4}), (12, 5, {4}), (9, 8, {5, 4}), (23, 4, {4, 3}), (65535, 8, {8, 7}), (7, 1, {1})])
def test_rows_are_scanned_in_even_runs(length, most, runs):
  xs, seen = np.arange(length), set()

  def count(total, rows):
    seen.add(len(rows))
    return total + rows.sum(), rows + 1
  total, ys = ring._scan_rows(count, 0, jnp.asarray(xs), most)
  np.testing.assert_array_equal(ys, xs + 1)
  assert total == xs.sum() and seen == runs


@pytest.mark.parametrize(('message', 'change'), [
  (r'\(8, 32\).*\(6, 32\)', dict(text=np.zeros((6, 32)))),
  (r'\(8, 32\).*\(8, 16\)', dict(text=np.zeros((8, 16)))),
  (r'logit_scale.*\(2,\)', dict(scale=np.ones(2))),
  (r'alpha is 1\.5', dict(alpha=1.5)),
  (r'alpha is 1\.5', dict(alpha=np.full(1, 1.5))),
  (r'beta has shape \(2,\)', dict(beta=np.zeros(2))),
  (r'target_temperature has shape \(2,\)', dict(target_temperature=np.ones(2))),
  (r'beta is -0\.1', dict(beta=-0.1)),
  (r'target_temperature is 0', dict(target_temperature=0)),
  (r"target_source is 'both'.*'intra'", dict(target_source='both')),
  (r"duplicates is 'drop'.*'ignore'", dict(duplicates='drop')),
  (r'duplicate_ids.*\(7,\).*\(8,\)', dict(duplicate_ids=np.zeros(7, np.int32))),
  (r'without a mesh', dict(axes='data')),
  (r"'batch'.*data", dict(mesh=make_mesh(2), axes='batch')),
  (r'12.*8 devices.*multiple of 8', dict(image=np.zeros((12, 32)), text=np.zeros((12, 32)), mesh=make_mesh(8))),
])
def test_bad_input_is_named(message, change):
  args = dict(image=np.zeros((8, 32), np.float32), text=np.zeros((8, 32), np.float32), scale=1.0) | change
  with pytest.raises(ValueError, match=message):
    softened_contrastive_loss(args.pop('image'), args.pop('text'), args.pop('scale'), **args)


@pytest.mark.parametrize('loss', [
  functools.partial(softened_contrastive_loss, logit_scale=5.0, alpha=0.2, beta=0.5),
  functools.partial(sigmoid_contrastive_loss, logit_scale=5.0, logit_bias=-3.0),
  lambda *tokens, mesh=None: token_matching_loss(*(x[:, None] for x in tokens), np.ones((16, 1), bool), 5.0, group_size=2,
                                                 mesh=mesh),
  lambda *student, mesh=None: distillation_loss(*student, *student[::-1], 5.0, mesh=mesh),
], ids=['softened', 'sigmoid', 'token matching', 'distillation'])
def test_a_mesh_with_explicit_axes_takes_any_inputs(loss):
  """`jax.make_mesh` makes such ones where it is not told."""
  mesh, pair = make_mesh(8, kind=AxisType.Explicit), (reference.unit(0, 16, D), reference.unit(1, 16, D))
  both = (jax.jit(jax.value_and_grad(lambda *x, m=m: loss(*x, mesh=m)[0], (0, 1)))(*pair) for m in (None, mesh))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *both)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
def test_sigmoid_is_float32_also_where_numbers_are_64_bits_wide(dtype):
  with jax.enable_x64(True):
    image, text = (jnp.asarray(reference.unit(seed, 16, D), dtype) for seed in (0, 1))
    loss = lambda image: sigmoid_contrastive_loss(image, text, 5.0, -3.0, mesh=make_mesh(8))  # noqa: E731
    (value, aux), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(image)
    softened = softened_contrastive_loss(image, text, 5.0)[1]
  assert {x.dtype for x in (value, *jax.tree.leaves((aux, softened)))} == {np.dtype('float32')} and grad.dtype == dtype


def test_the_gradient_of_a_gradient_leaves_the_targets_alone():
  image, text = map(jnp.asarray, (reference.unit(0, 8, D), reference.unit(1, 8, D)))

  def plain(image):
    logits, cosine = 5 * image @ text.T, jax.lax.stop_gradient(image @ text.T)
    total = 0.0
    for s, c in ((logits, cosine), (logits.T, cosine.T)):
      w = jax.nn.softmax(jnp.where(jnp.eye(8, dtype=bool), -jnp.inf, c / 0.1), axis=1)
      total -= ((0.7 * jnp.eye(8) + 0.3 * w) * jax.nn.log_softmax(s, axis=1)).sum() / 16
    return total

  ours = lambda image: softened_contrastive_loss(image, text, 5.0, alpha=0.3, beta=1.0, target_source='cross')[0]  # noqa: E731
  along = jnp.asarray(reference.unit(2, 8, D))
  first, second = (jax.jit(jax.grad(lambda x, f=f: (jax.grad(f)(x) * along).sum()))(image) for f in (ours, plain))
  np.testing.assert_allclose(first, second, atol=1e-4 * np.abs(second).max())


@pytest.mark.parametrize('mode', MODES)
def test_the_gradient_of_a_gradient_is_finite_at_the_largest_scale(mode):
  axes, ids = np.eye(5, dtype=np.float32), jnp.array([0, 0, 1, 2])
  image, text = axes[[0, 0, 1, 2]], axes[[0, 0, 3, 4]]
  image[0] *= -1   # the duplicate, which is ignored, lies e^100 above all that is counted

  def steepness(image, scale):
    def f(image, scale):
      return softened_contrastive_loss(image, text, scale, alpha=0.3, beta=0.5, duplicate_ids=ids, duplicates=mode)[0]
    return sum(jnp.sum(g ** 2) for g in jax.grad(f, (0, 1))(image, scale))
  assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(steepness, (0, 1)))(jnp.asarray(image), 100.0))


def test_sigmoid_names_a_bad_bias():
  with pytest.raises(ValueError, match=r'logit_bias.*\(3,\)'):
    sigmoid_contrastive_loss(np.zeros((8, 32)), np.zeros((8, 32)), 1.0, np.zeros(3))
