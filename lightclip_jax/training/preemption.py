"""SIGTERM and SIGINT ask for a save at the next step boundary; a second signal ends at once."""
import os
import signal
import types

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved, start me again


class Preemption:
  """Context manager whose `requested` turns true on the first signal."""

  def __init__(self) -> None:
    self.requested = False
    self._previous: dict[int, object] = {}

  def __enter__(self) -> 'Preemption':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    if self.requested:
      os._exit(128 + number)  # not sys.exit: asynchronous savers and workers would be waited for
    self.requested = True
