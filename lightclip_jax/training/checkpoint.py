"""Checkpoints of everything that a run needs to continue: state, data iterator, meter, config, tokenizer, preprocessing.

None is trusted: what is restored must have the checksums that the state had before it was saved. One that has not is kept
aside, and the one before is used; a workdir that had checkpoints and has none left is not started anew.
"""
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from lightclip_jax import config as config_lib
from lightclip_jax import distributed, storage
from lightclip_jax.errors import UserError
from lightclip_jax.inference.checkpoint import RUN, SCORE, STATE, score
from lightclip_jax.training import checksum
from lightclip_jax.training.state import TrainState

# Devices with copies of one array share the work of writing it, if each one's part is so large. Orbax's own default cuts every
# array, and compiles the cut for each of their shapes: 22 s on 8 devices before the first save.
_SHARED_FROM = 16 << 20   # bytes
HISTORY = 'history.json'   # in the workdir: which step was saved last


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


class Checkpointer:
  """Asynchronous, atomic saves into `workdir/checkpoints`, by steps and by minutes, whichever comes first."""

  def __init__(self, workdir: storage.Path, config: config_lib.Checkpoint) -> None:
    self._config, self._workdir = config, workdir
    self._saving = self._bytes = 0   # the step that is saved last, and the size of its arrays
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_FROM)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    self._manager = ocp.CheckpointManager(
        storage.absolute(workdir / 'checkpoints'), options=_options(config, self._note_history),
        item_handlers={STATE: ocp.PyTreeCheckpointHandler(type_handler_registry=registry), RUN: ocp.JsonCheckpointHandler()})
    self._last_save = time.monotonic()

  def due(self, step: int) -> bool:
    """Whether a save falls on this step, by their number."""
    return bool(self._config.every_steps and step % self._config.every_steps == 0)

  @property
  def late(self) -> bool:
    """Whether a save is due by this process's clock."""
    minutes = (time.monotonic() - self._last_save) / 60
    return bool(self._config.every_minutes and minutes >= self._config.every_minutes)

  def save(self, step: int, state: TrainState, run: RunState, metrics: Mapping[str, float] | None = None,
           wait: bool = False) -> None:
    """Copies the state off the devices and writes it in the background. A step that is saved already is left alone.

    Where storage fails for a moment, it is asked again. A save that failed in the background is told, and its place is taken by
    this one; of several processes all end then, and start again at the one before.

    Args:
      step: its number.
      state: arrays.
      run: everything else.
      metrics: of an evaluation of this very state; None: there was none.
      wait: whether to return only when it is on disk.

    Raises:
      UserError: if the metric that decides which is best is not among them.
      OSError: if the disk is full, or storage fails for long, now or when the save before was written.
    """
    self._finish_previous()   # its note names that step
    if step in self._manager.all_steps():
      return
    item = _as_dict(state)
    self._saving, self._bytes = step, sum(leaf.nbytes for leaf in jax.tree.leaves(item))
    arguments = ocp.args.Composite(**{
        STATE: ocp.args.PyTreeSave(item), RUN: ocp.args.JsonSave(_sealed(run, checksum.checksums(item)))})

    def write() -> None:
      with self._storage_errors():
        self._manager.save(step, metrics=self._score(metrics), args=arguments)
        if wait:
          self._manager.wait_until_finished()

    if jax.process_count() == 1:
      storage.persistently(write, f'checkpoint {step}')
    else:
      write()
    self._last_save = time.monotonic()

  def _finish_previous(self) -> None:
    """Returns when no save is under way."""
    try:
      with self._storage_errors():
        self._manager.wait_until_finished()
    except OSError as error:
      if jax.process_count() > 1 or not storage.passing(error):
        raise
      distributed.say(f'checkpoint {self._saving} could not be written: {error}; those before it are whole, and training '
                      'goes on')

  def _score(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
    best = self._config.best
    if not best or metrics is None:
      return None
    if best not in metrics:
      raise UserError(f'checkpoint.best is {best!r}, which no evaluation measures; there are: {", ".join(metrics)}')
    return {best: metrics[best], SCORE: metrics[best] * (1 if self._config.best_mode == 'max' else -1)}

  def restore(self, like: TrainState) -> tuple[TrainState, RunState] | None:
    """The newest checkpoint that is whole, in the shapes and shardings of `like`; None in a workdir that never had one.

    Newer ones that are damaged are named on stderr and kept in `workdir/damaged`.

    Raises:
      UserError: if the workdir had checkpoints, and none that is left is whole.
    """
    before, said = self._history(), ''
    for step in sorted(self._manager.all_steps(), reverse=True):
      found, said = self._restore(step, like)
      if found:
        if before > step and not said:
          distributed.say(f'checkpoint {before} was saved, but the newest that is there is {step}')
        return found
      self._keep_aside(step, said)
    if not before and not said:
      return None
    raise UserError(f'{str(self._workdir)!r} holds a run that was saved at step {before}, but no checkpoint of it that is '
                    f'whole ({said or "there is none"}); bring one back into {str(self._manager.directory)!r}, or use '
                    'another --workdir')

  def _restore(self, step: int, like: TrainState) -> tuple[tuple[TrainState, RunState] | None, str]:
    """A checkpoint, or why it is not whole."""
    item, said, found = _as_dict(like), '', None
    how = ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(**{STATE: how, RUN: ocp.args.JsonRestore()}))
      run = _unsealed(restored[RUN], restored[STATE])
      found = TrainState(**{'ema': None, 'batch_stats': {}, **restored[STATE]}), run
    except jax.errors.JaxRuntimeError:   # a device or another process is lost, which says nothing of the checkpoint
      raise
    except Exception as error:  # noqa: BLE001 (damage makes its readers raise anything)
      said = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
    return (None, said or 'another process cannot read it') if any(distributed.agree(0, found is None)) else (found, '')

  def _keep_aside(self, step: int, said: str) -> None:
    place = self._workdir / 'damaged' / f'{step}-{time.time_ns()}'
    with distributed.first_alone(f'damaged {step}'):
      if jax.process_index() == 0:
        print(f'checkpoint {step} in {str(self._manager.directory)!r} is damaged ({said}); it is kept as {str(place)!r}, '
              'and the one before is used', file=sys.stderr, flush=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        (self._workdir / 'checkpoints' / str(step)).rename(place)
    self._manager.reload()

  def _note_history(self) -> None:
    """Called by Orbax when a save is whole on disk."""
    if jax.process_index() == 0:
      storage.write_text(self._workdir / HISTORY, json.dumps({'saved': self._saving}) + '\n')

  def _history(self) -> int:
    """The step that was saved last, as noted beside the checkpoints; 0: none."""
    try:
      return int(json.loads((self._workdir / HISTORY).read_text())['saved'])
    except FileNotFoundError:
      return 0
    except (ValueError, KeyError, TypeError):
      return -1   # damaged itself; yet it was there

  def close(self) -> None:
    """Waits for a save under way, and releases the threads. Raises OSError as `save`."""
    with self._storage_errors():
      self._manager.close()

  @contextlib.contextmanager
  def _storage_errors(self) -> Iterator[None]:
    """TensorStore's errors become the system's own, with the folder's name; a save that failed leaves nothing behind."""
    try:
      yield
    except (OSError, ValueError) as error:
      if isinstance(error, ValueError) and 'writing' not in str(error):
        raise
      self._manager.reload()
      if isinstance(error, OSError):
        raise
      full = 'RESOURCE_EXHAUSTED' in str(error)
      said = f'{os.strerror(errno.ENOSPC)}, and a checkpoint needs {self._bytes / 1e6:,.1f} MB' if full else str(error)[:200]
      raise OSError(errno.ENOSPC if full else errno.EIO, said, str(self._manager.directory)) from error


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


def _unsealed(values: dict[str, Any], state: dict[str, Any]) -> RunState:
  """Undoes `_sealed`. Raises ValueError if the values or the state are not what was sealed."""
  values = dict(values)
  if values.pop('sha256', None) != _hash(values):
    raise ValueError('its run state is not what was saved')
  before, now = values.pop('checksums'), checksum.checksums(state)
  if changed := [path for path in now if now[path] != before.get(path)]:
    raise ValueError(f'{len(changed)} of {len(now)} arrays are not what was saved, such as {changed[0]}')
  if bad := checksum.not_finite(state):
    raise ValueError(f'{len(bad)} arrays hold numbers that are not finite, such as {bad[0]}')
  return RunState(**values)


def _hash(values: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
