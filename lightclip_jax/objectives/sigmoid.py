"""The sigmoid (SigLIP, arXiv:2303.15343) loss on the same ring as the softmax loss.

Letters: B global batch, r rows and c columns of one block, D embedding.
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
class SigmoidAux:
  """Measured in the same pass as the loss; float32 scalars."""
  top1_image_to_text: jax.Array     # fraction whose best text is its own; a tie is a miss
  top1_text_to_image: jax.Array


def sigmoid_contrastive_loss(
    image_embeddings: jax.Array, text_embeddings: jax.Array, logit_scale: jax.Array | float,
    logit_bias: jax.Array | float, *, mesh: Mesh | None = None, axes: str | tuple[str, ...] | None = None,
    ) -> tuple[jax.Array, SigmoidAux]:
  """-1/B sum_ij log sigmoid(±(s <z_i, t_j> + bias)), with + for a pair and - for all others.

  Args:
    image_embeddings, text_embeddings: unit vectors, any float type; computed in float32.
    logit_scale, logit_bias: scalars; the scale is multiplicative (not its logarithm).
    mesh, axes: where the batch is sharded, B over `axes`; None: one device.

  Returns:
    (float32 scalar, SigmoidAux). Equal on any number of devices; memory is linear in B.

  Raises:
    UserError: for shapes that do not fit, or a batch that the devices cannot share.
  """
  ring = Ring.over(mesh, axes)
  check_embeddings(image_embeddings, text_embeddings, logit_scale, ring)
  if jnp.size(logit_bias) != 1:
    raise UserError(f'logit_bias has shape {jnp.shape(logit_bias)}; it must be a scalar')
  numbers = tuple(jnp.asarray(x, jnp.float32).reshape(()) for x in (logit_scale, logit_bias))
  embeddings = ring.placed((image_embeddings.astype(jnp.float32), text_embeddings.astype(jnp.float32)))
  loss, top1 = _loss(ring, *embeddings, *numbers)
  return loss, SigmoidAux(*top1)


def _forward(ring, image_BxD, text_BxD, scale, bias):
  """((loss, two accuracies), inputs)."""
  def share(sharded: Any, numbers: Any) -> tuple[None, Any]:
    def block(rows: Any, columns: Any) -> tuple[Any, Any]:
      logits_rxc, same_rxc = _block(rows, columns, *numbers)
      losses_rxc = jax.nn.softplus(jnp.where(same_rxc, -logits_rxc, logits_rxc))
      return tuple((jnp.sum(losses_rxc, axis), *(jnp.max(jnp.where(mask, logits_rxc, -jnp.inf), axis)
                                                 for mask in (same_rxc, ~same_rxc))) for axis in (1, 0))

    def merge(x: Any, y: Any) -> Any:
      return x[0] + y[0], *map(jnp.maximum, x[1:], y[1:])

    position = ring.positions(sharded[0].shape[0])
    zero, never = jnp.zeros(position.shape, jnp.float32), jnp.full(position.shape, -jnp.inf, jnp.float32)
    empty = zero, never, never
    sums = ring.fold(block, merge, (sharded[0], position), (sharded[1], position), empty, empty)
    mean = lambda x: ring.sum(jnp.sum(x, dtype=jnp.float32)) / image_BxD.shape[0]  # noqa: E731
    return None, (mean(sums[0][0]), tuple(mean(right > wrong) for _, right, wrong in sums))

  _, result = ring.run(share, (image_BxD, text_BxD), (scale, bias))
  return result, (image_BxD, text_BxD, scale, bias)


def _backward(ring, residuals, cotangents):
  image_BxD, text_BxD, scale, bias = residuals

  def share(sharded: Any, numbers: Any) -> tuple[Any, Any]:
    def block(rows: Any, columns: Any) -> tuple[Any, Any]:
      logits_rxc, same_rxc = _block(rows, columns, *numbers[:2])
      d_rxc = numbers[2] * (jax.nn.sigmoid(logits_rxc) - same_rxc)
      return (dot(d_rxc, columns[0]), jnp.sum(d_rxc, 1)), dot(d_rxc.T, rows[0])

    def merge(x: Any, y: Any) -> Any:
      return jax.tree.map(jnp.add, x, y)

    image, text = sharded
    position = ring.positions(image.shape[0])
    zeros = jnp.zeros_like(image)
    (d_image, d_bias), d_text = ring.fold(
      block, merge, (image, position), (text, position), (zeros, zeros[:, 0]), zeros)
    return (numbers[0] * d_image, numbers[0] * d_text), (ring.sum(jnp.sum(image * d_image)), ring.sum(jnp.sum(d_bias)))

  (d_image, d_text), (d_scale, d_bias) = ring.run(
    share, (image_BxD, text_BxD), (scale, bias, cotangents[0] / image_BxD.shape[0]))
  return d_image, d_text, d_scale, d_bias


def _block(rows: Any, columns: Any, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
  return scale * dot(rows[0], columns[0].T) + bias, rows[1][:, None] == columns[1][None, :]


_loss = jax.custom_vjp(lambda ring, *args: _forward(ring, *args)[0], nondiff_argnums=(0,))
_loss.defvjp(_forward, _backward)
