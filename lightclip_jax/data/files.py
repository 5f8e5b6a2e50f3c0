"""Reading below one folder, on disk or in a bucket (fsspec), and never outside it."""
import functools
import os
import pathlib
import stat
import sys
from typing import Any, BinaryIO

import fsspec

from lightclip_jax.data.faults import BadRecord
from lightclip_jax.errors import UserError


class Folder:
  """A folder that untrusted names are looked up in: what leads out of it, by `..`, as a path or as a link, is refused."""

  def __init__(self, path: str | pathlib.Path):
    """Raises UserError if `path` is no folder, or of a storage whose package is not installed."""
    self.path = str(path)
    self.local = '://' not in self.path
    if self.local:
      self._root = os.path.realpath(os.path.expanduser(self.path))
      found = os.path.isdir(self._root)
    else:
      try:
        self._remote, self._root = fsspec.core.url_to_fs(self.path)
        found = self._remote.isdir(self._root)
      except (ImportError, ValueError, OSError) as error:
        raise UserError(f'cannot read {self.path!r}: {error}') from error
    if not found:
      what = 'is a file, not a folder' if self.local and os.path.exists(self._root) else 'is not there'
      raise UserError(f'data folder {self.path!r} {what}')

  def files(self, *suffixes: str) -> list[str]:
    """Names of the files below the folder that end so, sorted; links are not followed, and one of them is named.

    Names that begin with a dot are left out, as are folders of such names: Macs leave a ._NAME.jpg beside each NAME.jpg.

    Raises:
      UserError: if a folder in it cannot be read: what is there would be missing, and nobody would know.
    """
    if self.local:
      found, links = [], set()
      for folder, folders, names in os.walk(self._root, onerror=_refuse):
        folders[:] = [name for name in folders if name[0] != '.']
        wanted = [os.path.join(folder, name) for name in names if name[0] != '.' and name.lower().endswith(suffixes)]
        links.update(path for path in [*(os.path.join(folder, name) for name in folders), *wanted] if os.path.islink(path))
        found += wanted
      if links:
        _say_once(f'{self.path}: links are not followed, such as {min(links)!r} ({len(links):,} in all); what they lead to is '
                  'missing, unless it is copied there or is a source of its own')
      return sorted(os.path.relpath(path, self._root) for path in found if path not in links)
    prefix = self._root.rstrip('/') + '/'
    names = (name.removeprefix(prefix) for name in self._remote.find(self._root) if name.lower().endswith(suffixes))
    return sorted(name for name in names if not any(part.startswith('.') for part in name.split('/')))

  def stamp(self, name: str) -> tuple[str, int, str]:
    """Name, bytes and time of the last change."""
    if self.local:
      about = os.stat(self._inside(name))
      return name, about.st_size, str(about.st_mtime_ns)
    about = self._remote.info(self._inside(name))
    return name, int(about['size']), str(about.get('mtime') or about.get('updated') or about.get('etag') or '')

  def open(self, name: str) -> BinaryIO:
    """The file, to be read from anywhere.

    Raises:
      BadRecord: if it is outside, missing, or no ordinary file.
    """
    path = self._inside(name)
    try:
      if not self.local:
        return self._remote.open(path, 'rb')
      # Not blocking: a named pipe would wait for a writer for ever.
      file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), 'rb', buffering=0)
      if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
      file.close()
    except (OSError, ValueError) as error:
      raise BadRecord('missing', name) from error
    raise BadRecord('missing', name)

  def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
    """`size` bytes from `start` on, or all; fewer where the file ends. Raises as `open` does."""
    with self.open(name) as file:
      if start:
        file.seek(start)
      try:
        return file.read(-1 if size is None else size)
      except OSError as error:
        raise BadRecord('missing', name) from error

  def _inside(self, name: str) -> str:
    if not self.local:
      if name.startswith('/') or '..' in name.split('/') or '://' in name:
        raise BadRecord('outside', name)
      return f'{self._root.rstrip("/")}/{name}'
    try:
      path = os.path.realpath(os.path.join(self._root, name))
    except (OSError, ValueError) as error:   # a zero byte, or a ring of links
      raise BadRecord('missing', repr(name)) from error
    if os.path.commonpath((path, self._root)) != self._root:
      raise BadRecord('outside', name)
    return path

  def __reduce__(self) -> tuple[Any, ...]:
    return Folder, (self.path,)


def _refuse(error: OSError) -> None:
  raise UserError(f'cannot read the folder {error.filename!r}: {error.strerror}; make it readable, or take it out') from error


@functools.cache
def _say_once(text: str) -> None:   # a source is opened several times in a run
  print(text, file=sys.stderr, flush=True)


def shards(path: str, suffix: str) -> tuple[Folder, list[str]]:
  """The one file that `path` names, or all below that folder which end so: their folder and names.

  Raises:
    UserError: if there are none.
  """
  if path.endswith(suffix) and not _is_folder(path):
    return Folder(os.path.dirname(path) or '.'), [os.path.basename(path)]
  folder = Folder(path)
  if not (names := folder.files(suffix)):
    raise UserError(f'{path!r} has no {suffix} files (links are not followed)')
  return folder, names


def _is_folder(path: str) -> bool:   # Spark and Dask write a folder x.parquet
  if '://' not in path:
    return os.path.isdir(os.path.expanduser(path))
  try:
    remote, name = fsspec.core.url_to_fs(path)
    return remote.info(name)['type'] == 'directory'
  except (ImportError, ValueError, OSError):   # `Folder` says what is wrong
    return False
