"""Training checkpoints as they lie on disk, read for inference: towers, tokenizer, preprocessing, config.

A checkpoint has two items: `state` (arrays) and `run` (JSON: config, data iterator, tokenizer, preprocessing).
"""
import base64
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from lightclip_jax import config as config_lib
from lightclip_jax import sharding, storage
from lightclip_jax.data import tokenizers
from lightclip_jax.errors import UserError
from lightclip_jax.models import lightclip

STATE, RUN = 'state', 'run'
SCORE = 'score'                # in the metrics of a checkpoint that was evaluated: more is better
BEST: Literal['best'] = 'best'
Step = int | Literal['best'] | None   # None: the newest


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A checkpoint's towers and all that they need. `variables` has float32 arrays on the default device."""
  step: int
  config: config_lib.Config
  variables: dict[str, Any]
  tokenizer: tokenizers.Tokenizer
  preprocessing: dict[str, Any]


def checkpoint_folder(path: storage.Path) -> storage.Path:
  """The folder of numbered checkpoints for a workdir or for that folder itself.

  Raises:
    UserError: if there is none.
  """
  for folder in (path / 'checkpoints', path):
    if folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir()):
      return folder
  raise UserError(f'{str(path)!r} holds no checkpoint; give the workdir of a training run')


def which(name: str | int) -> Step:
  """The step that 'last', 'best' or a number names, as flags and users write it.

  Raises:
    UserError: for anything else.
  """
  if name not in ('last', BEST) and not str(name).isdecimal():
    raise UserError(f"step is {name!r}; it can be 'last', 'best' or the number of a checkpoint")
  return None if name == 'last' else BEST if name == BEST else int(name)


def load(path: storage.Path, step: Step = None) -> Loaded:
  """Reads the newest (or the best, or the given) checkpoint of a run: the moving average where there is one.

  Raises:
    UserError: if `path` holds no checkpoint, not that step, none that was scored, or one that is not whole.
  """
  with _open(path) as manager:
    step = _chosen(manager, step)
    try:
      return _restore(manager, step)
    except UserError:
      raise
    except (ValueError, KeyError, OSError) as error:   # Orbax has no error of its own for a checkpoint that lacks files
      first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
      raise UserError(f'checkpoint {step} in {str(manager.directory)!r} cannot be read; is it whole? {first_line}') from error


def step_of(path: storage.Path, step: Step = None) -> int:
  """The number of the checkpoint that `load` would read. Raises UserError as `load` does."""
  with _open(path) as manager:
    return _chosen(manager, step)


def _open(path: storage.Path) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False, best_fn=score)
  return ocp.CheckpointManager(storage.absolute(checkpoint_folder(path)), options=options)


def _chosen(manager: ocp.CheckpointManager, step: Step) -> int:
  steps, where = sorted(manager.all_steps()), str(manager.directory)
  if step == BEST:
    if (best := manager.best_step()) is None:
      raise UserError(f"{where!r} has no scored checkpoint; a run scores them when its config names checkpoint.best, "
                      "such as 'eval/heldout_style/concept_top1'")
    return best
  if step is not None and step not in steps:
    raise UserError(f'{where!r} has no checkpoint of step {step}; it has {steps}')
  return steps[-1] if step is None else step


def score(metrics: Mapping[str, float]) -> float:
  """What the best checkpoint has most of; a number that is not finite is worst of all."""
  return metrics[SCORE] if math.isfinite(metrics[SCORE]) else -math.inf


def _restore(manager: ocp.CheckpointManager, step: int) -> Loaded:
  run = manager.restore(step, args=ocp.args.Composite(**{RUN: ocp.args.JsonRestore()}))[RUN]
  for part in ('config', 'tokenizer', 'preprocessing'):
    if not run.get(part):
      raise UserError(f'checkpoint {step} in {str(manager.directory)!r} holds no {part}')
  config = config_lib.from_dict(run['config'])
  abstract = _abstract(config)
  state = manager.restore(step, args=ocp.args.Composite(**{STATE: ocp.args.PyTreeRestore(
      item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True)}))[STATE]
  for key, leaf in jax.tree_util.tree_leaves_with_path(state):
    if isinstance(leaf, jax.ShapeDtypeStruct):   # what a partial restore does not find it leaves as it was
      raise UserError(f'checkpoint {step} in {str(manager.directory)!r} lacks {sharding.path_name(key)}; is it whole?')
  variables = {'params': state.get('ema', state.get('params')), 'batch_stats': state.get('batch_stats', {})}
  tokenizer = tokenizers.from_bytes(base64.b64decode(run['tokenizer']), run.get('tokenizer_kind', '.model'))
  return Loaded(step, config, variables, tokenizer, run['preprocessing'])


def _abstract(config: config_lib.Config) -> dict[str, Any]:
  """Shapes of the part of the state that inference reads, on one device whatever mesh wrote it."""
  shapes = jax.eval_shape(lambda rng: lightclip.init_variables(config.model, rng), jax.random.key(0))
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)  # noqa: E731
  wanted = {'ema' if config.optimizer.ema_decay else 'params': shapes['params']}
  if shapes.get('batch_stats'):
    wanted['batch_stats'] = shapes['batch_stats']
  return jax.tree.map(place, wanted)
