"""A folder of images by class: DIR/CLASS/*.png, or DIR/train/CLASS/… and DIR/test/CLASS/… (or val, validation)."""
import functools
import pathlib
import sys

import numpy as np

from lightclip_jax.data import transforms
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.labelled import ImageSet, Part

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')
TRAIN, VALIDATION, TEST = 'train', ('val', 'validation'), 'test'


def load(path: str) -> ImageSet:
  """Classes are the folders' names in order, "_" read as a blank. Without `test`, a folder of validation is tested.

  Raises:
    UserError: if there is no such folder, it has no folders of classes, or one of these has no image.
  """
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    raise UserError(f'there is no folder {path!r}; it must hold one folder of images for each class')
  there, names = _folders(root), (TRAIN, *VALIDATION, TEST)
  beside = set(there) - set(names)   # where there are others, a train without folders is a class: trains
  parts = {name: root / name for name in names if name in there and (not beside or _folders(root / name))}
  validation = next((parts[name] for name in VALIDATION if name in parts), None)
  test = parts.get(TEST, validation or (root if TRAIN not in parts else None))
  if test is None:
    raise UserError(f'{path!r} has a folder train, but neither test nor val')
  classes = _folders(test)
  if not classes:
    raise UserError(f'{str(test)!r} has no folders; it must hold one folder of images for each class')
  find = lambda part: (_part(part, classes, 'leaves {} out'),) if part and part != test else ()  # noqa: E731
  return ImageSet(root.name, tuple(name.replace('_', ' ') for name in classes), _part(test, classes, 'counts {} as a mistake'),
                  functools.partial(find, parts.get(TRAIN)), functools.partial(find, validation))


def _folders(path: pathlib.Path) -> list[str]:
  return sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith('.'))


def _part(folder: pathlib.Path, classes: list[str], loss: str) -> Part:
  """`loss`: what is said of an image that cannot be read."""
  files, labels = [], []
  for label, name in enumerate(classes):
    found = sorted(file for file in (folder / name).rglob('*') if file.suffix.lower() in SUFFIXES
                   and not any(part.startswith('.') for part in file.relative_to(folder / name).parts))   # Macs leave ._a.jpg
    if not found:
      raise UserError(f'class {name!r} in {str(folder)!r} has no image ({", ".join(SUFFIXES)})')
    files += found
    labels += [label] * len(found)
  return Part(str(folder.absolute()), functools.partial(_read, files, loss), np.array(labels))


def _read(files: list[pathlib.Path], loss: str, index: int) -> np.ndarray | None:
  try:
    return transforms.decode(files[index].read_bytes())
  except (OSError, BadRecord) as error:
    reason = error if isinstance(error, BadRecord) else error.strerror
    print(f'evaluation {loss.format(repr(str(files[index])))}: {reason}', file=sys.stderr, flush=True)
    return None
