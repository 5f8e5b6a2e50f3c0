"""What a page shows of a model's mistakes: classes it confuses, what it finds similar, how sure it is.

Letters: N images, n those that are asked for their concept, C classes.
"""
import dataclasses
from collections.abc import Sequence

import numpy as np

from lightclip_jax.evaluation import calibration, labelled
from lightclip_jax.evaluation.gallery import Picture, choose, picture
from lightclip_jax.evaluation.ranks import score_chunks
from lightclip_jax.evaluation.session import Session

DRAWN = 72   # pixels of a drawn image


@dataclasses.dataclass(frozen=True)
class Confused:
  """A class and what its images are taken for, the most frequent first."""
  name: str
  count: int
  accuracy: float
  taken_for: tuple[tuple[str, float], ...]   # (another class, share of the images)


@dataclasses.dataclass(frozen=True)
class Neighbours:
  """An image and those of other splits that lie nearest to it, the nearest first."""
  query: Picture
  nearest: tuple[tuple[Picture, float], ...]   # (image, cosine)


@dataclasses.dataclass(frozen=True)
class Insight:
  """All of it for one split."""
  confused: tuple[Confused, ...] = ()
  neighbours: tuple[Neighbours, ...] = ()
  bins: tuple[calibration.Bin, ...] = ()
  calibration_error: float = 0.0


def look(session: Session, split: str, others: Sequence[str]) -> Insight:
  """Confusion of the groups (of the concepts, where there are no groups), calibration of the concepts, and neighbours
  of a few of the split's images among the images of other splits; empty for data without names."""
  manifest, records = session.manifest, session.records(split)
  concepts_N = labelled.labels(records, 'concept', manifest.concepts)
  asked = labelled.asked(records, concepts_N)
  if not len(asked):
    return Insight()
  kind, classes = ('group', manifest.groups) if manifest.groups else ('concept', manifest.concepts)
  images_nxD, labels_n = session.images(split)[asked], labelled.labels(records, kind, classes)[asked]
  guesses_n = np.concatenate([scores.argmax(axis=1) for _, scores in
                              score_chunks(images_nxD, session.classes(classes, 'name'))])
  sure_n, hit_n = calibration.confidence(images_nxD, session.classes(manifest.concepts, 'name'), concepts_N[asked],
                                         session.embedder.logit_scale)
  return Insight(tuple(worst(labels_n, guesses_n, classes)), tuple(_neighbours(session, split, others)),
                 tuple(calibration.bins(sure_n, hit_n)), calibration.error(sure_n, hit_n))


def worst(labels_N: np.ndarray, guesses_N: np.ndarray, names: Sequence[str], *, count: int = 9,
          shown: int = 3) -> list[Confused]:
  """The classes that are recognised least often, and the `shown` classes that each is most often taken for."""
  found = []
  for label in np.unique(labels_N[labels_N >= 0]):
    shares_C = np.bincount(guesses_N[labels_N == label], minlength=len(names)) / np.sum(labels_N == label)
    wrong = [i for i in np.argsort(-shares_C, kind='stable') if i != label and shares_C[i] > 0][:shown]
    found.append(Confused(names[label], int(np.sum(labels_N == label)), float(shares_C[label]),
                          tuple((names[i], float(shares_C[i])) for i in wrong)))
  return sorted(found, key=lambda one: one.accuracy)[:count]


def _neighbours(session: Session, split: str, others: Sequence[str], count: int = 8, nearest: int = 5) -> list[Neighbours]:
  records, pool = session.records(split), [r for other in others for r in session.records(other)]
  if not pool:
    return []
  chosen = choose([record.key for record in records], np.ones(len(records), bool), count)
  candidates = np.concatenate([session.images(other) for other in others])
  (_, cosine_NxM), = score_chunks(session.images(split)[chosen], candidates)
  order_NxM = np.argsort(-cosine_NxM, axis=1, kind='stable')[:, :nearest]
  return [Neighbours(picture(records[i], DRAWN), tuple((picture(pool[j], DRAWN), float(cosine_M[j])) for j in best))
          for i, best, cosine_M in zip(chosen, order_NxM, cosine_NxM, strict=True)]
