"""LightCLIP: two towers and their projections, and the heads that exist in training only.

Letters: B batch, H height, W text positions (width in images), D embedding, d token embedding, P image tokens, K masked
positions, V vocabulary, C text width.
"""
import functools
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lightclip_jax import config
from lightclip_jax.errors import UserError
from lightclip_jax.models import fusion, image_towers, layers, norm, text_transformer
from lightclip_jax.outputs import Outputs
from lightclip_jax.sharding import Rule

# OpenAI CLIP's statistics of red, green and blue, for values in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_SCALE = 100.0
TRAINING_ONLY = 'training_only'

# How the `tensor` axis splits parameters: the word table and what shares its rows, and the wide half of every MLP. The rest
# is named too, so that a new part has to say what it wants.
SHARDING_RULES = (
  Rule('^text/token_embedding/embedding$', ('vocabulary',)),
  Rule('^training_only/masked_lm/bias$', ('vocabulary',)),
  Rule('mlp/hidden/kernel$', (None, 'hidden')),
  Rule('mlp/hidden/bias$', ('hidden',)),
  Rule('mlp/out/kernel$', ('hidden',)),
  Rule('^(image|text|training_only|image_projection|text_projection)/'),
  Rule('^logit_scale$'),
)

# A linear map without bias whose weights start with standard deviation width ** -0.5, as CLIP's projections do.
Projection = functools.partial(layers.Dense, use_bias=False,
                               kernel_init=nn.initializers.variance_scaling(1.0, 'fan_in', 'normal'))


