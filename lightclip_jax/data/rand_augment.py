"""RandAugment, light: a few random operations of one strength on each image (arXiv:1909.13719).

Light: things keep what a caption may call them, so no operation inverts or exchanges colours, and none mirrors.
"""
from collections.abc import Callable

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps

_GREY = (127, 127, 127)        # where a moved image leaves nothing
# At strength 1, as in the paper's own code: degrees; pixels a pixel; of the side; of a factor; bits.
_ROTATE, _SHEAR, _TRANSLATE, _ENHANCE, _POSTERIZE = 30.0, 0.3, 0.45, 0.9, 4


def rand_augment(image_HxWx3: np.ndarray, rng: np.random.Generator, operations: int, strength: float) -> np.ndarray:
  """`operations` of `OPERATIONS` one after the other, uint8 as it came; each of `strength` (0 to 1), to a random side."""
  for _ in range(operations):
    operation, side = rng.integers(len(OPERATIONS)), rng.choice((-1.0, 1.0))
    image_HxWx3 = list(OPERATIONS.values())[operation](image_HxWx3, side * strength)
  return image_HxWx3


def _move(image: np.ndarray, x: tuple[float, float, float], y: tuple[float, float, float]) -> np.ndarray:
  """The pixel at (1, i, j) from the middle goes to (x · (1, i, j), y · (1, i, j)), i to the right and j downwards."""
  middle = (np.array(image.shape[1::-1]) - 1) / 2
  turn, shift = np.array([x[1:], y[1:]]), np.array([x[0], y[0]])
  place = np.column_stack([turn, middle + shift - turn @ middle])
  return cv2.warpAffine(image, place, image.shape[1::-1], flags=cv2.INTER_LINEAR, borderValue=_GREY)


def _rotate(image: np.ndarray, amount: float) -> np.ndarray:
  angle = np.deg2rad(_ROTATE * amount)
  return _move(image, (0, np.cos(angle), -np.sin(angle)), (0, np.sin(angle), np.cos(angle)))


def _enhance(dull: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, float], np.ndarray]:
  """Towards `dull(image)`, or as far away from it."""
  return lambda image, amount: cv2.addWeighted(image, 1 + _ENHANCE * amount, dull(image), -_ENHANCE * amount, 0)


def _grey(image: np.ndarray) -> np.ndarray:
  return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _through_pillow(operation: Callable[[PIL.Image.Image], PIL.Image.Image]) -> Callable[[np.ndarray, float], np.ndarray]:
  return lambda image, _: np.array(operation(PIL.Image.fromarray(image)))


OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {   # of an image and an amount from -1 to 1
    'rotate': _rotate,
    'shear_x': lambda image, amount: _move(image, (0, 1, _SHEAR * amount), (0, 0, 1)),
    'shear_y': lambda image, amount: _move(image, (0, 1, 0), (0, _SHEAR * amount, 1)),
    'translate_x': lambda image, amount: _move(image, (_TRANSLATE * amount * image.shape[1], 1, 0), (0, 0, 1)),
    'translate_y': lambda image, amount: _move(image, (0, 1, 0), (_TRANSLATE * amount * image.shape[0], 0, 1)),
    'brightness': _enhance(np.zeros_like),
    'contrast': _enhance(lambda image: np.full_like(image, round(_grey(image).mean()))),
    'saturation': _enhance(_grey),
    'sharpness': _enhance(lambda image: cv2.GaussianBlur(image, (3, 3), 0)),
    'posterize': lambda image, amount: image & np.uint8(256 - 2 ** round(_POSTERIZE * abs(amount))),
    'autocontrast': _through_pillow(PIL.ImageOps.autocontrast),
    'equalize': _through_pillow(PIL.ImageOps.equalize),
}
