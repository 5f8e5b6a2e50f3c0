"""WebDataset tar files in img2dataset's layout (KEY.jpg beside KEY.txt or KEY.json), read at random through an index.

The text goes before the JSON, unless `data.caption_column` names what is to be read of that.
A tar is walked header by header, once; nothing of it is unpacked, and no name in it is ever used as a path.
"""
import collections
import os
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, SupportsIndex

import numpy as np
import tqdm

from lightclip_jax.data import captions, files, indexes
from lightclip_jax.data.faults import REASONS, BadRecord
from lightclip_jax.data.records import Record, key_of
from lightclip_jax.data.sources.reopened import Reopened
from lightclip_jax.data.sources.spec import Spec
from lightclip_jax.errors import UserError

IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff')
_CAPTIONS = ('txt', 'json')    # the first that a sample has, or with `data.caption_column` the last
_BLOCK = 512
_MAX_HEADER_DATA = 1 << 20     # of a long name; more is an attack or noise
_SHOWN = 5                     # kinds of files that are named
_GOOD = -1
_ROW = np.dtype([('tar', np.int32), ('image_at', np.int64), ('image_size', np.int64), ('caption_at', np.int64),
                 ('caption_size', np.int64), ('caption_kind', np.int8), ('fault', np.int8)])


class Member(NamedTuple):
  """A file in a tar; `fault` is a reason why it cannot be used, or ''."""
  name: str
  at: int
  size: int
  fault: str = ''


class WebDatasetSource:
  """Random access by position over all tar files of a folder (or one tar); safe to read from threads."""

  def __init__(self, spec: Spec):
    """Builds the index where there is none for the tars as they are; raises UserError without tars, or JSON if asked for."""
    self.spec = spec
    # An older version's index with the same options has the places of texts.
    self._rules = [indexes.RULES, spec.caption_column] if spec.caption_column else [indexes.RULES]
    self._folder, self._tars = files.shards(spec.path, '.tar')
    try:
      stamps = [self._folder.stamp(tar) for tar in self._tars]
    except (OSError, BadRecord) as error:
      raise UserError(f'cannot read {spec.path!r}: {error}') from error
    self._table = indexes.stored(f'{spec.index}/all', [*self._rules, stamps], lambda: self._build(stamps))
    self._rows = self._table['rows']
    if spec.caption_column and len(self) and not (self._rows['caption_kind'] == _CAPTIONS.index('json')).any():
      raise UserError(f'data.caption_column is {spec.caption_column!r}, but {spec.path!r} has no JSON beside its images; '
                      "leave it at ''")
    # Tars are padded, so that other contents often have the same size.
    self.fingerprint = indexes.digest([*self._rules, len(self), [stamp[:2] for stamp in stamps]])

  def _build(self, stamps: list[tuple[str, int, str]]) -> indexes.Table:
    tables, aside = [], collections.Counter()
    for number, stamp in enumerate(tqdm.tqdm(stamps, 'indexing', unit=' tar', disable=None, leave=False)):
      table = indexes.stored(f'{self.spec.index}/tar-{indexes.digest(stamp[0])}', [*self._rules, stamp],
                             lambda s=stamp: self._build_one(s, aside))
      rows = np.array(table['rows'])
      rows['tar'] = number
      tables.append({**table, 'rows': rows})
    if aside:
      kinds = ', '.join(f'{count:,} {kind!r:.20}' for kind, count in aside.most_common(_SHOWN))
      print(f'{self.spec.path}: left aside, as neither images ({", ".join(IMAGES)}) nor captions ({", ".join(_CAPTIONS)}) of a '
            f'sample: {kinds}{", ..." * (len(aside) > _SHOWN)}', file=sys.stderr, flush=True)
    return indexes.joined(tables)

  def _build_one(self, stamp: tuple[str, int, str], aside: collections.Counter[str]) -> indexes.Table:
    with self._folder.open(stamp[0]) as file:
      samples = list(_samples(walk(file, stamp[1]), aside, _CAPTIONS[::-1] if self.spec.caption_column else _CAPTIONS))
    rows = np.array([(0, *row) for _, row in samples], _ROW) if samples else np.zeros(0, _ROW)
    return {'rows': rows, **indexes.pack([key for key, _ in samples])}

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, index: int) -> str:
    """Tar and key."""
    return f'{self._tars[self._rows[index]["tar"]]}/{indexes.unpack(self._table, index)}'

  def __getitem__(self, index: SupportsIndex) -> Record:
    image, text = self._parts(index, 'image', 'caption')
    return Record(key_of(self.name(index)), image, self._parse(index, text))

  def captions(self, index: int) -> tuple[str, ...]:
    """Those of the sample, without its image. Raises BadRecord."""
    return self._parse(index, *self._parts(index, 'caption'))

  def _parts(self, index: SupportsIndex, *parts: str) -> list[bytes]:
    row = self._rows[index]
    if row['fault'] != _GOOD:
      raise BadRecord(list(REASONS)[row['fault']])
    with self._folder.open(self._tars[row['tar']]) as file:
      return [_part(file, row[f'{part}_at'], row[f'{part}_size']) for part in parts]

  def _parse(self, index: SupportsIndex, text: bytes) -> tuple[str, ...]:
    is_json = _CAPTIONS[self._rows[index]['caption_kind']] == 'json'
    return captions.of_json(text, self.spec.caption_column) if is_json else captions.of_lines(text)

  def __reduce__(self) -> tuple[Any, ...]:
    return Reopened, (WebDatasetSource, self.spec, self.fingerprint)


def _part(file: BinaryIO, at: int, size: int) -> bytes:
  file.seek(int(at))
  data = file.read(int(size))
  if len(data) != size:
    raise BadRecord('damaged', 'the tar is shorter than when it was indexed')
  return data


