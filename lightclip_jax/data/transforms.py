"""Encoded images to uint8 RGB arrays, and their augmentation. All randomness comes from the caller's generator.

Letters: H height, W width, S output size.
"""
import io
import math
import struct
from collections.abc import Sequence

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg

from lightclip_jax.data.faults import BadRecord

MAX_PIXELS = 1 << 26
LONGEST = 16                  # times its width: of a picture that is higher, or as much wider, the ends are not resized
GRID = 2                      # cells along each side of a mosaic
BLACK = cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8))[1].tobytes()   # in the place of an image that cannot be read
_JPEG, _PNG = b'\xff\xd8', b'\x89PNG\r\n\x1a\n'
_WEBP_EXIF, _WEBP_MOVES = 8, 2       # flags of its extended header
_WEBP_SHAPES = {              # by its first chunk; the format's specification
    b'VP8X': lambda data: (int.from_bytes(data[27:30], 'little') + 1, int.from_bytes(data[24:27], 'little') + 1),
    b'VP8L': lambda data: ((int.from_bytes(data[21:25], 'little') >> 14 & 0x3fff) + 1,
                           (int.from_bytes(data[21:23], 'little') & 0x3fff) + 1),
    b'VP8 ': lambda data: (int.from_bytes(data[28:30], 'little') & 0x3fff, int.from_bytes(data[26:28], 'little') & 0x3fff),
}
_EXIF_ORIENTATION = 0x112
cv2.setNumThreads(0)   # the pipeline is parallel over examples; OpenCV's own threads would fight it and the training


