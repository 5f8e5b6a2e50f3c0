"""What the tasks of one evaluation share: each image and each text is embedded once.

Letters: N images, T texts, D embedding.
"""
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lightclip_jax.data import manifest, pipeline
from lightclip_jax.evaluation.embed import Embedder


class Session:
  """One model on one prepared folder; embeddings are kept while it lives."""

  def __init__(self, embedder: Embedder, folder: str | pathlib.Path):
    self.embedder, self.folder, self.manifest = embedder, folder, manifest.load(folder)
    self._texts: dict[str, np.ndarray] = {}
    self.images = functools.cache(self._images)
    self.records = functools.cache(functools.partial(pipeline.evaluation_records, folder))

  def texts(self, texts: Sequence[str]) -> np.ndarray:
    """float32 [T, D]; only texts that were not asked for before pass through the text tower."""
    if new := [text for text in dict.fromkeys(texts) if text not in self._texts]:
      self._texts.update(zip(new, self.embedder.texts(new), strict=True))
    return np.stack([self._texts[text] for text in texts])

  def batches(self, split: str) -> Any:
    """This process's share of the split's images, padded to static shapes."""
    return pipeline.evaluation_batches(
      self.folder, split, image_size=self.embedder.image_size, batch_size=self.embedder.batch_size,
      process_index=jax.process_index(), process_count=jax.process_count())

  def _images(self, split: str) -> np.ndarray:
    """float32 [N, D] of a split, with a progress bar on a terminal."""
    total = -(-len(self.records(split)) // self.embedder.batch_size)
    return self.embedder.images(tqdm(self.batches(split), f'embedding {split}', total, leave=False, disable=None))
