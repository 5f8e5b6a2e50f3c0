"""Records that cannot be used: why, how often, and when it is too much.

Letters: b examples of a batch, A attempts to replace one.
"""
import sys
from collections.abc import Callable

import numpy as np

from lightclip_jax.errors import UserError

REASONS = {
    'missing': 'the file is not there or cannot be read',
    'outside': 'the path or link leaves the data folder',
    'damaged': 'the record or archive is cut off or malformed',
    'duplicate': 'another record has the same key or image',
    'empty': 'the image has no bytes',
    'not_image': 'the image is of no known format',
    'truncated': 'the image is cut off or corrupt',
    'oversized': 'the image has more pixels than data.max_pixels',
    'no_caption': 'there is no caption',
    'bad_caption': 'the caption is not UTF-8 text, or no text but a number or an object',
}
ATTEMPTS = 16                  # replacements tried for one example
_SHOWN = 5                     # records of a kind that are named, before only each tenth, hundredth... is
_AT_LEAST = 1000               # records over which the share of faults is taken at first


class BadRecord(ValueError):
  """One record that must be left out; `reason` is a key of `REASONS`."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(reason, detail)
    self.reason, self.detail = reason, detail

  def __str__(self) -> str:
    return REASONS[self.reason] + (f' ({self.detail})' if self.detail else '')


def blank() -> np.ndarray:
  """int64 [A, 2], what an example without faults carries; a fault is (record, 1 + number of its reason)."""
  return np.zeros((ATTEMPTS, 2), np.int64)


def entry(record: int, error: BadRecord) -> tuple[int, int]:
  """One line of that array."""
  return record, 1 + list(REASONS).index(error.reason)


class Ledger:
  """What this process's batches had to leave out, by reason; exact also after a restart from `counts`."""

  def __init__(self, limit: float, name: Callable[[int], str]):
    """
    Args:
      limit: `data.max_faults`, the share of records above which a run stops.
      name: what a person calls a record.
    """
    self.counts: dict[str, int] = {}
    self._limit, self._name = limit, name
    self._seen = self._faults = 0

  def add(self, faults_bxAx2: np.ndarray) -> None:
    """Counts a batch, and names records on stderr at a limited rate.

    Raises:
      UserError: above the limit, over all batches of this process but at least 1,000 records.
    """
    self._seen += len(faults_bxAx2)
    for record, number in faults_bxAx2[faults_bxAx2[..., 1] > 0]:
      reason = list(REASONS)[number - 1]
      self._faults += 1
      self.counts[reason] = count = self.counts.get(reason, 0) + 1
      if count <= _SHOWN or str(count).strip('0') == '1':
        print(f'left out {self._name(int(record))}: {REASONS[reason]} [{reason} {count}]', file=sys.stderr, flush=True)
    looked_at = self._seen + self._faults   # each example that is used, and what was tried before it
    if self._faults > self._limit * max(looked_at, _AT_LEAST):
      raise UserError(f'{self._faults:,} of {looked_at:,} records cannot be used ({self}); data.max_faults is {self._limit}')

  def __str__(self) -> str:
    return ', '.join(f'{reason} {count:,}' for reason, count in sorted(self.counts.items()))
