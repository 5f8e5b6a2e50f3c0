"""Where records come from: random access to `records.Record`, by any number of threads and processes.

A new kind is one file and a line in `SOURCES`. A source is named KIND:PATH, several as `KIND:PATH + KIND:PATH`.
"""
from collections.abc import Callable
from typing import Any, Protocol, SupportsIndex

from lightclip_jax import storage
from lightclip_jax.data import manifest
from lightclip_jax.data.records import Record
from lightclip_jax.data.sources import array_record, folder, parquet, table, tfds, webdataset
from lightclip_jax.data.sources.mixture import MixtureSource, Part
from lightclip_jax.data.sources.spec import Spec
from lightclip_jax.errors import UserError


class Source(Protocol):
  """Random access to the records of one split. Reading one raises `faults.BadRecord` where it cannot be used.

  Where captions lie apart from images, `captions(index)` reads them alone; `captions.at` reads those of any source.
  """
  fingerprint: str             # of the contents, as far as they are told without reading all

  def __len__(self) -> int: ...

  def __getitem__(self, index: SupportsIndex) -> Record: ...

  def name(self, index: int) -> str: ...


SOURCES: dict[str, Callable[[Spec], Source]] = {
    'array_record': array_record.open_train,
    'csv': table.CsvSource,
    'folder': folder.FolderSource,
    'jsonl': table.JsonlSource,
    'parquet': parquet.ParquetSource,
    'tfds': tfds.TfdsSource,
    'tsv': table.CsvSource,
    'webdataset': webdataset.WebDatasetSource,
}
# Options of a `Spec` that say nothing to a kind.
IGNORED: dict[str, tuple[str, ...]] = {
    'array_record': ('image_column', 'caption_column', 'image_root'),
    'folder': ('image_column', 'image_root'),
    'parquet': ('image_root',),
    'webdataset': ('image_column', 'image_root'),
}
HELDOUT = 'heldout'            # the split of a source that training leaves out, where `data.holdout_every` asks for one


def open_split(folder: str | storage.Path, split: str) -> Source:
  """The records of a split; UserError if there is no such folder or split."""
  contents = manifest.load(folder)
  if not contents.source:
    return array_record.ArrayRecordSource(folder, split)
  contents.split(split)
  return open_parts(contents.source, split)


def open_parts(about: dict[str, Any], split: str) -> Source:
  """The split of sources that a manifest names: {'parts': [...], 'weights': [...], 'holdout_every': int}.

  Splits other than `train`, and `HELDOUT` where records are held out here, are those of the first prepared folder alone.
  UserError if there is no such source, or one with a weight has no record.
  """
  every = about['holdout_every']
  if split != 'train' and not (split == HELDOUT and every):
    return array_record.ArrayRecordSource(prepared(about), split)
  parts: list[Source] = []
  for values in about['parts']:
    source = SOURCES[values['kind']](Spec(**values))
    parts.append(Part(source, every, split == HELDOUT) if every else source)
  for values, part in zip(about['parts'], parts, strict=True):
    if about['weights'] and split == 'train' and not len(part):
      raise UserError(f'{values["kind"]}:{values["path"]} has no training records to draw; leave it and its weight out')
  return parts[0] if len(parts) == 1 else MixtureSource(parts, tuple(about['weights']))


def prepared(about: dict[str, Any]) -> str:
  """The first prepared folder among such sources; '' where there is none."""
  return next((part['path'] for part in about['parts'] if part['kind'] == 'array_record'), '')


def parse(name: str) -> tuple[str, str]:
  """The kind and path of "KIND:PATH".

  Raises:
    UserError: for a kind that is not known.
  """
  kind, _, path = name.partition(':')
  if kind not in SOURCES or not path:
    raise UserError(f'{name!r} is no KIND:PATH; the kinds are: {", ".join(SOURCES)}')
  return kind, path