def decode(data: bytes, max_pixels: int | None = MAX_PIXELS) -> np.ndarray:
  """uint8 RGB [H, W, 3] of an encoded image: upright by its EXIF orientation, the first frame where it moves.

  Transparency becomes white, 16 bits become 8, CMYK becomes RGB. `max_pixels` is None for what was let through before.

  Raises:
    BadRecord: 'empty', 'not_image', 'truncated', or 'oversized' (told from the header, before anything is decoded).
  """
  if max_pixels is not None:
    _checked_shape(data, max_pixels)
  if data[:2] == _JPEG:
    return _decode_jpeg(data)
  if _is_plain(data):
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is not None and image.dtype == np.uint8 and image.ndim == 3:
      if image.shape[2] == 3:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
      alpha = image[..., 3:].astype(np.uint16)
      return ((image[..., 2::-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
  return _decode_any(data)


def _checked_shape(data: bytes, max_pixels: int) -> tuple[int, int]:
  """Height and width by the header. Raises BadRecord as `image_shape`, and 'oversized' above `max_pixels`."""
  if PIL.Image.MAX_IMAGE_PIXELS is not None:   # Pillow's own limit; that of the images inside an icon is no other's
    PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS, max_pixels)
  height, width = image_shape(data)
  if height * width > max_pixels:
    raise BadRecord('oversized', f'{width} x {height}')
  return height, width


def image_shape(data: bytes) -> tuple[int, int]:
  """Height and width from the header alone, before any rotation. Raises BadRecord ('empty', 'not_image', 'oversized')."""
  if not data:
    raise BadRecord('empty')
  if data[:2] == _JPEG:
    try:
      return simplejpeg.decode_jpeg_header(data)[:2]
    except ValueError:
      pass   # Pillow may know more, such as JPEGs of 12 bits
  elif data[:8] == _PNG and len(data) >= 24:
    width, height = struct.unpack('>II', data[16:24])
    return height, width
  elif data[:4] == b'RIFF' and len(data) >= 30 and data[12:16] in _WEBP_SHAPES:
    return _WEBP_SHAPES[data[12:16]](data)
  width, height = _open(data).size
  return height, width


def _is_plain(data: bytes) -> bool:
  """Whether OpenCV reads it as Pillow would: a whole PNG or WebP without orientation. It fills what a cut file lacks."""
  if data[:8] == _PNG:
    return data[-8:-4] == b'IEND' and b'eXIf' not in data[:-8]
  special = data[12:16] == b'VP8X' and data[20] & (_WEBP_EXIF | _WEBP_MOVES)
  return data[:4] == b'RIFF' and data[8:12] == b'WEBP' and not special


def _decode_jpeg(data: bytes, **options: int) -> np.ndarray:
  """`options`: simplejpeg's `min_height`, `min_width` of a smaller version."""
  if _is_rotated(data):
    return _decode_any(data)
  try:
    return simplejpeg.decode_jpeg(data, **options)
  except ValueError:
    return _decode_any(data)   # CMYK, or cut off: Pillow tells


def _is_rotated(data: bytes) -> bool:
  """Whether a JPEG says in its EXIF header that it lies on its side or is mirrored."""
  if b'Exif\0\0' not in data[:4096]:
    return False
  try:
    return _open(data).getexif().get(_EXIF_ORIENTATION, 1) != 1
  except Exception:   # Pillow's reader of EXIF data stumbles in many ways; without it the image is as it lies
    return False


def _open(data: bytes) -> PIL.Image.Image:
  try:
    return PIL.Image.open(io.BytesIO(data))
  except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
    raise BadRecord('oversized') from error
  except PIL.UnidentifiedImageError as error:
    raise BadRecord('truncated' if data[:2] == _JPEG or data[:8] == _PNG else 'not_image', f'{len(data)} bytes') from error
  except Exception as error:   # broken headers raise whatever the format's reader stumbles over
    raise BadRecord('truncated', str(error)) from error


def _decode_any(data: bytes) -> np.ndarray:
  """Slower, for what the others do not read: palettes, grey images, rotated ones and rare formats."""
  try:
    return to_rgb(_open(data))
  except BadRecord:
    raise
  except Exception as error:   # as above
    raise BadRecord('truncated', str(error)) from error


def to_rgb(image: PIL.Image.Image) -> np.ndarray:
  """uint8 RGB [H, W, 3] of a PIL image, upright by its EXIF orientation: transparency becomes white, 16-bit grey keeps its
  upper byte.

  Raises:
    ValueError: for mode F, whose range nobody knows.
  """
  image = _upright(image)
  if image.mode == 'F':
    raise ValueError("mode 'F' has no range that is black to white; convert the image to 'L' first")
  if image.mode.startswith('I'):   # Pillow would clip at 255
    image = PIL.Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8))
  if image.mode == 'CMYK':
    return np.asarray(image.convert('RGB'))
  image = image.convert('RGBA')
  white = PIL.Image.new('RGBA', image.size, 'white')
  return np.asarray(PIL.Image.alpha_composite(white, image).convert('RGB'))


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
  image.load()   # what raises here is no matter of EXIF data
  try:
    return image if image.getexif().get(_EXIF_ORIENTATION, 1) == 1 else PIL.ImageOps.exif_transpose(image)
  except Exception:   # as in _is_rotated
    return image


