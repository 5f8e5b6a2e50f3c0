"""StableHLO by `jax.export`: for cpu, cuda and tpu, any batch size, weights inside; read back without our model code."""
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from lightclip_jax.export.towers import Towers

PLATFORMS = ('cpu', 'cuda', 'tpu')


def write(towers: Towers, folder: pathlib.Path) -> dict[str, Any]:
  """Writes `image.stablehlo` and `text.stablehlo`; returns what `model.json` says about them.

  `jax.export.deserialize(bytes).call(batch)` runs them.
  """
  _write(towers.image, towers.image_item, folder / 'image.stablehlo')
  _write(towers.text, towers.text_item, folder / 'text.stablehlo')
  return {'format': 'stablehlo', 'image': 'image.stablehlo', 'text': 'text.stablehlo', 'platforms': PLATFORMS,
          'jax': jax.__version__}


def _write(tower: Callable[[jax.Array], jax.Array], item: jax.ShapeDtypeStruct, file: pathlib.Path) -> None:
  batch, = jax.export.symbolic_shape('batch')
  exported = jax.export.export(jax.jit(tower), platforms=PLATFORMS)(
    jax.ShapeDtypeStruct((batch, *item.shape), item.dtype))
  file.write_bytes(exported.serialize())
