"""What every format exports: the two towers as pure functions, float32, without the training-only parameters.

Letters: b examples at a time, S image size, W text positions, D embedding.
"""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightclip_jax import config as config_lib
from lightclip_jax.inference import checkpoint
from lightclip_jax.models import lightclip


@dataclasses.dataclass(frozen=True)
class Towers:
  """A checkpoint ready for export.

  Attributes:
    loaded: the checkpoint; `config.model.compute_dtype` is float32.
    image: uint8 [b, S, S, 3] -> float32 [b, D], unit norm.
    text: int32 [b, W] -> float32 [b, D], unit norm.
    image_item, text_item: one example of each input.
  """
  loaded: checkpoint.Loaded
  image: Callable[[jax.Array], jax.Array]
  text: Callable[[jax.Array], jax.Array]
  image_item: jax.ShapeDtypeStruct
  text_item: jax.ShapeDtypeStruct

  @property
  def params(self) -> dict[str, Any]:
    """The parameters of inference."""
    return self.loaded.variables['params']

  def description(self) -> dict[str, Any]:
    """What `model.json` says about the model itself."""
    config = self.loaded.config
    return {'name': config.name, 'step': self.loaded.step, 'preprocessing': self.loaded.preprocessing,
            'context': config.model.text.context, 'embed_dim': config.model.embed_dim,
            'logit_scale': float(lightclip.clipped_scale(self.params['logit_scale'])),
            'special_ids': {'pad': self.loaded.tokenizer.pad_id, 'start': self.loaded.tokenizer.start_id,
                            'end': self.loaded.tokenizer.end_id}}


def from_checkpoint(loaded: checkpoint.Loaded) -> Towers:
  """The towers of a checkpoint; a model that computes in bfloat16 is exported in float32, as it stores its weights."""
  config = config_lib.replace(loaded.config, model=dict(compute_dtype='float32'))
  variables = jax.tree.map(np.asarray, {
    'params': lightclip.inference_parameters(loaded.variables['params']), 'batch_stats': loaded.variables['batch_stats']})
  apply = functools.partial(lightclip.LightCLIP(config.model).apply, variables)
  size, context = config.model.image.size, config.model.text.context
  return Towers(dataclasses.replace(loaded, config=config, variables=variables),
                functools.partial(apply, method='encode_image'), functools.partial(apply, method='encode_text'),
                jax.ShapeDtypeStruct((size, size, 3), jnp.uint8), jax.ShapeDtypeStruct((context,), jnp.int32))


def token_heads(loaded: checkpoint.Loaded) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
  """What the matching of patches and words compares, with parameters of training only.

  Returns:
    Functions (uint8 [b, S, S, 3] -> float32 [b, P, d], int32 [b, W] -> float32 [b, W, d]), unit vectors.
  """
  config = config_lib.replace(loaded.config, model=dict(compute_dtype='float32'))
  variables = jax.tree.map(np.asarray, loaded.variables)
  heads = variables['params'][lightclip.TRAINING_ONLY]
  no_patch, no_word = (np.zeros((1, 1, heads[f'{side}_token_projection']['kernel'].shape[0]), np.float32)   # the other side's
                       for side in ('image', 'text'))

  def image(clip: lightclip.LightCLIP, images: jax.Array) -> jax.Array:
    return clip.training_only.tokens(clip.image_features(images).tokens_BxHxWxF, no_word)[0]

  def text(clip: lightclip.LightCLIP, tokens: jax.Array) -> jax.Array:
    return clip.training_only.tokens(no_patch[None], clip.text(tokens)[1])[1]
  apply = functools.partial(lightclip.LightCLIP(config.model).apply, variables)
  return functools.partial(apply, method=image), functools.partial(apply, method=text)
