"""A source in another process than the one that has counted and shuffled its records."""
import functools
from collections.abc import Callable
from typing import Any, SupportsIndex

from lightclip_jax.data import captions
from lightclip_jax.data.records import Record
from lightclip_jax.data.sources.spec import Spec
from lightclip_jax.errors import UserError


class Reopened:
  """Opened when it is first read: an error while it is unpickled would end the worker and be lost."""

  def __init__(self, kind: Callable[[Spec], Any], spec: Spec, fingerprint: str):
    """
    Args:
      kind: opens the source.
      spec: what it is told.
      fingerprint: of the source that was pickled. Where it is another now, reading raises UserError: every number would
        stand for another record.
    """
    self._kind, self._spec, self.fingerprint = kind, spec, fingerprint

  @functools.cached_property
  def opened(self) -> Any:
    """The source itself. Raises UserError where it has changed."""
    source = self._kind(self._spec)
    if source.fingerprint != self.fingerprint:
      raise UserError(f'{self._spec.path!r} has changed while it was read; start again')
    return source

  def __len__(self) -> int:
    return len(self.opened)

  def name(self, index: int) -> str:
    """The source's."""
    return self.opened.name(index)

  def __getitem__(self, index: SupportsIndex) -> Record:
    return self.opened[index]

  def captions(self, index: int) -> tuple[str, ...]:
    """The record's, without its image where the source can."""
    return captions.at(self.opened, index)

  def __reduce__(self) -> tuple[Any, ...]:
    return Reopened, (self._kind, self._spec, self.fingerprint)
