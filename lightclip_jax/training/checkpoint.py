"""Checkpoints of everything that a run needs to continue: state, data iterator, meter, config, tokenizer, preprocessing."""
import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from lightclip_jax import config as config_lib
from lightclip_jax import storage
from lightclip_jax.errors import UserError
from lightclip_jax.inference.checkpoint import RUN, SCORE, STATE, score
from lightclip_jax.training.state import TrainState

# Devices with copies of one array share the work of writing it, if each one's part is so large. Orbax's own default cuts every
# array, and compiles the cut for each of their shapes: 22 s on 8 devices before the first save.
_SHARED_FROM = 16 << 20   # bytes


@dataclasses.dataclass(frozen=True)
class RunState:
  """The JSON half of a checkpoint."""
  iterator: dict[str, Any]         # where the data pipeline continues
  meter: dict[str, Any]            # metrics of the steps since the last log line
  config: dict[str, Any]
  preprocessing: dict[str, Any]
  tokenizer: str                   # base64
  tokenizer_kind: str = '.model'   # suffix of its file


class Checkpointer:
  """Asynchronous, atomic saves into `workdir/checkpoints`, by steps and by minutes, whichever comes first."""

  def __init__(self, workdir: storage.Path, config: config_lib.Checkpoint) -> None:
    self._config = config
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_FROM)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    self._manager = ocp.CheckpointManager(
        storage.absolute(workdir / 'checkpoints'), options=_options(config),
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

  def save(self, step: int, state: TrainState, run: RunState, metrics: Mapping[str, float] | None = None) -> None:
    """Copies the state off the devices and writes it in the background. A step that is saved already is left alone.

    Args:
      step: its number.
      state: arrays.
      run: everything else.
      metrics: of an evaluation of this very state; None: there was none.

    Raises:
      UserError: if the metric that decides which is best is not among them.
      OSError: ENOSPC, if the disk is full, now or when the save before was written.
    """
    if step in self._manager.all_steps():
      return
    with self._full_disk_by_name():
      self._manager.save(step, metrics=self._score(metrics), args=ocp.args.Composite(**{
          STATE: ocp.args.PyTreeSave(_as_dict(state)), RUN: ocp.args.JsonSave(dataclasses.asdict(run))}))
    self._last_save = time.monotonic()

  def _score(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
    best = self._config.best
    if not best or metrics is None:
      return None
    if best not in metrics:
      raise UserError(f'checkpoint.best is {best!r}, which no evaluation measures; there are: {", ".join(metrics)}')
    return {best: metrics[best], SCORE: metrics[best] * (1 if self._config.best_mode == 'max' else -1)}

  def restore(self, like: TrainState) -> tuple[TrainState, RunState] | None:
    """The newest checkpoint in the shapes and shardings of `like`; None if there is none yet.

    Raises:
      UserError: if the newest checkpoint cannot be read.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    item = _as_dict(like)
    how = ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(**{STATE: how, RUN: ocp.args.JsonRestore()}))
    except (ValueError, KeyError, OSError) as error:
      first_line = str(error).strip().splitlines()[0]
      raise UserError(f'checkpoint {step} in {str(self._manager.directory)!r} cannot be restored: {first_line}') from error
    state = restored[STATE]
    return TrainState(**{'ema': None, 'batch_stats': {}, **state}), RunState(**restored[RUN])

  def wait(self) -> None:
    """Returns when the save under way is on disk. Raises OSError, ENOSPC, if that is full."""
    with self._full_disk_by_name():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases the threads. Raises as `wait`."""
    with self._full_disk_by_name():
      self._manager.close()

  @contextlib.contextmanager
  def _full_disk_by_name(self) -> Iterator[None]:
    """TensorStore's error for a full disk becomes the system's own, with the folder's name."""
    try:
      yield
    except ValueError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error) or 'writing' not in str(error):
        raise
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._manager.directory)) from error


def _options(config: config_lib.Checkpoint) -> ocp.CheckpointManagerOptions:
  """The newest are always kept, since a run continues at the newest; the best is kept beside them."""
  if not config.best:
    return ocp.CheckpointManagerOptions(max_to_keep=config.keep, enable_async_checkpointing=True)
  policies = ocp.checkpoint_managers
  keep = policies.AnyPreservationPolicy([
    policies.LatestN(config.keep), policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)])
  return ocp.CheckpointManagerOptions(preservation_policy=keep, best_fn=score, enable_async_checkpointing=True)


def _as_dict(state: TrainState) -> dict[str, Any]:
  """Without empty subtrees, which Orbax would not store."""
  return {name: value for name, value in vars(state).items() if jax.tree.leaves(value)}
