"""Cross-entropy of masked words (docs/OBJECTIVES.md, 3).

Letters: B batch, K masked positions, V vocabulary.
"""
import dataclasses

import jax
import jax.numpy as jnp

from lightclip_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedLMAux:
  """Float32 scalars."""
  accuracy: jax.Array   # weighted fraction of words that were guessed right; 0 where all weights are 0
  weight: jax.Array     # sum of weights: the number of masked words


def masked_lm_loss(logits_BxKxV: jax.Array, labels_BxK: jax.Array,
                   weights_BxK: jax.Array) -> tuple[jax.Array, MaskedLMAux]:
  """Mean cross-entropy over the masked positions.

  Args:
    logits_BxKxV: any float type; computed in float32. labels_BxK: integer word ids.
    weights_BxK: 1 for a masked position, 0 for filling, whose label and logits may be anything; any non-negative numbers.

  Returns:
    (float32 scalar, MaskedLMAux); 0 where all weights are 0.

  Raises:
    UserError: for shapes that do not fit.
  """
  if jnp.ndim(logits_BxKxV) != 3 or not logits_BxKxV.shape[:2] == labels_BxK.shape == weights_BxK.shape:
    raise UserError(f'masked_lm_loss needs [B, K, V], [B, K] and [B, K]; logits have {jnp.shape(logits_BxKxV)}, '
                    f'labels {jnp.shape(labels_BxK)}, weights {jnp.shape(weights_BxK)}')
  weights = weights_BxK.astype(jnp.float32)
  counts = weights != 0   # one that is NaN does count, and so makes the gradient NaN, not the loss alone
  logits = jnp.where(counts[..., None], logits_BxKxV.astype(jnp.float32), 0.0)   # 0 times inf or NaN would be NaN
  labels = jnp.where(counts, labels_BxK, 0)   # filling is often -100
  label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  losses = jax.nn.logsumexp(logits, axis=-1) - label_logits
  right = jnp.argmax(logits, axis=-1) == labels
  total = jnp.sum(weights)
  safe = jnp.where(total == 0, 1.0, total)
  return jnp.sum(weights * losses) / safe, MaskedLMAux(jnp.sum(weights * right) / safe, total)
