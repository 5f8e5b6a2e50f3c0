"""Images and texts to embeddings on all devices, each example counted once.

Letters: b rows that this process feeds at a time, N examples, S image size, W text positions, P image tokens,
D embedding, d token embedding.

Every process feeds its own rows of each global batch and gets back *all* rows: the result is replicated on the devices,
so that no process waits alone for another (open_clip evaluates on one rank while the others run into a time-out).
"""
import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightclip_jax.config import Model
from lightclip_jax.errors import UserError
from lightclip_jax.sharding import process_share

# (inputs [b, ...] of a method, index int [b]; -1 is padding, and -2 - i example i, which could not be read)
Rows = tuple[tuple[np.ndarray, ...], np.ndarray]


class Embedder:
  """A model with its variables and tokenizer, ready to embed.

  Compiled functions are kept by (model, method, shape), variables are arguments: an Embedder made anew for each
  evaluation of a training run compiles nothing after the first.
  """

  def __init__(self, model: nn.Module, config: Model, variables: Mapping[str, Any], tokenizer: Any, *,
               sharding: NamedSharding | None = None, batch_size: int = 256, moved: Callable[[], None] = lambda: None):
    """
    Args:
      model: has the methods `encode_image(uint8 [b, S, S, 3])` and `encode_text(int32 [b, W])`, both -> [b, D], and
        `encode_tokens(images, tokens) -> ([b, P, d], [b, W, d])`.
      config: the model's; S and W come from it.
      variables: {'params', 'batch_stats'}. With `sharding` they must lie on its devices already.
      tokenizer: has `encode(texts, context) -> int32 [N, W]`.
      sharding: of a batch's first axis; None: over all devices, with replicated variables.
      batch_size: rows at a time in all processes together; a process's share is padded to a multiple of its devices.
      moved: called at each batch, for who watches whether it goes on.

    Raises:
      UserError: for a batch size that is not a positive multiple of the number of processes.
    """
    if sharding is None:
      sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ('data',)), PartitionSpec('data'))
      # From the host: what lies on a device of one process cannot be spread over those of others.
      variables = jax.device_put(jax.device_get(variables), NamedSharding(sharding.mesh, PartitionSpec()))
    self.model, self.variables, self.tokenizer = model, variables, tokenizer
    self.image_size, self.context = config.image.size, config.text.context
    self.sharding, self.batch_size, (self.share, self.shares) = sharding, batch_size, share_of(sharding, batch_size)
    self._replicated, self._moved = NamedSharding(sharding.mesh, PartitionSpec()), moved

  def images(self, batches: Iterable[Mapping[str, np.ndarray]]) -> np.ndarray:
    """float32 [N, D] in index order, from dicts of `image` uint8 [b, S, S, 3] and `index` int [b] (-1: padding).

    The row of an image i that could not be read, whose index is -2 - i, is 0 in all processes, also those that did not try.

    Raises:
      ValueError: when the indices are not 0..N-1, each once; an example would be lost or counted twice.
    """
    return self._gather('encode_image', (((batch['image'],), batch['index']) for batch in batches))

  def texts(self, texts: list[str]) -> np.ndarray:
    """float32 [N, D] for N texts, in their order."""
    if not texts:
      raise UserError('no texts to embed; at least one is needed')
    tokens_NxW = self.tokenizer.encode(texts, self.context)
    return self._gather('encode_text', self._shares(tokens_NxW, batch_size=self.batch_size))

  def tokens(self, images: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 image tokens [N, P, d] and text tokens [N, W, d] of N pairs, the same ones in every process."""
    few = _round_up(len(images), self.shares)   # eight pictures for a page need no batch of hundreds
    return self._gather('encode_tokens', self._shares(images, tokens, batch_size=min(self.batch_size, few)))

  @property
  def logit_scale(self) -> float:
    """What multiplies cosines before the softmax; at most 100, as in training."""
    return min(float(np.exp(jax.device_get(self.variables['params']['logit_scale']))), 100.0)

  def _shares(self, *inputs: np.ndarray, batch_size: int) -> Iterator[Rows]:
    """This process's rows of each global batch of what lies in every process."""
    rows, total = batch_size // self.shares, len(inputs[0])
    for start in range(0, total, batch_size):
      index = start + self.share * rows + np.arange(rows)
      yield tuple(x[np.minimum(index, total - 1)] for x in inputs), np.where(index < total, index, -1)

  def _gather(self, method: str, batches: Iterable[Rows]) -> Any:
    """What the method gives, float32 with all rows in the order of their indices."""
    parts = list(_two_ahead(functools.partial(self._dispatch, method), batches))
    if not parts:
      raise UserError('no images to embed: the split is empty')
    results, index = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    unread = index < -1
    index = np.where(unread, -2 - index, index)
    kept = index >= 0
    order = np.flatnonzero(kept)[np.argsort(index[kept], kind='stable')]
    if not np.array_equal(index[order], np.arange(len(order))):
      raise ValueError(f'the batches hold {len(order)} examples whose indices are not 0 to {len(order) - 1}, each once')
    results = jax.tree.map(lambda rows: np.asarray(rows[order], np.float32), results)
    for rows in jax.tree.leaves(results):
      rows[unread[order]] = 0
    return results

  def _dispatch(self, method: str, rows: Rows) -> tuple[Any, jax.Array]:
    self._moved()
    inputs, index = tuple(self._to_devices(x, 0) for x in rows[0]), self._to_devices(rows[1], -1)
    run = _compiled(self.model, method, self._replicated)
    return run(self.variables, *inputs), _replicate(self._replicated)(index)

  def _to_devices(self, values: np.ndarray, fill: int) -> jax.Array:
    """This process's rows, padded with `fill` to a multiple of its devices, as its part of the global array."""
    values = np.asarray(values) if values.dtype == np.uint8 else np.asarray(values, np.int32)
    missing = _round_up(len(values), len(self.sharding.addressable_devices)) - len(values)
    values = np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1), constant_values=fill)
    return jax.make_array_from_process_local_data(self.sharding, values)


def share_of(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
  """`process_share`. Raises UserError for a batch size that is not a positive multiple of the number of shares."""
  share, shares = process_share(sharding)
  if batch_size < 1 or batch_size % shares:
    raise UserError(f'evaluation batch size is {batch_size}; it must be a positive multiple of the {shares} processes')
  return share, shares


@functools.lru_cache(maxsize=32)
def _compiled(model: nn.Module, method: str, replicated: NamedSharding) -> Callable[..., Any]:
  return jax.jit(lambda variables, *inputs: model.apply(variables, *inputs, method=method), out_shardings=replicated)


@functools.lru_cache(maxsize=32)
def _replicate(replicated: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=replicated)


def _two_ahead(run: Callable[[Rows], Any], batches: Iterable[Rows]) -> Iterator[Any]:
  """Results on the host, read two batches late: the device never waits, and inputs do not pile up on it."""
  waiting: collections.deque = collections.deque()
  for rows in batches:
    waiting.append(run(rows))
    if len(waiting) > 2:
      yield jax.device_get(waiting.popleft())
  while waiting:
    yield jax.device_get(waiting.popleft())


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple
