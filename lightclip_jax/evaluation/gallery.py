"""Pictures with the model's first guesses, for the report.

Letters: N images, n those that are asked for their concept, C concepts, S pixels.
"""
import dataclasses
import hashlib

import numpy as np

from lightclip_jax.data import transforms
from lightclip_jax.data.records import Record
from lightclip_jax.evaluation import labelled
from lightclip_jax.evaluation.ranks import best_ranks, same
from lightclip_jax.evaluation.session import Session

DRAWN = 96   # pixels of a drawn image


@dataclasses.dataclass(frozen=True)
class Picture:
  """One image and what it shows."""
  image: np.ndarray                          # uint8 [S, S, 3]
  name: str
  style: str
  licence: str


@dataclasses.dataclass(frozen=True)
class Guessed(Picture):
  """With the names that the model finds most probable, best first."""
  guesses: tuple[tuple[str, float], ...]     # (name, probability)

  @property
  def right(self) -> bool:
    """Whether the first guess is the image's name."""
    return self.guesses[0][0] == self.name


def make_gallery(session: Session, split: str, *, count: int = 48, guesses: int = 5) -> list[Guessed]:
  """`count` pictures of a split: half of them recognised and half not, as far as there are so many of either.

  Which ones is decided by a hash of their keys, so that two reports on the same data show mostly the same pictures.
  """
  records, names = session.records(split), session.manifest.concepts
  labels_N = labelled.labels(records, 'concept', names)
  asked = labelled.asked(records, labels_N)
  if not len(asked):
    return []
  classes_CxD, images_NxD = session.classes(names, 'name'), session.images(split)
  ranks_n = best_ranks(images_NxD[asked], classes_CxD, same(labels_N[asked], np.arange(len(names))))
  chosen = asked[choose([records[i].key for i in asked], ranks_n == 0, count)]
  logits = session.embedder.logit_scale * images_NxD[chosen] @ classes_CxD.T
  probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
  return [_guessed(records[i], names, row, guesses) for i, row in zip(chosen, probabilities, strict=True)]


def choose(keys: list[str], right_N: np.ndarray, count: int) -> list[int]:
  """Indices of up to `count` examples, right and wrong alternating while both last, in the order of their hashes."""
  hashes = [hashlib.md5(key.encode(), usedforsecurity=False).digest() for key in keys]
  order = sorted(range(len(keys)), key=hashes.__getitem__)
  right, wrong = [i for i in order if right_N[i]], [i for i in order if not right_N[i]]
  both = min(len(right), len(wrong))
  mixed = [i for pair in zip(right, wrong, strict=False) for i in pair]
  return (mixed + right[both:] + wrong[both:])[:count]


def picture(record: Record, size: int) -> Picture:
  """A record's, `size` pixels wide and high."""
  image = transforms.evaluation_transform(transforms.decode(record.image, None), size)
  return Picture(image, record.concept, record.style, record.licence)


def _guessed(record: Record, names: tuple[str, ...], probabilities_C: np.ndarray, guesses: int) -> Guessed:
  best = np.argsort(-probabilities_C, kind='stable')[:guesses]
  return Guessed(**vars(picture(record, DRAWN)), guesses=tuple((names[i], float(probabilities_C[i])) for i in best))
