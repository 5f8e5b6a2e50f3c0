"""Metrics: averaged over an interval on the host, written to the console, `metrics.jsonl` and TensorBoard."""
import functools
import itertools
import json
import math
import pathlib
import shutil
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from lightclip_jax import storage

COPY_SECONDS = 30   # between copies of the logs into a bucket, which takes one file about once a second
_KEPT = 1 << 20     # bytes of a log that wait in memory while storage fails


class Meter:
  """Mean of each metric since the last `take`. Its state travels in checkpoints: a resumed run logs the same numbers."""

  def __init__(self, state: Mapping[str, Any] | None = None) -> None:
    self._sums: dict[str, float] = dict(state['sums']) if state else {}
    self._count: int = state['count'] if state else 0

  def add(self, values: Mapping[str, float]) -> None:
    """Adds one step's scalars."""
    for name, value in values.items():
      self._sums[name] = self._sums.get(name, 0.0) + float(value)
    self._count += 1

  def take(self) -> dict[str, float]:
    """The means, and an empty meter."""
    means = {name: total / self._count for name, total in self._sums.items()}
    self._sums, self._count = {}, 0
    return means

  def state(self) -> dict[str, Any]:
    """JSON-able; `Meter(state)` continues."""
    return {'sums': dict(self._sums), 'count': self._count}


class Clock:
  """Training time without evaluation and saves: examples a second, share of time that waited for data, ETA."""

  def __init__(self, batch_size: int, total_steps: int) -> None:
    self._batch_size, self._total = batch_size, total_steps
    self._start = time.perf_counter()
    self._waited, self._paused, self._steps = 0.0, 0.0, 0

  def waited(self, seconds: float) -> None:
    """Counts time spent waiting for the next batch."""
    self._waited += seconds

  def paused(self, seconds: float) -> None:
    """Takes time that was not training out of the account."""
    self._paused += seconds

  def stepped(self) -> None:
    """Counts one step."""
    self._steps += 1

  def take(self, step: int) -> dict[str, float]:
    """The rates since the last `take`."""
    now = time.perf_counter()
    spent = max(now - self._start - self._paused, 1e-9)
    rate = self._steps / spent
    out = {'examples_per_second': rate * self._batch_size, 'data_wait': self._waited / spent,
           'eta_seconds': (self._total - step) / rate if rate else math.inf}
    self._start, self._waited, self._paused, self._steps = now, 0.0, 0.0, 0
    return out


class Forecast:
  """How long a run will take, told once, by some of its steps; the first ones still pay for start-up."""
  WARM, TIMED = 5, 5

  def __init__(self, step: int, total_steps: int) -> None:
    self._warm, self._total, self._times = step + self.WARM, total_steps, []

  def after(self, step: int) -> float:
    """The seconds that are left after the last of those steps, by their median; 0 after any other."""
    if self._warm <= step <= self._warm + self.TIMED:
      self._times.append(time.perf_counter())
    if step != self._warm + self.TIMED:
      return 0.0
    steps = [end - start for start, end in itertools.pairwise(self._times)]
    return statistics.median(steps) * (self._total - step)


class Log:
  """A file that grows. What storage does not take for a while stays in memory, and is written with what comes next."""

  def __init__(self, path: pathlib.Path) -> None:
    self._path, self._file, self._failed = path, path.open('ab', buffering=_KEPT), False

  def write(self, data: bytes) -> None:
    """Appends at once. Raises OSError, with the file's name, for what does not pass, such as a full disk."""
    try:
      self._file.write(data)
      self._flush()
      self._failed = False
    except OSError as error:
      if not storage.passes(error):
        raise
      if not self._failed:
        print(f'{error}; training goes on, and what is logged is written later', file=sys.stderr, flush=True)
      self._failed = True

  def close(self) -> None:
    """Writes what is left, patiently."""
    storage.patiently(self._flush)
    self._file.close()

  def _flush(self) -> None:
    try:
      self._file.flush()   # which keeps what it cannot write
    except OSError as error:
      raise OSError(error.errno, error.strerror, str(self._path)) from error