def decode_crop(data: bytes, size: int, rng: np.random.Generator, *, scale: tuple[float, float],
                ratio: tuple[float, float], max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """`random_resized_crop` of an encoded image, uint8 [S, S, 3].

  A JPEG is decoded no larger than the crop needs: at 1/2, 1/4... of its size, straight from its coefficients.

  Raises:
    BadRecord: as `decode`.
  """
  height, width = _checked_shape(data, max_pixels)
  if data[:2] != _JPEG or _is_rotated(data):
    return random_resized_crop(decode(data, None), size, rng, scale=scale, ratio=ratio)
  top, left, h, w = crop_box(height, width, rng, scale, ratio)
  image_HxWx3 = _decode_jpeg(data, min_height=math.ceil(height * size / h), min_width=math.ceil(width * size / w))
  # It is decoded at exactly n/8; a part of a pixel that this leaves at the far edges becomes a whole one.
  scaled = round(8 * max(image_HxWx3.shape[:2]) / max(height, width)) / 8
  return _crop_resize(image_HxWx3, tuple(scaled * number for number in (top, left, h, w)), size)


def _crop_resize(image_HxWx3: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
  """The part at (top, left, height, width), which may lie between pixels, as uint8 [S, S, 3], in one call."""
  top, left, h, w = box
  if min(h, w) >= 2 * size:   # bilinear would skip pixels; and of so many, fractions do not matter
    return resize(image_HxWx3[round(top):round(top + h), round(left):round(left + w)], size)
  y, x = h / size, w / size
  place = np.array([[x, 0, left + x / 2 - 0.5], [0, y, top + y / 2 - 0.5]])   # of an output pixel's middle in the image
  return cv2.warpAffine(image_HxWx3, place, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                        borderMode=cv2.BORDER_REPLICATE)


def random_resized_crop(image_HxWx3: np.ndarray, size: int, rng: np.random.Generator, *, scale: tuple[float, float],
                        ratio: tuple[float, float]) -> np.ndarray:
  """A random part of the image, resized to uint8 [S, S, 3] (Inception's crop: area in `scale`, log-uniform `ratio`)."""
  top, left, h, w = crop_box(*image_HxWx3.shape[:2], rng, scale, ratio)
  return resize(image_HxWx3[top:top + h, left:left + w], size)


def crop_box(height: int, width: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float],
             ) -> tuple[int, int, int, int]:
  """Top, left, height and width of that part; the middle square where none fits in ten draws."""
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  side = min(height, width)
  return (height - side) // 2, (width - side) // 2, side, side


def resize(image_HxWx3: np.ndarray, size: int) -> np.ndarray:
  """uint8 [S, S, 3]: halved (each pixel the mean of four) while that leaves enough, then bilinear.

  Bilinear taps then cover less than a half. Five times as fast as OpenCV's INTER_AREA at a factor that is not whole.
  """
  while min(image_HxWx3.shape[:2]) >= 2 * size:
    height, width = (side // 2 for side in image_HxWx3.shape[:2])
    image_HxWx3 = cv2.resize(image_HxWx3[:2 * height, :2 * width], (width, height), interpolation=cv2.INTER_AREA)
  return cv2.resize(image_HxWx3, (size, size), interpolation=cv2.INTER_LINEAR)


def mosaic(images: Sequence[np.ndarray], cells: Sequence[tuple[int, int]], size: int) -> np.ndarray:
  """uint8 [S, S, 3]: square images of `size // GRID` pixels, each in its (row, column); white elsewhere."""
  picture, near = np.full((size, size, 3), 255, np.uint8), size // GRID
  edges = np.linspace(0, size, GRID + 1).astype(int)
  for image_HxWx3, (row, column) in zip(images, cells, strict=True):
    top, left = edges[row], edges[column]
    picture[top:top + near, left:left + near] = image_HxWx3
  return picture


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
  """OpenAI CLIP's: the shorter side resized to `size` (bicubic, antialiased), then the centre; uint8 [S, S, 3].

  Of a picture that is far longer than wide only the middle is resized: the whole of a line of pixels would take gigabytes.
  """
  height, width = image_HxWx3.shape[:2]
  top, left = max(0, (height - LONGEST * width) // 2), max(0, (width - LONGEST * height) // 2)
  image_HxWx3 = image_HxWx3[top:height - top, left:width - left]
  height, width = image_HxWx3.shape[:2]
  if (height, width) != (size, size):
    # torchvision's Resize, which CLIP uses, rounds the longer side down.
    shape = (size, size * height // width) if width <= height else (size * width // height, size)
    image_HxWx3 = np.asarray(PIL.Image.fromarray(image_HxWx3).resize(shape, PIL.Image.Resampling.BICUBIC))
  height, width = image_HxWx3.shape[:2]
  top, left = round((height - size) / 2), round((width - size) / 2)
  return image_HxWx3[top:top + size, left:left + size]
