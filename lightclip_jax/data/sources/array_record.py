"""Records of one split of a folder that `lightclip_jax.prepare` made."""
import dataclasses
from typing import SupportsIndex

from array_record.python.array_record_data_source import ArrayRecordDataSource

from lightclip_jax import storage
from lightclip_jax.data import captions, indexes, manifest, records
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.data.sources.spec import Spec
from lightclip_jax.errors import UserError


class ArrayRecordSource:
  """Random access; picklable (each process opens the files itself) and safe to read from threads."""

  def __init__(self, folder: str | storage.Path, split: str):
    """Raises UserError if the folder, the split or a shard is not there."""
    self.folder, self.split = str(folder), split
    about = manifest.load(folder)
    contents = about.split(split)
    there = {file.name for file in storage.path(folder).iterdir()}   # one question also for a bucket of thousands
    paths = [str(storage.path(folder) / shard) for shard in contents.shards]
    for path, shard in zip(paths, contents.shards, strict=True):
      if shard not in there:
        raise UserError(f'shard {path!r} is missing; prepare the data set again')
    self._count = contents.count
    self._files = ArrayRecordDataSource(paths) if paths else []
    if len(self._files) != self._count:
      raise UserError(f'{self.folder!r} holds {len(self._files)} records of {split!r}; '
                      f'its manifest says {self._count}: prepare it again')
    self.fingerprint = indexes.digest([about.sha256[shard] for shard in contents.shards])

  def __len__(self) -> int:
    return self._count

  def name(self, index: int) -> str:
    """Folder, split and number."""
    return f'{self.folder} {self.split} {index}'

  def __getitem__(self, index: SupportsIndex) -> records.Record:
    try:
      record = records.decode(self._files[index])
    except (UserError, RuntimeError) as error:
      raise BadRecord('damaged', str(error)) from error
    if not isinstance(record.image, bytes):
      raise BadRecord('damaged', 'the image is not bytes')
    # Other programs write such shards too.
    return dataclasses.replace(record, captions=captions.of_value(record.captions))

  def __repr__(self) -> str:
    return f'ArrayRecordSource({self.folder!r}, {self.split!r})'


def open_train(spec: Spec) -> ArrayRecordSource:
  """The training split of a prepared folder, as a part of a mixture."""
  return ArrayRecordSource(spec.path, 'train')