class TrainingOnly(nn.Module):
  """Token projections, the token scale, the sigmoid loss's bias, fusion and the masked-language-model head."""
  model: config.Model

  def setup(self) -> None:
    model = self.model
    fusion.check(model)
    self.image_token_projection = Projection(model.token_dim)
    self.text_token_projection = Projection(model.token_dim)
    self.token_logit_scale = self.param('token_logit_scale', _log_of(model.logit_scale_init), ())
    self.logit_bias = self.param('logit_bias', nn.initializers.constant(model.logit_bias_init), ())
    self.fusion = fusion.Fusion(model.fusion)
    self.masked_lm = fusion.MaskedLMHead(model.text.vocab_size)

  def tokens(self, image_tokens_BxHxWxF: jax.Array, text_tokens_BxWxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit vectors (image [B, P, d], text [B, W, d])."""
    image_BxPxF = image_tokens_BxHxWxF.reshape(image_tokens_BxHxWxF.shape[0], -1, image_tokens_BxHxWxF.shape[-1])
    return _unit(self.image_token_projection(image_BxPxF)), _unit(self.text_token_projection(text_tokens_BxWxC))


class LightCLIP(nn.Module):
  """The model. Inference parameters: `image`, `text`, `image_projection`, `text_projection`, `logit_scale`; the rest is
  under `training_only`. Parameters are float32; the towers compute in `config.compute_dtype`.

  Attributes:
    config: sizes and options.
    local_groups: how many groups batch_norm 'local' makes: the devices that a batch is sharded over.
  """
  config: config.Model
  local_groups: int = 1

  def setup(self) -> None:
    model, dtype = self.config, jnp.dtype(self.config.compute_dtype)
    if not 0 <= model.token_stage <= 4:
      raise UserError(f'model.token_stage is {model.token_stage}; it must be an image stage, 1 to 4, or 0 for the last tokens')
    batch_norm = functools.partial(norm.BatchNorm, policy=model.batch_norm, local_groups=self.local_groups)
    self.image = image_towers.build(model.image, batch_norm)
    self.text = text_transformer.TextTransformer(model.text, dtype)
    self.image_projection = Projection(model.embed_dim)
    self.text_projection = Projection(model.embed_dim)
    self.logit_scale = self.param('logit_scale', _log_of(model.logit_scale_init), ())
    self.training_only = TrainingOnly(model)

  def __call__(self, images_BxHxWx3: jax.Array, tokens_BxW: jax.Array, *, masked_tokens_BxW: jax.Array | None = None,
               masked_positions_BxK: jax.Array | None = None, token_heads: bool = False, train: bool = False,
               locked: Collection[str] = (), example_index_B: jax.Array | None = None) -> Outputs:
    """Both towers, and the training-only heads that are asked for.

    Args:
      images_BxHxWx3: uint8 RGB.
      tokens_BxW: int32, W at most the context.
      masked_tokens_BxW: int32, the text with words masked; with masked_positions_BxK (int32) it gives masked-LM logits.
      token_heads: whether to compute image and text tokens for the matching.
      train: group statistics in BatchNorm (sown into `group_statistics`), and dropout (`rngs={'dropout': key}`).
      locked: of 'image' and 'text', the towers that work as at inference all the same (LiT, arXiv:2111.07991).
      example_index_B: int32, each example's index in the global batch; dropout masks depend on it and the key alone,
        so that a micro-batch gets the masks it would get in the whole batch. None: 0, 1, 2, …

    Raises:
      UserError: for more positions than the context, or a batch that the BatchNorm groups do not divide (training).
    """
    image = self.image_features(images_BxHxWx3, train and 'image' not in locked, example_index_B)
    train = train and 'text' not in locked
    if masked_tokens_BxW is None:
      text_end, text_BxWxC = self.text(tokens_BxW, token_heads, train=train, example_index=example_index_B)
      logits = None
    else:
      text_end, text_BxWxC, masked_BxKxC = self._fused_text(image, tokens_BxW, masked_tokens_BxW, masked_positions_BxK,
                                                            token_heads, train, example_index_B)
      logits = self._masked_lm(masked_BxKxC)
    image_tokens, text_tokens = None, None
    if token_heads:
      image_tokens, text_tokens = self.training_only.tokens(image.tokens_BxHxWxF, text_BxWxC)
    return Outputs(_unit(self.image_projection(image.pooled_BxF)), _unit(self.text_projection(text_end)),
                   image_tokens, text_tokens, logits)

  def encode_image(self, images_BxHxWx3: jax.Array, train: bool = False) -> jax.Array:
    """uint8 [B, H, W, 3] -> float32 [B, D], unit norm."""
    return _unit(self.image_projection(self.image_features(images_BxHxWx3, train).pooled_BxF))

  def encode_text(self, tokens_BxW: jax.Array) -> jax.Array:
    """int32 [B, W] -> float32 [B, D], unit norm."""
    return _unit(self.text_projection(self.text(tokens_BxW, words=False)[0]))

  def encode_tokens(self, images_BxHxWx3: jax.Array, tokens_BxW: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The matching's unit vectors in float32, to plot which word goes to which patch: ([B, P, d], [B, W, d])."""
    return self.training_only.tokens(self.image_features(images_BxHxWx3).tokens_BxHxWxF, self.text(tokens_BxW)[1])

  def image_features(self, images_BxHxWx3: jax.Array, train: bool = False,
                     example_index_B: jax.Array | None = None) -> layers.ImageFeatures:
    """The image tower on uint8 images, normalised here; its tokens are those of the stage that the config names."""
    images = normalize(images_BxHxWx3, jnp.dtype(self.config.compute_dtype))
    features, stage = self.image(images, train, example_index_B), self.config.token_stage
    return features._replace(tokens_BxHxWxF=features.stages[stage - 1]) if stage else features

  def _fused_text(self, image: layers.ImageFeatures, tokens_BxW: jax.Array, masked_tokens_BxW: jax.Array,
                  masked_positions_BxK: jax.Array, words: bool, train: bool, example_index_B: jax.Array | None
                  ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Plain text as the text tower returns it, and masked text [B, K, C] at the masked positions.

    Up to the last block both are one pass; the new axis of 2 stands after the batch axis, which may be sharded.
    """
    def fuse(blocks_done: int, masked_BxWxC: jax.Array) -> jax.Array:
      return self.training_only.fusion(blocks_done, masked_BxWxC, image.stages)

    def fuse_masked(blocks_done: int, hidden_Bx2xWxC: jax.Array) -> jax.Array:
      if all(block != blocks_done for _, block in self.config.fusion.stages):
        return hidden_Bx2xWxC
      return jnp.stack([hidden_Bx2xWxC[:, 0], fuse(blocks_done, hidden_Bx2xWxC[:, 1])], axis=1)

    index_B = jnp.arange(tokens_BxW.shape[0]) if example_index_B is None else example_index_B
    hidden_Bx2xWxC = self.text.all_but_last(
        jnp.stack([tokens_BxW, masked_tokens_BxW], axis=1), fuse_masked, train=train,
        example_index=jnp.stack([index_B, ~index_B], axis=1))   # ~: other masks for masked text
    end_BxC, plain_BxWxC = self.text.read(hidden_Bx2xWxC[:, 0], tokens_BxW, words, train=train, example_index=index_B)
    return end_BxC, plain_BxWxC, self.text.read_at(hidden_Bx2xWxC[:, 1], masked_tokens_BxW, masked_positions_BxK, fuse,
                                                   train=train, example_index=~index_B)

  def _masked_lm(self, hidden_BxKxC: jax.Array) -> jax.Array:
    """Float32 logits [B, K, V]."""
    x_BxKxC, bias_V = self.training_only.masked_lm(hidden_BxKxC)
    logits_BxKxV = self.text.attend(x_BxKxC)
    return logits_BxKxV + jnp.broadcast_to(bias_V, logits_BxKxV.shape)


def normalize(images_BxHxWx3: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """(x / 255 − mean) / std as one multiply-add on the device: uint8 [B, H, W, 3] -> dtype."""
  factor = jnp.array([1 / (255 * s) for s in IMAGE_STD], jnp.float32).reshape(1, 1, 1, 3)
  offset = jnp.array([-m / s for m, s in zip(IMAGE_MEAN, IMAGE_STD, strict=True)], jnp.float32).reshape(1, 1, 1, 3)
  return (images_BxHxWx3.astype(jnp.float32) * factor + offset).astype(dtype)


def preprocessing(model: config.Model) -> dict[str, Any]:
  """What an image goes through before the tower, in open_clip's terms; it travels in the checkpoint."""
  return {'size': model.image.size, 'mean': list(IMAGE_MEAN), 'std': list(IMAGE_STD), 'interpolation': 'bicubic',
          'resize_mode': 'shortest'}


def init_variables(model: config.Model, rng: jax.Array) -> dict[str, Any]:
  """Every parameter, training-only ones included: {'params', 'batch_stats'} (`batch_stats` empty without BatchNorm).

  Raises:
    UserError: for a config whose sizes do not fit together.
  """
  images = jnp.zeros((1, model.image.size, model.image.size, 3), jnp.uint8)
  tokens = jnp.zeros((1, model.text.context), jnp.int32)
  clip = LightCLIP(model)
  init = functools.partial(clip.init, masked_tokens_BxW=tokens, masked_positions_BxK=tokens[:, :1], token_heads=True)
  variables = jax.jit(init)(rng, images, tokens)
  return {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}


def inference_parameters(params: dict[str, Any]) -> dict[str, Any]:
  """The two towers, their projections and the scale, without what training alone needs."""
  return {name: value for name, value in params.items() if name != TRAINING_ONLY}


@jax.custom_vjp
def clipped_scale(log_scale: jax.Array) -> jax.Array:
  """exp(log_scale), at most 100. At the cap only a gradient that lowers the scale passes: it can come back."""
  return jnp.minimum(jnp.exp(log_scale), MAX_SCALE)


def _clipped_scale_forward(log_scale: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  scale = clipped_scale(log_scale)
  return scale, (scale, log_scale >= math.log(MAX_SCALE))


def _clipped_scale_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
  scale, capped = residuals
  return (scale * jnp.where(capped, jnp.maximum(gradient, 0), gradient),)


clipped_scale.defvjp(_clipped_scale_forward, _clipped_scale_backward)


def _log_of(value: float) -> nn.initializers.Initializer:
  return nn.initializers.constant(math.log(value))


def _unit(x: jax.Array) -> jax.Array:
  """Float32 unit vectors along the last axis; zero stays zero, with a finite gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))
