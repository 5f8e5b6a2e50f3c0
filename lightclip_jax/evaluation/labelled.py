"""Images with class labels, as every classification task reads them.

Letters: N images, H height, W width.
"""
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from lightclip_jax.data.records import Record
from lightclip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
  """Some images in a fixed order, and their classes."""
  name: str                                   # unique: embeddings are kept under it
  read: Callable[[int], np.ndarray | None]    # index -> uint8 RGB [H, W, 3], or None where it says that it cannot be read
  labels_N: np.ndarray                        # int [N]


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Test images, and where there are any, images to learn a probe from: found when a task asks for them, since their labels
  may lie in a million records."""
  name: str
  classes: tuple[str, ...]             # names as they stand in prompts
  test: Part
  find_train: Callable[[], tuple[Part, ...]] = tuple
  find_validation: Callable[[], tuple[Part, ...]] = tuple
  prompts: str = 'photo'               # the template set of its own

  @functools.cached_property
  def train(self) -> tuple[Part, ...]:
    """The training images. Raises UserError for a part without images, or a label without a name."""
    return tuple(_checked(self, part) for part in self.find_train())

  @functools.cached_property
  def validation(self) -> tuple[Part, ...]:
    """Those to choose by, in the same way; without them probes split a part of the training images off."""
    return tuple(_checked(self, part) for part in self.find_validation())


def labels(records: Sequence[Record], kind: Literal['concept', 'group'], classes: Sequence[str]) -> np.ndarray:
  """int [N]: each record's class; -1 where it has none of them, as records that cannot be used."""
  number = {name: i for i, name in enumerate(classes)}
  return np.array([number.get(getattr(record, kind), -1) for record in records], np.int64)


def asked(records: Sequence[Record], labels_N: np.ndarray) -> np.ndarray:
  """int [n]: the records that are asked for their class, or cannot be used and are mistakes; a mixture's other pairs have none.

  Empty where no record has a class.
  """
  has_N = labels_N >= 0
  return np.flatnonzero(has_N | [not any(record.captions) for record in records]) if has_N.any() else np.zeros(0, np.int64)


def check(images: ImageSet) -> ImageSet:
  """The set itself.

  Raises:
    UserError: for a set without test images, a label without a name, or a class that no test image belongs to.
  """
  _checked(images, images.test)
  empty = np.setdiff1d(np.arange(len(images.classes)), images.test.labels_N)
  if len(empty):
    raise UserError(f'class {images.classes[empty[0]]!r} of {images.name!r} has no test image'
                    + (f', nor have {len(empty) - 1} others' if len(empty) > 1 else ''))
  return images


def _checked(images: ImageSet, part: Part) -> Part:
  if not len(part.labels_N):
    raise UserError(f'{images.name!r} has no images in {part.name!r}')
  if part.labels_N.min() < 0 or part.labels_N.max() >= len(images.classes):
    raise UserError(f'{part.name!r} has a label outside 0 to {len(images.classes) - 1}, the classes of {images.name!r}')
  return part
