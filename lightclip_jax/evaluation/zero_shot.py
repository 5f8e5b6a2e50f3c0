"""Zero-shot classification: the class whose text lies nearest to the image.

Letters: N images, C classes, T templates, D embedding.
"""
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.ranks import best_ranks


@dataclasses.dataclass(frozen=True)
class ZeroShotResult:
  """Accuracies in [0, 1]."""
  top: dict[int, float]        # k -> share of images whose class is among the k nearest
  mean_per_class: float        # top-1 averaged over the classes that have an image
  ranks: np.ndarray            # int64 [N]: wrong classes that stand before the right one
  count: int                   # N


def zero_shot(
    image_embeddings_NxD: np.ndarray, class_embeddings_CxD: np.ndarray, labels_N: np.ndarray, *,
    top: tuple[int, ...] = (1, 5), chunk: int = 1024) -> ZeroShotResult:
  """Top-k and mean per-class accuracy; ties count against the model (evaluation/ranks.py).

  Args:
    image_embeddings_NxD: float32 [N, D], unit vectors.
    class_embeddings_CxD: float32 [C, D], unit vectors (`class_embeddings`).
    labels_N: int [N], each in [0, C).
    top: the k of top-k.
    chunk: images at a time.

  Raises:
    UserError: without images, or for a label outside [0, C).
  """
  labels_N, classes = np.asarray(labels_N), len(class_embeddings_CxD)
  if not len(labels_N):
    raise UserError('zero-shot classification of 0 images; it needs at least one')
  if labels_N.min() < 0 or labels_N.max() >= classes:
    wrong = labels_N[(labels_N < 0) | (labels_N >= classes)][0]
    raise UserError(f'label {wrong} is not one of the {classes} classes (0 to {classes - 1})')
  ranks_N = best_ranks(image_embeddings_NxD, class_embeddings_CxD, labels_N, np.arange(classes), chunk=chunk)
  right, seen = np.bincount(labels_N, ranks_N == 0), np.bincount(labels_N)
  shares = {k: float(np.mean(ranks_N < k)) for k in top}
  return ZeroShotResult(shares, float(np.mean(right[seen > 0] / seen[seen > 0])), ranks_N, len(labels_N))


def class_embeddings(
    embed: Callable[[list[str]], np.ndarray], names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
  """One unit vector a class: the mean over templates of the unit text vectors, normalised again (as CLIP does).

  Args:
    embed: list of N texts -> float32 [N, D], unit vectors.
    names: the C class names.
    templates: each with one `{}` for the name.

  Returns:
    float32 [C, D].

  Raises:
    UserError: for an empty class name, or a template without exactly one `{}`.
  """
  for name in names:
    if not name.strip():
      raise UserError(f'class {list(names).index(name)} has no name; zero-shot classification needs one for each class')
  for template in templates:
    if template.count('{}') != 1:
      raise UserError(f'prompt template {template!r} must hold {{}} once, where the class name goes')
  texts = [template.replace('{}', name) for name in names for template in templates]
  means_CxD = embed(texts).reshape(len(names), len(templates), -1).mean(axis=1)
  return means_CxD / np.linalg.norm(means_CxD, axis=1, keepdims=True).clip(1e-12)
