"""One image with all its captions, as it lies in a shard (msgpack)."""
import dataclasses

import msgpack

from lightclip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Record:
  """An encoded image and what is known about it; `captions[0]` is the concept's name, fields without meaning are ''."""
  key: str                     # unique in its data set
  image: bytes                 # an encoded image file (WebP, PNG, JPEG, ...)
  captions: tuple[str, ...]
  style: str = ''              # who drew it
  concept: str = ''
  group: str = ''
  licence: str = ''            # SPDX identifier


_FIELDS = tuple(field.name for field in dataclasses.fields(Record))


def key_of(name: str) -> str:
  """A file's name as a key, which is stored and hashed: names of files need not be UTF-8, keys are."""
  return name.encode('utf-8', 'backslashreplace').decode()


def encode(record: Record) -> bytes:
  """The record as bytes: a msgpack list of its fields in order."""
  return msgpack.packb([getattr(record, name) for name in _FIELDS])


def decode(data: bytes) -> Record:
  """The record that `encode` wrote.

  Raises:
    UserError: if `data` is not such a record.
  """
  try:
    values = dict(zip(_FIELDS, msgpack.unpackb(data), strict=True))
    return Record(**{**values, 'captions': tuple(values['captions'])})
  except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
    raise UserError(f'a record of {len(data)} bytes cannot be read ({error}); prepare the data set again') from error
