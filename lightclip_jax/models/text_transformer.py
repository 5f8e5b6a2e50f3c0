"""The text tower: a pre-norm Transformer (CLIP's; agrees with open_clip's text tower given its weights).

Letters: W positions, K positions that are read, C width, V vocabulary; `...` any batch axes.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lightclip_jax import config
from lightclip_jax.errors import UserError
from lightclip_jax.models import layers

Inject = Callable[[int, jax.Array], jax.Array]


def valid_positions(tokens_W: jax.Array, end_id: int) -> jax.Array:
  """int32 [..., W] -> bool [..., W]: true up to the first end token, itself included; all true where there is none."""
  ends = (tokens_W == end_id).astype(jnp.int32)
  return jnp.cumsum(ends, axis=-1) - ends == 0


class TextTransformer(nn.Module):
  """Token and position embeddings, the blocks, a final LayerNorm; the embedding is read at the end token."""
  text: config.TextTower
  dtype: jnp.dtype = jnp.float32
  epsilon: float = 1e-5   # of the LayerNorms

  def setup(self) -> None:
    text = self.text
    if text.depth < 1:
      raise UserError(f'model.text.depth is {text.depth}; it must be 1 or more')
    if text.width % text.heads:
      raise UserError(f'model.text.width {text.width} is not a multiple of model.text.heads {text.heads}')
    self.token_embedding = nn.Embed(text.vocab_size, text.width, embedding_init=nn.initializers.normal(0.02))
    self.position_embedding = self.param('position_embedding', nn.initializers.normal(0.01), (text.context, text.width))
    normal, width = nn.initializers.normal, text.width
    out_init = normal((2 * width * text.depth) ** -0.5)
    self.blocks = [layers.TransformerBlock(text.heads, self.epsilon, text.dropout, False, (normal(width ** -0.5), out_init),
                                           (normal((2 * width) ** -0.5), out_init), name=f'block{i}')
                   for i in range(text.depth)]
    self.final_norm = nn.LayerNorm(self.epsilon, dtype=self.dtype)

  def __call__(self, tokens_W: jax.Array, words: bool = True, *, train: bool = False,
               example_index: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """int32 [..., W] with W at most the context -> ([..., C] at the end token, [..., W, C] at all positions).

    Args:
      tokens_W: token ids; nothing attends to positions after the first end token.
      words: False: None instead of all positions; the last block then computes the end token's alone.
      train: whether to drop out.
      example_index: int32 [...], the example's index in the global batch, which decides its dropout masks.

    Raises:
      UserError: if W is more than the context.
    """
    hidden_WxC = self.all_but_last(tokens_W, train=train, example_index=example_index)
    return self.read(hidden_WxC, tokens_W, words, train=train, example_index=example_index)

  def all_but_last(self, tokens_W: jax.Array, inject: Inject | None = None, *, train: bool = False,
                   example_index: jax.Array | None = None) -> jax.Array:
    """int32 [..., W] -> [..., W, C] before the last block; raises as `__call__` does.

    After each block goes on what inject(number of blocks done, hidden [..., W, C]) returns.
    """
    positions = tokens_W.shape[-1]
    if positions > self.text.context:
      raise UserError(f'{positions} text positions are more than model.text.context {self.text.context}')
    bias = self._bias(tokens_W)
    embeddings = self.token_embedding.embedding.astype(self.dtype)
    x = jnp.take(embeddings, tokens_W, axis=0)
    x = x + jnp.broadcast_to(self.position_embedding[:positions], x.shape).astype(self.dtype)
    for done, block in enumerate(self.blocks[:-1], start=1):
      x = block(x, train, example_index, bias)
      x = inject(done, x) if inject else x
    return x

  def read(self, hidden_WxC: jax.Array, tokens_W: jax.Array, words: bool, *, train: bool,
           example_index: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """What `__call__` returns, of what comes before the last block."""
    end = jnp.sum(valid_positions(tokens_W, self.text.end_id), axis=-1, keepdims=True, dtype=jnp.int32) - 1
    if not words:
      return self.read_at(hidden_WxC, tokens_W, end, train=train, example_index=example_index)[..., 0, :], None
    x = self.blocks[-1](hidden_WxC, train, example_index, self._bias(tokens_W))
    x = self.final_norm(x)
    return layers.take_positions(x, end)[..., 0, :], x

  def read_at(self, hidden_WxC: jax.Array, tokens_W: jax.Array, at_K: jax.Array, inject: Inject | None = None, *,
              train: bool, example_index: jax.Array | None) -> jax.Array:
    """[..., K, C] at the positions int32 [..., K] alone, of what comes before the last block.

    Into the final norm goes what inject(number of blocks, hidden [..., K, C]) returns.
    """
    x = self.blocks[-1](hidden_WxC, train, example_index, self._bias(tokens_W, at_K), at_K)
    return self.final_norm(inject(len(self.blocks), x) if inject else x)

  def attend(self, x: jax.Array) -> jax.Array:
    """Float32 products [..., V] of x [..., C] with the token embeddings (a tied output layer)."""
    return jnp.einsum('...c,vc->...v', x, self.token_embedding.embedding.astype(x.dtype),
                      preferred_element_type=jnp.float32)

  def _bias(self, tokens_W: jax.Array, at_K: jax.Array | None = None) -> jax.Array:
    """The attention bias [..., 1, W or K or 1, W]: 0 where a position may look, a large negative number where it may not."""
    allowed = valid_positions(tokens_W, self.text.end_id)[..., None, None, :]
    if self.text.causal:
      positions = jnp.arange(tokens_W.shape[-1])
      at_K = jnp.broadcast_to(positions, tokens_W.shape) if at_K is None else at_K
      allowed = allowed & (at_K[..., None, :, None] >= jnp.broadcast_to(positions, allowed.shape))
    return jnp.where(allowed, 0.0, -1e9)
