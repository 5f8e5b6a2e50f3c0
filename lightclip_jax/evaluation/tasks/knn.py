"""k-nearest-neighbour probe: the class that the nearest training images vote for."""
import numpy as np

from lightclip_jax.evaluation import probes
from lightclip_jax.evaluation.labelled import ImageSet
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks.training_part import needs_training

NEIGHBOURS = (1, 20)


def run(session: Session, images: ImageSet) -> list[Metric]:
  """Top-1 by one neighbour and by twenty."""
  train = session.features(needs_training(images))
  test, labels, classes = session.embed(images.test), images.test.labels_N, len(images.classes)
  metrics = []
  for count in NEIGHBOURS:
    votes = probes.nearest_neighbours(test, *train, classes, count=count)
    accuracy = float(np.mean(probes.hits(votes, labels, test)))
    metrics.append(Metric(f'top1_{count}_neighbours', accuracy, len(labels), 1 / classes))
  return metrics
