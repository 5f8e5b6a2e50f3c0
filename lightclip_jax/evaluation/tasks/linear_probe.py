"""Linear probe: logistic regression on the image embeddings, its regularisation chosen on validation images."""
import numpy as np

from lightclip_jax.evaluation import probes
from lightclip_jax.evaluation.labelled import ImageSet
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks.training_part import needs_training


def run(session: Session, images: ImageSet) -> list[Metric]:
  """Top-1, mean per-class accuracy, and the strength that was chosen (scikit-learn's C).

  A set without validation images gives a fifth of its training images, the same share of each class, to choose by.
  """
  features, labels = session.features(needs_training(images))
  if images.validation:
    parts = [(features, labels), session.features(images.validation)]
  else:
    parts = [(features[i], labels[i]) for i in probes.split_off(labels)]
  test, test_labels, classes = session.embed(images.test), images.test.labels_N, len(images.classes)
  weights, strength = probes.sweep(*parts, classes)
  right = probes.hits(probes.scores(weights, test), test_labels, test)
  per_class = np.bincount(test_labels, right, classes) / np.bincount(test_labels, minlength=classes)
  return [Metric('top1', float(np.mean(right)), len(right), 1 / classes),
          Metric('mean_per_class', float(np.mean(per_class)), len(right), 1 / classes),
          Metric('strength', strength, len(labels))]
