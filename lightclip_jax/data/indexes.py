"""Tables on disk that say where records lie: built once, mapped into memory, rebuilt when what they describe changes."""
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Table = dict[str, np.ndarray]
FORMAT = 1
RULES = 2   # by which tars and tables are cut into records: one more wherever an index that was made before would be wrong


def digest(value: Any) -> str:
  """Short hash of a JSON value."""
  return hashlib.sha256(json.dumps([FORMAT, value]).encode()).hexdigest()[:16]


def stored(folder: str | pathlib.Path, stamp: Any, build: Callable[[], Table]) -> Table:
  """The arrays that `build` makes, mapped from `folder`; built only where none was stored for `stamp` (a JSON value).

  Processes that build at the same time do not disturb each other: the first one's result counts. Older ones are deleted.
  """
  folder = pathlib.Path(folder)
  target = folder / digest(stamp)
  if not target.is_dir():
    table = build()
    folder.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix='.partial-', dir=folder))
    for name, values in table.items():
      np.save(partial / f'{name}.npy', values)
    try:
      partial.rename(target)
    except OSError:   # another process was faster
      shutil.rmtree(partial)
    for old in folder.iterdir():
      if old != target and not old.name.startswith('.'):
        shutil.rmtree(old, ignore_errors=True)
  return {file.stem: _mapped(file) for file in target.glob('*.npy')}


def _mapped(file: pathlib.Path) -> np.ndarray:
  # A file without rows cannot be mapped, and would not be worth it.
  return np.load(file, mmap_mode='r' if os.path.getsize(file) > 4096 else None, allow_pickle=False)


def pack(names: Sequence[str]) -> Table:
  """Strings as two arrays, `name_bytes` and `name_ends`, which cost no Python objects."""
  encoded = [name.encode('utf-8', 'surrogateescape') for name in names]
  return {'name_bytes': np.frombuffer(b''.join(encoded), np.uint8),
          'name_ends': np.cumsum([len(name) for name in encoded], dtype=np.int64)}


def unpack(table: Table, index: int) -> str:
  """String `index` of those that `pack` took."""
  start = int(table['name_ends'][index - 1]) if index else 0
  return table['name_bytes'][start:int(table['name_ends'][index])].tobytes().decode('utf-8', 'surrogateescape')


def joined(tables: Iterable[Table]) -> Table:
  """Tables of the same columns one after the other; `pack`ed names stay right."""
  tables = list(tables)
  out = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
  if 'name_ends' in out:
    before = np.cumsum([0, *(len(table['name_bytes']) for table in tables[:-1])])
    out['name_ends'] = np.concatenate([table['name_ends'] + start for table, start in zip(tables, before, strict=True)])
  return out
