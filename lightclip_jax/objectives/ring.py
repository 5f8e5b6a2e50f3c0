"""Every pair of a sharded batch, block by block: the transport beneath the contrastive losses.

Letters: B global batch, b a device's share, r rows of one block, D embedding.

The rows (images) stay at home. The columns (texts) travel once around the ring of devices, what has been summed for them
one step behind, and the sums are home again after one step more than there are devices. No device ever holds more than its
own share, the visiting ones and one block of [r, b]. On one device the same code walks through blocks of rows.
"""
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lightclip_jax.errors import UserError

BLOCK_ELEMENTS = 1 << 19   # of one [r, b] block: 2 MiB in float32, so that memory grows with b and not with b²


@dataclasses.dataclass(frozen=True)
class Ring:
  """The devices that a batch is sharded over, in the order of `axes`; without a mesh, one device."""
  mesh: Mesh | None = None
  axes: tuple[str, ...] = ()

  @classmethod
  def over(cls, mesh: Mesh | None, axes: str | tuple[str, ...] | None) -> 'Ring':
    """The ring over `axes` of `mesh` (None: all of its axes).

    Raises:
      UserError: for axes without a mesh, or an axis that the mesh lacks.
    """
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    if mesh is None:
      if names:
        raise UserError(f'axes={names} without a mesh; pass mesh=, or neither for one device')
      return cls()
    for name in names:
      if name not in mesh.axis_names:
        raise UserError(f'axes names {name!r}; the mesh has {", ".join(mesh.axis_names)}')
    return cls(mesh, names or tuple(mesh.axis_names))

  @property
  def size(self) -> int:
    return math.prod(self.mesh.shape[a] for a in self.axes) if self.mesh is not None else 1

  @property
  def both_ways(self) -> bool:
    """Whether halves of the columns travel in opposite directions: a TPU's links carry both at once."""
    return self.size > 2 and self.mesh.devices.flat[0].platform == 'tpu'

  def check(self, batch: int, multiple: int = 1) -> None:
    """Raises UserError unless each device's share of `batch` is whole and a multiple of `multiple`."""
    if batch < 1 or batch % (self.size * multiple):
      groups = f' in groups of {multiple} (group_size)' if multiple > 1 else ''
      raise UserError(f'a batch of {batch} cannot be shared by {self.size} devices{groups}; '
                      f'it must be a multiple of {self.size * multiple}')

  def placed(self, tree: Any) -> Any:
    """Where the mesh's axes are explicit, as `jax.make_mesh` makes them, `run` takes only what lies on them already."""
    if self.mesh is None or AxisType.Explicit not in self.mesh.axis_types:
      return tree
    return jax.sharding.reshard(tree, NamedSharding(self.mesh, PartitionSpec(self.axes)))

  def run(self, f: Callable[[Any, Any], tuple[Any, Any]], sharded: Any, replicated: Any) -> tuple[Any, Any]:
    """`f(sharded, replicated)` on every device's share; returns (a sharded, a replicated) result like `f`."""
    if self.mesh is None:
      return f(sharded, replicated)
    specs = (PartitionSpec(self.axes), PartitionSpec())
    return jax.shard_map(f, mesh=self.mesh, in_specs=specs, out_specs=specs, check_vma=False)(sharded, replicated)

  def sum(self, x: Any) -> Any:
    """The sum over devices, inside `run`."""
    return jax.lax.psum(x, self.axes) if self.mesh is not None else x

  def positions(self, share: int) -> jax.Array:
    """int32 [b]: where this device's examples stand in the global batch, inside `run`."""
    start = jax.lax.axis_index(self.axes) * share if self.mesh is not None else 0
    return start + jnp.arange(share, dtype=jnp.int32)

  def rotate(self, tree: Any) -> Any:
    """The neighbour's `tree` of [b, ...] arrays of 4- or 8-byte numbers, in one transfer for each direction, inside `run`."""
    leaves, treedef = jax.tree.flatten(tree)
    share, n = leaves[0].shape[0], self.size
    # As integers, since a float unit may take small ones for denormal numbers and write zeros.
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32).reshape(share, -1) for x in leaves]
    parcel = jnp.concatenate(bits, axis=1)
    forward = [(i, (i + 1) % n) for i in range(n)]
    if self.both_ways:
      half = share // 2
      parcel = jnp.concatenate([jax.lax.ppermute(parcel[:half], self.axes, forward),
                                jax.lax.ppermute(parcel[half:], self.axes, [(j, i) for i, j in forward])])
    else:
      parcel = jax.lax.ppermute(parcel, self.axes, forward)
    ends = list(itertools.accumulate(x.shape[1] for x in bits))[:-1]
    def unpack(x: jax.Array, like: jax.Array) -> jax.Array:
      words = (2,) if like.dtype.itemsize == 8 else ()
      return jax.lax.bitcast_convert_type(x.reshape(*like.shape, *words), like.dtype)
    return treedef.unflatten(map(unpack, jnp.split(parcel, ends, axis=1), leaves))

  def fold(self, block: Callable[[Any, Any], tuple[Any, Any]], merge: Callable[[Any, Any], Any], rows: Any,
           columns: Any, row_sums: Any, column_sums: Any) -> tuple[Any, Any]:
    """Sums over all blocks of rows × columns, inside `run`.

    The columns' sums travel one step behind the columns, and meet what their next device has added meanwhile. So all
    that travels leaves at the beginning of a step, together, and overlaps with the step's work.

    Args:
      block: (rows, columns) of one block -> (row sums, column sums) of this block alone.
      merge: the sums of two disjoint sets of blocks -> the sums of both.
      rows: a tree of [b, ...] that stays. columns: a tree of [b, ...] that travels.
      row_sums, column_sums: trees of [b, ...], the sums of no block.

    Returns:
      (row_sums, column_sums), both at home.
    """
    def visit(columns: Any) -> tuple[Any, Any]:
      def some_rows(sums: Any, rows: Any) -> tuple[Any, Any]:
        of_rows, of_columns = block(rows, columns)
        return merge(sums, of_columns), of_rows
      share = jax.tree.leaves(columns)[0].shape[0]
      return _scan_rows(some_rows, column_sums, rows, max(1, BLOCK_ELEMENTS // share))[::-1]

    if self.size == 1:
      return visit(columns)

    def step(carry: Any, _: None) -> tuple[Any, None]:
      columns, row_sums, behind = carry
      arriving, behind = self.rotate((columns, behind))
      of_rows, of_columns = visit(columns)
      return (arriving, merge(row_sums, of_rows), merge(behind, of_columns)), None
    (_, row_sums, behind), _ = jax.lax.scan(step, (columns, row_sums, column_sums), length=self.size)
    return row_sums, self.rotate(behind)


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """A matrix product in true float32: a TPU's default would round its inputs to bfloat16."""
  return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)


def _scan_rows(f: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, most: int) -> tuple[Any, Any]:
  """`lax.scan` of `f` over even runs of at most `most` rows of `xs`, and once over what is left, which is shorter."""
  length = jax.tree.leaves(xs)[0].shape[0]
  runs = -(-length // most)
  if runs == 1:
    return f(carry, xs)
  rows = -(-length // runs)   # rounded up: rounded down, as many as `runs` - 1 are left, and their one block grows with b³
  even = length // rows * rows
  split = jax.tree.map(lambda x: x[:even].reshape(-1, rows, *x.shape[1:]), xs)
  carry, ys = jax.lax.scan(f, carry, split)
  ys = jax.tree.map(lambda y: y.reshape(even, *y.shape[2:]), ys)
  if even == length:
    return carry, ys
  carry, rest = f(carry, jax.tree.map(lambda x: x[even:], xs))
  return carry, jax.tree.map(lambda y, z: jnp.concatenate([y, z]), ys, rest)
