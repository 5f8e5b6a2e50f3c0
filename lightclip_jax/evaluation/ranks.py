"""Exact ranks of right answers among all candidates, in chunks.

Letters: Q queries, C candidates, D embedding, c queries of one chunk.

The tie rule, used everywhere: *pessimistic*. A wrong candidate that scores the same as the best right one stands before
it. A collapsed model, whose scores are all equal, therefore gets 0 and not 100 %. Scores are float64 products of the
float32 embeddings, and within 1e-9 count as equal: the same vector gets the same rank whatever the chunk, the order
or the BLAS, which in float32 add up in different orders.
"""
from collections.abc import Iterator

import numpy as np
import scipy.sparse

from lightclip_jax.errors import UserError

TIE = 1e-9


def best_ranks(
    queries_QxD: np.ndarray, candidates_CxD: np.ndarray, right_QxC: scipy.sparse.csr_array, *,
    chunk: int = 1024) -> np.ndarray:
  """How many wrong candidates stand before the best right one, for each query; 0 is the best.

  Any number of candidates may be right for a query, and a candidate for any number of queries; a query without a right
  one has all C before it. Memory is O(chunk·C) beyond the embeddings and the relation.

  Args:
    queries_QxD: float [Q, D].
    candidates_CxD: float [C, D].
    right_QxC: bool [Q, C], which candidates are right for which queries (`same` makes it from ids).
    chunk: queries at a time; the result does not depend on it.

  Returns:
    int64 [Q].

  Raises:
    UserError: when an embedding is not finite.
  """
  ranks = [np.zeros(0, np.int64)]
  for start, scores_cxC in score_chunks(queries_QxD, candidates_CxD, chunk):
    right_cxC = right_QxC[start:start + len(scores_cxC)].toarray()
    best_c = np.max(scores_cxC, axis=1, where=right_cxC, initial=-np.inf)
    ranks.append(np.sum((scores_cxC >= best_c[:, None] - TIE) & ~right_cxC, axis=1))
  return np.concatenate(ranks)


def same(query_ids_Q: np.ndarray, candidate_ids_C: np.ndarray) -> scipy.sparse.csr_array:
  """bool [Q, C]: a candidate is right where its id is the query's."""
  order_C = np.argsort(candidate_ids_C, kind='stable')
  first_Q, end_Q = (np.searchsorted(candidate_ids_C[order_C], query_ids_Q, side) for side in ('left', 'right'))
  starts = np.concatenate([[0], np.cumsum(end_Q - first_Q)])
  places = np.arange(starts[-1]) + np.repeat(first_Q - starts[:-1], end_Q - first_Q)
  return scipy.sparse.csr_array((np.ones(len(places), bool), order_C[places], starts), shape=(len(query_ids_Q), len(order_C)))


def score_chunks(
    queries_QxD: np.ndarray, candidates_CxD: np.ndarray, chunk: int = 1024) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (first query, float64 scores [c, C]) until all queries are through."""
  for what, values in ('query', queries_QxD), ('candidate', candidates_CxD):
    if not (finite := np.isfinite(values).all(axis=1)).all():
      raise UserError(f'the embedding of {what} {int(np.argmin(finite))} is not finite; ranks need finite numbers')
  candidates_DxC = candidates_CxD.astype(np.float64).T
  for start in range(0, len(queries_QxD), chunk):
    yield start, queries_QxD[start:start + chunk].astype(np.float64) @ candidates_DxC
