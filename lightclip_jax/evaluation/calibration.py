"""Whether a model that says 80 % is right in 80 % of cases.

Letters: N images, C classes, D embedding.
"""
import dataclasses

import numpy as np

from lightclip_jax.evaluation.ranks import score_chunks


@dataclasses.dataclass(frozen=True)
class Bin:
  """Images whose confidence lies in one tenth of [0, 1]."""
  confidence: float    # mean
  accuracy: float
  count: int


def confidence(images_NxD: np.ndarray, classes_CxD: np.ndarray, labels_N: np.ndarray,
               logit_scale: float) -> tuple[np.ndarray, np.ndarray]:
  """The probability of the first guess, float64 [N], and whether that is the right class, bool [N]."""
  most, right = [], []
  for start, scores_cxC in score_chunks(images_NxD, classes_CxD):
    logits = logit_scale * scores_cxC
    guess = np.argmax(logits, axis=1)
    most.append(np.exp(np.max(logits, axis=1) - np.logaddexp.reduce(logits, axis=1)))
    right.append(guess == labels_N[start:start + len(guess)])
  return np.concatenate(most), np.concatenate(right)


def bins(confidence_N: np.ndarray, hit_N: np.ndarray, count: int = 10) -> list[Bin]:
  """The parts of equal width that hold an image."""
  place_N = np.minimum((confidence_N * count).astype(int), count - 1)
  return [Bin(float(confidence_N[mine].mean()), float(hit_N[mine].mean()), int(mine.sum()))
          for mine in (place_N == i for i in range(count)) if mine.any()]


def error(confidence_N: np.ndarray, hit_N: np.ndarray, count: int = 10) -> float:
  """Expected calibration error: the mean over images of |accuracy − confidence| of their bin (arXiv:1706.04599)."""
  return sum(b.count * abs(b.accuracy - b.confidence) for b in bins(confidence_N, hit_N, count)) / len(confidence_N)
