"""Picture files: which there are in a folder, and each as the array that the image tower reads.

Letters: H height, W width, S output size.
"""
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from lightclip_jax.data import transforms
from lightclip_jax.errors import UserError

File = tuple[str, int, int]   # path below the folder, bytes, modification time in ns

SUFFIXES = frozenset('.jpg .jpeg .jfif .png .webp .gif .bmp .tif .tiff .avif .ppm .pgm'.split())
UNSUPPORTED = frozenset(['.heic', '.heif'])   # an iPhone's photographs, which Pillow cannot decode


def find(folder: pathlib.Path) -> tuple[list[File], dict[File, str]]:
  """Every picture by its suffix, sorted, and the folders that cannot be read, with the reason; links to folders and hidden
  folders are not entered, and hidden files, as Macs leave them, are none.

  Raises:
    UserError: if `folder` is no folder that can be read.
  """
  def note(error: OSError) -> None:
    if pathlib.Path(error.filename) == folder:
      raise UserError(f'{str(folder)!r} is no folder that can be read: {error.strerror}') from error
    unreadable[os.path.relpath(error.filename, folder), 0, 0] = f'cannot read the folder {error.filename!r}: {error.strerror}'

  found, unreadable = [], {}
  for path in _with_suffix(folder, SUFFIXES, note):
    status = os.stat(path)
    found.append((os.path.relpath(path, folder), status.st_size, status.st_mtime_ns))
  return found, unreadable


def count_unsupported(folder: pathlib.Path) -> int:
  """How many pictures in the same folders are of a format that cannot be read."""
  return sum(1 for _ in _with_suffix(folder, UNSUPPORTED))


def _with_suffix(folder: pathlib.Path, suffixes: frozenset[str], note: Callable[[OSError], None] | None = None
                 ) -> Iterator[str]:
  for parent, folders, names in os.walk(folder, onerror=note):
    folders[:] = sorted(name for name in folders if not name.startswith('.'))
    for name in sorted(names):
      path = os.path.join(parent, name)
      if name[0] != '.' and os.path.splitext(name)[1].lower() in suffixes and os.path.isfile(path):
        yield path


def read(path: str | os.PathLike[str], size: int) -> np.ndarray:
  """uint8 RGB [S, S, 3]: upright, resized and cropped as in evaluation (data/transforms.py).

  Raises:
    UserError: for a file that is no whole picture.
  """
  try:
    return transforms.evaluation_transform(transforms.decode(pathlib.Path(path).read_bytes()), size)
  except MemoryError:
    raise
  except Exception as error:   # decoders have errors of many kinds, and a damaged file must not stop a million others
    reason = next(iter(str(error).splitlines()), '') or type(error).__name__
    raise UserError(f'cannot read the picture {str(path)!r}: {reason}') from error
