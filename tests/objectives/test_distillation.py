"""Distillation: exact against float64 at every number of devices, on the ring, and nothing where its weight is 0."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import objectives_reference as reference
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lightclip_jax import config
from lightclip_jax.errors import UserError
from lightclip_jax.objectives import Objective, Scales, distillation_loss, ring
from lightclip_jax.outputs import Outputs

D, E = 16, 12


def make_mesh(devices):
  return jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def problem(size, seed=0):
  """Student's image and text, teacher's image and text (float16, as they are stored)."""
  teacher = (reference.unit(seed + k, size, E).astype(np.float16) for k in (2, 3))
  return reference.unit(seed, size, D), reference.unit(seed + 1, size, D), *teacher


@functools.cache
def compiled(mesh=None, temperature=0.1):
  def loss(image, text, teacher_image, teacher_text, scale):
    return distillation_loss(image, text, teacher_image, teacher_text, scale, temperature=temperature, mesh=mesh)
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 4), has_aux=True))


def check(size, devices=0, scale=9.0, temperature=0.1, seed=0):
  mesh = make_mesh(devices) if devices else None
  arrays = problem(size, seed)
  placed = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec('data'))) if devices else arrays
  (loss, aux), grads = compiled(mesh, temperature)(*placed, scale)
  expected, *slopes = reference.distillation(*arrays, scale, temperature)
  np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=2e-6 * max(scale, 1 / temperature))
  np.testing.assert_allclose(loss, (aux.loss_image_to_text + aux.loss_text_to_image) / 2, rtol=1e-6)
  for got, want in zip(grads, slopes, strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(('devices', 'size'), [(0, 1), (0, 25), (1, 24), (2, 24), (8, 40), (8, 8)])
def test_equals_the_reference_on_any_number_of_devices(devices, size):
  check(size, devices, seed=size)


@pytest.mark.parametrize(('scale', 'temperature'), [(100.0, 0.01), (1.0, 1.0)])
def test_sharp_and_flat_distributions(scale, temperature):
  check(25, scale=scale, temperature=temperature)


def test_blocks_of_rows_with_a_remainder(monkeypatch):
  monkeypatch.setattr(ring, 'BLOCK_ELEMENTS', 25 * 9)
  compiled.cache_clear()
  check(25)
  compiled.cache_clear()


def test_reference_gradient_is_the_slope_of_its_loss():
  image, text, *teacher = (x.astype(np.float64) for x in problem(6))
  _, d_image, d_text, d_scale = reference.distillation(image, text, *teacher, 3.0, 0.2)
  step = np.random.default_rng(2).normal(size=(2, *image.shape)) * 1e-5
  moved = [reference.distillation(image + k * step[0], text + k * step[1], *teacher, 3.0 + k * 1e-5, 0.2)[0] for k in (1, -1)]
  expected = (d_image * step[0]).sum() + (d_text * step[1]).sum() + d_scale * 1e-5
  np.testing.assert_allclose((moved[0] - moved[1]) / 2, expected, rtol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
  image, text = reference.unit(0, 24, D), reference.unit(1, 24, D)
  (loss, _), grads = compiled()(image, text, image, text, 10.0)   # 1 / 0.1
  assert abs(loss) < 1e-5 and max(np.abs(g).max() for g in grads) < 1e-5
  assert compiled()(image, text, image, text[::-1], 10.0)[0][0] > 0.1


def test_the_ring_gathers_nothing():
  mesh = make_mesh(8)
  place = NamedSharding(mesh, PartitionSpec('data'))
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in problem(80)]
  hlo = compiled(mesh).lower(*shapes, jnp.float32(1)).compile().as_text()
  assert len(re.findall(r' collective-permute(?:-start)?\(', hlo)) == 4   # there and home again, forward and backward
  assert 'all-gather' not in hlo and 'all-to-all' not in hlo and not re.search(r'f32\[80,80\]', hlo)


@pytest.mark.parametrize(('message', 'shapes', 'options'), [
  (r'\(8, 3\).*\(8, 4\)', ((8, 2), (8, 2), (8, 3), (8, 4)), {}),
  (r'\(6, 3\).*B = 8', ((8, 2), (8, 2), (6, 3), (6, 3)), {}),
  (r'\(8, 2\).*\(8, 3\)', ((8, 2), (8, 3), (8, 3), (8, 3)), {}),
  (r'temperature is 0', ((8, 2), (8, 2), (8, 3), (8, 3)), dict(temperature=0)),
  (r'batch of 9', ((9, 2), (9, 2), (9, 3), (9, 3)), dict(mesh=make_mesh(2))),
])
def test_bad_input_is_named(message, shapes, options):
  with pytest.raises(UserError, match=message):
    distillation_loss(*map(np.zeros, shapes), 1.0, **options)


def test_the_term_has_a_schedule_and_is_off_by_default():
  assert not Objective.from_config(config.Objective()).needs_teacher
  off = config.constant(0.0)
  options = config.Objective(config.Contrastive(alpha=off), config.TokenMatching(off), config.MaskedLM(off),
                             config.Distillation(config.Schedule(0.0, 2.0), temperature=0.1))
  objective, (image, text, *teacher) = Objective.from_config(options), problem(24)
  total, metrics = objective(Outputs(image, text), Scales(9.0), progress=0.25,
                             **dict(zip(('teacher_image', 'teacher_text'), teacher, strict=True)))
  expected, *_ = reference.distillation(image, text, *teacher, 9.0, 0.1)
  np.testing.assert_allclose(metrics['loss_distillation'], expected, rtol=1e-5)
  np.testing.assert_allclose(total, metrics['loss_contrastive'] + 0.5 * expected, rtol=1e-5)
