"""Parquet files with image bytes, in Hugging Face's layout: a column {bytes, path} (or bytes), and one of captions.

A row is read with its whole row group, which the last few readers keep; where row groups are large, `prepare parquet`
makes shards that are faster to read at random.
"""
import bisect
import functools
import itertools
import threading
from typing import Any, SupportsIndex

import pyarrow
import pyarrow.parquet

from lightclip_jax.data import captions, files, indexes
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.data.records import Record
from lightclip_jax.data.sources.reopened import Reopened
from lightclip_jax.data.sources.spec import Spec
from lightclip_jax.errors import UserError

_IMAGE_COLUMNS = ('image', 'jpg', 'png', 'webp', 'img')
_CAPTION_COLUMNS = ('caption', 'captions', 'text', 'title', 'txt', 'sentences')
_KEPT_GROUPS = 4
_ERRORS = (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError)


class ParquetSource:
  """Rows of all files in the order of their names; safe to read from threads."""

  def __init__(self, spec: Spec):
    """Raises UserError without files, or for one that is no Parquet file or lacks the columns."""
    self.spec = spec
    self._folder, self._files = files.shards(spec.path, '.parquet')
    self._lock = threading.Lock()
    self._group = functools.lru_cache(_KEPT_GROUPS)(self._read_group)
    heads = [self._head(file) for file in self._files]
    self._columns = heads[0][1]
    if differing := [file for file, head in zip(self._files, heads, strict=True) if head[1] != self._columns]:
      raise UserError(f'{differing[0]!r} has other columns than {self._files[0]!r}')
    self._groups = [(file, group) for file, (sizes, _) in zip(self._files, heads, strict=True) for group in range(len(sizes))]
    sizes = itertools.chain.from_iterable(head[0] for head in heads)
    self._starts = list(itertools.accumulate(sizes, initial=0))
    self.fingerprint = indexes.digest([self._folder.stamp(file)[:2] for file in self._files])

  def _head(self, file: str) -> tuple[list[int], tuple[str, str]]:
    """Rows of each row group; the two columns' names."""
    try:
      with self._folder.open(file) as opened, pyarrow.parquet.ParquetFile(opened) as parquet:
        about = parquet.metadata
        sizes = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        names = parquet.schema_arrow.names
    except (*_ERRORS, BadRecord) as error:
      raise UserError(f'{file!r} in {self._folder.path!r} is no whole Parquet file ({str(error).splitlines()[0]})') from error
    return sizes, (_column(names, self.spec.image_column, _IMAGE_COLUMNS, file),
                   _column(names, self.spec.caption_column, _CAPTION_COLUMNS, file))

  def _read_group(self, number: int, columns: tuple[str, ...]) -> pyarrow.Table:
    file, group = self._groups[number]
    # Buffered in advance, the file is read by a thread of Arrow's, which aborts a process that ends while it frees the bytes.
    with self._folder.open(file) as opened, pyarrow.parquet.ParquetFile(opened, pre_buffer=False) as parquet:
      return parquet.read_row_group(group, columns=list(columns), use_threads=False)

  def __len__(self) -> int:
    return self._starts[-1]

  def name(self, index: int) -> str:
    """File and number of the row in it, from 1."""
    number = bisect.bisect_right(self._starts, index) - 1
    file = self._groups[number][0]
    return f'{file} row {index - self._starts[next(i for i, g in enumerate(self._groups) if g[0] == file)] + 1}'

  def __getitem__(self, index: SupportsIndex) -> Record:
    index = range(len(self))[index]
    image, caption = self._values(index, self._columns)
    image = image.get('bytes') if isinstance(image, dict) else image
    if not isinstance(image, bytes):   # a path would lead anywhere; Hugging Face's own loader wants bytes here too
      raise BadRecord('missing', 'no image bytes')
    return Record(f'{index}', image, captions.of_value(caption))

  def captions(self, index: int) -> tuple[str, ...]:
    """Those of the row; the column of images is not read. Raises BadRecord."""
    return captions.of_value(*self._values(index, self._columns[1:]))

  def _values(self, index: int, columns: tuple[str, ...]) -> list[Any]:
    number = bisect.bisect_right(self._starts, index) - 1
    try:
      with self._lock:   # neither the cache nor a reader may be used by two threads at once
        table = self._group(number, columns)
      return [table[name][index - self._starts[number]].as_py() for name in columns]
    except UnicodeDecodeError as error:
      raise BadRecord('bad_caption') from error
    except _ERRORS as error:
      raise error if isinstance(error, BadRecord) else BadRecord('damaged', str(error).splitlines()[0]) from error

  def __reduce__(self) -> tuple[Any, ...]:
    return Reopened, (ParquetSource, self.spec, self.fingerprint)


def _column(names: list[str], wanted: str, usual: tuple[str, ...], file: str) -> str:
  for name in (wanted,) if wanted else usual:
    if name in names:
      return name
  there = ' '.join(', '.join(names).split())[:200]   # a name may have line breaks
  raise UserError(f'{file!r} has no column {wanted or " or ".join(usual)}; it has: {there}')
