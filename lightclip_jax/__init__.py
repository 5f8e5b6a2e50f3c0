"""LightCLIP-JAX: pretraining of small CLIP models."""
from __future__ import annotations

import os
import typing

if typing.TYPE_CHECKING:
  from lightclip_jax.inference.model import Model


def load(path: str | os.PathLike[str], step: str | int = 'last') -> Model:
  """A model to use: `encode_image`, `encode_text`, `classify` (lightclip_jax/inference/model.py).

  Args:
    path: the workdir of a training run, its checkpoints, or a folder that lightclip_jax.export wrote.
    step: which checkpoint of a run: 'last', 'best' (by the metric that its config's checkpoint.best names) or a number.

  Raises:
    UserError: for a path that is none of these, or one that is damaged; for a checkpoint that is not there.
  """
  from lightclip_jax.inference import model  # imported here: `import lightclip_jax` must not start JAX
  return model.load(path, step)
