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
from lightclip_jax.data.records import Record
from lightclip_jax.errors import UserError

IMAGES, CAPTIONS, STARTS = FILES = 'teacher-images.f16', 'teacher-captions.f16', 'teacher-starts.i64'
RECORDS_AT_A_TIME = 256
_HOW = 'make them with: python -m lightclip_jax.prepare teacher --model=DIR --data='

Encoders = tuple[Callable[[Sequence[np.ndarray]], np.ndarray], Callable[[Sequence[str]], np.ndarray]]


class Teacher:
  """The embeddings in a prepared folder. Picklable (each process maps the files itself) and safe to read from threads."""

  def __init__(self, folder: str | pathlib.Path):
    """Raises UserError if the folder has no teacher's embeddings, or files that do not belong to its records."""
    self._folder = pathlib.Path(folder)
    contents = manifest.load(folder)
    if contents.teacher is None:
      raise UserError(f'data folder {str(folder)!r} has no embeddings of a teacher; {_HOW}{folder}')
    self.dim, self.sha256 = contents.teacher.dim, contents.teacher.sha256
    count = contents.split('train').count
    for file in FILES:
      if not (self._folder / file).is_file():
        raise UserError(f'{str(self._folder / file)!r} is missing; {_HOW}{folder}')
    self._images, self._captions = (np.memmap(self._folder / file, '<f2', 'r').reshape(-1, self.dim)
                                    if (self._folder / file).stat().st_size % (2 * self.dim) == 0 else ()
                                    for file in (IMAGES, CAPTIONS))
    self._starts = np.fromfile(self._folder / STARTS, '<i8')
    if (len(self._images), len(self._starts), len(self._captions)) != (count, count + 1, self._starts[-1:].sum()):
      raise UserError(f"the teacher's embeddings in {str(folder)!r} are not those of its {count} records; {_HOW}{folder}")

  def __call__(self, example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The example of the pipeline with `teacher_image` and `teacher_text`, float16 [E], of its record and caption."""
    record = int(example['example_id'])
    caption = self._starts[record] + int(example['caption_number'])
    return {**example, 'teacher_image': np.array(self._images[record], np.float16),
            'teacher_text': np.array(self._captions[caption], np.float16)}

  def __reduce__(self):
    return Teacher, (self._folder,)


def write(folder: str | pathlib.Path, name: str, encoders: Encoders,
          progress: Callable[[Iterator[list[Record]], int], Iterator[list[Record]]]) -> manifest.Teacher:
  """Fills the files of a prepared folder; earlier ones are replaced when all is there, and never mixed with new ones.

  Args:
    folder: the prepared folder; every record of its split `train` is read.
    name: the teacher's, for the manifest.
    encoders: (n images uint8 RGB [H, W, 3], n texts) -> float [n, E] each, unit vectors.
    progress: wraps (the parts, how many there are), to show how far it is.

  Raises:
    UserError: for a folder that is not prepared, that has no training records, or that cannot be written.
  """
  folder = pathlib.Path(folder)
  contents, source = manifest.load(folder), sources.open_split(folder, 'train')
  if not len(source):
    raise UserError(f'data folder {str(folder)!r} has no training records')
  total = -(-len(source) // RECORDS_AT_A_TIME)
  parts = ([source[i] for i in range(n * RECORDS_AT_A_TIME, min((n + 1) * RECORDS_AT_A_TIME, len(source)))]
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


def _sha256(folder: pathlib.Path) -> str:
  """Of the hashes of the three files."""
  total = hashlib.sha256()
  for name in FILES:
    with (folder / name).open('rb') as file:
      total.update(hashlib.file_digest(file, 'sha256').digest())
  return total.hexdigest()


def _fill(partial: pathlib.Path, parts: Iterator[list[Record]], encoders: Encoders) -> int:
  """Writes the three files; returns E. A caption that occurs twice among some records is embedded once."""
  encode_images, encode_texts = encoders
  counts = [0]
  with open(partial / IMAGES, 'wb') as images, open(partial / CAPTIONS, 'wb') as captions:
    for records in parts:
      images_NxE = encode_images([transforms.decode(record.image) for record in records])
      counts += [len(record.captions) for record in records]
      texts = list(itertools.chain.from_iterable(record.captions for record in records))
      number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
      texts_CxE = encode_texts(list(number))[[number[text] for text in texts]]
      images.write(images_NxE.astype('<f2').tobytes())
      captions.write(texts_CxE.astype('<f2').tobytes())
  np.cumsum(counts, dtype='<i8').tofile(partial / STARTS)
  return images_NxE.shape[1]
