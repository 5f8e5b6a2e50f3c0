"""Every pair of a sharded batch, block by block: the transport beneath the contrastive losses.

Letters: B global batch, b a device's share, r rows of one block, D embedding.

The rows (images) stay at home. The columns (texts) travel once around the ring of devices, together with what has been
summed for them so far, and are home again after as many steps as there are devices. No device ever holds more than its
own share, one visiting share and one block of [r, b]. On one device the same code walks through blocks of rows.
"""
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

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
    if batch % (self.size * multiple):
      groups = f' in groups of {multiple}' if multiple > 1 else ''
      raise UserError(f'a batch of {batch} cannot be shared by {self.size} devices{groups}; '
                      f'it must be a multiple of {self.size * multiple}')

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
    """The neighbour's `tree` of [b, ...] arrays, inside `run`."""
    n = self.size
    forward = [(i, (i + 1) % n) for i in range(n)]

    def send(x: jax.Array) -> jax.Array:
      if not self.both_ways:
        return jax.lax.ppermute(x, self.axes, forward)
      half = x.shape[0] // 2
      return jnp.concatenate([jax.lax.ppermute(x[:half], self.axes, forward),
                              jax.lax.ppermute(x[half:], self.axes, [(j, i) for i, j in forward])])
    return jax.tree.map(send, tree)

  def fold(self, block: Callable[..., tuple[Any, Any]], rows: Any, columns: Any, row_sums: Any,
           column_sums: Any) -> tuple[Any, Any]:
    """Sums over all blocks of rows × columns, inside `run`.

    Args:
      block: (rows, columns, row_sums, column_sums) of one block -> the two sums with this block added.
      rows, row_sums: trees of [b, ...] that stay. columns, column_sums: trees of [b, ...] that travel.

    Returns:
      (row_sums, column_sums), both at home.
    """
    def visit(columns: Any, row_sums: Any, column_sums: Any) -> tuple[Any, Any]:
      def some_rows(column_sums: Any, x: tuple[Any, Any]) -> tuple[Any, Any]:
        return block(x[0], columns, x[1], column_sums)[::-1]
      share = jax.tree.leaves(columns)[0].shape[0]
      column_sums, row_sums = _scan_rows(some_rows, column_sums, (rows, row_sums), max(1, BLOCK_ELEMENTS // share))
      return row_sums, column_sums

    if self.size == 1:
      return visit(columns, row_sums, column_sums)

    def step(carry: Any, _: None) -> tuple[Any, None]:
      columns, row_sums, column_sums = carry
      arriving = self.rotate(columns)   # before the work that does not wait for it, so that the two overlap
      row_sums, column_sums = visit(columns, row_sums, column_sums)
      return (arriving, row_sums, self.rotate(column_sums)), None
    (_, row_sums, column_sums), _ = jax.lax.scan(step, (columns, row_sums, column_sums), length=self.size)
    return row_sums, column_sums


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """A matrix product in true float32: a TPU's default would round its inputs to bfloat16."""
  return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)


def _scan_rows(f: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, most: int) -> tuple[Any, Any]:
  """`lax.scan` of `f` over even runs of at most `most` rows of `xs`, and once over the few rows that are left."""
  length = jax.tree.leaves(xs)[0].shape[0]
  runs = -(-length // most)
  if runs == 1:
    return f(carry, xs)
  even = length // runs * runs
  split = jax.tree.map(lambda x: x[:even].reshape(runs, -1, *x.shape[1:]), xs)
  carry, ys = jax.lax.scan(f, carry, split)
  ys = jax.tree.map(lambda y: y.reshape(even, *y.shape[2:]), ys)
  if even == length:
    return carry, ys
  carry, rest = f(carry, jax.tree.map(lambda x: x[even:], xs))
  return carry, jax.tree.map(lambda y, z: jnp.concatenate([y, z]), ys, rest)
