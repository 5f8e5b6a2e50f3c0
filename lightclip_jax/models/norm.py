"""Batch normalisation over groups of examples, with no communication in the forward and backward pass.

Letters: B batch, G groups, N examples of a group, H height, W width, C channels.
"""
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lightclip_jax.errors import UserError

STATISTICS = 'group_statistics'
ACTIVATIONS = {None: lambda x: x, 'relu': jax.nn.relu, 'relu6': jax.nn.relu6}


def group_count(policy: str, batch: int, local_groups: int = 1) -> int:
  """How many groups G a batch falls into; group g is the contiguous run of examples [g·B/G, (g+1)·B/G).

  Args:
    policy: 'group:N' (N examples a group), 'global' (one group) or 'local' (`local_groups` groups).
    batch: B, all devices together.
    local_groups: for 'local': the number of devices that the batch is sharded over.

  Raises:
    UserError: for an unknown policy, or a batch that the groups do not divide.
  """
  if policy == 'global':
    return 1
  if policy == 'local':
    if batch % local_groups:
      raise UserError(f"a batch of {batch} does not divide into the {local_groups} groups of batch_norm 'local'")
    return local_groups
  kind, _, size = policy.partition(':')
  if kind != 'group' or not size.isdecimal() or int(size) == 0:
    raise UserError(f"batch_norm is {policy!r}; it can be 'group:N' with N of at least 1, 'global' or 'local'")
  if batch % int(size):
    raise UserError(f'a batch of {batch} is not a multiple of the {size} examples of batch_norm {policy!r}')
  return batch // int(size)


class BatchNorm(nn.Module):
  """Batch normalisation whose statistics run over groups of examples (Ioffe & Szegedy 2015; "ghost" batches).

  In training each group is normalised by its own mean and (biased) variance, in float32 whatever the dtype of x, and
  both are sown into the collection `group_statistics` as [G, C]; `update_running_statistics` turns them into the new
  running statistics. Otherwise the running statistics (collection `batch_stats`) are used.
  """
  policy: str = 'group:64'
  local_groups: int = 1
  epsilon: float = 1e-5
  activation: Literal['relu', 'relu6'] | None = None
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
    """Normalises x; same shape and dtype. Raises UserError where the groups do not divide the batch (training)."""
    channels = x_BxHxWxC.shape[-1]
    mean_C = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), jnp.float32)
    var_C = self.variable('batch_stats', 'var', jnp.ones, (channels,), jnp.float32)
    scale_C = self.param('scale', self.scale_init, (channels,))
    bias_C = self.param('bias', nn.initializers.zeros, (channels,))
    if not train:
      return _affine(x_BxHxWxC, mean_C.value, var_C.value, scale_C, bias_C, self.epsilon, self.activation)
    groups = group_count(self.policy, x_BxHxWxC.shape[0], self.local_groups)
    x_GxNxHxWxC = x_BxHxWxC.reshape(groups, -1, *x_BxHxWxC.shape[1:])
    mean_GxC, var_GxC = _moments(x_GxNxHxWxC)
    self._sow('mean', mean_GxC)
    self._sow('var', var_GxC)
    y = _affine(x_GxNxHxWxC, mean_GxC, var_GxC, scale_C[None], bias_C[None], self.epsilon, self.activation)
    return y.reshape(x_BxHxWxC.shape)

  def _sow(self, name: str, value_GxC: jax.Array) -> None:
    self.sow(STATISTICS, name, jax.lax.stop_gradient(value_GxC), reduce_fn=lambda _, new: new, init_fn=lambda: None)


def _moments(x_GxNxHxWxC: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and biased variance [G, C] in float32, from one reading of x."""
  x = x_GxNxHxWxC.astype(jnp.float32)
  axes = tuple(range(1, x.ndim - 1))
  mean_GxC = jnp.mean(x, axes)
  return mean_GxC, jnp.maximum(jnp.mean(x * x, axes) - mean_GxC * mean_GxC, 0.0)


def _affine(x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float,
            activation: str | None) -> jax.Array:
  """(x − mean) / √(var + ε) · scale + bias as one multiply-add, then the activation; the output has the dtype of x.

  Statistics are [C] for x [B, H, W, C], or [G, C] for x [G, N, H, W, C].
  """
  factor = scale * jax.lax.rsqrt(var + epsilon)
  offset = bias - mean * factor
  shape = (*factor.shape[:-1], *(1,) * (x.ndim - factor.ndim), factor.shape[-1])
  y = x.astype(jnp.float32) * factor.reshape(shape) + offset.reshape(shape)
  return ACTIVATIONS[activation](y).astype(x.dtype)


def update_running_statistics(batch_stats: Any, group_statistics: Any, momentum: float) -> Any:
  """The new `batch_stats`: momentum · old + (1 − momentum) · mean over all groups.

  All layers are joined into one array first, so that a batch sharded over devices needs a single reduction.

  Args:
    batch_stats: the running statistics, a tree of float32 [C].
    group_statistics: the same tree of [..., G, C], as sown by `BatchNorm`; leading axes are micro-batches.
    momentum: the share of the old value that stays.
  """
  if not jax.tree.leaves(batch_stats):
    return batch_stats
  old_leaves, treedef = jax.tree.flatten(batch_stats)
  new_leaves = treedef.flatten_up_to(group_statistics)
  joined = jnp.concatenate(new_leaves, axis=-1)
  mean = jnp.mean(joined, axis=tuple(range(joined.ndim - 1)))
  blended = momentum * jnp.concatenate(old_leaves) + (1 - momentum) * mean
  ends = [sum(math.prod(leaf.shape) for leaf in old_leaves[:i + 1]) for i in range(len(old_leaves) - 1)]
  return jax.tree.unflatten(treedef, jnp.split(blended, ends))
