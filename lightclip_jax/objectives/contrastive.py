"""The progressively softened contrastive loss, exact at any scale (docs/OBJECTIVES.md, 1).

Letters: B global batch, b a device's share, r rows and c columns of one block, D embedding.
"""
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lightclip_jax.errors import UserError
from lightclip_jax.objectives.ring import Ring, dot

_NEVER = -1e30   # stands for -inf where inf - inf would be NaN
_MAXIMA = ('best', 'right', 'wrong', 'target_best')   # of the running sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContrastiveAux:
  """Measured in the same pass as the loss; float32 scalars."""
  loss_image_to_text: jax.Array
  loss_text_to_image: jax.Array
  loss_over_log_batch: jax.Array    # 1 is what guessing gives
  top1_image_to_text: jax.Array     # fraction whose best text is its own or a duplicate of it; a tie is a miss
  top1_text_to_image: jax.Array
  duplicate_fraction: jax.Array     # of captions that occur elsewhere in the batch; 0 without ids


@dataclasses.dataclass(frozen=True)
class _Setting:
  """What is known when the loss is compiled."""
  ring: Ring
  source: str
  duplicates: str
  targets: Literal['hard', 'uniform', 'similarity']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
  """Sums [b] of one direction's rows over the columns seen so far (or the other way round)."""
  best: jax.Array            # maximum of the logits in the denominator
  total: jax.Array           # sum of exp(logit - best) over the same
  own: jax.Array             # sum of logits that share the mass 1 - alpha
  own_count: jax.Array
  right: jax.Array           # best logit of itself or a duplicate
  wrong: jax.Array           # best logit of any other
  copies: jax.Array          # how often the caption occurs
  other: jax.Array           # sum of logits that may share the mass alpha
  other_count: jax.Array
  target_best: jax.Array     # maximum of c / T over the same
  target_total: jax.Array    # sum of exp(c / T - target_best)
  target_sum: jax.Array      # sum of exp(c / T - target_best) * logit

  @classmethod
  def zeros(cls, share: int) -> '_Sums':
    zero, never = jnp.zeros(share, jnp.float32), jnp.full(share, _NEVER, jnp.float32)
    return cls(**{f.name: never if f.name in _MAXIMA else zero for f in dataclasses.fields(cls)})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Targets:
  """What turns a block of logits into one direction's softmax and its targets, each [b]."""
  log_norm: jax.Array          # log sum exp of the logits
  own: jax.Array               # y of each own entry
  uniform: jax.Array           # y of each other entry, its uniform part
  similar: jax.Array           # mass of the similarity part
  target_log_norm: jax.Array   # log sum exp of c / T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Side:
  """Embeddings and labels of some pairs; `other` is the other modality's embedding, where targets need it."""
  embedding: jax.Array         # float32 [b, D]
  other: jax.Array | None
  position: jax.Array          # int32 [b]
  id: jax.Array | None


