"""The style that training never saw, as classes of a prepared folder: its concepts or its groups.

A probe learns from all images in other styles, whichever split they are in, as the anchors in docs/DATA.md do.
"""
import functools
from typing import Literal

import numpy as np

from lightclip_jax.evaluation.labelled import ImageSet, Part
from lightclip_jax.evaluation.session import Session

TEST, OTHER_STYLES = 'heldout_style', ('train', 'heldout_images', 'heldout_concepts')


def load(session: Session, kind: Literal['concept', 'group']) -> ImageSet:
  """The classes that the held-out style draws, numbered in the order of their names.

  Raises:
    UserError: for a folder without that split.
  """
  names = sorted({getattr(record, kind) for record in session.records(TEST)} - {''})   # '': it cannot be used
  part = functools.partial(_part, session, kind, {name: i for i, name in enumerate(names)})
  there = [split for split in OTHER_STYLES if split in session.manifest.splits]
  return ImageSet(f'{kind}s', tuple(names), part(TEST), lambda: tuple(map(part, there)), prompts='name')


def _part(session: Session, kind: str, number: dict[str, int], split: str) -> Part:
  """The images of a split whose class the test has; a split that is taken whole shares its embeddings with other tasks."""
  labels_N = np.array([number.get(getattr(record, kind), -1) for record in session.records(split)])
  kept = np.flatnonzero(labels_N >= 0)
  whole = session.part(split)
  if len(kept) == len(labels_N):
    return Part(whole.name, whole.read, labels_N)
  return Part(f'{whole.name}/{kind}', lambda i: whole.read(kept[i]), labels_N[kept])
