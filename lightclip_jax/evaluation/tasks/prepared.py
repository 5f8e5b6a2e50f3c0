"""A split of a prepared folder: concepts and groups by zero-shot classification, and retrieval.

The classes are *all* concepts of the manifest, not only the split's (1,914 for emoji), and all its groups by name.
Of a mixture only the records that have a concept, or a group, are classified. Retrieval is between the images and their
names; an image without a concept has all its captions.
"""
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
  return metrics + _retrieval(session, split, [r.captions[:1] if r.concept else r.captions for r in records])


def _classification(session, split, kind, classes, top) -> list[Metric]:
  records = session.records(split)
  labels_N = labelled.labels(records, kind, classes)
  asked = labelled.asked(records, labels_N)
  if not len(asked):
    return []
  result = zero_shot(session.images(split)[asked], session.classes(classes, 'name'), labels_N[asked], top=top)
  return [Metric(f'{kind}_top{k}', share, result.count, min(1.0, k / len(classes)),
                 ANCHORS.get((session.manifest.name, split, f'{kind}_top{k}'), ())) for k, share in result.top.items()]


def _retrieval(session, split, captions) -> list[Metric]:
  """Each distinct caption is asked once, and any image that bears it is right."""
  texts, right_IxT = retrieval.distinct(captions)
  return retrieval.metrics(retrieval.retrieval(session.images(split), session.texts(texts), right_IxT))
