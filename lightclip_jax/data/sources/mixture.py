"""Several sources as one, and one source as two splits."""
import bisect
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from lightclip_jax.data import captions, indexes
from lightclip_jax.data.records import Record
from lightclip_jax.data.sources.reopened import Reopened
from lightclip_jax.data.sources.table import TableSource


class MixtureSource:
  """The records of several sources, one source after the other; what is drawn from which is the pipeline's affair."""

  def __init__(self, parts: Sequence[Any], weights: tuple[float, ...] = ()):
    self.parts, self.weights = tuple(parts), weights
    self.starts = list(itertools.accumulate(map(len, parts), initial=0))
    self.fingerprint = indexes.digest([[part.fingerprint for part in parts], weights])

  def __len__(self) -> int:
    return self.starts[-1]

  def name(self, index: int) -> str:
    """The part's name of the record."""
    number = bisect.bisect_right(self.starts, index) - 1
    return self.parts[number].name(index - self.starts[number])

  def __getitem__(self, index: SupportsIndex) -> Record:
    index = operator.index(index)
    number = bisect.bisect_right(self.starts, index) - 1
    return self.parts[number][index - self.starts[number]]

  def captions(self, index: int) -> tuple[str, ...]:
    """The record's, without its image where the part can."""
    number = bisect.bisect_right(self.starts, index) - 1
    return captions.at(self.parts[number], index - self.starts[number])


class Part:
  """Each `every`-th record from the first (`heldout`), or all the others; of tables, images with all their rows."""

  def __init__(self, source: Any, every: int, heldout: bool):
    self._source, self._every, self._heldout = source, every, heldout
    self.fingerprint = indexes.digest([source.fingerprint, every, heldout, *['images'] * (self._places is not None)])

  @functools.cached_property
  def _places(self) -> np.ndarray | None:
    # A worker's is made when it is first read: it depends on the source, which is opened then, and not on what stands for it.
    source = self._source.opened if isinstance(self._source, Reopened) else self._source
    if not isinstance(source, TableSource) or (images := source.images()).max(initial=-1) + 1 == len(source):
      return None
    return np.flatnonzero((images % self._every == 0) == self._heldout)   # COCO's have five rows an image

  def __len__(self) -> int:
    if self._places is not None:
      return len(self._places)
    heldout = -(-len(self._source) // self._every)
    return heldout if self._heldout else len(self._source) - heldout

  def place(self, index: int) -> int:
    """The record's index in the whole source."""
    if self._places is not None:
      return int(self._places[index])
    return index * self._every if self._heldout else index + index // (self._every - 1) + 1

  def name(self, index: int) -> str:
    """The source's."""
    return self._source.name(self.place(index))

  def __getitem__(self, index: SupportsIndex) -> Record:
    return self._source[self.place(operator.index(index))]

  def captions(self, index: int) -> tuple[str, ...]:
    """The record's, without its image where the source can."""
    return captions.at(self._source, self.place(index))

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in vars(self).items() if name != '_places'}


def origin(source: Any, index: int) -> tuple[int, int]:
  """The part of a mixture (0 where there is one) in which a record lies, and its index there, what is held out counted too."""
  number = 0
  if isinstance(source, MixtureSource):
    number = bisect.bisect_right(source.starts, index) - 1
    source, index = source.parts[number], index - source.starts[number]
  return number, source.place(index) if isinstance(source, Part) else index


def part_of(source: Any, index: int) -> tuple[int, int]:
  """Where the records that lie in the same part of a mixture (or are all there are) begin and end."""
  if not isinstance(source, MixtureSource):
    return 0, len(source)
  number = bisect.bisect_right(source.starts, index) - 1
  return source.starts[number], source.starts[number + 1]
