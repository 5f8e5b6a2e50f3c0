"""A teacher's similarities as soft targets, on the ring of the contrastive losses (docs/OBJECTIVES.md, 4).

Letters: B global batch, b a device's share, r rows and c columns of one block, D embedding, E the teacher's embedding.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lightclip_jax.errors import UserError
from lightclip_jax.objectives.contrastive import check_embeddings
from lightclip_jax.objectives.ring import Ring, dot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillationAux:
  """Both directions; float32 scalars."""
  loss_image_to_text: jax.Array
  loss_text_to_image: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
  """Sums [b] of one direction's rows over the columns seen so far (or the other way round)."""
  best: jax.Array            # maximum of the student's logits S
  total: jax.Array           # sum of exp(S - best)
  target_best: jax.Array     # maximum of the teacher's c / T
  target_total: jax.Array    # sum of exp(c / T - target_best)
  target_sum: jax.Array      # sum of exp(c / T - target_best) * (c / T - S)


def distillation_loss(
    image_embeddings_BxD: jax.Array, text_embeddings_BxD: jax.Array, teacher_image_BxE: jax.Array,
    teacher_text_BxE: jax.Array, logit_scale: jax.Array | float, *, temperature: float = 0.02, mesh: Mesh | None = None,
    axes: str | tuple[str, ...] | None = None) -> tuple[jax.Array, DistillationAux]:
  """KL divergence of the student's image-text similarity distribution from the teacher's, the mean of both directions.

  Args:
    image_embeddings_BxD, text_embeddings_BxD: the student's, unit vectors of any float type; computed in float32.
    teacher_image_BxE, teacher_text_BxE: the teacher's, likewise; they receive no gradient.
    logit_scale: the student's multiplicative scale s > 0 (not its logarithm), a scalar.
    temperature: T > 0 of the teacher's softmax.
    mesh, axes: where the batch is sharded, B over `axes`; None: one device.

  Returns:
    (float32 scalar, DistillationAux). Equal on any number of devices; memory is linear in B.

  Raises:
    UserError: for shapes that do not fit, a temperature that is not positive, or a batch that the devices cannot share.

  The loss is that of MobileCLIP's multi-modal distillation (arXiv:2311.17049, section 3) with one teacher.
  """
  ring = Ring.over(mesh, axes)
  check_embeddings(image_embeddings_BxD, text_embeddings_BxD, logit_scale, ring)
  shapes = jnp.shape(teacher_image_BxE), jnp.shape(teacher_text_BxE)
  if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != image_embeddings_BxD.shape[0]:
    raise UserError(f"the teacher's image embeddings {shapes[0]} and text embeddings {shapes[1]} must have one shape "
                    f'[B, E], B = {image_embeddings_BxD.shape[0]}')
  if not temperature > 0:
    raise UserError(f'temperature is {temperature}; it must be above 0')
  arrays = tuple(x.astype(jnp.float32)
                 for x in (image_embeddings_BxD, text_embeddings_BxD, teacher_image_BxE, teacher_text_BxE))
  forth, back = _loss((ring, 1 / temperature), *ring.placed(arrays), jnp.asarray(logit_scale, jnp.float32).reshape(()))
  return (forth + back) / 2, DistillationAux(forth, back)


def _forward(setting, image_BxD, text_BxD, teacher_image_BxE, teacher_text_BxE, scale):
  """(image→text, text→image), and what the backward pass needs: vectors, no block."""
  ring, sharpness = setting

  def share(sharded: Any, scale: jax.Array) -> tuple[Any, Any]:
    image, text, *teacher = sharded

    def block(rows: Any, columns: Any) -> tuple[_Sums, _Sums]:
      logits_rxc, target_rxc = _block(rows, columns, scale, sharpness)
      return _sum(logits_rxc, target_rxc, 1), _sum(logits_rxc, target_rxc, 0)

    zero = jnp.zeros(image.shape[0], jnp.float32)
    never = jnp.full_like(zero, -1e30)   # stands for -inf where inf - inf would be NaN
    empty = _Sums(never, zero, never, zero, zero)
    sums = ring.fold(block, _merge, (image, teacher[0]), (text, teacher[1]), empty, empty)
    norms = tuple((s.best + jnp.log(s.total), s.target_best + jnp.log(s.target_total)) for s in sums)
    losses = (s.target_sum / s.target_total - target + own for s, (own, target) in zip(sums, norms, strict=True))
    return norms, tuple(ring.sum(jnp.sum(x)) / image_BxD.shape[0] for x in losses)

  arrays = image_BxD, text_BxD, teacher_image_BxE, teacher_text_BxE
  norms, losses = ring.run(share, arrays, scale)
  return losses, (arrays, norms, scale)


def _backward(setting, residuals, cotangents):
  """Each block again: softmax - y of both directions, in the two products that give the embeddings' gradients."""
  (ring, sharpness), (arrays, norms, scale) = setting, residuals

  def share(sharded: Any, numbers: Any) -> tuple[Any, Any]:
    (image, text, *teacher), (row_norms, column_norms) = sharded
    scale, *cotangents = numbers

    def block(rows: Any, columns: Any) -> tuple[jax.Array, jax.Array]:
      logits_rxc, target_rxc = _block(rows, columns, scale, sharpness)
      d_rxc = jnp.zeros_like(logits_rxc)
      for cotangent, (own, target), axis in zip(cotangents, (rows[2], columns[2]), (1, 0), strict=True):
        own, target = jnp.expand_dims(own, axis), jnp.expand_dims(target, axis)
        d_rxc += cotangent * (jnp.exp(logits_rxc - own) - jnp.exp(target_rxc - target))
      return dot(d_rxc, columns[0]), dot(d_rxc.T, rows[0])

    d_image, d_text = ring.fold(block, jnp.add, (image, teacher[0], row_norms), (text, teacher[1], column_norms),
                                jnp.zeros_like(image), jnp.zeros_like(text))
    return (scale * d_image, scale * d_text), ring.sum(jnp.sum(image * d_image))

  cotangents = (g / arrays[0].shape[0] for g in cotangents)
  (d_image, d_text), d_scale = ring.run(share, (arrays, norms), (scale, *cotangents))
  return d_image, d_text, None, None, d_scale


_loss = jax.custom_vjp(lambda setting, *args: _forward(setting, *args)[0], nondiff_argnums=(0,))
_loss.defvjp(_forward, _backward)


def _block(rows: Any, columns: Any, scale: jax.Array, sharpness: float) -> tuple[jax.Array, jax.Array]:
  """One block's logits and the teacher's, both [r, c]; rows and columns begin with (the student's, the teacher's)."""
  return scale * dot(rows[0], columns[0].T), sharpness * dot(rows[1], columns[1].T)


def _sum(logits_rxc: jax.Array, target_rxc: jax.Array, axis: int) -> _Sums:
  best, target_best = jnp.max(logits_rxc, axis), jnp.max(target_rxc, axis)
  weight_rxc = jnp.exp(target_rxc - jnp.expand_dims(target_best, axis))
  return _Sums(best, jnp.sum(jnp.exp(logits_rxc - jnp.expand_dims(best, axis)), axis), target_best,
               jnp.sum(weight_rxc, axis), jnp.sum(weight_rxc * (target_rxc - logits_rxc), axis))


def _merge(x: _Sums, y: _Sums) -> _Sums:
  """The sums of both: what stands relative to a maximum is brought to the larger one."""
  best, target_best = jnp.maximum(x.best, y.best), jnp.maximum(x.target_best, y.target_best)
  own = [jnp.exp(s.best - best) for s in (x, y)]
  target = [jnp.exp(s.target_best - target_best) for s in (x, y)]
  return _Sums(best, x.total * own[0] + y.total * own[1], target_best,
               x.target_total * target[0] + y.target_total * target[1], x.target_sum * target[0] + y.target_sum * target[1])
