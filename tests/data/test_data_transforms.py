"""Decoding, augmentation and the evaluation transform.

Letters: H height, W width, S output size.
"""
import io

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from lightclip_jax.data import transforms

RNG = np.random.default_rng


def _encoded(image, kind, **options):
  out = io.BytesIO()
  image.save(out, kind, **options)
  return out.getvalue()


def _noise(height=20, width=30, channels=3):
  return RNG(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(('kind', 'options'), [('PNG', {}), ('WEBP', {'lossless': True}), ('BMP', {}), ('TIFF', {})])
def test_lossless_formats_keep_every_pixel(kind, options):
  image = _noise()
  decoded = transforms.decode(_encoded(PIL.Image.fromarray(image), kind, **options))
  np.testing.assert_array_equal(decoded, image)


def test_jpeg_agrees_with_pillow():
  smooth = PIL.Image.fromarray(_noise(4, 6)).resize((60, 40), PIL.Image.Resampling.BICUBIC)
  data = _encoded(smooth, 'JPEG', quality=95, subsampling=0)
  reference = np.asarray(PIL.Image.open(io.BytesIO(data)))
  assert np.abs(transforms.decode(data).astype(int) - reference).max() <= 2


@pytest.mark.parametrize('kind', ['PNG', 'WEBP'])
def test_transparency_becomes_white(kind):
  rgba = np.zeros((4, 4, 4), np.uint8)
  rgba[..., 0], rgba[..., 3] = 200, np.array([0, 85, 170, 255])
  options = {'lossless': True} if kind == 'WEBP' else {}
  decoded = transforms.decode(_encoded(PIL.Image.fromarray(rgba), kind, **options))
  alpha = rgba[..., 3:] / 255
  expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
  assert np.abs(decoded - expected).max() <= 1


@pytest.mark.parametrize('mode', ['L', 'P', '1', 'LA', 'I;16'])
def test_other_colour_modes(mode):
  grey = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
  image = PIL.Image.fromarray(grey)
  if mode == 'I;16':
    image = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
  decoded = transforms.decode(_encoded(image if mode == 'I;16' else image.convert(mode), 'PNG'))
  assert decoded.shape == (16, 16, 3) and decoded.dtype == np.uint8
  assert (decoded[..., 0] == decoded[..., 2]).all()
  assert decoded[:, 0].max() < 10 and decoded[:, -1].min() > 245


@pytest.mark.parametrize('data', [b'', b'hello', b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'RIFF0000WEBP'])
def test_what_is_no_image_is_a_value_error(data):
  with pytest.raises(ValueError):
    transforms.decode(data)


def test_crop_of_a_constant_is_constant_and_of_everything_is_a_resize():
  flat = np.full((50, 40, 3), 77, np.uint8)
  crop = transforms.random_resized_crop(flat, 16, RNG(1), scale=(0.2, 1.0), ratio=(0.7, 1.4))
  assert crop.shape == (16, 16, 3) and crop.dtype == np.uint8 and (crop == 77).all()
  image = _noise(24, 24)
  whole = transforms.random_resized_crop(image, 24, RNG(1), scale=(1.0, 1.0), ratio=(1.0, 1.0))
  np.testing.assert_array_equal(whole, image)


def test_crop_areas_follow_the_scale():
  # The image's red and green say where a pixel is, so a crop's corners tell its size.
  y, x = np.mgrid[0:256, 0:256].astype(np.uint8)
  image = np.stack([y, x, x], -1)
  areas = []
  for seed in range(300):
    crop = transforms.random_resized_crop(image, 64, RNG(seed), scale=(0.25, 0.64), ratio=(0.8, 1.25)).astype(float)
    height, width = np.ptp(crop[..., 0]) * 64 / 63, np.ptp(crop[..., 1]) * 64 / 63
    areas.append(height * width / 256**2)
    assert 0.78 < width / height < 1.28
  assert 0.24 < min(areas) < 0.29 and 0.58 < max(areas) < 0.66 and abs(np.mean(areas) - 0.445) < 0.025


def test_impossible_ratios_fall_back_to_the_middle():
  image = np.zeros((10, 100, 3), np.uint8)
  image[:, 45:55] = 255
  crop = transforms.random_resized_crop(image, 8, RNG(0), scale=(1.0, 1.0), ratio=(1.0, 1.0))
  assert (crop == 255).all()


def test_flip():
  image = _noise()
  np.testing.assert_array_equal(transforms.flip(image, RNG(0), 1.0), image[:, ::-1])
  np.testing.assert_array_equal(transforms.flip(image, RNG(0), 0.0), image)


def test_color_jitter():
  image = _noise()
  np.testing.assert_array_equal(transforms.color_jitter(image, RNG(0), 0.0), image)
  jittered = transforms.color_jitter(image, RNG(0), 0.4)
  assert jittered.dtype == np.uint8 and jittered.shape == image.shape and (jittered != image).mean() > 0.5
  grey = np.repeat(_noise(channels=1), 3, -1)                     # saturation cannot colour grey
  out = transforms.color_jitter(grey, RNG(3), 0.8)
  assert np.abs(out[..., 0].astype(int) - out[..., 2]).max() <= 1


@pytest.mark.parametrize('shape', [(20, 30), (31, 17), (16, 16), (5, 9)])
def test_evaluation_transform_is_resize_and_centre_crop(shape):
  image = _noise(*shape)
  scale = 16 / min(shape)
  new = (int(shape[1] * scale), int(shape[0] * scale))
  resized = PIL.Image.fromarray(image).resize(new, PIL.Image.Resampling.BICUBIC)
  left, top = round((resized.width - 16) / 2), round((resized.height - 16) / 2)
  expected = np.asarray(resized.crop((left, top, left + 16, top + 16)))
  np.testing.assert_array_equal(transforms.evaluation_transform(image, 16), expected)


def _photo(height=60, width=80):
  """Smooth, with a bright corner at the top left."""
  y, x = np.mgrid[0:height, 0:width]
  return np.stack([255 - 3 * y, 255 - 3 * x, np.full_like(x, 40)], -1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_rotated_images_stand_upright(kind, orientation):
  exif = PIL.Image.Exif()
  exif[0x112] = orientation
  options = {'lossless': True} if kind == 'WEBP' else {'quality': 95} if kind == 'JPEG' else {}
  data = _encoded(PIL.Image.fromarray(_photo()), kind, exif=exif, **options)
  expected = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert('RGB')).astype(int)
  decoded = transforms.decode(data)
  assert decoded.shape == expected.shape and np.abs(decoded - expected).max() <= 4
  whole = transforms.decode_crop(data, 20, RNG(0), scale=(1, 1), ratio=(expected.shape[1] / expected.shape[0],) * 2)
  reference = transforms.resize(decoded, 20).astype(int)
  assert np.abs(whole - reference).mean() < 3


def test_cmyk_is_rgb():
  data = _encoded(PIL.Image.fromarray(_photo()).convert('CMYK'), 'JPEG', quality=95)
  assert np.abs(transforms.decode(data).astype(int) - _photo()).mean() < 4
  assert transforms.decode_crop(data, 8, RNG(0), scale=(1, 1), ratio=(1, 1)).shape == (8, 8, 3)


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG'])
def test_of_what_moves_the_first_frame_is_seen(kind):
  frames = [PIL.Image.new('RGB', (9, 7), colour) for colour in ('red', 'blue')]
  options = {'lossless': True} if kind == 'WEBP' else {}
  decoded = transforms.decode(_encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options))
  assert decoded.shape == (7, 9, 3) and np.abs(decoded.astype(int) - (255, 0, 0)).max() <= 1


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_sixteen_bits_become_eight(kind):
  import cv2
  image = _photo().astype(np.uint16) * 257
  data = cv2.imencode(f'.{kind.lower()}', image[..., ::-1])[1].tobytes()
  assert np.abs(transforms.decode(data).astype(int) - _photo()).max() <= 1


