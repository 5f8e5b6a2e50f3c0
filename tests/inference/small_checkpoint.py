"""A checkpoint as training writes it, of a small model with random weights."""
import base64
import dataclasses
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from lightclip_jax import config as config_lib
from lightclip_jax.data import tokenizers
from lightclip_jax.inference import checkpoint
from lightclip_jax.inference.checkpoint import RUN, SCORE, STATE
from lightclip_jax.models import lightclip

CAPTIONS = ('a red circle', 'two blue squares', 'one green triangle on white', 'a cat and a dog', 'the house by the sea')


def config(image: str = 'mobilenet_v2', **changes) -> config_lib.Config:
  towers = {'mobilenet_v2': dict(size=32, width=0.1), 'resnet18': dict(size=32), 'swin_nano': dict(size=64, window=4),
            'vit_ti': dict(size=32)}
  model = config_lib.replace(
    config_lib.Model(), embed_dim=16, token_dim=8, image=dict(name=image, **towers[image]),
    fusion=dict(stages=((1, 1),), heads=2), text=dict(width=32, heads=2, depth=2, context=12, vocab_size=60))
  return config_lib.replace(config_lib.Config(), model=config_lib.replace(model, **changes))


def random_variables(model: config_lib.Model, seed: int = 0) -> dict:
  """Filled by hand, alive everywhere: compiling the initialisation takes longer than a whole test."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: lightclip.init_variables(model, jax.random.key(0)))

  def fill(path, leaf):
    name, fan_in = path[-1].key, max(1, int(np.prod(leaf.shape[:-1])))
    if name in ('scale', 'var'):
      return rng.uniform(0.7, 1.3, leaf.shape).astype(np.float32)
    if name == 'logit_scale':
      return np.float32(np.log(20))
    return rng.normal(0, 0.3 if leaf.ndim < 2 else fan_in ** -0.5, leaf.shape).astype(np.float32)
  return jax.tree_util.tree_map_with_path(fill, shapes)


def write(folder: pathlib.Path, small: config_lib.Config, variables: dict, step: int = 7, score: float | None = None,
          **run) -> pathlib.Path:
  """`folder`, a workdir with one more checkpoint; `run` replaces parts of its JSON half."""
  about = dict(iterator={}, meter={}, config=json.loads(json.dumps(dataclasses.asdict(small))),
               preprocessing=lightclip.preprocessing(small.model),
               tokenizer=base64.b64encode(tokenizers.train(CAPTIONS * 20, 60).to_bytes()).decode())
  state = {'step': np.int32(step), **{name: tree for name, tree in variables.items() if tree}}
  options = ocp.CheckpointManagerOptions(best_fn=checkpoint.score)
  with ocp.CheckpointManager((folder / 'checkpoints').absolute(), options=options) as manager:
    manager.save(step, metrics=None if score is None else {SCORE: score}, args=ocp.args.Composite(**{
      STATE: ocp.args.StandardSave(state), RUN: ocp.args.JsonSave({**about, **run})}))
  return folder
