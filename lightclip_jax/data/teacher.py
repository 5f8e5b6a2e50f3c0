"""A teacher's embeddings beside the records that it has seen (MobileCLIP's dataset reinforcement, arXiv:2311.17049).

Three files beside the shards, named in the manifest: one row an image of `train`, one row a caption, and where each
record's captions begin. Rows are little-endian float16 [E], read through a memory map.

Letters: N records, C captions of all records, n texts or images at a time, H height, W width, E embedding.
"""
import dataclasses
import hashlib
import itertools
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lightclip_jax.data import manifest, sources, transforms
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.data.records import Record
from lightclip_jax.data.sources.mixture import origin
from lightclip_jax.errors import UserError

IMAGES, CAPTIONS, STARTS = FILES = 'teacher-images.f16', 'teacher-captions.f16', 'teacher-starts.i64'
RECORDS_AT_A_TIME = 256
_HOW = 'make them with: python -m lightclip_jax.prepare teacher --model=DIR --data='

Part = list[tuple[Record, np.ndarray]]   # records and their images, uint8 RGB [H, W, 3]
Encoders = tuple[Callable[[Sequence[np.ndarray]], np.ndarray], Callable[[Sequence[str]], np.ndarray]]


class Teacher:
  """The embeddings of a data set's records. Picklable (each process maps the files itself) and safe to read from threads."""

  def __init__(self, folder: str | pathlib.Path):
    """Opens those of a prepared folder; for a mixture of such folders those in each of them, so that they serve in any mixture.

    Raises:
      UserError: if a folder has no teacher's embeddings, or files that do not belong to its records; if those of a mixture
        are of several teachers.
    """
    self._folder, contents = pathlib.Path(folder), manifest.load(folder)
    parts = contents.source.get('parts', ())
    mixed = contents.teacher is None and {part['kind'] for part in parts} == {'array_record'}
    self._source = sources.open_parts(contents.source, 'train') if mixed else None
    self._parts = [_Embeddings(pathlib.Path(part['path'])) for part in parts] if mixed else [_Embeddings(self._folder)]
    entries = [part.entry for part in self._parts]
    if len(teachers := {f'{entry.name!r} of dimension {entry.dim}': None for entry in entries}) > 1:
      raise UserError(f'the embeddings in {contents.name!r} are of several teachers: {", ".join(teachers)}; '
                      f'{_HOW}{contents.name!r}')
    self.dim, hashes = entries[0].dim, [entry.sha256 for entry in entries]
    self.sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256(' '.join(hashes).encode()).hexdigest()

  def __call__(self, example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The example of the pipeline with `teacher_image` and `teacher_text`, float16 [E], of its record and caption."""
    part, record = origin(self._source, int(example['example_id']))
    image_E, text_E = self._parts[part].of(record, int(example['caption_number']))
    return {**example, 'teacher_image': image_E, 'teacher_text': text_E}

  def __reduce__(self):
    return Teacher, (self._folder,)


class _Embeddings:
  """The files in one folder."""

  def __init__(self, folder: pathlib.Path):
    contents = manifest.load(folder)
    if contents.teacher is None:
      raise UserError(f'data folder {str(folder)!r} has no embeddings of a teacher; {_HOW}{folder}')
    self.entry, dim, count = contents.teacher, contents.teacher.dim, contents.split('train').count
    for file in FILES:
      if not (folder / file).is_file():
        raise UserError(f'{str(folder / file)!r} is missing; {_HOW}{folder}')
    self._images, self._captions = (_rows(folder / file, dim) for file in (IMAGES, CAPTIONS))
    self._starts = np.fromfile(folder / STARTS, '<i8')
    if (len(self._images), len(self._starts), len(self._captions)) != (count, count + 1, self._starts[-1:].sum()):
      raise UserError(f"the teacher's embeddings in {str(folder)!r} are not those of its {count} records; {_HOW}{folder}")

  def of(self, record: int, caption: int) -> tuple[np.ndarray, np.ndarray]:
    """float16 [E] of the record's image, and of its caption of that number."""
    return (np.array(self._images[record], np.float16), np.array(self._captions[self._starts[record] + caption], np.float16))


def _rows(file: pathlib.Path, dim: int) -> Sequence[np.ndarray]:
  size = file.stat().st_size   # 0 where a copy was cut off, which cannot be mapped
  return np.memmap(file, '<f2', 'r').reshape(-1, dim) if size and size % (2 * dim) == 0 else ()


def write(folder: str | pathlib.Path, name: str, encoders: Encoders,
          progress: Callable[[Iterator[Part], int], Iterator[Part]]) -> manifest.Teacher:
  """Fills the files of a prepared folder; earlier ones are replaced when all is there, and never mixed with new ones.

  Args:
    folder: the prepared folder; every record of its split `train` is read.
    name: the teacher's, for the manifest.
    encoders: (n images uint8 RGB [H, W, 3], n texts) -> float [n, E] each, unit vectors.
    progress: wraps (the parts, how many there are), to show how far it is.

  Raises:
    UserError: for a folder that is not prepared, that has no training records or one that cannot be used, or that cannot be
      written.
  """
  folder = pathlib.Path(folder)
  contents, source = manifest.load(folder), sources.open_split(folder, 'train')
  limit = max(transforms.MAX_PIXELS, contents.max_pixels)
  if not len(source):
    raise UserError(f'data folder {str(folder)!r} has no training records')
  total = -(-len(source) // RECORDS_AT_A_TIME)
  parts = ([_read(source, i, limit) for i in range(n * RECORDS_AT_A_TIME, min((n + 1) * RECORDS_AT_A_TIME, len(source)))]
           for n in range(total))
  partial = folder / '.teacher.partial'
  try:
    shutil.rmtree(partial, ignore_errors=True)   # of a process that was killed
    partial.mkdir()
    dim = _fill(partial, progress(parts, total), encoders)
    entry = manifest.Teacher(name, dim, _sha256(partial))
    dataclasses.replace(contents, teacher=None).save(folder)   # a crash from here on leaves no teacher, not half of one
    for file in FILES:
      (partial / file).replace(folder / file)
    dataclasses.replace(contents, teacher=entry).save(folder)
  except OSError as error:
    raise UserError(f'cannot write into {str(folder)!r}: {error.strerror or error}') from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return entry


def _read(source: sources.Source, index: int, max_pixels: int) -> tuple[Record, np.ndarray]:
  try:
    record = source[index]
    return record, transforms.decode(record.image, max_pixels)
  except BadRecord as error:
    raise UserError(f'{source.name(index)} cannot be used: {error}; prepare the data set again') from error


def _sha256(folder: pathlib.Path) -> str:
  """Of the hashes of the three files."""
  total = hashlib.sha256()
  for name in FILES:
    with (folder / name).open('rb') as file:
      total.update(hashlib.file_digest(file, 'sha256').digest())
  return total.hexdigest()


def _fill(partial: pathlib.Path, parts: Iterator[Part], encoders: Encoders) -> int:
  """Writes the three files; returns E. A caption that occurs twice among some records is embedded once."""
  encode_images, encode_texts = encoders
  counts = [0]
  with open(partial / IMAGES, 'wb') as images, open(partial / CAPTIONS, 'wb') as captions:
    for part in parts:
      records, decoded = zip(*part, strict=True)
      images_NxE = encode_images(decoded)
      counts += [len(record.captions) for record in records]
      texts = list(itertools.chain.from_iterable(record.captions for record in records))
      number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
      texts_CxE = encode_texts(list(number))[[number[text] for text in texts]]
      images.write(images_NxE.astype('<f2').tobytes())
      captions.write(texts_CxE.astype('<f2').tobytes())
  np.cumsum(counts, dtype='<i8').tofile(partial / STARTS)
  return images_NxE.shape[1]
