"""Picture files: which there are in a folder, and each as the array that the image tower reads.

Letters: H height, W width, S output size.
"""
import io
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import PIL.Image

from lightclip_jax.data import transforms
from lightclip_jax.errors import UserError

SUFFIXES = frozenset('.jpg .jpeg .jfif .png .webp .gif .bmp .tif .tiff .avif .ppm .pgm'.split())
_ORIENTATION = 0x0112   # EXIF's tag: how the camera was held
# What turns each orientation upright: (exchange the axes, then flip rows, flip columns).
_TURNS = {2: (False, False, True), 3: (False, True, True), 4: (False, True, False), 5: (True, False, False),
          6: (True, False, True), 7: (True, True, True), 8: (True, True, False)}


def find(folder: pathlib.Path) -> Iterator[tuple[str, int, int]]:
  """(path below `folder`, bytes, modification time in ns) of every picture by its suffix, sorted; links to folders and hidden
  folders are not entered.

  Raises:
    UserError: if `folder` is no folder that can be read.
  """
  def refuse(error: OSError) -> None:
    if pathlib.Path(error.filename) == folder:
      raise UserError(f'{str(folder)!r} is no folder that can be read: {error.strerror}') from error

  for parent, folders, names in os.walk(folder, onerror=refuse):
    folders[:] = sorted(name for name in folders if not name.startswith('.'))
    for name in sorted(names):
      path = os.path.join(parent, name)
      if os.path.splitext(name)[1].lower() in SUFFIXES and os.path.isfile(path):
        status = os.stat(path)
        yield os.path.relpath(path, folder), status.st_size, status.st_mtime_ns


def read(path: str | os.PathLike[str], size: int) -> np.ndarray:
  """uint8 RGB [S, S, 3]: upright, resized and cropped as in evaluation (data/transforms.py).

  Raises:
    UserError: for a file that is no whole picture.
  """
  try:
    data = pathlib.Path(path).read_bytes()
    return transforms.evaluation_transform(_upright(transforms.decode(data), data), size)
  except MemoryError:
    raise
  except Exception as error:   # decoders have errors of many kinds, and a damaged file must not stop a million others
    reason = next(iter(str(error).splitlines()), '') or type(error).__name__
    raise UserError(f'cannot read the picture {str(path)!r}: {reason}') from error


def _upright(image_HxWx3: np.ndarray, data: bytes) -> np.ndarray:
  """Turned as a JPEG's EXIF says; browsers do the same."""
  if data[:2] != b'\xff\xd8' or b'Exif' not in data[:65536]:
    return image_HxWx3
  turn = _TURNS.get(PIL.Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION))
  if turn is None:
    return image_HxWx3
  exchange, rows, columns = turn
  image_HxWx3 = image_HxWx3.swapaxes(0, 1) if exchange else image_HxWx3
  return np.ascontiguousarray(image_HxWx3[::-1 if rows else 1, ::-1 if columns else 1])
