"""Zero-shot classification of an image set: the class whose texts lie nearest to the image."""
import numpy as np

from lightclip_jax.evaluation import calibration
from lightclip_jax.evaluation.labelled import ImageSet
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.zero_shot import zero_shot


def run(session: Session, images: ImageSet) -> list[Metric]:
  """Top-1, top-5 where there are more classes, mean per-class accuracy and the calibration error."""
  classes_CxD = session.classes(images.classes, images.prompts, images.name)
  images_NxD, labels_N, count = session.embed(images.test), images.test.labels_N, len(images.classes)
  result = zero_shot(images_NxD, classes_CxD, labels_N, top=(1, 5) if count > 5 else (1,))
  asked_N = np.where(images_NxD.any(axis=1), labels_N, -1)   # of an image that cannot be read, class 0 would be the guess
  confidence_N, hit_N = calibration.confidence(images_NxD, classes_CxD, asked_N, session.embedder.logit_scale)
  return [*(Metric(f'top{k}', share, result.count, k / count) for k, share in result.top.items()),
          Metric('mean_per_class', result.mean_per_class, result.count, 1 / count),
          Metric('calibration_error', calibration.error(confidence_N, hit_N), len(np.asarray(labels_N)))]
