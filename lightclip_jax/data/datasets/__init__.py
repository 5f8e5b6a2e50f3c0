"""The built-in data sets, by name. A new one is a function that makes a folder, and a line here."""
import os
import pathlib
from collections.abc import Callable

from lightclip_jax import storage
from lightclip_jax.data import manifest
from lightclip_jax.data.datasets import emoji, shapes
from lightclip_jax.errors import UserError

# name -> prepare(out, size in pixels, processes): makes the folder `out`, or does nothing if it is there.
BUILT_IN: dict[str, Callable[..., None]] = {
    'emoji': emoji.prepare,
    'shapes': shapes.prepare,
}
# Counted up whenever a built-in set's contents change, so that no run continues on, or is compared with, an older one.
EDITION = {'emoji': 2, 'shapes': 1}


def cache() -> pathlib.Path:
  """Where built-in data sets lie: `$LIGHTCLIP_DATA`, else the user's cache."""
  fallback = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'lightclip_jax'
  return pathlib.Path(os.environ.get('LIGHTCLIP_DATA') or fallback).expanduser()


def folder_of(name: str) -> pathlib.Path:
  """Where the present edition of a built-in data set lies, or will lie."""
  return cache() / f'{name}-{EDITION[name]}'


def resolve(name_or_folder: str) -> storage.Path:
  """The folder of a data set; a built-in one is prepared in the cache if it is not there yet.

  Raises:
    UserError: for something that is neither a built-in name nor a prepared folder, or if the preparation fails.
  """
  if name_or_folder in BUILT_IN:
    folder = folder_of(name_or_folder)
    BUILT_IN[name_or_folder](folder)
  else:
    folder = storage.path(name_or_folder).expanduser()
    if not folder.exists():
      raise UserError(f'data set {name_or_folder!r} is neither a folder nor a built-in name ({", ".join(BUILT_IN)})')
  manifest.load(folder)
  return folder
