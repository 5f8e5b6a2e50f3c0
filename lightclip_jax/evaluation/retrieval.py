"""Image-text retrieval, both ways, with any number of captions an image and images a caption.

Letters: I images, T texts, D embedding.

The protocol: every image asks all distinct texts, and every distinct text asks all images. R@k is the share of queries
with *any* right answer among the first k (with five captions an image: any of the five; where several images bear the
same caption: any of them). Ties count against the model (evaluation/ranks.py).
"""
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.sparse

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.ranks import best_ranks


@dataclasses.dataclass(frozen=True)
class Direction:
  """One way of the retrieval."""
  recall: dict[int, float]     # k -> share of queries with a right answer among the first k
  chance: dict[int, float]     # the same for a random order of the candidates
  median_rank: float           # of the best right answer; 1 is the best
  count: int                   # queries


@dataclasses.dataclass(frozen=True)
class RetrievalResult:
  """Both ways."""
  image_to_text: Direction
  text_to_image: Direction


def distinct(captions: Sequence[Sequence[str]]) -> tuple[list[str], scipy.sparse.csr_array]:
  """From the captions of each image: the T distinct texts, and which image bears which, bool [I, T].

  The empty text, of records that cannot be used, is right for none: they are mistakes both ways.
  """
  number = {text: i for i, text in enumerate(dict.fromkeys(text for of_image in captions for text in of_image))}
  pairs = [(image, number[text]) for image, of_image in enumerate(captions) for text in dict.fromkeys(of_image) if text]
  places = tuple(np.array(pairs, np.int64).reshape(-1, 2).T)
  return list(number), scipy.sparse.csr_array((np.ones(len(pairs), bool), places), shape=(len(captions), len(number)))


def retrieval(
    image_embeddings_IxD: np.ndarray, text_embeddings_TxD: np.ndarray, right_IxT: scipy.sparse.csr_array, *,
    top: tuple[int, ...] = (1, 5, 10), chunk: int = 1024) -> RetrievalResult:
  """R@k and the median rank both ways; an image or a text without a partner is a mistake.

  Args:
    image_embeddings_IxD: float32 [I, D], unit vectors.
    text_embeddings_TxD: float32 [T, D], unit vectors.
    right_IxT: bool [I, T], which image and text belong together (from `distinct`, or `ranks.same` for ids).
    top: the k of R@k.
    chunk: queries at a time; memory beyond the embeddings is O(chunk·max(I, T)).

  Raises:
    UserError: for an empty side.
  """
  images, texts = right_IxT.shape
  if not images or not texts:
    raise UserError(f'retrieval over {images} images and {texts} texts; it needs both')
  return RetrievalResult(
      image_to_text=_direction(image_embeddings_IxD, text_embeddings_TxD, right_IxT, top, chunk),
      text_to_image=_direction(text_embeddings_TxD, image_embeddings_IxD, right_IxT.T.tocsr(), top, chunk))


def metrics(result: RetrievalResult) -> list[Metric]:
  """Both ways as metrics `image_to_text_r1` … `text_to_image_median_rank`."""
  found = []
  for way in ('image_to_text', 'text_to_image'):
    one: Direction = getattr(result, way)
    found += [Metric(f'{way}_r{k}', share, one.count, one.chance[k]) for k, share in one.recall.items()]
    found.append(Metric(f'{way}_median_rank', one.median_rank, one.count))
  return found


def _direction(queries, candidates, right_QxC, top, chunk) -> Direction:
  ranks_Q = best_ranks(queries, candidates, right_QxC, chunk=chunk)
  right_Q = right_QxC.count_nonzero(axis=1)   # the rank of those without any, C, would be a hit for a k beyond it
  return Direction(recall={k: float(np.mean((ranks_Q < k) & (right_Q > 0))) for k in top},
                   chance={k: _chance(right_Q, len(candidates), k) for k in top},
                   median_rank=float(np.median(ranks_Q)) + 1, count=len(ranks_Q))


def _chance(right_Q: np.ndarray, candidates: int, k: int) -> float:
  """The mean over queries of 1 - C(n-m, k) / C(n, k): k drawn from n candidates hit one of the m right ones."""
  sizes, queries = np.unique(right_Q, return_counts=True)
  k = min(k, candidates)
  misses = [math.comb(candidates - int(m), k) / math.comb(candidates, k) for m in sizes]
  return float(1 - np.average(misses, weights=queries))
