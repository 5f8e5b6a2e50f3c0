"""What asks for a save at the next step boundary: SIGTERM, SIGINT, a terminal that is closed, output that nobody reads.

The same one of SIGTERM and SIGINT again ends at once.
"""
import errno
import os
import signal
import stat
import sys
import types
from collections.abc import Callable
from typing import Any, TextIO

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved, start me again


class Preemption:
  """Context manager whose `requested` turns true when a save is asked for."""

  def __init__(self) -> None:
    self.requested = False
    self._signals: set[int] = set()
    self._handlers: dict[int, object] = {}

  def __enter__(self) -> 'Preemption':
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:   # nohup
        continue
      self._handlers[number] = signal.signal(number, self._handle)
    self._streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Output(stream, self._ask) for stream in self._streams)   # None: closed at start
    return self

  def __exit__(self, *_: object) -> None:
    sys.stdout, sys.stderr = self._streams
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def _ask(self) -> None:
    self.requested = True

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    if number in self._signals and number != signal.SIGHUP:   # of a terminal that is closed shell and kernel tell
      os._exit(128 + number)  # not sys.exit: asynchronous savers and workers would be waited for
    self._signals.add(number)
    self._ask()


class _Output:
  """A standard stream. Where its reader is gone (a pipe's, a terminal), that is told, and what comes is written nowhere:
  an error would end the run without its save, as of Ctrl-C where `| tee` gets it too."""

  def __init__(self, stream: TextIO, lost: Callable[[], None]) -> None:
    self._stream, self._lost = stream, lost

  def write(self, text: str) -> int:
    """Writes, and flushes what the stream flushes at once."""
    return self._try(self._stream.write, text)

  def flush(self) -> None:
    """Writes what is held back."""
    self._try(self._stream.flush)

  def _try(self, action: Callable[..., Any], *arguments: str) -> Any:
    try:
      return action(*arguments)
    except OSError as error:
      if error.errno != errno.EPIPE and not (error.errno == errno.EIO and self._is_terminal()):
        raise
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
      self._lost()
      return action(*arguments)

  def _is_terminal(self) -> bool:
    return stat.S_ISCHR(os.fstat(self._stream.fileno()).st_mode)   # isatty says no once it is gone

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)