def _samples(members: Iterator[Member], aside: collections.Counter[str], kinds: tuple[str, ...],
             ) -> Iterator[tuple[str, tuple[int, ...]]]:
  """(key, row) in the order of the keys' first members; what is there twice or lacks a half is a row with a fault.

  Of several captions the first of `kinds` counts. What belongs to no sample is counted in `aside` by the end of its name:
  nothing else would say that it was there.
  """
  groups: dict[str, dict[str, Member]] = {}
  faulty = []
  for member in members:
    key, extension = _split(member.name)
    if member.fault == 'damaged':
      faulty.append((member.name, _row(fault='damaged')))
    elif extension in IMAGES + _CAPTIONS:
      kind = 'image' if extension in IMAGES else extension
      if kind in (group := groups.setdefault(key, {})):
        if kind == 'image':   # a repeated caption is the same record's
          faulty.append((key, _row(fault='duplicate')))
      else:
        group[kind] = member
    else:
      hidden = os.path.basename(member.name).startswith('.')
      aside['.*' if hidden else os.path.splitext(member.name)[1].lower()] += 1
  for key, group in groups.items():
    if len(group) > 1 or (whole := _whole(key)) == key or whole not in groups:
      yield key, _sample(group, kinds)
    else:   # KEY.mask.png of the sample KEY
      aside[next(iter(group.values())).name[len(whole):].lower()] += 1
  yield from faulty


def _split(name: str) -> tuple[str, str]:
  """A member's key and its extension in small letters: what follows the first dot of its name, as WebDataset has it.

  Where that is not known, it is what follows the last one (photo.1.jpg), but for names that begin with a dot, as macOS adds.
  """
  key = _whole(name)
  extension = name[len(key) + 1:].lower()
  if extension in IMAGES + _CAPTIONS or key.endswith('/') or not key:
    return key, extension
  key, _, extension = name.rpartition('.')
  return key, extension.lower()


def _whole(name: str) -> str:
  """Up to the first dot of what follows the last slash."""
  folder, slash, base = name.rpartition('/')
  return folder + slash + base.partition('.')[0]


def _sample(group: dict[str, Member], kinds: tuple[str, ...]) -> tuple[int, ...]:
  caption = next((kind for kind in kinds if kind in group), None)
  fault = next((member.fault for member in group.values() if member.fault), '')
  if fault or 'image' not in group or not caption:
    return _row(fault=fault or ('no_caption' if 'image' in group else 'missing'))
  image, text = group['image'], group[caption]
  return _row(image.at, image.size, text.at, text.size, _CAPTIONS.index(caption))


def _row(image_at: int = 0, image_size: int = 0, caption_at: int = 0, caption_size: int = 0, caption_kind: int = 0,
         fault: str = '') -> tuple[int, ...]:
  return image_at, image_size, caption_at, caption_size, caption_kind, list(REASONS).index(fault) if fault else _GOOD


def walk(file: BinaryIO, size: int) -> Iterator[Member]:
  """The members of a tar (ustar, GNU or pax) of `size` bytes that are files or links, read by their headers alone.

  A link has the fault 'outside'; where the archive is cut off or no header, one member has 'damaged', and it ends.
  """
  at, renamed = 0, {}
  while at + _BLOCK <= size:
    file.seek(at)
    header = file.read(_BLOCK)
    if not header.strip(b'\0'):
      return
    length, kind = _number(header[124:136]), header[156:157]
    if not _is_header(header) or length is None or (kind in b'LKxg' and length > _MAX_HEADER_DATA):
      yield Member(f'byte {at}', at, 0, 'damaged')
      return
    data_at, name = at + _BLOCK, _name(header)
    if kind in b'Lx':
      renamed |= _extended(kind, file.read(length))
    elif kind not in b'Kg':
      name, length = renamed.get('path', name), _pax_size(renamed, length)
      renamed = {}
      if kind in b'0\x007' and data_at + length <= size:
        yield Member(name, data_at, length)
      elif kind in b'12':
        yield Member(name, data_at, 0, 'outside')
        length = 0
      elif data_at + length > size:
        yield Member(name, data_at, 0, 'damaged')
        return
    at = data_at + -(-length // _BLOCK) * _BLOCK
  if at < size:
    yield Member(f'byte {at}', at, 0, 'damaged')


def _name(header: bytes) -> str:
  prefix = header[345:500].split(b'\0', 1)[0] if header[257:263] == b'ustar\0' else b''
  name = header[:100].split(b'\0', 1)[0]
  return (prefix + b'/' + name if prefix else name).decode('utf-8', 'surrogateescape')


def _is_header(header: bytes) -> bool:
  return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * ord(' ')


def _number(field: bytes) -> int | None:
  """Octal text, or (GNU, for 8 GiB and more) binary after a first byte of 128; None if it is neither."""
  if field[:1] == b'\x80':
    return int.from_bytes(field[1:], 'big')
  text = field.strip(b' \0')
  try:
    return int(text, 8) if text.isdigit() or not text else None
  except ValueError:
    return None


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
  """What a GNU long name (L) or pax header (x) says about the next member."""
  if kind == b'L':
    return {'path': data.split(b'\0', 1)[0].decode('utf-8', 'surrogateescape')}
  out, at = {}, 0
  while at < len(data):
    length, space, _ = data[at:at + 20].partition(b' ')
    if not space or not length.isdigit() or not int(length):
      break
    key, _, value = data[at + len(length) + 1:at + int(length) - 1].decode('utf-8', 'surrogateescape').partition('=')
    out[key] = value
    at += int(length)
  return {key: out[key] for key in ('path', 'size') if key in out}


def _pax_size(renamed: dict[str, str], length: int) -> int:
  value = renamed.get('size', '')
  return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else length
