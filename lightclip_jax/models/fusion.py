"""Fusion of image features into masked text, and the masked-language-model head: both exist in training only.

Letters: B batch, W text positions, C text width, P patches, K masked positions, V vocabulary;
H, h heights, w widths, c channels of an image map.
"""
import jax
import jax.numpy as jnp
from flax import linen as nn

from lightclip_jax import config
from lightclip_jax.errors import UserError
from lightclip_jax.models import layers


class Injection(nn.Module):
  """hidden + gate · image information of one stage; the gate starts at zero, so that the text starts untouched."""
  op: str
  heads: int

  @nn.compact
  def __call__(self, hidden_BxWxC: jax.Array, map_Bxhxwxc: jax.Array) -> jax.Array:
    """Words query the stage's patches ("cross_attention"), or get its projected mean ("add")."""
    batch, _, width = hidden_BxWxC.shape
    # Without the barrier the compiler for TPU v4 and v5p fuses rows and columns into the products over patches, and aborts.
    patches_BxPxc = jax.lax.optimization_barrier(map_Bxhxwxc.reshape(batch, -1, map_Bxhxwxc.shape[-1]))
    patches_BxPxc = nn.LayerNorm(1e-5, dtype=hidden_BxWxC.dtype, name='image_norm')(patches_BxPxc.astype(hidden_BxWxC.dtype))
    if self.op == 'add':
      out = layers.Dense(width, name='project')(patches_BxPxc.mean(1, keepdims=True))
    else:
      words_BxWxC = nn.LayerNorm(1e-5, dtype=hidden_BxWxC.dtype, name='text_norm')(hidden_BxWxC)
      query = layers.Dense(width, name='query')(words_BxWxC)
      keys_values = layers.Dense(2 * width, name='key_value')(patches_BxPxc)
      q, k, v = (x.reshape(batch, -1, self.heads, width // self.heads) for x in (query, *jnp.split(keys_values, 2, -1)))
      out = layers.Dense(width, name='out')(layers.attention(q, k, v).reshape(hidden_BxWxC.shape))
    gate_C = self.param('gate', nn.initializers.zeros, (width,)).astype(hidden_BxWxC.dtype)
    return hidden_BxWxC + jnp.broadcast_to(gate_C, out.shape) * out


class Fusion(nn.Module):
  """One `Injection` for each (image stage, text block) pair of the config."""
  fusion: config.Fusion

  def setup(self) -> None:
    self.injections = [Injection(self.fusion.op, self.fusion.heads, name=f'stage{stage}_block{block}')
                       for stage, block in self.fusion.stages]

  def __call__(self, blocks_done: int, hidden_BxWxC: jax.Array, stages: tuple[jax.Array, ...]) -> jax.Array:
    """The hidden state after text block `blocks_done`, with what belongs there added.

    W: positions; after the last block, those that are read.
    """
    for injection, (stage, block) in zip(self.injections, self.fusion.stages, strict=True):
      if block == blocks_done:
        hidden_BxWxC = injection(hidden_BxWxC, _pool_to(stages[stage - 1], stages[-1].shape[1:3]))
    return hidden_BxWxC


class MaskedLMHead(nn.Module):
  """Dense, GELU, LayerNorm; the output layer is the token embedding plus `bias_V`."""
  vocab_size: int

  @nn.compact
  def __call__(self, hidden_BxKxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-> ([B, K, C] to multiply by the token embeddings, bias [V])."""
    x = layers.Dense(hidden_BxKxC.shape[-1], name='hidden')(hidden_BxKxC)
    x = nn.LayerNorm(1e-5, dtype=x.dtype, name='norm')(layers.gelu(x))
    return x, self.param('bias', nn.initializers.zeros, (self.vocab_size,))


def check(model: config.Model) -> None:
  """Raises UserError for a stage or block that does not exist, or a width that the heads do not divide."""
  for stage, block in model.fusion.stages:
    if not 1 <= stage <= 4:
      raise UserError(f'model.fusion.stages has image stage {stage}; an image tower has stages 1 to 4')
    if not 1 <= block <= model.text.depth:
      raise UserError(f'model.fusion.stages has text block {block}; the text tower has blocks 1 to {model.text.depth}')
  if model.text.width % model.fusion.heads:
    raise UserError(f'model.fusion.heads {model.fusion.heads} does not divide model.text.width {model.text.width}')


def _pool_to(map_BxHxWxc: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Average-pooled to the last stage's grid, so that attention costs the same whatever the stage."""
  map_BxHxWxc = jax.lax.optimization_barrier(map_BxHxWxc)
  batch, height, width, channels = map_BxHxWxc.shape
  if height % grid[0] == 0 and width % grid[1] == 0:   # a plain sum, which compilers fuse; those of TPU v4 and v5p need it
    return map_BxHxWxc.reshape(batch, grid[0], height // grid[0], grid[1], width // grid[1], channels).mean((2, 4))
  window = (-(-height // grid[0]), -(-width // grid[1]))
  return nn.avg_pool(map_BxHxWxc, window, window, padding='SAME', count_include_pad=False)
