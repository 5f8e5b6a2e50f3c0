"""Which words the masked language model has to guess (docs/OBJECTIVES.md, 3).

Letters: W text positions, K masked positions.
"""
from collections.abc import Sequence

import numpy as np


def mask_words(tokens_W: np.ndarray, word_mask_W: np.ndarray, rng: np.random.Generator, *, fraction: float,
               max_masked: int, mask_id: int, vocab_size: int, special_ids: Sequence[int],
               ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Picks `fraction` of the words, at least one where there is a word and at most K = `max_masked`.

  Of those, 80 % become [MASK], 10 % a random word that is not special, and 10 % stay (BERT, arXiv:1810.04805).

  Args:
    tokens_W: int32 [W].
    word_mask_W: bool [W], true for words.
    rng: the example's own generator.

  Returns:
    masked tokens int32 [W]; positions int32 [K], ascending; labels int32 [K], the tokens that were there; weights
    float32 [K], 1 for a real position. Entries without weight are position 0, label 0.
  """
  words = np.flatnonzero(word_mask_W)
  wanted = int(fraction * len(words) + rng.random())     # the expected number is exactly fraction * words
  count = min(max(wanted, 1), max_masked, len(words))
  chosen = np.sort(rng.permutation(words)[:count])
  labels, lot = tokens_W[chosen], rng.random(count)
  masked_W = tokens_W.copy()
  masked_W[chosen] = np.where(lot < 0.8, mask_id, labels)
  if (random_words := chosen[(lot >= 0.8) & (lot < 0.9)]).size:
    masked_W[random_words] = _ordinary_words(rng, random_words.size, vocab_size, special_ids)
  positions_K, labels_K, weights_K = (np.zeros(max_masked, dtype) for dtype in (np.int32, np.int32, np.float32))
  positions_K[:count], labels_K[:count], weights_K[:count] = chosen, labels, 1.0
  return masked_W, positions_K, labels_K, weights_K


def _ordinary_words(rng: np.random.Generator, count: int, vocab_size: int, special_ids: Sequence[int]) -> np.ndarray:
  """int64 [count], uniform over all ids that are not special: drawn from a range without gaps, then moved past each."""
  ids = rng.integers(vocab_size - len(special_ids), size=count)
  for special in sorted(special_ids):
    ids += ids >= special
  return ids
