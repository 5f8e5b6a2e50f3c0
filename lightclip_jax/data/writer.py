"""Writing a prepared folder: shards, tokenizer and manifest, all there or not there at all."""
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from array_record.python import array_record_module

from lightclip_jax.data import manifest as manifests
from lightclip_jax.data import records as records_lib
from lightclip_jax.data import tokenizers
from lightclip_jax.data.records import Record
from lightclip_jax.errors import UserError

RECORDS_PER_SHARD = 8192
TOKENIZER_FILE = 'tokenizer.model'
# One record a chunk: random access reads no neighbour. Images are compressed already.
WRITER_OPTIONS = 'group_size:1,uncompressed'


@dataclasses.dataclass(frozen=True)
class About:
  """What a manifest says beside what can be counted."""
  name: str
  image_size: int
  vocab_size: int              # of the tokenizer, at most
  concepts: tuple[str, ...] = ()
  groups: tuple[str, ...] = ()
  licences: Mapping[str, str] = dataclasses.field(default_factory=dict)
  packages: Mapping[str, str] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def new_folder(out: pathlib.Path, keep: bool = False) -> Iterator[pathlib.Path | None]:
  """A hidden sibling of `out` to write into; it becomes `out` when the block ends well, else it is deleted.

  With `keep` it stays instead, and the next one finds what it holds.

  Gives None when `out` is already a prepared folder. Of several processes one writes, the others wait for it. What a
  killed process left is deleted by the next.

  Raises:
    UserError: if `out` exists and is something else, or cannot be written.
  """
  if out.parts[:1] and out.parts[0].endswith(':'):
    raise UserError(f'{str(out)!r} is in a bucket; prepare on a disk, then copy the folder there (docs/SCALE.md)')
  out = out.absolute()
  if out.exists() and not (out / manifests.FILE_NAME).is_file() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'{str(out)!r} exists and is not a prepared data set; give --out a new or an empty folder')
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f'.{out.name}.partial'
    with _locked(partial):
      if (out / manifests.FILE_NAME).is_file():
        partial.rmdir()
        yield None
      else:
        yield from _fill(partial, out, keep)
  except OSError as error:
    raise UserError(f'cannot write {str(out)!r}: {error.strerror or error}') from error


def _fill(partial: pathlib.Path, out: pathlib.Path, keep: bool) -> Iterator[pathlib.Path]:
  for leftover in () if keep else partial.iterdir():
    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
  try:
    yield partial
    partial.rename(out)
  except BaseException:
    if not keep:
      shutil.rmtree(partial, ignore_errors=True)
    raise


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Makes `folder` and holds its lock; the system gives the lock back when the process dies, however it does."""
  descriptor = None
  while descriptor is None:
    with contextlib.suppress(FileExistsError):
      os.mkdir(folder)
    descriptor = _lock(folder)
  try:
    yield
  finally:
    os.close(descriptor)


def _lock(folder: pathlib.Path) -> int | None:
  """Waits for the lock; None where the one who held it has renamed or deleted the folder: that lock is worth nothing."""
  descriptor = None
  try:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
      return descriptor
  except FileNotFoundError:
    pass
  if descriptor is not None:
    os.close(descriptor)
  return None


def write(folder: pathlib.Path, splits: Mapping[str, Iterable[Record]], about: About) -> manifests.Manifest:
  """Shards of every split, a tokenizer trained on the captions of `train` only, and last the manifest.

  Raises:
    UserError: if the split `train` is missing or has no captions.
  """
  if 'train' not in splits:
    raise UserError(f'a data set needs a split train; {about.name!r} has only: {", ".join(splits)}')
  captions: list[str] = []
  written = {name: _write_split(folder, name, records, captions if name == 'train' else [])
             for name, records in splits.items()}
  tokenizer = tokenizers.train(captions, about.vocab_size)
  (folder / TOKENIZER_FILE).write_bytes(tokenizer.to_bytes())
  files = [TOKENIZER_FILE, *(shard for split in written.values() for shard in split.shards)]
  manifest = manifests.Manifest(
      name=about.name, splits=written, tokenizer=TOKENIZER_FILE, image_size=about.image_size, concepts=about.concepts,
      groups=about.groups, licences=dict(about.licences), packages=dict(about.packages),
      sha256={file: sha256(folder / file) for file in files})
  manifest.save(folder)
  return manifest


def _write_split(folder: pathlib.Path, name: str, records: Iterable[Record], captions: list[str]) -> manifests.Split:
  """Writes the records in order and appends their captions to `captions`."""
  shards: list[str] = []
  count = 0
  records = iter(records)
  for first in records:
    shards.append(f'{name}-{len(shards):05d}.array_record')
    with contextlib.closing(Shard(folder / shards[-1])) as shard:
      for record in itertools.chain([first], itertools.islice(records, RECORDS_PER_SHARD - 1)):
        shard.write(records_lib.encode(record))
        captions.extend(record.captions)
        count += 1
  return manifests.Split(tuple(shards), count)


class Shard:
  """A file of records that is being written. A full disk is an OSError, often only of `close`."""

  def __init__(self, file: pathlib.Path):
    self._file = array_record_module.ArrayRecordWriter(str(file), WRITER_OPTIONS)

  def write(self, data: bytes) -> None:
    """Appends a record."""
    self._call(self._file.write, data)

  def close(self) -> None:
    """Ends the file; what was written is not all there before."""
    self._call(self._file.close)

  def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
    try:
      function(*arguments)
    except RuntimeError as error:   # "write() failed: No space left on device; writing FILE; at byte 0; ..."
      raise OSError(str(error).removeprefix('write() failed: ').split('; ')[0]) from error


def sha256(path: pathlib.Path) -> str:
  """Hash of a file's bytes, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
