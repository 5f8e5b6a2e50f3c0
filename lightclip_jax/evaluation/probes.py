"""Classifiers on frozen image embeddings: logistic regression, nearest neighbours, class means.

Letters: N training images, Q test images, D embedding, C classes, c images of one chunk, k neighbours.
"""
import numpy as np
import scipy.optimize

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.ranks import TIE, score_chunks

CHUNK = 8192
STRENGTHS = tuple(10.0 ** power for power in range(-2, 7))   # C, inverse regularisation, as in scikit-learn


def logistic_regression(features_NxD: np.ndarray, labels_N: np.ndarray, classes: int, strength: float, *,
                        start: np.ndarray | None = None, iterations: int = 1000) -> np.ndarray:
  """Minimises mean cross-entropy + |W|² / (2 N strength) over W and a bias that is free, by L-BFGS in float64.

  scikit-learn's `LogisticRegression(C=strength)` has the same minimum.

  Args:
    features_NxD: float [N, D].
    labels_N: int [N], in [0, C).
    classes: C.
    strength: C of scikit-learn.
    start: a solution to start from, such as that of another strength.
    iterations: of L-BFGS at most.

  Returns:
    float64 [D + 1, C]: weights, and the bias in the last row.
  """
  count, dim = features_NxD.shape
  shape, penalty = (dim + 1, classes), 1 / (count * strength)
  features = np.concatenate([features_NxD, np.ones((count, 1))], axis=1, dtype=np.float64)

  def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
    solution = flat.reshape(shape)
    value, gradient = _cross_entropy(solution, features, labels_N)
    weights = np.concatenate([solution[:-1], np.zeros((1, classes))])
    return value + penalty / 2 * float(np.sum(weights ** 2)), (gradient + penalty * weights).ravel()

  first = np.zeros(shape) if start is None else start
  found = scipy.optimize.minimize(objective, first.ravel(), jac=True, method='L-BFGS-B',
                                  options=dict(maxiter=iterations, maxfun=2 * iterations, maxcor=20, ftol=1e-12, gtol=1e-6))
  return found.x.reshape(shape)


def _cross_entropy(solution: np.ndarray, features_NxF: np.ndarray, labels_N: np.ndarray) -> tuple[float, np.ndarray]:
  """The mean and its gradient, in chunks: logits of a million images by a thousand classes would take eight gigabytes."""
  value, gradient, count = 0.0, np.zeros_like(solution), len(labels_N)
  for first in range(0, count, CHUNK):
    part_cxF, labels_c = features_NxF[first:first + CHUNK], labels_N[first:first + CHUNK]
    logits_cxC = part_cxF @ solution
    logits_cxC -= logits_cxC.max(axis=1, keepdims=True)
    probability_cxC = np.exp(logits_cxC)
    sums_c = probability_cxC.sum(axis=1)
    own = np.arange(len(labels_c)), labels_c
    value += float(np.sum(np.log(sums_c) - logits_cxC[own]))
    probability_cxC /= sums_c[:, None]
    probability_cxC[own] -= 1
    gradient += part_cxF.T @ probability_cxC
  return value / count, gradient / count


def scores(weights: np.ndarray, features_QxD: np.ndarray) -> np.ndarray:
  """Logits, float64 [Q, C]."""
  return features_QxD.astype(np.float64) @ weights[:-1] + weights[-1][None]


def sweep(train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray],
          classes: int) -> tuple[np.ndarray, float]:
  """(weights, strength): the strength that is best on the validation images, fitted again on all images.

  Each strength starts at the solution of the one before, the strongest regularisation first. Of equal accuracies the
  stronger regularisation is taken. Without validation images it is 1, as in scikit-learn.

  Args:
    train, validation: features [N, D] and labels [N].
    classes: C.
  """
  if not len(validation[1]):
    return logistic_regression(*train, classes, 1.0), 1.0
  weights, best = None, (-1.0, STRENGTHS[0], None)
  for strength in STRENGTHS:
    weights = logistic_regression(*train, classes, strength, start=weights, iterations=200)
    accuracy = float(np.mean(ranks_of(scores(weights, validation[0]), validation[1]) == 0))
    if accuracy > best[0]:
      best = accuracy, strength, weights
  both = [np.concatenate(pair) for pair in zip(train, validation, strict=True)]
  return logistic_regression(*both, classes, best[1], start=best[2]), best[1]


def split_off(labels_N: np.ndarray, share: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Indices (kept, split off): of every class the same share, rounded down, but at least one; a class of one image keeps it."""
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(labels_N))
  place = np.empty(len(labels_N), int)
  for label in np.unique(labels_N):
    mine = order[labels_N[order] == label]
    place[mine] = np.arange(len(mine)) - min(max(1, int(share * len(mine))), len(mine) - 1)
  return np.flatnonzero(place >= 0), np.flatnonzero(place < 0)


def nearest_neighbours(queries_QxD: np.ndarray, features_NxD: np.ndarray, labels_N: np.ndarray, classes: int, *,
                       count: int = 20, temperature: float = 0.07) -> np.ndarray:
  """Votes, float64 [Q, C]: each of the `count` nearest neighbours by cosine votes with exp(cosine / temperature).

  The rule of arXiv:1805.01978. Neighbours that are as near as the last of them vote too, so that the result depends on
  no order.

  Args:
    queries_QxD, features_NxD: unit vectors.
    labels_N: int [N].
    classes: C.
    count: k; 1 is the nearest neighbour alone.
    temperature: of the votes.
  """
  if not len(labels_N):
    raise UserError('nearest neighbours of 0 images; at least one is needed')
  count, votes = min(count, len(labels_N)), []
  for _, scores_cxN in score_chunks(queries_QxD, features_NxD):
    last_c = np.partition(scores_cxN, -count, axis=1)[:, -count]
    row, column = np.nonzero(scores_cxN >= last_c[:, None] - TIE)
    weight = np.exp((scores_cxN[row, column] - 1) / temperature)
    flat = np.bincount(row * classes + labels_N[column], weight, minlength=len(scores_cxN) * classes)
    votes.append(flat.reshape(len(scores_cxN), classes))
  return np.concatenate(votes)


def class_means(features_NxD: np.ndarray, labels_N: np.ndarray, classes: int) -> np.ndarray:
  """float64 [C, D] unit vectors: the normalised mean of each class's images (prototypes, arXiv:1703.05175); 0 without one."""
  sums_CxD = np.zeros((classes, features_NxD.shape[1]))
  np.add.at(sums_CxD, labels_N, features_NxD.astype(np.float64))
  return sums_CxD / np.linalg.norm(sums_CxD, axis=1, keepdims=True).clip(1e-12)


def ranks_of(scores_QxC: np.ndarray, labels_Q: np.ndarray) -> np.ndarray:
  """int64 [Q]: classes that stand before the right one; one with the same score does (evaluation/ranks.py)."""
  own_Q = np.take_along_axis(scores_QxC, labels_Q[:, None], axis=1)
  return np.sum(scores_QxC >= own_Q - TIE * np.abs(own_Q).clip(1e-300), axis=1) - 1


def hits(scores_QxC: np.ndarray, labels_Q: np.ndarray, features_QxD: np.ndarray) -> np.ndarray:
  """bool [Q]: the right class stands first; an image that cannot be read, whose features are 0, is a mistake."""
  return (ranks_of(scores_QxC, labels_Q) == 0) & features_QxD.any(axis=1)
