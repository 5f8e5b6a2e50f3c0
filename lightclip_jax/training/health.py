"""Bad numbers and standstill: what was skipped, which batches it was, and where a run that does not move is waiting."""
import collections
import contextlib
import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lightclip_jax import storage
from lightclip_jax.errors import UserError

EXIT_STUCK = 74          # EX_IOERR: no step for too long; start me again
_SHOWN = 5               # skipped steps that are told, before only each tenth, hundredth... is
_SPIKE = 6.0             # standard deviations above the mean at which a loss is told
_MEMORY = 0.98           # of that mean and deviation, a step
_WRITING = 10.0          # seconds for the stacks, before the watchdog ends a process
_SETTLED = 100           # steps before which no spike is told


class Health:
  """Follows each step's loss. Its state travels in checkpoints, so that counts are exact over restarts."""

  def __init__(self, workdir: storage.Path, limit: int, state: Mapping[str, Any] | None = None) -> None:
    """
    Args:
      workdir: where the batches of a run that stops are named.
      limit: skipped steps in a row at which it stops (`train.max_skipped`).
      state: of a checkpoint.
    """
    self._workdir, self._limit = workdir, limit
    state = {'skipped': 0, 'in_a_row': 0, 'mean': 0.0, 'variance': 0.0, 'steps': 0} | dict(state or {})
    self.skipped, self.in_a_row, self._steps = state['skipped'], state['in_a_row'], state['steps']
    self._mean, self._variance = state['mean'], state['variance']
    self._bad: collections.deque[tuple[int, list[int]]] = collections.deque(maxlen=limit)

  def state(self) -> dict[str, Any]:
    """JSON-able; `Health(..., state)` continues."""
    return {'skipped': self.skipped, 'in_a_row': self.in_a_row, 'mean': self._mean, 'variance': self._variance,
            'steps': self._steps}

  def add(self, step: int, metrics: Mapping[str, float], examples: np.ndarray) -> bool:
    """Takes one step's scalars and its example ids; says whether the step was applied.

    Raises:
      UserError: after too many skipped steps in a row; their batches are in `workdir/skipped-PROCESS.json` then.
    """
    if metrics['skipped']:
      self._skip(step, metrics, examples)
      return False
    self.in_a_row = 0
    self._bad.clear()
    self._watch(step, float(metrics['loss']))
    return True

  def _skip(self, step: int, metrics: Mapping[str, float], examples: np.ndarray) -> None:
    self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
    self._bad.append((step, examples.tolist()))
    if self.skipped <= _SHOWN or str(self.skipped).strip('0') == '1':
      _tell(f'step {step} was skipped: loss {metrics["loss"]:g}, gradient norm {metrics["gradient_norm"]:g} '
            f'[skipped {self.skipped}]')
    if self.in_a_row >= self._limit:
      place = self._workdir / f'skipped-{jax.process_index()}.json'
      storage.write_text(place, json.dumps([{'step': step, 'example_ids': ids} for step, ids in self._bad]) + '\n')
      raise UserError(f'{self.in_a_row} steps in a row had a loss or gradients that are not finite, up to step {step}; the ids '
                      f'of their examples are in {str(place)!r}, the last checkpoint is untouched, and '
                      '--config.train.name_nans=True finds the operation')

  def _watch(self, step: int, loss: float) -> None:
    deviation = math.sqrt(self._variance)
    if self._steps >= _SETTLED and loss > self._mean + _SPIKE * deviation:
      _tell(f'step {step}: the loss jumped to {loss:.3f} (mean {self._mean:.3f}, standard deviation {deviation:.3f})')
    memory = min(_MEMORY, self._steps / (self._steps + 1))   # a plain mean at first
    difference = loss - self._mean
    self._mean += (1 - memory) * difference
    self._variance = memory * (self._variance + (1 - memory) * difference ** 2)
    self._steps += 1


def name_nans(function: Callable[..., Any], *arguments: Any) -> None:
  """Runs `function` once more, one operation at a time.

  Raises:
    UserError: naming the first operation that gives a NaN; nothing if none does.
  """
  with jax.debug_nans(True):
    try:
      jax.block_until_ready(jax.jit(function)(*arguments))
    except FloatingPointError as error:
      first = next(line for line in str(error).splitlines() if line.strip())
      raise UserError(f'{first}; it was called in {_own_line(error)}') from error


def _own_line(error: BaseException) -> str:
  """The innermost line of this project in a traceback."""
  found, trace = 'an unknown place', error.__traceback__
  while trace:
    file = trace.tb_frame.f_code.co_filename
    if f'{os.sep}lightclip_jax{os.sep}' in file and not file.endswith('health.py'):
      found = f'{file[file.rindex("lightclip_jax" + os.sep):]}:{trace.tb_lineno}'
    trace = trace.tb_next
  return found


class Watchdog:
  """Context manager with a thread that sees whether steps are made, and says what is waited for when they are not."""

  def __init__(self, workdir: storage.Path, minutes: float, end: bool = False) -> None:
    """
    Args:
      workdir: the stacks of all threads are written there, as `stacks-PROCESS.txt`.
      minutes: without a step; 0: it does nothing.
      end: whether to end the process then, with `EXIT_STUCK`.
    """
    self._workdir, self._seconds, self._end = workdir, 60 * minutes, end
    self._waits_for, self._moved, self._told = 'start', time.monotonic(), False
    self._over = threading.Event()

  def __enter__(self) -> 'Watchdog':
    self.moved()
    if self._seconds:
      threading.Thread(target=self._watch, daemon=True, name='watchdog').start()
    return self

  def __exit__(self, *_: object) -> None:
    self._over.set()

  def moved(self) -> None:
    """A step is made."""
    self._moved, self._told = time.monotonic(), False

  @contextlib.contextmanager
  def waiting_for(self, what: str) -> Iterator[None]:
    """Names what the body waits for: data, device, checkpoint, evaluation, the other processes."""
    before, self._waits_for = self._waits_for, what
    yield
    self._waits_for = before
    self.moved()

  def _watch(self) -> None:
    while not self._over.wait(min(1.0, self._seconds / 4)):
      silent = time.monotonic() - self._moved
      if silent < self._seconds or self._told:
        continue
      self._told, place = True, self._workdir / f'stacks-{jax.process_index()}.txt'
      _tell(f'process {jax.process_index()}: no step for {silent:.0f} s, waiting for {self._waits_for}; the stacks of all '
            f'threads are in {str(place)!r}')
      # Aside: the disk may be what does not answer, and a write to it would not end either.
      writing = threading.Thread(target=_write_stacks, args=(place,), daemon=True)
      writing.start()
      if self._end:
        writing.join(_WRITING)
        os._exit(EXIT_STUCK)


def _write_stacks(place: storage.Path) -> None:
  if storage.in_bucket(place):
    faulthandler.dump_traceback(sys.stderr, all_threads=True)   # it writes to real files only
    return
  try:
    with open(place, 'w') as file:
      faulthandler.dump_traceback(file, all_threads=True)
  except OSError as error:
    _tell(f'process {jax.process_index()}: {error}; the stacks are not written')


def _tell(text: str) -> None:
  if jax.process_index() == 0 or 'process' in text:
    print(text, file=sys.stderr, flush=True)
