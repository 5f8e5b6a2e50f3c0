"""The device mesh, where arrays live on it, and the micro-batch reshape. No model names here.

Axis types are decided once, here: all `Auto`, so that the compiler places what the rules do not fix (`jax.make_mesh`
would default to explicit axes). The batch runs over `data` and `fsdp` together; `tensor` holds copies of it.

Letters: B global batch, K micro-batches, n batch shards.
"""
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lightclip_jax import config as config_lib
from lightclip_jax.errors import UserError

BATCH_AXES = ('data', 'fsdp')


# What a dimension is, and the mesh axis that splits it.
LOGICAL_AXES = {'vocabulary': 'tensor', 'hidden': 'tensor'}
# Elements below which `fsdp` leaves a parameter whole: 16 KiB in float32 are not worth a message.
WHOLE_BELOW = 1 << 12


@dataclasses.dataclass(frozen=True)
class Rule:
  """Parameters whose path ("text/block0/mlp/hidden/kernel") matches `pattern` have these logical axes, one a dimension.

  None, and what is left out: nothing but `fsdp` may split this dimension.
  """
  pattern: str
  axes: tuple[str | None, ...] = ()


def make_mesh(mesh: config_lib.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A (data, fsdp, tensor) mesh over `devices` (default: all).

  Raises:
    UserError: if the axes' product is not the number of devices, or more than one axis is -1.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dataclasses.asdict(mesh)
  free = [name for name, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f'mesh is {sizes}; each axis is at least 1, and one alone may be -1 (what is left)')
  if free and len(devices) % fixed == 0:
    sizes[free[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    raise UserError(f'mesh is {sizes}, which does not divide the {len(devices)} devices')
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
  """Into how many parts the batch is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The leading dimension over the batch axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_share(place: NamedSharding) -> tuple[int, int]:
  """(number, count): which of how many equal shares of a batch, in its order, lies on this process's devices.

  Each process has its own, but for those that the axis `tensor` joins: they hold copies, and must all feed the same rows.

  Raises:
    UserError: if processes hold parts of each other's rows.
  """
  rows: dict[int, set[int]] = {}
  for device, (part,) in place.devices_indices_map((place.mesh.size,)).items():
    rows.setdefault(device.process_index, set()).add(part.start or 0)
  shares = sorted({tuple(sorted(starts)) for starts in rows.values()})
  if sum(map(len, shares)) != len(set().union(*shares)) or len(set(map(len, shares))) > 1:
    raise UserError(f"mesh is {dict(place.mesh.shape)}, on which processes hold parts of each other's examples; mesh.tensor "
                    "must divide a process's number of devices, or be a multiple of it")
  return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
  """A tree path as "text/blocks_0/kernel"."""
  return '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path)


def tree_shardings(params: Any, mesh: jax.sharding.Mesh, rules: Sequence[Rule]) -> Any:
  """Where every parameter lives: split by the first rule that matches its path, and by `fsdp` along its largest other
  dimension that `fsdp` divides (ZeRO, arXiv:1910.02054), unless it is small.

  Raises:
    UserError: for a parameter that no rule covers, that has fewer dimensions than its rule, that a rule splits twice
      over one mesh axis, or whose dimension its mesh axis does not divide.
  """
  return jax.tree_util.tree_map_with_path(lambda path, leaf: _leaf_sharding(path_name(path), leaf, mesh, rules), params)


def _leaf_sharding(name: str, leaf: Any, mesh: jax.sharding.Mesh, rules: Sequence[Rule]) -> NamedSharding:
  rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
  if rule is None:
    raise UserError(f'no sharding rule covers {name!r} of shape {leaf.shape}')
  axes = [axis and LOGICAL_AXES[axis] for axis in rule.axes] + [None] * (leaf.ndim - len(rule.axes))
  used = [axis for axis in axes if axis]
  if len(axes) > leaf.ndim or len(used) != len(set(used)):
    raise UserError(f'rule {rule.pattern!r} {rule.axes} does not fit {name!r} of shape {leaf.shape}')
  for size, axis in zip(leaf.shape, axes, strict=True):
    if axis and size % mesh.shape[axis]:
      raise UserError(f'{size} of {name!r} {leaf.shape} is not a multiple of mesh.{axis}={mesh.shape[axis]}')
  free = [d for d, size in enumerate(leaf.shape) if not axes[d] and size % mesh.shape['fsdp'] == 0]
  if free and leaf.size >= WHOLE_BELOW and mesh.shape['fsdp'] > 1:
    axes[max(free, key=lambda d: leaf.shape[d])] = 'fsdp'
  while axes and axes[-1] is None:
    axes.pop()
  return NamedSharding(mesh, PartitionSpec(*axes))


def follow(tree: Any, params: Any, places: Any, mesh: jax.sharding.Mesh) -> Any:
  """Shardings of a tree that holds copies of the parameters (moments, averages) among other things.

  A leaf whose path ends in a parameter's path, and that has its shape, lives where the parameter does; others are
  replicated.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  known = {(path_name(path), leaf.shape): place for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True)}

  def place_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    ends = ((path_name(path[start:]), leaf.shape) for start in range(len(path)))
    return next((known[end] for end in ends if end in known), replicated(mesh))

  return jax.tree_util.tree_map_with_path(place_of, tree)


def gather(params: Any, places: Any) -> Any:
  """The parameters as a step computes with them: what `fsdp` splits in storage is made whole.

  Said once and for all here, because the compiler would otherwise choose for each product whether weights or
  activations travel. Their gradients come back summed, and are cut where the moments need only a part.
  """
  def whole(x: jax.Array, place: NamedSharding) -> jax.Array:
    if 'fsdp' not in place.spec:
      return x
    spec = PartitionSpec(*(None if axis == 'fsdp' else axis for axis in place.spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, spec))

  return jax.tree.map(whole, params, places)


def to_micro_batches(tree: Any, count: int, mesh: jax.sharding.Mesh) -> Any:
  """[B, ...] -> [K, B/K, ...], each device splitting its own share, so that nothing moves between devices.

  Contiguous runs of a device's share stay contiguous, so normalisation groups are the same for every K.
  """
  n = batch_shards(mesh)
  sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

  def split(x: jax.Array) -> jax.Array:
    batch, *rest = x.shape
    x = x.reshape(n, count, batch // (n * count), *rest).swapaxes(0, 1).reshape(count, batch // count, *rest)
    return jax.lax.with_sharding_constraint(x, sharding)

  return jax.tree.map(split, tree)


def from_micro_batches(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The inverse of `to_micro_batches`: [K, B/K, ...] -> [B, ...] in the original order."""
  n = batch_shards(mesh)

  def join(x: jax.Array) -> jax.Array:
    count, micro, *rest = x.shape
    x = x.reshape(count, n, micro // n, *rest).swapaxes(0, 1).reshape(count * micro, *rest)
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))

  return jax.tree.map(join, tree)