def softened_contrastive_loss(
    image_embeddings_BxD: jax.Array, text_embeddings_BxD: jax.Array, logit_scale: jax.Array | float, *,
    alpha: jax.Array | float = 0.0, beta: jax.Array | float = 0.0, target_temperature: float = 0.1,
    target_source: Literal['cross', 'intra'] = 'intra', duplicate_ids: jax.Array | None = None,
    duplicates: Literal['negative', 'positive', 'ignore'] = 'negative', mesh: Mesh | None = None,
    axes: str | tuple[str, ...] | None = None) -> tuple[jax.Array, ContrastiveAux]:
  """Symmetric cross-entropy against targets softened by alpha, towards similar pairs by beta.

  Args:
    image_embeddings_BxD, text_embeddings_BxD: unit vectors, any float type; computed in float32.
    logit_scale: the multiplicative scale s > 0 (not its logarithm), a scalar.
    alpha: mass given to other pairs, in [0, 1]. beta: share of it by similarity, the rest uniform, in [0, 1]. Numbers
      or traced scalars; neither these nor the targets receive a gradient.
    target_temperature: T of the softmax that makes similarity targets.
    target_source: "cross" takes image-text similarity, "intra" that of the candidates' own modality.
    duplicate_ids: int [B] of any width, equal for equal captions; None: all distinct.
    duplicates: "negative" ignores ids, "positive" shares the mass 1 - alpha among equal captions, "ignore" takes them
      out of the softmax.
    mesh, axes: where the batch is sharded, B over `axes`; None: one device.

  Returns:
    (float32 scalar, ContrastiveAux). Equal on any number of devices; memory is linear in B.

  Raises:
    UserError: for shapes that do not fit, an unknown mode, a concrete alpha or beta outside [0, 1], or a batch that the
      devices cannot share.

  The formulas are this project's reading of the abstract of arXiv:2312.00674.
  """
  ring = Ring.over(mesh, axes)
  check_embeddings(image_embeddings_BxD, text_embeddings_BxD, logit_scale, ring)
  _check_modes(target_source, duplicates, target_temperature, alpha, beta)
  batch = image_embeddings_BxD.shape[0]
  if duplicate_ids is not None and jnp.shape(duplicate_ids) != (batch,):
    raise UserError(f'duplicate_ids has shape {jnp.shape(duplicate_ids)}; it must be ({batch},)')
  hard, uniform = (_concrete(x) and _number(x) == 0 for x in (alpha, beta))
  setting = _Setting(ring, target_source, duplicates, 'hard' if hard else 'uniform' if uniform else 'similarity')
  numbers = tuple(jnp.asarray(x, jnp.float32).reshape(()) for x in (logit_scale, alpha, beta, target_temperature))
  data = image_embeddings_BxD.astype(jnp.float32), text_embeddings_BxD.astype(jnp.float32), _ids(duplicate_ids)
  (forth, back), metrics = _loss(setting, *ring.placed(data), *numbers)
  loss = (forth + back) / 2
  over_log = jax.lax.stop_gradient(loss) / jnp.log(float(max(batch, 2)))
  return loss, ContrastiveAux(forth, back, over_log, *metrics)


def check_embeddings(image_BxD: jax.Array, text_BxD: jax.Array, logit_scale: jax.Array | float, ring: Ring) -> None:
  """Raises UserError unless both are [B, D], the scale is a scalar and the ring's devices can share B."""
  if jnp.ndim(image_BxD) != 2 or jnp.shape(image_BxD) != jnp.shape(text_BxD):
    raise UserError(f'image embeddings {jnp.shape(image_BxD)} and text embeddings {jnp.shape(text_BxD)} '
                    'must have one shape [B, D]')
  if jnp.size(logit_scale) != 1:
    raise UserError(f'logit_scale has shape {jnp.shape(logit_scale)}; it must be a scalar')
  ring.check(image_BxD.shape[0])


def _ids(x: jax.Array | None) -> jax.Array | None:
  """At least as wide as the ring can carry."""
  if x is None or jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize >= 4:
    return x
  return x.astype(jnp.int32)


def _concrete(x: Any) -> bool:
  return not isinstance(x, jax.core.Tracer)


def _number(x: Any) -> float:
  """Of one that has no axis, or one of length 1, as a scale may have."""
  return float(np.asarray(x).reshape(()))


def _check_modes(source: str, duplicates: str, temperature: Any, alpha: Any, beta: Any) -> None:
  for name, value, known in (('target_source', source, ('cross', 'intra')),
                             ('duplicates', duplicates, ('negative', 'positive', 'ignore'))):
    if value not in known:
      raise UserError(f'{name} is {value!r}; it can be one of {", ".join(map(repr, known))}')
  for name, value in (('alpha', alpha), ('beta', beta), ('target_temperature', temperature)):
    if jnp.size(value) != 1:
      raise UserError(f'{name} has shape {jnp.shape(value)}; it must be a scalar')
    if name != 'target_temperature' and _concrete(value) and not 0 <= _number(value) <= 1:
      raise UserError(f'{name} is {_number(value)}; it must be in [0, 1]')
  if _concrete(temperature) and not _number(temperature) > 0:
    raise UserError(f'target_temperature is {temperature}; it must be above 0')