class MetricWriter:
  """Appends to `metrics.jsonl` and TensorBoard; lines after `resume_step` (of a run that was killed) are dropped first.

  In a bucket nothing can be appended to: the files lie on this host's disk, and are copied there every half minute.
  """

  def __init__(self, workdir: storage.Path, resume_step: int) -> None:
    self._workdir, self._copied, self._failed = workdir, time.monotonic(), False
    self._local = pathlib.Path(tempfile.mkdtemp()) if storage.in_bucket(workdir) else workdir
    old, path, kept = workdir / 'metrics.jsonl', self._local / 'metrics.jsonl', []
    if old.exists():
      kept = [line for line in old.read_text().splitlines() if _step_of(line) <= resume_step]
      storage.write_text(path, ''.join(line + '\n' for line in kept))
    self._last = kept[-1:]   # the evaluation of a run that was complete, but for its report
    self._file, board = Log(path), self._local / 'tensorboard'
    board.mkdir(exist_ok=True)
    # Not tensorboardX's own writer: its thread ends with the first error, and whoever writes then waits for ever.
    self._board = Log(board / f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}')
    self._event(file_version='brain.Event:2')
    self._event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line, flushed at once. What is not finite is left out, which JSON has no way to say."""
    values = {name: float(value) for name, value in values.items() if math.isfinite(value)}
    line = json.dumps({'step': step, **values}, allow_nan=False)
    if line in self._last:
      return
    self._file.write(f'{line}\n'.encode())
    self._event(step=step, summary=Summary(value=[
      Summary.Value(tag=name, simple_value=value) for name, value in values.items()]))
    if time.monotonic() - self._copied > COPY_SECONDS:
      self._try_to_copy(lambda copy: copy())   # not patiently: a step waits

  def flush(self) -> None:
    """Brings what is written into the workdir, patiently. Where storage does not take it, that is told, and done later."""
    self._try_to_copy(storage.patiently)

  def _try_to_copy(self, attempt: Callable[[Callable[[], int]], int]) -> None:
    try:
      with storage.bucket_errors():
        self._copy(attempt)
      self._failed = False
    except OSError as error:
      if not storage.passes(error):
        raise
      if not self._failed:
        print(f'the log is not copied to {str(self._workdir)!r} ({error}); training goes on, and it is tried again: all of it '
              f'is in {str(self._local)!r}', file=sys.stderr, flush=True)
      self._failed = True
    self._copied = time.monotonic()

  def _copy(self, attempt: Callable[[Callable[[], int]], int]) -> None:
    if self._local == self._workdir:
      return
    for file in self._local.rglob('*.*'):
      place = self._workdir / file.relative_to(self._local)
      place.parent.mkdir(parents=True, exist_ok=True)
      attempt(functools.partial(place.write_bytes, file.read_bytes()))

  def _event(self, **values: Any) -> None:
    """Appends a record of TensorBoard's: its length and content, each with a checksum."""
    data = Event(wall_time=time.time(), **values).SerializeToString()
    parts = struct.pack('<Q', len(data)), data
    self._board.write(b''.join(part + struct.pack('<I', masked_crc32c(part)) for part in parts))

  def close(self) -> None:
    """Writes everything, patiently. Raises OSError where storage does not take it."""
    self._file.close()
    self._board.close()
    self._copy(storage.patiently)
    if self._local != self._workdir:
      shutil.rmtree(self._local)


class NoWriter:
  """Where another process writes."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Nothing."""

  def flush(self) -> None:
    """Nothing."""

  def close(self) -> None:
    """Nothing."""


def _step_of(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return math.inf  # a line cut by a crash


def console_line(step: int, total: int, values: Mapping[str, float]) -> str:
  """The line that a person reads during training."""
  if 'train/loss' not in values:
    return f'step {step}/{total} ({step / total:.0%})  every step since the line before was skipped'
  terms = ' '.join(f'{name.removeprefix("train/loss_")} {value:.3f}' for name, value in values.items()
                   if name.startswith('train/loss_') and name != 'train/loss_over_log_batch')
  # Not every objective measures these: the sigmoid loss knows no log B, and without a contrastive loss there is neither.
  kept = ''.join(f'  {label} {values[name]:{form}}' for name, label, form in (
    ('train/loss_over_log_batch', 'loss/log B', '.3f'), ('train/top1_image_to_text', 'top-1', '.1%')) if name in values)
  return (f'step {step}/{total} ({step / total:.0%})  loss {values["train/loss"]:.3f} ({terms}){kept}  '
          f'scale {values["train/logit_scale"]:.1f}  {values["train/examples_per_second"]:.0f} pairs/s  '
          f'data wait {values["train/data_wait"]:.0%}  ETA {duration(values["train/eta_seconds"])}')


def duration(seconds: float) -> str:
  """Seconds as "1 h 05 min", "4 min 10 s" or "12 s"."""
  if not math.isfinite(seconds):
    return '?'
  minutes, rest = divmod(round(seconds), 60)
  if minutes >= 60:
    return f'{minutes // 60} h {minutes % 60:02d} min'
  return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'
