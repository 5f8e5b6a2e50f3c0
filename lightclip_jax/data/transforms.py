"""Encoded images to uint8 RGB arrays, and their augmentation. All randomness comes from the caller's generator.

Letters: H height, W width, S output size.
"""
import io
import math

import cv2
import numpy as np
import PIL.Image
import simplejpeg

cv2.setNumThreads(0)   # the pipeline is parallel over examples; OpenCV's own threads would fight it and the training


def decode(data: bytes) -> np.ndarray:
  """uint8 RGB [H, W, 3] of an encoded image; transparency becomes white.

  Raises:
    ValueError: if `data` is not a whole image.
  """
  if data[:2] == b'\xff\xd8':
    return simplejpeg.decode_jpeg(data)
  image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
  if image is not None and image.dtype == np.uint8 and image.ndim == 3:
    if image.shape[2] == 3:
      return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    alpha = image[..., 3:].astype(np.uint16)
    return ((image[..., 2::-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
  return _decode_any(data)


def _decode_any(data: bytes) -> np.ndarray:
  """Slower, for what OpenCV does not read: palettes, grey images and rare formats."""
  try:
    return to_rgb(PIL.Image.open(io.BytesIO(data)))
  except (OSError, SyntaxError) as error:
    raise ValueError(f'{len(data)} bytes are not an image: {error}') from error


def to_rgb(image: PIL.Image.Image) -> np.ndarray:
  """uint8 RGB [H, W, 3] of a PIL image: transparency becomes white, 16-bit grey keeps its upper byte.

  Raises:
    ValueError: for mode F, whose range nobody knows.
  """
  if image.mode == 'F':
    raise ValueError("mode 'F' has no range that is black to white; convert the image to 'L' first")
  if image.mode.startswith('I'):   # Pillow would clip at 255
    image = PIL.Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8))
  image = image.convert('RGBA')
  white = PIL.Image.new('RGBA', image.size, 'white')
  return np.asarray(PIL.Image.alpha_composite(white, image).convert('RGB'))


def random_resized_crop(image_HxWx3: np.ndarray, size: int, rng: np.random.Generator, *, scale: tuple[float, float],
                        ratio: tuple[float, float]) -> np.ndarray:
  """A random part of the image, resized to uint8 [S, S, 3] (Inception's crop: area in `scale`, log-uniform `ratio`)."""
  height, width = image_HxWx3.shape[:2]
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
      return _resize(image_HxWx3[top:top + h, left:left + w], size)
  side = min(height, width)
  return _resize(image_HxWx3[(height - side) // 2:, (width - side) // 2:][:side, :side], size)


def _resize(image_HxWx3: np.ndarray, size: int) -> np.ndarray:
  """Halved (each pixel the mean of four) while that leaves enough, then bilinear, whose taps cover less than a half.

  Five times as fast as OpenCV's INTER_AREA at a factor that is not whole.
  """
  while min(image_HxWx3.shape[:2]) >= 2 * size:
    height, width = (side // 2 for side in image_HxWx3.shape[:2])
    image_HxWx3 = cv2.resize(image_HxWx3[:2 * height, :2 * width], (width, height), interpolation=cv2.INTER_AREA)
  return cv2.resize(image_HxWx3, (size, size), interpolation=cv2.INTER_LINEAR)


def flip(image_HxWx3: np.ndarray, rng: np.random.Generator, probability: float) -> np.ndarray:
  """Left and right exchanged with the given probability."""
  return np.ascontiguousarray(image_HxWx3[:, ::-1]) if rng.random() < probability else image_HxWx3


def color_jitter(image_HxWx3: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
  """Brightness, contrast and saturation, each times a random factor in 1 ± `strength`; uint8 as it came."""
  if strength == 0:
    return image_HxWx3
  brightness, contrast, saturation = rng.uniform(max(0.0, 1 - strength), 1 + strength, 3)
  image = image_HxWx3.astype(np.float32) * np.float32(brightness)
  image = cv2.addWeighted(image, contrast, np.full_like(image, image.mean()), 1 - contrast, 0)
  grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
  return np.clip(np.rint(cv2.addWeighted(image, saturation, grey, 1 - saturation, 0)), 0, 255).astype(np.uint8)


def evaluation_transform(image_HxWx3: np.ndarray, size: int) -> np.ndarray:
  """OpenAI CLIP's: the shorter side resized to `size` (bicubic, antialiased), then the centre; uint8 [S, S, 3]."""
  height, width = image_HxWx3.shape[:2]
  if (height, width) != (size, size):
    # torchvision's Resize, which CLIP uses, rounds the longer side down.
    shape = (size, size * height // width) if width <= height else (size * width // height, size)
    image_HxWx3 = np.asarray(PIL.Image.fromarray(image_HxWx3).resize(shape, PIL.Image.Resampling.BICUBIC))
  height, width = image_HxWx3.shape[:2]
  top, left = round((height - size) / 2), round((width - size) / 2)
  return image_HxWx3[top:top + size, left:left + size]
