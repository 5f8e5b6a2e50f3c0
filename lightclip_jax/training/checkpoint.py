"""Checkpoints of everything that a run needs to continue: state, data iterator, meter, config, tokenizer, preprocessing.

None is trusted: what is restored must have the checksums that the state had before it was saved. One that has not is kept
aside, and the one before is used; a workdir that had checkpoints and has none left is not started anew.
"""
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from lightclip_jax import config as config_lib
from lightclip_jax import distributed, storage
from lightclip_jax.errors import UserError
from lightclip_jax.inference.checkpoint import RUN, SCORE, STATE, score
from lightclip_jax.training import checksum
from lightclip_jax.training.state import TrainState

T = TypeVar('T')

# Devices with copies of one array share the work of writing it, if each one's part is so large. Orbax's own default cuts every
# array, and compiles the cut for each of their shapes: 22 s on 8 devices before the first save.
_SHARED_FROM = 16 << 20   # bytes
HISTORY = 'history.json'   # in the workdir: which step was saved last
_LONGEST_WAIT = 300.0   # seconds before a save that failed is tried again, which double from 1
_SLOW = 60.0            # seconds for which a save that waits for the one before is told


@dataclasses.dataclass(frozen=True)
class RunState:
  """The JSON half of a checkpoint."""
  iterator: dict[str, Any]         # where the data pipeline continues
  meter: dict[str, Any]            # metrics of the steps since the last log line
  config: dict[str, Any]
  preprocessing: dict[str, Any]
  tokenizer: str                   # base64
  tokenizer_kind: str = '.model'   # suffix of its file
  health: dict[str, Any] = dataclasses.field(default_factory=dict)   # skipped steps and the like
  owes_evaluation: bool = False    # whether the run that continues evaluates first
  shards: int = 0                  # devices over which the batch was spread; 0: not noted


