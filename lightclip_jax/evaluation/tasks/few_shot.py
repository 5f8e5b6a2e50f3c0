"""Few-shot probe: the nearest class mean of a few training images."""
import numpy as np

from lightclip_jax.evaluation import probes
from lightclip_jax.evaluation.labelled import ImageSet
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.session import Session
from lightclip_jax.evaluation.tasks.training_part import needs_training

SHOTS, DRAWS = (1, 5, 10), 5


def run(session: Session, images: ImageSet) -> list[Metric]:
  """Top-1 after 1, 5 and 10 images a class: the mean over five draws, the same ones in every run."""
  features_NxD, labels_N = session.features(needs_training(images))
  test, labels, classes = session.embed(images.test), images.test.labels_N, len(images.classes)
  metrics = []
  for shots in SHOTS:
    hits = []
    for draw in range(DRAWS):
      chosen = choose(labels_N, shots, draw)
      means_CxD = probes.class_means(features_NxD[chosen], labels_N[chosen], classes)
      hits.append(np.mean(probes.hits(test.astype(np.float64) @ means_CxD.T, labels, test)))
    metrics.append(Metric(f'top1_{shots}_shots', float(np.mean(hits)), len(labels), 1 / classes))
  return metrics


def choose(labels_N: np.ndarray, shots: int, seed: int) -> np.ndarray:
  """Indices of `shots` images of every class at random, or all of a class that has fewer."""
  order = np.random.default_rng(seed).permutation(len(labels_N))
  return np.concatenate([order[labels_N[order] == label][:shots] for label in np.unique(labels_N)])
