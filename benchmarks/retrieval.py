"""Time and memory of exact retrieval ranks: 25,000 captions × 5,000 images, five captions an image, D = 512.

COMMAND  python -m benchmarks.retrieval
Measured on 2 CPU cores: see docs/EVALUATION.md.
"""
import argparse
import resource
import time

import numpy as np

from lightclip_jax.evaluation.ranks import same
from lightclip_jax.evaluation.retrieval import retrieval

IMAGES, CAPTIONS, DIM = 5000, 5, 512


def main() -> None:
  """Prints seconds, and GiB at the peak beyond the embeddings (and the imported packages)."""
  argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
  rng = np.random.default_rng(0)
  images, texts = (rng.normal(size=(count, DIM)).astype(np.float32) for count in (IMAGES, IMAGES * CAPTIONS))
  images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
  before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
  result = retrieval(images, texts, same(np.arange(IMAGES), np.repeat(np.arange(IMAGES), CAPTIONS)))
  seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(f'{seconds:.1f} s, {(after - before) / 2 ** 20:.2f} GiB beyond the embeddings; '
        f'R@10 {result.text_to_image.recall[10]:.4f} (chance {result.text_to_image.chance[10]:.4f})')


if __name__ == '__main__':
  main()
