"""Paths on a disk or in a bucket: `gs://bucket/folder` can stand where a folder can.

Orbax, ArrayRecord and JAX's compilation cache read and write gs:// themselves; what this project writes goes through
`etils.epath`, whose paths have pathlib's methods.
"""
import contextlib
import errno
import fcntl
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import fsspec
from etils import epath

from lightclip_jax.errors import UserError

Path = pathlib.Path | epath.Path
T = TypeVar('T')

# What a disk or a network may get over by itself; a full or a read-only disk does not. A folder is not empty when it is removed
# after a save that failed and still has writes under way.
PASSING = {errno.EIO, errno.ENOTEMPTY, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT,
           errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ECONNABORTED, errno.ECONNRESET, errno.ECONNREFUSED,
           errno.EHOSTDOWN, errno.EHOSTUNREACH}
WAITS = (1.0, 2.0, 4.0, 8.0)   # seconds between attempts: together less than the half minute that preemption leaves


def path(name: str | os.PathLike[str]) -> Path:
  """A local path (~ is the home folder), or one in a bucket with the same methods.

  Raises:
    UserError: for another kind of bucket than gs://, or without the package that reaches it.
  """
  text = os.fspath(name)
  scheme, separator, _ = text.partition('://')
  if not separator:
    return pathlib.Path(os.path.expanduser(text))   # shells leave the ~ of --workdir=~/x alone
  if scheme != 'gs':
    raise UserError(f'{text!r}: only gs:// buckets are read and written (checkpoints and records know no other); mount a '
                    f'{scheme}:// bucket as a disk (docs/SCALE.md)')
  try:
    fsspec.get_filesystem_class('gcs')
  except ImportError as error:
    raise UserError(f'{text!r} is in a bucket, which the package gcsfs reaches: pip install gcsfs') from error
  return epath.Path(text)


def on_disk(name: str | os.PathLike[str]) -> pathlib.Path:
  """A local path (~ is the home folder), where a bucket will not do.

  Raises:
    UserError: for a bucket.
  """
  if in_bucket(name):
    raise UserError(f'{os.fspath(name)!r} is in a bucket; this needs a folder on a disk (copy it, or mount the bucket)')
  return pathlib.Path(os.path.expanduser(name))


def in_bucket(path: str | os.PathLike[str]) -> bool:
  """Whether a path is not on a disk: nothing can be appended to there, and a file appears when it is closed."""
  return '://' in os.fspath(path)


def absolute(path: Path) -> Path:
  """The path from the root, or with its bucket."""
  return path if in_bucket(path) else path.absolute()


def passes(error: OSError) -> bool:
  """Whether another attempt may succeed without anybody's help."""
  return error.errno in PASSING or isinstance(error, (TimeoutError, ConnectionError))


@contextlib.contextmanager
def bucket_errors() -> Iterator[None]:
  """Makes an error of the body that gcsfs would try again, such as the answer 503, one that `passes`: most are no OSError."""
  try:
    yield
  except Exception as error:
    gcsfs = sys.modules.get('gcsfs.retry')   # which is imported where there is a bucket
    if not gcsfs or not gcsfs.is_retriable(error):
      raise
    raise ConnectionError(f'the bucket does not answer ({str(error) or type(error).__name__})') from error


def patiently(action: Callable[[], T]) -> T:
  """What `action()` returns, which is called again after each of `WAITS` while storage fails with an error that passes."""
  for seconds in WAITS:
    try:
      with bucket_errors():
        return action()
    except OSError as error:
      if not passes(error):
        raise
      said = f'{error.strerror}: {error.filename!r}' if error.strerror and error.filename else error
      print(f'{said}; tried again in {seconds:g} s', file=sys.stderr, flush=True)
      time.sleep(seconds)
  with bucket_errors():
    return action()


@contextlib.contextmanager
def alone(folder: pathlib.Path, doing: str, flag: str, patient: bool = False) -> Iterator[None]:
  """Makes the folder, in which no other process is `doing` the same meanwhile.

  The system gives the lock back when this process dies, however it does. Disks that have no locks for folders (NFS) are not
  protected.

  Args:
    folder: what is written.
    doing: what another one does there, for the error: "trains in".
    flag: the command's that names the folder.
    patient: whether another one is waited for, as in `patiently`; it may just be ending.

  Raises:
    UserError: where another process goes on.
  """
  folder.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    take = functools.partial(_lock, descriptor, folder, doing)
    try:
      patiently(take) if patient else take()
    except BlockingIOError as error:
      raise UserError(f'another process {doing} {str(folder)!r}; wait for it, stop it, or use another {flag}') from error
    yield
  finally:
    os.close(descriptor)


def _lock(descriptor: int, folder: pathlib.Path, doing: str) -> None:
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise BlockingIOError(error.errno, f'another process {doing} this folder', str(folder)) from error
  except OSError:   # no such locks here
    pass


def make_folder(folder: Path) -> None:
  """Makes a folder with those above it, if it is not there. In a bucket one is there as long as something is in it."""
  if in_bucket(folder):
    write_text(folder / '.folder', 'so that it is there\n')
  else:
    folder.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
  """Writes or replaces a file at once, patiently: no reader, and no later run, finds half of it."""
  patiently(lambda: _write_text(path, text))


def _write_text(path: Path, text: str) -> None:
  if in_bucket(path):
    path.write_text(text)
    return
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_text(text, encoding='utf-8')
  temporary.replace(path)
