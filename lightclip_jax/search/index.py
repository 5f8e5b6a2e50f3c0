"""An index: embeddings of pictures in a plain .npy file, and beside it `index.json` with their paths.

Letters: N pictures, n pictures of a part, S image size, D embedding.
"""
import concurrent.futures
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from lightclip_jax import storage
from lightclip_jax.data import processes
from lightclip_jax.errors import UserError
from lightclip_jax.search import pictures, ranking
from lightclip_jax.search.pictures import File
from lightclip_jax.search.towers import Export

FILE_NAME = 'index.json'
_LEFT = 'embeddings-*.npy', f'{FILE_NAME}.tmp'   # what a killed process or a full disk leaves beside it, or alone
_PART = 64             # pictures that a process takes at a time
_SAVE_SECONDS = 60     # what a killed process loses at most
_COPIED = 65536        # rows of an earlier index at a time
_COLUMNS = ('paths', 'sizes', 'times')


@dataclasses.dataclass(frozen=True)
class Index:
  """What lies in an index folder.

  Attributes:
    folder: of the pictures.
    model: the export that embedded them.
    fingerprint: of that export.
    embeddings: name of the file with the vectors.
    files: one a row.
    bad: those that could not be read, and folders, with the reason.
    vectors_NxD: float32, unit norm, a read-only memory map.
  """
  folder: str
  model: str
  fingerprint: str
  embeddings: str
  files: list[File]
  bad: dict[File, str]
  vectors_NxD: np.ndarray

  def nearest(self, query_D: np.ndarray, top: int) -> list[dict[str, str | float]]:
    """The `top` best pictures: [{'path', 'cosine'}, …], best first."""
    rows, cosines = ranking.nearest(self.vectors_NxD, query_D, top)
    return [{'path': os.path.join(self.folder, self.files[row][0]), 'cosine': float(cosine)}
            for row, cosine in zip(rows, cosines, strict=True)]


def load(out: pathlib.Path) -> Index:
  """Reads an index.

  Raises:
    UserError: if `out` is none, or is damaged.
  """
  if not (out / FILE_NAME).is_file():
    raise UserError(f'{str(out)!r} is no index ({FILE_NAME} is missing); make one with: python -m lightclip_jax.search index')
  try:
    about, vectors_NxD = _open(out)
    files = list(zip(*(about[name] for name in _COLUMNS), strict=True))
    bad = {(path, size, changed): reason for path, size, changed, reason in about['bad']}
    index = Index(_plain(about['folder']), about['model'], about['fingerprint'], about['embeddings'], files, bad,
                  vectors_NxD)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'the index {str(out)!r} is damaged ({error!r}); delete it and index again') from error
  if vectors_NxD.ndim != 2 or len(vectors_NxD) != len(files):
    raise UserError(f'the index {str(out)!r} is damaged: {list(vectors_NxD.shape)} embeddings for {len(files)} pictures')
  return index


def _open(out: pathlib.Path) -> tuple[dict[str, Any], np.ndarray]:
  """What `index.json` says, and the embeddings that it names."""
  about = json.loads((out / FILE_NAME).read_text(encoding='utf-8'))
  while True:
    try:
      return about, np.load(out / about['embeddings'], mmap_mode='r')[:about['count']]
    except FileNotFoundError:   # has an update just replaced them?
      before, about = about, json.loads((out / FILE_NAME).read_text(encoding='utf-8'))
      if about['embeddings'] == before['embeddings']:
        raise


