"""Token matching, masked words, schedules and the named sum."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import objectives_reference as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lightclip_jax import config
from lightclip_jax.objectives import Objective, Scales, masked_lm_loss, schedule_value, token_matching_loss
from lightclip_jax.outputs import Outputs

B, P, W, D, GROUP = 32, 6, 5, 8, 4


def tokens(seed=0, size=B, patches=P):
  """(image tokens, text tokens, mask): texts of 0 to W words in any place."""
  rng = np.random.default_rng(seed)
  mask = rng.permuted(np.arange(W)[None] < rng.integers(0, W + 1, size)[:, None], axis=1)
  return reference.unit(seed, size, patches, D), reference.unit(seed + 1, size, W, D), mask


def make_mesh(devices):
  return jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


@functools.cache
def compiled(devices=0, iterations=20, group=GROUP):
  mesh = make_mesh(devices) if devices else None

  def loss(image, text, scale, mask):
    return token_matching_loss(image, text, mask, scale, group_size=group, num_iterations=iterations, mesh=mesh,
                               axes='data' if devices else None)
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def dense(image, text, scale, mask):
  """The loss and the plans of true pairs, one small problem at a time in float64, over valid pairs only."""
  losses, plans = [], np.zeros((len(image), image.shape[1], W))
  for start in range(0, len(image), GROUP):
    kept = [i for i in range(start, start + GROUP) if mask[i].any()]
    m = np.zeros((len(kept), len(kept)))
    for a, i in enumerate(kept):
      for b, j in enumerate(kept):
        cosine = image[i].astype(np.float64) @ text[j][mask[j]].T
        plan = reference.sinkhorn(1 - cosine, 0.05)[0]
        m[a, b] = (plan * cosine).sum() / min(cosine.shape)
        if i == j:
          plans[i][:, mask[i]] = plan
    for x in (scale * m, scale * m.T):
      losses += list(np.log(np.exp(x).sum(1)) - np.diag(x))
  return np.mean(losses), plans


def test_token_matching_equals_the_reference():
  image, text, mask = tokens(size=8)
  (loss, aux), _ = compiled(iterations=500)(image, text, 7.0, mask)
  expected, plans = dense(image, text, 7.0, mask)
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  np.testing.assert_allclose(aux.plans_BxPxW, plans, atol=1e-3)
  assert not mask.any(1).all()   # else a text without words was not tested


def test_token_matching_gradient_holds_the_plan():
  image, text, mask = tokens(size=8)
  _, (d_image, d_text, d_scale) = compiled()(image, text, 7.0, mask)

  def value(image, text, scale):   # an einsum with the plans of the unmoved tokens
    m = np.einsum('gijpw,gipd,gjwd->gij', plans, image.reshape(-1, GROUP, P, D), text.reshape(-1, GROUP, W, D))
    m = scale * m / np.clip(mask.sum(1), 1, P).reshape(-1, 1, GROUP)
    total = 0.0
    for x, v in zip(m, mask.any(1).reshape(-1, GROUP), strict=True):
      x = x[v][:, v]
      total += sum((np.log(np.exp(y).sum(1)) - np.diag(y)).sum() for y in (x, x.T))
    return total / (2 * mask.any(1).sum())
  plans = np.zeros((2, GROUP, GROUP, P, W))
  for shift in range(GROUP):   # the plan of every pair of a group: turn the texts under the images
    turned = np.concatenate([np.roll(np.arange(GROUP), -shift) + g * GROUP for g in range(2)])
    found = compiled()(image, text[turned], 7.0, mask[turned])[0][1].plans_BxPxW
    for i, j in enumerate(turned):
      plans[i // GROUP, i % GROUP, j % GROUP] = found[i]
  step = [np.random.default_rng(k).normal(size=x.shape) * 1e-4 for k, x in enumerate((image, text))]
  args = image.astype(np.float64), text.astype(np.float64), 7.0
  moved = [value(args[0] + k * step[0], args[1] + k * step[1], 7.0 + k * 1e-4) for k in (1, -1)]
  slope = (np.asarray(d_image) * step[0]).sum() + (np.asarray(d_text) * step[1]).sum() + d_scale * 1e-4
  np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2, rtol=1e-3)


def test_matching_by_the_maximum_is_filips():
  image, text, mask = tokens(size=8)

  def loss(image, text, matched=jnp.asarray(mask)):
    return token_matching_loss(image, text, matched, 7.0, group_size=GROUP, kind='max')

  def expected(image, text):   # text by text, over valid words only
    losses = []
    for start in range(0, 8, GROUP):
      kept = [i for i in range(start, start + GROUP) if mask[i].any()]
      cosine = [[image[i] @ text[j][mask[j]].T for j in kept] for i in kept]
      for m in (jnp.array([[c.max(1).mean() for c in row] for row in cosine]),
                jnp.array([[c.max(0).mean() for c in row] for row in cosine]).T):
        losses.append(jax.nn.logsumexp(7.0 * m, axis=1) - 7.0 * jnp.diag(m))
    return jnp.concatenate(losses).mean()

  (got, aux), slopes = jax.value_and_grad(loss, (0, 1), has_aux=True)(image, text)
  want, wanted_slopes = jax.value_and_grad(expected, (0, 1))(jnp.asarray(image), jnp.asarray(text))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for slope, wanted in zip(slopes, wanted_slopes, strict=True):
    np.testing.assert_allclose(slope, wanted, atol=1e-6)
  np.testing.assert_array_equal(aux.plans_BxPxW.sum(1), mask)   # every word has one patch
  assert loss(image, text, mask & False)[0] == 0


@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_token_matching_is_the_same_on_any_number_of_devices(devices):
  image, text, mask = tokens()
  (loss, aux), grads = compiled()(image, text, 7.0, mask)
  f = compiled(devices)
  place = NamedSharding(make_mesh(devices), PartitionSpec('data'))
  (sharded, sharded_aux), sharded_grads = f(*jax.device_put((image, text), place), 7.0, jax.device_put(mask, place))
  for got, want in zip(jax.tree.leaves((sharded, sharded_aux, sharded_grads)), jax.tree.leaves((loss, aux, grads)),
                       strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  if devices == 8:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in (image, text, mask)]
    text_of = f.lower(shapes[0], shapes[1], 7.0, shapes[2]).compile().as_text()
    assert not any(name in text_of for name in ('all-gather', 'all-to-all', 'collective-permute'))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), words=st.sampled_from(['none', 'one', 'any', 'all']),
       scale=st.sampled_from([1.0, 100.0]), same=st.booleans(), half=st.booleans(), patches=st.sampled_from([P, 2]))
def test_token_matching_is_finite(seed, words, scale, same, half, patches):
  image, text, mask = tokens(seed, 8, patches)   # 2 patches: more words than patches
  one = np.arange(W)[None] == np.arange(8)[:, None] % W
  mask = {'none': mask & False, 'one': one, 'any': mask, 'all': mask | True}[words]
  if same:
    image, text = np.broadcast_to(image[:1, :1], image.shape), np.broadcast_to(image[:1, :1], text.shape)
  if half:
    image, text = jnp.asarray(image, jnp.bfloat16), jnp.asarray(text, jnp.bfloat16)
  (loss, aux), grads = compiled()(image, text, scale, mask)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((loss, aux, grads)))
  np.testing.assert_allclose(aux.plans_BxPxW.sum((1, 2)), np.minimum(mask.sum(1), patches), atol=1e-4)
  if words == 'none':
    assert loss == 0 and all(np.abs(g).max() == 0 for g in grads)
  if words == 'all' and same:
    np.testing.assert_allclose(loss, np.log(GROUP), rtol=1e-3)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1.0, 20.0, 100.0]))
def test_token_matching_does_not_depend_on_the_order_of_pairs_groups_patches_or_words(seed, scale):
  image, text, mask = tokens(seed, 8)
  rng = np.random.default_rng(seed)
  pairs = rng.permuted(np.arange(8).reshape(-1, GROUP), axis=1)[rng.permutation(8 // GROUP)].reshape(-1)
  patches, words = rng.permutation(P), rng.permutation(W)
  (loss, aux), (d_image, d_text, d_scale) = compiled()(image, text, scale, mask)
  (moved, moved_aux), (m_image, m_text, m_scale) = compiled()(
    image[pairs][:, patches], text[pairs][:, words], scale, mask[pairs][:, words])
  np.testing.assert_allclose(moved, loss, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(moved_aux.plans_BxPxW, aux.plans_BxPxW[pairs][:, patches][:, :, words], atol=1e-4)
  for got, want in ((m_image, d_image[pairs][:, patches]), (m_text, d_text[pairs][:, words]), (m_scale, d_scale)):
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize('kind', ['sinkhorn', 'max'])
def test_token_matching_of_texts_without_a_position_is_0(kind):
  image, text, mask = tokens(size=8)

  def loss(image, text, mesh=None):
    return token_matching_loss(image, text, mask[:, :0], 7.0, group_size=GROUP, kind=kind, mesh=mesh)
  for mesh in (None, make_mesh(2)):
    (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(image, text[:, :0], mesh)
    assert value == 0 and np.abs(grad).max() == 0 and aux.plans_BxPxW.shape == (8, P, 0)
    masked = compiled()(image, text, 7.0, mask & False)[0][1]
    assert all(getattr(aux, name).shape == getattr(masked, name).shape for name in (
      'similarity_B', 'top1_image_to_text', 'top1_text_to_image'))


def test_token_matching_finds_what_belongs_together():
  image = reference.unit(0, 8, P, D)
  (loss, aux), _ = compiled()(image, image[:, 1:], 50.0, np.ones((8, W), bool))   # the words are five of the patches
  assert aux.top1_image_to_text == aux.top1_text_to_image == 1 and loss < 0.1
  np.testing.assert_allclose(aux.similarity_B, 1, atol=0.02)
  np.testing.assert_array_equal(np.argmax(aux.plans_BxPxW, 1), np.broadcast_to(np.arange(1, P), (8, W)))


@pytest.mark.parametrize(('message', 'shapes', 'options'), [
  (r'\(8, 6, 4\).*\(6, 5, 4\)', ((8, 6, 4), (6, 5, 4), (6, 5)), {}),
  (r'\(8, 6, 4\).*\(8, 5, 3\)', ((8, 6, 4), (8, 5, 3), (8, 5)), {}),
  (r'image tokens have shape \(8, 0, 4\); .* at least one', ((8, 0, 4), (8, 5, 4), (8, 5)), {}),
  (r'\(8, 4\)', ((8, 6, 4), (8, 5, 4), (8, 4)), {}),
  (r'8.*groups of 3', ((8, 6, 4), (8, 5, 4), (8, 5)), dict(group_size=3)),
  (r'8.*2 devices in groups of 8.*16', ((8, 6, 4), (8, 5, 4), (8, 5)),
   dict(group_size=8, mesh=make_mesh(2))),
  (r'epsilon=0, num_iterations=20; both must be positive', ((8, 6, 4), (8, 5, 4), (8, 5)), dict(epsilon=0)),
  (r'num_iterations=-3; both must be positive', ((8, 6, 4), (8, 5, 4), (8, 5)), dict(num_iterations=-3)),
  (r'batch of 2 .*groups of 4 .group_size.', ((2, 6, 4), (2, 5, 4), (2, 5)), {}),
  (r'group_size is 0', ((8, 6, 4), (8, 5, 4), (8, 5)), dict(group_size=0)),
  (r"kind is 'mean'; it must be 'sinkhorn' or 'max'", ((8, 6, 4), (8, 5, 4), (8, 5)), dict(kind='mean')),
])
def test_token_matching_names_bad_input(message, shapes, options):
  with pytest.raises(ValueError, match=message):
    token_matching_loss(*map(np.zeros, shapes), 1.0, **(dict(group_size=4) | options))


def test_masked_lm_is_the_weighted_mean():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(3, 4, 7)).astype(np.float32) * 5, rng.integers(0, 7, (3, 4))
  weights = rng.integers(0, 2, (3, 4)).astype(np.float32)
  log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
  picked = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
  (loss, aux), grad = jax.value_and_grad(masked_lm_loss, has_aux=True)(jnp.asarray(logits), labels, weights)
  np.testing.assert_allclose(loss, -(picked * weights).sum() / weights.sum(), rtol=1e-5)
  np.testing.assert_allclose(aux.accuracy, ((logits.argmax(-1) == labels) * weights).sum() / weights.sum())
  slope = (np.exp(log_p) - np.eye(7)[labels]) * weights[..., None] / weights.sum()
  np.testing.assert_allclose(grad, slope, atol=1e-6)


def test_masked_lm_without_a_masked_word_is_0():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.bfloat16)
  (loss, aux), grad = jax.value_and_grad(masked_lm_loss, has_aux=True)(logits, np.zeros((2, 3), int), np.zeros((2, 3)))
  assert loss == 0 and loss.dtype == jnp.float32 and aux.accuracy == 0 and (grad == 0).all()


@pytest.mark.parametrize('label', [-100, 5])
@pytest.mark.parametrize('logit', [0.0, np.inf, np.nan])
def test_masked_lm_does_not_look_at_filling(label, logit):
  logits, labels = np.random.default_rng(0).normal(size=(1, 3, 5)).astype(np.float32), np.array([[1, 2, 3]])
  weights = np.array([[1, 1, 0]], np.float32)
  wanted = masked_lm_loss(jnp.asarray(logits), labels, weights)[0]
  logits[0, 2], labels[0, 2] = logit, label
  (loss, _), grad = jax.value_and_grad(masked_lm_loss, has_aux=True)(jnp.asarray(logits), labels, weights)
  assert loss == wanted and np.isfinite(grad).all()


@pytest.mark.parametrize('weight', [np.nan, np.inf])
def test_a_bad_weight_of_masked_lm_is_seen_in_the_loss_and_in_the_gradient(weight):
  logits, labels = np.random.default_rng(0).normal(size=(1, 3, 5)).astype(np.float32), np.array([[1, 2, 3]])
  weights = np.array([[1, weight, 0]], np.float32)
  (loss, _), grad = jax.value_and_grad(masked_lm_loss, has_aux=True)(jnp.asarray(logits), labels, weights)
  assert not np.isfinite(loss) and not np.isfinite(grad).all()


def test_masked_lm_names_bad_shapes():
  with pytest.raises(ValueError, match=r'\(2, 3, 5\).*\(2, 4\)'):
    masked_lm_loss(np.zeros((2, 3, 5)), np.zeros((2, 4), int), np.zeros((2, 4)))


def test_schedules():
  ramp = config.Schedule(0.2, 1.0, begin=0.25, finish=0.75)
  got = [float(schedule_value(ramp, p)) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
  np.testing.assert_allclose(got, [0.2, 0.2, 0.6, 1.0, 1.0], rtol=1e-6)
  cosine = config.Schedule(0.0, 1.0, shape='cosine')
  np.testing.assert_allclose(jax.vmap(lambda p: schedule_value(cosine, p))(jnp.array([0.0, 0.25, 0.5, 1.0])),
                             [0, (1 - np.sqrt(0.5)) / 2, 0.5, 1], atol=1e-6)
  step = config.Schedule(0.0, 1.0, begin=0.5, finish=0.5)
  assert [float(schedule_value(step, p)) for p in (0.49, 0.5)] == [0, 1]
  assert schedule_value(config.constant(0.3), jnp.float32(0.7)) == 0.3   # a Python number, known when compiling


def batch():
  image, text, mask = tokens()
  outputs = Outputs(reference.unit(5, B, D), reference.unit(6, B, D), image, text,
                    np.random.default_rng(0).normal(size=(B, 2, 9)).astype(np.float32))
  return outputs, dict(duplicate_ids=np.arange(B, dtype=np.int32) // 2, word_mask=mask,
                       masked_lm_labels=np.ones((B, 2), np.int32), masked_lm_weights=np.ones((B, 2), np.float32))


@pytest.mark.parametrize('devices', [0, 8])
def test_the_sum_of_the_terms(devices):
  mesh = jax.make_mesh((4, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2) if devices else None
  options = config.Objective(token_matching=config.TokenMatching(config.Schedule(0.0, 0.5), group_size=4),
                             masked_lm=config.MaskedLM(config.constant(0.25)))
  objective = Objective.from_config(options, mesh, 'data' if devices else None)
  assert objective.needs_tokens and objective.needs_masked_lm
  outputs, labels = batch()
  f = jax.jit(lambda outputs, progress, **kw: objective(outputs, Scales(20.0, -10.0, 5.0), progress=progress, **kw))
  total, metrics = f(outputs, 0.5, **labels)
  assert set(metrics) == {
    'loss', 'loss_contrastive', 'loss_token_matching', 'loss_masked_lm', 'loss_over_log_batch', 'top1_image_to_text',
    'top1_text_to_image', 'alpha', 'beta', 'masked_lm_accuracy', 'token_matching_top1', 'duplicate_fraction'}
  parts = [metrics[f'loss_{name}'] for name in ('contrastive', 'token_matching', 'masked_lm')]
  np.testing.assert_allclose(total, parts[0] + 0.25 * parts[1] + 0.25 * parts[2], rtol=1e-6)
  assert metrics['duplicate_fraction'] == 1 and metrics['alpha'] == np.float32(0.1) and metrics['beta'] == 0.5
  expected, *_ = reference.softened(outputs.image_embedding, outputs.text_embedding, 20.0, 0.1, 0.5, 0.1, 'intra',
                                    labels['duplicate_ids'], 'positive')
  np.testing.assert_allclose(parts[0], expected, rtol=1e-5)


def test_a_term_of_weight_0_is_not_computed():
  off = config.constant(0.0)
  options = config.Objective(config.Contrastive(kind='sigmoid'), config.TokenMatching(off), config.MaskedLM(off))
  objective = Objective.from_config(options)
  outputs, _ = batch()
  total, metrics = objective(Outputs(outputs.image_embedding, outputs.text_embedding), Scales(10.0, -5.0), progress=0.0)
  assert not objective.needs_tokens and not objective.needs_masked_lm
  assert set(metrics) == {'loss', 'loss_contrastive', 'top1_image_to_text', 'top1_text_to_image'}
  expected, *_ = reference.sigmoid(outputs.image_embedding, outputs.text_embedding, 10.0, -5.0)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  with pytest.raises(ValueError, match='all weights'):
    Objective.from_config(config.replace(options, contrastive=dict(weight=off)))
