"""Images as a user has them, to the uint8 arrays that a tower reads.

Letters: N images, H height, W width, S output size.
"""
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image

from lightclip_jax.data import transforms
from lightclip_jax.errors import UserError

Image = PIL.Image.Image | str | os.PathLike[str]


def check(images: Iterable[Image] | np.ndarray) -> Sequence[Image] | np.ndarray:
  """The images as `prepare` takes them. Raises UserError for one image, no images, or an array of another type or shape."""
  if isinstance(images, (str, os.PathLike, PIL.Image.Image)):
    raise UserError(f'images is one {type(images).__name__}; give a list: [image]')
  if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
    raise UserError(f'images are an array of {images.dtype} {list(images.shape)}; it must be uint8 [N, H, W, 3] in RGB')
  if not isinstance(images, Iterable):
    raise UserError(f'images is {str(images)[:60]!r}; it must be a list of paths or PIL images, or one uint8 array')
  return images if isinstance(images, np.ndarray) else list(images)


def prepare(images: Sequence[Image] | np.ndarray, size: int) -> np.ndarray:
  """uint8 RGB [N, S, S, 3], resized and cropped as in evaluation (data/transforms.py).

  Args:
    images: at least one PIL image of any mode but F or path of an image file, both turned upright by their EXIF
      orientation, or uint8 [N, H, W, 3] in RGB.
    size: S.

  Raises:
    UserError: for a file that is no whole image, or an image without pixels.
  """
  rows = images if isinstance(images, np.ndarray) else map(_rgb, images)
  return np.stack([transforms.evaluation_transform(_not_empty(row), size) for row in rows])


def _not_empty(image_HxWx3: np.ndarray) -> np.ndarray:
  height, width, _ = image_HxWx3.shape
  if not height or not width:   # such as a crop of nothing
    raise UserError(f'images hold one of {width} × {height} pixels; each must have some')
  return image_HxWx3


def _rgb(image: Image) -> np.ndarray:
  """uint8 RGB [H, W, 3], upright; transparency becomes white, as in training."""
  if not isinstance(image, (str, os.PathLike, PIL.Image.Image)):
    raise UserError(f'images hold one {type(image).__name__}; each must be a path or a PIL image, or all one uint8 array')
  try:
    if isinstance(image, PIL.Image.Image):
      return transforms.to_rgb(image)
    return transforms.decode(pathlib.Path(image).read_bytes())
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f'cannot read the image {str(image)!r}: {error}') from error
