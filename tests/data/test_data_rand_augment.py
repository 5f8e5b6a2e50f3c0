"""RandAugment: what each operation does beside Pillow's, and that it is off, repeatable and within bounds."""
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest

from lightclip_jax import config
from lightclip_jax.data import pipeline
from lightclip_jax.data.rand_augment import OPERATIONS, rand_augment
from lightclip_jax.errors import UserError

IMAGE = np.asarray(PIL.Image.fromarray(np.random.default_rng(0).integers(60, 190, (6, 8, 3), dtype=np.uint8)).resize((80, 60)))
MIDDLE = np.s_[20:40, 28:52]     # where no operation at half strength lets the outside in


@pytest.mark.parametrize('name', OPERATIONS)
def test_each_keeps_shape_and_input_and_grows_with_the_amount(name):
  before = IMAGE.copy()
  outputs = [OPERATIONS[name](IMAGE, amount) for amount in (0.0, 0.1, 0.9, -0.9)]
  np.testing.assert_array_equal(IMAGE, before)
  assert all(out.shape == IMAGE.shape and out.dtype == np.uint8 and out.flags.c_contiguous for out in outputs)
  none, little, much, other = (np.abs(out.astype(int) - IMAGE).mean() for out in outputs)
  if name in ('autocontrast', 'equalize'):
    assert none == little == much == other > 1
  else:
    assert none == 0 <= little < min(much, other)


@pytest.mark.parametrize(('name', 'enhance'), [('brightness', PIL.ImageEnhance.Brightness),
                                               ('contrast', PIL.ImageEnhance.Contrast), ('saturation', PIL.ImageEnhance.Color)])
@pytest.mark.parametrize('amount', [0.5, -0.5, 1.0])
def test_colours_as_pillow(name, enhance, amount):
  expected = np.asarray(enhance(PIL.Image.fromarray(IMAGE)).enhance(1 + 0.9 * amount)).astype(int)
  assert np.abs(OPERATIONS[name](IMAGE, amount) - expected).max() <= 2


@pytest.mark.parametrize('amount', [0.5, -0.5])
def test_moves_as_pillow(amount):
  image, (x, y) = PIL.Image.fromarray(IMAGE), (39.5, 29.5)
  shear, angle = 0.3 * amount, 30 * amount

  def affine(*inverse):
    return image.transform(image.size, PIL.Image.Transform.AFFINE, inverse, PIL.Image.Resampling.BILINEAR)

  expected = {
      'rotate': image.rotate(-angle, PIL.Image.Resampling.BILINEAR),   # Pillow turns to the left
      'shear_x': affine(1, -shear, shear * (y + 0.5), 0, 1, 0), 'shear_y': affine(1, 0, 0, -shear, 1, shear * (x + 0.5)),
      'translate_x': affine(1, 0, -0.45 * amount * 80, 0, 1, 0), 'translate_y': affine(1, 0, 0, 0, 1, -0.45 * amount * 60)}
  for name, other in expected.items():
    middle = OPERATIONS[name](IMAGE, amount)[MIDDLE].astype(int)
    assert np.abs(middle - np.asarray(other)[MIDDLE]).mean() < 1 < np.abs(middle - IMAGE[MIDDLE]).mean(), name


def test_what_is_uncovered_is_grey():
  moved = OPERATIONS['translate_x'](IMAGE, 1.0)
  assert (moved[:, :36] == 127).all() and np.array_equal(moved[:, 36:], IMAGE[:, :-36])


def test_draws_all_operations_and_follows_from_the_generator():
  draw = lambda seed: rand_augment(IMAGE, np.random.default_rng(seed), 1, 0.5)  # noqa: E731
  results = [draw(seed) for seed in range(150)]
  for seed in (0, 77):
    np.testing.assert_array_equal(draw(seed), results[seed])
  alone = [OPERATIONS[name](IMAGE, side * 0.5) for name in OPERATIONS for side in (-1, 1)]
  for one in alone:
    assert any(np.array_equal(one, result) for result in results)
  for result in results:
    assert any(np.array_equal(one, result) for one in alone)


def test_is_off_by_default_and_draws_nothing_then():
  rng = np.random.default_rng(0)
  assert config.Data().rand_augment == 0 and rand_augment(IMAGE, rng, 0, 1.0) is IMAGE
  assert rng.random() == np.random.default_rng(0).random()


def test_in_the_pipeline(shapes_folder):
  options = config.replace(config.Data(), workers=0, max_masked=3)

  def first(**changes):
    batches = pipeline.train_batches(shapes_folder, config.replace(options, **changes), image_size=16, context=12, batch_size=8,
                                     seed=0)
    batch = next(batches)
    batches.close()
    return batch

  plain, augmented, again = first(), first(rand_augment=2), first(rand_augment=2)
  np.testing.assert_array_equal(augmented['image'], again['image'])
  np.testing.assert_array_equal(augmented['example_id'], plain['example_id'])
  assert (augmented['image'] != plain['image']).any((1, 2, 3)).sum() >= 6
  for wrong in (dict(rand_augment=-1), dict(rand_augment=1, rand_augment_strength=1.5)):
    with pytest.raises(UserError, match='data.rand_augment is'):
      first(**wrong)
