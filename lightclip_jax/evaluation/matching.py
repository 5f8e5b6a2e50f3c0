"""Which patches each word is matched with, for the report.

Letters: N pairs, P patches (a square grid of G×G), W text positions, S pixels.
"""
import dataclasses
import math

import jax
import numpy as np

from lightclip_jax.data import transforms
from lightclip_jax.evaluation.gallery import choose
from lightclip_jax.evaluation.session import Session
from lightclip_jax.objectives import sinkhorn_plan

DRAWN = 128   # pixels of a drawn image: finer than a small model's input, so that people see what it shows


@dataclasses.dataclass(frozen=True)
class Matching:
  """One image and, for each word of its caption, how its mass spreads over the patches."""
  image: np.ndarray                # uint8 [S, S, 3]
  style: str
  licence: str
  words: tuple[str, ...]
  heat: tuple[np.ndarray, ...]     # float32 [G, G] a word, each ≥ 0


def make_matchings(session: Session, split: str, *, count: int = 8) -> list[Matching]:
  """Sinkhorn plans between the patches of `count` images and the words of their first captions (2 to 5 words); none where the
  matching's weight was 0, which leaves the heads that it compares as they were drawn."""
  if session.token_matching.weight.is_zero:
    return []
  records = session.records(split)
  keys = [record.key for record in records]
  several = np.array([2 <= len(record.captions[0].split()) <= 5 for record in records])
  chosen = [i for i in choose(keys, several, len(keys)) if several[i]][:count]
  if not chosen:
    return []
  embedder, options = session.embedder, session.token_matching
  decoded = [transforms.decode(records[i].image, None) for i in chosen]
  images = np.stack([transforms.evaluation_transform(image, embedder.image_size) for image in decoded])
  tokens_NxW = embedder.tokenizer.encode([records[i].captions[0] for i in chosen], embedder.context)
  mask_NxW = embedder.tokenizer.word_mask(tokens_NxW)
  plan_NxPxW = plans(*embedder.tokens(images, tokens_NxW), mask_NxW, options.epsilon, options.num_iterations)
  pictures = [transforms.evaluation_transform(image, DRAWN) for image in decoded]
  return [Matching(picture, records[i].style, records[i].licence, *_by_word(embedder.tokenizer, tokens_W, plan_PxW))
          for picture, i, tokens_W, plan_PxW in zip(pictures, chosen, tokens_NxW, plan_NxPxW, strict=True)]


def plans(image_tokens_NxPxd: np.ndarray, text_tokens_NxWxd: np.ndarray, word_mask_NxW: np.ndarray, epsilon: float,
          num_iterations: int) -> np.ndarray:
  """float32 [N, P, W]: the relaxed one-to-one matching of patches and words, by cosine."""
  cost_NxPxW = 1 - np.einsum('npd,nwd->npw', image_tokens_NxPxd, text_tokens_NxWxd)
  rows_NxP = np.ones(cost_NxPxW.shape[:2], bool)
  plan = sinkhorn_plan(cost_NxPxW, rows_NxP, word_mask_NxW, epsilon=epsilon, num_iterations=num_iterations)
  return np.asarray(jax.device_get(plan), np.float32)


def _by_word(tokenizer, tokens_W, plan_PxW) -> tuple[tuple[str, ...], tuple[np.ndarray, ...]]:
  """Pieces joined to words, and each word's mass on the grid of patches."""
  places = np.flatnonzero(tokenizer.word_mask(tokens_W))
  grid = math.isqrt(len(plan_PxW))
  words, heat = [], []
  for group in join_pieces(tokenizer.pieces(tokens_W[places])):
    words.append(''.join(group.values()))
    heat.append(plan_PxW[:grid * grid, places[list(group)]].sum(axis=1).reshape(grid, grid))
  return tuple(words), tuple(heat)


def join_pieces(pieces: list[str]) -> list[dict[int, str]]:
  """Words as {position: letters}. SentencePiece marks a word's start with "▁", CLIP's tokenizer its end with "</w>"."""
  words: list[dict[int, str]] = []
  ended = True
  for place, piece in enumerate(pieces):
    if ended or piece.startswith('▁'):
      words.append({})
    words[-1][place] = piece.removeprefix('▁').removesuffix('</w>')
    ended = piece.endswith('</w>')
  return [word for word in words if any(word.values())]
