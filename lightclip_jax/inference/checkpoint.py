"""Training checkpoints as they lie on disk, read for inference: towers, tokenizer, preprocessing, config.

A checkpoint has two items: `state` (arrays) and `run` (JSON: config, data iterator, tokenizer, preprocessing).
"""
import base64
import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from lightclip_jax import config as config_lib
from lightclip_jax import sharding
from lightclip_jax.data import tokenizers
from lightclip_jax.errors import UserError
from lightclip_jax.models import lightclip

STATE, RUN = 'state', 'run'


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A checkpoint's towers and all that they need. `variables` has float32 arrays on the default device."""
  step: int
  config: config_lib.Config
  variables: dict[str, Any]
  tokenizer: tokenizers.Tokenizer
  preprocessing: dict[str, Any]


def checkpoint_folder(path: pathlib.Path) -> pathlib.Path:
  """The folder of numbered checkpoints for a workdir or for that folder itself.

  Raises:
    UserError: if there is none.
  """
  for folder in (path / 'checkpoints', path):
    if folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir()):
      return folder
  raise UserError(f'{str(path)!r} holds no checkpoint; give the workdir of a training run')


def load(path: pathlib.Path, step: int | None = None) -> Loaded:
  """Reads the newest (or the given) checkpoint of a run: the moving average where there is one, else the parameters.

  Raises:
    UserError: if `path` holds no checkpoint, not that step, or one that is not whole.
  """
  folder = checkpoint_folder(path).absolute()
  options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
  with ocp.CheckpointManager(folder, options=options) as manager:
    steps = manager.all_steps()
    step = max(steps) if step is None else step
    if step not in steps:
      raise UserError(f'{str(path)!r} has no checkpoint of step {step}; it has {sorted(steps)}')
    try:
      return _restore(manager, step)
    except UserError:
      raise
    except (ValueError, KeyError, OSError) as error:   # Orbax has no error of its own for a checkpoint that lacks files
      first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
      raise UserError(f'checkpoint {step} in {str(folder)!r} cannot be read; is it whole? {first_line}') from error


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
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)  # noqa: E731
  wanted = {'ema' if config.optimizer.ema_decay else 'params': shapes['params']}
  if shapes.get('batch_stats'):
    wanted['batch_stats'] = shapes['batch_stats']
  return jax.tree.map(place, wanted)
