"""The whole model: parameters, outputs, the untouched text at the start, errors."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightclip_jax import config
from lightclip_jax.errors import UserError
from lightclip_jax.models import fusion, lightclip, norm

BATCH, WORDS, MASKED, VOCABULARY = 4, 10, 2, 40


def small(**changes):
  base = config.replace(config.Model(), embed_dim=16, token_dim=8, batch_norm='group:2',
                        image=dict(name='vit_ti', size=32), text=dict(width=32, heads=4, depth=2, context=12,
                                                                      vocab_size=VOCABULARY),
                        fusion=dict(stages=((2, 1), (4, 2)), heads=4))
  return config.replace(base, **changes)


def batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, VOCABULARY, (BATCH, WORDS)).astype(np.int32)
  tokens[:, 7] = 3
  masked = tokens.copy()
  masked[:, 2:2 + MASKED] = 1
  positions = np.tile(np.arange(2, 2 + MASKED, dtype=np.int32), (BATCH, 1))
  return rng.integers(0, 256, (BATCH, 32, 32, 3)).astype(np.uint8), tokens, masked, positions


@pytest.fixture(scope='module')
def variables():
  return lightclip.init_variables(small(), jax.random.key(0))


def run(variables, model=None, params=None, **options):
  return jitted(model or small(), **options)({**variables, 'params': params or variables['params']}, *batch())


@functools.cache
def jitted(model, train=False):
  clip, mutable = lightclip.LightCLIP(model), [norm.STATISTICS] if train else False
  return jax.jit(lambda variables, images, tokens, masked, positions: clip.apply(
      variables, images, tokens, masked_tokens_BxW=masked, masked_positions_BxK=positions, token_heads=True,
      train=train, mutable=mutable))


def with_open_gates(params):
  return jax.tree_util.tree_map_with_path(lambda k, x: x + 1 if 'gate' in jax.tree_util.keystr(k) else x, params)


def test_outputs(variables):
  out = run(variables)
  images, tokens, _, _ = batch()
  assert out.image_embedding.shape == out.text_embedding.shape == (BATCH, 16)
  assert out.image_tokens.shape == (BATCH, 4, 8) and out.text_tokens.shape == (BATCH, WORDS, 8)
  assert out.masked_lm_logits.shape == (BATCH, MASKED, VOCABULARY) and out.masked_lm_logits.dtype == jnp.float32
  for unit in (out.image_embedding, out.text_embedding, out.image_tokens, out.text_tokens):
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, atol=1e-5)
  inference = {**variables, 'params': lightclip.inference_parameters(variables['params'])}
  model = lightclip.LightCLIP(small())
  np.testing.assert_allclose(model.apply(inference, images, method='encode_image'), out.image_embedding, atol=1e-5)
  np.testing.assert_allclose(model.apply(inference, tokens, method='encode_text'), out.text_embedding, atol=1e-5)
  plain = model.apply(inference, images, tokens)
  assert plain.image_tokens is None and plain.text_tokens is None and plain.masked_lm_logits is None
  for ours, theirs in zip(model.apply(variables, images, tokens, method='encode_tokens'),
                          (out.image_tokens, out.text_tokens), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_tokens_of_a_stage():
  # ResNet-18 at 64 px has stages of 16, 8, 4 and 2 patches a side.
  for stage, side in {0: 2, 1: 16, 2: 8, 4: 2}.items():
    model = small(image=config.ImageTower('resnet18', size=64), token_stage=stage)
    shapes = jax.eval_shape(functools.partial(lightclip.init_variables, model), jax.random.key(0))
    encode = functools.partial(lightclip.LightCLIP(model).apply, method='encode_tokens')
    image, _ = jax.eval_shape(encode, shapes, jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.zeros((1, WORDS), jnp.int32))
    assert image.shape == (1, side * side, model.token_dim), stage
  with pytest.raises(UserError, match='model.token_stage is 5; it must be an image stage, 1 to 4'):
    lightclip.init_variables(small(token_stage=5), jax.random.key(0))


def test_parameters_of_training_alone_are_under_one_subtree(variables):
  params = variables['params']
  assert set(params) == {'image', 'text', 'image_projection', 'text_projection', 'logit_scale', 'training_only'}
  assert {'fusion', 'masked_lm', 'token_logit_scale', 'logit_bias', 'image_token_projection',
          'text_token_projection'} == set(params['training_only'])
  images, tokens, _, _ = batch()
  bare = jax.eval_shape(lightclip.LightCLIP(small()).init, jax.random.key(0), images, tokens)['params']
  kept = lightclip.inference_parameters(params)
  shapes = jax.tree.map(jnp.shape, kept)
  assert shapes == jax.tree.map(jnp.shape, {k: v for k, v in bare.items() if k != 'training_only'})
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  np.testing.assert_allclose(np.exp(params['logit_scale']), 1 / 0.07, rtol=1e-6)


def test_batch_statistics_follow_the_tower():
  shapes = jax.eval_shape(lambda: lightclip.init_variables(small(image=dict(name='mobilenet_v2')), jax.random.key(0)))
  assert set(shapes['batch_stats']) == {'image'} and len(jax.tree.leaves(shapes['batch_stats'])) == 2 * 52
  assert jax.eval_shape(lambda: lightclip.init_variables(small(), jax.random.key(0)))['batch_stats'] == {}


@pytest.mark.slow
@pytest.mark.parametrize('op', ['cross_attention', 'add'])
def test_a_zero_gate_leaves_the_masked_text_untouched_exactly(op):
  model = small(fusion=dict(op=op))
  variables = lightclip.init_variables(model, jax.random.key(0))
  stages = tuple(jax.random.normal(jax.random.key(s), (BATCH, 8 // s, 8 // s, 3)) for s in (1, 1, 2, 4))
  hidden = jax.random.normal(jax.random.key(9), (BATCH, WORDS, 32))
  module = fusion.Fusion(model.fusion)
  params = module.init(jax.random.key(0), 1, hidden, stages)
  np.testing.assert_array_equal(module.apply(params, 1, hidden, stages), hidden)
  assert np.abs(module.apply(with_open_gates(params), 1, hidden, stages) - hidden).max() > 1e-3
  closed, opened = run(variables, model), run(variables, model, with_open_gates(variables['params']))
  np.testing.assert_array_equal(closed.text_embedding, opened.text_embedding)   # plain text never sees the image
  np.testing.assert_array_equal(closed.text_tokens, opened.text_tokens)
  assert np.abs(closed.masked_lm_logits - opened.masked_lm_logits).max() > 1e-4


def test_masked_lm_reads_the_masked_text_and_reaches_the_image_only_through_gates(variables):
  def gradient(params):
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(run(variables, params=p).masked_lm_logits))))(params)

  closed, opened = gradient(variables['params']), gradient(with_open_gates(variables['params']))
  norms = [max(float(jnp.abs(x).max()) for x in jax.tree.leaves(g['image'])) for g in (closed, opened)]
  assert norms[0] == 0 and norms[1] > 0
  for place in ('stage2_block1', 'stage4_block2'):   # the latter after the last block
    assert np.abs(closed['training_only']['fusion'][place]['gate']).max() > 0, 'a closed gate learns to open'
  assert np.abs(closed['text']['token_embedding']['embedding']).max() > 0


@pytest.mark.parametrize('causal', [False, True])
def test_masked_lm_logits_are_those_that_all_positions_have(variables, causal):
  closed, model = variables, small(text=dict(causal=causal))
  variables = {**variables, 'params': with_open_gates(variables['params'])}
  images, tokens, masked, positions = batch()
  everywhere = np.tile(np.arange(WORDS, dtype=np.int32), (BATCH, 1))
  some, every = (jitted(model)(variables, images, tokens, masked, at).masked_lm_logits for at in (positions, everywhere))
  np.testing.assert_allclose(some, np.take_along_axis(every, positions[..., None], axis=1), atol=1e-5)
  assert np.ptp(every, axis=1).min() > 1e-4   # positions differ

  def without_images(clip):
    return clip._masked_lm(clip.text(masked)[1])

  np.testing.assert_allclose(jitted(model)(closed, images, tokens, masked, everywhere).masked_lm_logits,
                             lightclip.LightCLIP(model).apply(closed, method=without_images), atol=1e-5)


def test_bfloat16_is_close_to_float32(variables):
  exact, rough = run(variables), run(variables, small(compute_dtype='bfloat16'))
  for a, b in ((exact.image_embedding, rough.image_embedding), (exact.text_embedding, rough.text_embedding)):
    assert b.dtype == jnp.float32
    assert np.min(np.sum(a * b, -1)) > 0.995
  np.testing.assert_allclose(exact.masked_lm_logits, rough.masked_lm_logits, atol=0.05)


def test_normalize_is_openai_clips():
  pixel = np.array([[[[0, 128, 255]]]], np.uint8)
  expected = (pixel / 255 - np.array(lightclip.IMAGE_MEAN)) / np.array(lightclip.IMAGE_STD)
  np.testing.assert_allclose(lightclip.normalize(pixel, jnp.float32), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('log_scale, sign, value, gradient', [
    (1.0, 1, np.e, np.e), (1.0, -1, np.e, -np.e), (6.0, 1, 100, 100), (6.0, -1, 100, 0), (np.log(100.0), -1, 100, 0)])
def test_clipped_scale(log_scale, sign, value, gradient):
  scale, slope = jax.value_and_grad(lambda x: sign * lightclip.clipped_scale(x))(jnp.float32(log_scale))
  np.testing.assert_allclose([sign * scale, slope], [value, gradient], rtol=1e-5)


@pytest.mark.parametrize('changes, words', [
    (dict(fusion=dict(stages=((5, 1),))), ['stage 5', '1 to 4']), (dict(fusion=dict(stages=((0, 1),))), ['stage 0']),
    (dict(fusion=dict(stages=((1, 3),))), ['block 3', '1 to 2']), (dict(fusion=dict(heads=5)), ['5', '32'])])
def test_fusion_that_does_not_fit_is_named(changes, words):
  with pytest.raises(UserError) as error:
    jax.eval_shape(lambda: lightclip.init_variables(small(**changes), jax.random.key(0)))
  assert all(word in str(error.value) for word in words), error.value


def test_a_locked_tower_drops_nothing_out():
  model = small(image=dict(drop_path=0.5), text=dict(dropout=0.5))
  variables = lightclip.init_variables(model, jax.random.key(0))

  @jax.jit
  def embeddings(*inputs):
    options = dict(rngs={'dropout': jax.random.key(1)}, train=True)
    return [lightclip.LightCLIP(model).apply(variables, *inputs, **more)
            for more in ({}, {**options, 'locked': ['image']}, {**options, 'locked': ['text']})]

  inference, image, text = embeddings(*batch()[:2])
  for same, other in ((image.image_embedding, text.image_embedding), (text.text_embedding, image.text_embedding)):
    wanted = inference.image_embedding if same is image.image_embedding else inference.text_embedding
    np.testing.assert_allclose(same, wanted, atol=1e-6)
    assert np.abs(other - wanted).max(-1).min() > 1e-2, 'every example is dropped out of'


@pytest.mark.slow
def test_training_sows_statistics_of_each_group():
  model = small(image=dict(name='mobilenet_v2', width=0.25))
  variables = lightclip.init_variables(model, jax.random.key(0))
  out, sown = run(variables, model, train=True)
  assert np.isfinite(out.image_embedding).all()
  assert {x.shape[0] for x in jax.tree.leaves(sown)} == {BATCH // 2}
  updated = norm.update_running_statistics(variables['batch_stats'], sown[norm.STATISTICS], 0.5)
  assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, variables['batch_stats'])
  with pytest.raises(UserError, match='4.*64'):
    run(variables, config.replace(model, batch_norm='group:64'), train=True)
