"""Paths on a disk or in a bucket: `gs://bucket/folder` can stand where a folder can.

Orbax, ArrayRecord and JAX's compilation cache read and write gs:// themselves; what this project writes goes through
`etils.epath`, whose paths have pathlib's methods.
"""
import errno
import os
import pathlib
import sys
import time
from collections.abc import Callable

import fsspec
from etils import epath

from lightclip_jax.errors import UserError

Path = pathlib.Path | epath.Path
PAUSES = (1, 2, 4, 8, 16)   # seconds before storage that failed is asked again
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)


def path(name: str | os.PathLike[str]) -> Path:
  """A local path, or one in a bucket with the same methods.

  Raises:
    UserError: for another kind of bucket than gs://, or without the package that reaches it.
  """
  text = os.fspath(name)
  scheme, separator, _ = text.partition('://')
  if not separator:
    return pathlib.Path(text)
  if scheme != 'gs':
    raise UserError(f'{text!r}: only gs:// buckets are read and written (checkpoints and records know no other); mount a '
                    f'{scheme}:// bucket as a disk (docs/SCALE.md)')
  try:
    fsspec.get_filesystem_class('gcs')
  except ImportError as error:
    raise UserError(f'{text!r} is in a bucket, which the package gcsfs reaches: pip install gcsfs') from error
  return epath.Path(text)


def in_bucket(path: Path) -> bool:
  """Whether a path is not on a disk: nothing can be appended to there, and a file appears when it is closed."""
  return '://' in os.fspath(path)


def absolute(path: Path) -> Path:
  """The path from the root, or with its bucket."""
  return path if in_bucket(path) else path.absolute()


def passing(error: OSError) -> bool:
  """Whether the same may work a little later: not if a disk is full or read-only, or a place is missing or forbidden."""
  return error.errno not in _LASTING


def persistently(attempt: Callable[[], object], what: str) -> None:
  """Calls `attempt`, again after 1, 2, 4, 8 and 16 seconds where storage failed for a moment; each time one line says so.

  Raises:
    OSError: the last one, or one that is not `passing`.
  """
  for pause in (*PAUSES, None):
    try:
      attempt()
      return
    except OSError as error:
      if pause is None or not passing(error):
        raise
      print(f'{what}: {error}; tried again in {pause} s', file=sys.stderr, flush=True)
      time.sleep(pause)


def write_text(path: Path, text: str) -> None:
  """Writes or replaces a file at once: no reader, and no later run, finds half of it. Tried again as `persistently` does."""
  persistently(lambda: _write_text(path, text), f'writing {path.name}')


def _write_text(path: Path, text: str) -> None:
  if in_bucket(path):
    path.write_text(text)
    return
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_text(text, encoding='utf-8')
  temporary.replace(path)