class Checkpointer:
  """Asynchronous, atomic saves into `workdir/checkpoints`, by steps and by minutes, whichever comes first."""

  def __init__(self, workdir: storage.Path, config: config_lib.Checkpoint) -> None:
    self._config, self._workdir = config, workdir
    self._saving = self._saved = self._bytes = 0   # the steps of the newest save and of the newest whole one; its arrays' size
    self._failures, self._again = 0, math.inf      # in a row, and when the next attempt is due
    self._manager = ocp.CheckpointManager(storage.absolute(workdir / 'checkpoints'), item_handlers=_handlers(),
                                          options=_options(config, self._note_history))
    self._last_save = time.monotonic()

  def due(self, step: int) -> bool:
    """Whether a save falls on this step, by their number."""
    return bool(self._config.every_steps and step % self._config.every_steps == 0)

  @property
  def late(self) -> bool:
    """Whether a save is due by this process's clock, or because one failed."""
    minutes = (time.monotonic() - self._last_save) / 60
    return bool(self._config.every_minutes and minutes >= self._config.every_minutes) or self._retry

  @property
  def _retry(self) -> bool:
    if jax.process_count() > 1:
      return False
    if self._again < math.inf:
      return time.monotonic() >= self._again
    return self._saving != self._saved and not self._manager.is_saving_in_progress()

  def save(self, step: int, state: TrainState, run: RunState, metrics: Mapping[str, float] | None = None, *,
           wait: bool = False) -> None:
    """Copies the state off the devices and writes it in the background. A step that is saved already is left alone, but for
    its score if it has none.

    Where storage fails with an error that passes, training goes on with the last good save: that is told, and the state of
    a later step is `late` soon. Several processes would have to agree on that; they end, and start at the last good save.

    Args:
      step: its number.
      state: arrays.
      run: everything else.
      metrics: of an evaluation of this very state; None: there was none.
      wait: return when it is on disk, with `storage.patiently`.

    Raises:
      OSError: naming the folder: ENOSPC, if the disk is full, now or when the save before was written; with `wait`, and of
        several processes, any other too.
    """
    attempt = functools.partial(self._attempt, step, state, run, metrics, wait)
    if wait and jax.process_count() == 1:
      storage.patiently(attempt)
      return
    try:
      attempt()
    except OSError as error:
      if jax.process_count() > 1 or not storage.passes(error):
        raise
      self._failures += 1
      seconds = min(2.0 ** (self._failures - 1), _LONGEST_WAIT)
      self._again = time.monotonic() + seconds
      print(f'step {step}: checkpoint {self._saving} is not saved ({error}), the last good one is '
            f'{self._manager.latest_step()}; training goes on, tried again in {seconds:g} s', file=sys.stderr, flush=True)

  def _attempt(self, step: int, state: TrainState, run: RunState, metrics: Mapping[str, float] | None, wait: bool) -> None:
    self.wait()   # for the save before: its note names that step
    if step not in self._manager.all_steps():
      item = _as_dict(state)
      self._saving, self._bytes = step, sum(leaf.nbytes for leaf in jax.tree.leaves(item))
      with self._failures_by_name():
        self._manager.save(step, metrics=self._score(metrics), args=ocp.args.Composite(**{
            STATE: ocp.args.PyTreeSave(item), RUN: ocp.args.JsonSave(_sealed(run, checksum.checksums(item)))}))
      self._last_save, self._again = time.monotonic(), math.inf
    elif (score := self._score(metrics)) and self._manager.metrics(step) is None:
      self._add_score(step, score)
    if wait:
      self.wait()

  def _add_score(self, step: int, score: dict[str, float]) -> None:
    """As if it had been saved with it; the best until now goes, if it is neither that nor among the newest any more."""
    before = self._manager.best_step()
    with distributed.first_alone(f'score {step}'):
      if jax.process_index() == 0:   # in Orbax's place for it
        (place := self._workdir / 'checkpoints' / str(step) / 'metrics').mkdir(exist_ok=True)
        storage.write_text(place / 'metrics', json.dumps(score))
    self._manager.reload()
    if before not in (None, self._manager.best_step(), *sorted(self._manager.all_steps())[-self._config.keep:]):
      self._manager.delete(before)

  def _score(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
    best = self._config.best
    if not best or metrics is None:
      return None
    if best not in metrics:   # no reason to lose the step: the name can still be mended
      distributed.say(f'checkpoint.best is {best!r}, which no evaluation measures, so no checkpoint is kept as the best; '
                      f'there are: {", ".join(metrics)}')
      return None
    return {best: metrics[best], SCORE: metrics[best] * (1 if self._config.best_mode == 'max' else -1)}

  def restore(self, like: TrainState) -> tuple[TrainState, RunState] | None:
    """The newest checkpoint that is whole, in the shapes and shardings of `like`; None in a workdir that never had one.

    Newer ones that are damaged are named on stderr and kept in `workdir/damaged`. Where none is whole, none is moved: it may be
    the program that changed, or the storage.

    Raises:
      UserError: if the workdir had checkpoints, and none that is left is whole.
    """
    before, damaged = self._history(), {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      found, said = self._restore(step, like)
      if found:
        self._keep_aside(damaged)
        if before > step and not damaged:
          distributed.say(f'checkpoint {before} was saved, but the newest that is there is {step}')
        return found
      damaged[step] = said
    if not before and not damaged:
      return None
    said = ', '.join(f'{step}: {why}' for step, why in damaged.items())
    raise UserError(f'{str(self._workdir)!r} holds a run that was saved at step {before}, but no checkpoint of it that is '
                    f'whole ({said or "there is none"}); bring one back into {str(self._manager.directory)!r}, or use '
                    'another --workdir')

  def _restore(self, step: int, like: TrainState) -> tuple[tuple[TrainState, RunState] | None, str]:
    """A checkpoint, or why it is not whole. Each process reads its own part, and waits for no other before it has."""
    read, said = _agreed(lambda: storage.patiently(lambda: self._read(step, _as_dict(like))))
    if read is None:
      return None, said
    state, values = read
    return _agreed(lambda: (TrainState(**{'ema': None, 'batch_stats': {}, **state}), _checked(values, state)))

  def _read(self, step: int, item: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state, and the JSON half as it was sealed."""
    how = ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
    place = self._manager.directory / str(step)
    with self._failures_by_name(), _reader() as reader:
      try:
        read = reader.restore(place, ocp.args.Composite(**{STATE: how, RUN: ocp.args.JsonRestore()}))
      except FileNotFoundError as error:   # Orbax's and gcsfs's have no number, and would pass for storage that is late
        raise ValueError(f'a file is not there: {error}') from error
      return read[STATE], _unsealed(read[RUN])

  def _keep_aside(self, damaged: Mapping[int, str]) -> None:
    for step, said in damaged.items():
      place = self._workdir / 'damaged' / f'{step}-{time.time_ns()}'
      with distributed.first_alone(f'damaged {step}'):
        if jax.process_index() == 0:
          print(f'checkpoint {step} in {str(self._manager.directory)!r} is damaged ({said}); it is kept as {str(place)!r}, '
                'and the one before is used', file=sys.stderr, flush=True)
          with self._failures_by_name():
            storage.make_folder(place.parent)   # without which nothing is renamed, in a bucket either
            (self._workdir / 'checkpoints' / str(step)).rename(place)
    self._manager.reload()

  def _note_history(self) -> None:
    """Called by Orbax when a save is whole on disk."""
    if jax.process_index() == 0:
      storage.write_text(self._workdir / HISTORY, json.dumps({'saved': self._saving}) + '\n')
    self._saved, self._failures = self._saving, 0

  def _history(self) -> int:
    """The step that was saved last, as noted beside the checkpoints; 0: none."""
    try:
      return int(json.loads((self._workdir / HISTORY).read_text())['saved'])
    except FileNotFoundError:
      return 0
    except (ValueError, KeyError, TypeError):
      return -1   # damaged itself; yet it was there

  def wait(self) -> None:
    """Returns when the save under way is on disk. Raises OSError, with the folder's name, if storage does not take it."""
    start = time.monotonic()
    with self._failures_by_name():
      self._manager.wait_until_finished()
    if time.monotonic() - start > _SLOW:
      distributed.say(f'storage is slow: training waited {time.monotonic() - start:.0f} s for checkpoint {self._saving} to be '
                      f'written to {str(self._manager.directory)!r}')

  def close(self) -> None:
    """Waits and releases the threads. Raises as `wait`."""
    with self._failures_by_name():
      self._manager.close()

  @contextlib.contextmanager
  def _failures_by_name(self) -> Iterator[None]:
    """Storage's errors become the system's own, with the folder's name, whichever library raises them."""
    try:
      with storage.bucket_errors():
        yield
    except (OSError, ValueError) as error:
      code = _code_of(error)
      if code is None:
        raise
      self._manager.reload()   # what the save that failed was to replace is still there
      needed = f', and a checkpoint needs {self._bytes / 1e6:,.1f} MB' if code == errno.ENOSPC else ''
      file = str(getattr(error, 'filename', ''))
      place = file if os.path.isabs(file) else str(self._manager.directory)
      raise OSError(code, os.strerror(code) + needed, place) from error


def _code_of(error: OSError | ValueError) -> int | None:
  """The system's number of a failure of storage, which TensorStore puts into its text; None: it is another error."""
  if isinstance(error, OSError):
    return error.errno or errno.ETIMEDOUT   # Orbax's own have no number
  text = str(error)
  if found := re.search(r"os_error_code='(\d+)'", text):
    return int(found[1])
  statuses = {'RESOURCE_EXHAUSTED': errno.ENOSPC, 'UNAVAILABLE': errno.ETIMEDOUT, 'DEADLINE_EXCEEDED': errno.ETIMEDOUT}
  code = next((code for status, code in statuses.items() if text.startswith(status)), None)
  if 'reading' in text:
    return code and errno.ETIMEDOUT
  return code if 'writing' in text else None


def _handlers() -> dict[str, ocp.CheckpointHandler]:
  arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_FROM)
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
  return {STATE: ocp.PyTreeCheckpointHandler(type_handler_registry=registry), RUN: ocp.JsonCheckpointHandler()}


def _reader() -> ocp.Checkpointer:
  """Reads in this process alone: the manager's own reader would wait for the others, and for ever where one cannot read."""
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own}, barrier_sync_key_prefix=f'alone{own}')
  handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone), **_handlers())
  return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _agreed(attempt: Callable[[], T]) -> tuple[T | None, str]:
  """What `attempt()` returns, or None in all processes and one's reason where it finds damage in any of them."""
  found, said = None, ''
  try:
    found = attempt()
  except jax.errors.JaxRuntimeError:   # a device or another process is lost, which says nothing of the checkpoint
    raise
  except Exception as error:  # noqa: BLE001 (damage makes its readers raise anything)
    if isinstance(error, OSError) and (storage.passes(error) or error.errno in (errno.EACCES, errno.EPERM)):
      raise   # storage does not answer, which says nothing of the checkpoint either
    said = next(iter(str(error).strip().splitlines()), '')[:200] or type(error).__name__
  said = next(filter(None, distributed.texts_of_all(said)), '')
  return (None, said) if said else (found, '')


