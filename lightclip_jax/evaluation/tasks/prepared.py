"""A split of a prepared folder: concepts and groups by zero-shot classification, and retrieval.

The classes are *all* concepts of the manifest, not only the split's (1,914 for emoji), and all its groups by name.
Of a mixture only the records that have a concept, or a group, are classified. Retrieval is between the images and their
names; an image without a concept has all its captions, those of all records that have it (a table's rows, say).
"""
from collections.abc import Sequence

import numpy as np

from lightclip_jax.data.records import Record
from lightclip_jax.evaluation import labelled, retrieval
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.zero_shot import zero_shot

# One-nearest-neighbour image-to-image from the other styles (measured; docs/DATA.md).
_PIXELS, _FEATURES = 'raw-pixel 1-NN', 'ImageNet MobileNetV2 features 1-NN'
ANCHORS = {
  ('emoji', 'heldout_style', 'concept_top1'): ((_PIXELS, 0.073), (_FEATURES, 0.099)),
  ('emoji', 'heldout_style', 'group_top1'): ((_PIXELS, 0.260), (_FEATURES, 0.427)),
}


def run(session: Session, split: str) -> list[Metric]:
  """Concepts top-1 and top-5, groups top-1, and R@k both ways."""
  manifest, records = session.manifest, session.records(split)
  metrics = []
  if manifest.concepts:
    metrics += _classification(session, split, 'concept', manifest.concepts, (1, 5))
  if manifest.groups:
    metrics += _classification(session, split, 'group', manifest.groups, (1,))
  same = _of_one_image(records)
  captions = [records[rows[0]].captions[:1] if records[rows[0]].concept else
              [text for row in rows for text in records[row].captions] for rows in same]
  return metrics + _retrieval(session, session.images(split)[[rows[0] for rows in same]], captions)


def _classification(session, split, kind, classes, top) -> list[Metric]:
  records = session.records(split)
  labels_N = labelled.labels(records, kind, classes)
  asked = labelled.asked(records, labels_N)
  if not len(asked):
    return []
  result = zero_shot(session.images(split)[asked], session.classes(classes, 'name'), labels_N[asked], top=top)
  return [Metric(f'{kind}_top{k}', share, result.count, min(1.0, k / len(classes)),
                 ANCHORS.get((session.manifest.name, split, f'{kind}_top{k}'), ())) for k, share in result.top.items()]


def _of_one_image(records: Sequence[Record]) -> list[list[int]]:
  """The records of each image; one with a concept, or that cannot be used, stands for itself."""
  rows: dict[bytes | int, list[int]] = {}
  for row, record in enumerate(records):
    alone = record.concept or record.captions == ('',)
    rows.setdefault(row if alone else record.image, []).append(row)
  return list(rows.values())


def _retrieval(session: Session, images_IxD: np.ndarray, captions: Sequence[Sequence[str]]) -> list[Metric]:
  """Each distinct caption is asked once, and any image that bears it is right."""
  texts, right_IxT = retrieval.distinct(captions)
  return retrieval.metrics(retrieval.retrieval(images_IxD, session.texts(texts), right_IxT))