@pytest.mark.parametrize(('size', 'scale'), [(60, (0.3, 1.0)), (100, (0.05, 0.1))])
def test_a_jpeg_is_cropped_as_if_it_had_been_decoded_whole(size, scale):
  image = np.asarray(PIL.Image.fromarray(_noise(5, 7)).resize((311, 203), PIL.Image.Resampling.BICUBIC))
  data = _encoded(PIL.Image.fromarray(image), 'JPEG', quality=95)
  for seed in range(8):
    fast = transforms.decode_crop(data, size, RNG(seed), scale=scale, ratio=(0.7, 1.4)).astype(int)
    slow = transforms.random_resized_crop(transforms.decode(data), size, RNG(seed), scale=scale, ratio=(0.7, 1.4))
    moved = np.abs(np.diff(slow.astype(int), axis=1)).mean()   # what one pixel to the side would be off
    assert fast.shape == slow.shape and np.abs(fast - slow).mean() < 0.25 * moved + 1


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'JPEG', 'GIF', 'BMP', 'TIFF'])
def test_shapes_and_the_pixel_cap_are_read_from_headers(kind):
  data = _encoded(PIL.Image.fromarray(_noise(20, 30)), kind)
  assert transforms.image_shape(data) == (20, 30)
  assert transforms.decode(data, max_pixels=600).shape == (20, 30, 3)
  for read in (lambda: transforms.decode(data, 599),
               lambda: transforms.decode_crop(data, 8, RNG(0), scale=(1, 1), ratio=(1, 1), max_pixels=599)):
    with pytest.raises(ValueError, match='more pixels than data.max_pixels .30 x 20.'):
      read()


@pytest.mark.parametrize('kind', ['TIFF', 'JPEG', 'GIF'])
def test_pillows_own_limit_gives_way_to_a_larger_one(kind, monkeypatch):
  # Such images were 'oversized' whatever data.max_pixels was, or lay on their side, since their EXIF data were not read.
  monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', 100)
  exif = PIL.Image.Exif()
  exif[0x112] = 6
  data = _encoded(PIL.Image.fromarray(_noise(20, 30)), kind, **({'exif': exif} if kind == 'JPEG' else {}))
  with pytest.raises(ValueError, match='more pixels than data.max_pixels'):
    transforms.decode(data, 599)
  assert transforms.decode(data, 600).shape == ((30, 20, 3) if kind == 'JPEG' else (20, 30, 3))
  assert PIL.Image.MAX_IMAGE_PIXELS == 600


@pytest.mark.parametrize('shape', [(1, 5000), (5000, 1), (40, 16 * 40), (3, 49)])
def test_the_middle_of_a_long_picture_is_enough(shape):
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  got = transforms.evaluation_transform(image, 16)
  sides = [int(side * 16 / min(shape)) for side in shape]
  whole = np.asarray(PIL.Image.fromarray(image).resize(sides[::-1], PIL.Image.Resampling.BICUBIC))
  top, left = (round((side - 16) / 2) for side in whole.shape[:2])
  assert got.shape == (16, 16, 3)
  assert np.abs(got.astype(int) - whole[top:top + 16, left:left + 16]).max() <= (0 if max(shape) <= 16 * min(shape) else 12)