def _options(config: config_lib.Checkpoint, saved: Callable[[], None]) -> ocp.CheckpointManagerOptions:
  """The newest are always kept, since a run continues at the newest; the best is kept beside them."""
  then = ocp.AsyncOptions(post_finalization_callback=saved)
  if not config.best:
    return ocp.CheckpointManagerOptions(max_to_keep=config.keep, enable_async_checkpointing=True, async_options=then)
  policies = ocp.checkpoint_managers
  keep = policies.AnyPreservationPolicy([
    policies.LatestN(config.keep), policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)])
  return ocp.CheckpointManagerOptions(preservation_policy=keep, best_fn=score, enable_async_checkpointing=True,
                                      async_options=then)


def _as_dict(state: TrainState) -> dict[str, Any]:
  """Without empty subtrees, which Orbax would not store."""
  return {name: value for name, value in vars(state).items() if jax.tree.leaves(value)}


def _sealed(run: RunState, sums: dict[str, int]) -> dict[str, Any]:
  """The JSON half with the state's checksums, and a hash over all of it."""
  values = {**dataclasses.asdict(run), 'checksums': sums}
  return {**values, 'sha256': _hash(values)}


def _unsealed(values: dict[str, Any]) -> dict[str, Any]:
  """What `_sealed` has sealed. Raises ValueError if it is not that."""
  values = dict(values)
  if values.pop('sha256', None) != _hash(values):
    raise ValueError('its run state is not what was saved')
  return values


def _checked(values: dict[str, Any], state: dict[str, Any]) -> RunState:
  """The run's state, if the arrays' checksums are among `values`, which it came with. Raises ValueError if they are not."""
  before, now = values['checksums'], checksum.checksums(state)
  if changed := [path for path in now if now[path] != before.get(path)]:
    raise ValueError(f'{len(changed)} of {len(now)} arrays are not what was saved, such as {changed[0]}')
  if bad := checksum.not_finite(state):
    raise ValueError(f'{len(bad)} arrays hold numbers that are not finite, such as {bad[0]}')
  return RunState(**{name: value for name, value in values.items() if name != 'checksums'})


def _hash(values: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
