"""Where records come from: random access to `records.Record`, by any number of threads and processes."""
from collections.abc import Callable
from typing import Protocol, SupportsIndex

from lightclip_jax import storage
from lightclip_jax.data.records import Record
from lightclip_jax.data.sources import array_record


class Source(Protocol):
  """Random access to the records of one split."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: SupportsIndex) -> Record: ...


SOURCES: dict[str, Callable[[str | storage.Path, str], Source]] = {
    'array_record': array_record.ArrayRecordSource,
}


def open_split(folder: str | storage.Path, split: str, kind: str = 'array_record') -> Source:
  """The records of a split; UserError if there is no such folder or split."""
  return SOURCES[kind](folder, split)
