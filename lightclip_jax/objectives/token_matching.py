"""Contrast of image-text similarities that come from matching patches to words (docs/OBJECTIVES.md, 2).

Letters: B batch, g pairs of a group, P image tokens, W text positions, d token embedding, G groups of a device.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lightclip_jax.errors import UserError
from lightclip_jax.objectives import sinkhorn
from lightclip_jax.objectives.ring import Ring


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMatchingAux:
  """What the matching found for the true pairs, for plots, and how well it tells them from the rest of the group."""
  plans_BxPxW: jax.Array       # float32, each image with its own text; of 'max' each word's best patch
  similarity_B: jax.Array      # float32, m_ii in [-1, 1]; 0 for a text without words
  top1_image_to_text: jax.Array   # float32 scalars, within groups, over texts that have a word; a tie is a miss
  top1_text_to_image: jax.Array


def token_matching_loss(
    image_tokens_BxPxd: jax.Array, text_tokens_BxWxd: jax.Array, text_mask_BxW: jax.Array,
    logit_scale: jax.Array | float, *, group_size: int = 16, epsilon: float = 0.05, num_iterations: int = 20,
    kind: str = 'sinkhorn', mesh: Mesh | None = None,
    axes: str | tuple[str, ...] | None = None) -> tuple[jax.Array, TokenMatchingAux]:
  """Symmetric InfoNCE over m_ij = sum_pw pi_pw c_pw / min(P, words of j), inside groups of `group_size` pairs.

  With kind 'max' it is FILIP's late interaction instead (Yao et al. 2021, arXiv:2111.07783), to compare with: the mean over
  patches of the best word's cosine for image to text, the mean over words of the best patch's for text to image.

  Groups are contiguous runs of the global batch inside a device's share: the cost does not depend on B, and nothing is
  communicated but the final mean. A pair whose text has no word is left out.

  Args:
    image_tokens_BxPxd, text_tokens_BxWxd: unit vectors, any float type; computed in float32.
    text_mask_BxW: bool, true at words (not at padding or special tokens).
    logit_scale: multiplicative, a scalar.
    epsilon, num_iterations: of `sinkhorn_plan`.
    kind: 'sinkhorn' or 'max'.
    mesh, axes: where the batch is sharded, B over `axes`; None: one device.

  Returns:
    (float32 scalar, TokenMatchingAux); 0 if no text has a word.

  Raises:
    UserError: for shapes that do not fit, another kind, epsilon or iterations that are not positive, or groups that do not
      divide a device's share.
  """
  ring = Ring.over(mesh, axes)
  if kind not in ('sinkhorn', 'max'):
    raise UserError(f"kind is {kind!r}; it must be 'sinkhorn' or 'max'")
  _check(image_tokens_BxPxd, text_tokens_BxWxd, text_mask_BxW, logit_scale, group_size, epsilon, num_iterations, ring)
  if text_tokens_BxWxd.shape[1] == 0:
    return _without_words(*image_tokens_BxPxd.shape[:2])

  def share(sharded: Any, _: None) -> tuple[Any, None]:
    fused = ring.mesh is not None or jax.device_count() == 1   # else the compiler might want to partition the kernel
    return _group_similarities(*sharded, group_size, kind, epsilon, num_iterations, fused), None
  tokens = image_tokens_BxPxd.astype(jnp.float32), text_tokens_BxWxd.astype(jnp.float32)
  (*both_Bxg, plans_BxPxW), _ = ring.run(share, ring.placed((*tokens, text_mask_BxW.astype(bool))), None)
  has_word = jnp.any(text_mask_BxW, axis=-1).reshape(-1, group_size)
  of_images, of_texts = (x.reshape(-1, group_size, group_size) for x in both_Bxg)
  losses, hits = zip(*(_contrast(jnp.asarray(logit_scale, jnp.float32).reshape(()) * x, has_word)
                       for x in (of_images, of_texts.swapaxes(1, 2))), strict=True)
  count = jnp.maximum(jnp.sum(has_word, dtype=jnp.float32), 1.0)
  own = jnp.einsum('nii->ni', jax.lax.stop_gradient((of_images + of_texts) / 2)).reshape(-1)
  loss = sum(map(jnp.sum, losses)) / (2 * count)
  return loss, TokenMatchingAux(plans_BxPxW, own, *(jnp.sum(hit) / count for hit in hits))


def _without_words(batch: int, patches: int) -> tuple[jax.Array, TokenMatchingAux]:
  """What texts of no position give, where there is nothing to match."""
  zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
  return zeros(()), TokenMatchingAux(zeros((batch, patches, 0)), zeros(batch), zeros(()), zeros(()))


def _check(image: jax.Array, text: jax.Array, mask: jax.Array, scale: Any, group_size: int,
           epsilon: float, num_iterations: int, ring: Ring) -> None:
  shapes = [jnp.shape(x) for x in (image, text, mask)]
  if [len(s) for s in shapes] != [3, 3, 2] or image.shape[::2] != text.shape[::2] or text.shape[:2] != mask.shape:
    raise UserError('token_matching_loss needs image tokens [B, P, d], text tokens [B, W, d] and text mask [B, W]; '
                    f'it has {shapes[0]}, {shapes[1]} and {shapes[2]}')
  if shapes[0][1] == 0:
    raise UserError(f'image tokens have shape {shapes[0]}; each image needs at least one')
  if jnp.size(scale) != 1:
    raise UserError(f'logit_scale has shape {jnp.shape(scale)}; it must be a scalar')
  if group_size < 1:
    raise UserError(f'group_size is {group_size}; it must be at least 1')
  sinkhorn.check_options(epsilon, num_iterations)
  ring.check(image.shape[0], group_size)


def _group_similarities(image_BxPxd: jax.Array, text_BxWxd: jax.Array, mask_BxW: jax.Array, group_size: int, kind: str,
                        epsilon: float, num_iterations: int, fused: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  """m [B, g] of every image with the texts of its group, for images and for texts, and the plans of the true pairs."""
  grouped = [x.reshape(-1, group_size, *x.shape[1:]) for x in (image_BxPxd, text_BxWxd, mask_BxW)]
  cosine = jnp.einsum('nipd,njwd->nijpw', grouped[0], grouped[1],
                      precision=jax.lax.Precision.HIGHEST)
  words = jnp.broadcast_to(grouped[2][:, None], (*cosine.shape[:3], cosine.shape[4]))
  patches, constant = jnp.ones(cosine.shape[:4], bool), jax.lax.stop_gradient(cosine)

  def similarity(plans: jax.Array, matched: jax.Array | int) -> jax.Array:
    return (jnp.einsum('nijpw,nijpw->nij', plans, cosine) / matched).reshape(-1, group_size)

  if kind == 'max':
    plans = _best_patches(constant, words)
    both = similarity(_best_words(constant, words), patches.shape[-1]), similarity(plans, jnp.maximum(jnp.sum(words, -1), 1))
  else:
    plans = sinkhorn.solve(1 - constant, patches, words, epsilon, num_iterations, fused)
    both = (similarity(plans, jnp.clip(jnp.sum(words, -1), 1, patches.shape[-1])),) * 2
  own = jnp.einsum('niipw->nipw', plans)
  return *both, own.reshape(-1, *own.shape[2:])


def _best_words(cosine_xPxW: jax.Array, words_xW: jax.Array) -> jax.Array:
  """1 at each patch's best word; all 0 where there is no word."""
  words = words_xW[..., None, :]
  return jax.nn.one_hot(jnp.argmax(jnp.where(words, cosine_xPxW, -2.0), -1), words.shape[-1]) * words


def _best_patches(cosine_xPxW: jax.Array, words_xW: jax.Array) -> jax.Array:
  """1 at each word's best patch."""
  return jax.nn.one_hot(jnp.argmax(cosine_xPxW, -2), cosine_xPxW.shape[-2], axis=-2) * words_xW[..., None, :]


def _contrast(logits_Gxgxg: jax.Array, has_word_Gxg: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy [G, g] of each row with its own column, and whether that is its best; 0 for pairs left out."""
  own = jnp.einsum('nii->ni', logits_Gxgxg)   # with axes that are explicit, a diagonal has no gradient
  counted = has_word_Gxg[:, None, :]
  other = counted & ~jnp.eye(logits_Gxgxg.shape[-1], dtype=bool)[None]
  norm = jax.nn.logsumexp(jnp.where(counted, logits_Gxgxg, -1e30), axis=-1)
  hit = own > jnp.max(jnp.where(other, logits_Gxgxg, -jnp.inf), axis=-1)
  return jnp.where(has_word_Gxg, norm - own, 0.0), has_word_Gxg & hit
