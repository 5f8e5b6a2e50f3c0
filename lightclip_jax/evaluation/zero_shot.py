"""Zero-shot classification: the class whose text lies nearest to the image.

Letters: N images, C classes, D embedding.
"""
import dataclasses

import numpy as np

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.ranks import best_ranks, same


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
    class_embeddings_CxD: float32 [C, D], unit vectors (inference/class_names.py).
    labels_N: int [N], each in [0, C), or -1 for an image of no class, which is a mistake.
    top: the k of top-k.
    chunk: images at a time.

  Raises:
    UserError: without images, or for a label outside [-1, C).
  """
  labels_N, classes = np.asarray(labels_N), len(class_embeddings_CxD)
  if not len(labels_N):
    raise UserError('zero-shot classification of 0 images; it needs at least one')
  if labels_N.min() < -1 or labels_N.max() >= classes:
    wrong = labels_N[(labels_N < -1) | (labels_N >= classes)][0]
    raise UserError(f'label {wrong} is not one of the {classes} classes (0 to {classes - 1})')
  ranks_N = best_ranks(image_embeddings_NxD, class_embeddings_CxD, same(labels_N, np.arange(classes)), chunk=chunk)
  known_N = labels_N >= 0   # the others' rank, C, would be a hit for a k beyond it
  shares = {k: float(np.mean((ranks_N < k) & known_N)) for k in top}
  right, seen = np.bincount(labels_N[known_N], ranks_N[known_N] == 0), np.bincount(labels_N[known_N])
  mean_per_class = float(np.mean(right[seen > 0] / seen[seen > 0])) if known_N.any() else 0.0
  return ZeroShotResult(shares, mean_per_class, ranks_N, len(labels_N))
