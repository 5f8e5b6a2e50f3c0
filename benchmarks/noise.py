"""Random examples in the shape of a config's batches: what a step is timed on where the data do not matter."""
import jax
import numpy as np

from lightclip_jax import config as config_lib
from lightclip_jax.training.step import abstract_batch


def examples(config: config_lib.Config, mesh: jax.sharding.Mesh, length: int | None = None) -> dict[str, np.ndarray]:
  """A global batch of noise, on the host; the texts have `length` positions, None: the context."""
  rng = np.random.default_rng(0)
  arrays = {name: rng.integers(0, 2 if leaf.dtype == bool else 12, leaf.shape).astype(leaf.dtype)
            for name, leaf in vars(abstract_batch(config, mesh, length)).items() if leaf is not None}
  arrays['image'] = rng.integers(0, 256, arrays['image'].shape, np.uint8)
  arrays['tokens'][:, -1] = arrays['masked_tokens'][:, -1] = config.model.text.end_id
  arrays['caption_id'] = np.arange(len(arrays['caption_id']), dtype=np.int32)
  return arrays