def update(folder: pathlib.Path, export: Export, out: pathlib.Path, workers: int | None = None) -> tuple[Index, int]:
  """Makes the index `out`, or embeds what is new or changed since it was made (by path, size and time); what is gone is left
  out. What could not be read is tried again, and what was read in a folder that now cannot be is kept. The index is replaced
  at once, every minute too, so that an interrupted run goes on where it was.

  Args:
    folder: the pictures, recursively.
    export: the model.
    out: a new folder, or an earlier index of the same pictures.
    workers: processes; None: one a core.

  Returns:
    The index, and how many pictures were embedded now.

  Raises:
    UserError: if `folder` cannot be read, or `out` is something else, belongs to other pictures or another model, or another
      process writes it.
  """
  found, bad = pictures.find(folder)
  with storage.alone(out, 'indexes into', '--out'):   # two that did would delete each other's embeddings
    earlier = _earlier(folder, export, out)
    _clear(out, earlier and earlier.embeddings)
    kept = {file: row for row, file in enumerate(earlier.files)} if earlier else {}
    hidden = tuple(os.path.join(path, '') for path, _, _ in bad)
    still = [*found, *(file for file in kept if file[0].startswith(hidden))]
    rows, new = [kept[file] for file in still if file in kept], [file for file in found if file not in kept]
    parts = _embed(folder, new, export, workers)
    if earlier and len(rows) == len(kept) and {*new, *bad} == earlier.bad.keys():   # nothing is new but what was bad
      first = next((part for part in parts if part[0]), None)
      if first is None:
        return earlier, 0
      bad, parts = {**earlier.bad}, itertools.chain([first], parts)
    with _Writer(out, folder, export, bad) as writer:
      writer.keep(earlier, rows)
      for files, vectors_nxD, failures in parts:
        bad.update(failures)
        for file in files:
          bad.pop(file, None)
        writer.add(files, vectors_nxD)
    return load(out), len(new) - sum(file in bad for file in new)


def _earlier(folder: pathlib.Path, export: Export, out: pathlib.Path) -> Index | None:
  if not (out / FILE_NAME).is_file():
    if out.exists() and (not out.is_dir() or not all(any(map(file.match, _LEFT)) for file in out.iterdir())):
      raise UserError(f'{str(out)!r} holds something else; give a new folder')
    return None
  index = load(out)
  for what, was, now in (('pictures', index.folder, _plain(folder)),
                         ('model', index.fingerprint, export.fingerprint())):
    if was != now:
      is_of = repr(was) if what == 'pictures' else f'{index.model!r} as it was, not {str(export.folder)!r} as it is'
      raise UserError(f'the index {str(out)!r} is of the {what} {is_of}; give another --out')
  return index


def _clear(out: pathlib.Path, embeddings: str | None) -> None:
  """Removes what is left of other runs beside the embeddings that the index names."""
  for file in itertools.chain.from_iterable(map(out.glob, _LEFT)):
    if file.name != embeddings:
      file.unlink()   # who still reads it keeps it


def _plain(folder: str | pathlib.Path) -> str:
  """The path from the root without `..`, so that a folder has one name; a `..` that leads out of a link's target stays."""
  plain = os.path.abspath(folder)
  return plain if os.path.realpath(plain) == os.path.realpath(folder) else str(pathlib.Path(folder).absolute())