def _forward(setting, image_BxD, text_BxD, ids, scale, alpha, beta, temperature):
  """((image→text loss, text→image loss), metrics), and what the backward pass needs: vectors, no block."""
  def share(sharded: Any, numbers: Any) -> tuple[Any, Any]:
    scale, alpha, beta, temperature = numbers
    rows, columns = _sides(setting, *sharded)

    def block(rows: _Side, columns: _Side) -> tuple[_Sums, _Sums]:
      cosine, row_c, column_c, masks = _block(setting, rows, columns)
      return (_sum(setting, scale * cosine, row_c / temperature, masks, 1),
              _sum(setting, scale * cosine, column_c / temperature, masks, 0))

    empty = _Sums.zeros(rows.embedding.shape[0])
    sums = setting.ring.fold(block, _merge, rows, columns, empty, empty)
    targets = tuple(_targets(s, alpha, beta) for s in sums)
    mean = [setting.ring.sum(jnp.sum(x, dtype=jnp.float32)) / image_BxD.shape[0] for x in (
      *map(_cross_entropy, sums, targets), *(s.right > s.wrong for s in sums), sums[0].copies > 1)]
    return targets, (tuple(mean[:2]), tuple(mean[2:]))

  targets, (losses, metrics) = setting.ring.run(share, (image_BxD, text_BxD, ids), (scale, alpha, beta, temperature))
  return (losses, metrics), (image_BxD, text_BxD, ids, targets, scale, temperature)


def _backward(setting, residuals, cotangents):
  """Each block again, and the gradient of its logits in the two matrix products that give the embeddings' gradients."""
  image_BxD, text_BxD, ids, targets, scale, temperature = residuals
  cotangents = [g / image_BxD.shape[0] for g in cotangents[0]]

  def share(sharded: Any, numbers: Any) -> tuple[Any, Any]:
    *data, (row_targets, column_targets) = sharded
    scale, temperature, row_cotangent, column_cotangent = numbers

    def block(rows: Any, columns: Any) -> tuple[jax.Array, jax.Array]:
      cosine, row_c, column_c, masks = _block(setting, rows[0], columns[0])
      d_rxc = (row_cotangent * _slope(setting, rows[1], scale * cosine, row_c / temperature, masks, 1)
               + column_cotangent * _slope(setting, columns[1], scale * cosine, column_c / temperature, masks, 0))
      return dot(d_rxc, columns[0].embedding), dot(d_rxc.T, rows[0].embedding)

    rows, columns = _sides(setting, *data)
    d_image, d_text = setting.ring.fold(block, jnp.add, (rows, row_targets), (columns, column_targets),
                                        jnp.zeros_like(data[0]), jnp.zeros_like(data[1]))
    d_scale = setting.ring.sum(jnp.sum(data[0] * d_image))
    return (scale * d_image, scale * d_text), d_scale

  (d_image, d_text), d_scale = setting.ring.run(
    share, (image_BxD, text_BxD, ids, targets), (scale, temperature, *cotangents))
  return d_image, d_text, None, d_scale, None, None, None


_loss = jax.custom_vjp(lambda setting, *args: _forward(setting, *args)[0], nondiff_argnums=(0,))
_loss.defvjp(_forward, _backward)


def _sides(setting: _Setting, image: jax.Array, text: jax.Array, ids: jax.Array | None) -> tuple[_Side, _Side]:
  position = setting.ring.positions(image.shape[0])
  both = setting.targets == 'similarity' and setting.source == 'intra'
  return (_Side(image, text if both else None, position, ids), _Side(text, image if both else None, position, ids))


def _block(setting: _Setting, rows: _Side, columns: _Side) -> tuple[jax.Array, jax.Array, jax.Array, tuple[Any, ...]]:
  """One block's image-text cosines, the cosines of its targets in each direction, and its masks (all [r, c])."""
  cosine = dot(rows.embedding, columns.embedding.T)
  row_c = column_c = jax.lax.stop_gradient(cosine)   # for who differentiates the gradient
  if rows.other is not None:
    row_c, column_c = jax.lax.stop_gradient((dot(rows.other, columns.embedding.T), dot(rows.embedding, columns.other.T)))
  same = rows.position[:, None] == columns.position[None, :]
  copy = same if rows.id is None else rows.id[:, None] == columns.id[None, :]
  own = copy if setting.duplicates == 'positive' else same
  other = ~same if setting.duplicates == 'negative' else ~copy
  counted = same | ~copy if setting.duplicates == 'ignore' else jnp.ones_like(same)
  return cosine, row_c, column_c, (own, other, counted, copy)


