"""Tables of image paths and captions: CSV and TSV (open_clip's `filepath` and `title`) and JSON lines.

Only the place of each row is kept; a row is read and parsed when its record is asked for.
"""
import codecs
import csv
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, SupportsIndex

import numpy as np
import tqdm

from lightclip_jax.data import captions, indexes
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.data.files import Folder
from lightclip_jax.data.records import Record
from lightclip_jax.data.sources.reopened import Reopened
from lightclip_jax.data.sources.spec import Spec
from lightclip_jax.errors import UserError

IMAGE_COLUMNS = ('filepath', 'image', 'image_path', 'file_name', 'path')
CAPTION_COLUMNS = ('title', 'caption', 'captions', 'text')
_OPEN_QUOTE = re.compile(rb'(?:^|\t)"(?:[^"]|"")*\Z')   # at the start of a field, and not closed
_TSV_FIELD = re.compile(r'(?:^|\t)(?:"((?:[^"]|"")*)"(?=\t|\Z)|([^\t]*))')
_UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


class TableSource:
  """Rows by number; images are files below the table's folder, or `data.image_root`."""

  def __init__(self, spec: Spec):
    """Raises UserError if the file or its columns are not there, or it is not UTF-8."""
    self.spec = spec
    folder, self._file = os.path.split(spec.path)
    self._folder = Folder(folder or '.')
    self._images = Folder(spec.image_root) if spec.image_root else self._folder
    try:
      self._stamp = stamp = self._folder.stamp(self._file)
      self._check_utf8()
      self._ends = indexes.stored(spec.index, [indexes.RULES, stamp], lambda: {'ends': self._row_ends()})['ends']
    except (OSError, BadRecord) as error:
      raise UserError(f'cannot read {spec.path!r}: {error}') from error
    self.fingerprint = indexes.digest([indexes.RULES, stamp[:2]])
    self._open()

  def _check_utf8(self) -> None:
    start = self._folder.read(self._file, 0, 64)
    if start[:2] in _UTF16 or b'\0' in start:
      raise UserError(f'{self.spec.path!r} is no UTF-8 text (UTF-16, perhaps, as spreadsheets save it); save it as UTF-8')

  def _open(self) -> None:
    """Reads what comes before the rows."""

  def _row_ends(self) -> np.ndarray:
    """int64 [N + 1]: where row i ends is entry i + 1, where it starts entry i."""
    with self._folder.open(self._file) as opened, io.BufferedReader(opened) as file:
      return np.array(list(self._ends_of(file)), np.int64)

  def _ends_of(self, file: BinaryIO) -> Iterator[int]:
    raise NotImplementedError

  def _parse(self, row: bytes) -> tuple[Any, Any]:
    """Path and caption. Raises BadRecord."""
    raise NotImplementedError

  def images(self) -> np.ndarray:
    """int64 [N]: the number of each row's image, in the order in which they appear; the whole table is read for it, once."""
    stamp = [indexes.RULES, self._stamp]
    return indexes.stored(f'{self.spec.index}-images', stamp, lambda: {'images': self._image_numbers()})['images']

  def _image_numbers(self) -> np.ndarray:
    sizes = tqdm.tqdm(np.diff(self._ends), 'reading paths', unit=' rows', disable=None, leave=False)
    with self._folder.open(self._file) as opened, io.BufferedReader(opened) as file:
      file.seek(int(self._ends[0]) if len(self._ends) else 0)
      # Hashes, as the paths of twelve million rows would fill a gigabyte.
      hashes = np.fromiter((self._path_hash(file.read(int(size))) for size in sizes), np.int64)
    _, first, images = np.unique(hashes, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[images]

  def _path_hash(self, row: bytes) -> int:
    try:
      path = self._parse(row)[0]
    except BadRecord:
      path = None
    return hash(path if isinstance(path, str) else row)

  def __len__(self) -> int:
    return max(0, len(self._ends) - 1)

  def name(self, index: int) -> str:
    """File and number of the row, from 1."""
    return f'{self._file} row {index + 1}'

  def __getitem__(self, index: SupportsIndex) -> Record:
    path, caption = self._row(int(index))
    if not isinstance(path, str) or not path:
      raise BadRecord('missing', 'no path')
    texts = captions.of_value(caption)
    return Record(f'{int(index)}/{path}', self._images.read(path), texts)

  def captions(self, index: int) -> tuple[str, ...]:
    """Those of the row, whose image need not be there. Raises BadRecord."""
    return captions.of_value(self._row(index)[1])

  def _row(self, index: int) -> tuple[Any, Any]:
    start, end = (int(place) for place in self._ends[index:index + 2])
    return self._parse(self._folder.read(self._file, start, end - start))

  def __reduce__(self) -> tuple[Any, ...]:
    return Reopened, (type(self), self.spec, self.fingerprint)


class CsvSource(TableSource):
  """CSV or TSV with a header; the separator is a tab where the header has one."""

  def _open(self) -> None:
    end = int(self._ends[0]) if len(self._ends) else 0
    header = self._folder.read(self._file, 0, end).decode('utf-8-sig', 'replace').strip('\r\n')
    if '\r' in header.replace('\r\n', ''):
      raise UserError(f'the lines of {self.spec.path!r} end with CR alone, as on old Macs; save it with LF or CRLF')
    self._is_tsv = '\t' in header
    try:
      columns = _tsv_fields(header) if self._is_tsv else next(csv.reader(io.StringIO(header, newline='')), [])
    except csv.Error as error:
      raise UserError(f'{self.spec.path!r} has no header that can be read: {error}') from error
    self._columns = len(columns)
    self._image = _column(columns, self.spec.image_column, IMAGE_COLUMNS, self.spec.path)
    self._caption = _column(columns, self.spec.caption_column, CAPTION_COLUMNS, self.spec.path)

  def _ends_of(self, file: BinaryIO) -> Iterator[int]:
    """After each row; the header's end comes first. A row may have line breaks inside quotes."""
    is_tsv = b'\t' in file.peek(1 << 16).lstrip(b'\r\n').split(b'\n', 1)[0]
    return _tsv_ends(file) if is_tsv else _csv_ends(file)

  def _parse(self, row: bytes) -> tuple[Any, Any]:
    try:
      text = row.decode('utf-8').strip('\r\n')   # empty lines before it are the row's
      rows = [_tsv_fields(text)] if self._is_tsv else csv.reader(io.StringIO(text, newline=''), strict=True)
      values = list(itertools.chain.from_iterable(rows))   # a CR between two rows joins them, and is seen by their columns
    except UnicodeDecodeError as error:
      raise BadRecord('bad_caption') from error
    except csv.Error as error:
      raise BadRecord('damaged', str(error)) from error
    if len(values) != self._columns:   # as where a caption with a comma is not quoted, which would lose its end
      raise BadRecord('damaged', f'{len(values)} columns, the header has {self._columns}')
    return values[self._image], values[self._caption]


def _csv_ends(file: BinaryIO) -> Iterator[int]:
  lines = _Lines(file)
  while True:
    try:
      for row in csv.reader(lines):
        if row:
          yield lines.at
      return
    except csv.Error:   # an endless quoted field: that row is lost, the next line is looked at anew
      yield lines.at


def _tsv_ends(file: BinaryIO) -> Iterator[int]:
  """A quoted field goes on until its quote is closed, or until a line with as many tabs as the header has.

  That is the next row: in many a TSV quotes mean nothing, and one that nobody closes would take in the rows after it.
  """
  tabs, at, end, is_open = -1, 0, 0, False
  for line in file:
    at += len(line)
    if is_open and line.count(b'\t') != tabs:
      is_open ^= line.count(b'"') % 2
      end = at
    elif line.strip(b'\r\n'):
      if end:
        yield end
      is_open, end = _OPEN_QUOTE.search(line) is not None, at
      tabs = line.count(b'\t') if tabs < 0 else tabs
  if end:
    yield end


def _tsv_fields(row: str) -> list[str]:
  """Quotes that do not enclose a whole field are letters. Raises csv.Error where one is not closed on the lines after it."""
  fields = [(field[1], field[2]) for field in _TSV_FIELD.finditer(row)]
  if any(plain and '\n' in plain for _, plain in fields):
    raise csv.Error('a quote is not closed')
  return [plain if quoted is None else quoted.replace('""', '"') for quoted, plain in fields]


class _Lines:
  """Lines of a file as text in which every byte survives; `at` is where the next one starts."""

  def __init__(self, file: BinaryIO):
    self._file, self.at = file, 0

  def __iter__(self) -> Iterator[str]:
    return self

  def __next__(self) -> str:
    line = self._file.readline()
    if not line:
      raise StopIteration
    self.at += len(line)
    return line.decode('latin-1')


def _column(columns: list[str], wanted: str, usual: tuple[str, ...], path: str) -> int:
  for name in (wanted,) if wanted else usual:
    if name in columns:
      return columns.index(name)
  there = ' '.join(', '.join(columns).split())[:200]   # a quoted name may have line breaks
  raise UserError(f'{path!r} has no column {wanted or " or ".join(usual)}; it has: {there}')


class JsonlSource(TableSource):
  """One JSON object a line, but for blank ones; captions may be a list."""

  def _ends_of(self, file: BinaryIO) -> Iterator[int]:
    yield 0
    at = 0
    for line in file:
      at += len(line)
      if line.strip(b' \t\r\n'):   # JSON's own: blank lines before an object are its row's
        yield at

  def _parse(self, row: bytes) -> tuple[Any, Any]:
    try:
      values = json.loads(row.decode('utf-8-sig'))
    except UnicodeDecodeError as error:
      raise BadRecord('bad_caption') from error
    except (ValueError, RecursionError) as error:
      raise BadRecord('damaged', 'no JSON') from error
    if not isinstance(values, dict):
      raise BadRecord('damaged', 'no JSON object')
    columns = ((self.spec.image_column, IMAGE_COLUMNS), (self.spec.caption_column, CAPTION_COLUMNS))
    path, caption = (captions.first(values, (wanted,) if wanted else usual) for wanted, usual in columns)
    return path, caption
