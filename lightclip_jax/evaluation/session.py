"""What the tasks of one evaluation share: each image and each text is embedded once.

Letters: N images, T texts, C classes, D embedding.
"""
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from lightclip_jax import config as config_lib
from lightclip_jax import storage
from lightclip_jax.data import manifest, pipeline, transforms
from lightclip_jax.data.records import Record
from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import prompts
from lightclip_jax.evaluation.embed import Embedder
from lightclip_jax.evaluation.labelled import ImageSet, Part
from lightclip_jax.inference.class_names import class_embeddings

Folder = str | storage.Path | Callable[[], storage.Path]


class Session:
  """One model, and the prepared folder that its tasks may read; embeddings are kept while it lives.

  Attributes:
    embedder, token_matching: as given.
    prompts: template set -> hash of its templates, of those that were used so far.
    records: split -> the folder's records in order.
    image_sets: name -> the set, of those that were used so far.
  """

  def __init__(self, embedder: Embedder, folder: Folder, *, templates: prompts.Choice = prompts.OWN,
               token_matching: config_lib.TokenMatching = config_lib.TokenMatching(),  # noqa: B008 (frozen)
               max_pixels: int = transforms.MAX_PIXELS):
    """
    Args:
      embedder: the model.
      folder: a prepared one, or what finds it when a task first needs it (many tasks need none).
      templates: the user's templates instead of the tasks' own.
      token_matching: how patches and words are matched.
      max_pixels: `data.max_pixels`; a larger image of the folder is a mistake.
    """
    self.embedder, self.token_matching, self.prompts = embedder, token_matching, {}
    self._folder, self._templates, self._max_pixels = folder, templates, max_pixels
    self._texts: dict[str, np.ndarray] = {}
    self._images: dict[str, np.ndarray] = {}
    self.image_sets: dict[str, ImageSet] = {}
    self.records = functools.cache(self._records)

  @functools.cached_property
  def folder(self) -> storage.Path:
    """The prepared folder. Raises UserError if there is none."""
    return storage.path(self._folder() if callable(self._folder) else self._folder)

  @functools.cached_property
  def manifest(self) -> manifest.Manifest:
    """The folder's."""
    return manifest.load(self.folder)

  def part(self, split: str) -> Part:
    """The images of a split of the folder, all of class 0."""
    records = self.records(split)
    return Part(split, lambda i: transforms.decode(records[i].image, None), np.zeros(len(records), np.int64))

  def images(self, split: str) -> np.ndarray:
    """float32 [N, D] of a split."""
    return self.embed(self.part(split))

  def embed(self, part: Part) -> np.ndarray:
    """float32 [N, D] of the images of a part, 0 for one that cannot be read; with a progress bar on a terminal."""
    if part.name not in self._images:
      total = -(-len(part.labels_N) // self.embedder.batch_size)
      self._images[part.name] = self.embedder.images(
        tqdm(self.batches(part), f'embedding {part.name}', total, leave=False, disable=None))
    return self._images[part.name]

  def features(self, parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """All images of several parts that can be read: float32 [N, D] and labels [N]. Raises UserError if there is none."""
    features_NxD, labels_N = np.concatenate([self.embed(p) for p in parts]), np.concatenate([p.labels_N for p in parts])
    read_N = features_NxD.any(axis=1)
    if not read_N.any():
      raise UserError(f'none of the {len(read_N):,} images of {parts[0].name!r} can be read, or the embeddings of all are 0')
    return (features_NxD, labels_N) if read_N.all() else (features_NxD[read_N], labels_N[read_N])

  def texts(self, texts: Sequence[str]) -> np.ndarray:
    """float32 [T, D]; only texts that were not asked for before pass through the text tower."""
    if new := [text for text in dict.fromkeys(texts) if text not in self._texts]:
      self._texts.update(zip(new, self.embedder.texts(new), strict=True))
    return np.stack([self._texts[text] for text in texts])

  def classes(self, names: Sequence[str], template_set: str, data: str = '') -> np.ndarray:
    """float32 [C, D]: class embeddings by the user's templates (for the image set `data`), else by `template_set`."""
    name, templates = self._templates.resolve(template_set, data)
    self.prompts[name] = hashlib.sha256(json.dumps(templates).encode()).hexdigest()[:12]
    return class_embeddings(self.texts, names, templates)

  def _records(self, split: str) -> list[Record]:
    """The records of a split of the folder, in order."""
    return pipeline.evaluation_records(self.folder, split, self._max_pixels)

  def batches(self, part: Part) -> Iterable[Mapping[str, np.ndarray]]:
    """This process's share of the part's images, padded to static shapes."""
    return pipeline.padded_batches(
      part.read, len(part.labels_N), image_size=self.embedder.image_size, batch_size=self.embedder.batch_size,
      process_index=self.embedder.share, process_count=self.embedder.shares)
