"""Word to patch: does a word point at the thing that it names? Scenes of held-out drawings whose places are known.

Letters: N scenes, P patches (a square grid of G×G), W text positions.

A thing's name points at the patch with the most of it: of the Sinkhorn plan's mass summed over the name's positions, or,
for comparison, of their mean cosine (maximal similarity, as FILIP matches). It is a hit when that patch's middle lies in
the thing's cell, borders included; a patch elsewhere that has as much makes it a miss. Chance is a guess among the
things of the scene: a pointer that finds things but knows no words. A guess among all patches is right less often.
"""
import math

import numpy as np

from lightclip_jax.errors import UserError
from lightclip_jax.evaluation import matching
from lightclip_jax.evaluation.image_sets.heldout import TEST
from lightclip_jax.evaluation.metrics import Metric
from lightclip_jax.evaluation.scenes import GRID, Scene, compose
from lightclip_jax.evaluation.session import Session

SCENES = 600
TIE = 1e-6


def run(session: Session) -> list[Metric]:
  """Pointing accuracy by the plan and by maximal similarity, each over all names of all scenes.

  Raises:
    UserError: if no scene can be composed, or the model's image tokens are no square grid of at least 2×2.
  """
  embedder, options = session.embedder, session.token_matching
  scenes = compose(session.records(TEST), embedder.tokenizer, size=embedder.image_size, context=embedder.context, count=SCENES)
  if not scenes:
    raise UserError(f'no scene of two things with plain names fits into {embedder.context} text positions')
  tokens_NxW = np.stack([scene.tokens for scene in scenes])
  patches_NxPxd, words_NxWxd = embedder.tokens(np.stack([scene.image for scene in scenes]), tokens_NxW)
  grid = math.isqrt(patches_NxPxd.shape[1])
  if grid ** 2 != patches_NxPxd.shape[1] or grid < GRID:
    raise UserError(f'the image tower has {patches_NxPxd.shape[1]} tokens; pointing needs a square grid of at least 2×2')
  mask_NxW = embedder.tokenizer.word_mask(tokens_NxW)
  plan_NxPxW = matching.plans(patches_NxPxd, words_NxWxd, mask_NxW, options.epsilon, options.num_iterations)
  cosine_NxPxW = np.einsum('npd,nwd->npw', patches_NxPxd, words_NxWxd)
  chance = np.concatenate([np.full(len(scene.names), 1 / len(scene.names)) for scene in scenes])
  anywhere = 'a patch at random', float(np.mean([inside(cell, grid).mean() for scene in scenes for cell in scene.cells]))
  return [Metric(name, float(np.mean(hits(scenes, maps_NxPxW, grid))), len(chance), float(chance.mean()), (anywhere,))
          for name, maps_NxPxW in (('plan', plan_NxPxW), ('max_similarity', cosine_NxPxW))]


def hits(scenes: list[Scene], maps_NxPxW: np.ndarray, grid: int) -> np.ndarray:
  """bool: for each name of each scene whether the map of its positions is highest in its cell."""
  found = []
  for scene, map_PxW in zip(scenes, maps_NxPxW, strict=True):
    for cell, places in zip(scene.cells, scene.places, strict=True):
      heat_P, inside_P = map_PxW[:, list(places)].mean(axis=1), inside(cell, grid).ravel()
      found.append(heat_P[inside_P].max() > heat_P[~inside_P].max() + TIE)
  return np.array(found)


def inside(cell: tuple[int, int], grid: int) -> np.ndarray:
  """bool [G, G]: the patches whose middles lie in a cell (row, column) of the scene's grid."""
  middle = (np.arange(grid) + 0.5) / grid * GRID
  rows, columns = ((at <= middle) & (middle <= at + 1) for at in cell)
  return rows[:, None] & columns[None, :]
