"""A folder of images, each with its captions beside it: NAME.jpg and NAME.txt (one caption a line) or NAME.json.

The text goes before the JSON, unless `data.caption_column` names what is to be read of that.
"""
import functools
import os
from typing import Any, SupportsIndex

from lightclip_jax.data import captions, indexes
from lightclip_jax.data.faults import BadRecord
from lightclip_jax.data.files import Folder
from lightclip_jax.data.records import Record, key_of
from lightclip_jax.data.sources.spec import Spec
from lightclip_jax.data.sources.webdataset import IMAGES
from lightclip_jax.errors import UserError

_CAPTIONS = ('.txt', '.json', '.TXT', '.JSON')   # as cameras and Windows programs name files, and their pictures
_JSON_FIRST = ('.json', '.JSON', '.txt', '.TXT')


class FolderSource:
  """Images in the order of their names, subfolders included; the list is made anew by every run."""

  def __init__(self, spec: Spec, fingerprint: str = ''):
    """Lists the folder, or reads the list.

    Args:
      spec: where the folder is.
      fingerprint: of a list that another process has stored (for workers).

    Raises:
      UserError: without images, or JSON where it is asked for. What a worker finds wrong is raised when it reads.
    """
    self.spec = spec
    self._folder = Folder(spec.path)
    self.fingerprint = fingerprint
    if not fingerprint:
      if not (names := self._names()):
        raise UserError(f'{spec.path!r} has no images ({", ".join(IMAGES)}; links are not followed)')
      if spec.caption_column and not self._folder.files('.json'):
        raise UserError(f'data.caption_column is {spec.caption_column!r}, but {spec.path!r} has no JSON beside its images; '
                        "leave it at ''")
      self.fingerprint = self._digest(names)
      self._table = indexes.stored(spec.index, self.fingerprint, lambda: indexes.pack(names))

  @functools.cached_property
  def _table(self) -> indexes.Table:
    # A worker's; not read by `__init__`, since an error while it is unpickled would end the worker and be lost.
    return indexes.stored(self.spec.index, self.fingerprint, lambda: indexes.pack(self._same_names()))

  def _digest(self, names: list[str]) -> str:
    return indexes.digest([names, self.spec.caption_column] if self.spec.caption_column else names)

  def _names(self) -> list[str]:
    return self._folder.files(*(f'.{kind}' for kind in IMAGES))

  def _same_names(self) -> list[str]:
    names = self._names()
    if self._digest(names) != self.fingerprint:
      raise UserError(f'{self.spec.path!r} has changed while it was read; start again')
    return names

  def __len__(self) -> int:
    return len(self._table['name_ends'])

  def name(self, index: int) -> str:
    """The image's path below the folder."""
    return indexes.unpack(self._table, index)

  def __getitem__(self, index: SupportsIndex) -> Record:
    name = self.name(int(index))
    return Record(key_of(name), self._folder.read(name), self.captions(int(index)))

  def captions(self, index: int) -> tuple[str, ...]:
    """Those of the record, without its image. Raises BadRecord."""
    return self._captions(os.path.splitext(self.name(index))[0])

  def _captions(self, stem: str) -> tuple[str, ...]:
    for suffix in _JSON_FIRST if self.spec.caption_column else _CAPTIONS:
      try:
        data = self._folder.read(stem + suffix)
      except BadRecord as error:
        if error.reason == 'missing':
          continue
        raise
      is_json = suffix.lower() == '.json'
      return captions.of_json(data, self.spec.caption_column) if is_json else captions.of_lines(data)
    raise BadRecord('no_caption')

  def __reduce__(self) -> tuple[Any, ...]:
    return FolderSource, (self.spec, self.fingerprint)
