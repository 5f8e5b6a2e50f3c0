"""Exact search: the nearest of up to some millions of unit vectors.

Letters: N vectors, D embedding, K answers.
"""
import numpy as np

_MARGIN = 2e-4   # a float32 product of unit vectors is off by D * 2^-24 at most: enough for D up to 1600, on both sides
_CHUNK = 65536


def nearest(vectors_NxD: np.ndarray, query_D: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
  """The `top` rows with the largest products with the query: (rows int64 [K], products float64 [K]), best first.

  The order is that of products in float64, equal ones in the order of their rows: one pass in float32 (at the speed of
  memory) leaves only rows that can be among the first, and these are computed again. K is `top` or N if that is less.

  Args:
    vectors_NxD: float32 unit vectors, a memory map for example.
    query_D: float32 unit vector.
    top: how many are wanted, at least 1.
  """
  count = min(top, len(vectors_NxD))
  if not count:
    return np.zeros(0, np.int64), np.zeros(0, np.float64)
  products_N = np.empty(len(vectors_NxD), np.float32)
  for start in range(0, len(vectors_NxD), _CHUNK):
    np.matmul(vectors_NxD[start:start + _CHUNK], query_D, out=products_N[start:start + _CHUNK])
  least = np.partition(products_N, -count)[-count]
  rows = np.flatnonzero(products_N >= least - _MARGIN)
  # Not a product of matrices: BLAS sums a row in another order by where it stands, and equal pictures would differ.
  exact = np.concatenate([(vectors_NxD[rows[i:i + _CHUNK]] * query_D.astype(np.float64)).sum(axis=1)
                          for i in range(0, len(rows), _CHUNK)])
  order = np.lexsort((rows, -exact))[:count]
  return rows[order], exact[order]