class _Writer:
  """Appends embeddings to a new file of the index: first those that are kept. What ends the block before all of them are there
  leaves the index as it was; whatever ends it later, what was added is in the index."""

  def __init__(self, out: pathlib.Path, folder: pathlib.Path, export: Export, bad: dict[File, str]):
    self._out, self._bad, self._files, self._whole = out, bad, [], False
    self._name = f'embeddings-{time.time_ns()}.npy'
    self._about = {'folder': _plain(folder), 'model': str(export.folder), 'fingerprint': export.fingerprint()}
    self._dim = export.about['embed_dim']

  def __enter__(self) -> '_Writer':
    self._stream = (self._out / self._name).open('wb')
    self._header()
    self._saved = time.monotonic()
    return self

  def __exit__(self, *_: object) -> None:
    with self._stream:
      if self._whole:
        self._save()
      else:
        (self._out / self._name).unlink()

  def keep(self, earlier: Index | None, rows: list[int]) -> None:
    """Adds rows of the earlier index; from then on this file may replace it."""
    for start in range(0, len(rows), _COPIED):
      part = rows[start:start + _COPIED]
      self.add([earlier.files[row] for row in part], earlier.vectors_NxD[part])
    self._whole = True

  def add(self, files: Sequence[File], vectors_nxD: np.ndarray) -> None:
    self._stream.write(np.ascontiguousarray(vectors_nxD, np.float32).tobytes())
    self._files += files   # now that they are written: an interrupt in between left names without embeddings
    if self._whole and time.monotonic() - self._saved > _SAVE_SECONDS:
      self._save()
      self._saved = time.monotonic()

  def _header(self) -> None:
    shape = len(self._files), self._dim   # numpy leaves room in it for more rows: its length stays
    np.lib.format.write_array_header_1_0(self._stream, {'descr': '<f4', 'fortran_order': False, 'shape': shape})

  def _save(self) -> None:
    self._stream.seek(0)
    self._header()
    self._stream.truncate(self._stream.tell() + 4 * self._dim * len(self._files))   # without half a part
    self._stream.seek(0, os.SEEK_END)
    self._stream.flush()
    os.fsync(self._stream.fileno())
    columns = dict(zip(_COLUMNS, zip(*self._files, strict=True) if self._files else ([], [], []), strict=True))
    bad = [[*file, reason] for file, reason in self._bad.items()]
    storage.write_text(self._out / FILE_NAME, json.dumps(
        {**self._about, 'embeddings': self._name, 'count': len(self._files), **columns, 'bad': bad}))
    _clear(self._out, self._name)


def _embed(folder: pathlib.Path, files: list[File], export: Export, workers: int | None
           ) -> Iterator[tuple[list[File], np.ndarray, dict[File, str]]]:
  """(files that were read, their embeddings [n, D], {bad file: reason}) a part, in order."""
  if not files:
    return
  parts = [files[i:i + _PART] for i in range(0, len(files), _PART)]
  count = min(workers or os.cpu_count() or 1, len(parts))
  pool = concurrent.futures.ProcessPoolExecutor(   # not multiprocessing's, which hangs when a process is killed
      count, multiprocessing.get_context('spawn'), _start, (os.getpid(), folder, export.folder))
  try:
    with tqdm.tqdm(total=len(files), desc='pictures', unit=' pictures', disable=None) as bar:
      for part, (good, vectors_nxD, reasons) in zip(parts, pool.map(_embed_part, parts), strict=True):
        bar.update(len(part))
        yield [part[i] for i in good], vectors_nxD, {part[i]: reason for i, reason in reasons.items()}
  except concurrent.futures.BrokenExecutor as error:
    raise UserError(f'a process that reads the pictures ended (out of memory?); {count} were running: give fewer with '
                    '--processes, and run the command again: it goes on where it was') from error
  finally:
    pool.shutdown(cancel_futures=True)


def _start(parent: int, folder: pathlib.Path, model: pathlib.Path) -> None:
  global _worker
  processes.start_worker(parent)
  export = Export(model)
  _worker = folder, export.size, export.image_tower(), export.about['embed_dim']


def _embed_part(files: list[File]) -> tuple[list[int], np.ndarray, dict[int, str]]:
  """(places of those that were read, their embeddings [n, D], {place: why not})."""
  folder, size, tower, dim = _worker
  images, reasons = {}, {}
  for place, (path, _, _) in enumerate(files):
    try:
      images[place] = pictures.read(folder / path, size)
    except UserError as error:
      reasons[place] = str(error)
  if not images:
    return [], np.zeros((0, dim), np.float32), reasons
  vectors_nxD = tower(np.stack(list(images.values())))
  for place, vector_D in zip(list(images), vectors_nxD, strict=True):
    if not math.isfinite(vector_D.sum()):
      raise UserError(f'the model gives no finite embedding for {str(folder / files[place][0])!r}')
  return list(images), vectors_nxD, reasons
