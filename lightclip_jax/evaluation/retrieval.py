"""Image-text retrieval, both ways, with any number of captions an image and images a caption.

Letters: I images, T texts, D embedding.

The protocol: every image asks all distinct texts, and every distinct text asks all images. R@k is the share of queries
with *any* right answer among the first k (with five captions an image: any of the five; where several images bear the
same caption: any of them). Ties count against the model (evaluation/ranks.py).
"""
import dataclasses
import math

import numpy as np

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


def retrieval(
    image_embeddings_IxD: np.ndarray, text_embeddings_TxD: np.ndarray, image_ids_I: np.ndarray,
    text_ids_T: np.ndarray, *, top: tuple[int, ...] = (1, 5, 10), chunk: int = 1024) -> RetrievalResult:
  """R@k and the median rank both ways; an image and a text belong together when their ids are equal.

  Five captions an image: `image_ids = arange(I)`, `text_ids = repeat(arange(I), 5)`. Several images a caption: each
  distinct caption once, and its number as the id of all of its images.

  Args:
    image_embeddings_IxD: float32 [I, D], unit vectors.
    text_embeddings_TxD: float32 [T, D], unit vectors.
    image_ids_I: int [I].
    text_ids_T: int [T].
    top: the k of R@k.
    chunk: queries at a time; memory beyond the embeddings is O(chunk·max(I, T)).

  Raises:
    UserError: for an empty side, or when an image or a text has no partner.
  """
  image_ids_I, text_ids_T = np.asarray(image_ids_I), np.asarray(text_ids_T)
  if not len(image_ids_I) or not len(text_ids_T):
    raise UserError(f'retrieval over {len(image_ids_I)} images and {len(text_ids_T)} texts; it needs both')
  sides = (image_embeddings_IxD, image_ids_I), (text_embeddings_TxD, text_ids_T)
  return RetrievalResult(image_to_text=_direction(*sides[0], *sides[1], top, chunk),
                         text_to_image=_direction(*sides[1], *sides[0], top, chunk))


def metrics(result: RetrievalResult) -> list[Metric]:
  """Both ways as metrics `image_to_text_r1` … `text_to_image_median_rank`."""
  found = []
  for way in ('image_to_text', 'text_to_image'):
    one: Direction = getattr(result, way)
    found += [Metric(f'{way}_r{k}', share, one.count, one.chance[k]) for k, share in one.recall.items()]
    found.append(Metric(f'{way}_median_rank', one.median_rank, one.count))
  return found


def _direction(queries, query_ids, candidates, candidate_ids, top, chunk) -> Direction:
  ranks_Q = best_ranks(queries, candidates, query_ids, candidate_ids, chunk=chunk)
  ids, copies = np.unique(candidate_ids, return_counts=True)
  right_Q = copies[np.searchsorted(ids, query_ids)]
  return Direction(recall={k: float(np.mean(ranks_Q < k)) for k in top},
                   chance={k: _chance(right_Q, len(candidates), k) for k in top},
                   median_rank=float(np.median(ranks_Q)) + 1, count=len(ranks_Q))


def _chance(right_Q: np.ndarray, candidates: int, k: int) -> float:
  """The mean over queries of 1 - C(n-m, k) / C(n, k): k drawn from n candidates hit one of the m right ones."""
  sizes, queries = np.unique(right_Q, return_counts=True)
  k = min(k, candidates)
  misses = [math.comb(candidates - int(m), k) / math.comb(candidates, k) for m in sizes]
  return float(1 - np.average(misses, weights=queries))