def _sum(setting: _Setting, logits: jax.Array, target: jax.Array, masks: Any, axis: int) -> _Sums:
  """The sums of one block, over `axis`."""
  own, other, counted, copy = masks
  total = lambda mask, x: jnp.sum(jnp.where(mask, x, 0.0), axis)  # noqa: E731
  most = lambda mask, x: jnp.max(jnp.where(mask, x, _NEVER), axis)  # noqa: E731
  count = lambda mask: jnp.sum(mask, axis, dtype=jnp.float32)  # noqa: E731
  best = most(counted, logits)
  found = dict(best=best, total=jnp.sum(_exp(counted, logits - jnp.expand_dims(best, axis)), axis),
               own=total(own, logits), own_count=count(own), right=most(copy, logits), wrong=most(~copy, logits),
               copies=count(copy))
  if setting.targets != 'hard':
    found |= dict(other=total(other, logits), other_count=count(other))
  if setting.targets == 'similarity':
    best = most(other, target)
    weight = _exp(other, target - jnp.expand_dims(best, axis))
    found |= dict(target_best=best, target_total=jnp.sum(weight, axis), target_sum=jnp.sum(weight * logits, axis))
  return dataclasses.replace(_Sums.zeros(best.shape[0]), **found)


def _exp(mask: jax.Array, x: jax.Array) -> jax.Array:
  """exp(x), 0 outside the mask: x may be large there, and the derivative of an infinite number that is left out is NaN."""
  return jnp.exp(jnp.where(mask, x, _NEVER))


def _merge(x: _Sums, y: _Sums) -> _Sums:
  """The sums of both: what stands relative to a maximum is brought to the larger one."""
  both = {f.name: (getattr(x, f.name), getattr(y, f.name)) for f in dataclasses.fields(_Sums)}
  merged = {name: jnp.maximum(*pair) if name in _MAXIMA else jnp.add(*pair) for name, pair in both.items()}
  for best, sums in (('best', ['total']), ('target_best', ['target_total', 'target_sum'])):
    shrink = [jnp.exp(b - merged[best]) for b in both[best]]
    merged |= {name: both[name][0] * shrink[0] + both[name][1] * shrink[1] for name in sums}
  return _Sums(**merged)


def _targets(sums: _Sums, alpha: jax.Array, beta: jax.Array) -> _Targets:
  alpha = jnp.where(sums.other_count > 0, alpha, 0.0)   # where nothing may share it, alpha counts as 0
  return _Targets(
    log_norm=sums.best + jnp.log(sums.total),
    own=(1 - alpha) / sums.own_count,
    uniform=alpha * (1 - beta) / jnp.maximum(sums.other_count, 1.0),
    similar=alpha * beta,
    target_log_norm=sums.target_best + jnp.log(jnp.maximum(sums.target_total, 1.0)))


def _cross_entropy(sums: _Sums, targets: _Targets) -> jax.Array:
  """log sum exp - sum y S, for each anchor; the similarity part of y was never normalised, only its sums are."""
  similar = targets.similar * sums.target_sum / jnp.maximum(sums.target_total, 1.0)
  return targets.log_norm - targets.own * sums.own - targets.uniform * sums.other - similar


def _slope(setting: _Setting, targets: _Targets, logits: jax.Array, target: jax.Array, masks: Any,
           axis: int) -> jax.Array:
  """softmax - y of one direction, the derivative of its cross-entropy by the block's logits [r, c]."""
  own, other, counted, _ = masks
  along = lambda x: jnp.expand_dims(x, axis)  # noqa: E731
  slope = _exp(counted, logits - along(targets.log_norm)) - jnp.where(own, along(targets.own), 0.0)
  if setting.targets == 'hard':
    return slope
  y = along(targets.uniform)
  if setting.targets == 'similarity':
    y = y + along(targets.similar) * jnp.exp(target - along(targets.target_log_norm))
  return slope - jnp.where(other, y, 0.0)
